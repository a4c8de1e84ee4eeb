"""The check of `video.sample_frames`, and its reference: the library's `Sampling` gives times, for rates that vary."""

import torch
from torch import Tensor

from vitcourse.course.checks import call, check, holds


def sample_frames(num_frames: int, fps: int, video_fps: int, video_frames: int, start: int = 0) -> Tensor:
    """Which frames of a file are a clip: ``num_frames`` of them, ``fps`` a second, from frame ``start`` on; (T,) int64.

    >>> sample_frames(5, fps=12, video_fps=30, video_frames=9)
    tensor([0, 2, 5, 7, 8])
    """
    wanted = start + torch.arange(num_frames) * video_fps // fps
    return wanted.clamp(max=video_frames - 1)


@check(
    "video.sample_frames",
    reference="vitcourse.course.checks.video.sample_frames.sample_frames",
    level=1,
    minutes=10,
    why="A model sees motion at the rate that it is given. With another rate a walk becomes a run, and nothing in the "
    "code complains.",
    hints=[
        "Frame k of the clip is wanted k / fps seconds after the first. How many frames of the file have begun by then?",
        "A frame is shown until the next one begins. Between two frames of the file, which one is on the screen?",
        "Whatever lies behind the end of the file becomes its last frame, which is not number `video_frames`.",
    ],
)
def sample_frames_cases(rng):
    # No frame is wanted midway between two: however a half is rounded, the nearest frame is the same.
    yield call(6, 9, 30, 100, 3)
    yield call(5, 3, 25, 400).on("a clip from the beginning")
    yield call(rng.integer(7, 10), 24, 24, 200, rng.integer(5, 50)).on("a file of the wanted rate")
    yield call(7, 8, 24, 13, 2).on("a file that ends before the clip")
    yield call(9, 60, 20, 300, 11).on("a file with fewer frames a second than are wanted")
    yield call(4, 24, 30, 8, 5).on("a clip that begins close to the end")
    yield call(3, 4, 30, 1).on("a file of one frame")
    yield call(1, 2, 60, 50, 7).on("a clip of one frame")
    yield holds(
        "a frame that begins at the very moment that is asked for is missed, and the one before it taken twice",
        lambda answer: all(answer(*rates, 999).tolist() == sample_frames(*rates, 999).tolist() for rates in _PUNCTUAL),
        points_to="falls-short",
    )


# num_frames, fps, video_fps: here rounded seconds, or a rounded ratio of the rates, fall just short of a frame's beginning.
_PUNCTUAL = ((32, 25, 25), (32, 10, 30), (32, 6, 25))


def _frames(count, fps, video_fps, total, start=0, *, times=None, end=None):
    times = times or (lambda k: k * video_fps // fps)
    end = end or (lambda wanted: wanted.clamp(max=total - 1))
    return end(start + times(torch.arange(count)))


def _catalogue(key, message, times=None, end=None):
    """A mistake that finds times in another way, or has another idea of the end; each is given the rates and sizes."""

    def faulty(num_frames, fps, video_fps, video_frames, start=0):
        return _frames(
            num_frames, fps, video_fps, video_frames, start,
            times=times and (lambda k: times(k, fps, video_fps)), end=end and (lambda wanted: end(wanted, video_frames)),
        )  # fmt: skip

    sample_frames_cases.mistake(key, message, faulty)


_catalogue(
    "every-frame", "every frame of the file is taken, whatever rate is asked for", times=lambda k, fps, video_fps: k
)
_catalogue(
    "rates-exchanged",
    "the two rates are exchanged: of a file with more frames a second than are wanted, some must be left out",
    times=lambda k, fps, video_fps: k * fps // video_fps,
)
_catalogue(
    "rounded-step",
    "one step is rounded and then repeated, so that the clip drifts away from its rate, further with every frame",
    times=lambda k, fps, video_fps: k * max(video_fps // fps, 1),
)
_catalogue(
    "step-of-nothing",
    "one step is rounded and then repeated: the clip drifts away from its rate, and of a slow file it never leaves the "
    "first frame",
    times=lambda k, fps, video_fps: k * (video_fps // fps),
)
_catalogue(
    "falls-short",
    "times that were rounded are multiplied here: where a frame has just begun, the product may fall short of it by a "
    "last bit; both rates are whole numbers, and need no fractions before the last step",
    times=lambda k, fps, video_fps: (k.double() / fps * video_fps).long(),
)
_catalogue(
    "nearest",
    "the nearest frame is taken, which may not have begun yet; until it does, the one before it is shown",
    times=lambda k, fps, video_fps: (k * video_fps / fps + 0.5).floor().long(),
)
_catalogue(
    "next-frame",
    "between two frames this takes the later one, which has not begun yet",
    times=lambda k, fps, video_fps: (k * video_fps + fps - 1) // fps,
)
_catalogue(
    "begins-anew",
    "behind the end the clip begins anew, a jump that nobody filmed; here the last frame stands still",
    end=lambda wanted, total: wanted % total,
)
_catalogue(
    "too-short",
    "frames behind the end are left out, so the clip is shorter than asked for, and cannot share a batch with others",
    end=lambda wanted, total: wanted[wanted < total],
)
_catalogue(
    "one-too-far",
    "the last index is the number of frames of the file, where there is no frame any more",
    end=lambda wanted, total: wanted.clamp(max=total),
)
_catalogue("no-end", "frames are named that lie behind the end of the file", end=lambda wanted, total: wanted)
sample_frames_cases.mistake(
    "start-lost",
    "the clip begins with the first frame of the file, wherever it is asked to start",
    lambda num_frames, fps, video_fps, video_frames, start=0: _frames(num_frames, fps, video_fps, video_frames),
)
sample_frames_cases.mistake(
    "start-after-the-end",
    "the end of the file is minded first, and `start` added after that, which leads behind the end again",
    lambda num_frames, fps, video_fps, video_frames, start=0: start + _frames(num_frames, fps, video_fps, video_frames),
)
sample_frames_cases.mistake(
    "spread-out",
    "the clip is spread evenly over the rest of the file: a long file is then played faster than a short one",
    lambda num_frames, fps, video_fps, video_frames, start=0: torch.linspace(
        start, video_frames - 1, num_frames, dtype=torch.float64
    ).long(),
)
