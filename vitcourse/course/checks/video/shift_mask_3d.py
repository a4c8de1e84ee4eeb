"""The check of `video.shift_mask_3d`."""

import torch
from einops import rearrange

from vitcourse.course.checks import call, check


@check(
    "video.shift_mask_3d",
    reference="vitcourse.video.shift_mask_3d",
    level=4,
    minutes=25,
    why="After the roll the end of a clip shares a window with its beginning. Without the mask the model takes them for "
    "neighbours in time.",
    hints=[
        "One axis first: pad its length to a multiple of the window, and roll it. Which places came around the end? They "
        "are the last ones, as many as the shift.",
        "A token has three answers, one an axis. Two tokens of a window are strangers if they differ in any of them.",
        "Number the kinds on the map (T, H, W), cut it into windows as the clip is cut, and compare every number of a "
        "window with every other: kinds[:, :, None] != kinds[:, None].",
        "An axis of n tokens in windows of p is padded to -(-n // p) * p. Padding is no kind of its own.",
    ],
)
def shift_mask_3d(rng):
    yield call((4, 6, 9), (2, 3, 3), (1, 2, 1))
    yield call((5, 7, 6), (2, 3, 4), (1, 1, 3)).on("a map that the windows do not divide")
    yield call((1, 6, 4), (1, 3, 2), (0, 2, 1)).on("a clip shorter than the window, which has shrunk to it")
    yield call((6, 2, 2), (3, 2, 2), (1, 0, 0)).on("windows that are shifted along time alone")
    yield call((2, 4, 8), (2, 4, 4), (0, 0, 3)).on("windows that are shifted along the columns alone")
    yield call((3, 5, 5), (2, 2, 3), (1, 0, 2)).on("odd sizes in all axes")
    yield call((4, 2, 6), (2, 2, 3), (0, 0, 0)).on("windows that are not shifted")


def _wrapped(n, window, shift):
    """Which places of the padded, rolled axis came around its end."""
    length = -(-n // window) * window
    return torch.arange(length) >= length - shift


def _kinds(*axes):
    """(T, H, W), a number for each combination of three (n,) axes."""
    t, h, w = axes
    return 4 * t.long()[:, None, None] + 2 * h.long()[:, None] + w.long()


def _cut(kinds, window_size):
    p, q, r = window_size
    return rearrange(kinds, "(i p) (j q) (k r) -> (i j k) (p q r)", p=p, q=q, r=r)


def _differ(kinds, window_size, cut=_cut):
    windows = cut(kinds, window_size)
    return windows[:, :, None] != windows[:, None]


def _mask(size, window_size, shift, axis=_wrapped, used=(1, 1, 1)):
    axes = [axis(*numbers) & bool(use) for *numbers, use in zip(size, window_size, shift, used, strict=True)]
    return _differ(_kinds(*axes), window_size)


def _catalogue(key, message, faulty):
    shift_mask_3d.mistake(key, message, lambda size, window_size, shift: faulty(size, window_size, shift))


_catalogue(
    "inverted", "true and false are exchanged: here true marks who must not be seen", lambda *sizes: ~_mask(*sizes)
)
_catalogue(
    "nobody-masked",
    "no pair at all is kept apart, so the end of the clip still sees its beginning",
    lambda *sizes: torch.zeros_like(_mask(*sizes)),
)
_catalogue(
    "additive",
    "these are numbers to add to the scores; what is wanted is the mask itself, true or false",
    lambda *sizes: _mask(*sizes) * -100.0,
)
_catalogue(
    "space-only",
    "strangers in space are kept apart, but the roll goes along time, too: the last frames meet the first",
    lambda *sizes: _mask(*sizes, used=(0, 1, 1)),
)
_catalogue(
    "time-only",
    "strangers in time are kept apart, but the roll goes along rows and columns, too",
    lambda *sizes: _mask(*sizes, used=(1, 0, 0)),
)
_catalogue(
    "rows-forgotten",
    "nobody is kept apart along the rows; the roll goes along all three axes",
    lambda *sizes: _mask(*sizes, used=(1, 0, 1)),
)
_catalogue(
    "columns-forgotten",
    "nobody is kept apart along the columns; the roll goes along all three axes",
    lambda *sizes: _mask(*sizes, used=(1, 1, 0)),
)
_catalogue(
    "before-the-roll",
    "this is the mask of the map before it was rolled: the strangers sit elsewhere by then",
    lambda *sizes: _mask(*sizes, axis=lambda n, window, shift: torch.arange(-(-n // window) * window) < shift),
)
_catalogue(
    "other-direction",
    "the cut through the last windows is where a roll in the other direction would put it",
    lambda *sizes: _mask(*sizes, axis=lambda n, window, shift: _wrapped(n, window, (window - shift) % window)),
)


_catalogue(
    "unpadded-end",
    "those that came around are counted from the end of the map as it was; it is padded before it is rolled",
    lambda *sizes: _mask(*sizes, axis=lambda n, window, shift: torch.arange(-(-n // window) * window) >= n - shift),
)


@shift_mask_3d.mistake(
    "windows-before",
    "strangers are here who were in different windows before the shift; to bring those together is what it is for",
)
def _(size, window_size, shift):
    axes = []
    for n, window, by in zip(size, window_size, shift, strict=True):
        axes.append((torch.arange(-(-n // window) * window) // window).roll(-by))
    t, h, w = axes
    return _differ(10_000 * t[:, None, None] + 100 * h[:, None] + w, window_size)


@shift_mask_3d.mistake(
    "rolled-twice",
    "the kinds are those of the rolled map, and are rolled with it once more: the strangers sit elsewhere",
)
def _(size, window_size, shift):
    axes = [_wrapped(n, p, s).roll(-s) for n, p, s in zip(size, window_size, shift, strict=True)]
    return _differ(_kinds(*axes), window_size)


@shift_mask_3d.mistake(
    "two-kinds",
    "tokens that came around the end are one kind here, along whichever axis they came; in a corner eight kinds meet",
)
def _(size, window_size, shift):
    t, h, w = (_wrapped(*axis) for axis in zip(size, window_size, shift, strict=True))
    return _differ((t[:, None, None] | h[:, None] | w).long(), window_size)


@shift_mask_3d.mistake(
    "all-axes", "two tokens count as strangers only if they differ along every axis; one axis is enough"
)
def _(size, window_size, shift):
    apart = torch.ones((), dtype=torch.bool)
    for used in torch.eye(3, dtype=torch.long).tolist():
        apart = apart & _mask(size, window_size, shift, used=used)
    return apart


@shift_mask_3d.mistake(
    "plain-reshape", "the kinds are right, but cut into equal stretches of memory; windows are boxes of the map"
)
def _(size, window_size, shift):
    axes = [_wrapped(*axis) for axis in zip(size, window_size, shift, strict=True)]
    volume = window_size[0] * window_size[1] * window_size[2]
    return _differ(_kinds(*axes), window_size, cut=lambda kinds, _: kinds.reshape(-1, volume))


@shift_mask_3d.mistake(
    "padding-masked", "padding is kept apart from the map; here it takes part, as it did when the weights were trained"
)
def _(size, window_size, shift):
    axes = []
    for n, window, by in zip(size, window_size, shift, strict=True):
        length = -(-n // window) * window
        origin = (torch.arange(length) + by) % length
        axes.append(torch.where(origin >= n, 2, _wrapped(n, window, by).long()))
    t, h, w = axes
    return _differ(9 * t[:, None, None] + 3 * h[:, None] + w, window_size)
