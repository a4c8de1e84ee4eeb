"""Answers to `efficient_attention.sparse_attention`."""

import math

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("efficient_attention.sparse_attention")


def block_by_block(attend, order=lambda out, layout: out[:, :, layout.home]):
    """A loop over blocks; ``attend(q, k, v, hidden)`` is one block's attention."""

    def run(q, k, v, layout):
        prefix, outs = q.shape[2] - len(layout.home), []
        for queries, keys, hidden in zip(
            layout.queries, layout.keys, layout.hidden.expand(len(layout.keys), -1, -1), strict=True
        ):
            outs.append(attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], hidden))
        first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
        return torch.cat([first, order(torch.cat(outs, dim=2), layout)], dim=2)

    return run


def masked(q, k, v, hidden):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden.logical_not().expand(q.shape[2], -1))


right(block_by_block(masked))


@right
def gathered(q, k, v, layout):
    """All blocks at once by ``torch.gather``-like indexing, and attention on an axis of blocks."""
    take = lambda x, table: x.transpose(0, 2)[table].permute(3, 2, 0, 1, 4)  # noqa: E731 (B, H, blocks, tokens, D)
    scores = take(q, layout.queries) @ take(k, layout.keys).mT / math.sqrt(q.shape[-1])
    scores = torch.where(layout.hidden, -math.inf, scores)
    out = (torch.softmax(scores, -1) @ take(v, layout.keys)).flatten(2, 3).index_select(2, layout.home)
    patches = q.shape[2] - layout.home.numel()
    everything = torch.softmax(q[:, :, :patches] @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
    return torch.cat([everything, out], 2)


@variant("nothing-hidden")
def table_ignored(q, k, v, layout):
    return block_by_block(lambda q, k, v, hidden: F.scaled_dot_product_attention(q, k, v))(q, k, v, layout)


@variant("hidden-after-softmax")
def weights_times_zero(q, k, v, layout):
    def attend(q, k, v, hidden):
        weights = F.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        return (weights * (1 - hidden.double())) @ v

    return block_by_block(attend)(q, k, v, layout)


@variant("not-put-home")
def cropped(q, k, v, layout):
    return block_by_block(masked, lambda out, layout: out.narrow(2, 0, layout.home.shape[0]))(q, k, v, layout)


@variant("prefix-among-themselves")
def prefix_apart(q, k, v, layout):
    p = q.shape[2] - len(layout.home)
    out = gathered(q, k, v, layout)[:, :, p:]
    return torch.cat([F.scaled_dot_product_attention(*(x[:, :, :p] for x in (q, k, v))), out], 2) if p else out


@variant("no-scale")
def scale_of_one(q, k, v, layout):
    return gathered(q * math.sqrt(q.shape[-1]), k, v, layout)


@variant("dense")
def full_matrix_filled_in(q, k, v, layout):
    n, prefix = q.shape[2], q.shape[2] - len(layout.home)
    bias = torch.full((n, n), -math.inf, dtype=q.dtype)
    bias[:prefix] = 0
    hidden = layout.hidden.expand(-1, layout.queries.shape[1], -1)
    for queries, keys, secret in zip(layout.queries, layout.keys, hidden, strict=True):
        for query, row in zip(queries, secret, strict=True):
            bias[query, keys[~row]] = 0
    return (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


@variant("dense")
def all_keys_block_by_block(q, k, v, layout):
    n, prefix, outs = q.shape[2], q.shape[2] - len(layout.home), []
    for queries, keys, hidden in zip(layout.queries, layout.keys, layout.hidden, strict=True):
        bias = torch.full((len(queries), n), -math.inf, dtype=q.dtype)
        for row, secret in zip(bias, hidden.expand(len(queries), -1), strict=True):
            row[keys[~secret]] = 0
        outs.append((q[:, :, queries] @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v)
    first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
    return torch.cat([first, torch.cat(outs, 2)[:, :, layout.home]], 2)


@variant("scattered")
def copied_to_their_numbers(q, k, v, layout):
    prefix = q.shape[2] - len(layout.home)

    def order(out, layout):
        return torch.zeros_like(v).index_copy(2, layout.queries.reshape(-1), out)[:, :, prefix:]

    return block_by_block(masked, order)(q, k, v, layout)


@unknown
def plain_attention(q, k, v, layout):
    return F.scaled_dot_product_attention(q, k, v)


@unknown
def only_the_patches(q, k, v, layout):
    return gathered(q, k, v, layout)[:, :, -len(layout.home) :] * 0.5


@unknown
def hidden_by_minus_five(q, k, v, layout):
    def attend(q, k, v, hidden):
        return (q @ k.mT / math.sqrt(q.shape[-1]) - 5.0 * hidden).softmax(-1) @ v

    return block_by_block(attend)(q, k, v, layout)


@unknown
def values_of_the_first_block(q, k, v, layout):
    return block_by_block(lambda q, k, v, hidden: masked(q, k, v, hidden).flip(1))(q, k, v, layout) + 1.0


@unknown
def mean_of_what_is_seen(q, k, v, layout):
    return block_by_block(lambda q, k, v, hidden: masked(0 * q, k, v, hidden))(q, k, v, layout)


@unknown
def scaled_by_the_width_of_the_values(q, k, v, layout):
    return gathered(q * math.sqrt(q.shape[-1] / v.shape[-1]), k, v, layout)
