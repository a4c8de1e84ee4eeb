"""Answers to `finetuning.insert_prompts`."""

import torch
from einops import repeat

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("finetuning.insert_prompts")


def written(x, prompts, prefix, gone, at):
    """A new sequence, into which the old tokens and the prompts are written; `at` is the first prompt's place."""
    b, n, d = x.shape
    p = len(prompts)
    kept = torch.cat([x[:, :prefix], x[:, prefix + gone :]], dim=1)
    out = x.new_zeros(b, kept.shape[1] + p, d)
    out[:, :at], out[:, at + p :] = kept[:, :at], kept[:, at:]
    out[:, at : at + p] = prompts
    return out


@variant("in-front")
def before_everything(x, prompts, prefix, replace=False):
    return written(x, prompts, prefix, len(prompts) if replace else 0, 0)


@variant("at-the-end")
def appended(x, prompts, prefix, replace=False):
    gone = len(prompts) if replace else 0
    return written(x, prompts, prefix, gone, x.shape[1] - gone)


@variant("never-replaced")
def ignores_replace(x, prompts, prefix, replace=False):
    return written(x, prompts, prefix, 0, prefix)


@variant("always-replaced")
def overwrites_patches(x, prompts, prefix, replace=False):
    return written(x, prompts, prefix, len(prompts), prefix)


@variant("one-prefix")
def only_cls(x, prompts, prefix, replace=False):
    return written(x, prompts, 1, len(prompts) if replace else 0, 1)


@variant("added-to-the-old")
def residual(x, prompts, prefix, replace=False):
    if not replace:
        return written(x, prompts, prefix, 0, prefix)
    out = x.clone()
    out[:, prefix : prefix + len(prompts)] += prompts
    return out


@unknown
def reversed_order(x, prompts, prefix, replace=False):
    return written(x, prompts.flip(0), prefix, len(prompts) if replace else 0, prefix)


@unknown
def frozen_prompts(x, prompts, prefix, replace=False):
    return written(x, prompts.detach(), prefix, len(prompts) if replace else 0, prefix)


@right
def by_writing(x, prompts, prefix, replace=False):
    return written(x, prompts, prefix, len(prompts) if replace else 0, prefix)


@right
def by_einops(x, prompts, prefix, replace=False):
    sizes = [prefix, len(prompts) * replace, x.shape[1] - prefix - len(prompts) * replace]
    first, _, rest = x.split(sizes, dim=1)
    return torch.cat([first, repeat(prompts, "p d -> b p d", b=x.shape[0]), rest], dim=1)
