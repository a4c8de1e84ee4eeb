"""Answers to `hardware.pack_int4`."""

import numpy as np
import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hardware.pack_int4")


def nibbles(q):
    """Four bits of each number, as integers from 0 to 15, in halves."""
    n = q.shape[-1] // 2
    unsigned = q.int() % 16
    return unsigned[..., :n], unsigned[..., n:]


@variant("neighbours")
def pairs_side_by_side(q):
    pairs = (q.int() % 16).reshape(*q.shape[:-1], -1, 2)
    return (pairs * torch.tensor([1, 16])).sum(-1).to(torch.uint8)


@variant("high-first")
def written_left_to_right(q):
    low, high = nibbles(q)
    return (16 * low + high).to(torch.uint8)


@variant("sign-not-masked")
def joined_as_they_are(q):
    n = q.shape[-1] // 2
    return torch.bitwise_or(q[..., :n], 16 * q[..., n:]).view(torch.uint8)


@variant("borrowed")
def sixteen_times(q):
    n = q.shape[-1] // 2
    return ((q[..., :n].int() + 16 * q[..., n:].int()) % 256).to(torch.uint8)


@variant("shifted-by-eight")
def offset_binary(q):
    n = q.shape[-1] // 2
    unsigned = (q + 8).to(torch.uint8)
    return unsigned[..., :n] + 16 * unsigned[..., n:]


@variant("signed-bytes")
def left_as_int8(q):
    low, high = nibbles(q)
    return torch.from_numpy((16 * high + low).numpy().astype(np.uint8).view(np.int8))


@variant("half-empty")
def nothing_joined(q):
    return (q.int() % 16).to(torch.uint8)


@unknown
def three_bits(q):
    low, high = nibbles(q)
    return (8 * high + low).to(torch.uint8)


@unknown
def second_half_reversed(q):
    low, high = nibbles(q)
    return (16 * high.flip(-1) + low).to(torch.uint8)


@unknown
def only_the_low_half(q):
    return nibbles(q)[0].to(torch.uint8)


@unknown
def integers_of_32_bits(q):
    low, high = nibbles(q)
    return 16 * high + low


@right
def arithmetic(q):
    low, high = nibbles(q)
    return (16 * high + low).to(torch.uint8)


@right
def in_numpy(q):
    bits = np.unpackbits(q.numpy().view(np.uint8)[..., None], axis=-1)[..., 4:]  # the lower four, highest first
    n = q.shape[-1] // 2
    joined = np.concatenate([bits[..., n:, :], bits[..., :n, :]], axis=-1)
    return torch.from_numpy(np.packbits(joined, axis=-1)[..., 0])
