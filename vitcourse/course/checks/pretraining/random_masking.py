"""The check of `pretraining.random_masking`."""

import torch

from vitcourse.course.checks import call, check


@check(
    "pretraining.random_masking",
    reference="vitcourse.pretraining.random_masking",
    level=2,
    minutes=10,
    why="Three lines; every masked model that drops tokens has them.",
    hints=[
        "Sort each row. Whose numbers stand in front?",
        "argsort says who comes first, second, third. You need that, and the opposite question: where did patch 0 end up?",
        "The inverse of a permutation is the permutation that sorts it. And who is hidden can be read off the places.",
    ],
)
def random_masking(rng):
    yield call(rng.normal(3, 7), 4)
    yield call(rng.uniform(1, 9), 2).on("one image")
    yield call(rng.uniform(2, 6), 5).on("one hidden patch")
    close = 0.5 + rng.normal(2, 8).argsort(dim=1).float() * 2**-20
    yield call(close, 3).on("noise that differs in its last bits")


def _sorted(noise):
    return noise.argsort(dim=1, stable=True)


def _masked(noise, visible, order=_sorted, restore=_sorted, keep=None, mask=None):
    """Masking in its steps, each of which a mistake may replace."""
    order = order(noise)
    place = restore(order)
    chosen = order[:, :visible] if keep is None else keep(order, visible)
    return chosen, place, place >= visible if mask is None else mask(order, visible)


def _catalogue(key, message, **change):
    random_masking.mistake(key, message, lambda noise, visible: _masked(noise, visible, **change))


_catalogue(
    "not-inverted",
    "`restore` says which patch is at each place of the order; it should say at which place each patch is",
    restore=lambda order: order,
    mask=lambda order, visible: _sorted(order) >= visible,
)
_catalogue(
    "not-inverted-mask",
    "`restore` and `mask` are read off the order itself; both ask where each patch went",
    restore=lambda order: order,
)
_catalogue(
    "most-noise",
    "the patches with the most noise are kept; it should be those with the least",
    order=lambda noise: noise.argsort(dim=1, descending=True, stable=True),
)
_catalogue(
    "mask-inverted",
    "`mask` is True where a patch is seen; it should be True where one is hidden",
    mask=lambda order, visible: _sorted(order) < visible,
)
_catalogue(
    "mask-shuffled",
    "`mask` lies in the shuffled order, in which those that are seen come first; it should lie on the image",
    mask=lambda order, visible: (torch.arange(order.shape[1]) >= visible).repeat(len(order), 1),
)
_catalogue(
    "keep-in-reading-order",
    "`keep` is in reading order, but `restore` counts places in the order of the noise: the two no longer fit together",
    keep=lambda order, visible: order[:, :visible].sort(1).values,
)
_catalogue(
    "one-for-all",
    "all images hide the same patches, those of the first one",
    order=lambda noise: _sorted(noise[:1]).repeat(len(noise), 1),
)
_catalogue("hidden-kept", "`keep` names the patches that are hidden", keep=lambda order, visible: order[:, visible:])
