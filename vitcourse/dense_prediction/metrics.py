"""What detectors and segmenters are judged by: mean average precision and mean IoU, by torchmetrics, not by hand.

torchmetrics and faster-coco-eval are needed for that alone: ``pip install 'vitcourse[dense]'``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .boxes import Target
from .matching import needs
from .segmentation import IGNORED

COCO_SMALL = 32.0  # pixels: below this squared, COCO calls an object small; medium below three times that, squared


class DetectionMetric:
    """Mean average precision as COCO defines it (Lin et al. 2014): over IoUs of 0.5 to 0.95, and by size.

    Args:
        masks: whether masks overlap, and not boxes.
        small: objects of an area below ``small``² pixels are small, below (3 · ``small``)² medium. COCO's 32 is for
            images of about 640 pixels.
        detections: how many of an image, the surest, are looked at.
        classes: the classes' names; with them, the result has a value for each.

    Raises:
        ImportError: torchmetrics or faster-coco-eval is needed.
        ValueError: another ``small`` for masks.

    >>> metric = DetectionMetric(small=16)
    >>> boxes = torch.tensor([[4.0, 4, 14, 14], [20, 20, 60, 60]])
    >>> found = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([1, 0])}
    >>> metric.update([found], [{"boxes": boxes, "labels": torch.tensor([1, 1])}])
    >>> {name: value and round(value, 2) for name, value in metric.compute().items() if name.startswith("map")}
    {'map': 0.5, 'map_50': 0.5, 'map_75': 0.5, 'map_small': 1.0, 'map_medium': 0.0, 'map_large': None}
    """

    def __init__(
        self,
        masks: bool = False,
        small: float = COCO_SMALL,
        detections: int = 100,
        classes: Sequence[str] | None = None,
    ) -> None:
        if masks and small != COCO_SMALL:
            raise ValueError(f"small {small} is for boxes; of masks, sizes are COCO's")
        needs("faster_coco_eval", "mean average precision")
        detection = needs("torchmetrics.detection", "mean average precision")
        self.kind, self.classes = "masks" if masks else "boxes", classes
        # An IoU does not change where all is enlarged alike, and torchmetrics knows COCO's sizes only.
        self.factor = COCO_SMALL / small
        self.metric = detection.MeanAveragePrecision(
            iou_type="segm" if masks else "bbox",
            max_detection_thresholds=[1, 10, detections],
            class_metrics=classes is not None,
            backend="faster_coco_eval",
            sync_on_compute=False,
        )
        self.metric.warn_on_many_detections = False
        self.detections = detections

    def update(self, found: Sequence[Target], targets: Sequence[Target]) -> None:
        """Results of a model, with ``boxes`` or ``masks``, ``scores`` and ``labels``, and what was to be found.

        What overlaps a target with ``iscrowd`` 1 is neither right nor wrong, as COCO has it.
        """
        self.metric.update([self._entry(f, "scores") for f in found], [self._entry(t) for t in targets])

    def _entry(self, one: Target, *more: str) -> Mapping[str, Tensor]:
        shapes = one[self.kind]
        shapes = shapes.bool() if self.kind == "masks" else shapes.float() * self.factor
        keys = ("labels", *more, *(key for key in ("iscrowd",) if key in one))
        return {self.kind: shapes.cpu(), **{key: one[key].cpu() for key in keys}}

    def gather(self) -> None:
        """Take in what all processes have seen, of which each had every n-th image; they must all call it.

        In the order of one process, since that decides between detections of equal scores.
        """
        for name, parts in _states_of_all(self.metric).items():
            setattr(self.metric, name, [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)])

    def compute(self) -> dict[str, float | None]:
        """``map``, at IoU 0.5 and 0.75, by size (None where there is no such object), and ``mar``, the recall.

        With names of classes, also ``map_NAME`` for each that occurs.
        """
        result = self.metric.compute()
        names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
        found = {name: _number(result[name]) for name in names}
        found["mar"] = _number(result[f"mar_{self.detections}"])
        if self.classes is not None:
            per_class = zip(result["classes"].reshape(-1), result["map_per_class"].reshape(-1), strict=True)
            found |= {f"map_{self.classes[int(k)]}": _number(value) for k, value in per_class}
        return found


def _states_of_all(metric: Any) -> dict[str, list[Any]]:
    """A metric's sums and lists by name, of each process in turn."""
    states: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(states, dict(metric.metric_state))
    return {name: [state[name] for state in states] for name in states[0]}


def _number(value: Tensor) -> float | None:
    """torchmetrics says −1 where nothing was to be found."""
    return None if value.item() < 0 else value.item()


class SegmentationMetric:
    """Mean IoU over the classes that occur, of all pixels of a data set together; and accuracy near boundaries.

    Args:
        num_classes: K.
        ignored: the class of pixels that do not count.
        boundary: how many pixels from another class still are near a boundary; 0 to leave that out.
        classes: the classes' names; with them, the result has a value for each that occurs.

    Raises:
        ImportError: torchmetrics is needed.

    >>> metric = SegmentationMetric(3)
    >>> metric.update(torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 1, 1, 255]]]))
    >>> metric.compute()
    {'miou': 0.5, 'pixel_accuracy': 0.666..., 'boundary_accuracy': 0.666...}
    """

    def __init__(
        self, num_classes: int, ignored: int = IGNORED, boundary: int = 2, classes: Sequence[str] | None = None
    ) -> None:
        classification = needs("torchmetrics.classification", "mean IoU")
        options = {"num_classes": num_classes, "ignore_index": ignored, "validate_args": False}
        options["sync_on_compute"] = False
        self.iou = classification.MulticlassJaccardIndex(average="macro", **options)
        self.each = classification.MulticlassJaccardIndex(average="none", **options)
        self.accuracy = classification.MulticlassAccuracy(average="micro", **options)
        self.near = classification.MulticlassAccuracy(average="micro", **options)
        self.ignored, self.boundary, self.classes = ignored, boundary, classes

    def update(self, found: Tensor, targets: Tensor) -> None:
        """Classes (B, H, W), or scores (B, K, H, W), against classes (B, H, W)."""
        found = found.argmax(1) if found.ndim == 4 else found
        if found.shape != targets.shape:
            raise ValueError(f"found {tuple(found.shape)} and targets {tuple(targets.shape)} differ in size")
        found, targets = found.cpu(), targets.cpu()
        for metric in (self.iou, self.accuracy, *([self.each] if self.classes else ())):
            metric.update(found, targets)
        if self.boundary:
            near = near_boundary(targets, self.boundary, self.ignored)
            self.near.update(found, torch.where(near, targets, self.ignored))

    def gather(self) -> None:
        """Take in what all processes have seen; they must all call it."""
        for metric in (self.iou, self.each, self.accuracy, self.near):
            for name, parts in _states_of_all(metric).items():
                setattr(metric, name, sum(parts))

    def compute(self) -> dict[str, float]:
        """``miou``, ``pixel_accuracy`` and ``boundary_accuracy``; with names of classes, also ``iou_NAME``."""
        result = {"miou": self.iou.compute().item(), "pixel_accuracy": self.accuracy.compute().item()}
        if self.boundary:
            result["boundary_accuracy"] = self.near.compute().item()
        if self.classes is not None:
            counts = self.each.confmat
            occurs = (counts.sum(0) + counts.sum(1) > 0).tolist()
            per_class = zip(self.classes, self.each.compute().tolist(), occurs, strict=True)
            result |= {f"iou_{name}": value for name, value, there in per_class if there}
        return result


def near_boundary(labels: Tensor, width: int, ignored: int = IGNORED) -> Tensor:
    """Which pixels have one of another class within ``width`` rows and columns: (B, H, W), boolean.

    The trimap of Kohli et al. 2009 ("Robust Higher Order Potentials for Enforcing Label Consistency", section 5).
    Pixels that are ignored are of no class, and near no boundary.

    >>> near_boundary(torch.tensor([[[0, 0, 0, 1, 1, 1, 255]]]), 1).int().tolist()
    [[[0, 0, 1, 1, 0, 0, 0]]]
    """
    counted = labels != ignored
    side = 2 * width + 1
    high = F.max_pool2d(torch.where(counted, labels, -1).float(), side, 1, width)
    low = -F.max_pool2d(torch.where(counted, -labels, -(10**6)).float(), side, 1, width)
    return (high != low) & counted
