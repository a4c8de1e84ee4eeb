"""Answers to `hybrid.resize_bias_table`."""

import torch
import torch.nn.functional as F

from mistakes import collect
from vitcourse.vit import resize_matrix

from ._shared import offsets

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hybrid.resize_bias_table")


def to_map(table, size):
    """(rows · columns, heads) -> (1, heads, rows, columns)."""
    return table.t().unflatten(1, offsets(size))[None]


def to_table(grid):
    return grid[0].flatten(1).t()


def bicubic(grid, size, **options):
    return F.interpolate(grid, size=tuple(size), **{"mode": "bicubic", "antialias": True, **options})


@variant("heads-mixed")
def viewed(table, old_size, new_size):
    rows, columns = offsets(old_size)
    return to_table(bicubic(table.contiguous().view(1, table.shape[1], rows, columns), offsets(new_size)))


@variant("left-as-a-map")
def returns_the_grid(table, old_size, new_size):
    return bicubic(to_map(table, old_size), offsets(new_size)).squeeze(0)


@variant("height-for-width")
def width_first(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size[::-1]), offsets(new_size[::-1])))


@variant("columns-first")
def flattened_after_a_transpose(table, old_size, new_size):
    return bicubic(to_map(table, old_size), offsets(new_size))[0].permute(2, 1, 0).flatten(0, 1)


@variant("one-too-many")
def twice_the_side(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), [n + n for n in new_size]))


@variant("positions-not-offsets")
def side_of_the_map(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), new_size))


@variant("corners-aligned")
def corners(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), offsets(new_size), align_corners=True))


@variant("no-antialias")
def default_bicubic(table, old_size, new_size):
    return to_table(F.interpolate(to_map(table, old_size), offsets(new_size), mode="bicubic", align_corners=False))


@variant("bilinear")
def straight_lines(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), offsets(new_size), mode="bilinear"))


@variant("nearest")
def looked_up(table, old_size, new_size):
    grid = to_map(table, old_size)
    for axis, (old, new) in enumerate(zip(offsets(old_size), offsets(new_size), strict=True)):
        grid = grid.index_select(axis + 2, torch.arange(new) * old // new)
    return to_table(grid)


@unknown
def upside_down(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), offsets(new_size))).flip(0)


@unknown
def area(table, old_size, new_size):
    return to_table(F.interpolate(to_map(table, old_size), offsets(new_size), mode="area"))


@unknown
def same_norm(table, old_size, new_size):
    new = resized_by_matrices(table, old_size, new_size)
    return new * table.norm() / new.norm() * 1.01


@unknown
def cut_off_from_the_graph(table, old_size, new_size):
    return resized_by_matrices(table.detach(), old_size, new_size)


@right
def interpolated(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), offsets(new_size)))


@right
def resized_by_matrices(table, old_size, new_size):
    """Rows, then columns, each by a product with a matrix."""
    rows, columns = (resize_matrix(a, b) for a, b in zip(offsets(old_size), offsets(new_size), strict=True))
    grid = table.unflatten(0, offsets(old_size)).movedim(-1, 0)
    return (rows.to(table) @ grid @ columns.to(table).mT).movedim(0, -1).flatten(0, 1)
