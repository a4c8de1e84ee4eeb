"""Answers to `dense_prediction.match`."""

from itertools import permutations

import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("dense_prediction.match")


def corners(boxes):
    x, y, w, h = boxes.unbind(-1)
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)


def prices(p, boxes, labels, wanted, *, l1=5.0, iou=2.0, of_class=1.0, convert=corners, likely=None):
    """Entry by entry."""
    cost = p.new_zeros(len(boxes), len(labels))
    for i in range(len(boxes)):
        for j in range(len(labels)):
            overlap = generalized_box_iou(convert(boxes[i : i + 1]), convert(wanted[j : j + 1]))[0, 0]
            chance = p[i, labels[j]] if likely is None else likely(p[i], int(labels[j]))
            cost[i, j] = l1 * (boxes[i] - wanted[j]).abs().sum() - iou * overlap - of_class * chance
    return cost


def assigned(cost):
    rows, columns = linear_sum_assignment(cost.numpy())
    of = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    return torch.tensor([of[j] for j in range(cost.shape[1])], dtype=torch.int64)


@variant("greedy")
def one_after_the_other(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted)
    free, queries = set(range(len(boxes))), []
    for j in range(len(labels)):
        queries.append(min(free, key=lambda i: cost[i, j].item()))
        free.remove(queries[-1])
    return cost, torch.tensor(queries, dtype=torch.int64)


@variant("shared-query")
def cheapest_for_each(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted)
    return cost, torch.tensor([int(column.argmin()) for column in cost.T], dtype=torch.int64)


@variant("order-of-queries")
def rows_as_they_come(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted)
    return cost, torch.as_tensor(linear_sum_assignment(cost)[0])


@variant("dearest")
def maximised(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted)
    return cost, assigned(-cost)


@variant("giou-of-centres")
def forgot_to_convert(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted, convert=lambda x: x)
    return cost, assigned(cost)


@variant("giou-punished")
def wrong_sign(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted, iou=-2.0)
    return cost, assigned(cost)


@variant("background-first")
def off_by_one(probabilities, boxes, labels, wanted):
    cost = prices(probabilities.roll(-1, 1), boxes, labels, wanted)
    return cost, assigned(cost)


@variant("log-probability")
def by_logarithm(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted, likely=lambda p, k: p.log()[k])
    return cost, assigned(cost)


@variant("no-class")
def boxes_only(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted, of_class=0.0)
    return cost, assigned(cost)


@variant("mean-distance")
def averaged(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted, l1=5 / 4)
    return cost, assigned(cost)


@variant("distance-of-corners")
def corners_throughout(probabilities, boxes, labels, wanted):
    a, b = corners(boxes), corners(wanted)
    cost = 5 * (a[:, None] - b).abs().sum(-1) - 2 * generalized_box_iou(a, b) - probabilities[:, labels]
    return cost, assigned(cost)


@variant("numbers-of-objects")
def columns_for_rows(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted)
    return cost, torch.as_tensor(linear_sum_assignment(cost)[1])


@unknown
def no_overlap(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted, iou=0.0)
    return cost, assigned(cost)


@unknown
def unweighted(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted, l1=1.0, iou=1.0)
    return cost, assigned(cost)


@unknown
def euclidean(probabilities, boxes, labels, wanted):
    pairs = generalized_box_iou(corners(boxes), corners(wanted))
    cost = 5 * torch.cdist(boxes, wanted) - 2 * pairs - probabilities[:, labels]
    return cost, assigned(cost)


@unknown
def transposed(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted)
    return cost.T, assigned(cost)


@right
def entry_by_entry(probabilities, boxes, labels, wanted):
    cost = prices(probabilities, boxes, labels, wanted)
    return cost, assigned(cost)


@right
def by_trying(probabilities, boxes, labels, wanted):
    """All ways where they are few, else scipy."""
    boxes_xyxy, wanted_xyxy = (box_convert(x, in_fmt="cxcywh", out_fmt="xyxy") for x in (boxes, wanted))
    cost = -probabilities[:, labels] - 2 * generalized_box_iou(boxes_xyxy, wanted_xyxy)
    cost = cost + 5 * sum((boxes[:, None, k] - wanted[None, :, k]).abs() for k in range(4))
    n = len(labels)
    if len(boxes) ** n > 5000:
        return cost, assigned(cost)
    ways = permutations(range(len(boxes)), n)
    best = min(ways, key=lambda way: sum(cost[i, j].item() for j, i in enumerate(way)))
    return cost, torch.tensor(best, dtype=torch.int64)


@right
def objects_as_rows(probabilities, boxes, labels, wanted):
    one_hot = torch.nn.functional.one_hot(labels, probabilities.shape[1]).to(probabilities)
    cost = 5 * torch.cdist(wanted, boxes, p=1) - 2 * generalized_box_iou(corners(wanted), corners(boxes))
    cost = cost - one_hot @ probabilities.T
    _, queries = linear_sum_assignment(cost.numpy())
    return cost.T, torch.from_numpy(queries)
