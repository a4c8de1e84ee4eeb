"""Boxes and their overlaps, and what every loss asks of the targets.

A target is a dict, one for each image, with ``boxes`` (n, 4), corners (x1, y1, x2, y2) in pixels; ``labels`` (n,),
integers from 0; and where masks are learned, ``masks`` (n, H, W), one for each object. n may be 0.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

Target = Mapping[str, Tensor]


def to_corners(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Centre, width and height as parts of the image (…, 4) to corners in pixels, ``size`` being (height, width).

    >>> to_corners(torch.tensor([[0.5, 0.5, 0.5, 0.25]]), (64, 32)).tolist()
    [[8.0, 24.0, 24.0, 40.0]]
    """
    return box_convert(boxes, "cxcywh", "xyxy") * _scale(boxes, size)


def to_centres(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Corners in pixels (…, 4) to centre, width and height as parts of the image: what DETR predicts.

    >>> to_centres(torch.tensor([[8.0, 24.0, 24.0, 40.0]]), (64, 32)).tolist()
    [[0.5, 0.5, 0.5, 0.25]]
    """
    return box_convert(boxes / _scale(boxes, size), "xyxy", "cxcywh")


def _scale(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    return boxes.new_tensor([width, height, width, height])


def giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019, algorithm 1) of each box with its partner: (…, 4) twice -> (…,).

    Without the ε that torchvision's loss adds to the areas: of boxes as parts of an image, areas are as small as that.

    >>> giou(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0])).item()  # IoU 1/3, hull 6
    0.3333333432674408
    """
    inside = (torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])).clamp(0)
    hull = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    inside, hull = inside.prod(-1), hull.prod(-1)
    union = _area(boxes) + _area(others) - inside
    return inside / union - (hull - union) / hull


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def check_targets(
    targets: Sequence[Target], num_images: int, num_classes: int, size: tuple[int, int] | None = None, *, masks: bool
) -> None:
    """What a loss needs to hold of its targets. It looks at values, so it belongs before the batch goes to a device.

    Args:
        targets: see the top of this module.
        num_images: B, of which there must be a target each.
        num_classes: labels must be less.
        size: (height, width) of the images, where it is known.
        masks: whether there must be masks.

    Raises:
        ValueError: anything else, with the image and the object that is wrong.
        TypeError: labels that are no integers.

    >>> check_targets([{"boxes": torch.tensor([[0.0, 1, 5, 1]]), "labels": torch.tensor([0])}], 1, 3, masks=False)
    Traceback (most recent call last):
    ...
    ValueError: targets[0]: box 0, [0.0, 1.0, 5.0, 1.0], has no area; leave out objects that cannot be seen
    """
    if len(targets) != num_images:
        raise ValueError(f"there are {len(targets)} targets for {num_images} images; give a dict for each image")
    for i, target in enumerate(targets):
        where = f"targets[{i}]"
        wanted = ("labels", "masks") if masks else ("labels", "boxes")
        for key in wanted:
            if key not in target:
                raise ValueError(f"{where} has no {key!r}; it has {', '.join(map(repr, target)) or 'nothing'}")
        _check_labels(target["labels"], num_classes, where)
        if masks:
            _check_masks(target["masks"], len(target["labels"]), size, where)
        else:
            _check_boxes(target["boxes"], len(target["labels"]), size, where)


def _check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    if labels.ndim != 1:
        raise ValueError(f"{where}: labels must be (n,), got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{where}: labels are {labels.dtype}; give class numbers as int64")
    bad = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(bad):
        j = bad[0].item()
        raise ValueError(
            f"{where}: object {j} has label {labels[j].item()}, and there are {num_classes} classes, from 0; build the "
            "model with num_classes of the data"
        )


def _check_boxes(boxes: Tensor, count: int, size: tuple[int, int] | None, where: str) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != count:
        raise ValueError(f"{where}: boxes must be ({count}, 4), one for each label, got {tuple(boxes.shape)}")
    bad = (~boxes.isfinite().all(1)).nonzero()
    if len(bad):
        raise ValueError(f"{where}: box {bad[0].item()}, {boxes[bad[0].item()].tolist()}, is not of finite numbers")
    bad = (boxes[:, 2:] <= boxes[:, :2]).any(1).nonzero()
    if len(bad):
        j = bad[0].item()
        raise ValueError(
            f"{where}: box {j}, {boxes[j].tolist()}, has no area; leave out objects that cannot be seen"
            + (", and give corners (x1, y1, x2, y2)" if (boxes[j, 2:] < boxes[j, :2]).any() else "")
        )
    if size is None or not count:
        return
    limit = boxes.new_tensor([size[1], size[0]])
    bad = ((boxes[:, :2] < 0) | (boxes[:, 2:] > limit)).any(1).nonzero()
    if len(bad):
        j = bad[0].item()
        raise ValueError(
            f"{where}: box {j}, {boxes[j].tolist()}, reaches out of the image of {size[0]}×{size[1]} (height × width) "
            "pixels; clip it, and leave it out where nothing remains"
        )


def _check_masks(masks: Tensor, count: int, size: tuple[int, int] | None, where: str) -> None:
    if masks.ndim != 3 or len(masks) != count:
        raise ValueError(f"{where}: masks must be ({count}, H, W), one for each label, got {tuple(masks.shape)}")
    if size is not None and tuple(masks.shape[1:]) != tuple(size):
        raise ValueError(
            f"{where}: masks are {tuple(masks.shape[1:])}, and the image is {tuple(size)}; resize both alike, masks by "
            "nearest neighbour"
        )
    empty = (masks.flatten(1) == 0).all(1).nonzero() if count else ()
    if len(empty):
        raise ValueError(f"{where}: mask {empty[0].item()} is empty; leave out objects that cannot be seen")
