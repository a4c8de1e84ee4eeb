"""The check of `video.tube_mask`, and its reference: the library's `tube_masking` also says who is seen, and where."""

import torch
from torch import Tensor

from vitcourse.course.checks import call, check


def tube_mask(noise: Tensor, visible: int, moments: int) -> Tensor:
    """What is hidden, (B, t · N) bool: the ``visible`` places with the least noise (B, N) are seen in all moments.

    >>> tube_mask(torch.tensor([[0.3, 0.1, 0.9]]), visible=1, moments=2).int()
    tensor([[1, 0, 1, 1, 0, 1]], dtype=torch.int32)
    """
    rank = noise.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return (rank >= visible).repeat(1, moments)


@check(
    "video.tube_mask",
    reference="vitcourse.course.checks.video.tube_mask.tube_mask",
    level=2,
    minutes=10,
    why="Where a patch is hidden in one frame and seen in the next, predicting it is copying. Tubes leave nothing to copy.",
    hints=[
        "First one frame: which places are among the `visible` ones with the least noise?",
        "argsort says who comes first. Sorted once more, it says where in the order each place stands.",
        "The tokens of a clip come frame by frame: the whole mask of a frame, again and again.",
    ],
)
def tube_mask_cases(rng):
    yield call(rng.normal(3, 7), 2, 4)
    yield call(rng.normal(2, 9), 5, 3).on("more that is seen")
    yield call(rng.uniform(1, 6), 1, 5).on("one clip, and one place that is seen")
    yield call(rng.normal(4, 8), 3, 1).on("one moment")
    yield call(rng.normal(2, 5), 4, 2).on("one place that is hidden")
    close = 0.5 + rng.normal(2, 8).argsort(dim=1).float() * 2**-20
    yield call(close, 3, 2).on("noise that differs in its last bits")


def _rank(noise):
    return noise.argsort(dim=1, stable=True).argsort(dim=1, stable=True)


def _catalogue(key, message, faulty):
    tube_mask_cases.mistake(key, message, lambda noise, visible, moments: faulty(noise, visible, moments))


_catalogue(
    "inverted",
    "True stands for what is seen here; it should stand for what is hidden",
    lambda noise, visible, moments: (_rank(noise) < visible).repeat(1, moments),
)
_catalogue(
    "most-noise",
    "the places with the most noise are seen; it should be those with the least",
    lambda noise, visible, moments: (_rank(-noise) >= visible).repeat(1, moments),
)
_catalogue(
    "place-by-place",
    "the moments of a place follow each other here; the tokens of a clip come frame by frame",
    lambda noise, visible, moments: (_rank(noise) >= visible).repeat_interleave(moments, dim=1),
)
_catalogue(
    "not-inverted",
    "this asks who stands at each place of the order; the question is where in the order each place stands",
    lambda noise, visible, moments: (noise.argsort(dim=1, stable=True) >= visible).repeat(1, moments),
)
_catalogue(
    "visible-hidden",
    "as many places are hidden as should be seen",
    lambda noise, visible, moments: (_rank(noise) >= noise.shape[1] - visible).repeat(1, moments),
)
_catalogue(
    "one-for-all",
    "all clips hide the same places, those of the first one",
    lambda noise, visible, moments: (_rank(noise[:1]) >= visible).repeat(len(noise), moments),
)
_catalogue(
    "one-moment",
    "this is the mask of one moment; the clip has several, and all of them need it",
    lambda noise, visible, moments: _rank(noise) >= visible,
)
_catalogue(
    "not-flat",
    "the moments stand in an axis of their own; the tokens of a clip are one sequence",
    lambda noise, visible, moments: (_rank(noise) >= visible)[:, None].repeat(1, moments, 1),
)
_catalogue(
    "other-places",
    "each moment hides other places, so what is hidden in one frame is seen in the next, and can be copied",
    lambda noise, visible, moments: torch.cat([_rank(noise).roll(k, 1) >= visible for k in range(moments)], dim=1),
)
