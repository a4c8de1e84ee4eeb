"""Are rendered scenes and clips ever the bottleneck?

    python -m benchmarks.scenes

Items a second of processor time on one thread, as a worker of a data loader has it: scenes, moving clips, and videos in
files (H.264, written and read by PyAV), in turns. Results: ``scenes.json``.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from benchmarks.common import in_turns, write_results
from vitcourse.data import VideoFolder, moving, scenes

AT_ONCE = 20  # items of one measurement


def candidates(folder: Path) -> Iterator[tuple[dict[str, Any], Dataset]]:
    """What is measured, and the data set."""
    for size in (64, 128, 256):
        yield {"data": "scenes", "img_size": size}, scenes(img_size=size)
    for frames, size in ((8, 48), (16, 64)):
        yield {"data": "moving", "img_size": size, "num_frames": frames}, moving(num_frames=frames, img_size=size)
    if importlib.util.find_spec("av"):
        yield {"data": "video, H.264", "img_size": 128, "num_frames": 8}, VideoFolder([_film(folder)], [0], ["film"])


def _film(folder: Path, frames: int = 100, size: int = 128) -> Path:
    """A film of 10 seconds, with a key frame a second."""
    import av

    file = folder / "film.mp4"
    clip = moving(num_frames=frames, img_size=size)[0][0].permute(1, 2, 3, 0).contiguous()  # (T, H, W, 3)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = size
        stream.pix_fmt, stream.codec_context.gop_size = "yuv420p", 10
        for frame in clip.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file


def measure(rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Items a second, the best round of each."""
    found = list(candidates(folder))
    steps = {str(k): _step(dataset) for k, (_, dataset) in enumerate(found)}
    taken = in_turns(steps, "cpu", rounds, warmup=1)
    return [{**what, "items_per_second": AT_ONCE / min(taken[str(k)])} for k, (what, _) in enumerate(found)]


def _step(dataset: Dataset) -> Callable[[], None]:
    numbers = count()

    def render() -> None:
        for _ in range(AT_ONCE):
            dataset[next(numbers) % len(dataset)]

    return render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.rounds, Path(folder))
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    write_results("scenes", rows)


if __name__ == "__main__":
    main()
