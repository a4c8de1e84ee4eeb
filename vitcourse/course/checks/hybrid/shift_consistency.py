"""The check of `hybrid.shift_consistency`, and its reference, which only the lesson has use for."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcourse.course.checks import call, check


@torch.no_grad()
def shift_consistency(model: Callable[[Tensor], Tensor], images: Tensor, pixels: int) -> float:
    """The share of predictions that stay what they are when the images move; the mean over four directions.

    Args:
        model: images (B, C, H, W) to logits (B, classes).
        images: (B, C, H, W). What comes in at the border is zero.
        pixels: by how much they move up, down, left and right.

    >>> shift_consistency(lambda x: x.mean(dim=(2, 3)), torch.rand(4, 3, 8, 8).cumsum(1), 2)  # colours, not places
    1.0
    """
    still = model(images).argmax(1)
    moved = (F.pad(images, border) for border in _borders(pixels))
    return torch.stack([model(one).argmax(1) == still for one in moved]).float().mean().item()


def _borders(pixels: int) -> list[tuple[int, int, int, int]]:
    """What ``F.pad`` adds on the left, right, top and bottom to move an image down, up, right and left."""
    return [(0, 0, pixels, -pixels), (0, 0, -pixels, pixels), (pixels, -pixels, 0, 0), (-pixels, pixels, 0, 0)]


@check(
    "hybrid.shift_consistency",
    reference="vitcourse.course.checks.hybrid.shift_consistency.shift_consistency",
    level=2,
    minutes=15,
    why="Accuracy on centred pictures cannot tell whether a model minds where things are. This can, without any label.",
    hints=[
        "Compare predictions with predictions: what the model says now, and what it says when the picture has moved.",
        "F.pad(images, (left, right, top, bottom)) takes negative numbers, too: they crop. Two pixels more on the left and two fewer on the right move the "
        "picture to the right.",
        "Four directions, and the mean over all pictures and all directions, as a Python float: .item().",
    ],
    exempt={
        "larger": "the model of a case reads images of one size; the cases have two",
        "smaller": "the model of a case reads images of one size; the cases have two",
    },
)
def shift_consistency_cases(rng):
    for pixels, height, width, label in ((2, 6, 5, "two pixels"), (1, 4, 7, "one pixel")):
        images, weights = rng.normal(150, 2, height, width), rng.normal(2 * height * width, 4)
        yield call(lambda x, w=weights: x.flatten(1) @ w.to(x), images, pixels).on(label)
    images, weights = rng.uniform(90, 1, 5, 7), rng.normal(7, 3)
    yield call(lambda x, w=weights: x.mean(dim=(1, 2)) @ w.to(x), images, 3).on("a model that hardly looks at rows")


def _share(moves, judge=lambda still, moved: (moved.argmax(-1) == still.argmax(-1)).double().mean()):
    """A faulty consistency: other moves, or another comparison of logits (4, B, classes) with those of still pictures."""

    def faulty(model, images, pixels):
        return float(judge(model(images), torch.stack([model(one) for one in moves(images, pixels)])))

    return faulty


def _four(images, pixels):
    return [F.pad(images, border) for border in _borders(pixels)]


shift_consistency_cases.mistake(
    "rolled",
    "what leaves the picture on one side comes back on the other; it should be lost, and zeros come in",
    _share(lambda x, p: [x.roll(by, axis) for by in (p, -p) for axis in (2, 3)]),
)
shift_consistency_cases.mistake(
    "border-repeated",
    "the border is repeated where the picture has moved away; zeros should come in",
    _share(
        lambda x, p: [
            F.pad(x, [max(b, 0) for b in border], mode="replicate")[..., max(-border[2], 0) :, max(-border[0], 0) :][
                ..., : x.shape[2], : x.shape[3]
            ]
            for border in _borders(p)
        ]
    ),
)
shift_consistency_cases.mistake(
    "diagonal",
    "the pictures move along the diagonals: rows and columns at once",
    _share(lambda x, p: [F.pad(x, (a, -a, d, -d)) for a in (p, -p) for d in (p, -p)]),
)
shift_consistency_cases.mistake(
    "one-pixel", "the pictures move by one pixel, whatever was asked for", _share(lambda x, p: _four(x, 1))
)
shift_consistency_cases.mistake(
    "right-and-down-only",
    "the pictures only move right and down; a model may well take the other two directions differently",
    _share(lambda x, p: _four(x, p)[::2]),
)
shift_consistency_cases.mistake(
    "all-four-at-once",
    "a prediction counts only if it withstands all four moves; the mean over the moves was asked for",
    _share(_four, lambda still, moved: (moved.argmax(-1) == still.argmax(-1)).all(0).double().mean()),
)
shift_consistency_cases.mistake(
    "changed-not-kept",
    "this is the share of predictions that change",
    _share(_four, lambda still, moved: (moved.argmax(-1) != still.argmax(-1)).double().mean()),
)
shift_consistency_cases.mistake(
    "logits-compared",
    "the logits themselves are compared; they change with every move, even where the answer stays",
    _share(_four, lambda still, moved: (moved == still).double().mean()),
)
