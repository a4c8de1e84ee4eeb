"""Answers to `finetuning.deep_first`."""

import math

import numpy as np
import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("finetuning.deep_first")


def filled(parts, stages, thawed_of, head=True):
    """A table of False, into which each stage writes its True; ``thawed_of(s)`` parts of the body."""
    table = torch.zeros(stages, parts, dtype=torch.bool)
    for s in range(stages):
        for back in range(thawed_of(s)):
            table[s, parts - 2 - back] = True
        table[s, -1] = head
    return table


def evenly(parts, stages):
    return lambda s: round(s * (parts - 1) / (stages - 1))


@variant("shallow-first")
def head_at_the_left(parts, stages):
    return torch.from_numpy(filled(parts, stages, evenly(parts, stages)).numpy()[:, ::-1].copy())


@variant("one-at-a-time")
def only_what_is_new(parts, stages):
    table = filled(parts, stages, evenly(parts, stages)).int()
    return torch.diff(table, dim=0, prepend=torch.zeros(1, parts, dtype=torch.int32)).bool()


@variant("never-all")
def a_share_of_the_stages(parts, stages):
    return filled(parts, stages, lambda s: round((parts - 1) / stages * s))


@variant("no-stage-for-the-head")
def counts_from_one(parts, stages):
    return filled(parts, stages, lambda s: round((parts - 1) * (s + 1) / stages))


@variant("rounded-down")
def floored(parts, stages):
    return filled(parts, stages, lambda s: math.floor(s * (parts - 1) / (stages - 1)))


@variant("head-frozen")
def counts_the_head_to_the_body(parts, stages):
    counts = [round(s * (parts - 1) / (stages - 1)) for s in range(stages)]
    return torch.tensor([[i >= parts - n for i in range(parts)] for n in counts])


@variant("frozen-for-trained")
def what_is_frozen(parts, stages):
    return filled(parts, stages, evenly(parts, stages)) == 0


@unknown
def head_only_at_first(parts, stages):
    table = filled(parts, stages, evenly(parts, stages))
    table[1:, -1] = False
    return table


@unknown
def transposed(parts, stages):
    return filled(parts, stages, evenly(parts, stages)).T


@right
def by_loops(parts, stages):
    return filled(parts, stages, evenly(parts, stages))


@right
def in_numpy(parts, stages):
    first = [parts - 1 - round(s * (parts - 1) / (stages - 1)) for s in range(stages)]
    return torch.from_numpy(np.greater_equal.outer(np.arange(parts), first).T.copy())
