"""What ``vitcourse train`` needs to train a classifier of images, or to begin with weights, beside the engine.

The other tasks have such a module too, which :data:`vitcourse.train.kinds.TASKS` names.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from vitcourse.data import ImageDataset
from vitcourse.data.transforms import resize_and_crop
from vitcourse.factory import create_model
from vitcourse.layers import to_pair
from vitcourse.weights import read_metadata

from .classification import Classification
from .config import TrainConfig


def model_args(dataset: Dataset) -> dict[str, Any]:
    """The arguments of a model that follow from the data."""
    return {"num_classes": len(dataset.classes), "in_chans": dataset.in_chans}


def data_args(options: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the data that follow from the model: none."""
    return {}


def make_model(options: argparse.Namespace, given: Mapping[str, Any], dataset: Dataset) -> nn.Module:
    """A classifier for the images of ``dataset``, or, for an objective without labels, an encoder.

    Raises:
        ValueError: as ``create_model`` does; a model that is no classifier of images.
    """
    arguments = {**model_args(dataset), **given}
    if options.objective != "supervised":
        arguments["num_classes"] = 0
    name, of_file, weights = start_of(options.weights) if options.weights else (None, {}, None)
    if options.model is None and isinstance(weights, str):
        model = create_model(weights, **arguments)
    elif options.model is None:
        model = create_model(name, weights=weights, **{**of_file, **arguments})
    else:
        model = create_model(options.model, weights=weights, **arguments)
    if hasattr(model, "wants") or hasattr(model, "num_frames"):
        task = "video" if hasattr(model, "num_frames") else "detect or --task segment"
        raise ValueError(f"{model.name} is no classifier of images; give --task {task}")
    return model


def start_of(source: str) -> tuple[str | None, dict[str, Any], str | nn.Module]:
    """The name and arguments of the model that weights are of, if known, and what ``load_weights`` takes of them.

    Of a file that pre-training has left, with a decoder or a projector beside the encoder, they are the encoder's.
    """
    if not source.endswith(".safetensors"):
        return None, {}, source
    saved = read_metadata(source)
    if not str(saved.get("model", "")).endswith("_pretrainer"):
        return saved.get("model"), dict(saved.get("model_args", {})), source
    encoder = create_model(source).encoder
    return encoder.name, dict(encoder.model_args), encoder


def start_of_backbone(source: str) -> tuple[str | None, dict[str, Any], str | nn.Module]:
    """As :func:`start_of`; of a detector's or segmenter's file they are its backbone's."""
    name, arguments, weights = start_of(source)
    if "backbone" not in arguments:
        return name, arguments, weights
    backbone = create_model(source).backbone
    return backbone.name, dict(backbone.model_args), backbone


def fit_size(dataset: Dataset, model: nn.Module, config: TrainConfig, *, train: bool) -> ImageDataset:
    """``dataset`` with uint8 images of ``model.img_size`` and ``model.in_chans``; what fits already stays as it is.

    For validation and testing they are what ``eval_transform(**asdict(model.preprocess))`` makes of them, but for the
    normalisation. With ``loader="memory"`` files are read now, once, and held.

    Raises:
        ValueError: random crops of larger pictures are asked for, of images that are to be held; scenes or clips.
    """
    if not isinstance(dataset, ImageDataset):
        raise ValueError(
            f"items of {type(dataset).__name__} are no images with one label each; --task detect and segment take "
            "images with boxes or masks, --task video takes clips"
        )
    preprocess = model.preprocess
    size = to_pair(getattr(model, "img_size", preprocess.img_size), "img_size")
    resize, crop = resize_and_crop(size, preprocess.interpolation, 1.0 if train else preprocess.crop_pct)
    if getattr(model, "in_chans", dataset.in_chans) != dataset.in_chans and model.in_chans in (1, 3):
        dataset = dataset.to_channels(model.in_chans)
    held_size = to_pair(dataset.img_size, "img_size") if isinstance(dataset.images, torch.Tensor) else None
    if held_size == size == resize.size:
        return dataset
    random_crop, hold = train and config.crop_scale < 1, config.loader == "memory"
    if random_crop and hold:
        raise ValueError(
            "crop_scale crops larger pictures anew in every epoch; use --loader workers, or --crop-scale 1"
        )
    if random_crop:
        how = InterpolationMode(preprocess.interpolation)
        dataset.transform = v2.RandomResizedCrop(size, scale=(config.crop_scale, 1.0), interpolation=how)
    else:
        dataset.transform = v2.Compose([resize, crop])
    if not hold:
        return dataset
    images = torch.stack([torch.as_tensor(dataset[i][0]) for i in range(len(dataset))])
    return ImageDataset(images, dataset.targets, dataset.classes, mean=dataset.mean, std=dataset.std)


def prepare(dataset: Dataset, model: nn.Module, config: TrainConfig, chosen: None, *, train: bool) -> ImageDataset:
    """As :func:`fit_size`; the task has no options of its own."""
    return fit_size(dataset, model, config, train=train)


def make_task(name: str) -> Classification:
    """What is learned unless a method of fine-tuning says how."""
    return Classification()
