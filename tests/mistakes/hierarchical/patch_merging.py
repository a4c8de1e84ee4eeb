"""Answers to `hierarchical.PatchMerging`."""

import torch
import torch.nn.functional as F
from torch import nn

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hierarchical.PatchMerging")


def merging(gather):
    """The lesson's class, with the learner's way of gathering neighbours."""

    class Merging(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.norm = nn.LayerNorm(4 * dim)
            self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

        def forward(self, x):
            return self.reduction(self.norm(gather(x)))

    Merging.__name__ = gather.__name__
    return Merging


def padded(x):
    b, h, w, c = x.shape
    out = x.new_zeros(b, h + h % 2, w + w % 2, c)
    out[:, :h, :w] = x
    return out


def quarters(x):
    """Top left, bottom left, top right, bottom right."""
    return [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]


@variant("reading-order")
@merging
def row_by_row(x):
    x = padded(x)
    return torch.cat([x[:, 0::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 0::2], x[:, 1::2, 1::2]], dim=-1)


@variant("channels-outermost")
@merging
def stacked_behind_the_channels(x):
    return torch.stack(quarters(padded(x)), dim=-1).flatten(3)


@variant("distant-tokens")
@merging
def four_quarters_of_the_map(x):
    x = padded(x)
    return torch.cat([half for side in x.chunk(2, dim=2) for half in side.chunk(2, dim=1)], dim=-1)


@variant("odd-cropped")
@merging
def unfolded_without_padding(x):
    windows = x.unfold(1, 2, 2).unfold(2, 2, 2)  # b h w c p q
    return windows.permute(0, 1, 2, 5, 4, 3).flatten(3)


@variant("padded-in-front")
@merging
def zeros_on_the_left(x):
    return torch.cat(quarters(padded(x.flip(1, 2)).flip(1, 2)), dim=-1)


@variant("no-norm")
class Unnormed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        return F.linear(torch.cat(quarters(padded(x)), dim=-1), self.reduction.weight)


@variant("norm-of-the-result")
class NormLast(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x):
        return self.norm(self.reduction(torch.cat(quarters(padded(x)), dim=-1)))


@variant("with-bias")
class Biased(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim)

    def forward(self, x):
        return self.reduction(self.norm(torch.cat(quarters(padded(x)), dim=-1)))


@unknown
@merging
def right_column_first(x):
    return torch.cat(quarters(padded(x))[::-1], dim=-1)


@unknown
@merging
def averaged_four_times(x):
    mean = torch.stack(quarters(padded(x))).mean(0)
    return torch.cat([mean] * 4, dim=-1)


@unknown
@merging
def padded_with_the_border(x):
    x = F.pad(x.movedim(-1, 1), (0, x.shape[2] % 2, 0, x.shape[1] % 2), mode="replicate").movedim(1, -1)
    return torch.cat(quarters(x), dim=-1) * torch.linspace(1, 2, 4 * x.shape[-1], dtype=x.dtype)


@unknown
@merging
def reading_order_and_cropped(x):
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=-1)


@unknown
@merging
def neighbours_cut_off(x):
    return torch.cat(quarters(padded(x.detach())), dim=-1)


@right
@merging
def as_the_authors_write_it(x):
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    return torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)


@right
@merging
def reshaped(x):
    x = padded(x)
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
