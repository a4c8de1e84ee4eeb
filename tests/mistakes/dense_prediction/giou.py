"""Answers to `dense_prediction.giou`."""

import torch
from torchvision.ops import generalized_box_iou

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("dense_prediction.giou")


def parts(a, b, clip=True):
    """Overlap, area of a, area of b, hull, from the single coordinates."""
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    w = torch.min(ax2, bx2) - torch.max(ax1, bx1)
    h = torch.min(ay2, by2) - torch.max(ay1, by1)
    overlap = torch.relu(w) * torch.relu(h) if clip else w * h
    hull = (torch.max(ax2, bx2) - torch.min(ax1, bx1)) * (torch.max(ay2, by2) - torch.min(ay1, by1))
    return overlap, (ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1), hull


@variant("plain-iou")
def stops_at_iou(boxes, others):
    overlap, a, b, _ = parts(boxes, others)
    return overlap / (a + b - overlap)


@variant("negative-sides")
def forgot_to_clip(boxes, others):
    overlap, a, b, hull = parts(boxes, others, clip=False)
    union = a + b - overlap
    return overlap / union - 1 + union / hull


@variant("overlap-twice")
def sum_for_union(boxes, others):
    overlap, a, b, hull = parts(boxes, others)
    return overlap / (a + b) - 1 + (a + b) / hull


@variant("over-the-union")
def wrong_denominator(boxes, others):
    overlap, a, b, hull = parts(boxes, others)
    union = a + b - overlap
    return (overlap - hull + union) / union


@variant("rewarded")
def wrong_sign(boxes, others):
    overlap, a, b, hull = parts(boxes, others)
    union = a + b - overlap
    return overlap / union + 1 - union / hull


@variant("empty-part-without-iou")
def only_the_hull(boxes, others):
    overlap, a, b, hull = parts(boxes, others)
    return (a + b - overlap) / hull - 1


@variant("larger-box-for-hull")
def larger_one(boxes, others):
    overlap, a, b, _ = parts(boxes, others)
    union = a + b - overlap
    hull = torch.where(a > b, a, b)
    return overlap / union - (hull - union) / hull


@variant("cxcywh")
def centres(boxes, others):
    def turned(x):
        c, s = x[..., :2], x[..., 2:]
        return torch.cat([c - s / 2, c + s / 2], -1)

    return right_one(turned(boxes), turned(others))


@variant("xywh")
def widths(boxes, others):
    turned = (torch.cat([x[..., :2], x[..., :2] + x[..., 2:]], -1) for x in (boxes, others))
    return right_one(*turned)


@variant("clipped-too-late")
def clips_the_area(boxes, others):
    overlap, a, b, hull = parts(boxes, others, clip=False)
    overlap = torch.relu(overlap)
    union = a + b - overlap
    return overlap / union - 1 + union / hull


@variant("empty-but-for-the-overlap")
def overlap_for_union(boxes, others):
    overlap, a, b, hull = parts(boxes, others)
    return overlap / (a + b - overlap) + overlap / hull - 1


@unknown
def loss_instead(boxes, others):
    return 1 - right_one(boxes, others)


@unknown
def distance_iou(boxes, others):
    overlap, a, b, _ = parts(boxes, others)
    low = torch.minimum(boxes[..., :2], others[..., :2])
    high = torch.maximum(boxes[..., 2:], others[..., 2:])
    apart = (boxes[..., :2] + boxes[..., 2:] - others[..., :2] - others[..., 2:]).pow(2).sum(-1) / 4
    return overlap / (a + b - overlap) - apart / (high - low).pow(2).sum(-1)


@unknown
def inclusive_pixels(boxes, others):
    one = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=boxes.dtype)
    return right_one(boxes + one, others + one)


def right_one(boxes, others):
    overlap, a, b, hull = parts(boxes, others)
    union = a + b - overlap
    return overlap / union + union / hull - 1


right(right_one)


@right
def by_sorting(boxes, others):
    """Of the four coordinates along an axis, sorted: the hull is last minus first."""
    both = torch.stack(torch.broadcast_tensors(boxes, others), -2).unflatten(-1, (2, 2))  # (…, box, corner, axis)
    inside = (both[..., 1, :].amin(-2) - both[..., 0, :].amax(-2)).clamp(min=0).prod(-1)
    hull = (both[..., 1, :].amax(-2) - both[..., 0, :].amin(-2)).prod(-1)
    union = (both[..., 1, :] - both[..., 0, :]).prod(-1).sum(-1) - inside
    return inside / union - (hull - union) / hull


@right
def with_where(boxes, others):
    """Of two equal sides only one has the gradient."""
    low = torch.where(boxes[..., :2] > others[..., :2], boxes[..., :2], others[..., :2])
    high = torch.where(boxes[..., 2:] < others[..., 2:], boxes[..., 2:], others[..., 2:])
    sides = high - low
    inside = torch.where((sides > 0).all(-1), sides.prod(-1), 0.0)
    union = sum((x[..., 2:] - x[..., :2]).prod(-1) for x in (boxes, others)) - inside
    _, _, _, hull = parts(boxes, others)
    return (inside * hull + union**2 - union * hull) / (union * hull)


@right
def pair_by_pair(boxes, others):
    pairs = torch.broadcast_tensors(boxes, others)
    flat = zip(*(x.reshape(-1, 4) for x in pairs), strict=True)
    values = [generalized_box_iou(a[None], b[None])[0, 0] for a, b in flat]
    return torch.stack(values).reshape(pairs[0].shape[:-1]) if values else boxes.new_zeros(0)


@right
def torchvisions(boxes, others):
    a, b = (x.reshape(-1, 4) for x in torch.broadcast_tensors(boxes, others))
    shape = torch.broadcast_shapes(boxes.shape, others.shape)[:-1]
    return generalized_box_iou(a, b).diagonal().reshape(shape)
