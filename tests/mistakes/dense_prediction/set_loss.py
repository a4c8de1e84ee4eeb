"""Answers to `dense_prediction.set_loss`."""

import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss

from mistakes import collect
from vitcourse.dense_prediction import giou

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("dense_prediction.set_loss")


def corners(boxes):
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def sums(logits, boxes, queries, targets, no_object=0.1, *, empty=None, first=0, convert=corners):
    """The three sums, query after query, and the number of objects."""
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    empty = logits.shape[-1] - 1 if empty is None else empty
    error, l1, overlap, count = 0 * logits.sum(), 0 * boxes.sum(), 0 * boxes.sum(), 0
    for i, (query, target) in enumerate(zip(queries, targets, strict=True)):
        owner = {int(q): j for j, q in enumerate(query)}
        for q in range(logits.shape[1]):
            if q not in owner:
                error = error - no_object * log_p[i, q, empty]
                continue
            j = owner[q]
            error = error - log_p[i, q, int(target["labels"][j]) + first]
            l1 = l1 + (boxes[i, q] - target["boxes"][j]).abs().sum()
            overlap = overlap + 1 - giou(convert(boxes[i, q]), convert(target["boxes"][j]))
        count += len(query)
    return error, l1, overlap, count


def divided(parts, by):
    return tuple(part / by for part in parts[:3])


@variant("background-first")
def background_is_zero(logits, boxes, queries, targets, no_object=0.1):
    parts = sums(logits, boxes, queries, targets, no_object, empty=0, first=1)
    return divided(parts, max(1, parts[3]))


@variant("no-object-is-class-0")
def zeros_for_nothing(logits, boxes, queries, targets, no_object=0.1):
    parts = sums(logits, boxes, queries, targets, no_object, empty=0)
    return divided(parts, max(1, parts[3]))


@variant("no-object-in-full")
def forgot_the_weight(logits, boxes, queries, targets, no_object=0.1):
    parts = sums(logits, boxes, queries, targets, 1)
    return divided(parts, max(1, parts[3]))


@variant("by-images")
def mean_over_the_batch(logits, boxes, queries, targets, no_object=0.1):
    return divided(sums(logits, boxes, queries, targets, no_object), len(targets))


@variant("by-queries")
def mean_over_queries(logits, boxes, queries, targets, no_object=0.1):
    return divided(sums(logits, boxes, queries, targets, no_object), logits[..., 0].numel())


@variant("mean-of-images")
def image_by_image(logits, boxes, queries, targets, no_object=0.1):
    total = [0, 0, 0]
    for i in range(len(targets)):
        parts = sums(logits[i][None], boxes[i][None], queries[i : i + 1], targets[i : i + 1], no_object)
        for k, value in enumerate(divided(parts, max(1, parts[3]))):
            total[k] = total[k] + value / len(targets)
    return total


@variant("by-weights")
def pytorchs_mean(logits, boxes, queries, targets, no_object=0.1):
    classes = torch.full(logits.shape[:2], logits.shape[2] - 1)
    for i, query in enumerate(queries):
        classes[i, query] = targets[i]["labels"]
    weight = logits.new_ones(logits.shape[2])
    weight[-1] = no_object
    parts = sums(logits, boxes, queries, targets, no_object)
    error = F.cross_entropy(logits.transpose(1, 2), classes, weight)
    return (error, *divided(parts, max(1, parts[3]))[1:])


@variant("giou-of-centres")
def forgot_to_convert(logits, boxes, queries, targets, no_object=0.1):
    parts = sums(logits, boxes, queries, targets, no_object, convert=lambda x: x)
    return divided(parts, max(1, parts[3]))


@variant("mean-of-four")
def l1_loss(logits, boxes, queries, targets, no_object=0.1):
    error, l1, overlap, count = sums(logits, boxes, queries, targets, no_object)
    return divided((error, l1 / 4, overlap), max(1, count))


@variant("matched-only")
def nothing_for_nothing(logits, boxes, queries, targets, no_object=0.1):
    parts = sums(logits, boxes, queries, targets, 0)
    return divided(parts, max(1, parts[3]))


@variant("distance-of-corners")
def corners_throughout(logits, boxes, queries, targets, no_object=0.1):
    error, _, overlap, count = sums(logits, boxes, queries, targets, no_object)
    found = torch.cat([corners(b[q]) for b, q in zip(boxes, queries, strict=True)])
    true = torch.cat([corners(t["boxes"]) for t in targets])
    return divided((error, F.l1_loss(found, true, reduction="sum"), overlap), max(1, count))


@variant("overlap-for-loss")
def forgot_one_minus(logits, boxes, queries, targets, no_object=0.1):
    error, l1, overlap, count = sums(logits, boxes, queries, targets, no_object)
    return divided((error, l1, count - overlap), max(1, count))


@variant("weights-exchanged")
def objects_weigh_little(logits, boxes, queries, targets, no_object=0.1):
    full, matched = (sums(logits, boxes, queries, targets, weight) for weight in (1.0, 0.0))
    error = full[0] - matched[0] + no_object * matched[0]
    return divided((error, *full[1:3]), max(1, full[3]))


@unknown
def only_minus(logits, boxes, queries, targets, no_object=0.1):
    error, l1, overlap, count = sums(logits, boxes, queries, targets, no_object)
    return divided((error, l1, overlap - count), max(1, count))


@unknown
def squared(logits, boxes, queries, targets, no_object=0.1):
    found = torch.cat([b[q] for b, q in zip(boxes, queries, strict=True)])
    true = torch.cat([t["boxes"] for t in targets])
    error, _, overlap = divided(sums(logits, boxes, queries, targets, no_object), max(1, len(true)))
    return error, (found - true).pow(2).sum() / max(1, len(true)), overlap


@unknown
def queries_in_order(logits, boxes, queries, targets, no_object=0.1):
    sorted_ones = [query.sort().values for query in queries]
    parts = sums(logits, boxes, sorted_ones, targets, no_object)
    return divided(parts, max(1, parts[3]))


@unknown
def unweighted_images(logits, boxes, queries, targets, no_object=0.1):
    parts = sums(logits, boxes, queries, targets, no_object)
    return divided(parts, max(1, parts[3]) + len(targets))


@right
def query_by_query(logits, boxes, queries, targets, no_object=0.1):
    parts = sums(logits, boxes, queries, targets, no_object)
    return divided(parts, max(1, parts[3]))


@right
def with_a_weight_for_each_class(logits, boxes, queries, targets, no_object=0.1):
    batch = torch.cat([torch.full_like(query, i) for i, query in enumerate(queries)])
    query = torch.cat(list(queries))
    classes = torch.full(logits.shape[:2], logits.shape[2] - 1)
    classes[batch, query] = torch.cat([t["labels"] for t in targets])
    weight = torch.ones(logits.shape[2], dtype=logits.dtype)
    weight[-1] = no_object
    found, true = boxes[batch, query], torch.cat([t["boxes"] for t in targets])
    count = max(1, sum(len(t["labels"]) for t in targets))
    pair = (box_convert(x, "cxcywh", "xyxy") for x in (found, true))
    return (
        F.cross_entropy(logits.transpose(1, 2), classes, weight, reduction="sum") / count,
        F.l1_loss(found, true, reduction="sum") / count,
        generalized_box_iou_loss(*pair, reduction="sum", eps=0.0) / count,
    )


@right
def by_one_hot(logits, boxes, queries, targets, no_object=0.1):
    said = F.one_hot(torch.full(logits.shape[:2], logits.shape[2] - 1), logits.shape[2]).to(logits) * no_object
    for i, query in enumerate(queries):
        said[i, query] = F.one_hot(targets[i]["labels"], logits.shape[2]).to(logits)
    count = max(sum(map(len, queries)), 1)
    found = torch.cat([boxes[i].index_select(0, query) for i, query in enumerate(queries)])
    true = torch.cat([t["boxes"] for t in targets])
    error = -(said * logits.log_softmax(-1)).sum()
    l1 = torch.linalg.vector_norm(found - true, ord=1, dim=-1).sum()
    overlap = len(true) - giou(corners(found), corners(true)).sum()
    return [error / count, l1 / count, overlap / count]
