"""The check of `vit.resize_pos_embed`."""

import torch
import torch.nn.functional as F
from einops import rearrange

from vitcourse.course.checks import call, check


@check(
    "vit.resize_pos_embed",
    reference="vitcourse.vit.resize_pos_embed",
    level=3,
    minutes=20,
    why="Position tables are learnt for one grid. Another resolution, or a photo that is not square, needs another.",
    hints=[
        "Set the prefix positions aside first: [CLS] has no place on the image.",
        "F.interpolate wants an image: (1, D, rows, columns). Sizes are given as (rows, columns).",
        "F.interpolate(..., mode='bicubic', antialias=True), back to a sequence, and the prefix in front again.",
    ],
    exempt={
        "batch": "there is one table for all images",
        "integers": "positions are learnt numbers, not pixels",
    },
)
def resize_pos_embed(rng):
    yield call(rng.normal(1, 1 + 4 * 4, 6), (4, 4), (6, 5), 1)
    yield call(rng.normal(1, 11 * 5, 4), (11, 5), (15, 3), 0).on("positions without a prefix")
    yield call(rng.normal(1, 2 + 8 * 6, 3), (8, 6), (3, 4), 2).on("a smaller grid and two prefix tokens")


def _resized(pos_embed, old_grid, new_grid, prefix, pattern="1 (h w) d -> 1 d h w", mode="bicubic", **options):
    options = {"antialias": mode == "bicubic", **options}
    grid = rearrange(pos_embed[:, prefix:], pattern, h=old_grid[0])
    grid = F.interpolate(grid, size=tuple(new_grid), mode=mode, **options)
    return torch.cat([pos_embed[:, :prefix], rearrange(grid, "1 d h w -> 1 (h w) d")], dim=1)


def _catalogue_resizing(key, message, **options):
    resize_pos_embed.mistake(key, message, lambda pos, old, new, prefix=0: _resized(pos, old, new, prefix, **options))


_catalogue_resizing("bilinear", "this is bilinear; pretrained models expect bicubic", mode="bilinear", antialias=True)
_catalogue_resizing("nearest", "each new place copies its nearest old one, so neighbours become equal", mode="nearest")
_catalogue_resizing(
    "align-corners",
    "the corners are aligned, without antialiasing: that pins the centres of the outer patches, and shifts all others",
    align_corners=True,
    antialias=False,
)
_catalogue_resizing(
    "align-corners-antialiased",
    "the corners are aligned: that treats a patch as a point, not as an area, and its code moves away from its place",
    align_corners=True,
)
_catalogue_resizing(
    "no-antialias",
    "this is bicubic without antialiasing, which production models have: on a smaller grid positions are skipped",
    antialias=False,
)


@resize_pos_embed.mistake("transposed", "rows and columns are exchanged on the way, which square grids would hide")
def _(pos, old, new, prefix=0):
    grid = rearrange(pos[:, prefix:], "1 (w h) d -> 1 d h w", h=old[0])
    grid = F.interpolate(grid, size=tuple(new), mode="bicubic", antialias=True)
    return torch.cat([pos[:, :prefix], rearrange(grid, "1 d h w -> 1 (w h) d")], dim=1)


@resize_pos_embed.mistake(
    "one-dimensional", "the sequence is stretched as if it were a line: a patch's upper and lower neighbours are lost"
)
def _(pos, old, new, prefix=0):
    line = F.interpolate(pos[:, prefix:].transpose(1, 2), size=new[0] * new[1], mode="linear")
    return torch.cat([pos[:, :prefix], line.transpose(1, 2)], dim=1)


@resize_pos_embed.mistake("prefix-last", "the prefix ends up behind the patches")
def _(pos, old, new, prefix=0):
    out = _resized(pos, old, new, prefix)
    return torch.cat([out[:, prefix:], out[:, :prefix]], dim=1)


@resize_pos_embed.mistake("prefix-lost", "the positions of the prefix tokens are gone")
def _(pos, old, new, prefix=0):
    return _resized(pos, old, new, prefix)[:, prefix:]
