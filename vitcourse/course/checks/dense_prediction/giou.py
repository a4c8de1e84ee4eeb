"""The check of `dense_prediction.giou`."""

import torch
from torchvision.ops import box_convert

from vitcourse.course.checks import call, check, holds


@check(
    "dense_prediction.giou",
    reference="vitcourse.dense_prediction.giou",
    level=2,
    minutes=15,
    why="IoU says nothing about boxes that do not meet, and at the start of a training most do not. This does.",
    hints=[
        "The overlap is a box as well: from the larger of both starts to the smaller of both ends.",
        "Where two boxes do not meet, that box has a negative side. What should its area be?",
        "The hull goes from the smaller of both starts to the larger of both ends. How much of it is in neither box?",
    ],
    exempt={"larger": "a box has four numbers", "smaller": "a box has four numbers"},
)
def giou_cases(rng):
    yield call(boxes(rng, 7), boxes(rng, 7))
    yield call(boxes(rng, 3, 1), boxes(rng, 1, 5)).on("each box with each other one")
    apart = boxes(rng, 6)
    yield call(apart, apart + 40).on("boxes that do not meet")
    yield call(apart, apart + torch.tensor([0.0, 40.0, 0.0, 40.0])).on("boxes below one another")
    # Where two sides are equal, which of them has the gradient is a matter of taste: only the value is asked for.
    yield holds("equal boxes should have a GIoU of 1", lambda giou: _all_ones(giou(apart, apart.clone())))
    middle = (apart[:, :2] + apart[:, 2:]) / 2
    yield call(apart, torch.cat([middle, middle + 0.5], 1)).on("a box inside of the other")
    yield call(boxes(rng, 4) / 64, boxes(rng, 4) / 64).on("boxes as parts of an image")
    yield call(boxes(rng), boxes(rng)).on("a single pair")
    none = boxes(rng, 0)
    yield holds("no boxes should have no GIoU: (0,)", lambda giou: giou(none, none.clone()).shape == (0,))


def _all_ones(values):
    return values.shape == (6,) and torch.allclose(values, torch.ones_like(values))


def boxes(rng, *shape):
    first = rng.uniform(*shape, 2, low=0, high=12)
    return torch.cat([first, first + rng.uniform(*shape, 2, low=2, high=20)], -1)


def _giou(a, b, *, least=0.0, clip=False, union=None, hull=None, term=None):
    """The reference in parts, each of which a mistake may replace."""
    inside = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inside = (inside if least is None else inside.clamp(least)).prod(-1)
    inside = inside.clamp(0) if clip else inside
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    around = around.prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
    whole = sum(areas) - inside if union is None else union(areas, inside)
    around = around if hull is None else hull(areas, around)
    return inside / whole - (around - whole) / around if term is None else term(inside, whole, around)


giou_cases.mistake(
    "plain-iou",
    "this is IoU: of two boxes that do not meet it does not say how far apart they are",
    lambda boxes, others: _giou(boxes, others, term=lambda inside, union, hull: inside / union),
)
giou_cases.mistake(
    "negative-sides",
    "where boxes do not meet, two negative sides are multiplied, and they seem to overlap",
    lambda boxes, others: _giou(boxes, others, least=None),
)
giou_cases.mistake(
    "overlap-twice",
    "what both boxes cover is counted twice in their union",
    lambda boxes, others: _giou(boxes, others, union=lambda areas, inside: sum(areas)),
)
giou_cases.mistake(
    "over-the-union",
    "the empty part of the hull is compared with the union; it should be a share of the hull, and so never over 1",
    lambda boxes, others: _giou(
        boxes, others, term=lambda inside, union, hull: inside / union - (hull - union) / union
    ),
)
giou_cases.mistake(
    "rewarded",
    "emptiness is rewarded: the farther apart two boxes are, the better they seem",
    lambda boxes, others: _giou(boxes, others, term=lambda inside, union, hull: inside / union + (hull - union) / hull),
)
giou_cases.mistake(
    "empty-part-without-iou",
    "the overlap itself is missing: this is only how empty the hull is",
    lambda boxes, others: _giou(boxes, others, term=lambda inside, union, hull: -(hull - union) / hull),
)
giou_cases.mistake(
    "larger-box-for-hull",
    "the larger of the two boxes is taken for their hull; the hull encloses both",
    lambda boxes, others: _giou(
        boxes, others, hull=lambda areas, around: torch.maximum(*torch.broadcast_tensors(*areas))
    ),
)
giou_cases.mistake(
    "cxcywh",
    "the four numbers are taken for centre, width and height; here they are two corners",
    lambda boxes, others: _giou(*(box_convert(x, "cxcywh", "xyxy") for x in (boxes, others))),
)
giou_cases.mistake(
    "xywh",
    "the last two numbers are taken for width and height; here they are the other corner",
    lambda boxes, others: _giou(*(box_convert(x, "xywh", "xyxy") for x in (boxes, others))),
)
giou_cases.mistake(
    "clipped-too-late",
    "two negative sides have a positive product: clipping the area leaves boxes that meet along neither axis an overlap",
    lambda boxes, others: _giou(boxes, others, least=None, clip=True),
)
giou_cases.mistake(
    "empty-but-for-the-overlap",
    "what lies in one box only counts as empty; the empty part of the hull is in neither",
    lambda boxes, others: _giou(
        boxes, others, term=lambda inside, union, hull: inside / union - (hull - inside) / hull
    ),
)
