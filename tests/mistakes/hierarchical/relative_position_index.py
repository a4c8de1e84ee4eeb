"""Answers to `hierarchical.relative_position_index`."""

import numpy as np
import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hierarchical.relative_position_index")


def number_pairs(window_size, number):
    """``number(down, across)`` for each query and key."""
    p, q = window_size
    places = [divmod(n, q) for n in range(p * q)]
    return torch.tensor([[number(a - c, b - d) for c, d in places] for a, b in places])


@variant("key-minus-query")
def authors_code_with_the_axes_exchanged(window_size):
    return authors_code(window_size).T


@variant("from-below-zero")
def offsets_forgotten(window_size):
    return number_pairs(window_size, lambda down, across: down * (2 * window_size[1] - 1) + across)


@variant("sum-of-axes")
def added_up(window_size):
    places = np.stack(np.indices(window_size)).reshape(2, -1)
    offsets = places[:, :, None] - places[:, None] + np.array(window_size).reshape(2, 1, 1) - 1
    return torch.from_numpy(offsets.sum(0))


@variant("as-wide-as-the-window")
def window_width_as_stride(window_size):
    p, q = window_size
    return number_pairs(window_size, lambda down, across: q * (down + p - 1) + across + q - 1)


@variant("height-for-width")
def height_as_stride(window_size):
    p, q = window_size
    return number_pairs(window_size, lambda down, across: (2 * p - 1) * (down + p - 1) + across + q - 1)


@variant("columns-first")
def ravelled_in_fortran_order(window_size):
    p, q = window_size
    table = np.arange((2 * p - 1) * (2 * q - 1)).reshape((2 * p - 1, 2 * q - 1), order="F")
    return number_pairs(window_size, lambda down, across: int(table[down + p - 1, across + q - 1]))


@variant("without-sign")
def only_how_far(window_size):
    return number_pairs(window_size, lambda down, across: abs(down) * (2 * window_size[1] - 1) + abs(across))


@variant("pairs-not-numbers")
def two_numbers_each(window_size):
    p, q = window_size
    return number_pairs(window_size, lambda down, across: [down + p - 1, across + q - 1])


@unknown
def number_of_the_key(window_size):
    n = window_size[0] * window_size[1]
    return torch.arange(n).expand(n, n).clone()


@variant("as-wide-as-the-window")
def difference_of_running_numbers(window_size):
    n = torch.arange(window_size[0] * window_size[1])
    return n[:, None] - n + len(n) - 1


@unknown
def one_too_far(window_size):
    p, q = window_size
    return number_pairs(window_size, lambda down, across: (down + p) * (2 * q - 1) + across + q)


@unknown
def as_floats(window_size):
    return authors_code(window_size).float()


@unknown
def flattened(window_size):
    return authors_code(window_size).flatten()


@unknown
def twice_the_width(window_size):
    p, q = window_size
    return number_pairs(window_size, lambda down, across: (down + p - 1) * 2 * q + across + q - 1)


@right
def authors_code(window_size):
    p, q = window_size
    coords = torch.flatten(torch.stack(torch.meshgrid(torch.arange(p), torch.arange(q), indexing="ij")), 1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
    relative[:, :, 0] += p - 1
    relative[:, :, 1] += q - 1
    relative[:, :, 0] *= 2 * q - 1
    return relative.sum(-1)


@right
def looked_up_in_a_table(window_size):
    p, q = window_size
    table = torch.arange((2 * p - 1) * (2 * q - 1)).view(2 * p - 1, 2 * q - 1)
    return number_pairs(window_size, lambda down, across: table[down + p - 1, across + q - 1].item())


@right
def sliding_windows(window_size):
    """The row of a query is the window of the table, turned around, that begins at its place."""
    p, q = window_size
    table = torch.arange((2 * p - 1) * (2 * q - 1)).view(2 * p - 1, 2 * q - 1)
    rows = [table[i : i + p, j : j + q].flip(0, 1).flatten() for i in range(p) for j in range(q)]
    return torch.stack(rows)
