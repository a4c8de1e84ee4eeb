"""The program: which commands there are, what they load, and what evaluate and predict make of a weights file."""

import csv
import importlib
import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vitcourse
from vitcourse import commands, create_model, predict, save_weights
from vitcourse.commands import COMMANDS, TASKS, TaskProgram, main
from vitcourse.commands import classification as program
from vitcourse.data import open_dataset, read_image
from vitcourse.registry import Preprocess
from vitcourse.train import TrainConfig, evaluate, fit
from vitcourse.train.program import fit_size
from vitcourse.weights import read_metadata

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("cat", "dog", "emu")
SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("VITCOURSE_DEVICE", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of three brightnesses and several sizes: 4 of each class to train on, 2 to 4 to test."""
    path, random = tmp_path_factory.mktemp("pictures"), np.random.RandomState(0)
    for split, counts in (("train", (4, 4, 4)), ("test", (2, 3, 4))):
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 120, (12 + i, 15 - i, 3)) + 65 * label
                Image.fromarray(pixels.astype(np.uint8)).save(path / split / name / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> tuple[Path, float]:
    """A weights file that fit has written, and the accuracy on the test images that it found."""
    torch.manual_seed(0)
    model = create_model("vit_tiny", **SIZES)
    config = TrainConfig(epochs=6, batch_size=6, lr=1e-2, device="cpu", threads=1)
    train, test = (
        fit_size(open_dataset(f"imagefolder:{folder}", split), model, config, train=False)
        for split in ("train", "test")
    )
    out = tmp_path_factory.mktemp("run")
    history = fit(model, train, test, config, out_dir=out, progress=False)
    return out / "final.safetensors", history[-1]["val_accuracy"]


@pytest.fixture
def weights(trained) -> Path:
    return trained[0]


def json_of(capsys) -> dict | list:
    return json.loads(capsys.readouterr().out)


# --------------------------------------------------------------------------------------------------------- the program


def test_help_loads_no_pytorch():
    code = """
import sys
before = set(sys.modules)
from vitcourse.commands import main
for argv in (["--help"], ["--version"], *([name, "--help"] for name in sys.argv[1:])):
    try:
        main(argv)
    except SystemExit as end:
        assert end.code == 0
print("loaded:", *sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    program = [sys.executable, "-c", code, *COMMANDS]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    *text, loaded = done.stdout.splitlines()
    assert not set(loaded.split()) & {"torch", "torchvision", "numpy", "einops", "matplotlib", "PIL", "safetensors"}
    assert all(f"usage: vitcourse {name} " in done.stdout for name in COMMANDS)
    assert f"vitcourse {vitcourse.__version__}" in text
    assert all(any(line.startswith(f"  {name} ") for line in text) for name in COMMANDS)


def test_python_m_and_the_entry_point_are_one_program():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["vitcourse"].partition(":")
    assert getattr(importlib.import_module(module), function) is main
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}  # a terminal that knows few characters
    program = [sys.executable, "-m", "vitcourse"]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: vitcourse COMMAND" in done.stdout, done.stderr


def test_commands_and_tasks_that_are_named_are_there():
    for command in COMMANDS.values():
        assert callable(importlib.import_module(command.module).main)
    offered = [name for name in vars(TaskProgram) if not name.startswith("_")]
    assert {"measure", "predict", "draw", "sheet", "report", "rows"} == set(offered)
    for module in TASKS.values():
        assert all(callable(getattr(importlib.import_module(module), name)) for name in offered)


def test_a_command_gets_its_arguments_and_gives_its_exit_code(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("vitcourse.train.cli.main", lambda argv: seen.append(argv) or 7)
    assert main(["train", "--resume", "-x"]) == 7 and seen == [["--resume", "-x"]]
    assert main(["evalute"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: command 'evalute' is unknown; did you mean 'evaluate'? Known: train, ")


# ----------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_measures_what_the_training_did(folder, trained, capsys, tmp_path):
    weights, accuracy = trained
    assert read_metadata(weights)["task"] == "classification"
    figure, file = tmp_path / "confusion.png", tmp_path / "numbers.json"
    argv = ["evaluate", str(weights), "--data", f"imagefolder:{folder}", "--figure", str(figure), "--json", str(file)]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    result = json.loads(file.read_text(encoding="utf-8"))
    assert err == "" and f"accuracy {accuracy:.4f}" in out and "test: 9 images" in out
    assert result["accuracy"] == pytest.approx(accuracy) and result["split"] == "test" and result["images"] == 9
    assert [row["images"] for row in result["classes"]] == [2, 3, 4] == [sum(row) for row in result["confusion"]]
    assert "top5_accuracy" not in result  # there are three classes
    with Image.open(figure) as picture:
        assert min(picture.size) > 200

    model = create_model(weights)  # redone, one picture at a time
    confusion = torch.zeros(3, 3, dtype=torch.long)
    for i, name in enumerate(CLASSES):
        for path in sorted((folder / "test" / name).iterdir()):
            confusion[i, predict(model, path).probabilities.argmax()] += 1
    assert result["confusion"] == confusion.tolist()
    for i, row in enumerate(result["classes"]):
        assert row["name"] == CLASSES[i] and row["correct"] == confusion[i, i]
        assert row["accuracy"] == pytest.approx(confusion[i, i].item() / confusion[i].sum().item())
    whole = fit_size(open_dataset(f"imagefolder:{folder}", "test"), model, TrainConfig(), train=False)
    assert result["loss"] == pytest.approx(evaluate(model, whole, TrainConfig(device="cpu"))["val_loss"], rel=1e-5)


def test_evaluate_on_another_split_and_batch_size(folder, weights, capsys):
    argv = ["evaluate", str(weights), "--data", f"imagefolder:{folder}", "--json", "-"]
    results = []
    for more in (["--batch-size", "1"], ["--batch-size", "7"], ["--split", "train"]):
        assert main([*argv, *more]) == 0
        results.append(json_of(capsys))
    assert results[0]["confusion"] == results[1]["confusion"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)
    assert (results[2]["split"], results[2]["images"]) == ("train", 12)


def test_classes_are_matched_by_name(folder, weights, capsys, tmp_path):
    """A model that learned the classes in another order, and data that have some of them only."""
    model = create_model(weights)
    order = [2, 0, 1]
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[order])
        model.head.bias.copy_(model.head.bias[order])
    save_weights(model, tmp_path / "turned.safetensors", classes=[CLASSES[i] for i in order], task="classification")
    (tmp_path / "some" / "test").mkdir(parents=True)
    for name in ("dog", "emu"):
        (tmp_path / "some" / "test" / name).symlink_to(folder / "test" / name)
    (tmp_path / "some" / "train").symlink_to(tmp_path / "some" / "test")
    results = []
    for file, data in ((weights, folder), (tmp_path / "turned.safetensors", folder), (weights, tmp_path / "some")):
        assert main(["evaluate", str(file), "--data", f"imagefolder:{data}", "--json", "-"]) == 0
        results.append(json_of(capsys))
    straight, turned, some = results
    assert turned["accuracy"] == straight["accuracy"] and turned["loss"] == pytest.approx(straight["loss"], rel=1e-5)
    assert [row["name"] for row in turned["classes"]] == ["emu", "cat", "dog"]
    assert torch.equal(torch.tensor(turned["confusion"]), torch.tensor(straight["confusion"])[order][:, order])
    assert some["confusion"] == [[0, 0, 0], *straight["confusion"][1:]]
    assert some["classes"][0] == {"name": "cat", "images": 0, "correct": 0, "accuracy": None}
    program.draw(some), program.report(some)


def test_a_file_without_names_or_task_is_taken_in_order_and_says_so(folder, weights, capsys, tmp_path):
    model = create_model(weights)
    model.classes = None
    save_weights(model, tmp_path / "old.safetensors")
    assert not {"classes", "task"} & read_metadata(tmp_path / "old.safetensors").keys()
    for file in (tmp_path / "old.safetensors", weights):
        assert main(["evaluate", str(file), "--data", f"imagefolder:{folder}", "--json", "-"]) == 0
        out, err = capsys.readouterr()
        assert ("vitcourse: the weights name no classes" in err) == (file != weights)
        assert [row["name"] for row in json.loads(out)["classes"]] == list(CLASSES)


def test_many_classes_fit_into_the_figure():
    classes = [f"$class$ {i} with a name that is long" for i in range(120)]
    confusion = torch.eye(120, dtype=torch.long) * 3
    confusion[5, 7] = 4
    result = {"weights": "w.safetensors", "data": "d", "split": "test"}
    result |= program.summarise((1.0, 364, confusion), classes)
    figure = program.draw(result)
    figure.canvas.draw()
    assert max(figure.get_size_inches()) < 20 and len(figure.axes[0].get_xticks()) <= 50
    text = program.report(result)
    assert result["top5_accuracy"] == 1.0 and "mistaken: $class$ 5" in text and "(4)" in text


# ------------------------------------------------------------------------------------------------------------ predict


def test_predict_names_a_broken_file_and_goes_on(folder, weights, capsys, tmp_path):
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"rubbish")
    files = [folder / "test" / "cat" / "0.png", broken, folder / "test" / "emu" / "1.png", missing]
    sheet, out = tmp_path / "sheet.png", tmp_path / "found.json"
    argv = ["predict", str(weights), *map(str, files), "--top", "2", "--batch-size", "2"]
    assert main([*argv, "--sheet", str(sheet), "--out", str(out)]) == 1
    printed, err = capsys.readouterr()
    assert printed == "" and [line.split(" ")[1] for line in err.splitlines()] == [str(broken), str(missing)]
    records = json.loads(out.read_text(encoding="utf-8"))
    assert [record["file"] for record in records] == [str(file) for file in files]
    assert ["error" in record for record in records] == [False, True, False, True]
    with Image.open(sheet) as picture:
        assert min(picture.size) > 100

    assert main(argv) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["file", "rank", "class", "index", "probability"] and len(rows) == 4
    model = create_model(weights)
    expected = predict(model, [files[0], files[2]]).top(2)
    for i, record in enumerate((records[0], records[2])):
        for rank, (name, probability) in enumerate(expected[i]):
            guess, row = record["top"][rank], rows[2 * i + rank]
            assert (guess["class"], row["class"], row["rank"]) == (name, name, str(rank + 1))
            assert CLASSES[guess["index"]] == name and row["index"] == str(guess["index"])
            assert guess["probability"] == pytest.approx(probability, rel=1e-4)
            assert float(row["probability"]) == pytest.approx(probability, abs=1e-5)


def test_predict_takes_a_folder(folder, weights, capsys):
    assert main(["predict", str(weights), str(folder / "test" / "dog"), "--format", "json", "--top", "9"]) == 0
    records = json_of(capsys)
    assert [Path(record["file"]).name for record in records] == ["0.png", "1.png", "2.png"]
    assert all(len(record["top"]) == 3 for record in records)
    assert sum(guess["probability"] for guess in records[0]["top"]) == pytest.approx(1, abs=1e-5)


def test_a_folder_has_the_pictures_that_a_data_set_would_read(weights, capsys, tmp_path):
    for name in ("a.gif", "b.PNG", "c.webp", "._d.png", "e.txt", "sub"):
        (tmp_path / name).mkdir() if name == "sub" else Image.new("RGB", (8, 8)).save(tmp_path / name, format="png")
    assert main(["predict", str(weights), str(tmp_path), "--format", "json"]) == 0
    assert [Path(record["file"]).name for record in json_of(capsys)] == ["a.gif", "b.PNG", "c.webp"]


def test_nothing_but_broken_files_is_no_sheet(weights, capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    assert main(["predict", str(weights), str(tmp_path / "a.png"), "--sheet", str(tmp_path / "s.png")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "a.png" in err and not (tmp_path / "s.png").exists()


def test_a_sheet_of_too_many_says_what_it_shows(folder, capsys):
    file = str(folder / "test" / "dog" / "0.png")
    records = [{"file": file, "top": [{"class": "a $b$", "index": 0, "probability": 0.5}]}] * 61
    figure = program.sheet(records)
    assert "the first 60 of 61 pictures" in capsys.readouterr().err
    assert len([ax for ax in figure.axes if ax.images]) == 60


# ----------------------------------------------------------------------------------------------------- in Python


def test_predict_takes_pictures_of_every_kind(folder, weights):
    model = create_model(weights).train()
    path = folder / "test" / "emu" / "2.png"
    with Image.open(path) as opened:
        picture = opened.copy()
    pixels = read_image(path)
    whole = predict(model, [path, str(path), picture, pixels, pixels / 255], batch_size=2)
    assert model.training and whole.probabilities.shape == (5, 3) and whole.classes == list(CLASSES)
    for i in (1, 2, 3):
        assert torch.allclose(whole.probabilities[i], whole.probabilities[0], atol=1e-6)
    for one in (path, picture, pixels, pixels[None]):
        assert torch.allclose(predict(model, one).probabilities, whole.probabilities[:1], atol=1e-6)
    transform = vitcourse.data.eval_transform(
        8, model.preprocess.mean, model.preprocess.std, interpolation="bicubic", crop_pct=model.preprocess.crop_pct
    )
    with torch.no_grad():
        expected = model.eval()(transform(path)[None]).softmax(1)
    torch.testing.assert_close(whole.probabilities[:1], expected, rtol=1e-5, atol=1e-6)
    grey = create_model("vit_tiny", **SIZES, in_chans=1)
    assert predict(grey, [path, pixels]).classes == ["0", "1", "2"]  # it knows no names


def test_predict_says_what_is_wrong(tmp_path):
    model = create_model("vit_tiny", **SIZES)
    with pytest.raises(ValueError, match="images is empty"):
        predict(model, [])
    (tmp_path / "a.png").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"a\.png is not a usable image"):
        predict(model, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"set model\.preprocess"):
        predict(nn.Identity(), torch.rand(3, 8, 8))
    maps = nn.Conv2d(3, 2, 1)
    maps.preprocess = Preprocess(img_size=8)
    with pytest.raises(ValueError, match=r"output has shape \(1, 2, 8, 8\), expected logits"):
        predict(maps, torch.rand(3, 8, 8))


def test_a_model_knows_its_classes_from_its_file(weights, tmp_path):
    assert create_model("vit_tiny", **SIZES).classes is None
    model = create_model(weights)
    assert model.classes == list(CLASSES)
    save_weights(model, tmp_path / "again.safetensors")
    assert create_model(tmp_path / "again.safetensors").classes == list(CLASSES)
    assert create_model(weights, num_classes=5).classes is None
    model.reset_classifier(4)  # the names are those of a head that is gone
    assert predict(model, torch.rand(3, 8, 8)).classes == ["0", "1", "2", "3"]
    save_weights(model, tmp_path / "new.safetensors")
    assert create_model(tmp_path / "new.safetensors").classes is None


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("evaluate nowhere.safetensors --data cifar10", "nowhere.safetensors does not exist; vitcourse train writes"),
        ("evaluate w.pt --data cifar10", "'w.pt' is no .safetensors file"),
        ("evaluate WEIGHTS --data fashion_mnits", "did you mean"),
        ("evaluate WEIGHTS --data FOLDER --split dev", "dev"),
        ("evaluate WEIGHTS --data FOLDER --json a.txt", "--json a.txt must end in .json"),
        ("evaluate WEIGHTS --data FOLDER --figure no/such/folder/a.png", "does not exist; make it first"),
        ("evaluate WEIGHTS --data FOLDER --device gpu", "device 'gpu' is unknown"),
        ("evaluate WEIGHTS --data fashion_mnist_subset", "a class 'T-shirt/top', which the weights do not know"),
        ("evaluate OTHER --data FOLDER", "trained on task 'captioning', for which there is no program"),
        ("predict OTHER a.png", "trained on task 'captioning', for which there is no program"),
        ("predict WEIGHTS FOLDER", "has no pictures in it"),
        ("predict WEIGHTS a.png --sheet a.gif", "--sheet a.gif must end in .png"),
        ("predict WEIGHTS a.png --out a.xml", "--out a.xml must end in .csv or .json"),
    ],
)
def test_errors_are_one_line(argv, message, folder, weights, capsys, tmp_path):
    other = tmp_path / "other.safetensors"
    save_weights(create_model("vit_tiny", **SIZES), other, task="captioning")
    data = str(folder) if argv.startswith("predict") else f"imagefolder:{folder}"
    named = {"WEIGHTS": str(weights), "OTHER": str(other), "FOLDER": data}
    assert commands.main([named.get(word, word) for word in argv.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and len(err.splitlines()) == 1
