"""Answers to `efficient_attention.bipartite_matching`."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("efficient_attention.bipartite_matching")


def one_by_one(alike=F.cosine_similarity, chosen=None, order=None, split=None, protect=True, b_first=False):
    """Lists and loops for every image."""

    def match(metric, r, num_prefix_tokens=0):
        places = []
        for tokens in metric:
            n, prefix = len(tokens), num_prefix_tokens if protect else 0
            patches = list(range(prefix, n))
            a, b = ([i for i in patches if i % 2 == odd] for odd in (0, 1)) if split is None else split(patches)
            table = {i: [alike(tokens[i], tokens[j], dim=0).item() for j in b] for i in a}
            ranked = sorted(a, key=lambda i: -max(table[i]))
            gone = ranked[:r] if chosen is None else chosen(ranked, a, r)
            stay = [i for i in a if i not in gone]
            stay = stay if order is None else sorted(stay, key=lambda i: order(max(table[i])))
            place = {i: i for i in range(prefix)}
            for new, i in enumerate(b + stay if b_first else stay + b):
                place[i] = prefix + new
            for i in gone:
                place[i] = place[b[int(np.argmax(table[i]))]]
            places.append([place[i] for i in range(n)])
        return torch.tensor(places)

    return match


def product(x, y, dim):
    return (x * y).sum(dim)


right(one_by_one())


@right
def as_in_the_authors_code(metric, r, num_prefix_tokens=0):
    """Sorted indices of who goes and who stays, the prefix kept from merging by a likeness of −∞."""
    p, n = num_prefix_tokens, metric.shape[1]
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, : (p + 1) // 2] = -math.inf
    scores[:, :, : p // 2] = -math.inf
    value, partner = scores.max(dim=-1)
    edge = value.argsort(dim=-1, descending=True)
    stay, gone = edge[:, r:].sort(dim=1).values, edge[:, :r]
    stay = stay[:, (p + 1) // 2 :]
    place = torch.zeros(len(metric), n, dtype=torch.long)
    place[:, :p] = torch.arange(p)
    place.scatter_(1, 2 * stay, torch.arange(p, p + stay.shape[1]).expand_as(stay))
    start = p + stay.shape[1]
    b = torch.arange(p // 2, n // 2)
    place[:, 2 * b + 1] = start + torch.arange(len(b))
    place.scatter_(1, 2 * gone, start - p // 2 + partner.gather(1, gone))
    return place


for key, change in {
    "not-normalised": {"alike": product},
    "least-alike": {"chosen": lambda ranked, a, r: ranked[::-1][:r]},
    "first-come": {"chosen": lambda ranked, a, r: a[:r]},
    "b-before-a": {"b_first": True},
    "in-order-of-likeness": {"order": lambda likeness: -likeness},
    "halves": {"split": lambda patches: (patches[: (len(patches) + 1) // 2], patches[(len(patches) + 1) // 2 :])},
    "counted-among-patches": {"split": lambda patches: (patches[::2], patches[1::2])},
    "prefix-merged": {"protect": False},
}.items():
    variant(key)(one_by_one(**change))

for change in (
    {"alike": lambda x, y, dim: -(x - y).abs().sum(dim)},
    {"chosen": lambda ranked, a, r: a[-r:]},
    {"split": lambda patches: (patches[1::2], patches[::2])},
    {"order": lambda likeness: likeness},
    {"b_first": True, "alike": product},
):
    unknown(one_by_one(**change))


@unknown
def nobody_moves(metric, r, num_prefix_tokens=0):
    return torch.arange(metric.shape[1]).repeat(len(metric), 1)


@unknown
def which_ones_go(metric, r, num_prefix_tokens=0):
    return as_in_the_authors_code(metric, r, num_prefix_tokens)[:, :r]
