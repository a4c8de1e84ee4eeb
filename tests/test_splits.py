"""Which images train, validate and test on the command line, and at which size they are seen."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vitcourse import create_model
from vitcourse.data import eval_transform, open_dataset
from vitcourse.registry import Preprocess
from vitcourse.train import TrainConfig, cli, evaluate, load_recipe, main
from vitcourse.train.program import fit_size
from vitcourse.train.splits import VALIDATION, open_splits
from vitcourse.vit import VisionTransformer
from vitcourse.weights import read_metadata

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Random pictures of several sizes, 12 of each class to train on, 4 to validate, 5 to test, no two alike."""
    path, random = tmp_path_factory.mktemp("pictures"), np.random.RandomState(0)
    for split, count in (("train", 12), ("val", 4), ("test", 5)):
        for label, name in enumerate(CLASSES):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 150, (20 + i, 31 - i, 3)) + 50 * label
                Image.fromarray(pixels.astype(np.uint8)).save(path / split / name / f"{i}.png")
    return path


@pytest.fixture
def without_val(pictures, tmp_path) -> Path:
    for split in ("train", "test"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / split).symlink_to(pictures / split)
    return tmp_path / "pictures"


def command(folder: Path, out: Path, *more: str, size: str = "8") -> list[str]:
    sizes = f"img_size={size},patch_size=4,embed_dim=8,depth=1,num_heads=2"
    start = ["--model", "vit_tiny", "--model-args", sizes, "--data", f"imagefolder:{folder}", "--out-dir", str(out)]
    run = "--epochs 3 --batch-size 6 --lr 3e-2 --threads 1 --ema 0.5"
    return [*start, *run.split(), *more]


def files(dataset) -> set[str]:
    return {str(Path(file).resolve()) for file in dataset.images}


def test_val_chooses_and_test_is_measured_once_at_the_end(pictures, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("vitcourse.data.open_dataset", lambda *a, **k: asked.append(a[1]) or open_dataset(*a, **k))
    assert main(command(pictures, tmp_path / "run")) == 0
    assert sorted(asked) == ["test", "train", "val"]
    out, err = capsys.readouterr()
    assert "vitcourse: " not in err  # everything is what it seems
    results = json.loads((tmp_path / "run" / "test.json").read_text(encoding="utf-8"))
    assert results["images"] == 15
    config = TrainConfig()
    test_set, val_set = (open_dataset(f"imagefolder:{pictures}", split, transform=None) for split in ("test", "val"))
    for name in ("best", "final"):
        file = tmp_path / "run" / f"{name}.safetensors"
        facts, model = read_metadata(file), create_model(file)
        ready = eval_transform(**asdict(model.preprocess))
        for dataset, key in ((test_set, "test"), (val_set, "val")):
            dataset.transform = ready
            again = evaluate(model, dataset, config)
            assert facts[f"{key}_accuracy"] == pytest.approx(again["val_accuracy"])
            assert facts[f"{key}_loss"] == pytest.approx(again["val_loss"], rel=1e-4)
        assert results[name]["test_accuracy"] == facts["test_accuracy"] and results[name]["epoch"] == facts["epoch"]
        assert f"{name}.safetensors  test_loss {facts['test_loss']:.4f}  test_accuracy" in out
        assert facts["classes"] == list(CLASSES) and facts["data"] == f"imagefolder:{pictures}"
    rows = (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert "test" not in rows[0]
    best = max(float(row.split(",")[6]) for row in rows[1:])
    assert read_metadata(tmp_path / "run" / "best.safetensors")["val_accuracy"] == pytest.approx(best)

    before = [contents(tmp_path / "run" / f"{name}.safetensors") for name in ("best", "final")]
    assert main(command(pictures, tmp_path / "run", "--resume")) == 0  # a finished run is finished again, the same
    assert [contents(tmp_path / "run" / f"{name}.safetensors") for name in ("best", "final")] == before
    assert json.loads((tmp_path / "run" / "test.json").read_text(encoding="utf-8")) == results


def contents(file: Path) -> tuple[dict, dict]:
    return read_metadata(file), {name: tensor.tolist() for name, tensor in load_file(file).items()}


def test_the_test_images_choose_nothing(pictures, tmp_path):
    """With other labels on them everything is as it was, but for the result on them."""
    runs = []
    for name, order in (("right", CLASSES), ("wrong", CLASSES[::-1])):
        folder = tmp_path / name
        (folder / "test").mkdir(parents=True)
        for split in ("train", "val"):
            (folder / split).symlink_to(pictures / split)
        for kind, other in zip(CLASSES, order, strict=True):
            (folder / "test" / kind).symlink_to(pictures / "test" / other)
        assert main(command(folder, tmp_path / f"{name} run", "--quiet")) == 0
        runs.append([contents(tmp_path / f"{name} run" / f"{file}.safetensors") for file in ("best", "final")])
    for (right, right_tensors), (wrong, wrong_tensors) in zip(*runs, strict=True):
        assert right_tensors == wrong_tensors and right["epoch"] == wrong["epoch"]
        assert right["val_loss"] == wrong["val_loss"] and right["test_loss"] < wrong["test_loss"]


def test_without_val_a_part_of_train_validates(without_val, tmp_path, capsys):
    spec = f"imagefolder:{without_val}"
    splits = open_splits(spec, val_share=0.25)
    assert np.bincount(splits.val.targets).tolist() == [3, 3, 3] and len(splits.train) == 27
    assert not files(splits.train) & files(splits.val)
    assert files(splits.train) | files(splits.val) == files(open_dataset(spec))
    assert files(splits.test) == files(open_dataset(spec, "test"))
    assert files(open_splits(spec, val_share=0.25).val) == files(splits.val)  # the same in every run

    assert main(command(without_val, tmp_path / "run", "--val-share", "0.25", "--seed", "5", "--quiet")) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"vitcourse: 9 of the 36 training images of {spec} validate and choose best.safetensors")
    about = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["about"]
    assert about["val"] == "0.25 of train" and about["images"] == 27
    assert (tmp_path / "run" / "test.json").exists()
    assert main(command(without_val, tmp_path / "run", "--seed", "5", "--resume", "--quiet")) == 1
    assert "val: '0.25 of train' then, '0.1 of train' now" in capsys.readouterr().err


def test_other_images_validate_where_they_are_asked_for(pictures, without_val, tmp_path, capsys):
    spec = f"imagefolder:{pictures}"
    asked = open_splits(spec, "test")
    assert (asked.test, asked.chosen_on, len(asked.val), len(asked.train)) == (None, "test", 15, 36)
    assert "chosen on them" in asked.notice
    none = open_splits(spec, "none")
    assert (none.val, len(none.test), len(none.train), none.notice) == (None, 15, 36, None)
    assert len(open_splits(spec, "train").val) == 3 and len(open_splits(spec, "val").val) == 12
    with pytest.raises(ValueError, match="has no val split; use --val train"):
        open_splits(f"imagefolder:{without_val}", "val")
    with pytest.raises(ValueError, match=r"val 'tset' is unknown; did you mean 'test'.*Known: val, train, test, none"):
        open_splits(spec, "tset")
    with pytest.raises(ValueError, match="share 1.5 is no part"):
        open_splits(spec, "train", 1.5)

    assert main(command(pictures, tmp_path / "on test", "--val", "test", "--quiet")) == 0
    assert "vitcourse: the test images validate, as asked: best.safetensors is chosen" in capsys.readouterr().err
    assert not (tmp_path / "on test" / "test.json").exists()
    assert main(command(pictures, tmp_path / "none", "--val", "none", "--quiet")) == 0
    assert not (tmp_path / "none" / "best.safetensors").exists()
    assert sorted(json.loads((tmp_path / "none" / "test.json").read_text(encoding="utf-8"))) == ["final", "images"]
    assert "val_accuracy" not in read_metadata(tmp_path / "none" / "final.safetensors")


def test_a_set_without_test_images_has_no_result_on_them(pictures, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / split).symlink_to(pictures / split)
    assert open_splits(f"imagefolder:{tmp_path / 'pictures'}").test is None
    assert main(command(tmp_path / "pictures", tmp_path / "run", "--quiet")) == 0
    assert not (tmp_path / "run" / "test.json").exists() and (tmp_path / "run" / "best.safetensors").exists()


@pytest.mark.parametrize("spec", ["fashion_mnist_subset"])
def test_embedded_images_are_split_in_the_same_way(spec):
    splits = open_splits(spec)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (9000, 1000, 2000)
    assert splits.chosen_on == "0.1 of train" and "1000 of the 10000 training images" in splits.notice


@pytest.mark.parametrize("has_test", [True, False])
def test_a_run_from_before_is_continued_as_it_was_begun(pictures, tmp_path, has_test, capsys):
    """Runs did not note what validates; it was the test images, or val where there were none."""
    folder, run = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    for split in ("train", "val", *(["test"] if has_test else [])):
        (folder / split).symlink_to(pictures / split)
    begun = command(folder, run, "--checkpoint-every", "4", "--quiet")
    assert main([*begun, "--val", "test" if has_test else "val"]) == 0
    file = run / "config.json"
    old = json.loads(file.read_text(encoding="utf-8"))
    del old["about"]["val"]
    file.write_text(json.dumps(old))
    final = (run / "final.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*begun, "--resume"]) == 0
    assert ("the test images validate" in capsys.readouterr().err) == has_test
    assert not (run / "test.json").exists()
    assert (run / "final.safetensors").read_bytes()[-500:] == final[-500:]  # the tensors
    assert main([*begun, "--resume", "--val", "train"]) == 1
    assert f"validates on {'test' if has_test else 'val'}; continue it with" in capsys.readouterr().err


def test_recipes_say_what_validates(tmp_path):
    for name in ("fashion_mnist_tiny", "cifar10_small", "quick"):
        recipe = load_recipe(name)
        assert recipe.get("val") in (None, *VALIDATION) and 0 < recipe.get("val_share", 0.1) < 1
    file = tmp_path / "mine.toml"
    file.write_text(
        'model = "vit_tiny"\ndata = "fashion_mnist_subset"\nval = "none"\nval_share = 0.2\n', encoding="utf-8"
    )
    for more, expected in (([], "none"), (["--val", "train"], "0.2 of train")):
        options, _, recipe = cli.parse(["--recipe", str(file), *more])
        assert cli.choose_splits(options, recipe, str(tmp_path))[0].chosen_on == expected


# --- The size of the images ---


@pytest.mark.parametrize("loader", ["workers", "memory"])
@pytest.mark.parametrize(("size", "interpolation", "crop_pct"), [(12, "bilinear", 0.8), ((8, 20), "bicubic", 0.9)])
def test_the_command_line_validates_what_eval_transform_makes(pictures, loader, size, interpolation, crop_pct):
    model = VisionTransformer(img_size=size, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3)
    model.preprocess = Preprocess(size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), interpolation, crop_pct)
    spec, config = f"imagefolder:{pictures}", TrainConfig(loader=loader)
    sized = fit_size(open_dataset(spec, "val"), model, config, train=False)
    ready = open_dataset(spec, "val", transform=eval_transform(**asdict(model.preprocess)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.preprocess.mean, model.preprocess.std))
    for (image, label), (expected, same) in zip(sized, ready, strict=True):
        assert image.dtype == torch.uint8 and label == same
        torch.testing.assert_close((image / 255 - mean) / std, expected, atol=1e-6, rtol=1e-6)
    if loader == "memory":
        assert sized.img_size == size
    for crop_scale in (1.0, 0.5) if loader == "workers" else (1.0,):
        config = TrainConfig(loader=loader, crop_scale=crop_scale)
        train_set = fit_size(open_dataset(spec), model, config, train=True)
        assert {image.shape[1:] for image, _ in train_set} == {torch.Size(model.img_size)}


def test_images_in_memory_of_the_right_size_stay_unless_a_crop_is_due():
    model = create_model("vit_tiny", img_size=28, patch_size=7, in_chans=1, embed_dim=8, depth=1, num_heads=2)
    model.preprocess = Preprocess(28, (0.5,), (0.5,), "bicubic", 1.0)
    val = open_dataset("fashion_mnist_subset", "test").take(range(5))
    assert fit_size(val, model, TrainConfig(), train=False) is val and val.transform is None
    model.preprocess = Preprocess(28, (0.5,), (0.5,), "bicubic", 0.875)
    sized = fit_size(val, model, TrainConfig(loader="memory"), train=False)
    ready = eval_transform(**asdict(model.preprocess))
    assert torch.equal((sized.images / 255 - 0.5) / 0.5, torch.stack([ready(image) for image in val.images]))
    assert fit_size(val, model, TrainConfig(), train=True) is val


def test_fine_tuning_at_another_size(pictures, tmp_path, capsys):
    assert main(command(pictures, tmp_path / "small", "--quiet")) == 0
    start = ["--weights", str(tmp_path / "small" / "final.safetensors"), "--epochs", "1", "--quiet"]
    for size, expected in (("16", (16, 16)), ("(8,16)", (8, 16))):
        out = tmp_path / size
        assert main(command(pictures, out, *start, size=size)) == 0, capsys.readouterr().err
        model = create_model(out / "final.safetensors")
        assert model.img_size == expected and read_metadata(out / "final.safetensors")["test_accuracy"] >= 0


def test_images_get_the_channels_of_the_model(pictures, tmp_path, capsys):
    grey = command(pictures, tmp_path / "grey", "--quiet", size="8,in_chans=1")
    assert main(grey) == 0, capsys.readouterr().err
    model = create_model(tmp_path / "grey" / "final.safetensors")
    assert model.in_chans == 1 and model.preprocess.mean == pytest.approx([np.mean((0.485, 0.456, 0.406))])
    sized = fit_size(open_dataset(f"imagefolder:{pictures}"), model, TrainConfig(), train=False)
    assert sized.in_chans == 1
    with Image.open(sized.images[3]) as picture:
        expected = eval_transform(8, (0.0,), (1.0,))(picture.convert("L"))
    assert torch.equal(sized[3][0] / 255, expected)

    few = open_dataset("fashion_mnist_subset", "test").take(range(4))
    model = VisionTransformer(img_size=28, patch_size=7, in_chans=3, embed_dim=8, depth=1, num_heads=2)
    model.preprocess = Preprocess(28, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    sized = fit_size(few, model, TrainConfig(), train=True)
    assert sized.in_chans == 3 and torch.equal(sized.images, few.images.expand(-1, 3, -1, -1))
