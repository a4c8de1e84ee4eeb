"""Answers to `hardware.tiled_attention`."""

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hardware.tiled_attention")


def divided(total, out):
    return out / total[..., None]


def looped(scale=lambda d: d**-0.5, rest=True, finish=divided, only_last=False, lowest=-float("inf")):
    """A loop over indices, with the sums relative to a running maximum."""

    def answer(q, k, v, block=64):
        n = k.shape[-2]
        starts = [i for i in range(0, n, block) if rest or i + block <= n]
        top = torch.full(q.shape[:-1], lowest, dtype=q.dtype)
        total, out = torch.zeros_like(top), torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
        for i in starts[-1:] if only_last else starts:
            s = torch.einsum("...nd,...md->...nm", q, k[..., i : i + block, :]) * scale(q.shape[-1])
            new = torch.maximum(top, s.max(-1).values)
            total = total * (top - new).exp() + (s - new[..., None]).exp().sum(-1)
            out = out * (top - new).exp()[..., None] + (s - new[..., None]).exp() @ v[..., i : i + block, :]
            top = new
        return finish(total, out)

    return answer


variant("no-scale")(looped(scale=lambda d: 1))
variant("scale-by-width")(looped(scale=lambda d: 1 / d))
variant("never-divided")(looped(finish=lambda total, out: out))
variant("rest-forgotten")(looped(rest=False))
variant("last-tile-only")(looped(only_last=True))
variant("peak-from-zero")(looped(lowest=0.0))
right(looped())
right(looped(lowest=-1e9))


def one_by_one(q, k, v, block):
    """A softmax for each tile: (tiles, …, N_q, D_v)."""
    parts = [slice(i, i + block) for i in range(0, k.shape[-2], block)]
    return torch.stack([F.scaled_dot_product_attention(q, k[..., p, :], v[..., p, :]) for p in parts])


@variant("mean-of-tiles")
def averaged(q, k, v, block=64):
    tiles = one_by_one(q, k, v, block)
    return tiles.sum(0) / len(tiles)


@variant("sum-of-tiles")
def added(q, k, v, block=64):
    return sum(one_by_one(q, k, v, block))


@variant("all-at-once")
def whole_matrix(q, k, v, block=64):
    weights = torch.einsum("...nd,...md->...nm", q, k / q.shape[-1] ** 0.5).softmax(dim=-1)
    return torch.einsum("...nm,...md->...nd", weights, v)


@variant("tiles-of-queries")
def block_of_queries(q, k, v, block=64):
    result = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for i in range(0, q.shape[-2], block):
        scores = torch.einsum("...nd,...md->...nm", q[..., i : i + block, :], k) / q.shape[-1] ** 0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        result[..., i : i + block, :] = weights @ v / weights.sum(-1, keepdim=True)
    return result


@variant("tiles-of-queries")
def query_by_query(q, k, v, block=64):
    return torch.cat([F.scaled_dot_product_attention(row, k, v) for row in q.split(1, -2)], -2)


@unknown
def queries_and_keys_exchanged(q, k, v, block=64):
    return looped()(q, k.flip(-2), v, block)


@unknown
def first_tile_only(q, k, v, block=64):
    return F.scaled_dot_product_attention(q, k[..., :block, :], v[..., :block, :])


@unknown
def overlapping_tiles(q, k, v, block=64):
    return looped()(q, torch.cat([k, k[..., -1:, :]], -2), torch.cat([v, v[..., -1:, :]], -2), block)


@unknown
def cut_off_from_the_graph(q, k, v, block=64):
    return looped()(q.detach(), k.detach(), v.detach(), block)


@right
def in_two_passes(q, k, v, block=64):
    """The log-sum-exp of each query first, then weights that need no division."""
    q = q / q.shape[-1] ** 0.5
    whole = torch.stack([(q @ keys.mT).logsumexp(-1) for keys in k.split(block, -2)]).logsumexp(0)[..., None]
    pairs = zip(k.split(block, -2), v.split(block, -2), strict=True)
    return torch.stack([(q @ keys.mT - whole).exp() @ values for keys, values in pairs]).sum(0)


@right
def through_log_sum_exp(q, k, v, block=64):
    """Each tile by itself, then a softmax over the tiles of their log-sum-exp."""
    outs, lses = [], []
    for keys, values in zip(k.split(block, -2), v.split(block, -2), strict=True):
        s = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
        lses.append(s.logsumexp(-1))
        outs.append(s.softmax(-1) @ values)
    weights = torch.stack(lses).softmax(0)
    return sum(w[..., None] * out for w, out in zip(weights, outs, strict=True))
