"""Answers to `dense_prediction.fcos_targets`."""

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("dense_prediction.fcos_targets")


def walk(xy, spans, boxes, *, inside=True, reach=max, better=None, none=-1, spanned=True):
    """Point after point, box after box; ``better(box, best, point)`` says which of two boxes is taken."""
    better = better or (lambda box, best, point: area(box) < area(best))
    found = []
    for (x, y), (low, high) in zip(xy.tolist(), spans.tolist(), strict=True):
        best, index = None, none
        for i, box in enumerate(boxes.tolist()):
            sides = [x - box[0], y - box[1], box[2] - x, box[3] - y]
            if inside and min(sides) <= 0:
                continue
            if spanned and not low < (reach(sides) if reach is not None else longest(box)) < high:
                continue
            if best is None or better(box, best, (x, y)):
                best, index = box, i
        found.append(index)
    return torch.tensor(found, dtype=torch.int64)


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def longest(box):
    return max(box[2] - box[0], box[3] - box[1])


def off(box, point):
    return sum((box[k] + box[k + 2] - 2 * point[k]) ** 2 for k in (0, 1))


@variant("largest-box")
def prefers_the_large(xy, spans, boxes):
    return walk(xy, spans, boxes, better=lambda box, best, _: area(box) > area(best))


@variant("first-box")
def takes_the_first(xy, spans, boxes):
    return walk(xy, spans, boxes, better=lambda *_: False)


@variant("nearest-centre")
def by_distance(xy, spans, boxes):
    return walk(xy, spans, boxes, better=lambda box, best, point: off(box, point) < off(best, point))


@variant("no-span")
def every_level(xy, spans, boxes):
    return walk(xy, spans, boxes, spanned=False)


@variant("outside")
def anywhere(xy, spans, boxes):
    return walk(xy, spans, boxes, inside=False)


@variant("nearest-side")
def least_distance(xy, spans, boxes):
    return walk(xy, spans, boxes, reach=min)


@variant("side-of-the-box")
def by_length(xy, spans, boxes):
    return walk(xy, spans, boxes, reach=None)


@variant("none-is-the-first")
def zero_for_none(xy, spans, boxes):
    return walk(xy, spans, boxes, none=0)


@unknown
def last_box(xy, spans, boxes):
    return walk(xy, spans, boxes, better=lambda *_: True)


@unknown
def by_the_middle(xy, spans, boxes):
    return walk(xy, spans, boxes, reach=lambda sides: sum(sides) / 4)


@unknown
def counts_from_one(xy, spans, boxes):
    return walk(xy, spans, boxes) + 1


@unknown
def xywh(xy, spans, boxes):
    return walk(xy, spans, torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))


@right
def in_loops(xy, spans, boxes):
    return walk(xy, spans, boxes)


@right
def smallest_last(xy, spans, boxes):
    """The largest box first; the smaller ones overwrite it."""
    out = torch.full((xy.shape[0],), -1, dtype=torch.int64)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in areas.argsort(descending=True):
        x1, y1, x2, y2 = boxes[i]
        x, y = xy.unbind(1)
        sides = torch.stack([x - x1, y - y1, x2 - x, y2 - y])
        far = sides.max(0).values
        out[(sides > 0).all(0) & (spans[:, 0] < far) & (far < spans[:, 1])] = i
    return out


@right
def by_sorting(xy, spans, boxes):
    order = ((boxes[:, 2:] - boxes[:, :2]).prod(1)).argsort()
    ordered = torch.cat([boxes[order], boxes.new_tensor([[-torch.inf] * 2 + [torch.inf] * 2])])
    sides = torch.cat([xy[:, None] - ordered[:, :2], ordered[:, 2:] - xy[:, None]], -1)
    far = sides.amax(-1)
    fits = (sides.amin(-1) > 0) & (far > spans[:, :1]) & (far < spans[:, 1:])
    fits[:, -1] = True  # the box that is everywhere stands for none
    return torch.cat([order, order.new_tensor([-1])])[fits.int().argmax(1)]
