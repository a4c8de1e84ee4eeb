"""The check of `dense_prediction.fcos_targets`, and its reference: the library's takes all that it knows of points."""

import torch
from torch import Tensor

from vitcourse.course.checks import call, check
from vitcourse.dense_prediction.fcos import Points, assign


def fcos_targets(xy: Tensor, spans: Tensor, boxes: Tensor) -> Tensor:
    """Which box each point is to predict (FCOS, section 3.2): (N,), its number, −1 for none.

    Args:
        xy: (N, 2), column and row of each point in pixels.
        spans: (N, 2), between which two numbers the farthest side of its box must lie.
        boxes: (n, 4), corners.

    >>> points, spans = torch.tensor([[4.0, 4.0], [20.0, 9.0]]), torch.tensor([[0.0, 64.0], [0.0, 64.0]])
    >>> fcos_targets(points, spans, torch.tensor([[0.0, 0.0, 16.0, 16.0]]))
    tensor([ 0, -1])
    """
    return assign(Points(xy, xy.new_ones(len(xy)), spans), boxes, radius=None)


@check(
    "dense_prediction.fcos_targets",
    reference="vitcourse.course.checks.dense_prediction.fcos_targets.fcos_targets",
    level=3,
    minutes=20,
    why="A detector learns what its targets say. Most that is wrong with one can be seen by drawing which point was "
    "given which box.",
    hints=[
        "How far is each point from the left, the top, the right and the bottom side of each box? That is (N, n, 4).",
        "The point is inside if the least of the four is positive; the largest of them decides about the span.",
        "Of the boxes that fit take the one of the least area: give all others an area of infinity. And if none fits?",
    ],
    gradients=False,
    exempt={"smaller": "a box has four numbers"},
)
def fcos_cases(rng):
    yield call(*_scene(rng, 23, 5))
    yield call(*_scene(rng, 40, 9)).on("many boxes")
    yield call(*_scene(rng, 30, 1)).on("one box")
    yield call(*_scene(rng, 12, 0)).on("an image without objects")
    xy, spans, boxes = _scene(rng, 31, 7)
    yield call(xy, spans.new_tensor([0.0, torch.inf]).expand(31, 2), boxes).on("a single map, for boxes of all sizes")
    yield call(xy, spans + 200, boxes).on("points of which none is responsible")
    inner = torch.stack([xy.new_tensor([10.0 + 2 * i, 12.0 + i, 80.0 - 3 * i, 70.0 - i]) for i in (1, 2, 0)])
    yield call(xy, spans, inner).on("boxes inside of one another")
    nested = xy.new_tensor([[25.0, 25, 36, 35], [0, 0, 90, 80]])
    spans = xy.new_tensor([40.5, torch.inf]).expand(2, 2)
    yield call(xy.new_tensor([[30.0, 30], [31, 29]]), spans, nested).on(
        "a small box in a large one, for large ones only"
    )
    yield call(*_edges()).on("points on a side, and sides as far as a span reaches")


def _scene(rng, points, boxes):
    """Points all over an image of 96 × 80 pixels, spans of three levels, and boxes."""
    xy = rng.uniform(points, 2) * torch.tensor([96.0, 80.0], dtype=torch.float64)
    spans = torch.tensor([[0.0, 20.25], [20.25, 40.5], [40.5, torch.inf]], dtype=torch.float64)
    first = rng.uniform(boxes, 2) * torch.tensor([60.0, 50.0], dtype=torch.float64)
    return (
        xy,
        spans[rng.integers(0, 3, (points,))],
        torch.cat([first, first + rng.uniform(boxes, 2, low=8, high=80)], 1),
    )


def _edges():
    """Whole numbers, so that equal is equal: two points on sides; of the others the farthest side is 30 pixels away."""
    box = torch.tensor([[10.0, 20.0, 50.0, 48.0]], dtype=torch.float64)
    xy = torch.tensor([[10.0, 30], [30, 48], [20, 30], [20, 30], [20, 30], [40, 40]], dtype=torch.float64)
    spans = torch.tensor([[0.0, 99], [0, 99], [0, 30], [30, 99], [29, 31], [30, 31]], dtype=torch.float64)
    return xy, spans, box


def _targets(xy, spans, boxes, *, inside=True, least=0.0, span=True, reach=None, cost=None, none=-1):
    """The reference in parts, each of which a mistake may replace."""
    if not len(boxes):
        return torch.full((len(xy),), none)
    sides = torch.cat([xy[:, None] - boxes[:, :2], boxes[:, 2:] - xy[:, None]], -1)
    fits = sides.amin(-1) > least if inside else torch.ones_like(sides[..., 0], dtype=torch.bool)
    far = sides.amax(-1) if reach is None else reach(sides, boxes)
    if span:
        fits = fits & (far > spans[:, :1]) & (far < spans[:, 1:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    value = (area if cost is None else cost(sides, area)).expand_as(fits).masked_fill(~fits, torch.inf)
    best, index = value.min(1)
    return torch.where(best.isfinite(), index, none)


fcos_cases.mistake(
    "largest-box",
    "where several boxes fit, the largest is taken; it would hide what lies in front of it",
    lambda xy, spans, boxes: _targets(xy, spans, boxes, cost=lambda _, area: -area),
)
fcos_cases.mistake(
    "first-box",
    "where several boxes fit, the one that comes first is taken; the order of the boxes should not matter",
    lambda xy, spans, boxes: _targets(xy, spans, boxes, cost=lambda _, area: torch.arange(len(area), dtype=area.dtype)),
)
fcos_cases.mistake(
    "nearest-centre",
    "where several boxes fit, the one whose middle is nearest is taken; it should go by their size",
    lambda xy, spans, boxes: _targets(
        xy, spans, boxes, cost=lambda sides, _: (sides[..., :2] - sides[..., 2:]).pow(2).sum(-1)
    ),
)
fcos_cases.mistake(
    "no-span",
    "every level answers for boxes of every size: spans are not looked at",
    lambda xy, spans, boxes: _targets(xy, spans, boxes, span=False),
)
fcos_cases.mistake(
    "outside",
    "points are given boxes that they do not lie in",
    lambda xy, spans, boxes: _targets(xy, spans, boxes, inside=False),
)
fcos_cases.mistake(
    "nearest-side",
    "it is the *nearest* side here that must be in the span",
    lambda xy, spans, boxes: _targets(xy, spans, boxes, reach=lambda sides, _: sides.amin(-1)),
)
fcos_cases.mistake(
    "side-of-the-box",
    "the span is compared with how long the box is; what counts is how far the *point* is from its sides",
    lambda xy, spans, boxes: _targets(
        xy, spans, boxes, reach=lambda sides, boxes: (boxes[:, 2:] - boxes[:, :2]).amax(-1).expand(sides.shape[:2])
    ),
)
fcos_cases.mistake(
    "side-counts",
    "a point on a side of a box is given it; it must lie inside",
    lambda xy, spans, boxes: _targets(xy, spans, boxes, least=-torch.finfo(xy.dtype).tiny),
)
fcos_cases.mistake(
    "span-with-its-ends",
    "a box whose farthest side is exactly as far as an end of the span is taken; two levels would answer for it",
    lambda xy, spans, boxes: _targets(xy, _wider(spans), boxes),
)
fcos_cases.mistake(
    "smallest-before-span",
    "the smallest box around a point is chosen first, and lost if the span does not allow it; another one may have fitted",
    lambda xy, spans, boxes: _smallest_first(xy, spans, boxes),
)
fcos_cases.mistake(
    "none-is-the-first",
    "a point that no box fits is given box 0; it should be told that there is none",
    lambda xy, spans, boxes: _targets(xy, spans, boxes, none=0),
)


def _wider(spans):
    """Spans that hold their ends, for comparisons that leave them out."""
    low, high = spans.unbind(1)
    return torch.stack([low.nextafter(low - 1), high.nextafter(high + 1)], 1)


def _smallest_first(xy, spans, boxes):
    around = _targets(xy, spans, boxes, span=False)
    allowed = torch.stack([_targets(xy, spans, box[None]) for box in boxes], 1) == 0 if len(boxes) else None
    return around if allowed is None else torch.where(allowed.gather(1, around.clamp(0)[:, None])[:, 0], around, -1)
