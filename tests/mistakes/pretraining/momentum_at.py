"""Answers to `pretraining.momentum_at`."""

import math

import numpy as np
import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("pretraining.momentum_at")


@right
def by_a_sine(step, total, start):
    return start + (1 - start) * math.sin(math.pi / 2 * step / total) ** 2


@right
def as_in_the_authors_code(step, total, start):
    return 1.0 - 0.5 * (1.0 + math.cos(math.pi * step / total)) * (1.0 - start)


@right
def by_numpy(step, total, start):
    return float(np.interp(-np.cos(np.pi * step / total), [-1, 1], [start, 1]))


def between(low, high, share):
    return low * (1 - share) + high * share


variant("linear")(lambda step, total, start: between(start, 1, step / total))
variant("constant")(lambda step, total, start: start)
variant("falls")(lambda step, total, start: between(1, start, math.sin(math.pi / 2 * step / total) ** 2))
variant("quarter")(lambda step, total, start: 1 - (1 - start) * math.cos(math.pi / 2 * step / total))
variant("full-turn")(lambda step, total, start: between(start, 1, math.sin(math.pi * step / total) ** 2))
variant("degrees")(lambda step, total, start: between(start, 1, math.sin(step / total / 2) ** 2))
variant("from-zero")(lambda step, total, start: math.sin(math.pi / 2 * step / total) ** 2)
variant("to-zero")(lambda step, total, start: start * math.cos(math.pi / 2 * step / total) ** 2)
variant("no-half")(lambda step, total, start: 1 - 2 * (1 - start) * math.cos(math.pi / 2 * step / total) ** 2)

unknown(lambda step, total, start: between(start, 1, (step / total) ** 2))
unknown(lambda step, total, start: between(start, 1, 1 - math.cos(math.pi * step / total)))
unknown(lambda step, total, start: start ** (1 - step / total))
unknown(lambda step, total, start: between(start, 1, math.sin(math.pi / 2 * step / total)))
unknown(lambda step, total, start: between(start, 1, math.sin(math.pi / 2 * (step + 1) / total) ** 2))
unknown(lambda step, total, start: torch.tensor(as_in_the_authors_code(step, total, start)))
