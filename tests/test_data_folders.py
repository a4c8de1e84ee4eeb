"""A user's own folders: VOC, masks; what is wrong in them is named, and nothing leads out of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitcourse.data import AnnotatedImages, SemanticMask, hold_out, open_dataset, split_names

WIDTH, HEIGHT = 30, 20


def picture(path: Path, size=(WIDTH, HEIGHT), **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path, **save)
    return path


# --- VOC ---


def voc_xml(name="a.png", boxes=(("cat", 1, 1, 10, 20),), size=(WIDTH, HEIGHT), head="") -> str:
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for label, x0, y0, x1, y1 in boxes
    )
    shape = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"{head}<annotation><path>/elsewhere/x.jpg</path><filename>{name}</filename>{shape}{objects}</annotation>"


def write_voc(top: Path, files: dict[str, str | bytes], folders=("annotations", "images"), pictures=("a.png", "b.png")):
    (top / folders[0]).mkdir(parents=True, exist_ok=True)
    for name in pictures:
        picture(top / folders[1] / name)
    for name, content in files.items():
        (top / folders[0] / f"{name}.xml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"voc:{top}"


TWO = {"a": voc_xml(boxes=[("dog", 3, 4, 5, 6), ("cat", 1, 1, 30, 20)]), "b": voc_xml("b.png", boxes=[])}


@pytest.mark.parametrize("folders", [("annotations", "images"), ("Annotations", "JPEGImages"), (".", ".")])
def test_voc(tmp_path, folders):
    spec = write_voc(tmp_path, TWO, folders)
    assert split_names(spec) == ["train"]
    dataset = open_dataset(spec)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 2
    target = dataset[0][1]
    assert target["boxes"].tolist() == [[2, 3, 5, 6], [0, 0, 30, 20]]  # counted from 1, the last pixel inclusive
    assert target["labels"].tolist() == [1, 0] and target["area"].tolist() == [9, 600]
    assert dataset[1][1]["boxes"].shape == (0, 4)
    rest, held = hold_out(dataset, 0.5)
    assert len(rest) == len(held) == 1 and isinstance(held, AnnotatedImages)


def test_voc_splits_and_classes(tmp_path, capsys):
    write_voc(tmp_path / "listed", TWO)
    sets = tmp_path / "listed" / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("a\n", encoding="utf-8")
    (sets / "test.txt").write_text("b -1\n", encoding="utf-8")
    spec = f"voc:{tmp_path / 'listed'}"
    assert split_names(spec) == ["train", "test"]
    train, test = (open_dataset(spec, split) for split in ("train", "test"))
    assert (
        len(train) == len(test) == 1 and test.classes == ["cat", "dog"] and Path(test.annotations[0].file).stem == "b"
    )
    for split, boxes in (("train", [("cat", 1, 1, 5, 5)]), ("valid", [("emu", 1, 1, 5, 5)])):
        write_voc(tmp_path / "own" / split, {"a": voc_xml(boxes=boxes)})
    spec = f"voc:{tmp_path / 'own'}"
    assert split_names(spec) == ["train", "val"]
    with pytest.raises(
        ValueError, match=r"valid/annotations/a.xml has an object 'emu', which is not among the classes \(cat\)"
    ):
        open_dataset(spec, "val")
    (tmp_path / "own" / "classes.txt").write_text("emu\ncat\n", encoding="utf-8")
    assert open_dataset(spec, "val")[0][1]["labels"].tolist() == [0] and open_dataset(spec).classes == ["emu", "cat"]
    (tmp_path / "own" / "classes.txt").write_text("emu\nemu\n", encoding="utf-8")
    with pytest.raises(ValueError, match="classes.txt has 'emu' twice"):
        open_dataset(spec)


ENTITIES = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd"><!ENTITY y "yyyyyyyy">]>'
BAD_VOC = {
    "no area": (voc_xml(boxes=[("cat", 5, 5, 4, 9)]), r"a.xml: the box \[4, 4, 4, 9\] .* of cat has no area"),
    "outside": (voc_xml(boxes=[("cat", 40, 5, 50, 9)]), "lies outside the image of 30 × 20 pixels"),
    "no number": (voc_xml(boxes=[("cat", "x", 5, 50, 9)]), "has 'x' where <bndbox/xmin> should be a number"),
    "not finite": (voc_xml(boxes=[("cat", 1, 1, "nan", 9)]), "has no area"),
    "size": (voc_xml(size=(0, 20)), "says that the image has 0 × 20 pixels"),
    "missing": (voc_xml("c.png"), "a.xml names 'c.png', which is not in .*images"),
    "no name": (voc_xml(""), "a.xml names '', which leads out"),
    "upwards": (voc_xml("../../x.png"), "leads out of"),
    "absolute": (voc_xml("/etc/passwd"), "leads out of"),
    "doctype": (voc_xml(head="<!DOCTYPE annotation>"), "a.xml declares a document type or entities, which are refused"),
    "entities": (voc_xml("&x;", head=ENTITIES), "a.xml declares a document type or entities, which are refused"),
    "utf-16": (voc_xml(head=ENTITIES).encode("utf-16"), "refused"),
    "broken": (voc_xml()[:60], "a.xml is no usable XML"),
    "empty": (b"", "a.xml is no usable XML"),
    "huge": (b"<a>" + b" " * (4 * 2**20) + b"</a>", "a.xml has 4194311 bytes, too many"),
}


@pytest.mark.parametrize("name", BAD_VOC)
def test_bad_voc_is_raised_or_skipped(name, tmp_path, capsys):
    content, message = BAD_VOC[name]
    spec = write_voc(tmp_path, {"a": content, "b": voc_xml("b.png")})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset(spec)
    assert capsys.readouterr().err == ""
    dataset = open_dataset(spec, on_error="skip")
    assert sum(len(dataset[k][1]["labels"]) for k in range(len(dataset))) == 1
    assert capsys.readouterr().err.startswith("vitcourse: left out 1 of ")


def test_a_link_may_not_lead_out(tmp_path):
    picture(tmp_path / "secret.png")
    spec = write_voc(tmp_path / "mine", {"a": voc_xml("link.png")})
    (tmp_path / "mine" / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="names 'link.png', which leads out of"):
        open_dataset(spec)
    moved = (tmp_path / "mine" / "images").rename(tmp_path / "elsewhere")  # a whole folder may lie elsewhere
    (tmp_path / "mine" / "images").symlink_to(moved)
    write_voc(tmp_path / "mine", {"a": voc_xml("a.png")}, pictures=())
    assert len(open_dataset(spec)) == 1


def test_boxes_that_reach_out_are_clipped(tmp_path, capsys):
    boxes = [("cat", 0, 0, 31, 21), ("cat", -9, 5, 12, 40)]
    target = open_dataset(write_voc(tmp_path, {"a": voc_xml(boxes=boxes)}))[0][1]
    assert target["boxes"].tolist() == [[0, 0, 30, 20], [0, 4, 12, 20]]
    assert "1 boxes of voc:" in (err := capsys.readouterr().err) and "are clipped" in err  # the first is off by one


def test_an_image_of_another_size_is_named(tmp_path):
    dataset = open_dataset(write_voc(tmp_path, {"a": voc_xml(size=(50, HEIGHT))}))
    with pytest.raises(ValueError, match=r"a.png has 30 × 20 pixels, but .*a.xml says 50 × 20"):
        dataset[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    spec = write_voc(tmp_path, {"a": voc_xml("c.jpg")})
    picture(tmp_path / "images" / "c.jpg", exif=exif)
    with pytest.raises(ValueError, match="turned upright, as its EXIF says"):
        open_dataset(spec)[0]


# --- Masks ---


def write_masks(top: Path, masks: dict[str, np.ndarray], folders=("images", "masks"), mode="L") -> str:
    for stem, values in masks.items():
        picture(top / folders[0] / f"{stem}.jpg")
        (top / folders[1]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(values.astype(np.uint8))
        if mode == "P":
            image.putpalette(np.random.RandomState(0).randint(0, 256, 768).tolist())
        image.convert(mode).save(top / folders[1] / f"{stem}.png")
    return f"masks:{top}"


BINARY = np.where(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 7 == 0, 255, 0)
CLASSES = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3


@pytest.mark.parametrize("folders", [("images", "masks"), ("image", "label"), ("JPEGImages", "SegmentationClass")])
@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
def test_binary_masks(tmp_path, folders, mode):
    spec = write_masks(tmp_path, {"a": BINARY, "b": BINARY // 255 * 255}, folders, mode)
    dataset = open_dataset(spec)
    assert split_names(spec) == ["train"] and dataset.classes == dataset.semantic_classes == [
        "background",
        "foreground",
    ]
    image, target = dataset[0]
    assert image.shape == (3, HEIGHT, WIDTH) and sorted(target) == ["image_id", "semantic"]
    assert isinstance(target["semantic"], SemanticMask) and target["semantic"].dtype == torch.int64
    assert np.array_equal(target["semantic"].numpy(), BINARY // 255)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_of_classes(tmp_path, mode):
    void = CLASSES.copy()
    void[0] = 255
    for split in ("train", "val"):
        write_masks(tmp_path / split, {"x": void}, mode=mode)
    spec = f"masks:{tmp_path}"
    with pytest.raises(ValueError, match=r"x.png has the values 0, 1, 2, 255, not only 0 and 255; .*classes.txt"):
        open_dataset(spec)[0]
    (tmp_path / "classes.txt").write_text("sky\n\nsea\nland\n", encoding="utf-8")
    dataset = open_dataset(spec, "val")
    assert split_names(spec) == ["train", "val"] and dataset.classes == ["sky", "sea", "land"]
    assert np.array_equal(dataset[0][1]["semantic"].numpy(), void)
    (tmp_path / "classes.txt").write_text("sky\nsea\n", encoding="utf-8")
    with pytest.raises(ValueError, match="x.png has the value 2, but there are 2 classes, 0 to 1"):
        open_dataset(spec)[0]


def test_bad_masks(tmp_path, capsys):
    spec = write_masks(tmp_path, {"a": BINARY, "b": BINARY[:, :-1], "c": BINARY})
    with pytest.raises(ValueError, match=r"b.png has 29 × 20 pixels, its image .*b.jpg 30 × 20"):
        open_dataset(spec)[1]
    Image.fromarray(np.stack([BINARY, BINARY // 2, BINARY], -1).astype(np.uint8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(ValueError, match="a.png is a mask in colours"):
        open_dataset(spec)[0]
    (tmp_path / "masks" / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="a.png is not a usable image"):
        open_dataset(spec)[0]
    (tmp_path / "masks" / "c.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"c.jpg has no mask .*masks/c.png"):
        open_dataset(spec)
    with pytest.raises(ValueError, match=r"none of 2 images can be read; the first: .*c.jpg has no mask"):
        open_dataset(spec, on_error="skip")
    write_masks(tmp_path, {"d": BINARY})
    assert len(open_dataset(spec, on_error="skip")) == 1  # all are read once: a and b are of no use either
    assert "left out 3 of 4 images" in capsys.readouterr().err
    picture(tmp_path / "images" / "b.png")
    with pytest.raises(ValueError, match="b.jpg and .*b.png differ only in their endings"):
        open_dataset(spec)


# --- Names ---


@pytest.mark.parametrize("kind", ["coco", "voc", "masks", "video"])
def test_names_without_a_folder_or_layout(kind, tmp_path):
    with pytest.raises(ValueError, match=f"spec '{kind}' names no folder; write {kind}:PATH"):
        open_dataset(kind)
    with pytest.raises(FileNotFoundError, match=r"(?s)has no train split; expected .*holds nothing"):
        open_dataset(f"{kind}:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_dataset(f"{kind}:{tmp_path / 'gone'}")
    with pytest.raises(ValueError, match="split 'dev' of"):
        open_dataset(f"{kind}:{tmp_path}", "dev")
    assert split_names(f"{kind}:{tmp_path}") == []


def test_rendered_data_and_options_by_name():
    assert split_names("scenes") == split_names("moving") == ["train", "val", "test"]
    assert open_dataset("scenes", "val", img_size=32)[0][0].shape == (3, 32, 32)
    assert open_dataset("moving", "val", num_frames=3)[0][0].shape == (3, 3, 48, 48)
    with pytest.raises(TypeError, match="fashion_mnist_subset has no option img_size"):
        open_dataset("fashion_mnist_subset", img_size=32)
    with pytest.raises(ValueError, match="did you mean 'scenes'"):
        open_dataset("scene")
