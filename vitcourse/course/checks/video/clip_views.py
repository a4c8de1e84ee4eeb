"""The check of `video.clip_views`, and its reference: the library has a function for each view."""

import torch
from torch import Tensor

from vitcourse.course.checks import call, check


def clip_views(clips: Tensor, order: Tensor) -> dict[str, Tensor]:
    """Clips (B, C, T, H, W) with their frames shuffled, each by its row of order (B, T), reversed, and frozen.

    >>> views = clip_views(torch.arange(4.0).view(1, 1, 4, 1, 1), torch.tensor([[2, 0, 3, 1]]))
    >>> [view.flatten().int().tolist() for view in views.values()]
    [[2, 0, 3, 1], [3, 2, 1, 0], [2, 2, 2, 2]]
    """
    number = torch.arange(len(clips), device=clips.device)[:, None]
    middle = clips[:, :, clips.shape[2] // 2]
    return {
        "shuffled": clips[number, :, order].transpose(1, 2),
        "reversed": clips.flip(2),
        "frozen": middle.unsqueeze(2).expand_as(clips).contiguous(),
    }


@check(
    "video.clip_views",
    reference="vitcourse.course.checks.video.clip_views.clip_views",
    level=2,
    minutes=15,
    why="Three lines that have shown, of more than one model with good numbers, that it had never looked at time.",
    gradients=False,  # clips are data, and the names of a dict may come in any order
    hints=[
        "Time is the third axis. `flip` reverses one; a list of equal numbers repeats a frame.",
        "`order` has a row for each clip, and clip b gets frame order[b, k] as its k-th.",
        "clips[b, :, order[b]] is the shuffled clip b, with the frames in front. For all at once, the first index is a "
        "column of the clips' numbers.",
    ],
)
def clip_views_cases(rng):
    def orders(clips, frames):
        return rng.normal(clips, frames).argsort(1)

    yield call(rng.normal(2, 3, 5, 4, 6), orders(2, 5))
    yield call(rng.normal(3, 1, 4, 2, 5), orders(3, 4)).on("an even number of frames")
    yield call(rng.normal(1, 3, 7, 2, 4), orders(1, 7)).on("a batch of one")
    yield call(rng.normal(4, 2, 2, 3, 1), torch.tensor([[1, 0]] * 4)).on("two frames")
    yield call(rng.normal(2, 3, 1, 4, 5), orders(2, 1)).on("clips of one frame")
    yield call(rng.normal(5, 2, 3, 3, 3), torch.tensor([[1, 2, 0]] * 5)).on("an order that is not its own inverse")


def _catalogue(key, message, **change):
    """A mistake in some of the three views."""

    def faulty(clips, order):
        views = clip_views(clips, order)
        return views | {name: make(clips, order) for name, make in change.items()}

    clip_views_cases.mistake(key, message, faulty)


def _by(clips, order):
    return torch.stack([clip[:, row] for clip, row in zip(clips, order, strict=True)])


_catalogue(
    "one-order-for-all",
    "all clips are shuffled by the first row of `order`; each has an order of its own",
    shuffled=lambda clips, order: clips[:, :, order[0]],
)
_catalogue(
    "inverse-order",
    "the frames are sent to the places that `order` names; they should be fetched from there",
    shuffled=lambda clips, order: _by(clips, order.argsort(1)),
)
_catalogue(
    "frames-in-front",
    "the shuffled clips have their frames in front of the channels: that is the index's doing",
    shuffled=lambda clips, order: _by(clips, order).transpose(1, 2),
)
_catalogue(
    "not-shuffled", "the shuffled clips are as they were: their order is not used", shuffled=lambda clips, order: clips
)
_catalogue(
    "mirrored",
    "the pictures are mirrored; it is time that should be turned",
    reversed=lambda clips, order: clips.flip(-1),
)
_catalogue(
    "clips-reversed",
    "the clips of the batch come in reverse, each of them played forward",
    reversed=lambda clips, order: clips.flip(0),
)
_catalogue(
    "channels-reversed",
    "the channels are reversed, red becomes blue; time is the next axis",
    reversed=lambda clips, order: clips.flip(1),
)
_catalogue(
    "first-frame",
    "the first frame is frozen; the one in the middle, number ⌊T/2⌋, is asked for",
    frozen=lambda clips, order: clips[:, :, :1].expand_as(clips),
)
_catalogue(
    "before-the-middle",
    "with an even number of frames the one before the middle is frozen; here it is number ⌊T/2⌋",
    frozen=lambda clips, order: clips[:, :, [(clips.shape[2] - 1) // 2] * clips.shape[2]],
)
_catalogue(
    "mean-frame",
    "the mean of all frames is shown, a blur in which every frame has left a trace",
    frozen=lambda clips, order: clips.mean(2, keepdim=True).expand_as(clips),
)
_catalogue(
    "one-frame",
    "the frozen clip has one frame left; it should be as long as the clip was",
    frozen=lambda clips, order: clips[:, :, clips.shape[2] // 2 :][:, :, :1],
)
_catalogue(
    "chained",
    "reversed and frozen are made of the shuffled clips; each view is one of the clips as they came (are they overwritten?)",
    reversed=lambda clips, order: _by(clips, order).flip(2),
    frozen=lambda clips, order: _by(clips, order)[:, :, [clips.shape[2] // 2] * clips.shape[2]],
)
