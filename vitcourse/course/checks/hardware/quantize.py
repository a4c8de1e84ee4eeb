"""The check of `hardware.quantize`."""

import torch

from vitcourse.course.checks import call, check


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
