"""The check of `vit.sincos_2d`."""

import torch
from einops import rearrange

from vitcourse.course.checks import call, check


@check(
    "vit.sincos_2d",
    reference="vitcourse.vit.sincos_2d",
    level=3,
    minutes=20,
    why="Attention does not see order. A position code gives each token its place, and near places similar codes.",
    hints=[
        "Half of the channels say the column, half the row; each half is sines, then cosines. How many frequencies is that?",
        "The frequencies fall from 1 towards 1/10 000: 10000 ** (-i / n) for i = 0 … n − 1, with n frequencies.",
        "torch.meshgrid(..., indexing='ij') gives the row and the column of each patch; an outer product with the "
        "frequencies gives the angles.",
    ],
    tolerance=1e-4,
)
def sincos_2d(rng):
    yield call(3, 5, 16)
    yield call(4, 1, 8).on("a single column")
    yield call(2, 7, 24).on("a wide grid")


def _sincos(h, w, dim, *, frequencies=None, temperature=10000.0, layout="xy wave n", order="xxyy"):
    n = dim // 4
    omega = temperature ** -(torch.arange(n) / (frequencies or n))
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    x, y = columns.reshape(-1, 1) * omega, rows.reshape(-1, 1) * omega
    if order == "yyxx":
        x, y = y, x
    parts = torch.stack([x.sin(), x.cos(), y.sin(), y.cos()]).unflatten(0, (2, 2))
    return rearrange(parts, f"xy wave place n -> place ({layout})")


sincos_2d.mistake(
    "rows-first",
    "rows and columns are exchanged: the first half of the channels should tell the column",
    lambda h, w, dim: _sincos(h, w, dim, order="yyxx"),
)
sincos_2d.mistake(
    "wrong-exponent",
    "the frequencies fall too slowly: the exponent is divided by the number of all channels, and never comes near 1",
    lambda h, w, dim: _sincos(h, w, dim, frequencies=dim),
)
sincos_2d.mistake(
    "one-dimensional-exponent",
    "the exponent is the one for text, which has one axis; here two axes share the channels, so each has fewer frequencies",
    lambda h, w, dim: _sincos(h, w, dim, frequencies=dim // 2),
)
sincos_2d.mistake(
    "interleaved",
    "the values are right, but the four kinds of channel take turns: each kind should stand in one stretch",
    lambda h, w, dim: _sincos(h, w, dim, layout="n xy wave"),
)
sincos_2d.mistake(
    "alternating",
    "the sines and cosines of an axis take turns, as in many codes for text; here they stand in two stretches",
    lambda h, w, dim: _sincos(h, w, dim, layout="xy n wave"),
)
sincos_2d.mistake(
    "same-frequency",
    "all channels have one frequency, so patches a period apart get almost the same code: where is the geometric series?",
    lambda h, w, dim: _sincos(h, w, dim, temperature=1.0),
)


@sincos_2d.mistake(
    "running-number",
    "this is the one-dimensional code of the running number of a patch: it does not know what lies above and below",
)
def _(h, w, dim):
    omega = 10000.0 ** -(torch.arange(dim // 2) / (dim // 2))
    angle = torch.arange(h * w)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


@sincos_2d.mistake(
    "column-major",
    "the codes follow each other down the columns; tokens are read row by row (is it indexing='xy'?)",
)
def _(h, w, dim):
    return rearrange(_sincos(h, w, dim), "(h w) d -> (w h) d", h=h)
