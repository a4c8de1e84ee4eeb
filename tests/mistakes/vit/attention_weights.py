"""Answers to `vit.attention_weights`."""

import math

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("vit.attention_weights")


def dots(q, k):
    return torch.einsum("bhid,bhjd->bhij", q, k)


@variant("no-scale")
def bare_dot_products(q, k):
    return F.softmax(dots(q, k), dim=3)


@variant("scale-by-width")
def mean_of_products(q, k):
    return torch.softmax((q[:, :, :, None] * k[:, :, None]).mean(-1), -1)


@variant("multiplied")
def times_the_root(q, k):
    return F.softmax(dots(q * math.sqrt(q.size(-1)), k), dim=-1)


@variant("over-queries")
def columns_sum_to_one(q, k):
    e = torch.exp(dots(q, k) / math.sqrt(q.size(-1)))
    return e / e.sum(dim=2, keepdim=True)


@variant("over-queries")
def keys_ask_queries(q, k):
    return (k @ q.mT / math.sqrt(q.size(-1))).softmax(-1).mT


@variant("over-heads")
def heads_sum_to_one(q, k):
    e = torch.exp(dots(q, k) / math.sqrt(q.size(-1)))
    return e / e.sum(dim=1, keepdim=True)


@variant("scale-after")
def divided_too_late(q, k):
    return torch.div(F.softmax(dots(q, k), -1), math.sqrt(k.shape[3]))


@variant("no-softmax")
def scores_only(q, k):
    return torch.matmul(q, k.permute(0, 1, 3, 2)).div(math.sqrt(k.shape[3]))


@unknown
def transposed_weights(q, k):
    return (k @ q.mT / math.sqrt(q.size(-1))).softmax(-1)


@unknown
def softmax_of_negative_scores(q, k):
    return F.softmin(dots(q, k) / math.sqrt(q.size(-1)), dim=-1)


@unknown
def magnitudes_normalised(q, k):
    scores = dots(q, k).abs()
    return scores / scores.sum(-1, keepdim=True)


@unknown
def scaled_by_number_of_keys(q, k):
    return (dots(q, k) / math.sqrt(k.shape[2])).softmax(-1)


@unknown
def over_queries_and_unscaled(q, k):
    return dots(q, k).softmax(-2)


@unknown
def sigmoid_instead(q, k):
    return torch.sigmoid(dots(q, k) / math.sqrt(q.size(-1)))


@unknown
def log_weights(q, k):
    return F.log_softmax(dots(q, k) / math.sqrt(q.size(-1)), dim=-1)


@unknown
def queries_scaled_in_place(q, k):
    q /= math.sqrt(q.size(-1))
    return dots(q, k).softmax(-1)


@unknown
def keys_cut_off(q, k):
    return (dots(q, k.detach()) / math.sqrt(q.size(-1))).softmax(-1)


@unknown
def in_single_precision(q, k):
    return (dots(q.float(), k.float()) / math.sqrt(q.size(-1))).softmax(-1)


@right
def exponentials_by_hand(q, k):
    scores = dots(q, k) / math.sqrt(q.size(-1))
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


@right
def fused_attention_to_unit_vectors(q, k):
    values = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
    return F.scaled_dot_product_attention(q, k, values)


@right
def query_by_query(q, k):
    rows = []
    for i in range(q.shape[2]):
        match = (q[:, :, i : i + 1] * k).sum(-1) * q.shape[-1] ** -0.5
        rows.append(F.softmax(match, dim=-1))
    return torch.stack(rows, dim=2)


@unknown
def exponentials_of_any_size(q, k):
    e = torch.exp(q @ k.mT / math.sqrt(q.shape[-1]))
    return e / e.sum(-1, keepdim=True)


@unknown
def clamped_against_overflow(q, k):
    return (q @ k.mT / math.sqrt(q.shape[-1])).clamp(-20, 20).softmax(-1)
