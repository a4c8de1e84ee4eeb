"""What ``vitcourse evaluate`` and ``vitcourse predict`` do for a detector of boxes, or of objects' masks."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, masks_to_boxes

from vitcourse.data.cocomask import encode_mask
from vitcourse.dense_prediction import Detection
from vitcourse.inference import class_names

from . import dense
from .dense import BATCH_SIZE, WANTED, Drawings, Seen, sheet

METRICS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar")
__all__ = ["BATCH_SIZE", "WANTED", "draw", "measure", "predict", "report", "rows", "sheet"]


def measure(model: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Mean average precision as COCO defines it, by size, and of each class, at the size of the model's images."""
    return dense.measure(Detection(per_class=True), model, options, "map", "labels")


def report(result: dict[str, Any]) -> str:
    """The metrics, and the mean average precision of each class."""
    return dense.report(result, METRICS, "map")


def draw(result: dict[str, Any]) -> Figure:
    """Bars of the metrics, beside bars of each class."""
    return dense.draw(result, METRICS, "map")


def predict(model: nn.Module, files: Sequence[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each file its objects, the surest first.

    Records are ``{"file", "width", "height", "objects": [{"class", "index", "score", "box"}]}``, boxes being (x0, y0,
    x1, y1) in pixels of the upright picture; of masks also ``"mask"``, in COCO's run lengths.
    """
    names, drawings, records = class_names(model, model.num_classes), Drawings(options), []
    for record, seen, found in dense.look(model, files, options.batch_size, model.results):
        records.append(record)
        if seen is None:
            continue
        sure = found["scores"] >= options.threshold
        found = {key: value[sure].cpu() for key, value in found.items()}
        masks = [to_picture(mask, seen) for mask in found["masks"]] if "masks" in found else None
        boxes = _boxes_of(masks) if masks is not None else boxes_to_picture(found["boxes"], seen)
        record["objects"], kept = [], []
        for i in (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero().flatten().tolist():
            record["objects"].append(_entry(boxes[i], found["scores"][i], int(found["labels"][i]), names))
            if masks is not None:
                record["objects"][-1]["mask"] = encode_mask(masks[i].numpy())
                kept.append((masks[i], int(found["labels"][i])))
        if drawings.wanted:
            picture = dense.overlay(dense.canvas(seen.file), kept)
            drawings.keep(record, dense.draw_boxes(picture, record["objects"], picture.width / seen.size[1]))
    return records


def boxes_to_picture(boxes: Tensor, seen: Seen) -> Tensor:
    """Boxes (n, 4) in a letterboxed image to pixels of the picture, clipped to it; such as lie beside it are empty."""
    scale = torch.tensor([whole / part for whole, part in zip(seen.size, seen.inside, strict=True)])
    return clip_boxes_to_image(boxes.float() * scale.flip(0).repeat(2), seen.size)


def to_picture(mask: Tensor, seen: Seen) -> Tensor:
    """A mask (h, w) of a letterboxed image at the size of the picture: (H, W), boolean."""
    inside = mask[: seen.inside[0], : seen.inside[1]].float()
    return F.interpolate(inside[None, None], seen.size, mode="bilinear")[0, 0] > 0.5


def _boxes_of(masks: Sequence[Tensor]) -> Tensor:
    """Tight boxes (n, 4), the far edges exclusive; zeros for empty masks."""
    boxes = torch.zeros(len(masks), 4)
    for box, mask in zip(boxes, masks, strict=True):
        if mask.any():
            box.copy_(masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1]))
    return boxes


def _entry(box: Tensor, score: Tensor, label: int, names: Sequence[str]) -> dict[str, Any]:
    corners = [round(value, 2) for value in box.tolist()]
    return {"class": names[label], "index": label, "score": score.item(), "box": corners}


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """file, class, index, score, x0, y0, x1, y1: a row for each object, none for a picture without."""
    return [
        {
            "file": record["file"],
            **{key: found[key] for key in ("class", "index")},
            "score": f"{found['score']:.6f}",
            **dict(zip(("x0", "y0", "x1", "y1"), found["box"], strict=True)),
        }
        for record in records
        for found in record["objects"]
    ]
