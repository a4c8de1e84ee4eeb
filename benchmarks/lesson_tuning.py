"""The contenders of lesson 00, each at its own best rate and decay: otherwise a comparison is one of settings.

    python -m benchmarks.lesson_tuning         every run that runs/lesson_tuning.jsonl lacks, then the results
    python -m benchmarks.lesson_tuning --runs 8    eight of them, to share a machine; results of who is finished

"tune" rows: one seed, trained on 8 000 of the 10 000 embedded training images and judged by the other 2 000. While the
best rate or decay lies at the end of its range, the range grows, so no choice is at an end (but for no decay at all).
"test" rows: the chosen setting, three seeds, all training images, judged by the test images, which nothing was chosen
by. Where the choice is what ``lesson_vit`` trains with anyway, its rows are the test.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from torch.utils.data import Dataset, Subset

from benchmarks.common import read_results
from benchmarks.lesson_vit import BASE, LIGHT, STRONG, steps_of, train
from benchmarks.sweeps import SEEDS, Row, sweep
from vitcourse.data import open_dataset, subset
from vitcourse.data.datasets import FACTS
from vitcourse.train import TrainConfig

HELD_OUT = 2000
BASE_DECAY = TrainConfig.weight_decay
# Factors of about the square root of ten, of ten: what the ranges below grow by.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
DECAYS = (0.0, 5e-5, 5e-4, 5e-3, 0.05, 0.5, 5.0, 50.0)


@dataclass(frozen=True)
class Contender:
    """What is tuned: a run of ``lesson_vit``, and the range that each setting starts with."""

    name: str
    run: Row = field(default_factory=dict)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    decays: tuple[float, ...] = (BASE_DECAY,)
    decay_of: str = ""  # the contender whose best decay is taken, so that both differ in one thing
    in_lesson_vit: bool = True  # its test runs are there, if the lesson's own rate and decay are chosen


CONTENDERS = [  # rate times decay, the pull of one step, has the same range for both optimizers
    Contender("AdamW", decays=(0.0, 0.05, 0.5, 5.0), in_lesson_vit=False),
    Contender("SGD", {"train": {"optimizer": "sgd"}}, (0.1, 0.3, 1.0), (0.0, 5e-4, 5e-3, 0.05), in_lesson_vit=False),
    Contender("AdamW, no warm-up", {"train": {"warmup": 0.0}}, decay_of="AdamW"),
    Contender("500 images", {"images": 500}),
    Contender("cnn, 500 images, equal time", {"images": 500, "cnn": True}),
    Contender("batch 500", {"batch": 500}, (3e-3, 1e-2, 3e-2)),
    Contender("2000 images, flips and crops", {"images": 2000, "train": LIGHT}),
    Contender("2000 images", {"images": 2000}),
    Contender("cnn, 10000 images, equal time", {"cnn": True}),
    Contender("patch 14", {"model": {"patch_size": 14}}),
    Contender("patch 4", {"model": {"patch_size": 4}}),
    Contender("cnn, 2000 images, equal time", {"images": 2000, "cnn": True}),
    Contender("10000 images, flips and crops", {"train": LIGHT}),
    Contender("2000 images, strong augmentation", {"images": 2000, "train": STRONG}),
]


@cache
def parts() -> tuple[Dataset, Dataset]:
    """The embedded training images, less 2 000 (200 of each class), and these."""
    whole = open_dataset("fashion_mnist_subset")
    held_out = subset(whole, HELD_OUT, seed=0)
    rest = Subset(whole, sorted(set(range(len(whole))) - set(held_out.indices)))
    for fact in FACTS:
        setattr(rest, fact, getattr(whole, fact))
    rest.targets = [whole.targets[i] for i in rest.indices]
    return rest, held_out


def wanted(rows: list[Row]) -> Iterator[Row]:
    """Every run, ``{"name", "stage", "lr", "weight_decay", "seed"}``, given the rows of those before it."""
    for contender in CONTENDERS:
        rates, decays, before = contender.rates, contender.decays, None
        if contender.decay_of:
            decays = (chosen(rows, contender.decay_of)["weight_decay"],)
        while (rates, decays) != before:
            for lr, decay in itertools.product(rates, decays):
                yield {"name": contender.name, "stage": "tune", "lr": lr, "weight_decay": decay, "seed": 0}
            before, best = (rates, decays), chosen(rows, contender.name)
            rates = widened(rates, RATES, best["lr"])
            decays = widened(decays, DECAYS, best["weight_decay"]) if len(decays) > 1 else decays
        if contender.in_lesson_vit and (best["lr"], best["weight_decay"]) == (BASE["lr"], BASE_DECAY):
            continue
        for seed in SEEDS:
            decided = {"lr": best["lr"], "weight_decay": best["weight_decay"]}
            yield {"name": contender.name, "stage": "test", **decided, "seed": seed}


def chosen(rows: list[Row], name: str) -> Row:
    """The row of ``name`` that was best on the held-out images; of equals, the one with the lower loss there.

    >>> rows = [{"name": "a", "stage": "tune", "lr": r, "accuracy": r, "loss": 1.0} for r in (0.1, 0.3)]
    >>> chosen(rows, "a")["lr"]
    0.3
    """
    tuned = [row for row in rows if (row["name"], row["stage"]) == (name, "tune")]
    return max(tuned, key=lambda row: (row["accuracy"], -row["loss"]))


def widened(values: tuple[float, ...], ladder: tuple[float, ...], best: float) -> tuple[float, ...]:
    """``values`` and the next of ``ladder`` beyond the end that ``best`` lies at, if there is one.

    >>> widened((0.1, 0.3), RATES, 0.3), widened((0.0, 0.05, 0.5), DECAYS, 0.0)
    ((0.1, 0.3, 1.0), (0.0, 0.05, 0.5))
    """
    place = ladder.index(best)
    if best == values[-1]:
        return (*values, ladder[place + 1])
    if best == values[0] and place:
        return (ladder[place - 1], *values)
    return values


def measure(asked: Row) -> Row:
    """The row of what is wanted."""
    run = {**next(c.run for c in CONTENDERS if c.name == asked["name"]), "name": asked["name"]}
    run["train"] = {**run.get("train", {}), "lr": asked["lr"], "weight_decay": asked["weight_decay"]}
    steps = steps_of(run, read_results("lesson_vit")["rows"])
    return train(run, asked["seed"], steps, parts() if asked["stage"] == "tune" else None)


if __name__ == "__main__":
    sweep("lesson_tuning", __doc__, wanted, measure, whole="name")
