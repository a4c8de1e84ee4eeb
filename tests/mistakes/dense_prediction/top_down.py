"""Answers to `dense_prediction.top_down`."""

import torch
import torch.nn.functional as F
from einops import repeat

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("dense_prediction.top_down")


def twice(x, like):
    """Every pixel four times, and what is too much cut off."""
    x = repeat(x, "b c h w -> b c (h p) (w q)", p=2, q=2)
    return x[..., : like.shape[-2], : like.shape[-1]]


@variant("bilinear")
def smooth(maps):
    out = list(maps)
    for i in range(len(out) - 2, -1, -1):
        out[i] = out[i] + F.interpolate(out[i + 1], out[i].shape[2:], mode="bilinear", align_corners=False)
    return out


@variant("one-step")
def neighbours_only(maps):
    out = list(maps)
    for i in range(len(out) - 1):
        out[i] = maps[i] + twice(maps[i + 1], maps[i])
    return out


@variant("mean")
def halves(maps):
    out = list(maps)
    for i in reversed(range(len(out) - 1)):
        out[i] = 0.5 * out[i] + 0.5 * twice(out[i + 1], out[i])
    return out


@variant("coarsest-first")
def appended(maps):
    out = [maps[-1]]
    for finer in reversed(maps[:-1]):
        out.append(finer + twice(out[-1], finer))
    return out


@variant("replaced")
def forgot_to_add(maps):
    out = list(maps)
    for i in reversed(range(len(out) - 1)):
        out[i] = twice(out[i + 1], out[i])
    return out


@variant("bottom-up")
def upwards(maps):
    out = list(maps)
    for i in range(1, len(out)):
        sizes = zip(out[i - 1].shape[2:], out[i].shape[2:], strict=True)
        rows, columns = ([int(k * n / m) for k in range(m)] for n, m in sizes)
        out[i] = out[i] + out[i - 1][:, :, rows][:, :, :, columns]
    return out


@variant("nearest-exact")
def by_the_nearest_middle(maps):
    out = list(maps)
    for i in reversed(range(len(out) - 1)):
        sizes = zip(out[i].shape[2:], out[i + 1].shape[2:], strict=True)
        rows, columns = ([(2 * k + 1) * m // (2 * n) for k in range(n)] for n, m in sizes)
        out[i] = out[i] + out[i + 1][:, :, rows][:, :, :, columns]
    return out


@unknown
def coarsest_to_all(maps):
    return [*(m + F.interpolate(maps[-1], m.shape[2:]) for m in maps[:-1]), maps[-1]]


@unknown
def product(maps):
    out = list(maps)
    for i in reversed(range(len(out) - 1)):
        out[i] = out[i] * twice(out[i + 1], out[i])
    return out


@unknown
def in_place(maps):
    for i in reversed(range(len(maps) - 1)):
        maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:])
    return maps


@right
def by_repetition(maps):
    out = list(maps)
    for i in reversed(range(len(out) - 1)):
        out[i] = out[i] + twice(out[i + 1], out[i])
    return out


@right
def by_index(maps):
    out = list(maps)
    for i in reversed(range(len(out) - 1)):
        rows, columns = (torch.arange(n) // 2 for n in out[i].shape[-2:])
        out[i] = out[i] + out[i + 1][..., rows, :][..., columns]
    return out


@right
def recursive(maps):
    if len(maps) == 1:
        return list(maps)
    above = recursive(maps[1:])
    return [F.interpolate(above[0], maps[0].shape[2:]) + maps[0], *above]
