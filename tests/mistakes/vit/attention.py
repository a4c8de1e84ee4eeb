"""Answers to `vit.Attention`."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("vit.Attention")


def attention(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Attention(nn.Module):
        def __init__(self, dim, num_heads=8):
            super().__init__()
            self.num_heads = num_heads
            self.qkv = nn.Linear(dim, 3 * dim)
            self.proj = nn.Linear(dim, dim)

    Attention.forward, Attention.__name__ = forward, forward.__name__
    return Attention


def heads_of(self, x):
    """q, k and v, each (B, H, N, d)."""
    b, n, dim = x.shape
    parts = self.qkv(x).split(dim, dim=-1)
    return [part.view(b, n, self.num_heads, dim // self.num_heads).transpose(1, 2) for part in parts]


def side_by_side(heads):
    """(B, H, N, d) -> (B, N, H d)."""
    return torch.cat(heads.unbind(1), dim=-1)


def attend(q, k, v):
    return F.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v


@variant("no-scale")
@attention
def head_by_head_unscaled(self, x, grid=None):
    q, k, v = self.qkv(x).chunk(3, dim=-1)
    heads = [part.chunk(self.num_heads, dim=-1) for part in (q, k, v)]
    return self.proj(torch.cat([(a @ b.mT).softmax(-1) @ c for a, b, c in zip(*heads, strict=True)], dim=-1))


@variant("scale-by-dim")
@attention
def fused_with_the_wrong_scale(self, x, grid=None):
    out = F.scaled_dot_product_attention(*heads_of(self, x), scale=1 / math.sqrt(x.shape[-1]))
    return self.proj(side_by_side(out))


@variant("heads-outermost")
@attention
def chunked_inside_each_head(self, x, grid=None):
    b, n, _ = x.shape
    q, k, v = self.qkv(x).view(b, n, self.num_heads, -1).transpose(1, 2).chunk(3, dim=-1)
    return self.proj(side_by_side(attend(q, k, v)))


@variant("heads-interleaved")
@attention
def every_hth_channel(self, x, grid=None):
    q, k, v = self.qkv(x).chunk(3, dim=-1)
    h = self.num_heads
    heads = [attend(q[..., i::h], k[..., i::h], v[..., i::h]) for i in range(h)]
    return self.proj(torch.cat(heads, dim=-1))


@variant("careless-join")
@attention
def viewed_too_early(self, x, grid=None):
    out = F.scaled_dot_product_attention(*heads_of(self, x))
    return self.proj(out.contiguous().view(x.shape))


@variant("join-interleaved")
@attention
def heads_stacked_last(self, x, grid=None):
    heads = [attend(q, k, v) for q, k, v in zip(*(part.unbind(1) for part in heads_of(self, x)), strict=True)]
    return self.proj(torch.stack(heads, dim=-1).flatten(2))


@variant("no-projection")
@attention
def joined_and_done(self, x, grid=None):
    return F.scaled_dot_product_attention(*heads_of(self, x)).transpose(1, 2).flatten(2)


@variant("over-queries")
@attention
def softmax_over_rows(self, x, grid=None):
    q, k, v = heads_of(self, x)
    e = torch.exp(torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1]))
    return self.proj(side_by_side((e / e.sum(2, keepdim=True)) @ v))


@variant("keys-asked")
@attention
def keys_before_queries(self, x, grid=None):
    k, q, v = heads_of(self, x)
    return self.proj(side_by_side(attend(q, k, v)))


@unknown
@attention
def values_first(self, x, grid=None):
    v, q, k = heads_of(self, x)
    return self.proj(side_by_side(attend(q, k, v)))


@unknown
@attention
def mean_of_heads(self, x, grid=None):
    out = attend(*heads_of(self, x))
    return self.proj(side_by_side(out.mean(1, keepdim=True).expand_as(out)))


@unknown
@attention
def causal(self, x, grid=None):
    return self.proj(side_by_side(F.scaled_dot_product_attention(*heads_of(self, x), is_causal=True)))


@unknown
@attention
def residual_inside(self, x, grid=None):
    return x + self.proj(side_by_side(attend(*heads_of(self, x))))


@unknown
@attention
def unscaled_and_unprojected(self, x, grid=None):
    q, k, v = heads_of(self, x)
    return side_by_side((q @ k.mT).softmax(-1) @ v)


@unknown
@attention
def one_head_for_all(self, x, grid=None):
    return self.proj(attend(*self.qkv(x).chunk(3, dim=-1)))


@unknown
@attention
def weights_cut_off(self, x, grid=None):
    q, k, v = heads_of(self, x)
    with torch.no_grad():
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return self.proj(side_by_side(weights @ v))


@right
@attention
def fused(self, x, grid=None):
    b, n, dim = x.shape
    qkv = self.qkv(x).view(b, n, 3, self.num_heads, dim // self.num_heads)
    out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    return self.proj(out.transpose(1, 2).reshape(b, n, dim))


@right
@attention
def all_in_einsum(self, x, grid=None):
    q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
    weights = torch.einsum("bihd,bjhd->bijh", q, k).div(math.sqrt(q.shape[-1])).softmax(dim=2)
    return self.proj(torch.einsum("bijh,bjhd->bihd", weights, v).flatten(2))


@right
class SumOverHeads(nn.Module):
    """Each head has its own rows of qkv and columns of proj; the outputs of the heads add up."""

    def __init__(self, dim, num_heads=8):
        super().__init__()
        self.dim, self.width = dim, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, grid=None):
        out = self.proj.bias
        for start in range(0, self.dim, self.width):
            q, k, v = (
                F.linear(x, self.qkv.weight[i : i + self.width], self.qkv.bias[i : i + self.width])
                for i in range(start, 3 * self.dim, self.dim)
            )
            out = out + attend(q, k, v) @ self.proj.weight[:, start : start + self.width].T
        return out


@unknown
@attention
def dropout_on_the_weights(self, x, grid=None):
    q, k, v = heads_of(self, x)
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return self.proj(side_by_side(F.dropout(weights, 0.1, self.training) @ v))


@unknown
@attention
def buffer_of_the_first_call(self, x, grid=None):
    if not hasattr(self, "out"):
        self.out = torch.zeros_like(x)
    return self.proj(self.out + side_by_side(attend(*heads_of(self, x))))


@unknown
@attention
def weights_of_the_first_call(self, x, grid=None):
    if not hasattr(self, "kept"):
        self.kept = self.proj.weight.clone(), self.proj.bias.clone()
    return F.linear(side_by_side(attend(*heads_of(self, x))), *self.kept)
