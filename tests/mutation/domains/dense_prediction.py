"""Lesson 07: maps that halve, points and boxes, steps up, masks of queries, and sets of objects."""

import torch
from torch import Tensor

from vitcourse.course.cases import Case, build, call

from ..domain import Draws, domain


@domain("dense_prediction.top_down")
def top_down(rng: Draws) -> Case:
    batch, channels, size = rng.size(1, 3), rng.size(1, 5), (rng.size(1, 19), rng.size(1, 19))
    maps = []
    for _ in range(rng.size(1, 5)):
        maps.append(rng.floats(batch, channels, *size))
        size = tuple((n + 1) // 2 for n in size)
    return call(maps)


@domain("dense_prediction.fcos_targets")
def fcos_targets(rng: Draws) -> Case:
    points, count = rng.size(1, 40), rng.size(0, 6)
    xy = rng.positive(points, 2, high=64.0)
    edges = torch.tensor([0.0, rng.number(5, 15), rng.number(15, 30), torch.inf], dtype=rng.dtype)
    level = torch.tensor([rng.size(0, 2) for _ in range(points)])
    boxes = corners(rng, count, side=64.0)
    if rng.choice([False, True]):  # whole pixels, so that points lie on sides and distances at the ends of spans
        xy, edges, boxes = xy.round(), edges.round(), torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], 1)
    return call(xy, torch.stack([edges[level], edges[level + 1]], 1), boxes)


def corners(rng: Draws, *shape: int, side: float) -> Tensor:
    """Boxes with an area, two corners each, on an image of this side."""
    first = rng.positive(*shape, 2, high=0.7 * side)
    return torch.cat([first, first + rng.positive(*shape, 2, low=0.03 * side, high=0.6 * side)], -1)


@domain("dense_prediction.giou")
def giou(rng: Draws) -> Case:
    side = rng.choice([1.0, 64.0, 800.0])
    first, second = rng.choice([((5,), (5,)), ((4, 1), (1, 3)), ((2, 3), (3,)), ((), ())])
    boxes, others = corners(rng, *first, side=side), corners(rng, *second, side=side)
    return call(boxes, others + side * rng.choice([0.0, 0.2, 1.5]))


@domain("dense_prediction.UpBlock")
def up_block(rng: Draws) -> list[Case]:
    inside, channels, beside = rng.size(1, 6), rng.size(2, 8), rng.size(0, 5)
    module = build(inside, channels, beside)
    calls = []
    for _ in range(rng.size(1, 2)):
        batch, h, w = rng.size(1, 3), rng.size(2, 6), rng.size(2, 6)
        fine = (2 * h - rng.size(0, 1), 2 * w - rng.size(0, 1))
        calls.append(module.call(rng.floats(batch, inside, h, w), rng.floats(batch, beside or 3, *fine)))
    return calls


@domain("dense_prediction.query_mask")
def query_mask(rng: Draws) -> Case:
    grid, factor = (rng.size(1, 5), rng.size(1, 5)), rng.choice([1, 2, 4])
    shape = (rng.size(1, 3), rng.size(1, 5), *(factor * n for n in grid))
    masks = rng.floats(*shape)
    if rng.choice([False, True]):
        masks = masks.relu()  # patches of exactly 0
    return call(masks, grid, rng.size(0, 5))


def centres(rng: Draws, *shape: int) -> Tensor:
    """Centre, width and height as parts of an image."""
    return torch.cat([rng.positive(*shape, 2, low=0.1, high=0.9), rng.positive(*shape, 2, low=0.05, high=0.5)], -1)


def labels_of(rng: Draws, count: int, classes: int) -> Tensor:
    return torch.tensor([rng.size(0, classes - 1) for _ in range(count)], dtype=torch.int64)


@domain("dense_prediction.match")
def match(rng: Draws) -> Case:
    queries, classes = rng.size(1, 9), rng.size(1, 5)
    count = rng.size(0, queries)
    probabilities = (2 * rng.floats(queries, classes + 1)).softmax(-1)
    return call(probabilities, centres(rng, queries), labels_of(rng, count, classes), centres(rng, count))


@domain("dense_prediction.set_loss")
def set_loss(rng: Draws) -> Case:
    batch, queries, classes = rng.size(1, 4), rng.size(1, 8), rng.size(1, 5)
    counts = [rng.size(0, queries) if rng.sometimes(0.8) else 0 for _ in range(batch)]
    chosen = [rng.uniform(queries).argsort()[:count] for count in counts]
    targets = [{"labels": labels_of(rng, n, classes), "boxes": centres(rng, n)} for n in counts]
    more = {} if rng.sometimes(0.5) else {"no_object": rng.choice([0.1, 0.25, 1.0])}
    return call(rng.floats(batch, queries, classes + 1), centres(rng, batch, queries), chosen, targets, **more)


@domain("dense_prediction.denoising_mask")
def denoising_mask(rng: Draws) -> Case:
    groups, places = rng.size(1, 5), rng.size(1, 4)
    counts = torch.tensor([rng.size(0, places) for _ in range(rng.size(1, 3))])
    real = (torch.arange(places) < counts[:, None])[:, None].expand(-1, groups, -1).clone()
    return call(real, rng.size(1, 6))
