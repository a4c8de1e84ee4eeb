"""The comparisons of lesson 04 that it has no time to train: the shipped ViT, fine-tuned for another camera's pictures.

    python -m benchmarks.lesson_finetuning            every run that runs/lesson_finetuning.jsonl lacks, then results
    python -m benchmarks.lesson_finetuning --runs 20  twenty of them, to share a machine; results of who is finished

The old task is Fashion-MNIST, which the model was trained on. The new ones are the same pictures taken otherwise:
``tilted`` by 30 degrees, ``noisy`` (Gaussian, σ = 40 of 255), and ``far`` (upside down and inverted). Labels mean the
same, so that the head is kept, and one model can be asked for both tasks.

Every entry has the same budget: 200 steps of 20 pictures, at its own best rate. "tune" rows: one seed, judged by 1 000
training pictures that no run trains on. While the best rate lies at the end of its range, the range grows. "test" rows:
the chosen rate, three seeds (other pictures, other order, other prompts), judged by the test pictures, by which nothing
was chosen. The originals of all training pictures, not of the test pictures, were seen in pre-training.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torchvision.transforms.functional as TF
from torch import Tensor, nn

import vitcourse
from benchmarks.lesson_tuning import RATES, widened
from benchmarks.sweeps import SEEDS, Row, sweep
from vitcourse import paths
from vitcourse.data import ImageDataset, open_dataset, subset
from vitcourse.finetuning import Stage, Staged, finetune, interpolation_path, make_method
from vitcourse.train import TrainConfig, TrainingError, fit

STEPS, BATCH = 200, 20
HELD_OUT, TESTED = 1000, 1000  # pictures that rates are chosen by; pictures that results are of
ALPHAS = tuple(i / 10 for i in range(11))
SHIPPED = "fashion_mnist_vit.safetensors"

# Every method with its options, and the rates that its search starts with: three each, the same number for all.
HIGH, LOW = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3)
METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "full": ("full", {}, LOW),
    "linear": ("linear", {}, HIGH),
    "bitfit": ("bitfit", {}, HIGH),
    "vpt_shallow": ("vpt_shallow", {"tokens": 10}, HIGH),
    "vpt_deep": ("vpt_deep", {"tokens": 10}, HIGH),
    "lora": ("lora", {"rank": 4}, HIGH),
    "layer_decay": ("layer_decay", {"decay": 0.75}, LOW),
    "deep_first": ("staged", {"schedule": "deep_first"}, LOW),
    "shallow_first": ("staged", {"schedule": "shallow_first"}, LOW),
}
SCRATCH = "scratch"
# One part alone, and the head (Lee et al. 2023): which part should move depends on what has changed.
PARTS = {
    "part: stem": ("patch_embed",),
    "part: first block": ("blocks.0",),
    "part: last block": ("blocks.3",),
}


@dataclass(frozen=True)
class Entry:
    """What is tuned by itself: a method, the new task, and how many pictures of it have labels."""

    method: str
    task: str = "tilted"
    images: int = 200

    @property
    def called(self) -> Row:
        return {"method": self.method, "task": self.task, "images": self.images}

    @property
    def rates(self) -> tuple[float, ...]:
        return METHODS[self.method][2] if self.method in METHODS else LOW


COUNTED = (SCRATCH, "full", "linear", "lora")
ENTRIES = [Entry(method) for method in (SCRATCH, *METHODS)]
ENTRIES += [Entry(method, images=images) for images in (50, 1000) for method in COUNTED]
ENTRIES += [Entry(method, task) for task in ("noisy", "far") for method in COUNTED]
ENTRIES += [Entry(part, task) for task in ("tilted", "noisy", "far") for part in PARTS]


def wanted(rows: list[Row]) -> Iterator[Row]:
    """Every run, given the rows of those before it."""
    for entry in ENTRIES:
        rates, before = entry.rates, None
        while rates != before:
            for lr in rates:
                yield {**entry.called, "entry": str(entry.called), "stage": "tune", "lr": lr, "seed": 0}
            before, best = rates, chosen(rows, entry)
            rates = widened(rates, RATES, best["lr"])
        for seed in SEEDS:
            yield {**entry.called, "entry": str(entry.called), "stage": "test", "lr": best["lr"], "seed": seed}


def chosen(rows: list[Row], entry: Entry) -> Row:
    """The row that was best on the held-out pictures; of equals, the one with the lower loss there."""
    tuned = [row for row in rows if {**entry.called, "stage": "tune"}.items() <= row.items()]
    return max(tuned, key=lambda row: (row["accuracy"], -row["loss"]))


# ---------------------------------------------------------------------------------------------------- the pictures


def otherwise(images: Tensor, task: str, seed: int = 0) -> Tensor:
    """uint8 pictures (N, 1, H, W) as the other camera takes them."""
    if task == "tilted":
        return TF.rotate(images, 30, TF.InterpolationMode.BILINEAR)
    if task == "far":
        return 255 - TF.rotate(images, 180)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + 40 * noise).round().clamp(0, 255).byte()


def taken(part: Any, task: str | None) -> ImageDataset:
    """A part of Fashion-MNIST, as it is or as the other camera takes it."""
    images = torch.stack([torch.as_tensor(image) for image, _ in part])
    facts = {"mean": part.mean, "std": part.std}
    return ImageDataset(otherwise(images, task) if task else images, part.targets, part.classes, **facts)


@cache
def held_out() -> set[int]:
    return set(subset(open_dataset("fashion_mnist_subset"), HELD_OUT, seed=99).indices)


def training_pictures(count: int, seed: int) -> Any:
    """``count`` of the training pictures that rates are not chosen by."""
    whole = open_dataset("fashion_mnist_subset")
    rest = whole.take(sorted(set(range(len(whole))) - held_out()))
    return subset(rest, count, seed=seed)


@cache
def judges(stage: str, task: str | None) -> ImageDataset:
    if stage == "tune":
        return taken(open_dataset("fashion_mnist_subset").take(sorted(held_out())), task)
    return taken(subset(open_dataset("fashion_mnist_subset", "test"), TESTED), task)


# --------------------------------------------------------------------------------------------------------- one run


def start() -> nn.Module:
    return vitcourse.create_model(paths.data_dir() / "weights" / SHIPPED)


@torch.no_grad()
def answers(model: nn.Module, data: ImageDataset) -> Tensor:
    model.eval()
    images = (data.images.float() / 255 - data.mean[0]) / data.std[0]
    return torch.cat([model(part).argmax(1) for part in images.split(250)])


def accuracy(model: nn.Module, data: ImageDataset) -> float:
    return (answers(model, data) == torch.tensor(data.targets)).float().mean().item()


def train(run: Row) -> Row:
    seed, task, method = run["seed"], run["task"], run["method"]
    torch.manual_seed(seed)
    model = start()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if method == SCRATCH:
        prepared, model = model.preprocess, vitcourse.create_model(model.name, **model.model_args)
        model.preprocess = prepared  # it is to see the same pixels
        how = finetune(model, "full")
    elif method in PARTS:
        how = finetune(model, Staged(schedule=[Stage((*PARTS[method], "head"))]))
    else:
        name, options, _ = METHODS[method]
        how = finetune(model, make_method(name, **options))
    data = taken(training_pictures(run["images"], seed), task)
    epochs = -(-STEPS // max(1, len(data) // BATCH))
    config = TrainConfig(
        epochs=epochs,
        max_steps=STEPS,
        batch_size=BATCH,
        lr=run["lr"],
        warmup=0.1,
        label_smoothing=0.0,
        eval_every=epochs,
        seed=seed,
    )
    began, row = time.process_time(), {"trainable": how.trainable, "head": how.head, "total": how.total}
    judge = judges(run["stage"], task)
    try:
        last = fit(model, data, judge, config, task=how, progress=False)[-1]
    except TrainingError as error:  # not finite: it answers no better than chance
        return row | {"accuracy": 0.1, "loss": 1e9, "failed": str(error)}
    row |= {"accuracy": last["val_accuracy"], "loss": last["val_loss"], "train_loss": last["train_loss"]}
    row["cpu_seconds"] = round(time.process_time() - began, 1)
    if run["stage"] == "test":
        old = judges("test", None)
        row |= {"old_accuracy": accuracy(model, old)}
        row["answers"] = "".join(map(str, answers(model, judge).tolist()))
        if (method, task, run["images"]) == ("full", "tilted", 200):
            row["path"] = interpolation_path(
                model,
                before,
                {name: tensor.clone() for name, tensor in model.state_dict().items()},
                lambda m: {"old": accuracy(m, old), "new": accuracy(m, judge)},
                ALPHAS,
            )
    return row


if __name__ == "__main__":
    sweep("lesson_finetuning", __doc__, wanted, train, whole="entry")
