"""``vitcourse train | evaluate | predict`` for detection, segmentation and video, on folders such as people have."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from vitcourse import create_model, save_weights
from vitcourse.commands import dense, main
from vitcourse.commands.detection import boxes_to_picture
from vitcourse.commands.segmentation import labels_of
from vitcourse.data import Letterbox
from vitcourse.data.cocomask import decode_mask
from vitcourse.dense_prediction.eomt import Eomt
from vitcourse.dense_prediction.fcos import Fcos
from vitcourse.train import cli
from vitcourse.weights import read_metadata

FCOS = (
    "backbone_args={embed_dim:8,depths:(1,1),num_heads:(1,2),window_size:4},channels=8,num_convs=1,extra='',img_size=32"
)
VIDEO = "patch_size=8,embed_dim=16,depth=1,num_heads=2"
SHORT = ["--batch-size", "2", "--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("VITCOURSE_DEVICE", "cpu")


def picture(file: Path, size: tuple[int, int], seed: int = 0) -> None:
    """``size`` is (height, width)."""
    pixels = np.random.RandomState(seed).randint(0, 255, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    """Six pictures, one without an object; a seventh cannot be decoded."""
    top = tmp_path_factory.mktemp("voc")
    (top / "images").mkdir()
    (top / "annotations").mkdir()
    for i in range(7):
        height, width = 30 + i, 47 - i
        picture(top / "images" / f"{i}.png", (height, width), i)
        found = "" if i == 1 else (
            f"<object><name>{'cat' if i % 2 else 'dog'}</name><bndbox><xmin>3</xmin><ymin>5</ymin>"
            f"<xmax>{20 + i}</xmax><ymax>25</ymax></bndbox></object>"
        )  # fmt: skip
        (top / "annotations" / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.png</filename><size><width>{width}</width><height>{height}</height></size>"
            f"{found}</annotation>",
            encoding="utf-8",
        )
    (top / "images" / "6.png").write_bytes(b"no picture")
    return top


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("masks")
    for name in ("image", "label"):
        (top / name).mkdir()
    for i in range(5):
        picture(top / "image" / f"{i}.png", (40, 30), i)
        values = np.zeros((40, 30), dtype=np.uint8)
        values[5 : 20 + i, 5:25] = 255
        Image.fromarray(values).save(top / "label" / f"{i}.png")
    return top


def told(argv: list[str], capsys, code: int = 0) -> str:
    assert main(argv) == code, capsys.readouterr().err
    return capsys.readouterr().out


def errors(argv: list[str], capsys) -> str:
    assert main(argv) == 1
    return capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- from end to end


def test_a_detector_from_a_folder_of_boxes(voc, tmp_path, capsys):
    run, args = tmp_path / "run", ["--model", "fcos", "--model-args", FCOS]
    train = ["train", "--task", "detect", *args, "--data", f"voc:{voc}", "--val-share", "0.4", "--out-dir", str(run)]
    assert "6.png is not a usable image" in errors([*train, *SHORT, "--epochs", "1"], capsys)
    train += ["--on-error", "skip", *SHORT]
    assert main([*train, "--epochs", "2", "--checkpoint-every", "1"]) == 0
    assert "left out 1 of" in (err := capsys.readouterr().err) and "6.png" in err
    metrics = list(csv.DictReader((run / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    assert len(metrics) == 2 and {"val_loss", "map", "map_50", "map_small"} <= metrics[0].keys()
    facts = read_metadata(run / "final.safetensors")
    assert (facts["task"], facts["classes"], facts["data_args"]) == ("detection", ["cat", "dog"], {"on_error": "skip"})
    assert "already has a run" in errors([*train, "--epochs", "2"], capsys)
    assert main([*train, "--epochs", "2", "--checkpoint-every", "1", "--resume"]) == 0
    assert "min_scale" in errors([*train, "--epochs", "2", "--resume", "--min-scale", "0.9"], capsys)

    weights, figure = str(run / "final.safetensors"), tmp_path / "map.png"
    argv = ["evaluate", weights, "--data", f"voc:{voc}", "--on-error", "skip", "--figure", str(figure)]
    assert "6 images, at 32 × 32 pixels" in told(argv, capsys) and figure.exists()
    result = json.loads(told([*argv[:6], "--json", "-"], capsys))
    assert result["task"] == "detection" and 0 <= result["map"] <= 1 and result["images"] == 6
    assert [row["name"] for row in result["classes"]] == ["cat", "dog"]


def test_a_segmenter_from_a_folder_of_masks_begins_with_an_encoder(masks, tmp_path, capsys):
    from vitcourse.pretraining import make_objective

    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
    whole, _ = make_objective("mae", create_model("vit_tiny", **sizes, num_classes=0), decoder_dim=8, decoder_depth=1,
                              decoder_heads=2)  # fmt: skip
    save_weights(whole, tmp_path / "mae.safetensors")
    run = tmp_path / "run"
    train = ["train", "--task", "segment", "--model", "segmenter", "--model-args", "depth=1,img_size=32,num_heads=2"]
    train += ["--backbone-weights", str(tmp_path / "mae.safetensors"), "--data", f"masks:{masks}", *SHORT]
    assert main([*train, "--lr", "0", "--min-lr", "0", "--max-steps", "1", "--out-dir", str(run)]) == 0
    assert "is for 1 channels, not 3: repeated and rescaled" in capsys.readouterr().err
    model = create_model(run / "final.safetensors")
    assert model.backbone.model_args["patch_size"] == 8 and model.classes == ["background", "foreground"]
    blocks = [m.blocks[0].mlp.fc1.weight for m in (model.backbone, whole.encoder)]
    assert torch.equal(*blocks)  # nothing has moved at a rate of 0
    result = json.loads(
        told(["evaluate", str(run / "final.safetensors"), "--data", f"masks:{masks}", "--json", "-"], capsys)
    )
    assert 0 < result["miou"] < 1 and [row["name"] for row in result["classes"]] == model.classes

    again = ["train", "--task", "segment", "--weights", str(run / "final.safetensors"), "--data", "scenes", *SHORT]
    again += ["--data-args", "length=4,img_size=32", "--max-steps", "1", "--out-dir", str(tmp_path / "again")]
    assert main(again) == 0
    assert "weights are for 2 classes, not 11: the last layers start untrained" in capsys.readouterr().err


def test_a_classifier_begins_with_what_pre_training_has_left(tmp_path, capsys):
    from vitcourse.pretraining import make_objective

    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
    encoder = create_model("vit_tiny", **sizes, num_classes=0)
    whole, _ = make_objective("mae", encoder, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    save_weights(whole, tmp_path / "mae.safetensors")
    argv = ["train", "--weights", str(tmp_path / "mae.safetensors"), "--data", "fashion_mnist_subset", *SHORT]
    argv += ["--lr", "0", "--min-lr", "0", "--max-steps", "1", "--val", "none", "--out-dir", str(tmp_path / "run")]
    assert main(argv) == 0
    model = create_model(tmp_path / "run" / "final.safetensors")
    assert model.num_classes == 10 and torch.equal(model.blocks[0].mlp.fc1.weight, encoder.blocks[0].mlp.fc1.weight)


def test_clips_of_a_folder(tmp_path, capsys):
    av = pytest.importorskip("av")
    random = np.random.RandomState(0)
    for split in ("train", "val"):
        for name in ("still", "noise"):
            (tmp_path / "films" / split / name).mkdir(parents=True)
            for i in range(2):
                with av.open(str(tmp_path / "films" / split / name / f"{i}.mp4"), "w") as container:
                    stream = container.add_stream("mpeg4", rate=8)
                    stream.width = stream.height = 32
                    stream.pix_fmt = "yuv420p"
                    for _ in range(6):
                        pixels = random.randint(0, 255, (32, 32, 3)).astype(np.uint8)
                        frame = av.VideoFrame.from_ndarray(pixels * (name == "noise"), format="rgb24")
                        container.mux(stream.encode(frame))
                    container.mux(stream.encode())
    films = f"video:{tmp_path / 'films'}"
    run = tmp_path / "run"
    argv = ["train", "--task", "video", "--model", "timesformer_tiny", "--data", films, "--data-args", "fps=4", *SHORT]
    argv += ["--model-args", f"{VIDEO},num_frames=2,img_size=16", "--max-steps", "4", "--hflip", "--crop-scale", "0.5"]
    assert main([*argv, "--out-dir", str(run)]) == 0
    facts = read_metadata(run / "final.safetensors")
    assert facts["data_args"] == {"num_frames": 2, "fps": 4} and facts["classes"] == ["noise", "still"]

    weights, sheet = str(run / "final.safetensors"), tmp_path / "sheet.png"
    capsys.readouterr()
    result = json.loads(told(["evaluate", weights, "--data", films, "--data-args", "clips=3", "--json", "-"], capsys))
    assert (result["images"], result["clips"], result["clips_per_video"]) == (4, 12, 3)
    assert sum(map(sum, result["confusion"])) == 4
    assert "one clip of each" in told(["evaluate", weights, "--data", films], capsys)

    (tmp_path / "broken.mp4").write_bytes(b"no video")
    argv = ["predict", weights, str(tmp_path / "films" / "val" / "noise"), str(tmp_path / "broken.mp4"), "--clips", "2"]
    out = told([*argv, "--format", "json", "--sheet", str(sheet)], capsys, code=1)
    records = json.loads(out)
    assert [len(record.get("top", ())) for record in records] == [2, 2, 0] and records[0]["clips"] == 2
    assert "broken.mp4" in records[2]["error"] and "_frames" not in records[0]
    with Image.open(sheet) as drawn:
        assert min(drawn.size) > 100
    assert "has no videos in it" in errors(["predict", weights, str(tmp_path / "films")], capsys)


# ------------------------------------------------------------------------------------ what is found, in the picture


@pytest.mark.parametrize("size", [(417, 650), (31, 64), (64, 31), (1, 1), (5, 900), (96, 96)])
def test_letterboxed_images_have_exactly_their_size(size):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    assert Letterbox((96, 96))(image).shape == (3, 96, 96) and Letterbox((64, 96))(image).shape == (3, 64, 96)


def test_boxes_come_back_to_the_pixels_of_the_picture():
    seen = dense.Seen(Path("a.png"), (30, 47), (20, 32))
    boxes = boxes_to_picture(torch.tensor([[0.0, 0, 32, 20], [8, 5, 40, 10], [0, 21, 9, 30]]), seen)
    torch.testing.assert_close(boxes[:2], torch.tensor([[0.0, 0, 47, 30], [11.75, 7.5, 47, 15]]))
    assert boxes[2, 3] == boxes[2, 1]  # in the padding


def test_pixels_come_back_to_the_picture():
    scores = torch.zeros(3, 8, 8)
    scores[1, :, :4], scores[2, :, 4:] = 1, 1
    scores[0, 4:] = 9  # padding
    labels = labels_of(scores, dense.Seen(Path("a.png"), (8, 16), (4, 8)))
    assert labels.shape == (8, 16) and (labels[:, :8] == 1).all() and (labels[:, 8:] == 2).all()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Turned by its EXIF, grey, of one pixel, of the same name as the first, broken."""
    top = tmp_path_factory.mktemp("pictures")
    (top / "other").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (60, 40), (9, 99, 199)).save(top / "a.jpg", exif=exif)
    Image.new("L", (20, 30)).save(top / "grey.png")
    Image.new("RGB", (1, 1)).save(top / "dot.png")
    Image.new("RGB", (50, 50)).save(top / "other" / "a.png")
    (top / "broken.png").write_bytes(b"rubbish")
    return [top / name for name in ("a.jpg", "grey.png", "dot.png", "other/a.png", "broken.png")]


def test_predict_tells_and_draws_boxes(pictures, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    args = {"backbone_args": {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}}
    model = create_model("fcos", **args, img_size=32, num_classes=2, channels=8, num_convs=1, extra="")
    file = tmp_path / "fcos.safetensors"
    save_weights(model, file, task="detection", classes=["cat", "dog"])
    box, scores = torch.tensor([[2.0, 4, 10, 16], [0, 0, 32, 32]]), torch.tensor([0.75, 0.25])
    found = {"boxes": box, "scores": scores, "labels": torch.tensor([1, 0])}
    monkeypatch.setattr(Fcos, "results", lambda self, output: [found] * len(output.logits))
    argv = ["predict", str(file), *map(str, pictures), "--batch-size", "2", "--threshold", "0.5"]
    out = told([*argv, "--format", "json", "--out-dir", str(tmp_path / "drawn")], capsys, code=1)
    records = json.loads(out)
    assert [record.get("width") for record in records] == [40, 20, 1, 50, None] and "broken.png" in records[4]["error"]
    (turned,) = records[0]["objects"]  # 60 rows and 40 columns, of which 32 and 21 are seen
    assert turned["class"] == "dog" and turned["index"] == 1 and turned["score"] == 0.75
    assert turned["box"] == pytest.approx([2 * 40 / 21, 4 * 60 / 32, 10 * 40 / 21, 16 * 60 / 32], abs=0.01)
    assert records[2]["objects"][0]["box"] == pytest.approx([2 / 32, 4 / 32, 10 / 32, 16 / 32], abs=0.01)
    names = [Path(record["drawn"]).name for record in records[:4]]
    assert names == ["a_found.png", "grey_found.png", "dot_found.png", "a_2_found.png"]
    with Image.open(records[0]["drawn"]) as drawn:
        assert drawn.size == (40, 60)
        changed = np.abs(np.asarray(drawn).astype(int) - (9, 98, 198)).max(2) > 9
    assert changed[25, 2:6].any() and changed[25, 17:21].any() and not changed[25, 7:17].any()  # two sides of the box
    assert not changed[35:].any()

    rows = list(csv.DictReader(io.StringIO(told(argv, capsys, code=1))))
    assert list(rows[0]) == ["file", "class", "index", "score", "x0", "y0", "x1", "y1"] and len(rows) == 4
    sheet = tmp_path / "sheet.png"
    told([*argv, "--sheet", str(sheet)], capsys, code=1)
    with Image.open(sheet) as drawn:
        assert min(drawn.size) > 150


def test_predict_tells_masks_of_objects_and_of_classes(pictures, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    args = {"backbone": "vit_tiny", "backbone_args": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}}
    model = create_model("eomt", **args, img_size=32, num_classes=2, num_queries=3, num_blocks=1)
    model.anneal(1, 1)
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, :16] = True
    found = {"masks": mask, "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}
    monkeypatch.setattr(Eomt, "results", lambda self, output: [found] * output.logits.shape[1])
    for task in ("detection", "segmentation"):
        save_weights(model, tmp_path / f"{task}.safetensors", task=task, classes=["cat", "dog"])
    argv = ["--format", "json", "--out-dir", str(tmp_path / "drawn"), *map(str, pictures[:2])]
    records = json.loads(told(["predict", str(tmp_path / "detection.safetensors"), *argv], capsys))
    (one,) = records[0]["objects"]
    assert one["box"] == [0, 0, 40, 30] and one["class"] == "dog"
    whole = decode_mask(one["mask"], 60, 40)
    assert whole[:30].all() and not whole[30:].any()

    records = json.loads(told(["predict", str(tmp_path / "segmentation.safetensors"), *argv], capsys))
    for record in records:
        with Image.open(record["mask"]) as opened:
            assert opened.size == (record["width"], record["height"]) and opened.mode == "P"
            counts = np.bincount(np.asarray(opened).ravel(), minlength=2)
        assert {row["index"]: row["pixels"] for row in record["classes"]} == {k: n for k, n in enumerate(counts) if n}
        assert sum(row["share"] for row in record["classes"]) == pytest.approx(1)


def test_data_with_other_numbers_for_the_classes():
    semantic = torch.tensor([[0, 1, 2, 255]])
    renumbered = dense.Renumbered(lambda *sample: sample, torch.tensor([2, 0, 1]), "semantic")
    assert renumbered(None, {"semantic": semantic})[1]["semantic"].tolist() == [[2, 0, 1, 255]]
    renumbered = dense.Renumbered(lambda *sample: sample, torch.tensor([1, 0]), "labels")
    assert renumbered(None, {"labels": torch.tensor([0, 0, 1])})[1]["labels"].tolist() == [1, 1, 0]


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--task detekt --model fcos --data scenes", "task 'detekt' is unknown; did you mean 'detect' or"),
        ("--task detect --objective mae --model fcos --data scenes", "--objective mae says how images are learned"),
        ("--task detect --model fcos --data scenes --method lora", "--method fine-tunes classifiers of images"),
        ("--task detect --model vit_tiny --data scenes", "task 'detection' is not for a VisionTransformer"),
        ("--task detect --model fcos --data fashion_mnist_subset", "items of ImageDataset have no boxes and no masks"),
        ("--task segment --model fcos --data scenes", "task 'segmentation' is not for a Fcos"),
        ("--task video --model vit_tiny --data moving", "vit_tiny takes no clips; use timesformer_*"),
        ("--task video --model timesformer_tiny --data scenes", "items of Scenes are no clips"),
        ("--model timesformer_tiny --data fashion_mnist_subset", "is no classifier of images; give --task video"),
        ("--model vit_tiny --data scenes", "--task detect and segment take images with boxes"),
        ("--task detect --model fcos --data scenes --crop-scale 0.5", "does not heed --crop-scale"),
        ("--task detect --model fcos --data scenes --randaugment 2", "does not heed randaugment"),
        ("--task detect --model fcos --data scenes --min-scale 3", "min_scale 3.0 and max_scale 2.0 are no range"),
        ("--task detect --model fcos --data scenes --data-args lenght=4", "scenes has no option lenght; it has"),
        ("--task detect --weights WEIGHTS --data scenes", "no detector or segmenter; name one with --model"),
        ("--model vit_tiny --data scenes --backbone-weights WEIGHTS", "a classifier has --weights"),
        ("--task detect --model fcos --weights a --backbone-weights b --data scenes", "leave one out"),
    ],
)  # fmt: skip
def test_errors_are_one_line(argv, message, tmp_path, capsys):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    if "WEIGHTS" in argv:
        save_weights(create_model("vit_tiny", **sizes), tmp_path / "w.safetensors")
    words = [str(tmp_path / "w.safetensors") if word == "WEIGHTS" else word for word in argv.split()]
    if "fcos" in words:
        words += ["--model-args", FCOS.removesuffix(",img_size=32")]
    if "vit_tiny" in words or "timesformer_tiny" in words:
        words += ["--model-args", "embed_dim=16,depth=1,num_heads=2"]
    if words[-1] != "lenght=4" and "scenes" in words and "--data-args" not in words:
        words += ["--data-args", "length=8,img_size=32"]
    assert cli.main([*words, "--out-dir", str(tmp_path / "run"), *SHORT]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_weights_are_for_their_own_data(tmp_path, capsys):
    args = {"backbone_args": {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}}
    save_weights(create_model("unet", **args, img_size=32, num_classes=2, channels=8), tmp_path / "u.safetensors",
                 task="segmentation", classes=["background", "foreground"])  # fmt: skip
    argv = ["evaluate", str(tmp_path / "u.safetensors"), "--data"]
    assert "has no boxes and no masks" in errors([*argv, "fashion_mnist_subset"], capsys)
    assert "a class 'T-shirt/top', which the weights do not know" in errors(
        [*argv, "scenes", "--data-args", "length=2"], capsys
    )
