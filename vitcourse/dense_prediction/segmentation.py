"""Every pixel one class: the loss, what it asks of its targets, and how masks become such a map and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcourse.layers import widened

from .base import DenseModel
from .boxes import Target
from .terms import Term, Terms

IGNORED = 255  # the class of pixels that nobody asks about, as in PASCAL VOC, Cityscapes and ADE20K


def check_map(labels: Tensor, num_classes: int, size: tuple[int, int] | None = None, ignored: int = IGNORED) -> None:
    """What the loss needs to hold of a map of classes (H, W), or of a batch of them. It looks at values.

    Raises:
        ValueError: another size, or a class beyond the count; both named.
        TypeError: no integers.

    >>> check_map(torch.tensor([[0, 7]]), num_classes=3)
    Traceback (most recent call last):
    ...
    ValueError: map has class 7, and there are 3 classes, from 0; pixels of no class are 255
    """
    if labels.dtype != torch.int64:
        raise TypeError(f"map is {labels.dtype}; give class numbers as int64")
    if size is not None and tuple(labels.shape[-2:]) != tuple(size):
        raise ValueError(
            f"map is {tuple(labels.shape[-2:])}, and the image is {tuple(size)}; resize both alike, maps by nearest "
            "neighbour"
        )
    bad = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignored)]
    if len(bad):
        raise ValueError(
            f"map has class {bad[0].item()}, and there are {num_classes} classes, from 0; pixels of no class "
            f"are {ignored}"
        )


@dataclass(frozen=True)
class PixelLoss:
    """Cross-entropy, a mean over the pixels that count.

    Attributes:
        ignored: the class of those that do not.
        smoothing: share of the target that is spread over all classes.
    """

    ignored: int = IGNORED
    smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Terms:
        """Term ``pixel`` of logits (B, K, H, W) and classes (B, H, W)."""
        count = (labels != self.ignored).sum()
        total = F.cross_entropy(
            widened(logits), labels, ignore_index=self.ignored, reduction="sum", label_smoothing=self.smoothing
        )
        return {"pixel": Term(total, count)}


class SemanticModel(DenseModel):
    """A model whose output is logits (B, K, H, W), at the size of the images.

    Attributes:
        criterion: the loss, which may be replaced.
    """

    wants = "map"

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.criterion = PixelLoss()

    def check_targets(self, targets: Tensor, num_images: int, size: tuple[int, int] | None = None) -> None:
        """What the loss asks of its targets, classes (B, H, W); see :func:`check_map`."""
        if targets.ndim != 3 or len(targets) != num_images:
            raise ValueError(f"targets must be ({num_images}, H, W), classes of pixels, got {tuple(targets.shape)}")
        check_map(targets, self.num_classes, size, self.criterion.ignored)

    def losses(self, output: Tensor, targets: Tensor) -> Terms:
        """The terms of the loss; targets are classes (B, H, W).

        Raises:
            ValueError: targets of another size.
        """
        if output.shape[-2:] != targets.shape[-2:]:
            raise ValueError(
                f"targets are {tuple(targets.shape[-2:])}, and the output is {tuple(output.shape[-2:])}; resize images "
                "and targets alike, targets by nearest neighbour"
            )
        return self.criterion(output, targets)

    def segment(self, output: Tensor) -> Tensor:
        """How probable each class is for each pixel, (B, K, H, W)."""
        return widened(output).softmax(1)


def to_map(target: Target, size: tuple[int, int], background: int = IGNORED) -> Tensor:
    """Objects' masks (n, H, W) and labels to a map of classes (H, W); of masks that overlap, the last is on top.

    >>> masks = torch.tensor([[[True, True, False]], [[False, True, False]]])
    >>> to_map({"masks": masks, "labels": torch.tensor([4, 2])}, (1, 3), background=0).tolist()
    [[4, 2, 0]]
    """
    labels = torch.full(size, background, device=target["labels"].device)
    for mask, label in zip(target["masks"], target["labels"], strict=True):
        labels = torch.where(mask.bool(), label, labels)
    return labels


def to_masks(labels: Tensor, ignored: int = IGNORED) -> Target:
    """A map of classes (H, W) to a target with a mask for each class that is there: what a mask loss learns from.

    >>> found = to_masks(torch.tensor([[4, 2, 255]]))
    >>> found["labels"].tolist(), found["masks"].tolist()
    ([2, 4], [[[False, True, False]], [[True, False, False]]])
    """
    present = labels.unique()
    present = present[present != ignored]
    return {"labels": present, "masks": labels == present[:, None, None]}


def evenly(depth: int, count: int) -> Sequence[int]:
    """``count`` of ``depth`` blocks, evenly apart, the last among them, counted from 0.

    >>> evenly(12, 4)
    [2, 5, 8, 11]
    """
    return [round(depth * (i + 1) / count) - 1 for i in range(count)]
