"""The check of `hardware.tiled_attention`."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitcourse.course.checks import call, check, holds
from vitcourse.hardware.tiled import attend_tile as _attend_tile


class _Sizes(TorchDispatchMode):
    """Notes how many numbers each tensor had that was made."""

    def __init__(self):
        super().__init__()
        self.seen = {0}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.seen.add(tensor.numel())
        return result


def _sizes(answer, *inputs):
    with _Sizes() as sizes:
        answer(*inputs)
    return sizes.seen


@check(
    "hardware.tiled_attention",
    reference="vitcourse.hardware.tiled.tiled_attention",
    level=2,
    minutes=15,
    why="It gives exactly what softmax attention gives, and the matrix of all scores never exists.",
    hints=[
        "Before the first tile the peak is −∞, and both sums are zero.",
        "`k.split(block, dim=-2)` gives tiles of keys, the last of which may be smaller.",
        "What attend_tile carries along is a sum of weighted values. What makes an average of it, at the very end?",
    ],
)
def tiled_attention(rng):
    yield call(rng.normal(2, 3, 5, 4), rng.normal(2, 3, 7, 4), rng.normal(2, 3, 7, 6), 3)
    yield call(rng.normal(1, 1, 4, 2), rng.normal(1, 1, 8, 2), rng.normal(1, 1, 8, 2), 4).on("whole tiles")
    yield call(rng.normal(2, 6, 8), rng.normal(2, 5, 8), rng.normal(2, 5, 8), 16).on("a block larger than N")
    yield call(30 * rng.normal(1, 2, 9, 4), 30 * rng.normal(1, 2, 9, 4), rng.normal(1, 2, 9, 4), 2).on("large scores")
    far_below = 30 + rng.normal(1, 2, 9, 4), rng.normal(1, 2, 9, 4) - 30
    yield call(*far_below, rng.normal(1, 2, 9, 4), 2).on("scores far below zero")
    # 20 tiles of 20 keys. Tiles of queries give 20 · 400 scores, and for a single query a row of 400.
    q, k, v = rng.normal(40, 3), rng.normal(400, 3), rng.normal(400, 3)
    yield holds(
        "a tensor with all the scores is made",
        lambda answer: max(_sizes(answer, q, k, v, 20)) <= 40 * 400 / 2,
        points_to="all-at-once",
    )
    yield holds(
        "a tensor with all the scores of a query is made",
        lambda answer: 400 not in _sizes(answer, q[:1], k, v, 20),
        points_to="tiles-of-queries",
    )


def _tiles(k, v, block):
    return zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True)


def _attend_all(q, tiles, width, scale):
    state = q.new_full(q.shape[:-1], -torch.inf), q.new_zeros(q.shape[:-1]), q.new_zeros(*q.shape[:-1], width)
    for keys, values in tiles:
        state = _attend_tile(*state, q @ keys.mT * scale, values)
    return state


@tiled_attention.mistake("no-scale", "the scores are not divided by √D")
def _(q, k, v, block=64):
    _, total, out = _attend_all(q, _tiles(k, v, block), v.shape[-1], 1.0)
    return out / total[..., None]


@tiled_attention.mistake("scale-by-width", "the scores are divided by D; it should be by its root")
def _(q, k, v, block=64):
    _, total, out = _attend_all(q, _tiles(k, v, block), v.shape[-1], 1 / q.shape[-1])
    return out / total[..., None]


@tiled_attention.mistake(
    "never-divided", "the weighted values are added up, but never divided by the sum of the weights"
)
def _(q, k, v, block=64):
    return _attend_all(q, _tiles(k, v, block), v.shape[-1], q.shape[-1] ** -0.5)[2]


@tiled_attention.mistake(
    "rest-forgotten", "the last tile is lost where the block does not divide N: right only for whole tiles"
)
def _(q, k, v, block=64):
    tiles = [(keys, values) for keys, values in _tiles(k, v, block) if keys.shape[-2] == block]
    _, total, out = _attend_all(q, tiles, v.shape[-1], q.shape[-1] ** -0.5)
    return out / total[..., None]


@tiled_attention.mistake("last-tile-only", "every tile starts anew, so only the last one is in the result")
def _(q, k, v, block=64):
    _, total, out = _attend_all(q, list(_tiles(k, v, block))[-1:], v.shape[-1], q.shape[-1] ** -0.5)
    return out / total[..., None]


@tiled_attention.mistake(
    "mean-of-tiles",
    "each tile has a softmax of its own, and the results are averaged; tiles with larger scores count more",
)
def _(q, k, v, block=64):
    outs = [(q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1) @ values for keys, values in _tiles(k, v, block)]
    return torch.stack(outs).mean(0)


@tiled_attention.mistake(
    "sum-of-tiles",
    "each tile has a softmax of its own, and the results are added: the weights sum to the number of tiles",
)
def _(q, k, v, block=64):
    outs = [(q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1) @ values for keys, values in _tiles(k, v, block)]
    return torch.stack(outs).sum(0)


tiled_attention.mistake(
    "all-at-once",
    "right, but all the scores are in memory at once, which is what tiles are there to avoid",
    lambda q, k, v, block=64: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v,
)
tiled_attention.mistake(
    "tiles-of-queries",
    "right, but each query sees all its scores at once, and a row grows with N: it is the keys that come tile by tile",
    lambda q, k, v, block=64: torch.cat(
        [(part @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v for part in q.split(block, dim=-2)], dim=-2
    ),
)


@tiled_attention.mistake(
    "peak-from-zero",
    "the peak starts at 0, as if there were a key with that score: where all scores are far below, every weight becomes 0",
)
def _(q, k, v, block=64):
    state = q.new_zeros(q.shape[:-1]), q.new_zeros(q.shape[:-1]), q.new_zeros(*q.shape[:-1], v.shape[-1])
    for keys, values in _tiles(k, v, block):
        state = _attend_tile(*state, q @ keys.mT * q.shape[-1] ** -0.5, values)
    return state[2] / state[1][..., None]
