"""Answers to `dense_prediction.UpBlock`."""

import torch
import torch.nn.functional as F
from einops import pack
from torch import nn

from mistakes import collect
from vitcourse.dense_prediction.unet import ConvBlock

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("dense_prediction.UpBlock")


def block(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Up(nn.Module):
        def __init__(self, in_channels, channels, skip_channels):
            super().__init__()
            self.skips = skip_channels > 0
            self.reduce = nn.Conv2d(in_channels, channels, 1)
            self.block = ConvBlock(channels + skip_channels, channels)

    Up.forward, Up.__name__ = forward, forward.__name__
    return Up


def bilinear(x, skip):
    return nn.Upsample(tuple(skip.shape[2:]), mode="bilinear", align_corners=False)(x)


@variant("nearest")
@block
def default_mode(self, x, skip):
    x = nn.Upsample(tuple(skip.shape[2:]))(self.reduce(x))
    return self.block(torch.cat((x, skip), 1)) if self.skips else self.block(x)


@variant("align-corners")
@block
def aligned(self, x, skip):
    x = nn.Upsample(tuple(skip.shape[2:]), mode="bilinear", align_corners=True)(self.reduce(x))
    return self.block(torch.cat((x, skip), 1)) if self.skips else self.block(x)


@variant("skip-first")
@block
def exchanged(self, x, skip):
    x = self.reduce(bilinear(x, skip))
    return self.block(torch.cat((skip, x), 1)) if self.skips else self.block(x)


@variant("skip-blank")
@block
def zeros_beside(self, x, skip):
    x = self.reduce(bilinear(x, skip))
    return self.block(torch.cat((x, torch.zeros_like(skip)), 1)) if self.skips else self.block(x)


@variant("below-blank")
@block
def zeros_below(self, x, skip):
    x = self.reduce(bilinear(x, skip))
    return self.block(torch.cat((torch.zeros_like(x), skip), 1)) if self.skips else self.block(x)


@variant("detached")
@block
def no_way_back(self, x, skip):
    x = self.reduce(bilinear(x, skip))
    skip = skip.clone().detach()
    return self.block(torch.cat((x, skip), 1)) if self.skips else self.block(x)


@variant("too-small")
@block
def shrinks(self, x, skip):
    skip = bilinear(skip, x)
    return self.block(torch.cat((self.reduce(x), skip), 1)) if self.skips else self.block(self.reduce(x))


@unknown
@block
def bicubic(self, x, skip):
    x = F.interpolate(self.reduce(x), skip.shape[2:], mode="bicubic")
    return self.block(torch.cat((x, skip), 1)) if self.skips else self.block(x)


@unknown
@block
def doubled(self, x, skip):
    x = F.interpolate(self.reduce(x), scale_factor=2, mode="bilinear")
    return self.block(torch.cat((x, skip), 1)) if self.skips else self.block(x)


@unknown
@block
def residual(self, x, skip):
    x = F.interpolate(self.reduce(x), skip.shape[2:], mode="bilinear")
    return x + self.block(torch.cat((x, skip), 1)) if self.skips else self.block(x)


@right
@block
def enlarges_first(self, x, skip):
    x = self.reduce(bilinear(x, skip))
    if self.skips:
        x, _ = pack([x, skip], "b * h w")
    return self.block(x)


@right
@block
def layer_by_layer(self, x, skip):
    joined = [F.interpolate(self.reduce(x), size=tuple(skip.size()[2:]), mode="bilinear"), skip]
    out = torch.cat(joined[: 1 + self.skips], dim=1)
    for layer in self.block:
        out = layer(out)
    return out


@right
@block
def with_interpolation_matrices(self, x, skip):
    """Bilinear interpolation is linear in each axis: a matrix for the rows, one for the columns."""

    def matrix(n, m):
        eye = torch.eye(n, dtype=x.dtype)[None]
        return F.interpolate(eye, m, mode="linear")[0]  # (n, m)

    up = torch.einsum("bchw,hi,wj->bcij", self.reduce(x), *map(matrix, x.shape[2:], skip.shape[2:]))
    return self.block(torch.cat([up, skip], 1) if self.skips else up)
