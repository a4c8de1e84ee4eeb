"""Answers to `finetuning.interpolate`."""

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("finetuning.interpolate")


def walked(start, end, share, far, names=None):
    """By `torch.lerp`; `far` says whether integers are those of the end."""
    out = {}
    for name in names or start:
        a, b = start[name], end[name]
        out[name] = torch.lerp(a, b, share) if torch.is_floating_point(a) else (b if far else a) + 0
    return out


@variant("ends-exchanged")
def backwards(start, end, alpha):
    return walked(start, end, 1 - alpha, alpha <= 0.5 and alpha != 0.5)


@variant("not-a-mean")
def a_sum(start, end, alpha):
    out = walked(start, end, 0.0, alpha >= 0.5)
    return {n: t.add(end[n], alpha=alpha) if t.is_floating_point() else t for n, t in out.items()}


@variant("integers-mixed")
def all_alike(start, end, alpha):
    return {name: start[name] * (1 - alpha) + end[name] * alpha for name in end}


@variant("integers-of-the-start")
def copies_what_cannot_be_halved(start, end, alpha):
    return walked(start, end, alpha, False)


@variant("integers-left-out")
def only_floats(start, end, alpha):
    return walked(start, end, alpha, False, [n for n, t in start.items() if t.dtype.is_floating_point])


@unknown
def always_the_middle(start, end, alpha):
    return walked(start, end, 0.5, alpha >= 0.5)


@unknown
def eased(start, end, alpha):
    return walked(start, end, alpha**2 * (3 - 2 * alpha) + 0.1, alpha >= 0.5)


@right
def lerped(start, end, alpha):
    return walked(start, end, alpha, alpha >= 0.5)


@right
def from_the_start_towards_the_end(start, end, alpha):
    out = {name: tensor.clone() for name, tensor in (end if alpha >= 0.5 else start).items()}
    for name, tensor in start.items():
        if tensor.is_floating_point():
            out[name] = tensor + alpha * (end[name] - tensor)
    return out
