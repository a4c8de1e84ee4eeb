"""The check of `hierarchical.shift_mask`."""

import torch

from vitcourse.course.checks import call, check

from ._shared import differ, mask_of, wrapped


@check(
    "hierarchical.shift_mask",
    reference="vitcourse.hierarchical.shift_mask",
    level=4,
    minutes=25,
    why="After the roll, tokens from opposite borders share a window. Without the mask they would take each other for "
    "neighbours.",
    hints=[
        "Look at the rolled map along one axis: its last tokens, as many as the shift, were rolled there from the other "
        "end. Which two tokens of a window are strangers?",
        "A token has two answers: did it go around the edge along the rows, and along the columns? Strangers differ in "
        "at least one of them.",
        "Number the four kinds of token on the rolled map, cut that map of numbers into windows, and compare every "
        "number of a window with every other.",
    ],
)
def shift_mask(rng):
    yield call((6, 9), (3, 3), (2, 1))
    yield call((4, 8), (4, 4), (3, 3)).on("a single row of windows")
    yield call((4, 6), (2, 3), (1, 2)).on("windows that are not square")
    yield call((8, 4), (4, 4), (0, 1)).on("a shift along one axis only")


shift_mask.mistake(
    "inverted",
    "true and false are exchanged: here true marks who must not be seen",
    lambda size, window_size, shift: ~mask_of(size, window_size, shift),
)
shift_mask.mistake(
    "nobody-masked",
    "no pair at all is kept apart, so the opposite borders of the image still see each other",
    lambda size, window_size, shift: torch.zeros_like(mask_of(size, window_size, shift)),
)
shift_mask.mistake(
    "additive",
    "these are numbers to add to the scores; what is wanted is the mask itself, true or false",
    lambda size, window_size, shift: mask_of(size, window_size, shift) * -100.0,
)
shift_mask.mistake(
    "other-direction",
    "the cut through the last windows is where a roll in the other direction would put it",
    lambda size, window_size, shift: mask_of(
        size, window_size, [(w - s) % w for w, s in zip(window_size, shift, strict=True)]
    ),
)


@shift_mask.mistake(
    "before-the-roll", "this is the mask of the map before it was rolled: the strangers sit elsewhere by then"
)
def _(size, window_size, shift):
    down, across = (torch.arange(n) < s for n, s in zip(size, shift, strict=True))
    return differ(2 * down[:, None] + across, window_size)


@shift_mask.mistake("rows-only", "only strangers along the rows are kept apart; the roll goes along both axes")
def _(size, window_size, shift):
    down, across = wrapped(size, shift)
    return differ(down[:, None] | torch.zeros_like(across), window_size)


@shift_mask.mistake("columns-only", "only strangers along the columns are kept apart; the roll goes along both axes")
def _(size, window_size, shift):
    down, across = wrapped(size, shift)
    return differ(torch.zeros_like(down)[:, None] | across, window_size)


@shift_mask.mistake(
    "two-kinds",
    "in the corner four kinds of token meet, from the four corners of the image; here some of them are still mixed up",
)
def _(size, window_size, shift):
    down, across = wrapped(size, shift)
    return differ(down[:, None] | across, window_size)


@shift_mask.mistake(
    "plain-reshape", "the kinds are right, but cut into equal stretches of memory; windows are squares of the map"
)
def _(size, window_size, shift):
    down, across = wrapped(size, shift)
    region = (2 * down[:, None] + across).reshape(-1, window_size[0] * window_size[1])
    return region[:, :, None] != region[:, None]
