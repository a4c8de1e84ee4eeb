"""The check of `hybrid.resize_bias_table`, and its reference, which only the lesson has use for."""

import torch
import torch.nn.functional as F
from einops import rearrange

from vitcourse.course.checks import call, check
from vitcourse.vit import resize_pos_embed


def resize_bias_table(table: torch.Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> torch.Tensor:
    """A table of offsets for maps of another size, by bicubic interpolation with antialiasing.

    Args:
        table: ((2h − 1) · (2w − 1), heads), made for maps of ``old_size``.
        old_size: (h, w).
        new_size: (h', w').

    Returns:
        ((2h' − 1) · (2w' − 1), heads).

    >>> resize_bias_table(torch.zeros(13 * 13, 4), (7, 7), (14, 10)).shape
    torch.Size([513, 4])
    """
    offsets = [(2 * h - 1, 2 * w - 1) for h, w in (old_size, new_size)]
    return resize_pos_embed(table[None], *offsets)[0]


@check(
    "hybrid.resize_bias_table",
    reference="vitcourse.course.checks.hybrid.resize_bias_table.resize_bias_table",
    level=3,
    minutes=15,
    why="Without it a model can only see images of the size that it was trained on.",
    hints=[
        "The table is a map of offsets, one channel for each head. How many rows and columns has it?",
        "F.interpolate wants (batch, channels, rows, columns), and the heads come last here: moving an axis and "
        "reshaping are not the same.",
        'F.interpolate(…, mode="bicubic", antialias=True); then the way back, heads last.',
    ],
    exempt={
        "batch": "there is one table for all images",
        "single": "there is one table for all images",
        "integers": "a table of offsets holds learnt numbers, not pixels",
    },
)
def resize_table_cases(rng):
    yield call(rng.normal(5 * 7, 2), (3, 4), (6, 5))
    yield call(rng.normal(9 * 5, 3), (5, 3), (2, 4)).on("a map that is lower and wider")
    yield call(rng.normal(5 * 5, 1), (3, 3), (3, 3)).on("a map of the same size")


def _resized(pattern_in, pattern_out, side=lambda n: 2 * n - 1, exchange=False, **options):
    options = {"mode": "bicubic", "antialias": True, **options}

    def faulty(table, old_size, new_size):
        h, w = (2 * n - 1 for n in (reversed(old_size) if exchange else old_size))
        y, x = (side(n) for n in (reversed(new_size) if exchange else new_size))
        grid = rearrange(table, pattern_in, h=h, w=w) if "->" in pattern_in else table.reshape(1, -1, h, w)
        return rearrange(F.interpolate(grid, (y, x), **options), pattern_out)

    return faulty


_IN, _OUT = "(h w) heads -> 1 heads h w", "1 heads h w -> (h w) heads"
resize_table_cases.mistake(
    "heads-mixed",
    "the heads are mixed up: in memory they lie innermost, and a reshape alone does not move them",
    _resized("as it lies", _OUT),
)
resize_table_cases.mistake(
    "left-as-a-map", "this still is a map of offsets, heads first; the table has one row for each offset",
    _resized(_IN, "1 heads h w -> heads h w"),
)  # fmt: skip
resize_table_cases.mistake(
    "height-for-width",
    "height and width of the map are exchanged, which square maps hide",
    _resized(_IN, _OUT, exchange=True),
)
resize_table_cases.mistake(
    "columns-first", "the new table is numbered column by column; it should be read like the old one",
    _resized(_IN, "1 heads h w -> (w h) heads"),
)  # fmt: skip
resize_table_cases.mistake(
    "one-too-many",
    "the new table has an even number of rows: there are as many offsets to the left as to the right, and one of zero",
    _resized(_IN, _OUT, side=lambda n: 2 * n),
)
resize_table_cases.mistake(
    "positions-not-offsets",
    "the new table has a row for each position of the map; it needs one for each offset between two of them",
    _resized(_IN, _OUT, side=lambda n: n),
)
resize_table_cases.mistake(
    "corners-aligned",
    "the outermost offsets are held in place and all others stretched between them; the pixels' edges should align",
    _resized(_IN, _OUT, align_corners=True),
)
resize_table_cases.mistake(
    "no-antialias",
    "no antialiasing: where the table shrinks, offsets between the samples are skipped",
    _resized(_IN, _OUT, antialias=False),
)
resize_table_cases.mistake(
    "bilinear",
    "the interpolation is bilinear: smooth hills of the table get corners",
    _resized(_IN, _OUT, mode="bilinear"),
)
resize_table_cases.mistake(
    "nearest",
    "each new offset takes the nearest old one: neighbours that should differ become equal",
    _resized(_IN, _OUT, mode="nearest", antialias=False),
)
