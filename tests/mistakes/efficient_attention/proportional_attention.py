"""Answers to `efficient_attention.proportional_attention`."""

import math

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("efficient_attention.proportional_attention")


def with_bias(bias, scale=None):
    return lambda q, k, v, size: F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias(size)[:, None, None].expand(-1, -1, q.shape[2], -1), scale=scale
    )


right(with_bias(torch.log))


@right
def weighted_exponentials(q, k, v, size):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * size.reshape(len(size), 1, 1, -1)
    return weights @ v / weights.sum(-1, keepdim=True)


@unknown  # which overflows
def exponentials_of_any_size(q, k, v, size):
    weights = torch.exp(q @ k.mT / math.sqrt(q.shape[-1])) * size.reshape(len(size), 1, 1, -1)
    return weights @ v / weights.sum(-1, keepdim=True)


@right
def repeated(q, k, v, size):
    """To the letter: as many equal keys as a size says, image by image."""
    outs = []
    for b in range(len(q)):
        several = [x[b].repeat_interleave(size[b].long(), dim=1) for x in (k, v)]
        outs.append(F.scaled_dot_product_attention(q[b], *several))
    return torch.stack(outs)


@right
def bias_without_gradient(q, k, v, size):
    with torch.no_grad():
        bias = size.log()
    return with_bias(lambda _: bias)(q, k, v, size)


variant("size-without-log")(with_bias(lambda size: size))
variant("no-effect")(with_bias(torch.zeros_like))
variant("scaled-with-the-scores")(
    lambda q, k, v, size: with_bias(lambda size: size.log() / math.sqrt(q.shape[-1]))(q, k, v, size)
)
variant("no-scale")(with_bias(torch.log, scale=1.0))
variant("large-tokens-avoided")(with_bias(lambda size: (1 / size).log()))


@variant("no-effect")
def added_along_the_queries(q, k, v, size):
    rows = torch.linspace(0, 1, q.shape[2], dtype=q.dtype)[:, None] * size.mean()
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + rows, -1) @ v


@variant("after-softmax")
def values_multiplied(q, k, v, size):
    return F.scaled_dot_product_attention(q, k, v * size[:, None, :, None])


unknown(with_bias(torch.sqrt))
unknown(with_bias(torch.log2))
unknown(with_bias(lambda size: (size / size.sum(-1, keepdim=True) + 1).log()))


@unknown
def keys_multiplied(q, k, v, size):
    return F.scaled_dot_product_attention(q, k * size[:, None, :, None], v)
