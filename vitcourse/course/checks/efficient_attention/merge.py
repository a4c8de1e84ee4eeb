"""The check of `efficient_attention.merge`."""

import torch

from vitcourse.course.checks import call, check


@check(
    "efficient_attention.merge",
    reference="vitcourse.efficient_attention.merge",
    level=3,
    minutes=15,
    gradients=("x",),
    why="A token may stand for many patches; an average that forgets this lets a single patch outvote them.",
    hints=[
        "Two sums for each place: of size · token, and of size.",
        "scatter_add, or index_add over batch and places in one axis, adds up all that goes to one place.",
        "Places count from 0 in each image: image b begins at b · count.",
    ],
    exempt={
        "integers": "tokens are embeddings, not pixels",
    },
)
def merge(rng):
    def sizes(*shape):
        return rng.integers(1, 6, shape).double()

    places = torch.stack([torch.randperm(7, generator=rng.generator) % 5 for _ in range(3)])
    yield call(rng.normal(3, 7, 4), sizes(3, 7), places, 5)
    yield call(rng.normal(1, 6, 3), sizes(1, 6), torch.tensor([[0, 1, 1, 2, 1, 0]]), 3).on("three tokens for one place")
    yield call(rng.normal(2, 4, 2), sizes(2, 4), torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]]), 4).on("nothing to merge")


def _onto(place, count):
    """(B, count, N), one where a token goes to a place."""
    return torch.nn.functional.one_hot(place, count).mT.double()


def _catalogue_merge(key, message, tokens, sizes=lambda onto, size: (onto @ size[..., None])[..., 0]):
    def faulty(x, size, place, count):
        onto = _onto(place, count)
        return tokens(onto, x, size), sizes(onto, size)

    merge.mistake(key, message, faulty)


def _mean(onto, x, size):
    weights = onto * size[:, None]
    return weights @ x / weights.sum(-1, keepdim=True)


_catalogue_merge(
    "unweighted",
    "every token counts the same, however many patches it stands for",
    lambda onto, x, size: onto @ x / onto.sum(-1, keepdim=True),
)
_catalogue_merge(
    "not-divided",
    "the tokens are added up, not averaged: they grow with every merge",
    lambda onto, x, size: onto @ (x * size[..., None]),
)
_catalogue_merge(
    "divided-by-the-tokens",
    "the sum is weighted with sizes, but divided by the number of tokens",
    lambda onto, x, size: onto @ (x * size[..., None]) / onto.sum(-1, keepdim=True),
)
_catalogue_merge(
    "tokens-counted",
    "the new size is the number of tokens that were merged; each of them may stand for several patches",
    _mean,
    lambda onto, size: onto.sum(-1),
)
_catalogue_merge(
    "size-averaged",
    "the sizes are averaged like the tokens, so patches get lost; together they must stay as many as they were",
    _mean,
    lambda onto, size: (onto @ size[..., None])[..., 0] / onto.sum(-1),
)


@merge.mistake("places-of-the-first", "all images are merged like the first one; each has places of its own")
def _(x, size, place, count):
    onto = _onto(place[:1], count).expand(len(x), -1, -1)
    return _mean(onto, x, size), (onto @ size[..., None])[..., 0]
