"""Answers to the exercises of lesson 00, as learners write them: the proof that its checks diagnose rightly.

None of them knows the catalogue in ``checks/vit.py``: they reach the same numbers by other means.

* ``VARIANTS`` make a catalogued mistake, and have to be told that mistake.
* ``UNKNOWN`` are wrong in another way, and have to be rejected without a diagnosis.
* ``RIGHT`` are right, and have to be accepted.

Of a class the lesson gives ``__init__``, and the learner writes ``forward``; so do the answers here.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from mistakes_common import collect
from torch import nn

from vitcourse import vit
from vitcourse.layers import Mlp

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect()


# ---------------------------------------------------------------------------------------------------- image_to_patch

IMAGE = "vit.image_to_patch"


@variant(IMAGE, "column-major")
def columns_in_the_outer_loop(x, patch_size):
    p, tokens = patch_size, []
    for left in range(0, x.shape[3], p):
        for top in range(0, x.shape[2], p):
            tokens.append(x[:, :, top : top + p, left : left + p].permute(0, 2, 3, 1).flatten(1))
    return torch.stack(tokens, dim=1)


@variant(IMAGE, "channels-first")
def plain_unfold(x, patch_size):
    return F.unfold(x, patch_size, stride=patch_size).transpose(1, 2)


@variant(IMAGE, "transposed-patch")
def unfold_twice_and_swap(x, patch_size):
    windows = x.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # b c h w p1 p2
    return windows.permute(0, 2, 3, 5, 4, 1).flatten(3).flatten(1, 2)


@variant(IMAGE, "strided-pixels")
def every_nth_pixel(x, patch_size):
    rows, columns = x.shape[2] // patch_size, x.shape[3] // patch_size
    tokens = [x[:, :, i::rows, j::columns] for i in range(rows) for j in range(columns)]
    return torch.stack([token.movedim(1, -1).flatten(1) for token in tokens], dim=1)


@variant(IMAGE, "plain-reshape")
def equal_stretches(x, patch_size):
    count = x.shape[2] * x.shape[3] // patch_size**2
    return torch.stack(x.flatten(1).chunk(count, dim=1), dim=1)


@variant(IMAGE, "channels-last-reshape")
def channels_last_then_reshape(x, patch_size):
    count = x.shape[2] * x.shape[3] // patch_size**2
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], count, -1)


@unknown(IMAGE)
def columns_first_and_channels_first(x, patch_size):
    return F.unfold(x.mT, patch_size, stride=patch_size).transpose(1, 2)


@unknown(IMAGE)
def last_patches_dropped(x, patch_size):
    p, tokens = patch_size, []
    for top in range(0, x.shape[2] - p, p):
        for left in range(0, x.shape[3] - p, p):
            tokens.append(x[:, :, top : top + p, left : left + p].permute(0, 2, 3, 1).flatten(1))
    return torch.stack(tokens, dim=1)


@unknown(IMAGE)
def from_the_bottom_up(x, patch_size):
    return interleaved_unfold(x, patch_size).flip(1)


@unknown(IMAGE)
def cut_off_from_the_graph(x, patch_size):
    return interleaved_unfold(x.detach(), patch_size)


@unknown(IMAGE)
def image_centred_in_place(x, patch_size):
    tokens = interleaved_unfold(x, patch_size).clone()
    x -= 0.5
    return tokens


@right(IMAGE)
def interleaved_unfold(x, patch_size):
    stretches = F.unfold(x, patch_size, stride=patch_size)  # b (c p1 p2) n
    return stretches.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1).flatten(2)


@right(IMAGE)
def loop_over_patches(x, patch_size):
    p, (b, c, h, w) = patch_size, x.shape
    out = x.new_zeros(b, (h // p) * (w // p), p * p * c)
    for i in range(h // p):
        for j in range(w // p):
            patch = x[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p]
            out[:, i * (w // p) + j] = patch.permute(0, 2, 3, 1).reshape(b, -1)
    return out


@right(IMAGE)
def convolution_with_unit_kernels(x, patch_size):
    c, p = x.shape[1], patch_size
    kernels = torch.eye(p * p * c, dtype=x.dtype, device=x.device).view(-1, p, p, c).permute(0, 3, 1, 2)
    return F.conv2d(x, kernels, stride=p).flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------- sincos_2d

SINCOS = "vit.sincos_2d"


def angles(h, w, omega, first_row=0, first_column=0):
    """(h w, n) angles of the columns, and of the rows."""
    row = torch.arange(first_row, first_row + h).repeat_interleave(w)
    column = torch.arange(first_column, first_column + w).repeat(h)
    return torch.outer(column, omega), torch.outer(row, omega)


def frequencies(n):
    return torch.tensor([10000 ** (-i / n) for i in range(n)])


def four_stretches(x, y):
    return torch.hstack([torch.sin(x), torch.cos(x), torch.sin(y), torch.cos(y)])


@variant(SINCOS, "rows-first")
def one_code_at_a_time(h, w, dim):
    n, codes = dim // 4, []
    for row in range(h):
        for column in range(w):
            code = []
            for place in (row, column):
                code += [math.sin(place / 10000 ** (i / n)) for i in range(n)]
                code += [math.cos(place / 10000 ** (i / n)) for i in range(n)]
            codes.append(code)
    return torch.tensor(codes)


@variant(SINCOS, "wrong-exponent")
def exponent_over_all_channels(h, w, dim):
    omega = torch.exp(-math.log(10000) * torch.arange(dim // 4) / dim)
    return four_stretches(*angles(h, w, omega))


@variant(SINCOS, "one-dimensional-exponent")
def exponent_of_attention_is_all_you_need(h, w, dim):
    omega = 1 / 10000 ** (2 * torch.arange(dim // 4) / dim)
    return four_stretches(*angles(h, w, omega))


@variant(SINCOS, "interleaved")
def every_fourth_channel(h, w, dim):
    x, y = angles(h, w, frequencies(dim // 4))
    code = torch.zeros(h * w, dim)
    code[:, 0::4], code[:, 1::4], code[:, 2::4], code[:, 3::4] = x.sin(), x.cos(), y.sin(), y.cos()
    return code


@variant(SINCOS, "alternating")
def even_sines_odd_cosines(h, w, dim):
    code = torch.zeros(h * w, 2, dim // 2)
    for axis, angle in enumerate(angles(h, w, frequencies(dim // 4))):
        code[:, axis, 0::2] = torch.sin(angle)
        code[:, axis, 1::2] = torch.cos(angle)
    return code.flatten(1)


@variant(SINCOS, "same-frequency")
def copied_channels(h, w, dim):
    x, y = angles(h, w, torch.ones(1))
    return four_stretches(x, y).repeat_interleave(dim // 4, dim=1)


@variant(SINCOS, "running-number")
def sequence_code(h, w, dim):
    position = torch.arange(h * w).unsqueeze(1)
    angle = position / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.cat((torch.sin(angle), torch.cos(angle)), dim=-1)


@unknown(SINCOS)
def temperature_of_a_thousand(h, w, dim):
    return four_stretches(*angles(h, w, 1000 ** -(torch.arange(dim // 4) / (dim // 4))))


@unknown(SINCOS)
def counted_from_one(h, w, dim):
    return four_stretches(*angles(h, w, frequencies(dim // 4), 1, 1))


@unknown(SINCOS)
def cosines_first(h, w, dim):
    x, y = angles(h, w, frequencies(dim // 4))
    return torch.cat([x.cos(), x.sin(), y.cos(), y.sin()], dim=1)


@unknown(SINCOS)
def last_frequency_included(h, w, dim):
    return four_stretches(*angles(h, w, 10000 ** -torch.linspace(0, 1, dim // 4)))


@variant(SINCOS, "column-major")
def tokens_column_by_column(h, w, dim):
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="xy")
    omega = frequencies(dim // 4)
    return four_stretches(torch.outer(columns.flatten(), omega), torch.outer(rows.flatten(), omega))


@unknown(SINCOS)
def rows_first_and_text_exponent(h, w, dim):
    x, y = angles(h, w, 10000 ** (-2 * torch.arange(dim // 4) / dim))
    return four_stretches(y, x)


@right(SINCOS)
def written_out(h, w, dim):
    n = dim // 4
    code = torch.empty(h * w, dim)
    for token in range(h * w):
        row, column = divmod(token, w)
        for i in range(n):
            omega = 1 / 10000 ** (i / n)
            values = math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)
            code[token, i::n] = torch.tensor(values)
    return code


@right(SINCOS)
def each_axis_broadcast(h, w, dim):
    omega = torch.exp(torch.arange(dim // 4) * (-math.log(10000) / (dim // 4)))
    across = torch.einsum("x,n->xn", torch.arange(w).float(), omega)
    down = torch.einsum("y,n->yn", torch.arange(h).float(), omega)
    across = torch.cat([across.sin(), across.cos()], dim=1).expand(h, w, -1)
    down = torch.cat([down.sin(), down.cos()], dim=1)[:, None].expand(h, w, -1)
    return torch.cat([across, down], dim=-1).reshape(h * w, dim)


@right(SINCOS)
def in_numpy(h, w, dim):
    omega = np.logspace(0, -4, dim // 4, endpoint=False)
    y, x = np.indices((h, w)).reshape(2, -1, 1)
    code = np.concatenate([wave(place * omega) for place in (x, y) for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(code).float()


# -------------------------------------------------------------------------------------------------- attention_weights

WEIGHTS = "vit.attention_weights"


def dots(q, k):
    return torch.einsum("bhid,bhjd->bhij", q, k)


@variant(WEIGHTS, "no-scale")
def bare_dot_products(q, k):
    return F.softmax(dots(q, k), dim=3)


@variant(WEIGHTS, "scale-by-width")
def mean_of_products(q, k):
    return torch.softmax((q[:, :, :, None] * k[:, :, None]).mean(-1), -1)


@variant(WEIGHTS, "multiplied")
def times_the_root(q, k):
    return F.softmax(dots(q * math.sqrt(q.size(-1)), k), dim=-1)


@variant(WEIGHTS, "over-queries")
def columns_sum_to_one(q, k):
    e = torch.exp(dots(q, k) / math.sqrt(q.size(-1)))
    return e / e.sum(dim=2, keepdim=True)


@variant(WEIGHTS, "over-queries")
def keys_ask_queries(q, k):
    return (k @ q.mT / math.sqrt(q.size(-1))).softmax(-1).mT


@variant(WEIGHTS, "over-heads")
def heads_sum_to_one(q, k):
    e = torch.exp(dots(q, k) / math.sqrt(q.size(-1)))
    return e / e.sum(dim=1, keepdim=True)


@variant(WEIGHTS, "scale-after")
def divided_too_late(q, k):
    return torch.div(F.softmax(dots(q, k), -1), math.sqrt(k.shape[3]))


@variant(WEIGHTS, "no-softmax")
def scores_only(q, k):
    return torch.matmul(q, k.permute(0, 1, 3, 2)).div(math.sqrt(k.shape[3]))


@unknown(WEIGHTS)
def transposed_weights(q, k):
    return (k @ q.mT / math.sqrt(q.size(-1))).softmax(-1)


@unknown(WEIGHTS)
def softmax_of_negative_scores(q, k):
    return F.softmin(dots(q, k) / math.sqrt(q.size(-1)), dim=-1)


@unknown(WEIGHTS)
def magnitudes_normalised(q, k):
    scores = dots(q, k).abs()
    return scores / scores.sum(-1, keepdim=True)


@unknown(WEIGHTS)
def scaled_by_number_of_keys(q, k):
    return (dots(q, k) / math.sqrt(k.shape[2])).softmax(-1)


@unknown(WEIGHTS)
def over_queries_and_unscaled(q, k):
    return dots(q, k).softmax(-2)


@unknown(WEIGHTS)
def sigmoid_instead(q, k):
    return torch.sigmoid(dots(q, k) / math.sqrt(q.size(-1)))


@unknown(WEIGHTS)
def log_weights(q, k):
    return F.log_softmax(dots(q, k) / math.sqrt(q.size(-1)), dim=-1)


@unknown(WEIGHTS)
def queries_scaled_in_place(q, k):
    q /= math.sqrt(q.size(-1))
    return dots(q, k).softmax(-1)


@unknown(WEIGHTS)
def keys_cut_off(q, k):
    return (dots(q, k.detach()) / math.sqrt(q.size(-1))).softmax(-1)


@unknown(WEIGHTS)
def in_single_precision(q, k):
    return (dots(q.float(), k.float()) / math.sqrt(q.size(-1))).softmax(-1)


@right(WEIGHTS)
def exponentials_by_hand(q, k):
    scores = dots(q, k) / math.sqrt(q.size(-1))
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


@right(WEIGHTS)
def fused_attention_to_unit_vectors(q, k):
    values = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
    return F.scaled_dot_product_attention(q, k, values)


@right(WEIGHTS)
def query_by_query(q, k):
    rows = []
    for i in range(q.shape[2]):
        match = (q[:, :, i : i + 1] * k).sum(-1) * q.shape[-1] ** -0.5
        rows.append(F.softmax(match, dim=-1))
    return torch.stack(rows, dim=2)


# ---------------------------------------------------------------------------------------------------------- Attention

ATTENTION = "vit.Attention"


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


@variant(ATTENTION, "no-scale")
@attention
def head_by_head_unscaled(self, x, grid=None):
    q, k, v = self.qkv(x).chunk(3, dim=-1)
    heads = [part.chunk(self.num_heads, dim=-1) for part in (q, k, v)]
    return self.proj(torch.cat([(a @ b.mT).softmax(-1) @ c for a, b, c in zip(*heads, strict=True)], dim=-1))


@variant(ATTENTION, "scale-by-dim")
@attention
def fused_with_the_wrong_scale(self, x, grid=None):
    out = F.scaled_dot_product_attention(*heads_of(self, x), scale=1 / math.sqrt(x.shape[-1]))
    return self.proj(side_by_side(out))


@variant(ATTENTION, "heads-outermost")
@attention
def chunked_inside_each_head(self, x, grid=None):
    b, n, _ = x.shape
    q, k, v = self.qkv(x).view(b, n, self.num_heads, -1).transpose(1, 2).chunk(3, dim=-1)
    return self.proj(side_by_side(attend(q, k, v)))


@variant(ATTENTION, "heads-interleaved")
@attention
def every_hth_channel(self, x, grid=None):
    q, k, v = self.qkv(x).chunk(3, dim=-1)
    h = self.num_heads
    heads = [attend(q[..., i::h], k[..., i::h], v[..., i::h]) for i in range(h)]
    return self.proj(torch.cat(heads, dim=-1))


@variant(ATTENTION, "careless-join")
@attention
def viewed_too_early(self, x, grid=None):
    out = F.scaled_dot_product_attention(*heads_of(self, x))
    return self.proj(out.contiguous().view(x.shape))


@variant(ATTENTION, "join-interleaved")
@attention
def heads_stacked_last(self, x, grid=None):
    heads = [attend(q, k, v) for q, k, v in zip(*(part.unbind(1) for part in heads_of(self, x)), strict=True)]
    return self.proj(torch.stack(heads, dim=-1).flatten(2))


@variant(ATTENTION, "no-projection")
@attention
def joined_and_done(self, x, grid=None):
    return F.scaled_dot_product_attention(*heads_of(self, x)).transpose(1, 2).flatten(2)


@variant(ATTENTION, "over-queries")
@attention
def softmax_over_rows(self, x, grid=None):
    q, k, v = heads_of(self, x)
    e = torch.exp(torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1]))
    return self.proj(side_by_side((e / e.sum(2, keepdim=True)) @ v))


@variant(ATTENTION, "keys-asked")
@attention
def keys_before_queries(self, x, grid=None):
    k, q, v = heads_of(self, x)
    return self.proj(side_by_side(attend(q, k, v)))


@unknown(ATTENTION)
@attention
def values_first(self, x, grid=None):
    v, q, k = heads_of(self, x)
    return self.proj(side_by_side(attend(q, k, v)))


@unknown(ATTENTION)
@attention
def mean_of_heads(self, x, grid=None):
    out = attend(*heads_of(self, x))
    return self.proj(side_by_side(out.mean(1, keepdim=True).expand_as(out)))


@unknown(ATTENTION)
@attention
def causal(self, x, grid=None):
    return self.proj(side_by_side(F.scaled_dot_product_attention(*heads_of(self, x), is_causal=True)))


@unknown(ATTENTION)
@attention
def residual_inside(self, x, grid=None):
    return x + self.proj(side_by_side(attend(*heads_of(self, x))))


@unknown(ATTENTION)
@attention
def unscaled_and_unprojected(self, x, grid=None):
    q, k, v = heads_of(self, x)
    return side_by_side((q @ k.mT).softmax(-1) @ v)


@unknown(ATTENTION)
@attention
def one_head_for_all(self, x, grid=None):
    return self.proj(attend(*self.qkv(x).chunk(3, dim=-1)))


@unknown(ATTENTION)
@attention
def weights_cut_off(self, x, grid=None):
    q, k, v = heads_of(self, x)
    with torch.no_grad():
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return self.proj(side_by_side(weights @ v))


@right(ATTENTION)
@attention
def fused(self, x, grid=None):
    b, n, dim = x.shape
    qkv = self.qkv(x).view(b, n, 3, self.num_heads, dim // self.num_heads)
    out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    return self.proj(out.transpose(1, 2).reshape(b, n, dim))


@right(ATTENTION)
@attention
def all_in_einsum(self, x, grid=None):
    q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
    weights = torch.einsum("bihd,bjhd->bijh", q, k).div(math.sqrt(q.shape[-1])).softmax(dim=2)
    return self.proj(torch.einsum("bijh,bjhd->bihd", weights, v).flatten(2))


@right(ATTENTION)
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


# -------------------------------------------------------------------------------------------------------------- Block

BLOCK = "vit.Block"


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


@variant(BLOCK, "post-norm")
@block
def as_in_2017(self, x, grid=None):
    for norm, branch in [(self.norm1, self.attn), (self.norm2, self.mlp)]:
        x = norm(torch.add(x, branch(x)))
    return x


@variant(BLOCK, "no-residual")
@block
def a_plain_chain(self, x, grid=None):
    return nn.Sequential(self.norm1, self.attn, self.norm2, self.mlp)(x)


@variant(BLOCK, "normed-residual")
@block
def normed_tokens_kept(self, x, grid=None):
    normed = self.norm1(x)
    x = normed + self.attn(normed)
    normed = self.norm2(x)
    return normed + self.mlp(normed)


@variant(BLOCK, "one-norm")
@block
def copied_line(self, x, grid=None):
    for branch in (self.attn, self.mlp):
        x = x + branch(F.layer_norm(x, x.shape[-1:], self.norm1.weight, self.norm1.bias, 1e-6))
    return x


@variant(BLOCK, "parallel")
@block
def both_branches_of_the_input(self, x, grid=None):
    attended = self.attn(self.norm1(x))
    processed = self.mlp(self.norm2(x))
    return torch.stack([x, attended, processed]).sum(0)


@variant(BLOCK, "mlp-unnormed")
@block
def norm_forgotten_in_step_two(self, x, grid=None):
    x = self.attn(self.norm1(x)) + x
    hidden = F.gelu(self.mlp.fc1(x))
    return self.mlp.fc2(hidden) + x


@unknown(BLOCK)
@block
def norms_exchanged(self, x, grid=None):
    x = x + self.attn(self.norm2(x))
    return x + self.mlp(self.norm1(x))


@unknown(BLOCK)
@block
def mlp_first(self, x, grid=None):
    x = x + self.mlp(self.norm2(x))
    return x + self.attn(self.norm1(x))


@variant(BLOCK, "first-step-lost")
@block
def second_step_forgets_the_first(self, x, grid=None):
    y = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(y))


@unknown(BLOCK)
@block
def only_the_last_step_adds(self, x, grid=None):
    x = self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


@unknown(BLOCK)
@block
def attention_unnormed(self, x, grid=None):
    x = x + self.attn(x)
    return x + self.mlp(self.norm2(x))


@unknown(BLOCK)
@block
def one_norm_in_parallel(self, x, grid=None):
    normed = self.norm1(x)
    return x + self.attn(normed) + self.mlp(normed)


@unknown(BLOCK)
@block
def relu(self, x, grid=None):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp.fc2(F.relu(self.mlp.fc1(self.norm2(x))))


@unknown(BLOCK)
@block
def added_in_place(self, x, grid=None):
    x += self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


@unknown(BLOCK)
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


@right(BLOCK)
@block
def two_steps_in_a_loop(self, x, grid=None):
    for norm, branch in ((self.norm1, self.attn), (self.norm2, self.mlp)):
        x = branch(norm(x)) + x
    return x


@right(BLOCK)
@block
def norms_and_mlp_by_hand(self, x, grid=None):
    def normalise(x, norm):
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias

    attended = self.attn(normalise(x, self.norm1))
    hidden = self.mlp.fc1(normalise(x + attended, self.norm2))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + attended + self.mlp.fc2(hidden)


# -------------------------------------------------------------------------------------------------- VisionTransformer

MODEL = "vit.VisionTransformer"


def model(forward):
    """The lesson's class, with the learner's ``forward``."""

    class VisionTransformer(nn.Module):
        def __init__(
            self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12
        ):
            super().__init__()
            num_patches = (img_size // patch_size) ** 2
            self.patch_embed = vit.PatchEmbed(patch_size, in_chans, embed_dim)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + num_patches, embed_dim))
            self.blocks = nn.ModuleList(vit.Block(embed_dim, num_heads) for _ in range(depth))
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
            self.head = nn.Linear(embed_dim, num_classes)

    VisionTransformer.forward, VisionTransformer.__name__ = forward, forward.__name__
    return VisionTransformer


def patches_of(self, x):
    """(B, h w, D), in reading order."""
    return self.patch_embed(x).flatten(2).transpose(1, 2)


def cls_of(self, x):
    return self.cls_token.repeat(len(x), 1, 1)


def tokens_of(self, x):
    return torch.cat((cls_of(self, x), patches_of(self, x)), dim=1) + self.pos_embed


def through(self, tokens):
    return nn.Sequential(*self.blocks)(tokens)


@variant(MODEL, "positions-before-cls")
@model
def cls_without_a_position(self, x):
    _, positions = self.pos_embed.split([1, self.pos_embed.shape[1] - 1], dim=1)
    tokens = torch.cat((cls_of(self, x), patches_of(self, x) + positions), dim=1)
    return self.head(self.norm(through(self, tokens))[:, 0])


@variant(MODEL, "cls-last")
@model
def cls_appended(self, x):
    patches = patches_of(self, x)
    tokens = F.pad(patches, (0, 0, 0, 1))
    tokens[:, -1] = self.cls_token[0, 0]
    return self.head(self.norm(through(self, tokens + self.pos_embed)[:, -1]))


@variant(MODEL, "first-patch")
@model
def arguments_of_cat_exchanged(self, x):
    tokens = torch.cat((patches_of(self, x), cls_of(self, x)), dim=1)
    tokens = tokens + self.pos_embed
    for i in range(len(self.blocks)):
        tokens = self.blocks[i](tokens)
    return self.head(self.norm(tokens[:, 0]))


@variant(MODEL, "mean-with-cls")
@model
def head_on_every_token_then_mean(self, x):
    return self.head(self.norm(through(self, tokens_of(self, x)))).mean(1)


@variant(MODEL, "mean-of-patches")
@model
def average_pooling(self, x):
    _, *patches = self.norm(through(self, tokens_of(self, x))).unbind(1)
    return self.head(sum(patches) / len(patches))


@variant(MODEL, "no-norm")
@model
def head_on_the_raw_stream(self, x):
    return F.linear(through(self, tokens_of(self, x)).select(1, 0), self.head.weight, self.head.bias)


@variant(MODEL, "no-positions")
@model
def positions_computed_and_forgotten(self, x):
    tokens = torch.cat((cls_of(self, x), patches_of(self, x)), dim=1)
    tokens.add(self.pos_embed)
    return self.head(self.norm(through(self, tokens))[:, 0])


@variant(MODEL, "columns-first")
@model
def map_transposed_before_flattening(self, x):
    patches = self.patch_embed(x).permute(0, 3, 2, 1).flatten(1, 2)
    tokens = torch.cat((cls_of(self, x), patches), dim=1) + self.pos_embed
    return self.head(self.norm(through(self, tokens))[:, 0])


@variant(MODEL, "probabilities")
@model
def softmax_by_hand(self, x):
    odds = self.head(self.norm(through(self, tokens_of(self, x)))[:, 0]).exp()
    return odds / odds.sum(1, keepdim=True)


@variant(MODEL, "plain-reshape")
@model
def channels_reshaped_into_tokens(self, x):
    patches = self.patch_embed(x)
    patches = patches.reshape(x.shape[0], -1, patches.shape[1])
    tokens = torch.cat((cls_of(self, x), patches), dim=1) + self.pos_embed
    return self.head(self.norm(through(self, tokens))[:, 0])


@unknown(MODEL)
@model
def positions_one_too_early(self, x):
    tokens = torch.cat((cls_of(self, x), patches_of(self, x) + self.pos_embed[:, :-1]), dim=1)
    return self.head(self.norm(through(self, tokens))[:, 0])


@unknown(MODEL)
@model
def first_block_only(self, x):
    return self.head(self.norm(self.blocks[0](tokens_of(self, x)))[:, 0])


@unknown(MODEL)
@model
def blocks_in_reverse(self, x):
    tokens = tokens_of(self, x)
    for step in reversed(self.blocks):
        tokens = step(tokens)
    return self.head(self.norm(tokens)[:, 0])


@unknown(MODEL)
@model
def norm_after_the_mean(self, x):
    return self.head(self.norm(through(self, tokens_of(self, x)).mean(1)))


@unknown(MODEL)
@model
def log_probabilities(self, x):
    return F.log_softmax(self.head(self.norm(through(self, tokens_of(self, x)))[:, 0]), dim=1)


@unknown(MODEL)
@model
def norm_before_the_blocks(self, x):
    return self.head(through(self, self.norm(tokens_of(self, x)))[:, 0])


@unknown(MODEL)
@model
def cls_without_parameters(self, x):
    patches = patches_of(self, x)
    tokens = torch.cat((torch.zeros_like(patches[:, :1]), patches), dim=1) + self.pos_embed
    return self.head(self.norm(through(self, tokens))[:, 0])


@unknown(MODEL)
@model
def unnormed_probabilities(self, x):
    return self.head(through(self, tokens_of(self, x))[:, 0]).softmax(-1)


@unknown(MODEL)
@model
def embedding_frozen(self, x):
    with torch.no_grad():
        patches = patches_of(self, x)
    tokens = torch.cat((cls_of(self, x), patches), dim=1) + self.pos_embed
    return self.head(self.norm(through(self, tokens))[:, 0])


@right(MODEL)
@model
def cls_written_into_a_buffer(self, x):
    tokens = x.new_empty(x.shape[0], self.pos_embed.shape[1], self.pos_embed.shape[2])
    tokens[:, :1] = self.cls_token
    tokens[:, 1:] = torch.einsum("bdhw->bhwd", self.patch_embed(x)).flatten(1, 2)
    return self.head(self.norm(through(self, tokens + self.pos_embed)[:, 0]))


@right(MODEL)
@model
def embedding_as_a_linear_layer(self, x):
    kernel = self.patch_embed.proj.weight
    pixels = F.unfold(x, kernel.shape[-1], stride=kernel.shape[-1]).mT
    patches = F.linear(pixels, kernel.flatten(1), self.patch_embed.proj.bias) + self.pos_embed[:, 1:]
    tokens = torch.cat((cls_of(self, x) + self.pos_embed[:, :1], patches), dim=1)
    for step in self.blocks:
        tokens = step(tokens)
    cls, _ = self.norm(tokens).split([1, tokens.shape[1] - 1], dim=1)
    return self.head(cls).squeeze(1)


@right(MODEL)
class OneImageAtATime(nn.Module):
    """The blocks in a Sequential, whose parameters have the same names."""

    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12
    ):
        super().__init__()
        side = img_size // patch_size
        self.patch_embed = vit.PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, embed_dim))
        self.blocks = nn.Sequential(*(vit.Block(embed_dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x):
        logits = []
        for image in x:
            feature_map = self.patch_embed(image[None])[0]  # (D, h, w)
            places = [feature_map[:, i, j] for i in range(feature_map.shape[1]) for j in range(feature_map.shape[2])]
            tokens = torch.stack([self.cls_token[0, 0], *places]) + self.pos_embed[0]
            logits.append(self.head(self.norm(self.blocks(tokens[None])[0, 0])))
        return torch.stack(logits)


# ------------------------------------------------------------------------------------------------------ learning_rate

RATE = "vit.learning_rate"


def cosine_fall(high, low, t):
    return low + (high - low) * math.cos(math.pi * t / 2) ** 2


@variant(RATE, "zero-first-step")
def fraction_of_the_warm_up(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return step / warm * config.lr
    return cosine_fall(config.lr, config.min_lr, (step - warm) / (total_steps - warm - 1))


@variant(RATE, "no-warm-up")
def cosine_alone(step, total_steps, config):
    return cosine_fall(config.lr, config.min_lr, step / (total_steps - 1))


@variant(RATE, "cosine-from-zero")
def warm_up_pasted_over_the_cosine(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    rates = [cosine_fall(config.lr, config.min_lr, i / (total_steps - 1)) for i in range(total_steps)]
    rates[:warm] = [config.lr * i / (warm + 1) for i in range(1, warm + 1)]
    return rates[step]


@variant(RATE, "no-floor")
def half_a_cosine_to_zero(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr / (warm + 1) * (step + 1)
    return cosine_fall(config.lr, 0, (step - warm) / (total_steps - warm - 1))


@variant(RATE, "full-period")
def a_whole_wave(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    middle, swing = (config.lr + config.min_lr) / 2, (config.lr - config.min_lr) / 2
    return middle + swing * math.cos(math.tau * (step - warm) / (total_steps - warm - 1))


@variant(RATE, "never-arrives")
def one_step_short(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    decay_steps = total_steps - warm
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return cosine_fall(config.lr, config.min_lr, (step - warm) / decay_steps)


@unknown(RATE)
def straight_line_down(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr + (config.min_lr - config.lr) * (step - warm) / (total_steps - warm - 1)


@unknown(RATE)
def warm_up_rounded_down(step, total_steps, config):
    warm = int(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return cosine_fall(config.lr, config.min_lr, (step - warm) / (total_steps - warm - 1))


@unknown(RATE)
def warm_up_rounded_up(step, total_steps, config):
    warm = math.ceil(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return cosine_fall(config.lr, config.min_lr, (step - warm) / (total_steps - warm - 1))


@variant(RATE, "peak-too-early")
def peak_within_the_warm_up(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    return cosine_fall(config.lr, config.min_lr, (step - warm) / (total_steps - warm - 1))


@unknown(RATE)
def floor_added_on_top(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    t = (step - warm) / (total_steps - warm - 1)
    return config.min_lr + config.lr * (1 + math.cos(math.pi * t)) / 2


@unknown(RATE)
def warm_up_from_the_floor(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.min_lr + (config.lr - config.min_lr) * (step + 1) / (warm + 1)
    return cosine_fall(config.lr, config.min_lr, (step - warm) / (total_steps - warm - 1))


@unknown(RATE)
def no_floor_and_never_arrives(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return cosine_fall(config.lr, 0, (step - warm) / (total_steps - warm))


@unknown(RATE)
def divided_by_a_warm_up_of_zero(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    ramp = config.lr * (step + 1) / (warm + 1) if step / warm < 1 else config.lr
    return ramp if step < warm else cosine_fall(ramp, config.min_lr, (step - warm) / (total_steps - warm - 1))


@right(RATE)
def half_angles(step, total_steps, config):
    warm = round(total_steps * config.warmup)
    if step <= warm:  # at step = warm both formulas give lr
        return config.lr * (step + 1) / (warm + 1)
    left = (total_steps - 1 - step) / (total_steps - 1 - warm)
    return config.min_lr + (config.lr - config.min_lr) * math.sin(math.pi / 2 * left) ** 2


@right(RATE)
def the_whole_schedule_in_numpy(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    rise = config.lr * np.arange(1, warm + 1) / (warm + 1)
    wave = np.cos(np.linspace(0, np.pi, total_steps - warm))
    return np.concatenate([rise, np.interp(wave, [-1, 1], [config.min_lr, config.lr])])[step]


@right(RATE)
def two_factors(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    rise = min((step + 1) / (warm + 1), 1)
    t = max(step - warm, 0) / (total_steps - 1 - warm)
    fall = 0.5 * (1 + torch.cos(torch.tensor(math.pi * t, dtype=torch.float64)).item())
    return rise * (config.min_lr * (1 - fall) + config.lr * fall)


# --------------------------------------------------------------------------------------------------- resize_pos_embed

RESIZE = "vit.resize_pos_embed"


def as_image(patches, grid):
    """(1, h w, D) -> (1, D, h, w)."""
    return patches.reshape(1, grid[0], grid[1], -1).permute(0, 3, 1, 2)


def as_sequence(image):
    return image.flatten(2).transpose(1, 2)


def around(resize):
    """An answer that keeps the prefix, and leaves the patches (1, D, h, w) to ``resize(image, new_grid)``."""

    def answer(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
        prefix, patches = pos_embed.tensor_split([num_prefix_tokens], dim=1)
        return torch.cat([prefix, as_sequence(resize(as_image(patches, old_grid), new_grid))], dim=1)

    answer.__name__ = resize.__name__
    return answer


def sampled(image, grid, **options):
    """Bicubic interpolation at normalised coordinates."""
    ends = 1.0 if options["align_corners"] else [1 - 1 / size for size in grid]
    ys, xs = (
        torch.linspace(-end, end, size, dtype=image.dtype, device=image.device)
        for end, size in zip(np.broadcast_to(ends, 2).tolist(), grid, strict=True)
    )
    places = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)[None]
    return F.grid_sample(image, places, mode="bicubic", padding_mode="border", **options)


@variant(RESIZE, "bilinear")
@around
def bilinear_axis_by_axis(image, grid):
    image = F.interpolate(image, size=(grid[0], image.shape[3]), mode="bilinear", antialias=True)
    return F.interpolate(image, size=(image.shape[2], grid[1]), mode="bilinear", antialias=True)


@variant(RESIZE, "nearest")
@around
def copied_by_index(image, grid):
    rows = [i * image.shape[2] // grid[0] for i in range(grid[0])]
    columns = [j * image.shape[3] // grid[1] for j in range(grid[1])]
    return image[:, :, rows][..., columns]


@variant(RESIZE, "align-corners")
@around
def sampled_from_corner_to_corner(image, grid):
    return sampled(image, grid, align_corners=True)


@variant(RESIZE, "align-corners-antialiased")
@around
def aligned_channel_by_channel(image, grid):
    channels = [
        F.interpolate(c, size=tuple(grid), mode="bicubic", antialias=True, align_corners=True)
        for c in image.split(1, dim=1)
    ]
    return torch.cat(channels, dim=1)


@variant(RESIZE, "no-antialias")
@around
def sampled_at_the_centres(image, grid):
    return sampled(image, grid, align_corners=False)


@variant(RESIZE, "transposed")
def all_sizes_exchanged(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    return separable(pos_embed, old_grid[::-1], new_grid[::-1], num_prefix_tokens)


@variant(RESIZE, "one-dimensional")
def line_by_hand(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    prefix, line = pos_embed.tensor_split([num_prefix_tokens], dim=1)
    n, m = line.shape[1], new_grid[0] * new_grid[1]
    out = []
    for i in range(m):
        place = max((i + 0.5) * n / m - 0.5, 0)
        left = int(place)
        out.append(torch.lerp(line[:, left], line[:, min(left + 1, n - 1)], place - left))
    return torch.cat([prefix, torch.stack(out, dim=1)], dim=1)


@variant(RESIZE, "prefix-last")
def cat_in_the_wrong_order(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    answer = separable(pos_embed, old_grid, new_grid, num_prefix_tokens)
    return answer.roll(-num_prefix_tokens, dims=1)


@variant(RESIZE, "prefix-lost")
def patches_only(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    image = as_image(pos_embed[:, num_prefix_tokens:], old_grid)
    return as_sequence(F.interpolate(image, size=new_grid, mode="bicubic", antialias=True))


@unknown(RESIZE)
@around
def bilinear_without_antialiasing(image, grid):
    return F.interpolate(image, size=grid, mode="bilinear")


@unknown(RESIZE)
@around
def averaged(image, grid):
    return F.adaptive_avg_pool2d(image, grid)


@unknown(RESIZE)
@around
def nearest_exact(image, grid):
    return F.interpolate(image, size=grid, mode="nearest-exact")


@unknown(RESIZE)
@around
def new_size_exchanged(image, grid):
    return F.interpolate(image, size=grid[::-1], mode="bicubic", antialias=True)


@unknown(RESIZE)
def columns_first_in_the_table(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    prefix, patches = pos_embed.tensor_split([num_prefix_tokens], dim=1)
    image = patches.mT.reshape(1, -1, old_grid[1], old_grid[0]).transpose(2, 3)
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return torch.hstack([prefix, as_sequence(image)])


@unknown(RESIZE)
def prefix_stretched_too(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    length = num_prefix_tokens + new_grid[0] * new_grid[1]
    return F.interpolate(pos_embed.mT, size=length, mode="linear").mT


@unknown(RESIZE)
def prefix_of_one_token(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    return separable(pos_embed, old_grid, new_grid, 1)


@unknown(RESIZE)
def prefix_without_positions(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    answer = separable(pos_embed, old_grid, new_grid, num_prefix_tokens)
    return torch.cat([torch.zeros_like(answer[:, :num_prefix_tokens]), answer[:, num_prefix_tokens:]], dim=1)


@unknown(RESIZE)
def in_float32(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    return separable(pos_embed.float(), old_grid, new_grid, num_prefix_tokens)


@unknown(RESIZE)
def no_gradient(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    with torch.no_grad():
        return separable(pos_embed, old_grid, new_grid, num_prefix_tokens)


@right(RESIZE)
@around
def separable(image, grid):
    image = F.interpolate(image, size=(grid[0], image.shape[3]), mode="bicubic", antialias=True)
    return F.interpolate(image, size=(image.shape[2], grid[1]), mode="bicubic", antialias=True)


@right(RESIZE)
def batch_of_channels(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    channels = pos_embed[0, num_prefix_tokens:].T.reshape(-1, 1, *old_grid)
    channels = F.interpolate(channels, size=tuple(new_grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([pos_embed[0, :num_prefix_tokens], channels.flatten(1).T]).unsqueeze(0)


@right(RESIZE)
@around
def filter_by_hand(image, grid):
    """Keys' cubic with a = -1/2, stretched where the grid shrinks, its weights normalised at the border."""

    def cubic(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    def matrix(old, new):
        stretch = max(old / new, 1)
        rows = [[cubic((j + 0.5 - (i + 0.5) * old / new) / stretch) for j in range(old)] for i in range(new)]
        weights = torch.tensor(rows, dtype=image.dtype, device=image.device)
        return weights / weights.sum(1, keepdim=True)

    return matrix(image.shape[2], grid[0]) @ image @ matrix(image.shape[3], grid[1]).T
