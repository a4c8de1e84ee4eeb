"""What ``vitcourse train --task detect`` and ``--task segment`` need beside the engine."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from vitcourse.data import dense_eval_transform, dense_train_transform
from vitcourse.factory import create_model
from vitcourse.registry import takes_argument
from vitcourse.train import TrainConfig
from vitcourse.train.kinds import DenseOptions
from vitcourse.train.program import start_of, start_of_backbone
from vitcourse.weights import load_weights

from .tasks import DenseTask, Detection, Segmentation

TASKS = {"detect": Detection, "segment": Segmentation}


def data_args(options: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the data that follow from the model: none."""
    return {}


def model_args(dataset: Dataset, task: DenseTask) -> dict[str, Any]:
    """The arguments of a model that follow from the data."""
    if not hasattr(dataset, "semantic_classes"):
        raise ValueError(
            f"items of {type(dataset).__name__} have no boxes and no masks; --task detect and segment take scenes, "
            "coco:PATH, voc:PATH or masks:PATH"
        )
    size = {} if dataset.img_size is None else {"img_size": dataset.img_size}
    return {"num_classes": len(task.class_names(dataset)), "in_chans": dataset.in_chans, **size}


def make_model(options: argparse.Namespace, given: Mapping[str, Any], dataset: Dataset) -> nn.Module:
    """A detector or segmenter for the images of ``dataset``.

    Its size is that of the images, where all have one, or its own. A file in ``options.weights`` keeps its size, and
    gets new last layers where it is for another number of classes.

    Raises:
        ValueError: weights of another kind of model; see also ``create_model`` and ``load_weights``.
    """
    task = TASKS[options.task]()
    of_data = model_args(dataset, task)
    model = _continued(options, given, of_data) if options.weights else _begun(options, given, of_data)
    task.bind(model)
    if model.in_chans != dataset.in_chans:
        raise ValueError(
            f"in_chans {model.in_chans} of the model: images with boxes and masks are read in colour, as 3"
        )
    return model


def _continued(options: argparse.Namespace, given: Mapping[str, Any], of_data: Mapping[str, Any]) -> nn.Module:
    name = start_of(options.weights)[0]
    if name is not None and not takes_argument(name, "backbone"):
        raise ValueError(
            f"--weights {options.weights} is of {name}, which is no detector or segmenter; name one with --model, and "
            f"give this file as --backbone-weights"
        )
    if options.model is not None:
        return create_model(options.model, weights=options.weights, **{**of_data, **given})
    model, wanted = create_model(options.weights, **given), of_data["num_classes"]
    if model.num_classes != wanted:
        print(
            f"vitcourse: weights are for {model.num_classes} classes, not {wanted}: the last layers start untrained",
            file=sys.stderr,
        )
        model.reset_classifier(wanted)
        model.classes = None
    return model


def _begun(options: argparse.Namespace, given: Mapping[str, Any], of_data: Mapping[str, Any]) -> nn.Module:
    if not options.backbone_weights:
        known = {name: value for name, value in of_data.items() if takes_argument(options.model, name)}
        return create_model(options.model, **{**known, **given})
    name, arguments, weights = start_of_backbone(options.backbone_weights)
    for follows in ("num_classes", "img_size", "in_chans"):
        arguments.pop(follows, None)
    of_file = {"backbone": name, "backbone_args": arguments} if name and "backbone" not in given else {}
    model = create_model(options.model, **{**of_data, **of_file, **given})
    load_weights(model.backbone, weights, new_head=True)
    return model


def prepare(dataset: Dataset, model: nn.Module, config: TrainConfig, chosen: DenseOptions, *, train: bool) -> Dataset:
    """Give ``dataset`` the transform that makes of its images what ``model`` takes."""
    size, mean, std = model.img_size, model.preprocess.mean, model.preprocess.std
    if train:
        scale = (chosen.min_scale, chosen.max_scale)
        dataset.transform = dense_train_transform(size, mean, std, scale=scale, hflip=config.hflip)
    else:
        dataset.transform = dense_eval_transform(size, mean, std)
    return dataset


def make_task(name: str) -> DenseTask:
    """The task, whose training images are mirrored by their transform where the config says so."""
    return TASKS[name](augments=("hflip",))
