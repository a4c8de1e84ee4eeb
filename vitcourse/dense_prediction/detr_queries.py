"""Where DETR's queries come from: learnt, learnt boxes, proposals of the encoder; and denoising groups beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import Target
from .detr_layers import sine_code

QUERIES = ("embedded", "anchors", "proposals")


class Queries(NamedTuple):
    """What the decoder starts from.

    Attributes:
        content: (B, N, D).
        position: (B, N, D); None where it follows from the boxes.
        boxes: (B, N, 4), logits of centre, width and height, which the predicted boxes are added to.
    """

    content: Tensor
    position: Tensor | None
    boxes: Tensor


class BoxPosition(nn.Module):
    """Positions of queries from their boxes: sines, then two linear layers (Liu et al. 2022, DAB-DETR, eq. 3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, boxes: Tensor) -> Tensor:
        """Centre, width and height as parts of the image (B, N, 4) -> (B, N, D)."""
        return self.mlp(sine_code(boxes, 2 * self.dim).to(boxes.dtype))


def token_boxes(valid: Tensor, side: float) -> Tensor:
    """For each pixel of a map a square box in its place, in logits: (B, h, w) -> (B, h · w, 4).

    As in Deformable DETR (Zhu et al. 2021, appendix A.4), where ``side``, a part of the image, is 0.05. Padding gets
    boxes, too; they are never chosen.
    """
    rows, columns = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
    y = (rows - 0.5) / rows[:, -1:].clamp(min=1)
    x = (columns - 0.5) / columns[:, :, -1:].clamp(min=1)
    sides = torch.full_like(x, side)
    return torch.stack([x, y, sides, sides], dim=-1).flatten(1, 2).clamp(1e-3, 1 - 1e-3).logit()


@dataclass(frozen=True)
class Denoising:
    """Groups of disturbed objects beside the queries (Li et al. 2022, DN-DETR, section 4.3), for training alone.

    Attributes:
        groups: how many times each object is disturbed anew.
        label_noise: share of labels that are exchanged for another at random.
        box_noise: a centre moves by up to this part of half a side, a side changes by up to this part of itself.
    """

    groups: int = 5
    label_noise: float = 0.2
    box_noise: float = 0.4


class Disturbed(NamedTuple):
    """Disturbed objects, and what they were.

    Attributes:
        labels: (B, G · n), after the noise; n is the largest number of objects of an image.
        boxes: (B, G · n, 4), after the noise, centre, width and height as parts of the image.
        image, query, object: (M,), which of them are real and not filled up, and of which object, as in ``Match``.
        groups: G.
    """

    labels: Tensor
    boxes: Tensor
    image: Tensor
    query: Tensor
    object: Tensor
    groups: int


def disturb(targets: Sequence[Target], num_classes: int, options: Denoising) -> Disturbed:
    """Every object of every image, ``options.groups`` times. Boxes are parts of the image."""
    counts = [len(target["labels"]) for target in targets]
    # A place at least, though nothing be in it: parameters that some processes leave out would make the others wait.
    most, device = max(1, *counts), targets[0]["labels"].device
    labels = torch.zeros(len(targets), options.groups, most, dtype=torch.int64, device=device)
    boxes = torch.full((*labels.shape, 4), 0.5, device=device)
    real = torch.zeros_like(labels, dtype=torch.bool)
    numbers, before = torch.zeros_like(labels), 0
    for i, (target, count) in enumerate(zip(targets, counts, strict=True)):
        labels[i, :, :count], boxes[i, :, :count] = target["labels"], target["boxes"].to(boxes)
        real[i, :, :count] = True
        numbers[i, :, :count] = torch.arange(before, before + count, device=device)
        before += count
    exchanged = torch.rand(labels.shape, device=device) < options.label_noise
    labels = torch.where(exchanged, torch.randint_like(labels, num_classes), labels)
    noise = options.box_noise * (2 * torch.rand(boxes.shape, device=device) - 1)
    sides = boxes[..., 2:]
    boxes = torch.cat([boxes[..., :2] + noise[..., :2] * sides / 2, sides * (1 + noise[..., 2:])], dim=-1)
    real, numbers = real.flatten(1), numbers.flatten(1)
    image, query = real.nonzero(as_tuple=True)
    return Disturbed(
        labels.flatten(1),
        boxes.flatten(1, 2).clamp(1e-3, 1 - 1e-3),
        image,
        query,
        numbers[image, query],
        options.groups,
    )


def denoising_mask(disturbed: Disturbed, num_queries: int) -> Tensor:
    """Who may attend to whom, (B, 1, N, N), the disturbed objects first (DN-DETR, eq. 9 and figure 6).

    A query must not see a disturbed object, from which it would read off the answer, and a group must not see another.
    Groups may see queries. What fills up an image with fewer objects is seen by nobody.
    """
    batch, length = disturbed.labels.shape
    device = disturbed.labels.device
    group = torch.arange(length, device=device) // (length // disturbed.groups)
    group = F.pad(group, (0, num_queries), value=-1)  # queries: −1
    mask = (group[:, None] == group) | (group == -1)
    real = torch.zeros(batch, length, dtype=torch.bool, device=device)
    real[disturbed.image, disturbed.query] = True
    return mask & F.pad(real, (0, num_queries), value=True)[:, None, None]
