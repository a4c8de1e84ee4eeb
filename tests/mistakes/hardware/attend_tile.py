"""Answers to `hardware.attend_tile`."""

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hardware.attend_tile")


def stepwise(shrink_out=True, shrink_total=True, keep_old_peak=False, guard=True, divide=False, turn=False):
    """Key by key instead of tile by tile."""

    def answer(peak, total, out, scores, values):
        highest = torch.cat([peak[..., None], scores], dim=-1).max(dim=-1).values
        reference = highest.masked_fill(highest.isneginf(), 0.0) if guard else highest
        factor = (reference - peak).exp() if turn else 1 / (reference - peak).exp()
        new_total = factor * total if shrink_total else total
        new_out = factor[..., None] * out if shrink_out else out
        for j in range(scores.shape[-1]):
            weight = (scores[..., j] - reference).exp()
            new_total = new_total + weight
            new_out = new_out + weight[..., None] * values[..., j, None, :]
        return peak if keep_old_peak else highest, new_total, new_out / new_total[..., None] if divide else new_out

    return answer


variant("out-not-shrunk")(stepwise(shrink_out=False))
variant("total-not-shrunk")(stepwise(shrink_total=False))
variant("nothing-shrunk")(stepwise(shrink_out=False, shrink_total=False))
variant("peak-kept")(stepwise(keep_old_peak=True))
variant("nan-while-hidden")(stepwise(guard=False))
variant("divided-already")(stepwise(divide=True))
variant("inverted")(stepwise(turn=True))
right(stepwise())


@variant("peak-of-the-tile")
def newest_maximum(peak, total, out, scores, values):
    top = scores.max(dim=-1, keepdim=True).values
    zero = top.nan_to_num(neginf=0.0)
    old, w = (peak[..., None] - zero).exp(), (scores - zero).exp()
    return top[..., 0], old[..., 0] * total + w.sum(-1), old * out + w.matmul(values)


@variant("old-peak")
def relative_to_what_was(peak, total, out, scores, values):
    zero = peak.nan_to_num(neginf=0.0)
    w = torch.exp(scores - zero.unsqueeze(-1))
    return torch.stack([peak, scores.max(-1).values]).max(0).values, w.sum(-1) + total, w.matmul(values) + out


@variant("zero-as-the-peak")
def what_was_subtracted(peak, total, out, scores, values):
    highest, total, out = stepwise()(peak, total, out, scores, values)
    return highest.nan_to_num(neginf=0.0), total, out


@unknown
def softmax_of_the_tile(peak, total, out, scores, values):
    return torch.maximum(peak, scores.amax(-1)), total + 1, out + scores.softmax(-1) @ values


@unknown
def no_exponential(peak, total, out, scores, values):
    highest = torch.maximum(peak, scores.amax(-1))
    return highest, total + (scores - highest[..., None]).sum(-1), out + scores @ values


@unknown
def wrong_order(peak, total, out, scores, values):
    highest, total, out = stepwise()(peak, total, out, scores, values)
    return total, highest, out


@unknown
def one_peak_for_all_queries(peak, total, out, scores, values):
    highest = torch.maximum(peak.max(), scores.max()).expand_as(peak)
    zero = highest.nan_to_num(neginf=0.0)
    w, old = (scores - zero[..., None]).exp(), (peak - zero).exp()
    return highest.clone(), old * total + w.sum(-1), old[..., None] * out + w @ values


@right
def through_logarithms(peak, total, out, scores, values):
    highest = torch.maximum(peak, scores.amax(-1))
    zero = torch.where(highest.isinf(), torch.zeros_like(highest), highest)
    joined = torch.cat([out[..., None, :], values.unsqueeze(-3).expand(*scores.shape, values.shape[-1])], dim=-2)
    w = torch.cat([(peak - zero).exp()[..., None], (scores - zero[..., None]).exp()], dim=-1)
    return highest, w[..., 0] * total + w[..., 1:].sum(-1), (w[..., None] * joined).sum(-2)
