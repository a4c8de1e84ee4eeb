"""What ``vitcourse train --task video`` needs beside the engine."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from vitcourse.data import ClipTransform
from vitcourse.data.transforms import resize_and_crop
from vitcourse.factory import create_model
from vitcourse.layers import to_pair
from vitcourse.registry import takes_argument
from vitcourse.train import TrainConfig
from vitcourse.train.program import start_of, start_of_backbone

from .task import VideoClassification


def data_args(options: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the data that follow from the model: how many frames a clip has, where that is told."""
    of_file = start_of(options.weights)[1] if options.weights and options.model is None else {}
    frames = given.get("num_frames", of_file.get("num_frames"))
    return {} if frames is None or not is_of_clips(options.data) else {"num_frames": frames}


def is_of_clips(spec: str) -> bool:
    """Whether a data set of this name has clips.

    >>> is_of_clips("moving"), is_of_clips("video:films"), is_of_clips("cifar10")
    (True, True, False)
    """
    return spec == "moving" or spec.startswith("video:")


def model_args(dataset: Dataset) -> dict[str, Any]:
    """The arguments of a model that follow from the data."""
    if not hasattr(dataset, "num_frames"):
        raise ValueError(f"items of {type(dataset).__name__} are no clips; --task video takes moving or video:PATH")
    size = {} if dataset.img_size is None else {"img_size": dataset.img_size}
    facts = {"num_classes": len(dataset.classes), "in_chans": dataset.in_chans, "num_frames": dataset.num_frames}
    return {**facts, **size}


def make_model(options: argparse.Namespace, given: Mapping[str, Any], dataset: Dataset) -> nn.Module:
    """A classifier of the clips of ``dataset``, its size that of the frames, where all have one, or its own.

    Raises:
        ValueError: a model that takes no clips; see also ``create_model``.
    """
    of_data = model_args(dataset)
    if options.weights and options.model is None:
        model = create_model(options.weights, num_classes=of_data["num_classes"], **given)
    else:
        of_file, weights = {}, options.weights
        if options.backbone_weights:
            _, of_file, weights = start_of_backbone(options.backbone_weights)
        named = {**of_file, **of_data}
        known = {name: value for name, value in named.items() if takes_argument(options.model, name)}
        model = create_model(options.model, weights=weights, **{**known, **given})
    if not hasattr(model, "num_frames"):
        raise ValueError(f"{model.name} takes no clips; use timesformer_*, vivit_* or video_swin_*")
    return model


def prepare(dataset: Dataset, model: nn.Module, config: TrainConfig, chosen: None, *, train: bool) -> Dataset:
    """Give ``dataset`` the transform that makes of its clips what ``model`` takes, still uint8."""
    steps = clip_steps(model, 1.0 if train else model.preprocess.crop_pct, dataset.img_size)
    if train and config.crop_scale < 1:
        how = InterpolationMode(model.preprocess.interpolation)
        steps = [v2.RandomResizedCrop(model.img_size, scale=(config.crop_scale, 1.0), interpolation=how)]
    if train and config.hflip:
        steps.append(v2.RandomHorizontalFlip())
    dataset.transform = ClipTransform(v2.Compose(steps)) if steps else None
    return dataset


def clip_steps(model: nn.Module, crop_pct: float, img_size: int | tuple[int, int] | None) -> list[Callable]:
    """The steps that bring frames to a model's size; none where they have it and nothing is cut off."""
    size = to_pair(model.img_size, "img_size")
    if img_size is not None and to_pair(img_size, "img_size") == size and crop_pct == 1.0:
        return []
    return resize_and_crop(size, model.preprocess.interpolation, crop_pct)


def make_task(name: str) -> VideoClassification:
    """The task, whose training clips are mirrored by their transform where the config says so."""
    return VideoClassification(augments=("hflip",))
