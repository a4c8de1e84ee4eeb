"""Lesson 06: tiles that do and do not fit, scores that overflow without a peak, hidden keys, every width in bits."""

import torch

from vitcourse.course.cases import Case, call

from ..domain import Draws, domain


@domain("hardware.attend_tile")
def attend_tile(rng: Draws) -> Case:
    lead, n, tile, d = [rng.size(1, 3) for _ in range(rng.size(0, 2))], rng.size(1, 6), rng.size(1, 7), rng.size(1, 5)
    spread = rng.spread(1.0, 1.0, 10.0, 300.0)
    scores = rng.floats(*lead, n, tile, spread=spread)
    if rng.sometimes(0.4):  # hidden keys, of some queries all of them
        scores = scores.masked_fill(rng.uniform(*lead, n, tile) < rng.choice([0.2, 0.7, 1.0]), -torch.inf)
    peak, total, out = (
        rng.floats(*lead, n, spread=spread),
        rng.positive(*lead, n, low=1, high=9),
        rng.floats(*lead, n, d),
    )
    fresh = rng.uniform(*lead, n) < rng.choice([0.0, 0.3, 1.0])  # queries that have seen no key yet
    peak, total = peak.masked_fill(fresh, -torch.inf), total.masked_fill(fresh, 0)
    return call(peak, total, out.masked_fill(fresh[..., None], 0), scores, rng.floats(*lead, tile, d))


@domain("hardware.tiled_attention")
def tiled_attention(rng: Draws) -> Case:
    lead, n, keys, d = [rng.size(1, 3) for _ in range(rng.size(0, 2))], rng.size(1, 9), rng.size(1, 20), rng.size(1, 8)
    q = rng.floats(*lead, n, d, spread=rng.spread(0.3, 1.0, 1.0, 100.0))
    k, v = rng.floats(*lead, keys, d), rng.floats(*lead, keys, rng.size(1, 8))
    return call(q, k, v) if rng.sometimes(0.1) else call(q, k, v, block=rng.choice([1, 2, 3, 5, 8, keys, keys + 1]))


@domain("hardware.flash_kernel")
def flash_kernel(rng: Draws) -> Case:
    tokens = rng.size(50, 90) if rng.sometimes(0.1) else rng.size(1, 36)
    shape = rng.size(1, 2), tokens, rng.choice([16, 16, 32])
    dtype = torch.float16 if rng.sometimes(0.3) else torch.float32
    spread = rng.choice([1.0, 1.0, 4.0])
    q, k, v = ((rng.normal(*shape) * spread).to(dtype) for _ in range(3))
    return call(q, k, v, shape[2] ** -0.5)


@domain("hardware.quantize")
def quantize(rng: Draws) -> Case:
    lead, width = [rng.size(1, 4) for _ in range(rng.size(0, 3))], rng.size(1, 40)
    x = rng.normal(*lead, width, dtype=torch.float32) * 10 ** rng.number(-4, 4)
    return call(x) if rng.sometimes(0.2) else call(x, rng.size(2, 8))


@domain("hardware.pack_int4")
def pack_int4(rng: Draws) -> Case:
    lead = [rng.size(1, 4) for _ in range(rng.size(0, 3))]
    return call(rng.integers(-8, 8, (*lead, 2 * rng.size(1, 9))).to(torch.int8))


@domain("hardware.smoothing_factors")
def smoothing_factors(rng: Draws) -> Case:
    out, width = rng.size(1, 8), rng.size(1, 9)
    largest = rng.uniform(width, low=0.01, dtype=torch.float32) * 10.0 ** rng.number(-2, 3)
    weight = rng.normal(out, width, dtype=torch.float32) * 10.0 ** rng.number(-2, 1)
    if rng.sometimes(0.5):  # channels that are always zero, or that nobody reads
        largest = largest.masked_fill(rng.uniform(width) < 0.3, 0)
        weight = weight.masked_fill(rng.uniform(width) < 0.3, 0)
    return call(largest, weight, rng.choice([0.0, 0.25, 0.5, 0.75, 1.0, rng.number(0, 1)]))


@domain("hardware.taylor_score")
def taylor_score(rng: Draws) -> Case:
    units = rng.size(1, 5)
    shape = rng.size(1, 4), rng.size(1, 6), units * rng.size(1, 4)
    return call(rng.floats(*shape), rng.floats(*shape), units)
