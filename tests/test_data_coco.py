"""A user's folder in COCO's format: boxes, polygons, run lengths, crowds; what is wrong in it is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from vitcourse.data import SemanticMask, open_dataset, split_names
from vitcourse.data.cocomask import decode_mask

WIDTH, HEIGHT = 30, 20


def picture(path: Path, size=(WIDTH, HEIGHT), **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path, **save)
    return path


SQUARE = [2, 3, 8, 3, 8, 9, 2, 9]


def coco(**changes) -> dict:
    """Two images; the first has a cat of a polygon and a crowd of dogs as run lengths, the second nothing."""
    crowd = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * 10, HEIGHT * 5, HEIGHT * 15]}
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
            {"id": 9, "file_name": "b.png", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 18, "bbox": [2, 3, 6, 6], "segmentation": [SQUARE], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [10, 0, 5, 20], "segmentation": crowd, "iscrowd": 1},
        ],
        "categories": [{"id": 18, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    return {**content, **changes}


def write_coco(top: Path, content: dict | None = None, file="annotations/instances_train2017.json", images="train2017"):
    for name in ("a.png", "b.png"):
        picture(top / images / name)
    (top / file).parent.mkdir(parents=True, exist_ok=True)
    (top / file).write_text(json.dumps(coco() if content is None else content), encoding="utf-8")
    return f"coco:{top}"


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/train.json", "images"),
        ("train/_annotations.coco.json", "train"),
        ("train/labels.json", "train/images"),
        ("annotations.json", "images"),
        ("annotations.json", "."),
    ],
)
def test_coco(tmp_path, file, images):
    spec = write_coco(tmp_path, file=file, images=images)
    assert split_names(spec) == ["train"]
    dataset = open_dataset(spec)
    assert dataset.classes == ["dog", "cat"] and dataset.semantic_classes == ["background", "dog", "cat"]
    image, target = dataset[0]
    assert isinstance(image, tv_tensors.Image) and image.shape == (3, HEIGHT, WIDTH) and len(dataset) == 2
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes) and target["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert target["boxes"].tolist() == [[2, 3, 8, 9], [10, 0, 15, 20]] and target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1, 0] and target["iscrowd"].tolist() == [0, 1] and target["image_id"] == 7
    square, crowd = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.uint8)
    square[3:9, 2:8], crowd[:, 10:15] = 1, 1
    assert torch.equal(target["masks"].as_subclass(torch.Tensor), torch.stack([square, crowd]))
    assert target["area"].tolist() == [36, 100]
    assert isinstance(target["semantic"], SemanticMask)
    assert torch.equal(target["semantic"].as_subclass(torch.Tensor), (2 * square.long() + 255 * crowd.long()))
    empty = dataset[1][1]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, HEIGHT, WIDTH) and empty["image_id"] == 9


def test_coco_without_crowds_or_masks(tmp_path):
    spec = write_coco(tmp_path)
    assert open_dataset(spec, crowd=False)[0][1]["labels"].tolist() == [1]
    content = coco()
    for entry in content["annotations"]:
        del entry["segmentation"]
    target = open_dataset(write_coco(tmp_path, content))[0][1]
    assert target["area"].tolist() == [36, 100] and "masks" not in target and "semantic" not in target


def test_coco_splits(tmp_path):
    write_coco(tmp_path)
    write_coco(tmp_path, file="annotations/instances_val2017.json", images="val2017")
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}", encoding="utf-8")
    assert split_names(f"coco:{tmp_path}") == ["train", "val"]
    assert Path(open_dataset(f"coco:{tmp_path}", "val").annotations[0].file).parent.name == "val2017"
    with pytest.raises(
        FileNotFoundError, match=r"(?s)has no test split; expected one of.*holds annotations, train2017"
    ):
        open_dataset(f"coco:{tmp_path}", "test")


def test_coco_labels_go_by_name_in_all_splits(tmp_path, capsys):
    write_coco(tmp_path)
    other = coco(categories=[{"id": 18, "name": "dog"}, {"id": 3, "name": "emu"}])
    spec = write_coco(tmp_path, other, file="annotations/instances_val2017.json", images="val2017")
    with pytest.raises(ValueError, match="annotation 2 is of 'emu', which the training split does not have"):
        open_dataset(spec, "val")
    dataset = open_dataset(spec, "val", on_error="skip")
    assert dataset.classes == ["dog", "cat"] and dataset[0][1]["labels"].tolist() == [0]
    assert "left out 1 of 4 annotations and images" in capsys.readouterr().err


def annotation(**changes) -> dict:
    entries = coco()["annotations"]
    return coco(annotations=[{**entries[0], **changes}])


BAD_COCO = {
    "no area": (
        annotation(bbox=[2, 3, 0, 6]),
        r"instances_train2017.json, image a.png: the box \[2, 3, 2, 9\].*no area",
    ),
    "negative": (annotation(bbox=[2, 3, -4, 6]), "has no area"),
    "outside": (annotation(bbox=[31, 3, 5, 6]), r"\(cat\) lies outside the image of 30 × 20 pixels.*on_error='skip'"),
    "not a number": (annotation(bbox=[float("nan"), 3, 5, 6]), "has no area"),
    "category": (annotation(category_id=4), r"annotation 1 has category_id 4, which is not among the 2 categories"),
    "image": (annotation(image_id=8), "annotation 1 is of image 8, which is not listed"),
    "missing file": (coco(images=[{"id": 7, "file_name": "c.png", "height": 2, "width": 3}]), "image 7 names 'c.png'"),
    "upwards": (coco(images=[{"id": 7, "file_name": "../c.png", "height": 2, "width": 3}]), "leads out of"),
    "absolute": (coco(images=[{"id": 7, "file_name": "/etc/passwd", "height": 2, "width": 3}]), "leads out of"),
    "drive": (coco(images=[{"id": 7, "file_name": "C:\\x.png", "height": 2, "width": 3}]), "leads out of"),
}


@pytest.mark.parametrize("name", BAD_COCO)
def test_bad_coco_is_raised_or_skipped(name, tmp_path, capsys):
    content, message = BAD_COCO[name]
    if name != "image":
        content["images"].append({"id": 10, "file_name": "b.png", "height": HEIGHT, "width": WIDTH})
    spec = write_coco(tmp_path, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset(spec)
    assert capsys.readouterr().err == ""
    dataset = open_dataset(spec, on_error="skip")
    assert not any(len(dataset[k][1]["labels"]) for k in range(len(dataset)))
    err = capsys.readouterr().err
    assert err.startswith("vitcourse: left out ") and "the first: " in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "has no list 'annotations'"),
        ([], "has no list 'images'"),
        (coco(images=[{"id": 1}]), "entry 0 of 'images' has no 'file_name'"),
        (coco(images=[{"id": 1, "file_name": "a.png", "height": 0, "width": 3}]), "has no height and width in pixels"),
        (
            coco(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]),
            "ids of 'categories' must be integers, each",
        ),
        (coco(categories=[{"id": "x", "name": "a"}, {"id": 3, "name": "b"}]), "ids of 'categories' must be integers"),
        (coco(categories=[{"id": 18, "name": "a"}, {"id": 3, "name": "a"}]), "two categories of one name"),
        (coco(images=coco()["images"][:1] * 2), "ids of 'images' must be integers, each another"),
        (annotation(image_id=[7]), r"annotation 1 is of image \[7\], which is not listed"),
        (annotation(category_id={}), "annotation 1 has category_id {}"),
        (annotation(bbox=[1, 2]), r"annotation 1 has no bbox \[x, y, width, height\]"),
        (coco(images=[], annotations=[]), "lists no image"),
    ],
)
def test_a_file_that_is_not_cocos(content, message, tmp_path):
    with pytest.raises(ValueError, match=rf"instances_train2017.json.*{message}"):
        open_dataset(write_coco(tmp_path, content))


def test_broken_json_is_named(tmp_path):
    spec = write_coco(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text('{"images": [', encoding="utf-8")
    with pytest.raises(ValueError, match="instances_train2017.json is no usable JSON"):
        open_dataset(spec)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [5, 5], "counts": [25]}, r"its mask has size \[5, 5\], the image \[20, 30\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [3, 4]}, "its run lengths come to 7 pixels, the image has 600"),
        ({"size": [HEIGHT, WIDTH], "counts": [700, -100]}, "its run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": ["a"]}, "no integers"),
        ({"size": [HEIGHT, WIDTH], "counts": "\x7f"}, "means nothing there"),
        ({"size": [HEIGHT, WIDTH], "counts": "o"}, "in the middle of a number"),
        ([[1, 2, 3, 4]], "a polygon of it has 2 points"),
        ([[1, 2, 3]], "no list of x, y"),
        ([[0, 0, 1e9, 0, 0, 1e9]], "reaches far out"),
        ("mask", "is of type str"),
    ],
)
def test_bad_masks_are_named(segmentation, message, tmp_path):
    dataset = open_dataset(write_coco(tmp_path, annotation(segmentation=segmentation)))
    with pytest.raises(
        ValueError, match=rf"instances_train2017.json, image .*a.png: .*{message}.*correct the annotation"
    ):
        dataset[0]


def test_masks_are_those_of_cocos_tools():
    """What pycocotools 2.0.11 makes of these; the compressed strings are its own."""
    eye = {"size": [7, 9], "counts": "017000000000007"}
    assert np.array_equal(decode_mask(eye, 7, 9), np.eye(7, 9, dtype=np.uint8))
    polygon, runs = [1.2, 3.4, 20.1, 2, 17, 15.5, 3, 12.9], "e02`05K3M00001O000000001O0O10000000N2L4LZ2"
    assert np.array_equal(decode_mask([polygon], 18, 24), decode_mask({"size": [18, 24], "counts": runs}, 18, 24))
    assert decode_mask([polygon], 18, 24).sum() > 150


def test_masks_are_those_of_pycocotools():
    tools = pytest.importorskip("pycocotools.mask")
    random = np.random.RandomState(0)
    for _ in range(300):
        height, width = (int(side) for side in random.randint(3, 60, 2))
        polygons = [random.uniform(-3, 62, 2 * random.randint(3, 9)).clip(-6, 2 * max(height, width)) for _ in range(2)]
        runs = tools.merge(tools.frPyObjects([p.tolist() for p in polygons], height, width))
        assert np.array_equal(decode_mask([p.tolist() for p in polygons], height, width), tools.decode(runs))
        text = {"size": [height, width], "counts": runs["counts"].decode()}
        assert np.array_equal(decode_mask(text, height, width), tools.decode(runs))


def test_overlapping_masks_show_the_smaller(tmp_path):
    large = {**coco()["annotations"][0], "id": 5, "category_id": 3, "segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]]}
    for order in (1, -1):
        content = coco(annotations=[coco()["annotations"][0], large][::order])
        semantic = open_dataset(write_coco(tmp_path, content))[0][1]["semantic"]
        assert (semantic == 2).sum() == 36 and (semantic == 1).sum() == 400 - 36
