"""The weights that were trained on rendered scenes and clips: where they come from, and what they still know."""

import json

import pytest

from vitcourse import create_model
from vitcourse.data import dense_eval_transform, open_dataset, subset
from vitcourse.paths import data_dir
from vitcourse.weights import read_metadata

FILES = sorted(
    file for file in (data_dir() / "weights").glob("*.safetensors") if not file.name.startswith("fashion_mnist")
)


def test_there_are_some_and_they_are_small():
    assert [file.stem for file in FILES] == ["scenes_segmenter"]
    assert sum(file.stat().st_size for file in FILES) <= 5e6


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_opens_and_says_where_it_comes_from(file):
    record, kept = json.loads(file.with_suffix(".json").read_text(encoding="utf-8")), read_metadata(file)
    assert sum(p.numel() for p in create_model(file).parameters()) == record["parameters"]
    assert kept["command"] == record["command"] and kept["seed"] == record["seed"]
    assert record["command"].startswith(f"python -m vitcourse.train --recipe {file.stem} --out-dir runs/")
    measured = {name: value for name, value in record.items() if name.startswith("test_")}
    assert measured and all(kept[name] == pytest.approx(value, abs=1e-4) for name, value in measured.items())


def test_the_segmenter_does_on_some_scenes_what_the_record_says_of_all():
    pytest.importorskip("torchmetrics")
    from vitcourse.dense_prediction.tasks import Segmentation

    file = data_dir() / "weights" / "scenes_segmenter.safetensors"
    model, kept = create_model(file).eval(), read_metadata(file)
    scenes = open_dataset("scenes", "test", **kept["data_args"])
    scenes.transform = dense_eval_transform(64, model.preprocess.mean, model.preprocess.std)
    found = Segmentation().evaluate(model, subset(scenes, 200))
    assert found["pixel_accuracy"] == pytest.approx(kept["test_pixel_accuracy"], abs=0.01)  # ground everywhere: 0.88
    assert found["miou"] > 0.38  # ground everywhere: 0.08
