"""The check of `finetuning.insert_prompts`, and its reference: the library's `Prompts` does it in hooks."""

import torch
from torch import Tensor

from vitcourse.course.checks import call, check


def insert_prompts(x: Tensor, prompts: Tensor, prefix: int, replace: bool = False) -> Tensor:
    """(B, prefix + N, D), (p, D) -> (B, prefix + p + N, D); with `replace` x has p prompts already, which go.

    >>> insert_prompts(torch.zeros(2, 5, 3), torch.ones(4, 3), 1)[0, :, 0]
    tensor([0., 1., 1., 1., 1., 0., 0., 0., 0.])
    """
    patches = x[:, prefix + len(prompts) :] if replace else x[:, prefix:]
    return torch.cat([x[:, :prefix], prompts.expand(len(x), -1, -1), patches], dim=1)


@check(
    "finetuning.insert_prompts",
    reference="vitcourse.course.checks.finetuning.insert_prompts.insert_prompts",
    level=2,
    minutes=10,
    why="Where a token stands decides who takes it for a patch: one line too early, and positions are added to it; one "
    "too late, and it lands in the mean.",
    hints=[
        "Three pieces, joined along the tokens: the prefix, the prompts, the patches.",
        "The prompts are the same for every image; `expand` gives them a batch axis without a copy.",
        "With `replace`, the patches begin p tokens later.",
    ],
    exempt={"integers": "tokens are no pixels"},
)
def insert_prompts_cases(rng):
    yield call(rng.normal(3, 7, 4), rng.normal(2, 4), 1)
    yield call(rng.normal(2, 9, 3), rng.normal(4, 3), 1, replace=True).on("prompts that are there already")
    yield call(rng.normal(2, 8, 5), rng.normal(3, 5), 3, replace=False).on("[CLS] and registers")
    yield call(rng.normal(2, 10, 5), rng.normal(3, 5), 2, replace=True).on("a register, and prompts that go")
    yield call(rng.normal(1, 6, 3), rng.normal(2, 3), 0).on("a model without [CLS]")
    yield call(rng.normal(2, 7, 3), rng.normal(2, 3), 0, replace=True).on("prompts that go, without [CLS]")


def _pieces(x, prompts, prefix, replace):
    rest = x[:, prefix + (len(prompts) if replace else 0) :]
    return x[:, :prefix], prompts.expand(len(x), -1, -1), rest


@insert_prompts_cases.mistake(
    "in-front", "the prompts stand in front of [CLS], so that a head that reads token 0 reads a prompt"
)
def _(x, prompts, prefix, replace=False):
    first, new, rest = _pieces(x, prompts, prefix, replace)
    return torch.cat([new, first, rest], dim=1)


@insert_prompts_cases.mistake(
    "at-the-end", "the prompts stand behind the patches; they belong between the prefix and these"
)
def _(x, prompts, prefix, replace=False):
    first, new, rest = _pieces(x, prompts, prefix, replace)
    return torch.cat([first, rest, new], dim=1)


@insert_prompts_cases.mistake(
    "never-replaced", "the prompts of the block before stay, so that the sequence grows with every block"
)
def _(x, prompts, prefix, replace=False):
    return torch.cat(_pieces(x, prompts, prefix, False), dim=1)


@insert_prompts_cases.mistake(
    "always-replaced", "tokens are thrown away where there are no prompts yet: these are patches"
)
def _(x, prompts, prefix, replace=False):
    return torch.cat(_pieces(x, prompts, prefix, True), dim=1)


@insert_prompts_cases.mistake(
    "one-prefix", "only one token is kept in front, whatever `prefix` says: registers land among the patches"
)
def _(x, prompts, prefix, replace=False):
    return torch.cat(_pieces(x, prompts, 1, replace), dim=1)


@insert_prompts_cases.mistake(
    "added-to-the-old", "new prompts are added to what the block has made of the old ones; they should replace it"
)
def _(x, prompts, prefix, replace=False):
    first, new, rest = _pieces(x, prompts, prefix, replace)
    return torch.cat([first, new + (x[:, prefix : prefix + len(prompts)] if replace else 0), rest], dim=1)
