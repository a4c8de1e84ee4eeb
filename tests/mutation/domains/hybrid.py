"""Lesson 02: stems, blocks and models in training and evaluation mode, by turns too: batch norm keeps what it saw."""

import math
from functools import partial

import torch
from torch import Tensor

from vitcourse.course.cases import Case, build, call

from ..domain import Draws, domain


def modes(rng: Draws, module: object, calls: int) -> list:
    """The module as it is set for each call, in training mode or not; training comes first where there are both."""
    trained = rng.size(0, calls)
    return [module.train()] * trained + [module] * (calls - trained)


@domain("hybrid.ConvStem")
def conv_stem(rng: Draws) -> list[Case]:
    patch, channels = rng.choice([2, 4, 8]), rng.size(1, 4)
    module = build(patch, channels, patch // 2 * rng.size(1, 5))
    return [
        mode.call(rng.floats(rng.size(2, 4), channels, patch * rng.size(1, 3), patch * rng.size(1, 3)))
        for mode in modes(rng, module, rng.size(1, 3))
    ]


@domain("hybrid.SqueezeExcite")
def squeeze_excite(rng: Draws) -> list[Case]:
    dim = rng.size(1, 8)
    module = build(dim, rng.size(1, 6))
    maps = ((rng.size(1, 4), dim, rng.size(1, 7), rng.size(1, 7)) for _ in range(3))
    spread = rng.spread(1.0, 1.0, 10.0)
    return [mode.call(rng.floats(*next(maps), spread=spread)) for mode in modes(rng, module, rng.size(1, 3))]


@domain("hybrid.MBConv")
def mbconv(rng: Draws) -> list[Case]:
    dim, out, stride = rng.size(1, 6), rng.size(1, 9), rng.size(1, 2)
    out = dim if rng.sometimes(0.3) else out
    more = {} if rng.sometimes(0.3) else {"downsample": rng.choice(["expand", "depthwise"])}
    module = build(dim, out, stride, **more)
    return [
        mode.call(rng.floats(rng.size(2, 4), dim, stride * rng.size(1, 4), stride * rng.size(1, 4)))
        for mode in modes(rng, module, rng.size(1, 3))
    ]


def map_size(rng: Draws, most: int) -> tuple[int, int]:
    """Rows and columns. To one column PyTorch 2.14 interpolates wrongly with antialias=True: every row is the first."""
    return rng.size(1, most), rng.size(2, most)


@domain("hybrid.resize_bias_table")
def resize_bias_table(rng: Draws) -> Case:
    old, new = map_size(rng, 6), map_size(rng, 8)
    new = old if rng.sometimes(0.15) else new
    return call(rng.floats((2 * old[0] - 1) * (2 * old[1] - 1), rng.size(1, 5)), old, new)


@domain("hybrid.RelativeAttention")
def relative_attention(rng: Draws) -> list[Case]:
    heads, grid = rng.size(1, 4), map_size(rng, 5)
    dim = heads * rng.size(1, 5)
    wide = rng.size(1, 8) if rng.sometimes(0.5) else None
    module = build(dim, heads, grid_size=grid, **({} if wide is None else {"in_dim": wide}))
    module = module.train() if rng.sometimes(0.5) else module
    grids = [grid if rng.sometimes(0.4) else map_size(rng, 6) for _ in range(rng.size(1, 3))]
    return [module.call(rng.floats(rng.size(1, 3), h * w, wide or dim), (h, w, 0)) for h, w in grids]


@domain("hybrid.CoAtNet")
def coatnet(rng: Draws) -> list[Case]:
    stages, head_dim, stem_stride, channels = rng.size(1, 4), rng.choice([2, 3, 4]), rng.size(1, 2), rng.size(1, 3)
    strides = tuple(rng.size(1, 2) for _ in range(stages))
    stride = stem_stride * math.prod(strides)
    side = stride * rng.size(1, 2)
    module = build(
        img_size=side,
        in_chans=channels,
        num_classes=rng.size(1, 5),
        stem_dim=rng.size(2, 5),
        embed_dim=tuple(head_dim * rng.size(1, 3) for _ in range(stages)),
        depths=tuple(rng.size(1, 3) for _ in range(stages)),
        layout="".join(rng.choice("CT") for _ in range(stages)),
        stem_stride=stem_stride,
        strides=strides,
        head_dim=head_dim,
        downsample=rng.choice(["expand", "depthwise"]),
    )
    calls = modes(rng, module, rng.size(1, 2))
    sizes = [(side, side)] + [(stride * rng.size(1, 2), stride * rng.size(1, 2)) for _ in calls[1:]]
    return [mode.call(rng.floats(rng.size(2, 3), channels, *size)) for mode, size in zip(calls, sizes, strict=True)]


def answers_by_place(weights: Tensor, images: Tensor) -> Tensor:
    """A model that minds where things are."""
    return images.flatten(1) @ weights


def answers_by_colour(weights: Tensor, images: Tensor) -> Tensor:
    """A model that minds little."""
    return images.mean(dim=(2, 3)) @ weights


@domain("hybrid.shift_consistency")
def shift_consistency(rng: Draws) -> Case:
    b, c, h, w = rng.size(1, 8), rng.size(1, 3), rng.size(2, 9), rng.size(2, 9)
    by_place = rng.sometimes(0.7)
    weights = rng.normal(c * h * w if by_place else c, rng.size(2, 6), dtype=rng.dtype)
    images = torch.randn(b, c, h, w, generator=rng.generator, dtype=rng.dtype)
    model = partial(answers_by_place if by_place else answers_by_colour, weights)
    return call(model, images, rng.size(1, min(h, w) - 1))
