"""The check of `video.inflate_weight`."""

import torch

from vitcourse.course.checks import call, check


@check(
    "video.inflate_weight",
    reference="vitcourse.video.inflate_weight",
    level=2,
    minutes=10,
    why="Few video models are trained from nothing: they begin as a model of images, which must not notice that time has "
    "been added.",
    hints=[
        "The new axis stands between the channels and the rows. Every frame gets the filter, or one frame alone does.",
        "Show a clip in which nothing moves to the new filter: what must it say? What do its frames then have to sum to?",
        "The frame at the centre is number ⌊t/2⌋, counted from 0.",
    ],
    exempt={
        "batch": "filters are no samples: a layer has one set of them",
    },
)
def inflate_weight(rng):
    yield call(rng.normal(5, 3, 4, 6), 2, "mean")
    yield call(rng.normal(5, 3, 4, 6), 2, "centre").on("the centre of two frames")
    yield call(rng.normal(4, 1, 2, 3), 5, "centre").on("the centre of five frames")
    yield call(rng.normal(2, 3, 5, 4), 3, "mean").on("the mean over three frames")
    yield call(rng.normal(2, 3, 5, 4), 8, "centre").on("the centre of eight frames")
    yield call(rng.normal(2, 2, 3, 4), 3, "centre").on("the centre of three frames")
    yield call(rng.normal(3, 2, 1, 2), 1, "centre").on("tubelets of one frame")
    yield call(rng.normal(3, 2, 1, 2), 1, "mean").on("tubelets of one frame")


def _at(weight, frames, place, value=None):
    """Zeros, and the filter in one frame."""
    out = torch.stack([torch.zeros_like(weight)] * frames, dim=2)
    out[:, :, place] = weight if value is None else value
    return out


def _mean(weight, frames):
    return torch.stack([weight / frames] * frames, dim=2)


def _centre(weight, frames):
    return _at(weight, frames, frames // 2)


def _catalogue(key, message, mean=_mean, centre=_centre):
    inflate_weight.mistake(
        key,
        message,
        lambda weight, tubelet_size, how="centre": (mean if how == "mean" else centre)(weight, tubelet_size),
    )


_catalogue(
    "summed",
    "the whole filter stands in every frame: on a still clip its answer is larger, the more frames there are",
    mean=lambda w, t: torch.stack([w] * t, dim=2),
)
_catalogue(
    "root",
    "divided by the square root of the number of frames, as for noise; a still clip is the same in every frame",
    mean=lambda w, t: torch.stack([w / t**0.5] * t, dim=2),
)
_catalogue(
    "first-frame",
    "the filter stands in the first frame of a tubelet, not at its centre",
    centre=lambda w, t: _at(w, t, 0),
)
_catalogue(
    "before-the-centre",
    "with an even number of frames the one before the centre is taken; the paper's is ⌊t/2⌋",
    centre=lambda w, t: _at(w, t, (t - 1) // 2),
)
_catalogue(
    "rounded-centre",
    "the centre is t/2, rounded to the nearest number; where t is odd, both neighbours are as near",
    centre=lambda w, t: _at(w, t, round(t / 2)),
)
_catalogue("last-frame", "the filter stands in the last frame of a tubelet", centre=lambda w, t: _at(w, t, t - 1))
_catalogue(
    "centre-shared",
    "at the centre stands only a share of the filter; the other frames have nothing to add to it",
    centre=lambda w, t: _at(w, t, t // 2, w / t),
)
_catalogue("ways-exchanged", "this is the centre where the mean is asked for, and the other way round", _centre, _mean)
_catalogue("always-the-mean", "this is the mean, whatever `how` says", centre=_mean)
_catalogue("always-the-centre", "this is the centre, whatever `how` says", mean=_centre)
_catalogue(
    "frames-first",
    "the frames stand in front of the channels; a 3-D convolution wants (out, in, frames, rows, columns)",
    mean=lambda w, t: _mean(w, t).transpose(1, 2),
    centre=lambda w, t: _centre(w, t).transpose(1, 2),
)
_catalogue(
    "frames-last",
    "the frames stand behind the columns; a 3-D convolution wants (out, in, frames, rows, columns)",
    mean=lambda w, t: _mean(w, t).movedim(2, -1),
    centre=lambda w, t: _centre(w, t).movedim(2, -1),
)
