"""Answers to `dense_prediction.query_mask`."""

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("dense_prediction.query_mask")


def covered(masks, grid):
    return F.interpolate(masks, size=grid, mode="bilinear", align_corners=False).reshape(*masks.shape[:2], -1) > 0


def entries(masks, grid, prefix, may):
    """One pair after the other; ``may(kind of the row, kind of the column, covered)``; kinds are "q", "p" and "x"."""
    inside = covered(masks, grid)
    batch, count, patches = inside.shape
    kinds = ["q"] * count + ["p"] * prefix + ["x"] * patches
    out = torch.zeros(batch, 1, len(kinds), len(kinds), dtype=torch.bool)
    for b in range(batch):
        for i, row in enumerate(kinds):
            for j, column in enumerate(kinds):
                q, x = (i, j - count - prefix) if row == "q" else (j, i - count - prefix)
                hit = bool(inside[b, q, x]) if {row, column} == {"q", "x"} else True
                out[b, 0, i, j] = may(row, column, hit)
    return out


@variant("probability-above-zero")
def forgot_that_sigmoid_is_positive(masks, grid, prefix):
    n = masks.shape[1] + prefix + grid[0] * grid[1]
    return torch.ones(masks.shape[0], 1, n, n, dtype=torch.bool)


@variant("inverted")
def other_way(masks, grid, prefix):
    return entries(masks, grid, prefix, lambda r, c, hit: not hit if (r, c) == ("q", "x") else True)


@variant("patches-masked")
def columns_for_rows(masks, grid, prefix):
    return entries(masks, grid, prefix, lambda r, c, hit: hit if (r, c) == ("x", "q") else True)


@variant("both-ways")
def symmetric(masks, grid, prefix):
    return entries(masks, grid, prefix, lambda r, c, hit: hit)


@variant("alone")
def nothing_but_patches(masks, grid, prefix):
    return entries(masks, grid, prefix, lambda r, c, hit: (c == "x" and hit) if r == "q" else True)


@variant("nearest")
def every_so_many(masks, grid, prefix):
    rows, columns = (torch.arange(n) * m // n for n, m in zip(grid, masks.shape[2:], strict=True))
    inside = (masks[:, :, rows][..., columns] > 0).flatten(2)
    return placed(inside, prefix)


@variant("prefix-masked")
def forgot_the_prefix(masks, grid, prefix):
    inside, queries = covered(masks, grid), masks.shape[1]
    mask = torch.ones_like(placed(inside, prefix))
    mask[:, 0, :queries, queries : queries + inside.shape[2]] = inside
    return mask


def placed(inside, prefix):
    batch, queries, patches = inside.shape
    top = torch.cat([torch.ones(batch, queries, queries + prefix, dtype=torch.bool), inside], 2)
    rest = torch.ones(batch, prefix + patches, queries + prefix + patches, dtype=torch.bool)
    return torch.cat([top, rest], 1).unsqueeze(1)


@variant("zero-counts")
def not_negative(masks, grid, prefix):
    return placed((F.interpolate(masks, grid, mode="bilinear") >= 0).flatten(2), prefix)


@variant("logits-above-half")
def half(masks, grid, prefix):
    return placed((F.interpolate(masks, grid, mode="bilinear") > 0.5).flatten(2), prefix)


@unknown
def probabilities_first(masks, grid, prefix):
    return placed((F.interpolate(masks.sigmoid(), grid, mode="bilinear") > 0.5).flatten(2), prefix)


@variant("threshold-first")
def any_covered_pixel(masks, grid, prefix):
    return placed((F.interpolate((masks > 0).to(masks), grid, mode="bilinear") > 0).flatten(2), prefix)


@unknown
def patches_first(masks, grid, prefix):
    shift = -(masks.shape[1] + prefix)
    return placed(covered(masks, grid), prefix).roll((shift, shift), (2, 3))


@unknown
def queries_apart(masks, grid, prefix):
    mask, queries = placed(covered(masks, grid), prefix), masks.shape[1]
    mask[:, :, :queries, :queries] = torch.eye(queries, dtype=torch.bool)
    return mask


@right
def pair_by_pair(masks, grid, prefix):
    return entries(masks, grid, prefix, lambda r, c, hit: hit or (r, c) != ("q", "x"))


@right
def stacked(masks, grid, prefix):
    return placed(covered(masks, grid), prefix)


@right
def by_probabilities(masks, grid, prefix):
    small = F.interpolate(masks, grid, mode="bilinear").sigmoid().flatten(2) > 0.5
    n = masks.shape[1] + prefix + small.shape[2]
    query = torch.arange(n)[:, None] < masks.shape[1]
    patch = torch.arange(n) >= masks.shape[1] + prefix
    full = torch.zeros(len(masks), n, n, dtype=torch.bool)
    full[:, : masks.shape[1], masks.shape[1] + prefix :] = small
    return (full | ~(query & patch))[:, None]
