"""Answers to `dense_prediction.fcos_targets`."""

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("dense_prediction.fcos_targets")


def walk(
    xy, spans, boxes, *, inside=True, reach=max, better=None, none=-1, spanned=True, sides_too=False, ends_too=False
):
    """Point after point, box after box; ``better(box, best, point)`` says which of two boxes is taken."""
    better = better or (lambda box, best, point: area(box) < area(best))
    found = []
    for (x, y), (low, high) in zip(xy.tolist(), spans.tolist(), strict=True):
        best, index = None, none
        for i, box in enumerate(boxes.tolist()):
            sides = [x - box[0], y - box[1], box[2] - x, box[3] - y]
            if inside and (min(sides) < 0 or (min(sides) == 0 and not sides_too)):
                continue
            far = reach(sides) if reach is not None else longest(box)
            if spanned and not (low < far < high or (ends_too and far in (low, high))):
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


@variant("side-counts")
def on_the_line(xy, spans, boxes):
    return walk(xy, spans, boxes, sides_too=True)


@variant("span-with-its-ends")
def closed_spans(xy, spans, boxes):
    return walk(xy, spans, boxes, ends_too=True)


@variant("smallest-before-span")
def span_of_the_smallest(xy, spans, boxes):
    found = walk(xy, spans, boxes, spanned=False)
    for k, i in enumerate(found.tolist()):
        if i >= 0:
            found[k] = i if walk(xy[k : k + 1], spans[k : k + 1], boxes[i : i + 1])[0] == 0 else -1
    return found


@unknown
def least_reach(xy, spans, boxes):
    """Of the boxes that fit the one whose farthest side is nearest."""
    far = lambda box, point: max(point[0] - box[0], point[1] - box[1], box[2] - point[0], box[3] - point[1])  # noqa: E731
    return walk(xy, spans, boxes, better=lambda box, best, point: far(box, point) < far(best, point))


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
