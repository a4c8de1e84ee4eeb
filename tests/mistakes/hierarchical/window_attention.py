"""Answers to `hierarchical.WindowAttention`."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mistakes import collect
from vitcourse.hierarchical import (
    WindowAttention,
    relative_position_index,
    shift_mask,
    window_partition,
    window_reverse,
)

from .relative_position_index import authors_code
from .shift_mask import nine_slices
from .window_partition import permuted
from .window_reverse import pasted, permuted_back

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hierarchical.WindowAttention")


def mixer(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Mixer(nn.Module):
        def __init__(self, dim, num_heads, window_size=7, shift_size=0):
            super().__init__()
            self.num_heads, self.window_size, self.shift_size = num_heads, window_size, shift_size
            self.qkv = nn.Linear(dim, 3 * dim)
            self.proj = nn.Linear(dim, dim)
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))

    Mixer.forward, Mixer.__name__ = forward, forward.__name__
    return Mixer


def bias_of(self):
    n = (self.window_size,) * 2
    return torch.stack([column[authors_code(n)] for column in self.relative_position_bias_table.T])


def to_windows(self, x, grid, direction=-1):
    h, w, _ = grid
    s = direction * self.shift_size
    rolled = torch.roll(x.view(len(x), h, w, -1), (s, s), (1, 2))
    return permuted(rolled, self.window_size)


def to_tokens(self, windows, grid, direction=1):
    s = direction * self.shift_size
    return torch.roll(permuted_back(windows, self.window_size, grid[:2]), (s, s), (1, 2)).flatten(1, 2)


def strangers(self, grid, batch):
    h, w, _ = grid
    mask = nine_slices((h, w), (self.window_size,) * 2, (self.shift_size,) * 2)
    return torch.cat([mask] * batch)[:, None]


def heads_of(self, windows):
    b, n, dim = windows.shape
    parts = self.qkv(windows).split(dim, dim=-1)
    return [part.view(b, n, self.num_heads, dim // self.num_heads).transpose(1, 2) for part in parts]


def side_by_side(heads):
    return torch.cat(heads.unbind(1), dim=-1)


def fused(self, windows, mask, bias=None, scale=None):
    q, k, v = heads_of(self, windows)
    bias = bias_of(self) if bias is None else bias
    scores = torch.where(mask, -math.inf, bias.to(q.dtype))
    return side_by_side(F.scaled_dot_product_attention(q, k, v, attn_mask=scores, scale=scale))


@variant("no-mask")
@mixer
def neighbours_all(self, x, grid):
    windows = to_windows(self, x, grid)
    out = fused(self, windows, torch.zeros_like(strangers(self, grid, len(x))))
    return to_tokens(self, self.proj(out), grid)


@variant("no-bias")
@mixer
def places_unknown(self, x, grid):
    windows = to_windows(self, x, grid)
    out = fused(self, windows, strangers(self, grid, len(x)), torch.zeros(1))
    return to_tokens(self, self.proj(out), grid)


@variant("not-rolled-back")
@mixer
def left_where_they_were_rolled(self, x, grid):
    out = self.proj(fused(self, to_windows(self, x, grid), strangers(self, grid, len(x))))
    return pasted(out, self.window_size, grid[:2]).flatten(1, 2)


@variant("rolled-the-wrong-way")
@mixer
def plus_first_minus_last(self, x, grid):
    out = fused(self, to_windows(self, x, grid, +1), strangers(self, grid, len(x)))
    return to_tokens(self, self.proj(out), grid, -1)


@variant("not-rolled")
@mixer
def mask_without_a_roll(self, x, grid):
    windows = permuted(x.unflatten(1, grid[:2]), self.window_size)
    out = self.proj(fused(self, windows, strangers(self, grid, len(x))))
    return permuted_back(out, self.window_size, grid[:2]).flatten(1, 2)


@variant("masked-after-softmax")
@mixer
def weights_multiplied_by_zero(self, x, grid):
    q, k, v = heads_of(self, to_windows(self, x, grid))
    weights = F.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + bias_of(self), dim=-1)
    out = (weights * strangers(self, grid, len(x)).logical_not()) @ v
    return to_tokens(self, self.proj(side_by_side(out)), grid)


@variant("masks-in-the-wrong-order")
@mixer
def each_mask_repeated_for_the_batch(self, x, grid):
    mask = strangers(self, grid, 1).expand(-1, len(x), -1, -1).flatten(0, 1)[:, None]
    out = fused(self, to_windows(self, x, grid), mask)
    return to_tokens(self, self.proj(out), grid)


@variant("bias-transposed")
@mixer
def key_before_query(self, x, grid):
    bias = self.relative_position_bias_table[authors_code((self.window_size,) * 2)].permute(2, 1, 0)
    out = fused(self, to_windows(self, x, grid), strangers(self, grid, len(x)), bias)
    return to_tokens(self, self.proj(out), grid)


@variant("no-scale")
@mixer
def scale_of_one(self, x, grid):
    out = fused(self, to_windows(self, x, grid), strangers(self, grid, len(x)), scale=1.0)
    return to_tokens(self, self.proj(out), grid)


@variant("heads-outermost")
@mixer
def chunked_inside_each_head(self, x, grid):
    windows = to_windows(self, x, grid)
    q, k, v = self.qkv(windows).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias_of(self)
    out = scores.masked_fill(strangers(self, grid, len(x)), -math.inf).softmax(-1) @ v
    return to_tokens(self, self.proj(side_by_side(out)), grid)


@variant("no-projection")
@mixer
def projection_forgotten(self, x, grid):
    return to_tokens(self, fused(self, to_windows(self, x, grid), strangers(self, grid, len(x))), grid)


@unknown
@mixer
def global_attention(self, x, grid):
    q, k, v = heads_of(self, x)
    return self.proj(side_by_side(F.scaled_dot_product_attention(q, k, v)))


@unknown
@mixer
def neither_mask_nor_bias(self, x, grid):
    q, k, v = heads_of(self, to_windows(self, x, grid))
    return to_tokens(self, self.proj(side_by_side(F.scaled_dot_product_attention(q, k, v))), grid)


@unknown
@mixer
def mask_of_ten(self, x, grid):
    q, k, v = heads_of(self, to_windows(self, x, grid))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias_of(self) - 1.0 * strangers(self, grid, len(x))
    return to_tokens(self, self.proj(side_by_side(scores.softmax(-1) @ v)), grid)


@unknown
@mixer
def residual_inside(self, x, grid):
    out = self.proj(fused(self, to_windows(self, x, grid), strangers(self, grid, len(x))))
    return x + to_tokens(self, out, grid)


@unknown
@mixer
def one_bias_for_all_heads(self, x, grid):
    bias = bias_of(self).mean(0, keepdim=True) * 2
    out = fused(self, to_windows(self, x, grid), strangers(self, grid, len(x)), bias)
    return to_tokens(self, self.proj(out), grid)


@unknown
@mixer
def table_cut_off(self, x, grid):
    out = fused(self, to_windows(self, x, grid), strangers(self, grid, len(x)), bias_of(self).detach())
    return to_tokens(self, self.proj(out), grid)


@right
@mixer
def fused_in_windows(self, x, grid):
    out = fused(self, to_windows(self, x, grid), strangers(self, grid, len(x)))
    return to_tokens(self, self.proj(out), grid)


@right
@mixer
def as_in_the_authors_repository(self, x, grid):
    """Mask of −∞ in an axis of its own, windows and batch split for the sum."""
    windows = to_windows(self, x, grid)
    q, k, v = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias_of(self).unsqueeze(0)
    mask = strangers(self, grid, 1).squeeze(1)
    extra = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(mask, -math.inf)
    scores = scores.unflatten(0, (len(x), len(mask))) + extra[None, :, None]
    out = scores.flatten(0, 1).softmax(-1) @ v
    return to_tokens(self, self.proj(out.transpose(1, 2).flatten(2)), grid)


@right
@mixer
def token_by_token(self, x, grid):
    """No windows at all: who is in my displaced window, and how far away?"""
    (h, w, _), p, s = grid, self.window_size, self.shift_size
    rows, columns = (t.flatten() for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    home = torch.stack([(rows - s).div(p, rounding_mode="floor"), (columns - s).div(p, rounding_mode="floor")])
    together = (home[:, :, None] == home[:, None]).all(0)
    down, across = rows[:, None] - rows + p - 1, columns[:, None] - columns + p - 1
    index = torch.where(together, down * (2 * p - 1) + across, 0)
    bias = self.relative_position_bias_table[index].permute(2, 0, 1).masked_fill(~together, -math.inf)
    q, k, v = heads_of(self, x)
    return self.proj(side_by_side(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


class Keeping(WindowAttention):
    """The library's, with what a learner keeps in ``kept``: square windows and shifts, whole maps."""

    def forward(self, x, grid):
        h, w, _ = grid
        p, s = self.window_size[0], self.shift_size[0]
        index, mask = relative_position_index((p, p)), shift_mask((h, w), (p, p), (s, s))
        bias = self.kept("bias", self.relative_position_bias_table[index].permute(2, 0, 1))
        mask = self.kept("mask", mask)
        x = window_partition(x.unflatten(1, (h, w)).roll((-s, -s), (1, 2)), p)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).unflatten(0, (-1, len(mask)))
        weights = scores.masked_fill(mask[:, None], -math.inf).softmax(-1).flatten(0, 1)
        x = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return window_reverse(x, p, (h, w)).roll((s, s), (1, 2)).flatten(1, 2)

    def kept(self, name, value):
        return value


@right
class NothingKept(Keeping):
    pass


@unknown
class MaskOfTheFirstMap(Keeping):
    def kept(self, name, value):
        if name == "mask":
            value = self.__dict__.setdefault(name, value)
        return value


@unknown
class BiasOfTheFirstStep(Keeping):
    def kept(self, name, value):
        if name == "bias":
            value = self.__dict__.setdefault(name, value)
        return value
