"""Answers to `efficient_attention.neighbourhood_mask`."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("efficient_attention.neighbourhood_mask")


def pair_by_pair(near):
    """``near(dy, dx, radius)`` for every pair of patches; prefix tokens see all and are seen by all."""

    def build(grid, window_size):
        h, w, prefix = grid
        mask = torch.ones(prefix + h * w, prefix + h * w, dtype=torch.bool)
        for i in range(h * w):
            for j in range(h * w):
                mask[prefix + i, prefix + j] = near(
                    abs(i // w - j // w), abs(i % w - j % w), window_size // 2, abs(i - j)
                )
        return mask

    return build


right(pair_by_pair(lambda dy, dx, r, n: dy <= r and dx <= r))


@right
def by_pooling(grid, window_size):
    """Whom does a single lit patch light up, if a window of maxima slides over the map?"""
    h, w, prefix = grid
    lit = torch.eye(h * w).reshape(h * w, 1, h, w)
    near = F.max_pool2d(lit, window_size, stride=1, padding=window_size // 2).flatten(1) > 0
    return F.pad(near, (prefix, 0, prefix, 0), value=True)


@right
def by_kronecker(grid, window_size):
    h, w, prefix = grid
    bands = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= window_size // 2 for n in (h, w)]
    return F.pad(torch.from_numpy(np.kron(*bands)), (prefix, 0, prefix, 0), value=True)


@variant("inverted")
def hidden_ones(grid, window_size):
    return by_kronecker(grid, window_size) == 0


variant("along-the-sequence")(pair_by_pair(lambda dy, dx, r, n: n <= r))
variant("diamond")(pair_by_pair(lambda dy, dx, r, n: dy + dx <= r))
variant("whole-window-each-way")(pair_by_pair(lambda dy, dx, r, n: max(dy, dx) <= 2 * r + 1))


@variant("height-for-width")
def divided_by_the_height(grid, window_size):
    h, w, prefix = grid
    y, x = np.divmod(np.arange(h * w), h)
    near = (abs(y[:, None] - y) <= window_size // 2) & (abs(x[:, None] - x) <= window_size // 2)
    return F.pad(torch.from_numpy(near), (prefix, 0, prefix, 0), value=True)


@variant("prefix-not-seen")
def columns_forgotten(grid, window_size):
    mask = by_pooling(grid, window_size)
    mask[grid[2] :, : grid[2]] = False
    return mask


@variant("prefix-blind")
def rows_forgotten(grid, window_size):
    mask = by_pooling(grid, window_size)
    mask[: grid[2], grid[2] :] = False
    return mask


@unknown
def without_the_prefix(grid, window_size):
    return by_kronecker((*grid[:2], 0), window_size)


@unknown
def numbers_to_add(grid, window_size):
    return torch.where(by_pooling(grid, window_size), 0.0, -math.inf)


@unknown
def prefix_at_the_end(grid, window_size):
    return by_kronecker(grid, window_size).flip(0, 1)


@unknown
def over_the_edge(grid, window_size):
    """The grid taken for a torus."""
    h, w, prefix = grid
    y, x = np.divmod(np.arange(h * w), w)
    dy, dx = abs(y[:, None] - y), abs(x[:, None] - x)
    near = (np.minimum(dy, h - dy) <= window_size // 2) & (np.minimum(dx, w - dx) <= window_size // 2)
    return F.pad(torch.from_numpy(near), (prefix, 0, prefix, 0), value=True)


unknown(pair_by_pair(lambda dy, dx, r, n: dy <= r))
unknown(pair_by_pair(lambda dy, dx, r, n: dy + dx > 0 and dy <= r and dx <= r))
