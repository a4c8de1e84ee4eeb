"""The check of `finetuning.backward_macs`, and its reference: the library does the same with a model's own layers."""

import torch
from torch import Tensor

from vitcourse.course.checks import call, check


def backward_macs(forward: Tensor, trained: Tensor) -> Tensor:
    """Multiply–adds of each layer's backward pass: once for its weight, if trained, once for its input, if asked for.

    Args:
        forward: (L,) multiply–adds of the forward pass, from the first layer to the last.
        trained: (L,) bool.

    >>> backward_macs(torch.tensor([5, 5, 5]), torch.tensor([False, True, False]))
    tensor([0, 5, 5])
    """
    trained = trained.long()
    flows = (trained.cumsum(0) - trained > 0).long()
    return forward * (trained + flows)


@check(
    "finetuning.backward_macs",
    reference="vitcourse.course.checks.finetuning.backward_macs.backward_macs",
    level=3,
    minutes=15,
    why="It is often said that freezing most of a model makes training cheap. This says when that is true, before you "
    "have rented the GPU.",
    hints=[
        "Answer the two questions layer by layer for: frozen, trained, frozen, trained.",
        "Is anything trained before layer i? A running sum over `trained` knows, less the layer itself.",
        "Each of the two answers is 0 or 1, and costs as much as the forward pass.",
    ],
    exempt={
        "batch": "the numbers are counts of one chain of layers",
        "single": "the numbers are counts of one chain of layers",
    },
)
def backward_cases(rng):
    def counts(n):
        return rng.integers(3, 50, (n,))

    yield call(counts(5), torch.tensor([False, True, False, True, False]))
    yield call(counts(4), torch.tensor([True, True, True, True])).on("a model of which all is trained")
    yield call(counts(4), torch.tensor([False, False, False, True])).on("a linear probe")
    yield call(counts(6), torch.tensor([True, False, False, False, False, True])).on("a trained stem and head")
    yield call(counts(3), torch.tensor([False, False, False])).on("a model of which nothing is trained")
    norm = counts(5)
    norm[1] = 0
    trained = torch.tensor([False, True, False, False, True])
    yield call(norm, trained).on("a norm, without multiply–adds, that is the lowest to be trained")
    yield call(2 * counts(4) + 2**25 + 1, torch.tensor([True, False, True, True])).on("large odd numbers")


def _flows(trained, whole=False):
    count = trained.long().cumsum(0)
    return ((count if whole else count - trained.long()) > 0).long()


backward_cases.mistake(
    "frozen-is-free",
    "a frozen layer costs nothing here; but what is trained below it waits for a gradient that must pass through it",
    lambda forward, trained: forward * trained * (1 + _flows(trained)),
)
backward_cases.mistake(
    "input-of-the-lowest",
    "the lowest trained layer is asked for the gradient of its input, which nobody before it wants",
    lambda forward, trained: forward * (trained.long() + _flows(trained, whole=True)),
)
backward_cases.mistake(
    "whole-way-down",
    "frozen layers below the lowest trained one cost something too; nothing flows there",
    lambda forward, trained: forward * (1 + trained.long()) * bool(trained.any()),
)
backward_cases.mistake(
    "from-the-wrong-end",
    "the gradient flows where something *behind* a layer is trained; it is what lies *before* a layer that asks for it",
    lambda forward, trained: forward * (trained.long() + _flows(trained.flip(0)).flip(0)),
)
backward_cases.mistake(
    "twice-the-trained",
    "only trained layers are counted, each twice: this leaves out the frozen ones that the gradient passes through",
    lambda forward, trained: 2 * forward * trained,
)
