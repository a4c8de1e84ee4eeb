"""What ``vitcourse evaluate`` does for an encoder that was trained without labels: it asks what it has learnt.

The training images of a data set are the examples, and its test images the question.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from vitcourse.pretraining.diagnostics import effective_rank
from vitcourse.pretraining.transfer import extract_features, knn_predict, linear_probe, ridge_probe
from vitcourse.train import TrainConfig
from vitcourse.train.program import fit_size

from . import classification
from .classification import BATCH_SIZE as BATCH_SIZE
from .classification import WANTED as WANTED
from .opening import choose_split, open_split

NEIGHBOURS = 20  # that vote, as many measure


def measure(model: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of nearest neighbours, ridge regression and a linear probe; per class and confusion are the probe's."""
    split = choose_split(options)
    if split == "train":
        raise ValueError("--split train holds the examples that the encoder is measured by; use test or val")
    config = TrainConfig(
        device=options.device, eval_batch_size=options.batch_size, num_workers=options.num_workers, loader="auto"
    )
    examples, questions = (open_split(options, name) for name in ("train", split))
    train, test = (
        extract_features(model, fit_size(dataset, model, config, train=False), config)
        for dataset in (examples, questions)
    )
    classes = questions.classes
    probe = linear_probe(train)
    predicted = {
        "knn": knn_predict(train, test.x, min(NEIGHBOURS, len(train.x))),
        "ridge": ridge_probe(train).predict(test.x),
        "linear": probe.predict(test.x),
    }
    found = {f"{name}_accuracy": (labels == test.y).float().mean().item() for name, labels in predicted.items()}
    count = len(classes)
    confusion = torch.bincount(test.y * count + predicted["linear"], minlength=count * count).view(count, count)
    per_class = [
        {"name": name, "images": n, "correct": k, "accuracy": k / n if n else None}
        for name, n, k in zip(classes, confusion.sum(1).tolist(), confusion.diagonal().tolist(), strict=True)
    ]
    return {
        "task": "pretraining",
        "data": options.data,
        "split": split,
        "images": len(test.y),
        "examples": len(train.y),
        **found,
        "accuracy": found["linear_accuracy"],
        "effective_rank": effective_rank(test.x),
        "dimensions": test.x.shape[1],
        "classes": per_class,
        "confusion": confusion.tolist(),
    }


def report(result: dict[str, Any]) -> str:
    """The accuracies, all of frozen features."""
    return "\n".join(
        [
            f"{result['weights']} on {result['data']}, {result['split']}: {result['images']} images, frozen features, "
            f"{result['examples']} labelled examples",
            f"{min(NEIGHBOURS, result['examples'])} nearest neighbours {result['knn_accuracy']:.4f}   "
            f"ridge regression {result['ridge_accuracy']:.4f}   linear probe {result['linear_accuracy']:.4f}",
            f"effective rank {result['effective_rank']:.1f} of {result['dimensions']}",
            "",
            "accuracy of the linear probe:",
            *classification.report_classes(result),
        ]
    )


def draw(result: dict[str, Any]) -> Figure:
    """The linear probe's confusion matrix, beside the accuracy of each class."""
    return classification.draw(result)


def predict(model: nn.Module, files: Sequence[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    raise ValueError(
        "these weights were trained without labels and know no classes; fine-tune them first: vitcourse train "
        "--weights FILE --data …"
    )


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return records


def sheet(records: list[dict[str, Any]]) -> Figure:
    raise ValueError("there is nothing to draw of weights that know no classes")
