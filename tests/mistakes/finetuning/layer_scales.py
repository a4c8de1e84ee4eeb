"""Answers to `finetuning.layer_scales`."""

import math

import numpy as np

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("finetuning.layer_scales")


@variant("upside-down")
def forgot_to_reverse(layers, decay):
    scales = [1.0]
    while len(scales) < layers:
        scales.append(scales[-1] * decay)
    return scales


@variant("head-decayed")
def multiplies_before_it_appends(layers, decay):
    scale, scales = 1.0, []
    for _ in range(layers):
        scale *= decay
        scales.insert(0, scale)
    return scales


@variant("linear")
def evenly_spaced(layers, decay):
    return np.linspace(1 - (1 - decay) * (layers - 1), 1, layers).tolist()


@variant("same-for-all")
def only_the_head_is_spared(layers, decay):
    return [1.0 if i + 1 == layers else decay for i in range(layers)]


@variant("divided")
def negative_powers(layers, decay):
    return [math.exp(-math.log(decay) * (layers - 1 - i)) for i in range(layers)]


@unknown
def squared(layers, decay):
    return [decay ** (2 * (layers - 1 - i)) for i in range(layers)]


@unknown
def one_too_many(layers, decay):
    return [decay ** (layers - i) for i in range(layers + 1)]


@right
def from_the_top(layers, decay):
    scales = [1.0]
    for _ in range(layers - 1):
        scales.insert(0, scales[0] * decay)
    return scales


@right
def powers_reversed(layers, decay):
    return [float(s) for s in (decay ** np.arange(layers))[::-1]]
