"""The weights that come with the course do what is written beside them."""

import json

import pytest

from vitcourse import create_model
from vitcourse.data import open_dataset
from vitcourse.paths import data_dir
from vitcourse.registry import read_metadata
from vitcourse.train import evaluate

FILE = data_dir() / "weights" / "fashion_mnist_vit.safetensors"
RECORD = json.loads(FILE.with_suffix(".json").read_text(encoding="utf-8"))


def test_the_recorded_accuracy_is_measured_again():
    model = create_model(FILE).eval()
    measured = evaluate(model, open_dataset("fashion_mnist_subset", "test"))["val_accuracy"]
    assert measured == pytest.approx(
        RECORD["accuracy_embedded"], abs=0.001
    )  # two of 2 000, for other machines' rounding
    assert sum(p.numel() for p in model.parameters()) == RECORD["parameters"]


def test_the_file_is_small_and_says_where_it_comes_from():
    metadata = read_metadata(FILE)
    assert FILE.stat().st_size <= 3e6
    assert metadata["command"] == RECORD["command"] and metadata["seed"] == RECORD["seed"]
    assert metadata["command"].startswith("python -m vitcourse.train ")
    assert metadata["classes"] == open_dataset("fashion_mnist_subset", "test").classes
    assert metadata["preprocess"]["img_size"] == 28 and len(metadata["preprocess"]["mean"]) == 1


def test_the_recipe_is_the_command():
    from vitcourse.train.cli import parse

    argv = RECORD["command"].removeprefix("python -m vitcourse.train ").split()
    options, config, _ = parse(argv)
    again, recipe_config, _ = parse(["--recipe", "fashion_mnist_tiny", "--threads", str(config.threads)])
    assert config == recipe_config
    assert options.model == again.model and options.data == again.data
