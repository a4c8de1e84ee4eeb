"""What ``vitcourse evaluate`` and ``vitcourse predict`` do for a classifier of images."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse.data import read_image
from vitcourse.data.folders import is_picture
from vitcourse.inference import class_names, image_transform, probabilities
from vitcourse.train import TrainConfig
from vitcourse.train.evaluation import visit_logits
from vitcourse.train.program import fit_size

from .opening import choose_split, open_split

BATCH_SIZE = 128
WANTED = ("pictures", is_picture)
SHOWN_NUMBERS, SHOWN_NAMES, SHOWN_PICTURES = 20, 50, 60  # what a figure has room for

# --------------------------------------------------------------------------------------------------------- evaluate


def measure(model: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Loss, accuracy, top-5 accuracy, accuracy per class, and the confusion matrix [true][predicted]."""
    split = choose_split(options)
    dataset = open_split(options, split)
    config = TrainConfig(
        device=options.device, eval_batch_size=options.batch_size, num_workers=options.num_workers, loader="auto"
    )
    classes, place = match_classes(model, dataset.classes)
    found = _count(model, fit_size(dataset, model, config, train=False), config, place, len(classes))
    return {"task": "classification", "data": options.data, "split": split, **summarise(found, classes)}


def match_classes(model: nn.Module, named: Sequence[str]) -> tuple[list[str], Tensor]:
    """The model's classes, and the place of each of the data set's among them: names decide, not their order.

    Raises:
        ValueError: a class that the model does not know.
    """
    count = getattr(model, "num_classes", None) or len(named)
    known = getattr(model, "classes", None)
    if known is None:
        if count != len(named):
            raise ValueError(
                f"the weights are for {count} classes and name none, the data have {len(named)}; give the data set "
                "that they were trained for"
            )
        print("vitcourse: the weights name no classes; they are taken in the order of the data's", file=sys.stderr)
        return list(named), torch.arange(count)
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ValueError(
            f"the data have a class {unknown[0]!r}, which the weights do not know; they know {', '.join(known[:12])}"
            f"{', …' if len(known) > 12 else ''}"
        )
    return list(known), torch.tensor([known.index(name) for name in named])


def _count(
    model: nn.Module, dataset: Dataset, config: TrainConfig, place: Tensor, classes: int
) -> tuple[float, int, Tensor]:
    """The sum of the losses, the images whose class is among the five likeliest, and the confusion matrix."""
    loss, among, confusion = 0.0, 0, torch.zeros(classes * classes, dtype=torch.long)

    def add(logits: Tensor, labels: Tensor) -> None:
        nonlocal loss, among
        logits, labels = logits.cpu(), place[labels.cpu()]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        likeliest = logits.topk(min(5, classes)).indices
        among += int((likeliest == labels[:, None]).sum())
        confusion.add_(torch.bincount(labels * classes + likeliest[:, 0], minlength=classes * classes))

    visit_logits(model, dataset, add, config)
    return loss, among, confusion.view(classes, classes)


def summarise(found: tuple[float, int, Tensor], classes: list[str]) -> dict[str, Any]:
    """Metrics, from the sum of the losses, how many have their class among the five likeliest, and the confusion."""
    loss, among, confusion = found
    images, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    total = sum(images)
    per_class = [
        {"name": name, "images": n, "correct": k, "accuracy": k / n if n else None}
        for name, n, k in zip(classes, images, right, strict=True)
    ]
    top5 = {"top5_accuracy": among / total} if len(classes) > 5 else {}
    return {
        "images": total,
        "loss": loss / total,
        "accuracy": sum(right) / total,
        **top5,
        "classes": per_class,
        "confusion": confusion.tolist(),
    }


def report(result: dict[str, Any]) -> str:
    """The metrics, the accuracy of each class, and what is mistaken for what most often."""
    top5 = f"   top-5 {result['top5_accuracy']:.4f}" if "top5_accuracy" in result else ""
    lines = [
        f"{result['weights']} on {result['data']}, {result['split']}: {result['images']} images",
        f"accuracy {result['accuracy']:.4f}{top5}   loss {result['loss']:.4f}",
        "",
    ]
    lines += report_classes(result)
    if mistakes := _mistakes(result)[:3]:
        names = [row["name"] for row in result["classes"]]
        told = "; ".join(f"{names[i]} as {names[j]} ({count})" for count, i, j in mistakes)
        lines += ["", f"most often mistaken: {told}"]
    return "\n".join(lines)


def report_classes(result: dict[str, Any]) -> list[str]:
    """A line for each class that had images, with the accuracies below each other."""
    seen = [row for row in result["classes"] if row["images"]]
    width = max(len(row["name"]) for row in seen)
    return [f"{row['name']:<{width}}  {row['accuracy']:.4f}  ({row['correct']} of {row['images']})" for row in seen]


def _mistakes(result: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Count, true and predicted class of each kind of mistake, the most frequent first."""
    rows = enumerate(result["confusion"])
    found = [(n, i, j) for i, row in rows for j, n in enumerate(row) if n and i != j]
    return sorted(found, key=lambda mistake: (-mistake[0], *mistake[1:]))


def draw(result: dict[str, Any]) -> Figure:
    """The confusion matrix, each row in shares of its true class, beside the accuracy of each class."""
    from vitcourse import plot

    names = [row["name"] for row in result["classes"]]
    count = len(names)
    confusion = torch.tensor(result["confusion"], dtype=torch.float64)
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(max(4.0, 0.45 * count + 2), 14.0)
    with plot.styled():
        figure = Figure(figsize=(side + 3.2, side))
        matrix, bars = figure.subplots(1, 2, width_ratios=(side, 2.4))
        matrix.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        matrix.grid(False)
        matrix.set(xlabel="predicted", ylabel="true", title=_title(result))
        if count <= SHOWN_NUMBERS:
            for i, row in enumerate(result["confusion"]):
                for j, n in enumerate(row):
                    if n:
                        dark = "white" if shares[i, j] > 0.5 else "black"
                        matrix.text(j, i, n, ha="center", va="center", color=dark, fontsize=8)
        ticks = range(0, count, math.ceil(count / SHOWN_NAMES))
        short = [shortened(names[i]) for i in ticks]
        matrix.set_xticks(list(ticks), short, rotation=90, fontsize=8)
        matrix.set_yticks(list(ticks), short, fontsize=8)
        bars.barh(range(count), [row["accuracy"] or 0.0 for row in result["classes"]], color=plot.BLUE)
        bars.set(xlim=(0, 1), xlabel="accuracy", ylim=matrix.get_ylim(), yticks=[])
        bars.axvline(result["accuracy"], color=plot.ORANGE, label=f"all: {result['accuracy']:.4f}")
        bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    return figure


def _title(result: dict[str, Any]) -> str:
    return f"{shortened(Path(result['weights']).name, 28)} on {shortened(result['data'], 32)}, {result['split']}"


def shortened(name: str, longest: int = 18) -> str:
    """A name as a figure has room for it."""
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return name.replace("$", r"\$")  # between two of them Matplotlib would set a formula


# ---------------------------------------------------------------------------------------------------------- predict


def predict(model: nn.Module, files: Sequence[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each file its ``options.top`` likeliest classes, ``{"file", "top": [{"class", "index", "probability"}]}``."""
    if options.out_dir:
        raise ValueError("--out-dir is for boxes and masks; for classes of pictures there is --sheet")
    transform, records = image_transform(model), [{"file": str(file)} for file in files]
    for start in range(0, len(files), options.batch_size):
        part, images = records[start : start + options.batch_size], []
        for record in part:
            try:
                images.append(transform(record["file"]))
            except (ValueError, OSError) as error:
                record["error"] = str(error)
        if images:
            found = probabilities(model, torch.stack(images))
            whole = [record for record in part if "error" not in record]
            for record, row in zip(whole, found, strict=True):
                record["top"] = best_guesses(row, class_names(model, len(row)), options.top)
    return records


def best_guesses(row: Tensor, names: list[str], count: int) -> list[dict[str, Any]]:
    """The likeliest classes, likeliest first, of probabilities (K,)."""
    values, indices = row.topk(min(count, len(names)))
    return [
        {"class": names[i], "index": i, "probability": p}
        for i, p in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """file, rank (from 1), class, index, probability."""
    return [
        {"file": record["file"], "rank": rank, **guess, "probability": f"{guess['probability']:.6f}"}
        for record in records
        for rank, guess in enumerate(record["top"], start=1)
    ]


def sheet(records: list[dict[str, Any]]) -> Figure:
    """The pictures, the likeliest classes of each below it with a bar for the probability."""
    from vitcourse import plot

    if len(records) > SHOWN_PICTURES:
        print(f"vitcourse: the sheet shows the first {SHOWN_PICTURES} of {len(records)} pictures", file=sys.stderr)
        records = records[:SHOWN_PICTURES]
    guesses = max(len(record["top"][:3]) for record in records)
    columns = min(6, len(records))
    lines = math.ceil(len(records) / columns)
    with plot.styled():
        figure = Figure(figsize=(2.2 * columns, (2.4 + 0.24 * guesses) * lines))
        axes = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=[2.0, 0.26 * guesses] * lines)
        for ax in axes.flat:
            ax.set_axis_off()
        for i, record in enumerate(records):
            picture, bars = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
            plot.show_image(picture, read_image(record["file"]))
            picture.set_title(shortened(Path(record["file"]).name, 24), fontsize=8)
            draw_guesses(bars, record["top"][:3], guesses)
    return figure


def draw_guesses(ax: Any, guesses: list[dict[str, Any]], room: int) -> None:
    """Names with bars for their probabilities, with room for as many lines."""
    from vitcourse import plot

    for place, guess in enumerate(guesses):
        ax.barh(place, guess["probability"], height=0.9, color=plot.SKY if place == 0 else "#D9D9D9")
        ax.text(0.02, place, shortened(guess["class"]), va="center", fontsize=8)
        ax.text(0.98, place, f"{100 * guess['probability']:.1f} %", va="center", ha="right", fontsize=8)
    ax.set(xlim=(0, 1), ylim=(room - 0.5, -0.5))
