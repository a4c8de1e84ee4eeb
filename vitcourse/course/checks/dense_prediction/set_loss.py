"""The check of `dense_prediction.set_loss`, and its reference: the library's gives sums and counts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from vitcourse.course.checks import call, check
from vitcourse.dense_prediction import giou


def set_loss(
    logits: Tensor,
    boxes: Tensor,
    queries: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    no_object: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of class, L1 and GIoU of a batch, each divided by its objects (DETR, section 3.1).

    Args:
        logits: (B, Q, K + 1), the last class being "no object".
        boxes: (B, Q, 4), centre, width and height as parts of the image.
        queries: of each image (n_i,), the query of each object.
        targets: of each image ``labels`` (n_i,) and ``boxes`` (n_i, 4), as ``boxes``.
        no_object: weight of the queries without an object.

    Raises:
        ValueError: a query has two objects; a label beyond the classes; other lengths.

    >>> empty = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    >>> set_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), [torch.zeros(0, dtype=torch.int64)], [empty])[1].item()
    0.0
    """
    wanted = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)
    found = []
    for i, (query, target) in enumerate(zip(queries, targets, strict=True)):
        if len(set(query.tolist())) != len(target["labels"]):
            raise ValueError(f"queries[{i}] {query.tolist()} are not one for each of {len(target['labels'])} objects")
        if (target["labels"] >= logits.shape[2] - 1).any():
            raise ValueError(
                f"targets[{i}] has labels {target['labels'].tolist()}; there are {logits.shape[2] - 1} classes"
            )
        wanted[i, query] = target["labels"]
        found.append(boxes[i, query])
    if len(found) != len(logits):
        raise ValueError(f"{len(found)} targets for {len(logits)} images")
    weights = torch.where(wanted == logits.shape[2] - 1, no_object, 1.0)
    error = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    found, true = torch.cat(found), torch.cat([target["boxes"] for target in targets])
    overlap = giou(box_convert(found, "cxcywh", "xyxy"), box_convert(true, "cxcywh", "xyxy"))
    count = max(len(true), 1)
    terms = (error * weights.flatten().to(error)).sum(), (found - true).abs().sum(), (1 - overlap).sum()
    return tuple(term / count for term in terms)


@check(
    "dense_prediction.set_loss",
    reference="vitcourse.course.checks.dense_prediction.set_loss.set_loss",
    level=4,
    minutes=30,
    why="Its three divisors and one weight decide whether DETR finds anything, and each has been got wrong in public.",
    hints=[
        "Write down for each query which class it should say: 'no object' everywhere, then the labels where there is a "
        "match.",
        "Cross-entropy with reduction='none' and a weight for each query: 1 with an object, `no_object` without.",
        "All three sums are divided by the same number: the objects of the whole batch. What if there are none?",
    ],
    gradients=("logits", "boxes"),
    exempt={
        "batch": "targets are a list, of which there is one for each image",
        "smaller": "with fewer classes or queries, targets would speak of some that do not exist",
    },
)
def set_loss_cases(rng):
    yield call(*_batch(rng, 8, 5, (3, 1, 4)))
    yield call(*_batch(rng, 5, 3, (2, 0))).on("an image without objects among the others")
    yield call(*_batch(rng, 7, 4, (0, 0, 0))).on("a batch without any object")
    yield call(*_batch(rng, 6, 2, (1,))).on("a batch of one image")
    yield call(*_batch(rng, 4, 3, (4, 2))).on("as many objects as queries")
    yield call(*_batch(rng, 9, 6, (2, 5)), no_object=0.4).on("another weight of 'no object'")


def _boxes(rng, *shape):
    return torch.cat([rng.uniform(*shape, 2, low=0.2, high=0.8), rng.uniform(*shape, 2, low=0.05, high=0.5)], -1)


def _batch(rng, queries, classes, counts):
    order = [rng.uniform(queries).argsort()[:n] for n in counts]
    targets = [{"labels": rng.integers(0, classes, (n,)), "boxes": _boxes(rng, n)} for n in counts]
    return rng.normal(len(counts), queries, classes + 1), _boxes(rng, len(counts), queries), order, targets


def _terms(
    logits,
    boxes,
    queries,
    targets,
    no_object=0.1,
    *,
    empty=-1,
    shift=0,
    divide=None,
    class_count=None,
    corners=True,
    per_box=1,
    distance_of_corners=False,
    overlap=False,
    exchanged=False,
):
    """The reference in parts, each of which a mistake may replace."""
    wanted = torch.full(logits.shape[:2], empty % logits.shape[2])
    matched = torch.zeros(logits.shape[:2], dtype=torch.bool)
    for i, (query, target) in enumerate(zip(queries, targets, strict=True)):
        wanted[i, query] = target["labels"] + shift
        matched[i, query] = True
    weights = torch.where(matched ^ exchanged, 1.0, no_object).to(logits)
    error = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none") * weights.flatten()
    found = torch.cat([box[query] for box, query in zip(boxes, queries, strict=True)])
    true = torch.cat([target["boxes"] for target in targets])
    pair = [box_convert(x, "cxcywh", "xyxy") if corners else x for x in (found, true)]
    count = max(len(true), 1) if divide is None else divide(logits, targets)
    a, b = pair if distance_of_corners else (found, true)
    return (
        error.sum() / (count if class_count is None else class_count(weights)),
        (a - b).abs().sum() / count / per_box,
        (giou(*pair) if overlap else 1 - giou(*pair)).sum() / count,
    )


set_loss_cases.mistake(
    "background-first",
    '"no object" is taken for class 0 and the labels for 1, 2, …; here classes count from 0, and "no object" is the last',
    lambda *args, **kw: _terms(*args, **kw, empty=0, shift=1),
)
set_loss_cases.mistake(
    "no-object-is-class-0",
    "queries without an object learn to say class 0, which is a class like any other",
    lambda *args, **kw: _terms(*args, **kw, empty=0),
)


@set_loss_cases.mistake(
    "no-object-in-full",
    "queries without an object weigh as much as those with one; as there are many more of them, they drown the rest",
)
def _(logits, boxes, queries, targets, no_object=0.1):
    return _terms(logits, boxes, queries, targets, 1.0)


set_loss_cases.mistake(
    "by-images",
    "the sums are divided by the images; then one crowded image outweighs many others",
    lambda *args, **kw: _terms(*args, **kw, divide=lambda logits, targets: len(logits)),
)
set_loss_cases.mistake(
    "by-queries",
    "the sums are divided by all queries; with more of them everything that matters would count less",
    lambda *args, **kw: _terms(*args, **kw, divide=lambda logits, targets: logits.shape[0] * logits.shape[1]),
)


@set_loss_cases.mistake(
    "mean-of-images",
    "each image is divided by its own objects, and the images are averaged: a lone object counts as much as a crowd",
)
def _(logits, boxes, queries, targets, no_object=0.1):
    each = [
        _terms(logits[i : i + 1], boxes[i : i + 1], [queries[i]], [targets[i]], no_object) for i in range(len(logits))
    ]
    return tuple(torch.stack(term).mean() for term in zip(*each, strict=True))


set_loss_cases.mistake(
    "by-weights",
    "the class term is divided by the weights of all queries (so does the authors' code); here it is divided by objects, "
    "as the others are",
    lambda *args, **kw: _terms(*args, **kw, class_count=lambda weights: weights.sum()),
)
set_loss_cases.mistake(
    "giou-of-centres",
    "centre, width and height are taken for two corners when the overlap is computed",
    lambda *args, **kw: _terms(*args, **kw, corners=False),
)
set_loss_cases.mistake(
    "mean-of-four",
    "the four differences of a box are averaged; they should be added",
    lambda *args, **kw: _terms(*args, **kw, per_box=4),
)


@set_loss_cases.mistake(
    "matched-only", "only matched queries learn a class; the others are never told that there is nothing"
)
def _(logits, boxes, queries, targets, no_object=0.1):
    return _terms(logits, boxes, queries, targets, 0.0)


set_loss_cases.mistake(
    "distance-of-corners",
    "L1 is taken between corners; there a wrong width counts otherwise than in centre, width and height",
    lambda *args, **kw: _terms(*args, **kw, distance_of_corners=True),
)
set_loss_cases.mistake(
    "overlap-for-loss",
    "the third term grows with the overlap: who lowers it drives boxes apart",
    lambda *args, **kw: _terms(*args, **kw, overlap=True),
)
set_loss_cases.mistake(
    "weights-exchanged",
    "it is the queries with an object that are made to weigh little here",
    lambda *args, **kw: _terms(*args, **kw, exchanged=True),
)
