"""Answers to `vit.Block`."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mistakes import collect
from vitcourse import vit
from vitcourse.layers import Mlp

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("vit.Block")


def block(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Block(nn.Module):
        def __init__(self, dim, num_heads, mlp_ratio=4.0):
            super().__init__()
            self.norm1 = nn.LayerNorm(dim, eps=1e-6)
            self.attn = vit.Attention(dim, num_heads)
            self.norm2 = nn.LayerNorm(dim, eps=1e-6)
            self.mlp = Mlp(dim, int(dim * mlp_ratio))

    Block.forward, Block.__name__ = forward, forward.__name__
    return Block


@variant("post-norm")
@block
def as_in_2017(self, x, grid=None):
    for norm, branch in [(self.norm1, self.attn), (self.norm2, self.mlp)]:
        x = norm(torch.add(x, branch(x)))
    return x


@variant("no-residual")
@block
def a_plain_chain(self, x, grid=None):
    return nn.Sequential(self.norm1, self.attn, self.norm2, self.mlp)(x)


@variant("normed-residual")
@block
def normed_tokens_kept(self, x, grid=None):
    normed = self.norm1(x)
    x = normed + self.attn(normed)
    normed = self.norm2(x)
    return normed + self.mlp(normed)


@variant("one-norm")
@block
def copied_line(self, x, grid=None):
    for branch in (self.attn, self.mlp):
        x = x + branch(F.layer_norm(x, x.shape[-1:], self.norm1.weight, self.norm1.bias, 1e-6))
    return x


@variant("parallel")
@block
def both_branches_of_the_input(self, x, grid=None):
    attended = self.attn(self.norm1(x))
    processed = self.mlp(self.norm2(x))
    return torch.stack([x, attended, processed]).sum(0)


@variant("mlp-unnormed")
@block
def norm_forgotten_in_step_two(self, x, grid=None):
    x = self.attn(self.norm1(x)) + x
    hidden = F.gelu(self.mlp.fc1(x))
    return self.mlp.fc2(hidden) + x


@unknown
@block
def norms_exchanged(self, x, grid=None):
    x = x + self.attn(self.norm2(x))
    return x + self.mlp(self.norm1(x))


@unknown
@block
def mlp_first(self, x, grid=None):
    x = x + self.mlp(self.norm2(x))
    return x + self.attn(self.norm1(x))


@variant("first-step-lost")
@block
def second_step_forgets_the_first(self, x, grid=None):
    y = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(y))


@unknown
@block
def only_the_last_step_adds(self, x, grid=None):
    x = self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


@unknown
@block
def attention_unnormed(self, x, grid=None):
    x = x + self.attn(x)
    return x + self.mlp(self.norm2(x))


@unknown
@block
def one_norm_in_parallel(self, x, grid=None):
    normed = self.norm1(x)
    return x + self.attn(normed) + self.mlp(normed)


@unknown
@block
def relu(self, x, grid=None):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp.fc2(F.relu(self.mlp.fc1(self.norm2(x))))


@unknown
@block
def added_in_place(self, x, grid=None):
    x += self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


@unknown
class SixfoldMlp(nn.Module):
    """A constructor that ignores the ratio asked for."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = vit.Attention(dim, num_heads)
        self.mlp = Mlp(dim, 6 * dim)

    def forward(self, x, grid=None):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@right
@block
def two_steps_in_a_loop(self, x, grid=None):
    for norm, branch in ((self.norm1, self.attn), (self.norm2, self.mlp)):
        x = branch(norm(x)) + x
    return x


@right
@block
def norms_and_mlp_by_hand(self, x, grid=None):
    def normalise(x, norm):
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias

    attended = self.attn(normalise(x, self.norm1))
    hidden = self.mlp.fc1(normalise(x + attended, self.norm2))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + attended + self.mlp.fc2(hidden)


@unknown
@block
def dropout_on_each_branch(self, x, grid=None):
    x = x + F.dropout(self.attn(self.norm1(x)), 0.1, self.training)
    return x + F.dropout(self.mlp(self.norm2(x)), 0.1, self.training)


@unknown
class MlpOfOneWidth(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = vit.Attention(dim, num_heads), Mlp(dim, 4 * dim)

    def forward(self, x, grid=None):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@unknown
class AnEpsilonForLargeTokens(vit.Block):
    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__(dim, num_heads, mlp_ratio)
        self.norm1.eps = self.norm2.eps = 1.2e-6
