"""The arguments of ``vitcourse train``: every field of TrainConfig as a flag, and what else there is to choose."""

import argparse
import types
import typing
from dataclasses import Field, fields
from typing import Any

from vitcourse.pretraining.options import OBJECTIVES, option_fields

from .config import TrainConfig, check_choice, config_fields, list_recipes, load_recipe
from .kinds import CLASSIFY, TASKS
from .literals import key_values
from .splits import VAL_SHARE, VALIDATION

SUPERVISED = "supervised"


class _UNSET:
    """Stands for a flag that was not given, since None is a value."""


def parse(argv: list[str]) -> tuple[argparse.Namespace, TrainConfig, dict[str, Any]]:
    """The arguments: what is not a field of TrainConfig, the config, and the recipe that both start from."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe")
    first.add_argument("--objective")
    first.add_argument("--task")
    known = first.parse_known_args(argv)[0]
    recipe = load_recipe(known.recipe) if known.recipe else {}
    objective = known.objective or recipe.get("objective", SUPERVISED)
    task = known.task or recipe.get("task", CLASSIFY)
    check_choice("task", task, TASKS)
    parser = make_parser(recipe, objective, task)
    options = parser.parse_args(argv)
    options.task_was_given = known.task is not None or "task" in recipe
    if not (options.model or options.weights):
        parser.error("--model is missing: name a model, or a file with --weights that says which it is for")
    train = {**TASKS[task].defaults, **recipe.get("train", {}), **given(options, config_fields())}
    return options, TrainConfig(**train), recipe


def make_parser(recipe: dict[str, Any], objective: str = SUPERVISED, task: str = CLASSIFY) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitcourse train",
        description="Train a model of vitcourse. Launched by torchrun or accelerate launch, the same command uses "
        "several devices.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help=f"start from a recipe: {', '.join(list_recipes())}, or a .toml file")
    parser.add_argument(
        "--task",
        choices=tuple(TASKS),
        default=task,
        help="what is learned with labels: "
        + "; ".join(f"{name}: {kind.summary}" for name, kind in TASKS.items())
        + " (%(default)s). --task NAME --help shows the task's own flags and defaults",
    )
    parser.add_argument(
        "--objective",
        choices=(SUPERVISED, *OBJECTIVES),
        default=recipe.get("objective", SUPERVISED),
        help="how images are learned from: by their classes, or without labels; --objective NAME --help lists what can "
        "be chosen then (%(default)s)",
    )
    parser.add_argument(
        "--model",
        default=recipe.get("model"),
        help="name of a model; by default the one of the file in --weights. To detect: fcos, detr, eomt (masks); to "
        "segment: unet, segmenter, eomt; for clips: timesformer_*, vivit_*, video_swin_*",
    )
    parser.add_argument(
        "--model-args",
        type=key_values,
        default={},
        metavar="KEY=VALUE,…",
        help="arguments of the model, such as img_size=28,depths=(2,2,6,2),global_pool=avg, or "
        "backbone=vit_tiny,backbone_args={patch_size:8,depth:4} of one that has a backbone",
    )
    parser.add_argument(
        "--weights", help="weights to start from, of the whole model: a file, timm:NAME, torchvision:NAME or hf:NAME"
    )
    parser.add_argument(
        "--backbone-weights",
        metavar="WEIGHTS",
        help="weights that only the backbone of a detector or segmenter starts from, or, inflated, a model of clips: "
        "of an image classifier or of pre-training. A file of this library also says which backbone, and its sizes",
    )
    parser.add_argument(
        "--method",
        help="how to fine-tune these weights: full, linear, bitfit, vpt_shallow, vpt_deep, lora, staged, layer_decay "
        f"({recipe.get('method', 'full')})",
    )
    parser.add_argument(
        "--method-args",
        type=key_values,
        default={},
        metavar="KEY=VALUE,…",
        help="options of the method, such as rank=4,targets=(q,v) or schedule=shallow_first,stages=4",
    )
    parser.add_argument(
        "--data",
        default=recipe.get("data"),
        required="data" not in recipe,
        help=DATA_HELP,
    )
    add_data_args(parser)
    parser.add_argument(
        "--val",
        choices=VALIDATION,
        help="what validates and chooses best.safetensors: the data set's val split, a part of train, the test images "
        "(which else are looked at once, at the end), or nothing "
        f"({recipe.get('val', 'val where there is one, else train')})",
    )
    parser.add_argument(
        "--val-share",
        type=float,
        default=recipe.get("val_share", VAL_SHARE),
        help="share of the training images that --val train holds out, of each class alike (%(default)s)",
    )
    parser.add_argument("--data-root", help="folder of torchvision's data sets")
    parser.add_argument("--download", action="store_true", help="download the data set if it is not there")
    parser.add_argument("--out-dir", help="folder for checkpoints, metrics and weights; runs/MODEL-DATA by default")
    parser.add_argument("--resume", action="store_true", help="continue the run in out-dir")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors and notices")
    defaults = {**TASKS[task].defaults, **recipe.get("train", {})}
    _add_fields(parser.add_argument_group("training"), config_fields(), defaults)
    if (kind := TASKS[task]).options:
        group = parser.add_argument_group(f"task {task}", kind.options.__doc__.partition("\n")[0])
        _add_fields(group, fields(kind.options), args_of(recipe, "task", task))
    if objective in OBJECTIVES:
        group = parser.add_argument_group(f"objective {objective}", OBJECTIVES[objective].__doc__)
        _add_fields(group, option_fields(objective), args_of(recipe, "objective", objective))
    return parser


DATA_HELP = (
    "images with classes: fashion_mnist_subset, fashion_mnist, cifar10, … or imagefolder:PATH; with boxes or masks: "
    "scenes, coco:PATH, voc:PATH or masks:PATH; clips: moving or video:PATH"
)


def add_data_args(parser: argparse.ArgumentParser) -> None:
    """Flags that say how a data set is opened."""
    parser.add_argument(
        "--data-args",
        type=key_values,
        default={},
        metavar="KEY=VALUE,…",
        help="options of the data set, such as img_size=64,objects=(0,3) of scenes, label=direction of moving, or "
        "num_frames=16,fps=5 of video:PATH",
    )
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        help="what becomes of files and boxes of a folder that cannot be used: raise stops, "
        "skip leaves them out and says how many, for which pictures are all read once at the beginning (raise)",
    )


def _add_fields(group: Any, fields: tuple[Field, ...], chosen: dict[str, Any]) -> None:
    """A flag for each field, whose default is what the recipe has chosen."""
    for f in fields:
        flag = "--" + f.name.replace("_", "-")
        text = f"{f.metadata['help']} ({chosen.get(f.name, f.default)})".replace("%", "%%")
        if f.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=_UNSET, help=text)
        else:
            choices = f.metadata.get("choices")
            metavar = "|".join(choices) if choices else f.name.rpartition("_")[2].upper()
            group.add_argument(flag, type=_scalar_type(f.type), default=_UNSET, metavar=metavar, help=text)


def given(options: argparse.Namespace, fields: tuple[Field, ...]) -> dict[str, Any]:
    """What the command line says of these fields."""
    return {f.name: v for f in fields if (v := getattr(options, f.name, _UNSET)) is not _UNSET}


def _scalar_type(kind: Any) -> type:
    """``int | None`` is int on the command line."""
    if isinstance(kind, types.UnionType):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def args_of(recipe: dict[str, Any], kind: str, name: str | None) -> dict[str, Any]:
    """What a recipe says of its objective, or of its method; nothing where another one was asked for.

    >>> args_of({"objective": "mae", "objective_args": {"mask_ratio": 0.5}}, "objective", "moco")
    {}
    """
    return recipe.get(f"{kind}_args", {}) if recipe.get(kind, name) == name else {}
