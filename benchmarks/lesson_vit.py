"""The comparisons of lesson 00 that it has no time to train: small ViTs on Fashion-MNIST, three seeds each.

    python -m benchmarks.lesson_vit            every run that is not in runs/lesson_vit.jsonl yet, then the results file

Every run sees the same number of images, in steps of 100 or as it says, save for those at "equal time": there
the convolutional network gets as many steps as fit into the ViT's CPU time, by the median time of a step, both measured
in turns before anything else.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.data import Dataset

from benchmarks.sweeps import SEEDS, Row, sweep
from vitcourse.course.baselines import small_cnn
from vitcourse.data import open_dataset, subset
from vitcourse.train import TrainConfig, fit
from vitcourse.vit import VisionTransformer

STEPS, BATCH = 500, 100  # five passes over the 10 000 embedded images
BASE = {"lr": 3e-3, "warmup": 0.1, "label_smoothing": 0.0}
LIGHT = {"hflip": True, "crop_padding": 2}
STRONG = {**LIGHT, "randaugment": 2, "randaugment_magnitude": 5, "mixup": 0.8, "cutmix": 1.0}


def settings() -> list[Row]:
    """Every run but for its seed. The first is what all others are compared with."""
    runs: list[Row] = [{"name": "base"}]
    runs += [{"name": f"patch {p}", "model": {"patch_size": p}} for p in (14, 4)]
    runs += [{"name": f"adamw lr {lr:g}", "train": {"lr": lr}} for lr in (1e-3, 1e-2)]
    runs += [{"name": f"adamw lr {lr:g}, no warm-up", "train": {"lr": lr, "warmup": 0.0}} for lr in (3e-3, 1e-2)]
    runs += [{"name": "batch 500", "batch": 500}, {"name": "batch 500, lr 0.007", "batch": 500, "train": {"lr": 7e-3}}]
    runs += [{"name": "10000 images, flips and crops", "train": LIGHT}]
    runs += [{"name": "2000 images", "images": 2000}]
    runs += [{"name": "2000 images, flips and crops", "images": 2000, "train": LIGHT}]
    runs += [{"name": "2000 images, strong augmentation", "images": 2000, "train": STRONG}]
    runs += [{"name": "500 images", "images": 500}]
    runs += [{"name": f"cnn, {n} images, equal time", "images": n, "cnn": True} for n in (500, 2000, 10000)]
    return runs


def wanted(rows: list[Row]) -> Iterator[Row]:
    """First the seconds of a step, which are in ``rows`` when the runs that need them come."""
    yield {"name": "step seconds", "seed": -1}
    for seed in SEEDS:
        for run in settings():
            yield {"name": run["name"], "seed": seed, "steps": steps_of(run, rows)}


def steps_of(run: Row, rows: list[Row]) -> int:
    """As many steps as see the same number of images, or, for the convolutional network, as take the same time."""
    if run.get("cnn"):
        seconds = next(row for row in rows if row["name"] == "step seconds")
        return round(STEPS * seconds["vit"] / seconds["cnn"])
    return STEPS * BATCH // run.get("batch", BATCH)


def make_model(run: Row) -> nn.Module:
    if run.get("cnn"):
        return small_cnn()
    sizes = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10}
    return VisionTransformer(**{**sizes, "embed_dim": 64, "depth": 4, "num_heads": 4, **run.get("model", {})})


def step_seconds(models: dict[str, nn.Module], repeats: int = 15) -> dict[str, float]:
    """Median CPU seconds of one training step of each model, measured in turns."""
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    steps = {name: _step(model, images, labels) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


def _step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def train(run: Row, seed: int, steps: int, data: tuple[Dataset, Dataset] | None = None) -> Row:
    """The row of one run, trained and judged on ``data``: the embedded images and their test set by default."""
    train_set, test_set = data or [open_dataset("fashion_mnist_subset", split) for split in ("train", "test")]
    images = min(run.get("images", 10000), len(train_set))
    if images < len(train_set):
        train_set = subset(train_set, images, seed=seed)
    torch.manual_seed(seed)
    model = make_model(run)
    batch = run.get("batch", BATCH)
    epochs = -(-steps // (images // batch))
    options = {"epochs": epochs, "max_steps": steps, "batch_size": batch, "eval_every": epochs, "seed": seed}
    start = time.process_time()
    history = fit(
        model, train_set, test_set, TrainConfig(**{**options, **BASE, **run.get("train", {})}), progress=False
    )
    return {
        "name": run["name"],
        "seed": seed,
        "images": images,
        "steps": steps,
        "accuracy": history[-1]["val_accuracy"],
        "loss": history[-1]["val_loss"],
        "train_loss": history[-1]["train_loss"],
        "cpu_seconds": round(time.process_time() - start, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": None if run.get("cnn") else model.pos_embed.shape[1],
    }


def measure(asked: Row) -> Row:
    """The row of what is wanted."""
    if asked["name"] == "step seconds":
        models = {"vit": make_model({}), "cnn": small_cnn()}
        models |= {f"vit, patch {p}": make_model({"model": {"patch_size": p}}) for p in (14, 4)}
        return step_seconds(models)
    run = next(run for run in settings() if run["name"] == asked["name"])
    return train(run, asked["seed"], asked["steps"])


if __name__ == "__main__":
    sweep("lesson_vit", __doc__, wanted, measure)
