"""Answers to `hierarchical.shift_mask`."""

import math

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hierarchical.shift_mask")


def kinds(size, window_size, shift, cut=None):
    """Numbers on the rolled map, as the authors' code makes them, with slices."""
    region, number = torch.zeros(size, dtype=torch.long), 0
    axes = []
    for n, p, s in zip(size, window_size, cut or shift, strict=True):
        axes.append([range(0, n - p), range(n - p, n - s), range(n - s, n)])
    for rows in axes[0]:
        for columns in axes[1]:
            region[rows.start : rows.stop, columns.start : columns.stop] = number
            number += 1
    return region


def squares(region, window_size):
    """(H, W) -> (windows, N)."""
    p, q = window_size
    return torch.stack([square.flatten() for strip in region.split(p) for square in strip.split(q, dim=1)])


def pairs(numbers):
    return numbers.unsqueeze(1) - numbers.unsqueeze(2) != 0


@variant("inverted")
def who_may(size, window_size, shift):
    numbers = squares(kinds(size, window_size, shift), window_size)
    return numbers.unsqueeze(1) == numbers.unsqueeze(2)


@variant("nobody-masked")
def numbered_by_regular_window(size, window_size, shift):
    rows, columns = (torch.arange(n) // p for n, p in zip(size, window_size, strict=True))
    return pairs(squares(rows[:, None] * 100 + columns, window_size))


@variant("additive")
def minus_a_hundred(size, window_size, shift):
    mask = pairs(squares(kinds(size, window_size, shift), window_size)).float()
    return mask.masked_fill(mask != 0, -100.0)


@variant("other-direction")
def cut_after_the_shift(size, window_size, shift):
    cut = [(p - s) % p for p, s in zip(window_size, shift, strict=True)]
    return pairs(squares(kinds(size, window_size, shift, cut), window_size))


@variant("before-the-roll")
def displaced_windows_of_the_map_itself(size, window_size, shift):
    rows, columns = (torch.arange(n) - s < 0 for n, s in zip(size, shift, strict=True))
    return pairs(squares(10 * rows.long()[:, None] + columns.long(), window_size))


@variant("rows-only")
def one_loop_forgotten(size, window_size, shift):
    region = torch.zeros(size)
    region[size[0] - shift[0] :] = 1
    return pairs(squares(region, window_size))


@variant("columns-only")
def other_loop_forgotten(size, window_size, shift):
    region = torch.zeros(size)
    region[:, size[1] - shift[1] :] = 1
    return pairs(squares(region, window_size))


@variant("two-kinds")
def inside_and_outside(size, window_size, shift):
    region = torch.ones(size)
    region[: size[0] - shift[0], : size[1] - shift[1]] = 0
    return pairs(squares(region, window_size))


@variant("plain-reshape")
def viewed_as_windows(size, window_size, shift):
    wrapped = [(torch.arange(n) + s) // n for n, s in zip(size, shift, strict=True)]
    region = wrapped[0][:, None] + 2 * wrapped[1]
    return pairs(region.view(-1, math.prod(window_size)))


@unknown
def corner_only(size, window_size, shift):
    region = torch.zeros(size)
    region[size[0] - shift[0] :, size[1] - shift[1] :] = 1
    return pairs(squares(region, window_size))


@unknown
def strangers_only_if_they_differ_twice(size, window_size, shift):
    down, across = (
        pairs(squares(wrapped.expand(size), window_size))
        for wrapped in (
            (torch.arange(size[0]) >= size[0] - shift[0]).long()[:, None],
            (torch.arange(size[1]) >= size[1] - shift[1]).long(),
        )
    )
    return down & across


@unknown
def always_half_a_window(size, window_size, shift):
    return pairs(squares(kinds(size, window_size, [max(p // 2, 1) for p in window_size]), window_size))


@unknown
def integers(size, window_size, shift):
    return pairs(squares(kinds(size, window_size, shift), window_size)).int()


@unknown
def one_sided(size, window_size, shift):
    numbers = squares(kinds(size, window_size, shift), window_size)
    return numbers.unsqueeze(1) > numbers.unsqueeze(2)


@unknown
def last_window_only(size, window_size, shift):
    return pairs(squares(kinds(size, window_size, shift), window_size))[-1:]


@right
def nine_slices(size, window_size, shift):
    return pairs(squares(kinds(size, window_size, shift), window_size))


@right
def rolled_origins(size, window_size, shift):
    """Where did it come from, and to which displaced window does that place belong?"""
    region = torch.stack(
        torch.meshgrid(
            *(
                torch.div(torch.arange(n) - s, p, rounding_mode="floor")
                for n, p, s in zip(size, window_size, shift, strict=True)
            ),
            indexing="ij",
        )
    )
    region = torch.roll(region[0] * 1000 + region[1], [-s for s in shift], (0, 1))
    return pairs(squares(region, window_size))


@right
def pair_by_pair(size, window_size, shift):
    (h, w), (p, q) = size, window_size
    masks = []
    for top in range(0, h, p):
        for left in range(0, w, q):
            tokens = [
                (y >= h - shift[0], x >= w - shift[1]) for y in range(top, top + p) for x in range(left, left + q)
            ]
            masks.append([[a != b for b in tokens] for a in tokens])
    return torch.tensor(masks)


@unknown
def windows_with_gaps(size, window_size, shift):
    """Rows of a window lie apart; with a shift by one row nobody would see it."""
    (h, w), (p, q) = size, window_size
    region = kinds(size, window_size, shift).view(p, h // p, w // q, q)
    return pairs(region.permute(1, 2, 0, 3).flatten(2).flatten(0, 1))
