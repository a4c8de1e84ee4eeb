"""Answers to `hybrid.RelativeAttention`."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mistakes import collect

from ._shared import heads_of, offsets
from .resize_bias_table import resized_by_matrices

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hybrid.RelativeAttention")


def mixer(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Mixer(nn.Module):
        def __init__(self, dim, num_heads, *, grid_size, in_dim=None):
            super().__init__()
            self.num_heads, self.grid_size = num_heads, grid_size
            self.qkv = nn.Linear(in_dim or dim, 3 * dim)
            self.proj = nn.Linear(dim, dim)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(offsets(grid_size)), num_heads))

    Mixer.forward, Mixer.__name__ = forward, forward.__name__
    return Mixer


def places(size):
    return torch.tensor([(i, j) for i in range(size[0]) for j in range(size[1])])


def bias_of(self, grid):
    """(heads, N, N), by way of a map of offsets that is indexed with two numbers."""
    h, w, _ = grid
    table = resized_by_matrices(self.relative_position_bias_table, self.grid_size, (h, w)).unflatten(0, offsets((h, w)))
    away = places((h, w))[:, None] - places((h, w))[None]
    return table[away[..., 0] + h - 1, away[..., 1] + w - 1].permute(2, 0, 1)


def joined(self, out):
    return self.proj(out.transpose(1, 2).flatten(2))


def fused(self, x, bias, scale=None):
    q, k, v = heads_of(self, x)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)


@variant("no-bias")
@mixer
def places_unknown(self, x, grid):
    return joined(self, F.scaled_dot_product_attention(*heads_of(self, x)))


@variant("bias-after-softmax")
@mixer
def two_sums(self, x, grid):
    q, k, v = heads_of(self, x)
    return joined(self, F.scaled_dot_product_attention(q, k, v) + bias_of(self, grid) @ v)


@variant("bias-scaled")
@mixer
def scaled_together(self, x, grid):
    d = self.proj.in_features // self.num_heads
    return joined(self, fused(self, x, bias_of(self, grid) / math.sqrt(d)))


@variant("bias-transposed")
@mixer
def key_before_query(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid).transpose(1, 2)))


@variant("bias-multiplied")
@mixer
def as_a_gate(self, x, grid):
    q, k, v = heads_of(self, x)
    weights = torch.softmax(torch.mul(q @ k.mT / math.sqrt(q.shape[-1]), bias_of(self, grid)), dim=-1)
    return joined(self, weights @ v)


@variant("softmax-over-queries")
@mixer
def axis_two(self, x, grid):
    q, k, v = heads_of(self, x)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias_of(self, grid)
    weights = (scores - scores.logsumexp(2, keepdim=True)).exp()
    return joined(self, weights @ v)


@variant("no-scale")
@mixer
def scale_of_one(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid), scale=1.0))


@variant("scale-of-all-heads")
@mixer
def root_of_dim(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid), scale=self.proj.in_features**-0.5))


@variant("heads-outermost")
@mixer
def chunked_inside_each_head(self, x, grid):
    q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
    return joined(self, F.scaled_dot_product_attention(q, k, v, attn_mask=bias_of(self, grid)))


@variant("no-projection")
@mixer
def projection_forgotten(self, x, grid):
    return torch.cat(fused(self, x, bias_of(self, grid)).unbind(1), dim=-1)


@unknown
@mixer
def one_bias_for_all_heads(self, x, grid):
    return joined(self, fused(self, x, 2 * bias_of(self, grid).mean(0, keepdim=True) + 0.3 * bias_of(self, grid)))


@unknown
@mixer
def rows_and_columns_apart(self, x, grid):
    """A bias of the row and one of the column, added, in place of one for each offset."""
    bias = bias_of(self, grid).unflatten(1, grid[:2]).unflatten(3, grid[:2])  # H, i, j, k, l
    both = bias[:, :, :1, :, :1] + bias[:, :1, :, :1, :]
    return joined(self, fused(self, x, both.flatten(3, 4).flatten(1, 2)))


@unknown
@mixer
def heads_interleaved(self, x, grid):
    return self.proj(fused(self, x, bias_of(self, grid)).permute(0, 2, 3, 1).flatten(2))


@unknown
@mixer
def residual_inside(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid))) + self.qkv(x).chunk(3, -1)[2]


@unknown
@mixer
def table_cut_off(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid).detach()))


@right
@mixer
def fused_with_a_mask(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid)))


@right
@mixer
def query_by_query(self, x, grid):
    q, k, v = heads_of(self, x)
    bias, rows = bias_of(self, grid), []
    for i in range(x.shape[1]):
        scores = torch.einsum("bhd,bhnd->bhn", q[:, :, i], k) / np.sqrt(q.shape[-1]) + bias[:, i]
        rows.append(torch.einsum("bhn,bhnd->bhd", F.softmax(scores, -1), v).flatten(1))
    return self.proj(torch.stack(rows, dim=1))


@unknown
@mixer
def bias_of_the_first_map(self, x, grid):
    if not hasattr(self, "bias"):
        self.bias = bias_of(self, grid)
    q, k, v = heads_of(self, x)
    weights = (q @ k.mT / math.sqrt(q.shape[-1]) + self.bias).softmax(-1)
    return self.proj((weights @ v).transpose(1, 2).flatten(2))
