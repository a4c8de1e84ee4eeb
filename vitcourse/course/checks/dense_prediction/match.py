"""The check of `dense_prediction.match`, and its reference: the library's does a batch at once."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from vitcourse.course.checks import call, check


def match(probabilities: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The cost of each query for each object, (Q, n), and the query of each object, (n,) (DETR, section 3.1).

    Args:
        probabilities: (Q, K + 1), the last one that of "no object".
        boxes: (Q, 4), centre, width and height as parts of the image.
        labels: (n,), n at most Q.
        wanted: (n, 4), as ``boxes``.

    Raises:
        ValueError: more objects than queries.

    >>> boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.7, 0.6, 0.2, 0.4]])
    >>> match(torch.full((2, 3), 1 / 3), boxes, torch.tensor([0]), boxes[1:])[1]
    tensor([1])
    """
    if len(labels) > len(boxes):
        raise ValueError(f"{len(labels)} objects are more than {len(boxes)} queries")
    corners = (box_convert(x, "cxcywh", "xyxy") for x in (boxes, wanted))
    cost = 5 * torch.cdist(boxes, wanted, p=1) - 2 * generalized_box_iou(*corners) - probabilities[:, labels]
    _, queries = linear_sum_assignment(cost.T.detach().cpu().numpy())
    return cost, torch.as_tensor(queries, device=cost.device)


@check(
    "dense_prediction.match",
    reference="vitcourse.course.checks.dense_prediction.match.match",
    level=3,
    minutes=25,
    why="It is what makes DETR free of anchors and of NMS, and where its slow start comes from.",
    hints=[
        "A row for each query, a column for each object: boxes[:, None] against wanted[None].",
        "GIoU is of corners, and these boxes are not. How probable does each query find the class of each object?",
        "linear_sum_assignment gives rows, sorted, and their columns. You want a query for each object, in their order.",
    ],
    gradients=False,
)
def match_cases(rng):
    yield call(*_scene(rng, 9, 5, 6))
    yield call(*_scene(rng, 20, 3, 8)).on("many queries")
    yield call(*_scene(rng, 5, 4, 5)).on("as many objects as queries")
    yield call(*_scene(rng, 7, 2, 1)).on("one object")
    yield call(*_scene(rng, 6, 3, 0)).on("an image without objects")
    yield call(*_scene(rng, 1, 3, 1)).on("a single query")
    yield call(*_crowd(rng)).on("two objects that want the same query")


def _boxes(rng, n):
    """Boxes that would have an area even if their four numbers were two corners: that is a mistake to be named."""
    return torch.cat([rng.uniform(n, 2, low=0.25, high=0.45), rng.uniform(n, 2, low=0.46, high=0.55)], 1)


def _scene(rng, queries, classes, objects):
    return (
        (2 * rng.normal(queries, classes + 1)).softmax(-1),
        _boxes(rng, queries),
        rng.integers(0, classes, (objects,)),
        _boxes(rng, objects),
    )


def _crowd(rng):
    probabilities, boxes, labels, _ = _scene(rng, 8, 3, 2)
    wanted = boxes[3] + 0.001 * rng.normal(2, 4)
    return probabilities, boxes, labels, wanted


def _match(probabilities, boxes, labels, wanted, *, classes=None, distance=None, overlap=None, solve=None):
    """The reference in parts, each of which a mistake may replace."""
    corners = [box_convert(x, "cxcywh", "xyxy") for x in (boxes, wanted)]
    close = torch.cdist(boxes, wanted, p=1) if distance is None else distance(boxes, wanted)
    gain = generalized_box_iou(*corners) if overlap is None else overlap(boxes, wanted)
    likely = probabilities[:, labels] if classes is None else classes(probabilities, labels)
    cost = 5 * close - 2 * gain - likely
    return cost, (_hungarian if solve is None else solve)(cost)


def _hungarian(cost):
    return torch.as_tensor(linear_sum_assignment(cost.T.numpy())[1])


def _greedy(cost):
    left, queries = cost.clone(), []
    for j in range(cost.shape[1]):
        queries.append(int(left[:, j].argmin()))
        left[queries[-1]] = torch.inf
    return torch.tensor(queries, dtype=torch.int64)


def _nothing_at_all(cost):
    return cost.argmin(0) if cost.shape[1] else torch.zeros(0, dtype=torch.int64)


match_cases.mistake(
    "greedy",
    "objects take their best query one after the other; the first may take what the second needs more. It is the *sum* "
    "of costs that should be least",
    lambda *args: _match(*args, solve=_greedy),
)
match_cases.mistake(
    "shared-query",
    "two objects may get the same query; each query answers for one object at most",
    lambda *args: _match(*args, solve=_nothing_at_all),
)
match_cases.mistake(
    "order-of-queries",
    "these are the right queries, in their own order and not in that of the objects they belong to",
    lambda *args: _match(*args, solve=lambda cost: _hungarian(cost).sort().values),
)
match_cases.mistake(
    "dearest",
    "the pairs have the *largest* sum of costs; something has the wrong sign",
    lambda *args: _match(*args, solve=lambda cost: _hungarian(-cost)),
)
match_cases.mistake(
    "giou-of-centres",
    "centre, width and height are taken for two corners when the overlap is computed",
    lambda *args: _match(*args, overlap=generalized_box_iou),
)
match_cases.mistake(
    "giou-punished",
    "an overlap makes a pair dearer; it should make it cheaper",
    lambda *args: _match(
        *args, overlap=lambda *b: -generalized_box_iou(*(box_convert(x, "cxcywh", "xyxy") for x in b))
    ),
)
match_cases.mistake(
    "background-first",
    'the classes are off by one, as if the first one were "no object"; it is the last',
    lambda *args: _match(*args, classes=lambda p, labels: p[:, labels + 1]),
)
match_cases.mistake(
    "log-probability",
    "the class counts by its logarithm, which can outweigh everything else; DETR takes the probability itself",
    lambda *args: _match(*args, classes=lambda p, labels: p[:, labels].log()),
)
match_cases.mistake(
    "no-class",
    "the class plays no part: a query that is sure of something else can take the object",
    lambda *args: _match(*args, classes=lambda p, labels: 0),
)
match_cases.mistake(
    "mean-distance",
    "the four differences are averaged, so that L1 weighs a quarter of what it should",
    lambda *args: _match(*args, distance=lambda a, b: torch.cdist(a, b, p=1) / 4),
)
match_cases.mistake(
    "distance-of-corners",
    "L1 is taken between corners; there a wrong width counts otherwise than in centre, width and height",
    lambda *args: _match(*args, distance=lambda *b: torch.cdist(*(box_convert(x, "cxcywh", "xyxy") for x in b), p=1)),
)
match_cases.mistake(
    "numbers-of-objects",
    "these are the numbers of objects, one for each query that has one; what is asked for are queries",
    lambda *args: _match(*args, solve=lambda cost: _hungarian(cost).argsort()),
)
