"""Lesson 03: noise, patches, flat and faint ones; several views; features of any rank, 0 among them."""

import torch
from torch import Tensor

from vitcourse.course.cases import Case, build, call

from ..domain import Draws, domain


@domain("pretraining.random_masking")
def random_masking(rng: Draws) -> Case:
    patches = rng.size(1, 16)
    return call(rng.positive(rng.size(1, 5), patches), rng.size(1, patches))


@domain("pretraining.patch_targets")
def patch_targets(rng: Draws) -> Case:
    patch, channels = rng.size(1, 4), rng.size(1, 4)
    channels += patch * channels == 1  # patches of one number have no variance
    b, h, w = rng.size(1, 3), rng.size(1, 4), rng.size(1, 4)
    images = rng.floats(b, channels, patch * h, patch * w, spread=rng.choice([0.001, 0.1, 1.0, 1.0]))
    if rng.sometimes(0.3):  # as the background of clothing
        images[:, :, :patch, :patch] = rng.size(-4, 4) / 4
    more = {} if rng.sometimes(0.4) else {"norm_pix": rng.sometimes(0.5)}
    return call(images, patch, **more)


@domain("pretraining.Decoder")
def decoder(rng: Draws) -> list[Case]:
    inside, out, grid, prefix = rng.size(1, 7), rng.size(1, 7), (rng.size(1, 4), rng.size(1, 4)), rng.size(0, 3)
    heads = rng.size(1, 2)
    module = build(
        inside,
        out,
        grid,
        num_prefix_tokens=prefix,
        embed_dim=4 * heads * rng.size(1, 3),
        depth=rng.size(1, 3),
        num_heads=heads,
    )
    module = module.train() if rng.sometimes(0.5) else module
    patches, calls = grid[0] * grid[1], []
    for _ in range(rng.size(1, 3)):
        b, seen = rng.size(1, 3), rng.size(1, patches)
        calls.append(module.call(rng.floats(b, prefix + seen, inside), rng.normal(b, patches).argsort(dim=1)))
    return calls


@domain("pretraining.info_nce")
def info_nce(rng: Draws) -> Case:
    queries, dim = rng.size(1, 6), rng.size(2, 8)
    keys = queries + rng.choice([0, 0, 1, 4])
    return call(rng.floats(queries, dim), rng.floats(keys, dim), rng.choice([0.07, 0.2, 0.5, 1.0]))


@domain("pretraining.momentum_at")
def momentum_at(rng: Draws) -> Case:
    total = rng.size(1, 200)
    return call(rng.size(0, total), total, rng.choice([0.0, 0.5, 0.9, 0.99, 0.996]))


@domain("pretraining.effective_rank")
def effective_rank(rng: Draws) -> Case:
    return call(features(rng, rng.size(1, 9), rng.size(1, 9)))


def features(rng: Draws, n: int, dim: int) -> Tensor:
    """float32, as models give them: of full rank, along some directions only, or all the same."""
    x = rng.normal(n, dim, dtype=torch.float32) * rng.choice([0.01, 1.0, 100.0])
    if rng.sometimes(0.3):
        return x[:, torch.arange(dim) % rng.size(1, dim)]  # copies: no rounding gives them a direction of their own
    if rng.sometimes(0.2):
        return torch.full((n, dim), rng.size(-2, 2) / 4)
    return x + rng.choice([0.0, 3.0])


@domain("pretraining.sigreg")
def sigreg(rng: Draws) -> Case:
    dim, spread = rng.size(1, 6), rng.spread(0.0, 0.3, 1.0, 1.0, 3.0)
    views = (rng.size(1, 3),) if rng.sometimes(0.4) else ()
    x = rng.floats(*views, rng.size(1, 9), dim, spread=spread) + rng.choice([0.0, 0.0, 0.5])
    directions = rng.normal(dim, rng.size(1, 6), dtype=rng.dtype)
    return call(x, directions / directions.norm(dim=0))


@domain("pretraining.straight_through")
def straight_through(rng: Draws) -> Case:
    shape = [rng.size(1, 4) for _ in range(rng.size(1, 4))]
    return call(rng.floats(*shape), rng.floats(*shape))
