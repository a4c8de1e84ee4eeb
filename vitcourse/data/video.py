"""A folder of video files, class by class, and clips sampled from them by rate and length."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitcourse.data import decoding
from vitcourse.data.decoding import BrokenVideo, Limits, VideoFacts
from vitcourse.data.folders import VIDEO_SUFFIXES, Faults, check_on_error, files_by_class, is_video
from vitcourse.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from vitcourse.notices import say_once

_LAYOUT = """expected a folder per class in a folder per split:
    PATH/train/dance/1.mp4   PATH/train/jump/2.webm
    PATH/val/dance/3.mp4     PATH/val/jump/4.mov      (or valid, or validation)
    PATH/test/dance/5.mp4    PATH/test/jump/6.mp4
"""
_SHORT = ("pad", "loop", "raise")


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are a clip.

    Attributes:
        num_frames: T.
        fps: frames a second that are taken, whatever the file has; None: every frame of the file.
        offset: ``"random"``: begins anywhere, drawn from PyTorch's generator, which :class:`Augmented` seeds;
            ``"uniform"``: in the middle of the video, or, of several clips, evenly from its begin to its end.
        clips: how many of each video, with ``"uniform"``.
        short: what becomes of a video shorter than a clip: ``"pad"`` repeats its last frame, ``"loop"`` begins anew,
            ``"raise"`` is a ValueError.

    Raises ValueError for values out of range, naming them.

    >>> Sampling(4, fps=2.0).times(VideoFacts(duration=10.0, fps=25.0, height=8, width=8), 0).tolist()
    [4.0, 4.5, 5.0, 5.5]
    """

    num_frames: int = 8
    fps: float | None = None
    offset: str = "uniform"
    clips: int = 1
    short: str = "pad"

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"num_frames {self.num_frames} is no length of a clip; use at least 1")
        if self.fps is not None and not (self.fps > 0 and math.isfinite(self.fps)):
            raise ValueError(f"fps {self.fps} is no rate; use more than 0, or None for the file's own")
        if self.offset not in ("random", "uniform"):
            raise ValueError(f"offset {self.offset!r} is unknown; use 'random' or 'uniform'")
        if self.clips < 1 or (self.clips > 1 and self.offset == "random"):
            raise ValueError(f"clips {self.clips} with offset {self.offset!r}; use at least 1, and 1 with 'random'")
        if self.short not in _SHORT:
            raise ValueError(f"short {self.short!r} is unknown; use one of {', '.join(_SHORT)}")

    def times(self, video: VideoFacts, clip: int) -> np.ndarray:
        """The times (T,), in seconds from the first frame, whose frames are clip number ``clip`` of a video."""
        period = 1 / (self.fps or video.fps)
        spare = video.duration - self.num_frames * period
        if spare < -0.5 / video.fps and self.short == "raise":
            raise ValueError(
                f"it lasts {video.duration:.2f} s, but {self.num_frames} frames at {1 / period:g} a second take "
                f"{self.num_frames * period:.2f} s; ask for fewer num_frames, a higher fps, or short='pad' or 'loop'"
            )
        spare = max(spare, 0.0)
        evenly = clip / (self.clips - 1) if self.clips > 1 else 0.5
        share = torch.rand(()).item() if self.offset == "random" else evenly
        times = share * spare + np.arange(self.num_frames) * period
        if self.short == "loop":
            return times % max(video.duration, period)
        return np.minimum(times, max(video.duration - 0.5 / video.fps, 0.0))


class VideoFolder(Dataset):
    """Clips of video files: what ``video:PATH`` opens. An item is (clip, label): uint8 (3, T, H, W), upright.

    Args:
        files: the videos.
        targets: their labels, counted from 0.
        classes: the names of the classes.
        sampling: which frames are a clip.
        limits: which videos are refused, and for how many frames a decoder may work on one clip.
        on_error: ``"raise"``: a file that cannot be read is a ValueError, which names it; ``"skip"``: files that cannot
            be opened are left out, which is said on stderr, and a file that turns out broken when a clip is read is
            replaced by the next video of its class, which is said once.
        backend: ``"auto"``: PyAV, or else torchcodec, whichever is installed; ``"pyav"`` or ``"torchcodec"``.
        transform: called with each clip.

    The frame at a time is the one that is shown then; rates may vary within a file. Every file is opened once at the
    beginning, for its length and its first frame.
    """

    in_chans, img_size, mean, std = 3, None, IMAGENET_MEAN, IMAGENET_STD

    def __init__(
        self,
        files: Sequence[str | Path],
        targets: Sequence[int],
        classes: Sequence[str],
        *,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        on_error: str = "raise",
        backend: str = "auto",
        transform: Callable | None = None,
    ) -> None:
        if len(files) != len(targets) or not len(files):
            raise ValueError(f"{len(files)} files and {len(targets)} targets; give one label per file, at least one")
        if not 0 <= min(targets) <= max(targets) < len(classes):
            raise ValueError(
                f"targets reach from {min(targets)} to {max(targets)}, but there are {len(classes)} classes"
            )
        check_on_error(on_error)
        self.sampling, self.limits, self.on_error = sampling or Sampling(), limits or Limits(), on_error
        self.backend, self.classes, self.transform = decoding.resolve_backend(backend), list(classes), transform
        self.files, self.facts, self.file_targets = [], [], []
        faults = Faults(on_error)
        for file, target in zip(files, targets, strict=True):
            try:
                facts = decoding.probe(str(file), self.limits, self.backend)
                self._times(str(file), facts, 0)
            except (ValueError, FileNotFoundError) as error:
                faults.add(error)
                continue
            self.files.append(str(file))
            self.facts.append(facts)
            self.file_targets.append(int(target))
        faults.tell("videos", files, Path(files[0]).parent.parent)
        if not self.files:
            raise ValueError(f"none of {len(files)} videos can be read; the first: {faults.first}")
        self.indices = range(len(self.files) * self.sampling.clips)

    @property
    def num_frames(self) -> int:
        return self.sampling.num_frames

    @property
    def groups(self) -> list[int]:
        """Which video each clip is of, in the order of the files."""
        return [i // self.sampling.clips for i in self.indices]

    @property
    def targets(self) -> list[int]:
        """The labels of all clips."""
        return [self.file_targets[which] for which in self.groups]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        which, clip = divmod(self.indices[index], self.sampling.clips)
        frames = self._read(which, clip) if self.on_error == "raise" else self._read_or_next(which, clip)
        return (frames if self.transform is None else self.transform(frames)), self.file_targets[which]

    def take(self, indices: Sequence[int]) -> "VideoFolder":
        """Some of the clips, in the given order."""
        part = copy.copy(self)
        part.indices = [self.indices[i] for i in indices]
        return part

    def _times(self, file: str, facts: VideoFacts, clip: int) -> np.ndarray:
        try:
            return self.sampling.times(facts, clip)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def _read(self, which: int, clip: int) -> Tensor:
        times = self._times(self.files[which], self.facts[which], clip)
        return decoding.read_frames(self.files[which], times, self.facts[which], self.limits, self.backend)

    def _read_or_next(self, which: int, clip: int) -> Tensor:
        count, label = len(self.files), self.file_targets[which]
        others = [k % count for k in range(which, which + count) if self.file_targets[k % count] == label]
        for candidate in others:
            try:
                return self._read(candidate, clip)
            except (BrokenVideo, FileNotFoundError) as error:
                say_once(f"{error}; the next video of its class is taken instead")
        raise ValueError(f"no video of class {self.classes[label]!r} can be read; replace {self.files[which]}")


def open_videos(
    top: Path,
    split: str,
    *,
    transform: Callable | None = None,
    num_frames: int = 8,
    fps: float | None = None,
    offset: str | None = None,
    clips: int = 1,
    short: str = "pad",
    limits: Limits | None = None,
    on_error: str = "raise",
    backend: str = "auto",
) -> VideoFolder:
    """Open a split of a folder of videos, PATH/SPLIT/CLASS/*.mp4.

    Args:
        top: the folder.
        split: ``"train"``, ``"val"`` or ``"test"``, of those that it has.
        transform: called with each clip (3, T, H, W), uint8; without one, clips have the size of their files.
        num_frames, fps, offset, clips, short: see :class:`Sampling`; by default the offset is random in training.
        limits, on_error, backend: see :class:`VideoFolder`.

    Classes are those of train; that a class has no videos in another split is said on stderr. Raises as
    ``open_dataset`` does, and ImportError where neither PyAV nor torchcodec is installed.
    """
    sampling = Sampling(
        num_frames, fps, offset or ("random" if split == "train" and clips == 1 else "uniform"), clips, short
    )
    by_class = files_by_class(top, split, is_video, _LAYOUT, "videos", VIDEO_SUFFIXES)
    files = [file for found in by_class.values() for file in found]
    targets = [label for label, found in enumerate(by_class.values()) for _ in found]
    options = {"limits": limits, "on_error": on_error, "backend": backend, "transform": transform}
    return VideoFolder(files, targets, list(by_class), sampling=sampling, **options)
