"""Answers to `finetuning.merged_weight`."""

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("finetuning.merged_weight")


def stacked(weight, lora_A, lora_B, slices, scale, keep=1.0):
    """Row blocks, joined again."""
    rows = list(weight.unbind(0))
    for name, (start, stop) in slices.items():
        new = torch.einsum("or,ri->oi", lora_B[name], lora_A[name]) * scale
        rows[start:stop] = [keep * row + update for row, update in zip(rows[start:stop], new, strict=True)]
    return torch.stack(rows)


@variant("no-factor")
def plain_products(weight, lora_A, lora_B, slices, scale):
    return stacked(weight, lora_A, lora_B, slices, 1)


@variant("update-alone")
def replaced(weight, lora_A, lora_B, slices, scale):
    return stacked(weight, lora_A, lora_B, slices, scale, keep=0.0)


@variant("one-after-the-other")
def all_at_once(weight, lora_A, lora_B, slices, scale):
    update = torch.cat([scale * lora_B[name] @ lora_A[name] for name in slices])
    return weight + torch.nn.functional.pad(update, (0, 0, 0, len(weight) - len(update)))


@variant("in-place")
def into_the_weight(weight, lora_A, lora_B, slices, scale):
    with torch.no_grad():
        for name, (start, stop) in slices.items():
            weight[start:stop].add_(lora_B[name] @ lora_A[name], alpha=scale)
    return weight


@unknown
def subtracted(weight, lora_A, lora_B, slices, scale):
    return stacked(weight, lora_A, lora_B, slices, -scale)


@unknown
def scaled_twice(weight, lora_A, lora_B, slices, scale):
    return stacked(weight, {n: 3 * a for n, a in lora_A.items()}, lora_B, slices, scale)


@right
def by_rows(weight, lora_A, lora_B, slices, scale):
    return stacked(weight, lora_A, lora_B, slices, scale)


@right
def by_a_zero_matrix(weight, lora_A, lora_B, slices, scale):
    for name, (start, stop) in slices.items():
        update = scale * (lora_B[name] @ lora_A[name])
        weight = weight + torch.nn.functional.pad(update, (0, 0, start, len(weight) - stop))
    return weight
