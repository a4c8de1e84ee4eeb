"""What ``vitcourse evaluate`` and ``vitcourse predict`` do for a classifier of clips."""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from vitcourse.data import ClipTransform, Sampling, VideoFolder
from vitcourse.data.folders import is_video
from vitcourse.inference import class_names, normalise, probabilities
from vitcourse.train import TrainConfig
from vitcourse.train.evaluation import visit_logits
from vitcourse.video.program import clip_steps, is_of_clips, prepare
from vitcourse.weights import read_metadata

from . import classification
from .classification import draw, match_classes, rows, shortened, summarise
from .opening import choose_split, open_split

BATCH_SIZE = 16
WANTED = ("videos", is_video)
SHOWN_VIDEOS, SHOWN_FRAMES = 12, 8
__all__ = ["BATCH_SIZE", "WANTED", "draw", "measure", "predict", "report", "rows", "sheet"]


def measure(model: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Loss, accuracy, accuracy per class and confusion of videos, whose clips are averaged, and of single clips.

    A video has one clip, unless ``options.data_args`` has ``clips``.
    """
    if not is_of_clips(options.data):
        raise ValueError(
            f"{options.data} has no clips, and the weights are of a model for these; give moving or video:…"
        )
    split = choose_split(options)
    follows = {"num_frames": model.num_frames, **({"fps": fps} if (fps := _fps(options)) else {})}
    dataset = open_split(options, split, **(follows if options.data != "moving" else {"num_frames": model.num_frames}))
    config = TrainConfig(
        device=options.device,
        batch_size=options.batch_size,
        eval_batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    classes, place = match_classes(model, dataset.classes)
    prepare(dataset, model, config, None, train=False)
    said, labels = _answers(model, dataset, config)
    labels = place[labels]
    right = (said.argmax(1) == labels).float().mean().item()
    videos, video_labels = _averaged(said, labels, dataset)
    found = (-videos[torch.arange(len(videos)), video_labels].log().sum().item(), *_counts(videos, video_labels))
    per_video = len(said) // len(videos)
    return {
        "task": "video",
        "data": options.data,
        "split": split,
        "clips": len(said),
        "clips_per_video": per_video,
        "clip_accuracy": right,
        **summarise(found, classes),
    }


def _fps(options: argparse.Namespace) -> float | None:
    """The rate of frames that the weights were trained at, where their file says it."""
    return read_metadata(options.weights).get("data_args", {}).get("fps")


def _answers(model: nn.Module, dataset: Dataset, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Probabilities (N, K) of all clips, and their labels (N,)."""
    said: list[Tensor] = []
    labels: list[Tensor] = []

    def add(logits: Tensor, wanted: Tensor) -> None:
        said.append(logits.double().softmax(1).cpu())
        labels.append(wanted.cpu())

    visit_logits(model, dataset, add, config)
    return torch.cat(said), torch.cat(labels)


def _averaged(said: Tensor, labels: Tensor, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The mean over the clips of each video, and the videos' labels; each clip by itself where it is no file's."""
    if not isinstance(dataset, VideoFolder):
        return said, labels
    _, which = torch.tensor(dataset.groups).unique(return_inverse=True)
    count = int(which.max()) + 1
    clips = torch.bincount(which, minlength=count)
    means = said.new_zeros(count, said.shape[1]).index_add_(0, which, said) / clips[:, None]
    return means, labels.new_zeros(count).index_copy_(0, which, labels)


def _counts(said: Tensor, labels: Tensor) -> tuple[int, Tensor]:
    """How many have their class among the five likeliest, and the confusion matrix."""
    classes = said.shape[1]
    likeliest = said.topk(min(5, classes)).indices
    confusion = torch.bincount(labels * classes + likeliest[:, 0], minlength=classes * classes)
    return int((likeliest == labels[:, None]).sum()), confusion.view(classes, classes)


def report(result: dict[str, Any]) -> str:
    """As of a classifier of images, and how many clips a video had."""
    first, *rest = classification.report(result).splitlines()
    count = result["clips_per_video"]
    told = (
        "one clip of each"
        if count == 1
        else f"{count} clips of each averaged (accuracy of single clips {result['clip_accuracy']:.4f})"
    )
    return "\n".join([f"{first.removesuffix(' images')} videos, {told}", *rest])


def predict(model: nn.Module, files: Sequence[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each video its ``options.top`` likeliest classes, the mean over ``options.clips`` clips.

    Records are ``{"file", "clips", "top": [{"class", "index", "probability"}]}``.
    """
    if options.out_dir:
        raise ValueError("--out-dir is for boxes and masks; for labels of videos there is --sheet")
    sampling = Sampling(model.num_frames, options.fps or _fps(options), clips=options.clips)
    records, shown = [], SHOWN_VIDEOS if options.sheet else 0
    for file in files:
        record: dict[str, Any] = {"file": str(file)}
        records.append(record)
        try:
            clips = torch.stack(list(_clips(model, file, sampling)))
        except (ValueError, OSError) as error:
            record["error"] = str(error)
            continue
        mean_std = tuple(torch.tensor(v).view(-1, 1, 1) for v in (model.preprocess.mean, model.preprocess.std))
        found = probabilities(model, normalise(clips, mean_std)).mean(0)
        record["clips"] = len(clips)
        record["top"] = classification.best_guesses(found, class_names(model, len(found)), options.top)
        if shown:
            shown -= 1
            record["_frames"] = clips[0]
    return records


def _clips(model: nn.Module, file: Path, sampling: Sampling) -> Iterator[Tensor]:
    """The clips (C, T, H, W) of a video, uint8, at the model's size."""
    steps = clip_steps(model, model.preprocess.crop_pct, None)
    folder = VideoFolder([file], [0], ["video"], sampling=sampling, transform=ClipTransform(v2.Compose(steps)))
    return (folder[i][0] for i in range(len(folder)))


def sheet(records: list[dict[str, Any]]) -> Figure:
    """Frames of each video's first clip, and its likeliest classes beside them."""
    from vitcourse import plot

    shown = [record for record in records if "_frames" in record]
    if len(records) > len(shown):
        print(f"vitcourse: the sheet shows the first {len(shown)} of {len(records)} videos", file=sys.stderr)
    count = min(SHOWN_FRAMES, max(record["_frames"].shape[1] for record in shown))
    with plot.styled():
        figure = Figure(figsize=(1.3 * count + 2.4, 1.5 * len(shown)))
        axes = figure.subplots(len(shown), count + 1, squeeze=False, width_ratios=[1.0] * count + [1.8])
        for line, record in zip(axes, shown, strict=True):
            frames = record["_frames"]
            for i, ax in enumerate(line[:count]):
                plot.show_image(ax, frames[:, math.floor(i * frames.shape[1] / count)])
            line[0].set_title(shortened(Path(record["file"]).name, 28), fontsize=8, loc="left")
            line[count].set_axis_off()
            classification.draw_guesses(line[count], record["top"][:3], 3)
    return figure
