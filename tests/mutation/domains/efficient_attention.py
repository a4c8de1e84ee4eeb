"""Lesson 05: queries and keys that differ in number, patterns and prefixes of any size, sizes of merged tokens."""

import torch

from vitcourse.course.cases import Case, call
from vitcourse.efficient_attention import block_layout, local_layout, orthogonal_projection

from ..domain import Draws, domain


@domain("efficient_attention.linear_attention")
def linear_attention(rng: Draws) -> Case:
    b, heads, n, keys, m, d = (rng.size(1, high) for high in (3, 3, 9, 9, 8, 6))
    spread = rng.spread(1e-3, 1.0, 1.0, 1e3)
    features = [rng.positive(b, heads, length, m, low=0.05) * spread for length in (n, keys)]
    return call(*features, rng.floats(b, heads, keys, d))


@domain("efficient_attention.random_feature_attention")
def random_feature_attention(rng: Draws) -> Case:
    b, heads, n, keys, d, values = (rng.size(1, high) for high in (3, 3, 9, 9, 8, 6))
    spread = rng.spread(0.3, 1.0, 1.0, 3.0, 20.0)
    q, k = (rng.floats(b, heads, length, d, spread=spread) for length in (n, keys))
    projection = orthogonal_projection(rng.size(2, 24), d, rng.generator).to(rng.dtype)
    return call(q, k, rng.floats(b, heads, keys, values), projection)


@domain("efficient_attention.neighbourhood_mask")
def neighbourhood_mask(rng: Draws) -> Case:
    return call((rng.size(1, 8), rng.size(1, 8), rng.size(0, 3)), rng.choice([1, 3, 5, 7]))


@domain("efficient_attention.sparse_attention")
def sparse_attention(rng: Draws) -> Case:
    grid = rng.size(1, 6), rng.size(1, 6), rng.size(0, 3)
    if rng.sometimes(0.6):
        layout = local_layout(grid, rng.choice([1, 3, 5]), rng.size(1, 4))
    else:
        layout = block_layout(grid, rng.size(1, 3), rng.size(0, 1), rng.size(0, 2), seed=rng.size(0, 9))
    shape = rng.size(1, 3), rng.size(1, 3), grid[2] + grid[0] * grid[1]
    d = rng.size(1, 8)
    return call(rng.floats(*shape, d), rng.floats(*shape, d), rng.floats(*shape, rng.size(1, 8)), layout)


@domain("efficient_attention.bipartite_matching")
def bipartite_matching(rng: Draws) -> Case:
    prefix, patches = rng.size(0, 4), rng.size(2, 20)
    metric = rng.floats(rng.size(1, 4), prefix + patches, rng.size(2, 8)) * 10.0 ** rng.number(-1, 1)
    r = rng.size(0, patches // 2)
    return call(metric, r) if prefix == 0 and rng.sometimes(0.5) else call(metric, r, prefix)


@domain("efficient_attention.merge")
def merge(rng: Draws) -> Case:
    b, n, c = rng.size(1, 4), rng.size(1, 12), rng.size(1, 6)
    count = rng.size(1, n)
    rows = [torch.cat([torch.arange(count), rng.integers(0, count, (n - count,))]) for _ in range(b)]
    place = torch.stack([row[torch.randperm(n, generator=rng.generator)] for row in rows])
    return call(rng.floats(b, n, c), sizes(rng, b, n), place, count)


@domain("efficient_attention.proportional_attention")
def proportional_attention(rng: Draws) -> Case:
    b, heads, n, keys, d, values = (rng.size(1, high) for high in (4, 3, 9, 9, 8, 6))
    spread = rng.spread(0.1, 1.0, 3.0)
    q, k = (rng.floats(b, heads, length, d, spread=spread) for length in (n, keys))
    return call(q, k, rng.floats(b, heads, keys, values), sizes(rng, b, keys))


def sizes(rng: Draws, b: int, n: int) -> torch.Tensor:
    """How many patches each token stands for."""
    return rng.integers(1, rng.choice([2, 4, 60]), (b, n)).to(rng.dtype)
