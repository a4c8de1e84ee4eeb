"""Detection and segmentation as tasks of the engine: counts, resumption, processes, metrics, and what is refused."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from _dense_tasks import DOUBLE, SMALL, SWIN, Shapes, joint_run, small

from vitcourse import create_model
from vitcourse.data import scenes
from vitcourse.dense_prediction import Detection, DetectionMetric, Segmentation, SegmentationMetric, mean_loss
from vitcourse.train import fit
from vitcourse.weights import read_metadata

WORKER = Path(__file__).with_name("_dense_tasks.py")
ROOT = WORKER.parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(name: str, config=DOUBLE, task=None, data=None, val=None, **options):
    model, own = small(name)
    history = fit(model, data or Shapes(), val, config, task=task or own, progress=False, **options)
    return model, history


# ------------------------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_is_the_models_mean_over_the_whole_batch(name):
    """Of a batch whose first half has no objects: what a step is told is the mean loss of all of it."""
    model, task = small(name)
    data = Shapes()
    task.bind(model)
    batch = task.collate([data[i] for i in (1, 2, 0, 6)])
    task.check_batch(batch)
    with torch.no_grad():
        whole = mean_loss(model.losses(model(batch["images"], batch["targets"]), batch["targets"]))
    parts = [task.collate([data[i] for i in part]) for part in ((1, 2), (0, 6))]
    total, count = (sum(x) for x in zip(*(task.loss(model, part) for part in parts), strict=True))
    assert (total / count).item() == pytest.approx(whole.item(), rel=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_micro_batches_change_nothing(name):
    found = [run(name, replace(DOUBLE, accum=accum)) for accum in (1, 2)]
    (one, first), (two, second) = found
    assert (weights(one) - weights(small(name)[0])).abs().max() > 1e-3
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-8, atol=1e-9)
    for column in ("train_loss", "grad_norm"):
        assert second.column(column) == pytest.approx(first.column(column), rel=1e-6)


@pytest.mark.parametrize("name", ["fcos", "detr", "eomt"])
def test_images_without_any_object_are_learned_from(name):
    """A step without objects is divided by 1, as by the authors, however it is cut into micro-batches."""
    config = replace(DOUBLE, batch_size=4, max_steps=1, optimizer="sgd", momentum=0.0, clip_grad=0.0, ema=0.0)
    model, task = small(name)
    data = Shapes(4, empty=True)
    task.bind(model)
    batch = task.collate([data[i] for i in range(4)])
    model.eval()  # no dropout in either
    if hasattr(model, "anneal"):
        model.anneal(0, 1)
        model.train()
    with torch.no_grad():
        expected = mean_loss(model.losses(model(batch["images"]), batch["targets"])).item()
    for accum in (1, 2):
        trained, history = run(name, replace(config, accum=accum), data=data, val=data)
        assert history[0]["train_loss"] == pytest.approx(expected, rel=1e-6)
        assert (weights(trained) - weights(small(name)[0])).abs().max() > 0
        assert history[0]["val_loss"] is not None and history[0]["map"] is None  # there is nothing to find


def test_crowds_are_not_learned_and_do_not_count():
    task = Detection()
    task.bind(small("fcos")[0])
    data = Shapes()
    batch = task.collate([data[3]])
    assert len(data[3][1]["labels"]) == 4
    assert len(batch["targets"][0]["labels"]) == 3 and len(batch["crowds"][0]["labels"]) == 1
    model = small("fcos")[0]
    found = {"boxes": data[3][1]["boxes"], "labels": data[3][1]["labels"], "scores": torch.tensor([1, 0.9, 0.8, 0.7])}
    model.results = lambda output: [found]
    metric = DetectionMetric()
    task.add(metric, model, None, batch)
    assert metric.compute()["map"] == 1.0  # the surest lies on a crowd, and is no mistake


def test_what_cannot_be_seen_after_resizing_is_left_out():
    task, data = Detection(), Shapes()
    task.bind(small("eomt")[0])
    image, target = data[0]
    target["masks"] = torch.zeros_like(target["masks"])
    assert len(task.collate([(image, target)])["targets"][0]["labels"]) == 0


# ------------------------------------------------------------------------------------------- runs, files, processes


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("name", ["fcos", "eomt"])
def test_an_interrupted_run_ends_in_the_same_bits(name, tmp_path):
    config = replace(DOUBLE, epochs=2, checkpoint_every=1)
    kind = type(small(name)[1])

    class Interrupted(kind):
        def after_step(self, model, step, total):
            super().after_step(model, step, total)
            if step == 4:
                raise Interrupt

    whole, expected = run(name, config, val=Shapes(5, seed=1))
    with pytest.raises(Interrupt):
        run(name, config, task=Interrupted(), val=Shapes(5, seed=1), out_dir=tmp_path)
    again, history = run(name, config, val=Shapes(5, seed=1), out_dir=tmp_path, resume=True)
    assert torch.equal(weights(again), weights(whole))
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]
        for rows in (history, expected)
    ]
    assert timeless[0] == timeless[1]
    rebuilt = create_model(tmp_path / "final.safetensors").double()
    torch.testing.assert_close(weights(rebuilt), weights(whole), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["detr", "eomt-semantic"])
def test_a_file_says_task_classes_and_what_was_measured(name, tmp_path):
    model, history = run(name, val=Shapes(5, seed=1), out_dir=tmp_path)
    facts = read_metadata(tmp_path / "final.safetensors")
    kind = SMALL[name][0]
    assert facts["task"] == {"detect": "detection", "segment": "segmentation"}[kind]
    assert facts["classes"] == (Shapes.classes if kind == "detect" else Shapes.semantic_classes)
    best = "map" if kind == "detect" else "miou"
    assert facts[best] == history[-1][best] is not None
    assert create_model(tmp_path / "best.safetensors").classes == facts["classes"]


def test_masks_are_annealed_and_off_at_the_end():
    probs = []

    class Watching(Segmentation):
        def before_step(self, model, optimizer, step, total):
            super().before_step(model, optimizer, step, total)
            probs.append(model.mask_probs.item())

    model, _ = run("eomt-semantic", replace(DOUBLE, epochs=2), task=Watching())
    assert probs[0] == 1.0 and probs == sorted(probs, reverse=True) and 0.0 in probs
    assert model.mask_probs.item() == 0.0
    shortest, _ = run("eomt-semantic", replace(DOUBLE, max_steps=1))
    assert shortest.mask_probs.item() == 0.0


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    out = tmp_path_factory.mktemp("joint") / "found.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(WORKER), str(out)], capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", SMALL)
def test_two_processes_learn_and_measure_what_one_does(name, by_two):
    """In float64; images without objects make micro-batches of a process in which parts get no gradient."""
    theirs, ours = by_two[name], joint_run(name)
    for key, value in ours["model"].items():
        torch.testing.assert_close(theirs["model"][key], value, rtol=1e-8, atol=1e-9)
    for a, b in zip(theirs["rows"], ours["rows"], strict=True):
        measured = {key: value for key, value in b.items() if value is not None}
        assert {key: a[key] for key in measured} == pytest.approx(measured, rel=2e-5, abs=1e-6)
        assert all(a[key] is None for key in b.keys() - measured.keys())


def test_noise_for_denoising_has_no_object_in_some_micro_batches():
    data = Shapes()
    model, _ = small("detr", denoising=2)
    history = fit(model, data, None, replace(DOUBLE, accum=2), task=Detection(), progress=False)
    assert (weights(model) - weights(small("detr", denoising=2)[0])).abs().max() > 1e-3 and len(history) == 1


# -------------------------------------------------------------------------------------------------------- metrics


def test_an_evaluation_is_the_metric_of_all_images():
    """Redone by hand, one image at a time, and with names of classes."""
    model, data = small("unet")[0].eval(), Shapes(5, seed=1)
    found = Segmentation(per_class=True).evaluate(model, data, DOUBLE)
    metric = SegmentationMetric(3, classes=Shapes.semantic_classes)
    for image, target in (data[i] for i in range(5)):
        with torch.no_grad():
            metric.update(model(image[None]), target["semantic"][None])
    assert {k: v for k, v in found.items() if k != "val_loss"} == pytest.approx(metric.compute(), rel=1e-6)
    assert "iou_cat" in found and model.training is False

    detector, task = small("fcos")
    perfect = [{**data[i][1], "scores": torch.ones(len(data[i][1]["labels"]))} for i in range(5)]
    detector.results = lambda output: perfect
    result = task.evaluate(detector, data, replace(DOUBLE, batch_size=5))
    assert result["map"] == result["map_50"] == 1.0 and set(result) == {*Detection.metrics}


def test_small_is_measured_by_the_size_of_images():
    """COCO's 32 pixels are those of images of 640: of 32 pixels, 1.6."""
    metric = Detection().make_metric(small("fcos")[0], Shapes(1))
    assert metric.factor == pytest.approx(20.0)
    assert Detection().make_metric(small("eomt")[0], Shapes(1)).factor == 1.0


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("unet", Detection(), "task 'detection' is not for a UNet; use a model of .*: fcos, detr, or eomt"),
        ("fcos", Segmentation(), "task 'segmentation' is not for a Fcos; use .*: unet, segmenter or eomt"),
    ],
)
def test_a_model_for_another_task_is_refused(name, task, message):
    with pytest.raises(ValueError, match=message):
        run(name, task=task)


def test_what_data_must_be_is_said():
    with pytest.raises(ValueError, match="train_set: images are not prepared yet; give the data set a transform"):
        run("fcos", data=scenes("train", length=4, img_size=32))
    without = Shapes(4)
    for _, target in without.samples:
        del target["masks"], target["semantic"]
    with pytest.raises(ValueError, match=r"targets have no 'masks', .*for boxes use fcos or detr"):
        run("eomt", data=without)
    with pytest.raises(ValueError, match=r"targets have no 'semantic', .*masks:PATH"):
        run("unet", data=without)
    with pytest.raises(ValueError, match="num_classes is 3 but train_set has 2 classes; build .*num_classes=2"):
        fit(small("fcos", num_convs=2)[0].double(), Shapes(4), None, DOUBLE, task=Renamed(), progress=False)
    with pytest.raises(ValueError, match="does not heed hflip"):
        run("fcos", replace(DOUBLE, hflip=True))
    outside = Shapes(4)
    outside.samples[0][1]["boxes"][:] = torch.tensor([0.0, 0.0, 40.0, 10.0])
    with pytest.raises(ValueError, match=r"targets\[\d\]: box 0, .* reaches out of the image of 32×32"):
        run("fcos", data=outside)


class Renamed(Detection):
    def bind(self, model):
        super().bind(model)
        model.num_classes = 3


def test_terms_with_different_counts_are_refused():
    from vitcourse.dense_prediction import BoxSetLoss

    model, task = small("detr")
    model.criterion = BoxSetLoss(class_count="weights")
    with pytest.raises(ValueError, match="use a loss with class_count='objects'"):
        fit(model, Shapes(), None, DOUBLE, task=task, progress=False)


def test_grey_images_for_a_model_in_colour_are_named():
    model = create_model("fcos", img_size=32, num_classes=2, in_chans=1, **SWIN, channels=8, num_convs=1, extra="")
    with pytest.raises(ValueError, match=r"images have shape \(3, 32, 32\), the model's in_chans is 1"):
        fit(model.double(), Shapes(4), None, DOUBLE, task=Detection(), progress=False)
