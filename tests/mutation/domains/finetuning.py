"""Lesson 04: rates by layer, costs, schedules, low-rank updates, prompts, and state dicts."""

import torch
from torch import Tensor, nn

from vitcourse.course.cases import Case, build, call

from ..domain import Draws, domain


@domain("finetuning.layer_scales")
def layer_scales(rng: Draws) -> Case:
    return call(rng.size(1, 14), rng.choice([0.5, 0.65, 0.75, 0.9, 1.0]))


@domain("finetuning.backward_macs")
def backward_macs(rng: Draws) -> Case:
    layers = rng.size(1, 9)
    share = rng.choice([0.2, 0.5, 0.9])
    trained = torch.tensor([rng.sometimes(share) for _ in range(layers)])
    return call(torch.tensor([rng.size(0, 500) for _ in range(layers)]), trained)


@domain("finetuning.deep_first")
def deep_first(rng: Draws) -> Case:
    parts = rng.size(2, 15)
    return call(parts, rng.size(2, min(parts, 6)))


def slices_of(rng: Draws, width: int) -> dict[str, tuple[int, int]]:
    """Some of q, k and v in three blocks of rows, in this order."""
    chosen = [name for name in "qkv" if rng.sometimes(0.6)] or ["v"]
    return {name: ("qkv".index(name) * width, ("qkv".index(name) + 1) * width) for name in chosen}


@domain("finetuning.LoRALinear")
def lora_linear(rng: Draws) -> list[Case]:
    width, inside, rank = rng.size(1, 5), rng.size(1, 7), rng.size(1, 3)
    base = nn.Linear(inside, 3 * width).to(rng.dtype)
    base.load_state_dict({"weight": rng.normal(3 * width, inside), "bias": rng.normal(3 * width)})
    more = {} if rng.sometimes(0.4) else {"alpha": rng.choice([0.5, 1.0, 4.0])}
    module = build(base, slices_of(rng, width), rank, **more)
    calls = rng.size(1, 3)
    return [module.call(rng.floats(rng.size(1, 3), rng.size(1, 6), inside)) for _ in range(calls)]


@domain("finetuning.merged_weight")
def merged_weight(rng: Draws) -> Case:
    width, inside, rank = rng.size(1, 5), rng.size(1, 7), rng.size(1, 3)
    slices = slices_of(rng, width)
    lora_A = {name: rng.floats(rank, inside) for name in slices}
    lora_B = {name: rng.floats(width, rank) for name in slices}
    return call(rng.floats(3 * width, inside), lora_A, lora_B, slices, rng.choice([0.25, 1.0, 2.0]))


@domain("finetuning.insert_prompts")
def insert_prompts(rng: Draws) -> Case:
    dim, prefix, count, replace = rng.size(1, 6), rng.size(0, 4), rng.size(1, 5), rng.sometimes(0.5)
    tokens = prefix + (count if replace else 0) + rng.size(1, 9)
    return call(rng.floats(rng.size(1, 4), tokens, dim), rng.floats(count, dim), prefix, replace)


@domain("finetuning.interpolate")
def interpolate(rng: Draws) -> Case:
    rows, columns = rng.size(1, 4), rng.size(1, 5)

    def state() -> dict[str, Tensor]:
        return {"weight": rng.floats(rows, columns), "count": torch.tensor(rng.size(0, 99)), "bias": rng.floats(rows)}

    return call(state(), state(), rng.choice([0.0, 0.125, 0.5, 0.75, 1.0]))


@domain("finetuning.agreement")
def agreement(rng: Draws) -> Case:
    models, pictures, classes = rng.size(1, 5), rng.choice([1, 4, 16, 32]), rng.size(2, 6)
    return call([torch.tensor([rng.size(0, classes - 1) for _ in range(pictures)]) for _ in range(models)])
