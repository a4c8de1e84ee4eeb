"""Checks of lesson 06: attention tile by tile, few-bit integers, and what a head is worth."""

from importlib.util import find_spec

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitcourse.course.checks import call, check, holds
from vitcourse.hardware.tiled import attend_tile as _attend_tile

# ---------------------------------------------------------------------------------------------------- tiles of attention


@check(
    "hardware.attend_tile",
    reference="vitcourse.hardware.tiled.attend_tile",
    level=3,
    minutes=20,
    why="A softmax that never sees all its scores at once is what makes FlashAttention possible.",
    hints=[
        "Both sums are relative to e^peak. If a larger score arrives, the same sums relative to the new peak are smaller: "
        "by which factor?",
        "Three lines do it: the new peak; the factor for what was summed so far; the weights of the new scores.",
        "While every key so far is hidden the peak is −∞, and −∞ − (−∞) is NaN: subtract 0 instead.",
    ],
    gradients=False,
)
def attend_tile(rng):
    def state(*shape, d):
        """What an earlier tile of five keys leaves."""
        scores, values = rng.normal(*shape, 5), rng.normal(*shape[:-1], 5, d)
        peak = scores.amax(-1)
        weights = (scores - peak[..., None]).exp()
        return peak, weights.sum(-1), weights @ values

    yield call(*state(2, 3, 4, d=6), 2 * rng.normal(2, 3, 4, 7), rng.normal(2, 3, 7, 6))
    start = torch.full((2, 4), -torch.inf, dtype=torch.float64), rng.normal(2, 4) * 0, rng.normal(2, 4, 3) * 0
    yield call(*start, rng.normal(2, 4, 5), rng.normal(2, 5, 3)).on("the first tile")
    yield call(*state(1, 3, d=2), 1000 + rng.normal(1, 3, 4), rng.normal(1, 4, 2)).on("scores of a thousand")
    yield call(*state(1, 3, d=2), rng.normal(1, 3, 4) - 1000, rng.normal(1, 4, 2)).on("a tile that hardly counts")
    hidden = torch.full((2, 4, 5), -torch.inf, dtype=torch.float64)
    yield call(*start, hidden, rng.normal(2, 5, 3)).on("a first tile with all keys hidden")


@attend_tile.mistake(
    "out-not-shrunk",
    "the accumulator still is relative to the old peak: only the total was brought in line with the new",
)
def _(peak, total, out, scores, values):
    new_peak, new_total, new_out = _attend_tile(peak, total, out, scores, values)
    fresh = _attend_tile(new_peak, total * 0, out * 0, scores, values)[2]
    return new_peak, new_total, out + fresh


@attend_tile.mistake(
    "total-not-shrunk",
    "the total still is relative to the old peak: only the accumulator was brought in line with the new",
)
def _(peak, total, out, scores, values):
    new_peak, _, new_out = _attend_tile(peak, total, out, scores, values)
    return new_peak, total + _attend_tile(new_peak, total * 0, out * 0, scores, values)[1], new_out


@attend_tile.mistake("nothing-shrunk", "what was summed so far stays as it was, though it is relative to an older peak")
def _(peak, total, out, scores, values):
    new_peak = _attend_tile(peak, total, out, scores, values)[0]
    _, fresh_total, fresh_out = _attend_tile(new_peak, total * 0, out * 0, scores, values)
    return new_peak, total + fresh_total, out + fresh_out


@attend_tile.mistake(
    "peak-of-the-tile",
    "the peak is that of this tile alone; it should be the largest of all scores so far, and never fall",
)
def _(peak, total, out, scores, values):
    new_peak = scores.amax(-1)
    shift = torch.where(new_peak == -torch.inf, 0.0, new_peak)
    shrink, weights = torch.exp(peak - shift), torch.exp(scores - shift[..., None])
    return new_peak, total * shrink + weights.sum(-1), out * shrink[..., None] + weights @ values


@attend_tile.mistake("old-peak", "the weights are taken relative to the old peak, which new scores may exceed by far")
def _(peak, total, out, scores, values):
    shift = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(scores - shift[..., None])
    return torch.maximum(peak, scores.amax(-1)), total + weights.sum(-1), out + weights @ values


@attend_tile.mistake(
    "inverted", "the factor works in the wrong direction: a larger peak must make the old sums smaller"
)
def _(peak, total, out, scores, values):
    new_peak = torch.maximum(peak, scores.amax(-1))
    shift = torch.where(new_peak == -torch.inf, 0.0, new_peak)
    grow, weights = torch.exp(shift - peak), torch.exp(scores - shift[..., None])
    return new_peak, total * grow + weights.sum(-1), out * grow[..., None] + weights @ values


@attend_tile.mistake(
    "peak-kept", "the sums are right, but the peak that is returned is the old one: the next tile will mistake them"
)
def _(peak, total, out, scores, values):
    return peak, *_attend_tile(peak, total, out, scores, values)[1:]


@attend_tile.mistake(
    "nan-while-hidden",
    "right as long as a key can be seen; while all are hidden the peak is −∞, and −∞ − (−∞) is NaN",
)
def _(peak, total, out, scores, values):
    new_peak = torch.maximum(peak, scores.amax(-1))
    shrink, weights = torch.exp(peak - new_peak), torch.exp(scores - new_peak[..., None])
    return new_peak, total * shrink + weights.sum(-1), out * shrink[..., None] + weights @ values


@attend_tile.mistake(
    "divided-already",
    "the output is divided by the total after each tile; then the next tile adds to a mean, not to a sum",
)
def _(peak, total, out, scores, values):
    peak, total, out = _attend_tile(peak, total, out, scores, values)
    return peak, total, out / total[..., None]


@attend_tile.mistake(
    "zero-as-the-peak",
    "while all keys are hidden, what is subtracted is 0, but the peak still is −∞: a later tile may have scores below 0",
)
def _(peak, total, out, scores, values):
    new_peak, total, out = _attend_tile(peak, total, out, scores, values)
    return torch.where(new_peak == -torch.inf, 0.0, new_peak), total, out


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


if find_spec("triton"):
    from vitcourse.course.checks import hardware_kernels as hardware_kernels  # its check registers itself

# ----------------------------------------------------------------------------------------------------- few-bit integers


@check(
    "hardware.quantize",
    reference="vitcourse.hardware.quantize.quantize",
    level=2,
    minutes=15,
    why="A quarter of the memory of float32 for one number a row, with an error that is known beforehand.",
    hints=[
        "One scale a row: from the largest magnitude in that row. `keepdim=True` keeps it beside its row.",
        "The largest magnitude shall be half a step beyond the code 2^(bits−1) − 1.",
        "Half a step beyond is rounded up to 2^(bits−1), which int8 does not hold: clamp before you convert, to both sides.",
    ],
    gradients=False,
)
def quantize(rng):
    yield call(rng.normal(5, 12, dtype=torch.float32) * rng.uniform(5, 1, low=0.1, high=9, dtype=torch.float32))
    yield call(rng.normal(3, 7, dtype=torch.float32), 4).on("four bits")
    yield call(rng.normal(2, 3, 6, dtype=torch.float32), 3).on("activations of a batch")
    largest = rng.normal(4, 9, dtype=torch.float32)
    largest[:, 2] = 6.0 + rng.uniform(4, dtype=torch.float32)
    yield call(largest).on("rows whose largest number is positive")
    yield call(-largest, 5).on("rows whose largest number is negative")


def _rounded(x, scale, bits, more=0):
    high = 2 ** (bits - 1) - 1
    return (x / scale).round().clamp(-high - more, high).to(torch.int8), scale


def _magnitude(x):
    return x.abs().amax(-1, keepdim=True)


quantize.mistake(
    "one-scale",
    "there is one scale for all rows: a single row with large numbers makes the steps coarse for all the others",
    lambda x, bits=8: _rounded(
        x, (x.abs().amax() / (2 ** (bits - 1) - 0.5)).expand(*x.shape[:-1], 1).contiguous(), bits
    ),
)
quantize.mistake(
    "scale-of-columns",
    "each column has a scale; a row is what one output channel computes with, and the scale has to leave its sum",
    lambda x, bits=8: _rounded(x, x.abs().amax(-2, keepdim=True) / (2 ** (bits - 1) - 0.5), bits),
)
quantize.mistake(
    "whole-step",
    "the largest number lies on the outermost code's value; it may lie half a step beyond, so the steps can be finer",
    lambda x, bits=8: _rounded(x, _magnitude(x) / (2 ** (bits - 1) - 1), bits),
)
quantize.mistake(
    "unsigned-range",
    "the steps are half as wide as they may be, so that large numbers are clipped: half of the codes are negative",
    lambda x, bits=8: _rounded(x, _magnitude(x) / (2**bits - 0.5), bits),
)
quantize.mistake(
    "signed-maximum",
    "the largest number decides; it should be the largest magnitude, for a number far below zero needs room, too",
    lambda x, bits=8: _rounded(x, x.amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5), bits),
)
quantize.mistake(
    "lopsided",
    "there is a code more below zero than above, so a number and its negative are not treated alike",
    lambda x, bits=8: _rounded(x, _magnitude(x) / (2 ** (bits - 1) - 0.5), bits, more=1),
)
quantize.mistake(
    "truncated",
    "the numbers are cut off towards zero: errors of up to a whole step, all in one direction",
    lambda x, bits=8: (
        (x / (_magnitude(x) / (2 ** (bits - 1) - 0.5))).to(torch.int8),
        _magnitude(x) / (2 ** (bits - 1) - 0.5),
    ),
)
quantize.mistake(
    "not-clamped",
    "the largest number of a row is rounded up to a code that does not exist: in eight bits it wraps around to −128",
    lambda x, bits=8: (
        (x / (_magnitude(x) / (2 ** (bits - 1) - 0.5))).round().to(torch.int16).to(torch.int8),
        _magnitude(x) / (2 ** (bits - 1) - 0.5),
    ),
)
quantize.mistake(
    "not-integers",
    "the codes are whole numbers, but still of a floating-point type: nothing has become smaller",
    lambda x, bits=8: (
        (x / (_magnitude(x) / (2 ** (bits - 1) - 0.5))).round().clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1),
        _magnitude(x) / (2 ** (bits - 1) - 0.5),
    ),
)
quantize.mistake(
    "inverse-scale",
    "the scale is turned over: multiply a code by it, and you should get the number back",
    lambda x, bits=8: (
        _rounded(x, _magnitude(x) / (2 ** (bits - 1) - 0.5), bits)[0],
        (2 ** (bits - 1) - 0.5) / _magnitude(x),
    ),
)


@check(
    "hardware.pack_int4",
    reference="vitcourse.hardware.quantize.pack_int4",
    level=2,
    minutes=10,
    why="No computer has a type of four bits: two numbers have to share a byte, or nothing is saved.",
    hints=[
        "`<< 4` moves a number into the upper half of a byte, `& 15` keeps only the lower half.",
        "A negative int8 has ones in its upper half: without a mask they cover the neighbour.",
        "Join with `|`, and `.view(torch.uint8)` reads the same bits as a number without a sign.",
    ],
    gradients=False,
)
def pack_int4(rng):
    yield call(rng.integers(-8, 8, (3, 10)).to(torch.int8))
    yield call(rng.integers(-8, 8, (2, 3, 4)).to(torch.int8)).on("three dimensions")
    yield call(rng.integers(0, 8, (1, 6)).to(torch.int8)).on("nothing negative")


pack_int4.mistake(
    "neighbours",
    "neighbours share a byte; here the first half of a row goes to the low halves, and the second half to the high ones",
    lambda q: ((q[..., ::2] & 15) | (q[..., 1::2] << 4)).view(torch.uint8),
)
pack_int4.mistake(
    "high-first",
    "low and high are exchanged: the first half of the row belongs in the lower four bits",
    lambda q: ((q.chunk(2, -1)[1] & 15) | (q.chunk(2, -1)[0] << 4)).view(torch.uint8),
)
pack_int4.mistake(
    "sign-not-masked",
    "a negative number's sign fills the upper half of the byte, and covers the number that should be there",
    lambda q: (q.chunk(2, -1)[0] | (q.chunk(2, -1)[1] << 4)).view(torch.uint8),
)
pack_int4.mistake(
    "borrowed",
    "added up, a negative number below borrows one from the number above: join bits, not values",
    lambda q: (q.chunk(2, -1)[0] + (q.chunk(2, -1)[1] << 4)).view(torch.uint8),
)
pack_int4.mistake(
    "shifted-by-eight",
    "the numbers were moved to 0 … 15 first; here a number keeps its own four bits, sign included",
    lambda q: ((q.chunk(2, -1)[0] + 8) | ((q.chunk(2, -1)[1] + 8) << 4)).view(torch.uint8),
)
pack_int4.mistake(
    "signed-bytes",
    "the bits are right, but the bytes still count as numbers with a sign",
    lambda q: (q.chunk(2, -1)[0] & 15) | (q.chunk(2, -1)[1] << 4),
)
pack_int4.mistake(
    "half-empty", "every number still has a byte to itself, half of it empty", lambda q: (q & 15).view(torch.uint8)
)


@check(
    "hardware.smoothing_factors",
    reference="vitcourse.hardware.quantize.smoothing_factors",
    level=2,
    minutes=10,
    why="A few channels with huge activations spoil the steps of all others; one multiplication, made beforehand, helps.",
    hints=[
        "The weight is (out, in): what enters through input channel j is multiplied by column j.",
        "s = max|X|^α / max|W|^(1−α), one number for each input channel.",
        "A channel that is always zero, or that no weight reads, has nothing to share: its factor is 1.",
    ],
    gradients=False,
)
def smoothing_factors(rng):
    weight = rng.normal(5, 4, dtype=torch.float32)
    yield call(rng.uniform(4, low=0.1, high=60, dtype=torch.float32), weight, 0.5)
    yield call(rng.uniform(3, low=0.1, high=60, dtype=torch.float32), rng.normal(7, 3, dtype=torch.float32), 0.8).on(
        "α = 0.8"
    )
    yield call(rng.uniform(6, low=0.1, high=9, dtype=torch.float32), rng.normal(6, 6, dtype=torch.float32), 0.3).on(
        "a square weight"
    )
    dead = rng.uniform(4, low=0.5, high=2, dtype=torch.float32)
    dead[1] = 0
    unread = weight.clone()
    unread[:, 2] = 0
    yield call(dead, unread, 0.5).on("a channel that is always zero, and one that is never read")


def _shared(factors):
    """A mistake in the formula alone: channels without any activation or weight keep theirs."""

    def faulty(largest, weight, alpha):
        columns = weight.abs().amax(0)
        return torch.where((largest > 0) & (columns > 0), factors(largest, columns, weight, alpha), 1.0)

    return faulty


smoothing_factors.mistake(
    "exponents-exchanged",
    "α and 1 − α are exchanged: α is the share of the difficulty that leaves the activations",
    _shared(lambda x, w, weight, alpha: x ** (1 - alpha) / w**alpha),
)
smoothing_factors.mistake(
    "inverted",
    "these are the factors turned over: activations are divided by s, so s should be large where they are",
    _shared(lambda x, w, weight, alpha: w ** (1 - alpha) / x**alpha),
)
smoothing_factors.mistake(
    "multiplied",
    "activation and weight are multiplied; a channel whose weights are large already should get less of the difficulty",
    _shared(lambda x, w, weight, alpha: x**alpha * w ** (1 - alpha)),
)
smoothing_factors.mistake(
    "weights-ignored",
    "only the activations decide; the weights have to be quantized afterwards, too",
    _shared(lambda x, w, weight, alpha: x**alpha),
)
smoothing_factors.mistake(
    "mean-weight",
    "the weights' mean magnitude decides; the step depends on the largest",
    _shared(lambda x, w, weight, alpha: x**alpha / weight.abs().mean(0) ** (1 - alpha)),
)
smoothing_factors.mistake(
    "signed-weight",
    "the largest weight decides, not the one with the largest magnitude",
    _shared(lambda x, w, weight, alpha: x**alpha / weight.amax(0) ** (1 - alpha)),
)
smoothing_factors.mistake(
    "of-the-outputs",
    "the weights are looked at row by row, which are outputs; the activations come in through the columns",
    lambda largest, weight, alpha: largest**alpha / weight.abs().amax(1) ** (1 - alpha),
)
smoothing_factors.mistake(
    "dead-channels",
    "right where there is something to share; a channel of zeros gets the factor 0, and an unread one infinity",
    lambda largest, weight, alpha: largest**alpha / weight.abs().amax(0) ** (1 - alpha),
)


# ----------------------------------------------------------------------------------------------------------- importance


@check(
    "hardware.taylor_score",
    reference="vitcourse.hardware.prune.taylor_score",
    level=3,
    minutes=15,
    why="One backward pass says for all heads and channels at once what the loss would be without them.",
    hints=[
        "A gate on a head multiplies all of its values. What is the derivative of the loss by the gate, at 1?",
        "Sum what belongs to one gate: the tokens of an image, and the head's stretch of channels. The signs count.",
        "Only then take magnitudes, one for each image and unit, and the mean over the images.",
    ],
    gradients=False,
)
def taylor_score(rng):
    yield call(rng.normal(4, 5, 6), rng.normal(4, 5, 6), 3)
    yield call(rng.normal(3, 2, 7), rng.normal(3, 2, 7), 7).on("channels, one value each")
    yield call(rng.normal(1, 4, 8), rng.normal(1, 4, 8), 2).on("a batch of one")
    yield call(rng.normal(2, 1, 6), rng.normal(2, 1, 6), 2).on("a single token")


def _effect(x, gradient, units):
    """(B, N, units, width)."""
    return (x * gradient).unflatten(-1, (units, -1))


taylor_score.mistake(
    "magnitudes-first",
    "the magnitude is taken of every product before they are summed: what cancels inside a head then counts as large",
    lambda x, gradient, units: _effect(x, gradient, units).abs().sum((1, 3)).mean(0),
)
taylor_score.mistake(
    "magnitude-last",
    "images are averaged before the magnitude is taken: a head that helps one and harms another looks useless",
    lambda x, gradient, units: _effect(x, gradient, units).sum((1, 3)).mean(0).abs(),
)
taylor_score.mistake(
    "signed",
    "the sign is kept; a head may lower the loss or raise it, and matters in both cases",
    lambda x, gradient, units: _effect(x, gradient, units).sum((1, 3)).mean(0),
)
taylor_score.mistake(
    "per-token",
    "the magnitude is taken for each token; one gate serves all tokens of an image, so they are summed with their signs",
    lambda x, gradient, units: _effect(x, gradient, units).sum(3).abs().sum(1).mean(0),
)
taylor_score.mistake(
    "heads-interleaved",
    "a unit gathers channels from all over the axis; its channels lie side by side",
    lambda x, gradient, units: (x * gradient).unflatten(-1, (-1, units)).sum((1, 2)).abs().mean(0),
)
taylor_score.mistake(
    "sum-of-images",
    "the images are added up; the mean does not depend on how many there are",
    lambda x, gradient, units: _effect(x, gradient, units).sum((1, 3)).abs().sum(0),
)
taylor_score.mistake(
    "mean-of-tokens",
    "the tokens are averaged; the gate's gradient is their sum",
    lambda x, gradient, units: _effect(x, gradient, units).mean((1, 3)).abs().mean(0),
)
taylor_score.mistake(
    "squared",
    "these are squares: another order of merit, in which a few images decide",
    lambda x, gradient, units: _effect(x, gradient, units).sum((1, 3)).square().mean(0),
)
taylor_score.mistake(
    "gradient-only",
    "the activations do not take part: a head whose output is zero has nothing to lose, whatever its gradient",
    lambda x, gradient, units: gradient.unflatten(-1, (units, -1)).sum((1, 3)).abs().mean(0),
)
taylor_score.mistake(
    "size-only",
    "the gradient does not take part: large outputs may well not matter to the loss",
    lambda x, gradient, units: x.unflatten(-1, (units, -1)).sum((1, 3)).abs().mean(0),
)
