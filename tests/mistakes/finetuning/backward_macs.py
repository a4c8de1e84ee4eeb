"""Answers to `finetuning.backward_macs`."""

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("finetuning.backward_macs")


def walk(forward, trained, cost):
    """A loop over the layers; ``cost(is_trained, trained_before, trained_behind)`` in forward passes."""
    flags = trained.tolist()
    times = [cost(on, any(flags[:i]), any(flags[i + 1 :])) for i, on in enumerate(flags)]
    return torch.tensor([n * f for n, f in zip(times, forward.tolist(), strict=True)])


@variant("frozen-is-free")
def skips_the_frozen(forward, trained):
    return walk(forward, trained, lambda on, before, _: 1 + before if on else 0)


@variant("input-of-the-lowest")
def itself_included(forward, trained):
    return walk(forward, trained, lambda on, before, _: on + (before or on))


@variant("whole-way-down")
def everything_has_a_gradient(forward, trained):
    return walk(forward, trained, lambda on, before, behind: (1 + on) * (on or before or behind))


@variant("from-the-wrong-end")
def looks_behind(forward, trained):
    return walk(forward, trained, lambda on, _, behind: on + behind)


@variant("twice-the-trained")
def two_for_one(forward, trained):
    return torch.where(trained, forward + forward, 0)


@unknown
def once(forward, trained):
    return walk(forward, trained, lambda on, before, _: int(on or before))


@unknown
def forward_included(forward, trained):
    return walk(forward, trained, lambda on, before, _: 1 + on + before)


@right
def in_a_loop(forward, trained):
    out, flows = [], False
    for macs, on in zip(forward, trained, strict=True):
        out.append(macs * (int(on) + int(flows)))
        flows = flows or bool(on)
    return torch.stack(out)


@right
def by_the_first_index(forward, trained):
    lowest = int(trained.long().argmax()) if trained.any() else len(trained)
    return forward * trained + forward * (torch.arange(len(trained)) > lowest)
