"""Videos in files to frames: the only place where they are decoded, by PyAV or torchcodec."""

import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

BACKENDS = ("pyav", "torchcodec")
_NO_VIDEO = ("image2", "hls", "dash", "concat", "tty")  # pictures, text, and lists that name other files
_TIE = 1e-6  # seconds; times are sums of periods, which rounding must not put before a frame
_INSTALL = "pip install 'vitcourse[video]' (PyAV brings its own FFmpeg)"


class BrokenVideo(ValueError):
    """A file that cannot be decoded to its end."""


@dataclass(frozen=True)
class Limits:
    """What is too much: a file beyond it is refused before it is decoded.

    Attributes:
        seconds: the longest video.
        pixels: the most pixels of a frame.
        frames: the most frames that are decoded for one clip. A clip far behind a key frame takes all between them.

    Raises ValueError for limits that are not positive.
    """

    seconds: float = 3600.0
    pixels: int = 4096 * 2304
    frames: int = 10_000

    def __post_init__(self) -> None:
        for name in ("seconds", "pixels", "frames"):
            if not getattr(self, name) > 0:
                raise ValueError(f"limit of {name} {getattr(self, name)} must be positive")


@dataclass(frozen=True)
class VideoFacts:
    """What is known of a video: its duration in seconds, its mean rate, and the size of its frames, upright."""

    duration: float
    fps: float
    height: int
    width: int


def resolve_backend(backend: str) -> str:
    """The decoder to use; ``"auto"``: PyAV, or else torchcodec.

    Raises ValueError for an unknown one, ImportError for one that is not installed, saying how to.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown; use 'auto', 'pyav' or 'torchcodec'")
    if backend in ("auto", "pyav") and importlib.util.find_spec("av"):
        return "pyav"
    if backend in ("auto", "torchcodec") and importlib.util.find_spec("torchcodec"):
        _check_torchcodec()
        return "torchcodec"
    needed = {"auto": "PyAV", "pyav": "PyAV", "torchcodec": "torchcodec"}[backend]
    raise ImportError(
        f"reading videos needs {needed}: " + ("pip install torchcodec" if needed == "torchcodec" else _INSTALL)
    )


def _check_torchcodec() -> None:
    """It takes FFmpeg from the system: older versions say at once that there is none, later ones when they decode."""
    try:
        import torchcodec.decoders

        found, why = getattr(torchcodec, "ffmpeg_major_version", True), "it needs version 4 or later"
    except (ImportError, OSError, RuntimeError) as error:
        found, why = None, _first_line(error)
    if found is None:
        raise ImportError(f"torchcodec finds no FFmpeg ({why}); install FFmpeg, or take PyAV: {_INSTALL}")


def probe(file: str, limits: Limits, backend: str) -> VideoFacts:
    """Open a video, decode its first frame, and hold it against the limits.

    Raises FileNotFoundError for a missing file, BrokenVideo for one that is no video or damaged, and ValueError for one
    beyond the limits.
    """
    facts = (_probe_by_pyav if backend == "pyav" else _probe_by_torchcodec)(file, limits)
    if facts.duration > limits.seconds:
        raise ValueError(
            f"{file} lasts {facts.duration:.1f} s, more than the limit of {limits.seconds:g} s; cut it, or raise "
            "limits.seconds"
        )
    _check_pixels(file, facts.height, facts.width, limits)
    return facts


def read_frames(file: str, times: np.ndarray, facts: VideoFacts, limits: Limits, backend: str) -> Tensor:
    """The frames that are shown at ``times`` (T,), in seconds from the first frame: uint8 (3, T, H, W).

    Raises as ``probe`` does.
    """
    return (_read_by_pyav if backend == "pyav" else _read_by_torchcodec)(file, times, facts, limits)


def _check_pixels(file: str, height: int, width: int, limits: Limits) -> None:
    if height * width > limits.pixels:
        raise ValueError(
            f"{file} has frames of {width} × {height} pixels, more than the limit of {limits.pixels}; scale it down, "
            "or raise limits.pixels"
        )


# --- PyAV ---


class _Opened:
    """A container with its video stream; what FFmpeg raises becomes BrokenVideo, which names the file."""

    def __init__(self, file: str) -> None:
        import av

        self.file, self.errors = file, (av.FFmpegError, EOFError)
        self.container: Any = None

    def __enter__(self) -> "_Opened":
        import av

        try:
            # Nothing but files: neither what a name may say (http:, concat:) nor what stands in a playlist.
            self.container = av.open(
                f"file:{self.file}", metadata_errors="ignore", options={"protocol_whitelist": "file"}
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.file} is missing; restore it, or open the data set anew") from error
        except (*self.errors, ValueError) as error:
            raise BrokenVideo(f"{self.file} is no usable video: {_said(error)}; replace it, or delete it") from error
        kind = self.container.format.name
        if not self.container.streams.video or kind.endswith("_pipe") or kind in _NO_VIDEO:
            self.container.close()
            what = f"it is of format {kind}" if self.container.streams.video else "it has no pictures"
            raise BrokenVideo(f"{self.file} is no usable video: {what}; replace it, or delete it")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "NONE"  # workers share the cores, and threads hand frames out late
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.container.close()
        if isinstance(error, self.errors):
            raise BrokenVideo(f"{self.file} is damaged: {_said(error)}; replace it, or delete it") from error

    def frames(self) -> Iterator[tuple[float, Any]]:
        """Frames with the times at which they are shown, from where the container stands."""
        for frame in self.container.decode(self.stream):
            if frame.pts is not None:
                yield float(frame.pts * frame.time_base), frame


def _said(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _probe_by_pyav(file: str, limits: Limits) -> VideoFacts:
    with _Opened(file) as video:
        stream = video.stream
        _check_pixels(file, stream.height or 0, stream.width or 0, limits)
        first = next(video.frames(), None)
        if first is None:
            raise BrokenVideo(f"{file} is no usable video: it has no frame; replace it, or delete it")
        turned = _rotation(first[1]) % 2
        height, width = (first[1].height, first[1].width)[:: -1 if turned else 1]
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        duration = _duration(video)
        if not (fps > 0 and duration > 0):
            duration, fps = _count(video, first[0], limits)
        return VideoFacts(duration, fps, height, width)


def _duration(video: _Opened) -> float:
    """In seconds, as the stream or the container says; 0 where neither does."""
    if video.stream.duration:
        return float(video.stream.duration * video.stream.time_base)
    if video.container.duration:
        return video.container.duration / 1_000_000  # FFmpeg's AV_TIME_BASE
    return 0.0


def _count(video: _Opened, first: float, limits: Limits) -> tuple[float, float]:
    """The duration and rate of a file that does not say: its packets are read, but not decoded."""
    video.container.seek(0)
    count, last = 0, first
    for packet in video.container.demux(video.stream):
        if packet.pts is not None:
            count, last = count + 1, max(last, float(packet.pts * packet.time_base))
        if last - first > limits.seconds:
            break
    if last <= first:
        return 1 / 25, 25.0  # a still; the rate of its only frame says nothing
    fps = (count - 1) / (last - first)
    return count / fps, fps


def _read_by_pyav(file: str, times: np.ndarray, facts: VideoFacts, limits: Limits) -> Tensor:
    order = np.argsort(times, kind="stable")
    due = times[order]
    found = _shown_at(file, due, limits, seek=True)
    if found is None:  # the file's index led behind the first time that is wanted
        found = _shown_at(file, due, limits, seek=False)
    pictures, last = found
    if last < due[-1] - 1.5 / facts.fps:
        raise BrokenVideo(
            f"{file} is damaged: its frames end after {last:.2f} s, it says that it lasts {facts.duration:.2f} s; "
            "replace it, or delete it"
        )
    return rearrange([pictures[k] for k in np.argsort(order, kind="stable")], "t h w c -> c t h w").contiguous()


def _shown_at(file: str, due: np.ndarray, limits: Limits, seek: bool) -> tuple[list[Tensor], float] | None:
    """The pictures at the sorted times ``due``, and the time of the last frame; None where ``seek`` led too far."""
    pictures: list[Tensor] = []
    shown, shown_time, picture = None, -math.inf, None
    with _Opened(file) as video:
        start = float((video.stream.start_time or 0) * video.stream.time_base)
        if seek and due[0] > 0:
            video.container.seek(int((start + due[0]) / video.stream.time_base), stream=video.stream)
        for count, (time, frame) in enumerate(video.frames()):
            if count >= limits.frames:
                raise ValueError(
                    f"{file}: a clip took more than the limit of {limits.frames} frames to decode; give it more key "
                    "frames, take a higher fps or fewer num_frames, or raise limits.frames"
                )
            time -= start
            if shown is None and seek and time > due[0] + _TIE:
                return None
            while shown is not None and due[len(pictures)] < time - _TIE:
                picture = _to_tensor(shown) if picture is None else picture
                pictures.append(picture)
                if len(pictures) == len(due):
                    return pictures, time
            shown, shown_time, picture = frame, time, None
        if shown is None and seek:
            return None
        if shown is None:
            raise BrokenVideo(f"{file} is damaged: no frame can be decoded at {due[0]:.2f} s; replace it, or delete it")
        return pictures + [_to_tensor(shown)] * (len(due) - len(pictures)), shown_time


def _rotation(frame: Any) -> int:
    """Quarter turns, anticlockwise, that bring a frame upright: phones store films as the sensor lies."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _to_tensor(frame: Any) -> Tensor:
    """(H, W, 3), uint8."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), _rotation(frame))
    return torch.from_numpy(np.ascontiguousarray(pixels))


# --- torchcodec ---


def _first_line(error: BaseException) -> str:
    """Without the place in torchcodec's source that it begins with."""
    return (str(error).splitlines() or [type(error).__name__])[0].rpartition(".cpp:")[2].strip("0123456789, ")


def _decoder(file: str) -> Any:
    from torchcodec.decoders import VideoDecoder

    if os.path.isfile(file):
        with open(file, "rb") as opened:  # FFmpeg would follow lists to other files, and takes pictures for films
            head = opened.read(16).lstrip()
        if head.startswith((b"#EXTM3U", b"ffconcat", b"<", b"\x89PNG", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP")):
            raise BrokenVideo(
                f"{file} is no usable video: it is a picture, or a list of other files; replace it, or delete it"
            )
    try:
        return VideoDecoder(file, num_ffmpeg_threads=1)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing; restore it, or open the data set anew") from error
    except (RuntimeError, ValueError) as error:
        raise BrokenVideo(f"{file} is no usable video: {_first_line(error)}; replace it, or delete it") from error


def _probe_by_torchcodec(file: str, limits: Limits) -> VideoFacts:
    decoder = _decoder(file)
    facts = decoder.metadata
    if not (facts.height and facts.width and facts.average_fps and facts.duration_seconds):
        raise BrokenVideo(
            f"{file} is no usable video: it does not say its size, rate or duration; replace it, or delete it"
        )
    _check_pixels(file, facts.height, facts.width, limits)
    height, width = _decode(file, lambda: decoder[0]).shape[-2:]
    return VideoFacts(float(facts.duration_seconds), float(facts.average_fps), height, width)


def _read_by_torchcodec(file: str, times: np.ndarray, facts: VideoFacts, limits: Limits) -> Tensor:
    decoder = _decoder(file)
    begin, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    seconds = np.clip(begin + times, begin, max(begin, end - 0.25 / facts.fps)).tolist()
    return rearrange(
        _decode(file, lambda: decoder.get_frames_played_at(seconds)).data, "t c h w -> c t h w"
    ).contiguous()


def _decode(file: str, read: Any) -> Any:
    try:
        return read()
    except (RuntimeError, IndexError) as error:
        raise BrokenVideo(f"{file} is damaged: {_first_line(error)}; replace it, or delete it") from error
