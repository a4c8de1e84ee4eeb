"""The check of `video.resize_time_embed`."""

import torch
import torch.nn.functional as F

from vitcourse.course.checks import call, check


@check(
    "video.resize_time_embed",
    reference="vitcourse.video.resize_time_embed",
    level=2,
    minutes=10,
    why="A model that was trained on 8 frames will be given 16, or 5. Without this it fails, or, worse, answers.",
    hints=[
        "Set the prefix positions aside: they are no frame's.",
        "F.interpolate(mode='linear') wants (1, D, T): channels first, and the axis that is stretched last.",
        "A frame is a stretch of time, not a point: leave the corners as PyTorch has them by default.",
    ],
    tolerance=1e-5,  # where the weights of both neighbours are computed in single precision
    exempt={
        "batch": "there is one table for all clips",
        "integers": "positions are learnt numbers, not pixels",
    },
)
def resize_time_embed(rng):
    yield call(rng.normal(1, 4, 6), 7)
    yield call(rng.normal(1, 1 + 5, 3), 8, 1).on("one prefix position")
    yield call(rng.normal(1, 2 + 9, 4), 4, 2).on("fewer frames, and two prefix positions")
    yield call(rng.normal(1, 8, 5), 3, 0).on("fewer frames")
    yield call(rng.normal(1, 1 + 3, 2), 3, 1).on("as many frames as before")
    yield call(rng.normal(1, 6, 4), 1).on("one frame")
    yield call(rng.normal(1, 1, 4), 5).on("positions that were made for one frame")


def _stretched(frames_of):
    """A mistake that treats the frames' positions (1, T, D) in its own way; the prefix stays in front."""

    def faulty(time_embed, frames, num_prefix_tokens=0):
        prefix, rest = time_embed[:, :num_prefix_tokens], time_embed[:, num_prefix_tokens:]
        return torch.cat([prefix, frames_of(rest, frames)], dim=1)

    return faulty


def _interpolated(rest, frames, mode="linear", **options):
    return F.interpolate(rest.transpose(1, 2), frames, mode=mode, **options).transpose(1, 2)


def _between(rest, places):
    """Linear between the old positions about each place (frames,)."""
    places = places.clamp(max=rest.shape[1] - 1)
    below = places.long()
    return torch.lerp(rest[:, below], rest[:, places.ceil().long()], (places - below).to(rest)[:, None])


def _catalogue(key, message, frames_of):
    resize_time_embed.mistake(key, message, _stretched(frames_of))


_catalogue(
    "nearest",
    "each frame takes the nearest old position, so that frames share one, and their order is lost",
    lambda rest, frames: _interpolated(rest, frames, "nearest"),
)
_catalogue(
    "nearest-exact",
    "each frame takes the position of the old frame that its centre lies in, so that frames share one",
    lambda rest, frames: _interpolated(rest, frames, "nearest-exact"),
)
_catalogue(
    "align-corners",
    "the first and the last position are pinned, which treats a frame as a point; all between them lie elsewhere",
    lambda rest, frames: _interpolated(rest, frames, align_corners=True),
)
_catalogue(
    "beginnings",
    "the beginning of a frame is held against the beginnings of the old ones, which moves the whole clip towards its start",
    lambda rest, frames: _between(rest, torch.arange(frames).double() * rest.shape[1] / frames),
)
_catalogue(
    "reshaped",
    "a reshape stands where axes should be exchanged: numbers of one position are taken for times",
    lambda rest, frames: F.interpolate(rest.reshape(1, rest.shape[2], -1), frames, mode="linear").reshape(
        1, frames, -1
    ),
)
_catalogue(
    "cut-or-repeated",
    "the table is cut, or begins anew behind its end: the same clip at another rate gets other times",
    lambda rest, frames: rest[:, torch.arange(frames) % rest.shape[1]],
)
_catalogue(
    "padded",
    "behind the end of the table stands its last position again and again, so that late frames have one time",
    lambda rest, frames: rest[:, torch.arange(frames).clamp(max=rest.shape[1] - 1)],
)
_catalogue(
    "averaged",
    "positions are averaged over stretches of the table; linear interpolation lies on the line between two of them",
    lambda rest, frames: F.adaptive_avg_pool1d(rest.transpose(1, 2), frames).transpose(1, 2),
)


@resize_time_embed.mistake(
    "prefix-stretched", "the prefix is stretched along with the frames, and runs into the first of them"
)
def _(time_embed, frames, num_prefix_tokens=0):
    return _interpolated(time_embed, num_prefix_tokens + frames)


@resize_time_embed.mistake("prefix-last", "the prefix ends up behind the frames")
def _(time_embed, frames, num_prefix_tokens=0):
    rest = _interpolated(time_embed[:, num_prefix_tokens:], frames)
    return torch.cat([rest, time_embed[:, :num_prefix_tokens]], dim=1)


@resize_time_embed.mistake("prefix-lost", "the positions of the prefix are gone")
def _(time_embed, frames, num_prefix_tokens=0):
    return _interpolated(time_embed[:, num_prefix_tokens:], frames)


@resize_time_embed.mistake(
    "whole-length", "`frames` is taken for the length of the whole table, so that prefix positions cost frames"
)
def _(time_embed, frames, num_prefix_tokens=0):
    rest = _interpolated(time_embed[:, num_prefix_tokens:], max(frames - num_prefix_tokens, 1))
    return torch.cat([time_embed[:, :num_prefix_tokens], rest], dim=1)
