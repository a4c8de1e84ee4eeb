"""What ``vitcourse evaluate`` and ``vitcourse predict`` do for a segmenter, which gives every pixel a class."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageColor
from torch import Tensor, nn

from vitcourse.dense_prediction import Segmentation
from vitcourse.inference import class_names

from . import dense
from .dense import BATCH_SIZE, WANTED, Drawings, Seen, colour_of, sheet

METRICS = ("miou", "pixel_accuracy", "boundary_accuracy")
__all__ = ["BATCH_SIZE", "WANTED", "draw", "measure", "predict", "report", "rows", "sheet"]


def measure(model: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Mean IoU, accuracy of all pixels and of those near a boundary, IoU of each class, at the size of the model's."""
    return dense.measure(Segmentation(per_class=True), model, options, "iou", "semantic")


def report(result: dict[str, Any]) -> str:
    """The metrics, and the IoU of each class that occurs."""
    return dense.report(result, METRICS, "iou")


def draw(result: dict[str, Any]) -> Figure:
    """Bars of the metrics, beside bars of each class."""
    return dense.draw(result, METRICS, "iou")


def predict(model: nn.Module, files: Sequence[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each file the share of its pixels that each class has, the largest first.

    Records are ``{"file", "width", "height", "classes": [{"class", "index", "pixels", "share"}]}``. With
    ``options.out_dir`` also ``"mask"``, a file of the upright picture's size whose values are the classes, with a
    palette, and ``"drawn"``.
    """
    names, drawings, records = class_names(model, model.num_classes), Drawings(options), []
    for record, seen, scores in dense.look(model, files, options.batch_size, model.segment):
        records.append(record)
        if seen is None:
            continue
        labels = labels_of(scores, seen)
        counts = torch.bincount(labels.flatten(), minlength=len(names)).tolist()
        record["classes"] = [
            {"class": names[k], "index": k, "pixels": n, "share": n / labels.numel()}
            for n, k in sorted(((n, k) for k, n in enumerate(counts) if n), reverse=True)
        ]
        if drawings.folder:
            file = drawings.path(record["file"], "_mask.png")
            to_palette(labels).save(file)
            record["mask"] = str(file)
        if drawings.wanted:
            seen_classes = [(labels == row["index"], row["index"]) for row in record["classes"] if row["index"]]
            drawings.keep(record, dense.overlay(dense.canvas(seen.file), seen_classes))
    return records


def labels_of(scores: Tensor, seen: Seen) -> Tensor:
    """The likeliest class of each pixel of the picture, (H, W), from scores (K, h, w) of the letterboxed image."""
    best, labels = None, torch.zeros(seen.size, dtype=torch.uint8 if len(scores) <= 256 else torch.int32)
    for k, one in enumerate(scores[:, : seen.inside[0], : seen.inside[1]].float().cpu()):
        one = F.interpolate(one[None, None], seen.size, mode="bilinear")[0, 0]  # one by one: pictures may be huge
        if best is None:
            best = one
            continue
        labels[one > best] = k
        best = torch.maximum(best, one)
    return labels


def to_palette(labels: Tensor) -> Image.Image:
    """Classes (H, W) as a picture with a palette, class 0 black; in 16 bits of grey where there are more than 256."""
    if int(labels.max()) > 255:
        return Image.fromarray(labels.numpy().astype(np.uint16))
    picture = Image.fromarray(labels.numpy().astype(np.uint8), mode="P")
    colours = [(0, 0, 0), *(ImageColor.getrgb(colour_of(k)) for k in range(1, 256))]
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """file, class, index, pixels, share: a row for each class that a picture has."""
    return [
        {"file": record["file"], **row, "share": f"{row['share']:.6f}"}
        for record in records
        for row in record["classes"]
    ]
