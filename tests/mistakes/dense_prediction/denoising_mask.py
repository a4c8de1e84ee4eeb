"""Answers to `dense_prediction.denoising_mask`."""

import torch
from einops import rearrange, repeat

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("dense_prediction.denoising_mask")


def pairs(real, num_queries, may, order=None):
    """One pair after the other: ``may(row, column, there)``, a place being (group, number), group None for queries."""
    batch, groups, places = real.shape
    tokens = [(g, k) for g in range(groups) for k in range(places)] + [(None, k) for k in range(num_queries)]
    tokens = order(tokens) if order else tokens
    out = torch.zeros(batch, 1, len(tokens), len(tokens), dtype=torch.bool)
    for b in range(batch):
        there = [g is None or bool(real[b, g, k]) for g, k in tokens]
        for i, row in enumerate(tokens):
            for j, column in enumerate(tokens):
                out[b, 0, i, j] = may(row, column, there[j])
    return out


def rule(row, column, there):
    return there and (column[0] is None or row[0] == column[0])


@variant("leak")
def queries_see_all(real, num_queries):
    return pairs(real, num_queries, lambda r, c, there: there and (r[0] is None or rule(r, c, there)))


@variant("groups-see-each-other")
def objects_see_all(real, num_queries):
    return pairs(real, num_queries, lambda r, c, there: there and (r[0] is not None or c[0] is None))


@variant("all-apart")
def blocks_only(real, num_queries):
    return pairs(real, num_queries, lambda r, c, there: there and r[0] == c[0])


@variant("only-itself")
def selfish(real, num_queries):
    return pairs(real, num_queries, lambda r, c, there: there and (c[0] is None or r == c))


@variant("filled-up-seen")
def forgot_real(real, num_queries):
    return pairs(real, num_queries, lambda r, c, there: rule(r, c, True))


@variant("inverted")
def true_is_hidden(real, num_queries):
    return pairs(real, num_queries, lambda r, c, there: not rule(r, c, there))


@variant("queries-first")
def other_order(real, num_queries):
    return pairs(real, num_queries, rule, lambda tokens: tokens[-num_queries:] + tokens[:-num_queries])


@variant("transposed")
def columns_look(real, num_queries):
    return pairs(real, num_queries, rule).mT


@variant("filled-up-blind")
def filled_up_see_nothing(real, num_queries):
    seen = pairs(real, num_queries, rule)
    rows = torch.cat([real.flatten(1), torch.ones(len(real), num_queries, dtype=torch.bool)], 1)
    return seen & rows[:, None, :, None]


@unknown
def all_may(real, num_queries):
    return pairs(real, num_queries, lambda r, c, there: True)


@unknown
def interleaved(real, num_queries):
    """The first objects of all groups, then the second ones."""
    groups = real.shape[1]

    def order(tokens):
        first = tokens[: groups * real.shape[2]]
        return sorted(first, key=lambda t: (t[1], t[0])) + tokens[len(first) :]

    return pairs(real, num_queries, rule, order)


@right
def pair_by_pair(real, num_queries):
    return pairs(real, num_queries, rule)


@right
def as_blocks(real, num_queries):
    batch, groups, places = real.shape
    length = groups * places
    mask = torch.zeros(batch, length + num_queries, length + num_queries, dtype=torch.bool)
    mask[:, :, length:] = True
    for g in range(groups):
        part = slice(g * places, (g + 1) * places)
        mask[:, part, part] = real[:, g, None]
    return mask.unsqueeze(1)


@right
def by_einops(real, num_queries):
    batch, groups, places = real.shape
    eye = torch.eye(groups, dtype=torch.bool)
    own = repeat(eye, "g h -> (g n) (h m)", n=places, m=places) & rearrange(real, "b g n -> b 1 (g n)")
    top = torch.cat([own, own.new_ones(batch, own.shape[1], num_queries)], 2)
    low = torch.cat([own.new_zeros(batch, num_queries, own.shape[2]), own.new_ones(batch, num_queries, num_queries)], 2)
    return torch.cat([top, low], 1)[:, None]
