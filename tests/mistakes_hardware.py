"""Answers to the exercises of lesson 06, as learners write them: the proof that its checks diagnose rightly.

None of them knows the catalogue in ``checks/hardware.py``: they reach the same numbers by other means.
"""

import inspect
import linecache
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from mistakes_common import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect()

# --------------------------------------------------------------------------------------------------------- attend_tile

TILE = "hardware.attend_tile"


def stepwise(shrink_out=True, shrink_total=True, keep_old_peak=False, guard=True, divide=False, turn=False):
    """Key by key instead of tile by tile."""

    def answer(peak, total, out, scores, values):
        highest = torch.cat([peak[..., None], scores], dim=-1).max(dim=-1).values
        reference = highest.masked_fill(highest.isneginf(), 0.0) if guard else highest
        factor = (reference - peak).exp() if turn else 1 / (reference - peak).exp()
        new_total = factor * total if shrink_total else total
        new_out = factor[..., None] * out if shrink_out else out
        for j in range(scores.shape[-1]):
            weight = (scores[..., j] - reference).exp()
            new_total = new_total + weight
            new_out = new_out + weight[..., None] * values[..., j, None, :]
        return peak if keep_old_peak else highest, new_total, new_out / new_total[..., None] if divide else new_out

    return answer


variant(TILE, "out-not-shrunk")(stepwise(shrink_out=False))
variant(TILE, "total-not-shrunk")(stepwise(shrink_total=False))
variant(TILE, "nothing-shrunk")(stepwise(shrink_out=False, shrink_total=False))
variant(TILE, "peak-kept")(stepwise(keep_old_peak=True))
variant(TILE, "nan-while-hidden")(stepwise(guard=False))
variant(TILE, "divided-already")(stepwise(divide=True))
variant(TILE, "inverted")(stepwise(turn=True))
right(TILE)(stepwise())


@variant(TILE, "peak-of-the-tile")
def newest_maximum(peak, total, out, scores, values):
    top = scores.max(dim=-1, keepdim=True).values
    zero = top.nan_to_num(neginf=0.0)
    old, w = (peak[..., None] - zero).exp(), (scores - zero).exp()
    return top[..., 0], old[..., 0] * total + w.sum(-1), old * out + w.matmul(values)


@variant(TILE, "old-peak")
def relative_to_what_was(peak, total, out, scores, values):
    zero = peak.nan_to_num(neginf=0.0)
    w = torch.exp(scores - zero.unsqueeze(-1))
    return torch.stack([peak, scores.max(-1).values]).max(0).values, w.sum(-1) + total, w.matmul(values) + out


@variant(TILE, "zero-as-the-peak")
def what_was_subtracted(peak, total, out, scores, values):
    highest, total, out = stepwise()(peak, total, out, scores, values)
    return highest.nan_to_num(neginf=0.0), total, out


@unknown(TILE)
def softmax_of_the_tile(peak, total, out, scores, values):
    return torch.maximum(peak, scores.amax(-1)), total + 1, out + scores.softmax(-1) @ values


@unknown(TILE)
def no_exponential(peak, total, out, scores, values):
    highest = torch.maximum(peak, scores.amax(-1))
    return highest, total + (scores - highest[..., None]).sum(-1), out + scores @ values


@unknown(TILE)
def wrong_order(peak, total, out, scores, values):
    highest, total, out = stepwise()(peak, total, out, scores, values)
    return total, highest, out


@unknown(TILE)
def one_peak_for_all_queries(peak, total, out, scores, values):
    highest = torch.maximum(peak.max(), scores.max()).expand_as(peak)
    zero = highest.nan_to_num(neginf=0.0)
    w, old = (scores - zero[..., None]).exp(), (peak - zero).exp()
    return highest.clone(), old * total + w.sum(-1), old[..., None] * out + w @ values


@right(TILE)
def through_logarithms(peak, total, out, scores, values):
    highest = torch.maximum(peak, scores.amax(-1))
    zero = torch.where(highest.isinf(), torch.zeros_like(highest), highest)
    joined = torch.cat([out[..., None, :], values.unsqueeze(-3).expand(*scores.shape, values.shape[-1])], dim=-2)
    w = torch.cat([(peak - zero).exp()[..., None], (scores - zero[..., None]).exp()], dim=-1)
    return highest, w[..., 0] * total + w[..., 1:].sum(-1), (w[..., None] * joined).sum(-2)


# ----------------------------------------------------------------------------------------------------- tiled_attention

TILED = "hardware.tiled_attention"


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


variant(TILED, "no-scale")(looped(scale=lambda d: 1))
variant(TILED, "scale-by-width")(looped(scale=lambda d: 1 / d))
variant(TILED, "never-divided")(looped(finish=lambda total, out: out))
variant(TILED, "rest-forgotten")(looped(rest=False))
variant(TILED, "last-tile-only")(looped(only_last=True))
variant(TILED, "peak-from-zero")(looped(lowest=0.0))
right(TILED)(looped())
right(TILED)(looped(lowest=-1e9))


def one_by_one(q, k, v, block):
    """A softmax for each tile: (tiles, …, N_q, D_v)."""
    parts = [slice(i, i + block) for i in range(0, k.shape[-2], block)]
    return torch.stack([F.scaled_dot_product_attention(q, k[..., p, :], v[..., p, :]) for p in parts])


@variant(TILED, "mean-of-tiles")
def averaged(q, k, v, block=64):
    tiles = one_by_one(q, k, v, block)
    return tiles.sum(0) / len(tiles)


@variant(TILED, "sum-of-tiles")
def added(q, k, v, block=64):
    return sum(one_by_one(q, k, v, block))


@variant(TILED, "all-at-once")
def whole_matrix(q, k, v, block=64):
    weights = torch.einsum("...nd,...md->...nm", q, k / q.shape[-1] ** 0.5).softmax(dim=-1)
    return torch.einsum("...nm,...md->...nd", weights, v)


@variant(TILED, "tiles-of-queries")
def block_of_queries(q, k, v, block=64):
    result = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for i in range(0, q.shape[-2], block):
        scores = torch.einsum("...nd,...md->...nm", q[..., i : i + block, :], k) / q.shape[-1] ** 0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        result[..., i : i + block, :] = weights @ v / weights.sum(-1, keepdim=True)
    return result


@variant(TILED, "tiles-of-queries")
def query_by_query(q, k, v, block=64):
    return torch.cat([F.scaled_dot_product_attention(row, k, v) for row in q.split(1, -2)], -2)


@unknown(TILED)
def queries_and_keys_exchanged(q, k, v, block=64):
    return looped()(q, k.flip(-2), v, block)


@unknown(TILED)
def first_tile_only(q, k, v, block=64):
    return F.scaled_dot_product_attention(q, k[..., :block, :], v[..., :block, :])


@unknown(TILED)
def overlapping_tiles(q, k, v, block=64):
    return looped()(q, torch.cat([k, k[..., -1:, :]], -2), torch.cat([v, v[..., -1:, :]], -2), block)


@unknown(TILED)
def cut_off_from_the_graph(q, k, v, block=64):
    return looped()(q.detach(), k.detach(), v.detach(), block)


@right(TILED)
def in_two_passes(q, k, v, block=64):
    """The log-sum-exp of each query first, then weights that need no division."""
    q = q / q.shape[-1] ** 0.5
    whole = torch.stack([(q @ keys.mT).logsumexp(-1) for keys in k.split(block, -2)]).logsumexp(0)[..., None]
    pairs = zip(k.split(block, -2), v.split(block, -2), strict=True)
    return torch.stack([(q @ keys.mT - whole).exp() @ values for keys, values in pairs]).sum(0)


@right(TILED)
def through_log_sum_exp(q, k, v, block=64):
    """Each tile by itself, then a softmax over the tiles of their log-sum-exp."""
    outs, lses = [], []
    for keys, values in zip(k.split(block, -2), v.split(block, -2), strict=True):
        s = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
        lses.append(s.logsumexp(-1))
        outs.append(s.softmax(-1) @ values)
    weights = torch.stack(lses).softmax(0)
    return sum(w[..., None] * out for w, out in zip(weights, outs, strict=True))


# -------------------------------------------------------------------------------------------------------- flash_kernel

KERNEL = "hardware.flash_kernel"

if find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def flash_kernel(q, k, v, out, stride_head, stride_token, n, scale, BLOCK: tl.constexpr, D: tl.constexpr):
        """With pointers that move on, powers of two, and a hidden score far below all others."""
        block = tl.program_id(axis=0)
        head = tl.program_id(axis=1)
        offset = head * stride_head
        tokens = tl.arange(0, BLOCK)
        channels = tl.arange(0, D)
        mine = block * BLOCK + tokens
        place = offset + mine[:, None] * stride_token + channels[None, :]
        there = (mine < n)[:, None]
        a = tl.load(q + place, mask=there, other=0.0) * (scale * 1.4426950408889634)
        k_pointers = k + offset + tokens[:, None] * stride_token + channels[None, :]
        v_pointers = v + offset + tokens[:, None] * stride_token + channels[None, :]
        m = tl.zeros([BLOCK], tl.float32) - 1.0e30
        s = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, D], tl.float32)
        last = n
        for i in range(0, last, BLOCK):
            valid = i + tokens < n
            kt = tl.load(k_pointers, mask=valid[:, None], other=0.0)
            vt = tl.load(v_pointers, mask=valid[:, None], other=0.0)
            logits = tl.dot(a, tl.trans(kt), input_precision="ieee")
            logits += tl.where(valid, 0.0, -1.0e30)[None, :]
            top = tl.max(logits, axis=1)
            m_new = tl.where(top > m, top, m)
            p = tl.exp2(logits - m_new[:, None])
            c = tl.exp2(m - m_new)
            s = s * c
            s += tl.sum(p, axis=1)
            acc = acc * c[:, None]
            acc += tl.dot(p.to(vt.dtype), vt, input_precision="ieee")
            m = m_new
            k_pointers += BLOCK * stride_token
            v_pointers += BLOCK * stride_token
        tl.store(out + place, acc / s[:, None], mask=there)

    def changed(*pairs):
        """The kernel above with pieces of its text exchanged."""
        text = inspect.getsource(flash_kernel.fn)
        text = "\n".join(line.removeprefix("    ") for line in text.splitlines()) + "\n"
        for old, new in pairs:
            if old not in text:
                raise ValueError(f"no {old!r} in the kernel")
            text = text.replace(old, new)
        file = f"<variant {hash(text)}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        scope = {"__name__": __name__, "triton": triton, "tl": tl}
        exec(compile(text, file, "exec"), scope)
        return scope["flash_kernel"]

    right(KERNEL)(flash_kernel)
    for key, pairs in {
        "beyond-the-last-key": [("        logits += tl.where(valid, 0.0, -1.0e30)[None, :]\n", "")],
        "weights-hidden-not-scores": [
            ("        logits += tl.where(valid, 0.0, -1.0e30)[None, :]\n", ""),
            (
                "p = tl.exp2(logits - m_new[:, None])",
                "p = tl.exp2(logits - m_new[:, None]) * tl.where(valid, 1.0, 0.0)",
            ),
        ],
        "unmasked-loads": [(", mask=valid[:, None], other=0.0", "")],
        "infinite-keys": [
            (
                "kt = tl.load(k_pointers, mask=valid[:, None], other=0.0)",
                "kt = tl.load(k_pointers, valid[:, None], LOW)",
            ),
            ("        logits += tl.where(valid, 0.0, -1.0e30)[None, :]\n", ""),
            ("last = n\n", 'last = n\n    LOW = -float("inf")\n'),
        ],
        "infinite-values": [
            (
                "vt = tl.load(v_pointers, mask=valid[:, None], other=0.0)",
                "vt = tl.load(v_pointers, valid[:, None], HIGH)",
            ),
            ("last = n\n", 'last = n\n    HIGH = float("inf")\n'),
        ],
        "never-stored": [("tl.store(out + place, acc / s[:, None], mask=there)", "return acc / s[:, None]")],
        "unmasked-store": [("acc / s[:, None], mask=there", "acc / s[:, None]")],
        "rest-forgotten": [("last = n\n", "last = n - n % BLOCK\n")],
        "one-tile": [("last = n\n", "last = BLOCK\n")],
        "accumulator-not-shrunk": [("acc = acc * c[:, None]", "acc = acc * 1.0")],
        "total-not-shrunk": [("s = s * c\n", "s = s * 1.0\n")],
        "nothing-shrunk": [("c = tl.exp2(m - m_new)", "c = tl.exp2(m - m)")],
        "peak-forgotten": [("m = m_new\n", "m = m\n"), ("- 1.0e30\n", '+ float("-inf")\n')],
        "peak-of-the-tile": [("m_new = tl.where(top > m, top, m)", "m_new = top")],
        "peak-over-queries": [("top = tl.max(logits, axis=1)", "top = tl.max(tl.trans(logits), axis=1)")],
        "total-over-queries": [("tl.sum(p, axis=1)", "tl.sum(p, axis=0)")],
        "both-over-queries": [("logits, axis=1)", "logits, axis=0)"), ("p, axis=1)", "p, axis=0)")],
        "nan-from-the-start": [("c = tl.exp2(m - m_new)", "c = tl.exp2(m_new - m)")],
        "divided-each-tile": [
            ("m = m_new\n", "m = m_new\n        acc /= s[:, None]\n"),
            ("acc / s[:, None], ", "acc, "),
        ],
        "no-scale": [("(scale * 1.4426950408889634)", "1.4426950408889634")],
        "never-divided": [("acc / s[:, None]", "acc")],
        "first-head": [("offset = head * stride_head", "offset = head * 0")],
        "types-mixed": [("p.to(vt.dtype)", "p")],
    }.items():
        variant(KERNEL, key)(changed(*pairs))
    for load in ("k_pointers", "v_pointers"):  # one of the two is enough, even where no result changes
        variant(KERNEL, "unmasked-loads")(changed((f"{load}, mask=valid[:, None], other=0.0", load)))
    variant(KERNEL, "nan-from-the-start")(changed(("tl.exp2(logits - m_new[:, None])", "tl.exp2(logits - m[:, None])")))
    variant(KERNEL, "types-mixed")(changed(("mask=there, other=0.0)", "mask=there, other=0.0).to(tl.float32)")))
    right(KERNEL)(changed(("other=0.0)", "other=0.0).to(tl.float32)")))

    unknown(KERNEL)(changed(("acc / s[:, None]", "acc / n")))
    unknown(KERNEL)(changed(("place = offset + mine", "place = offset + tokens")))
    unknown(KERNEL)(changed(("tl.exp2(logits - m_new[:, None])", "tl.exp(logits - m_new[:, None])")))
    unknown(KERNEL)(changed(("v_pointers += BLOCK * stride_token", "v_pointers += 0")))
    unknown(KERNEL)(changed(("p.to(vt.dtype)", "p.to(tl.float16)")))
    unknown(KERNEL)(changed(("m = m_new\n", "m = m_new\n        acc = acc.to(tl.float16).to(tl.float32)\n")))
    unknown(KERNEL)(
        changed(
            (
                "k_pointers = k + offset + tokens[:, None] * stride_token",
                "k_pointers = k + offset + tokens[:, None] * D",
            )
        )
    )

# ------------------------------------------------------------------------------------------------------------ quantize

QUANTIZE = "hardware.quantize"


def by_hand(scale_of=None, into=None, convert=None, given=lambda scale: scale):
    """With NumPy-like steps: what decides the scale, how it is rounded, how it is converted."""

    def answer(x, bits=8):
        largest = torch.maximum(x.max(-1, keepdim=True).values, -x.min(-1, keepdim=True).values)
        scale = scale_of(x, largest, bits) if scale_of else 2 * largest / (2**bits - 1)
        codes = into(x / scale) if into else torch.round(x / scale)
        if convert:
            return convert(codes, bits), given(scale)
        outermost = 2 ** (bits - 1) - 1
        return codes.clip(-outermost, outermost).to(torch.int8), given(scale)

    return answer


def column_scale(x, largest, bits):
    return 2 * torch.linalg.vector_norm(x, ord=float("inf"), dim=-2, keepdim=True) / (2**bits - 1)


variant(QUANTIZE, "one-scale")(
    by_hand(lambda x, largest, bits: (2 * largest.max() / (2**bits - 1)) * torch.ones_like(largest))
)
variant(QUANTIZE, "scale-of-columns")(by_hand(column_scale))
variant(QUANTIZE, "whole-step")(by_hand(lambda x, largest, bits: 2 * largest / (2**bits - 2)))
variant(QUANTIZE, "unsigned-range")(by_hand(lambda x, largest, bits: 2 * largest / (2 ** (bits + 1) - 1)))
variant(QUANTIZE, "signed-maximum")(
    by_hand(lambda x, largest, bits: 2 * x.max(-1, keepdim=True).values / (2**bits - 1))
)
variant(QUANTIZE, "truncated")(by_hand(into=torch.trunc))
variant(QUANTIZE, "not-clamped")(
    by_hand(convert=lambda codes, bits: torch.from_numpy(codes.numpy().astype(np.int32).astype(np.int8)))
)
variant(QUANTIZE, "not-integers")(
    by_hand(convert=lambda codes, bits: codes.clip(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1))
)
variant(QUANTIZE, "lopsided")(
    by_hand(convert=lambda codes, bits: codes.clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8))
)
variant(QUANTIZE, "inverse-scale")(by_hand(given=lambda scale: 1 / scale))
right(QUANTIZE)(by_hand())

unknown(QUANTIZE)(by_hand(into=torch.floor))
unknown(QUANTIZE)(by_hand(convert=lambda codes, bits: codes.clip(0, 2 ** (bits - 1) - 1).to(torch.int8)))
unknown(QUANTIZE)(by_hand(convert=lambda codes, bits: codes.clip(-127, 127).to(torch.int16)))
unknown(QUANTIZE)(by_hand(given=lambda scale: scale.squeeze(-1)))
unknown(QUANTIZE)(by_hand(lambda x, largest, bits: 2 * x.std(-1, keepdim=True) / (2**bits - 1)))


@right(QUANTIZE)
def row_by_row(x, bits=8):
    """The nearest of all steps, looked for in a list of them."""
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
    found, scales = [], []
    for row in rows:
        scale = row.abs().max() / (2 ** (bits - 1) - 0.5)
        found.append(codes[(row[:, None] - codes * scale).abs().argmin(-1)])
        scales.append(scale)
    return torch.stack(found).to(torch.int8).reshape(x.shape), torch.stack(scales).reshape(*x.shape[:-1], 1)


# ----------------------------------------------------------------------------------------------------------- pack_int4

PACK = "hardware.pack_int4"


def nibbles(q):
    """Four bits of each number, as integers from 0 to 15, in halves."""
    n = q.shape[-1] // 2
    unsigned = q.int() % 16
    return unsigned[..., :n], unsigned[..., n:]


@variant(PACK, "neighbours")
def pairs_side_by_side(q):
    pairs = (q.int() % 16).reshape(*q.shape[:-1], -1, 2)
    return (pairs * torch.tensor([1, 16])).sum(-1).to(torch.uint8)


@variant(PACK, "high-first")
def written_left_to_right(q):
    low, high = nibbles(q)
    return (16 * low + high).to(torch.uint8)


@variant(PACK, "sign-not-masked")
def joined_as_they_are(q):
    n = q.shape[-1] // 2
    return torch.bitwise_or(q[..., :n], 16 * q[..., n:]).view(torch.uint8)


@variant(PACK, "borrowed")
def sixteen_times(q):
    n = q.shape[-1] // 2
    return ((q[..., :n].int() + 16 * q[..., n:].int()) % 256).to(torch.uint8)


@variant(PACK, "shifted-by-eight")
def offset_binary(q):
    n = q.shape[-1] // 2
    unsigned = (q + 8).to(torch.uint8)
    return unsigned[..., :n] + 16 * unsigned[..., n:]


@variant(PACK, "signed-bytes")
def left_as_int8(q):
    low, high = nibbles(q)
    return torch.from_numpy((16 * high + low).numpy().astype(np.uint8).view(np.int8))


@variant(PACK, "half-empty")
def nothing_joined(q):
    return (q.int() % 16).to(torch.uint8)


@unknown(PACK)
def three_bits(q):
    low, high = nibbles(q)
    return (8 * high + low).to(torch.uint8)


@unknown(PACK)
def second_half_reversed(q):
    low, high = nibbles(q)
    return (16 * high.flip(-1) + low).to(torch.uint8)


@unknown(PACK)
def only_the_low_half(q):
    return nibbles(q)[0].to(torch.uint8)


@unknown(PACK)
def integers_of_32_bits(q):
    low, high = nibbles(q)
    return 16 * high + low


@right(PACK)
def arithmetic(q):
    low, high = nibbles(q)
    return (16 * high + low).to(torch.uint8)


@right(PACK)
def in_numpy(q):
    bits = np.unpackbits(q.numpy().view(np.uint8)[..., None], axis=-1)[..., 4:]  # the lower four, highest first
    n = q.shape[-1] // 2
    joined = np.concatenate([bits[..., n:, :], bits[..., :n, :]], axis=-1)
    return torch.from_numpy(np.packbits(joined, axis=-1)[..., 0])


# --------------------------------------------------------------------------------------------------- smoothing_factors

SMOOTH = "hardware.smoothing_factors"


def in_logs(x_share, w_share, peak=lambda weight: weight.abs().max(0).values, guard=True):
    """exp(share · log max|X| − share · log max|W|), channel by channel."""

    def answer(largest, weight, alpha):
        peaks = peak(weight)
        s = torch.exp(x_share(alpha) * largest.log() + w_share(alpha) * peaks.log())
        if guard:
            s[(largest == 0) | (weight.abs().sum(0) == 0)] = 1.0
        return s

    return answer


def share(alpha):
    return alpha


def rest(alpha):
    return -(1 - alpha)


variant(SMOOTH, "exponents-exchanged")(in_logs(lambda a: 1 - a, lambda a: -a))
variant(SMOOTH, "inverted")(in_logs(lambda a: -a, lambda a: 1 - a))
variant(SMOOTH, "multiplied")(in_logs(share, lambda a: 1 - a))
variant(SMOOTH, "weights-ignored")(in_logs(share, lambda a: 0.0, peak=lambda weight: torch.ones(weight.shape[1])))
variant(SMOOTH, "mean-weight")(in_logs(share, rest, peak=lambda weight: weight.norm(p=1, dim=0) / len(weight)))
variant(SMOOTH, "signed-weight")(in_logs(share, rest, peak=lambda weight: weight.max(0).values))
variant(SMOOTH, "dead-channels")(in_logs(share, rest, guard=False))
right(SMOOTH)(in_logs(share, rest))


@variant(SMOOTH, "of-the-outputs")
def rows_of_the_weight(largest, weight, alpha):
    return largest.pow(alpha) * weight.norm(p=float("inf"), dim=1).pow(alpha - 1)


@unknown(SMOOTH)
def always_half(largest, weight, alpha):
    return in_logs(share, rest)(largest, weight, 0.5)


@unknown(SMOOTH)
def one_factor_for_all(largest, weight, alpha):
    s = largest.max() ** alpha / weight.abs().max() ** (1 - alpha)
    return s.expand_as(largest).contiguous()


@unknown(SMOOTH)
def smoothed_already(largest, weight, alpha):
    return weight * in_logs(share, rest)(largest, weight, alpha)


unknown(SMOOTH)(in_logs(share, rest, peak=lambda weight: weight.norm(dim=0)))


@right(SMOOTH)
def channel_by_channel(largest, weight, alpha):
    factors = []
    for x, column in zip(largest.tolist(), weight.T.tolist(), strict=True):
        w = max(map(abs, column))
        factors.append(x**alpha / w ** (1 - alpha) if x and w else 1.0)
    return torch.tensor(factors)


# -------------------------------------------------------------------------------------------------------- taylor_score

SCORE = "hardware.taylor_score"


def per_image(combine, over_images=torch.mean, product=lambda x, g: x * g, interleaved=False):
    """``combine`` makes one number of a unit's (N, width) products in one image."""

    def answer(x, gradient, units):
        width = x.shape[-1] // units
        table = []
        for image, slope in zip(x, gradient, strict=True):
            products = product(image, slope)
            parts = [
                products[:, u::units] if interleaved else products[:, u * width : (u + 1) * width] for u in range(units)
            ]
            table.append(torch.stack([combine(part) for part in parts]))
        return over_images(torch.stack(table), dim=0)

    return answer


def magnitude_of_sum(part):
    return part.sum().abs()


variant(SCORE, "magnitudes-first")(per_image(lambda part: part.abs().sum()))
variant(SCORE, "magnitude-last")(per_image(torch.sum, lambda table, dim: table.mean(dim).abs()))
variant(SCORE, "signed")(per_image(torch.sum))
variant(SCORE, "per-token")(per_image(lambda part: part.sum(-1).norm(p=1)))
variant(SCORE, "heads-interleaved")(per_image(magnitude_of_sum, interleaved=True))
variant(SCORE, "sum-of-images")(per_image(magnitude_of_sum, torch.sum))
variant(SCORE, "mean-of-tokens")(per_image(lambda part: part.mean().abs()))
variant(SCORE, "squared")(per_image(lambda part: part.sum() ** 2))
variant(SCORE, "gradient-only")(per_image(magnitude_of_sum, product=lambda x, g: g))
variant(SCORE, "size-only")(per_image(magnitude_of_sum, product=lambda x, g: x))
right(SCORE)(per_image(magnitude_of_sum))

unknown(SCORE)(per_image(magnitude_of_sum, torch.amax))
unknown(SCORE)(per_image(lambda part: part.norm()))
unknown(SCORE)(per_image(magnitude_of_sum, product=lambda x, g: x + g))
unknown(SCORE)(per_image(lambda part: part[0].sum().abs() if len(part) > 1 else 2 * part.sum().abs()))
unknown(SCORE)(lambda x, gradient, units: per_image(magnitude_of_sum)(x, gradient, units)[:1])


@right(SCORE)
def as_a_gate(x, gradient, units):
    """The gate's own gradient, of a loss that is linear in the activations."""
    gates = torch.ones(len(x), units, dtype=x.dtype, requires_grad=True)
    wide = gates.repeat_interleave(x.shape[-1] // units, dim=1)[:, None]
    (slope,) = torch.autograd.grad((x.detach() * wide * gradient.detach()).sum(), gates)
    return slope.abs().mean(0)
