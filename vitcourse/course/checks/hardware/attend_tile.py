"""The check of `hardware.attend_tile`."""

import torch

from vitcourse.course.checks import call, check
from vitcourse.hardware.tiled import attend_tile as _attend_tile


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
