"""``python -m vitcourse.train``: a model and a data set by name, every field of TrainConfig as a flag."""

import argparse
import ast
import shlex
import sys
import types
import typing
from dataclasses import replace
from typing import Any

from .config import TrainConfig, TrainingError, config_fields, list_recipes, load_recipe

_SHOWN = ("train_loss", "val_loss", "val_accuracy")


def main(argv: list[str] | None = None) -> int:
    """Train as the arguments say. Returns 0, or 1 after one line on stderr that says what is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run(argv)
    except (ValueError, TypeError, TrainingError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        _leave_process_group()
    return 0


def _leave_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def run(argv: list[str]) -> None:
    options, config, recipe = parse(argv)
    import torch

    from vitcourse import create_model

    from .engine import fit

    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # of the initial weights
    model_args = {**recipe.get("model_args", {}), **options.model_args}
    train_set, val_set = open_raw(options, "train"), open_raw(options, "test")
    model_args = {"num_classes": len(train_set.classes), "in_chans": train_set.in_chans, **model_args}
    model = create_model(options.model, weights=options.weights, **model_args)
    if options.weights is None:
        mean, std = (_per_channel(v, model.in_chans) for v in (train_set.mean, train_set.std))
        model.preprocess = replace(model.preprocess, mean=mean, std=std, crop_pct=1.0)

    size = model.preprocess.img_size
    fit(
        model,
        fit_size(train_set, size, config, train=True),
        fit_size(val_set, size, config, train=False, crop_pct=model.preprocess.crop_pct),
        config,
        out_dir=options.out_dir or f"runs/{options.model}-{options.data.partition(':')[0]}",
        resume=options.resume,
        on_epoch_end=None if options.quiet else _print_row,
        about={"data": options.data, "model_args": model_args, "weights": options.weights},
        command="python -m vitcourse.train " + shlex.join(a for a in argv if a != "--resume"),
        progress=not options.quiet,
    )


def parse(argv: list[str]) -> tuple[argparse.Namespace, TrainConfig, dict[str, Any]]:
    """The arguments: what is not a field of TrainConfig, the config, and the recipe that both start from."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe")
    name = first.parse_known_args(argv)[0].recipe
    recipe = load_recipe(name) if name else {}
    options = make_parser(recipe).parse_args(argv)
    given = {f.name: v for f in config_fields() if (v := getattr(options, f.name)) is not _UNSET}
    return options, TrainConfig(**{**recipe.get("train", {}), **given}), recipe


class _UNSET:
    """Stands for a flag that was not given, since None is a value."""


def make_parser(recipe: dict[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vitcourse.train",
        description="Train a model of vitcourse. Launched by torchrun or accelerate launch, the same command uses "
        "several devices.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help=f"start from a recipe: {', '.join(list_recipes())}, or a .toml file")
    parser.add_argument("--model", default=recipe.get("model"), required="model" not in recipe, help="name of a model")
    parser.add_argument(
        "--model-args",
        type=_model_args,
        default={},
        metavar="KEY=VALUE,…",
        help="arguments of the model, such as img_size=28,patch_size=4,embed_dim=128",
    )
    parser.add_argument("--weights", help="weights to start from: a file, timm:NAME or torchvision:NAME")
    parser.add_argument(
        "--data",
        default=recipe.get("data"),
        required="data" not in recipe,
        help="fashion_mnist_subset, fashion_mnist, cifar10, … or imagefolder:PATH",
    )
    parser.add_argument("--data-root", help="folder of torchvision's data sets")
    parser.add_argument("--download", action="store_true", help="download the data set if it is not there")
    parser.add_argument("--out-dir", help="folder for checkpoints, metrics and weights; runs/MODEL-DATA by default")
    parser.add_argument("--resume", action="store_true", help="continue the run in out-dir")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    group = parser.add_argument_group("training")
    for f in config_fields():
        flag = "--" + f.name.replace("_", "-")
        text = f"{f.metadata['help']} ({recipe.get('train', {}).get(f.name, f.default)})".replace("%", "%%")
        if f.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=_UNSET, help=text)
        else:
            metavar = "|".join(f.metadata["choices"]) if f.metadata["choices"] else f.name.rpartition("_")[2].upper()
            group.add_argument(flag, type=_scalar_type(f.type), default=_UNSET, metavar=metavar, help=text)
    return parser


def _scalar_type(kind: Any) -> type:
    """``int | None`` is int on the command line."""
    if isinstance(kind, types.UnionType):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def _model_args(text: str) -> dict[str, Any]:
    """``a=1,b=true,c=x`` as ``{"a": 1, "b": True, "c": "x"}``: literals of Python or of a recipe, and else strings."""
    pairs: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{item!r} is not KEY=VALUE")
        try:
            pairs[key.strip()] = ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
        except (ValueError, SyntaxError):
            pairs[key.strip()] = value
    return pairs


def open_raw(options: argparse.Namespace, split: str) -> Any:
    from vitcourse.data import open_dataset

    return open_dataset(options.data, split, root=options.data_root, download=options.download)


def fit_size(dataset: Any, size: int, config: TrainConfig, *, train: bool, crop_pct: float = 1.0) -> Any:
    """``dataset`` with uint8 images of ``size``; what is in memory at that size already stays as it is.

    With ``loader="memory"`` files are read now, once, and held.

    Raises:
        ValueError: random crops of larger pictures are asked for, of images that are to be held.
    """
    import torch
    from torchvision.transforms import v2

    from vitcourse.data import ImageDataset

    if isinstance(dataset.images, torch.Tensor) and dataset.img_size == size:
        return dataset
    bicubic, random_crop, hold = (
        v2.InterpolationMode.BICUBIC,
        train and config.crop_scale < 1,
        config.loader == "memory",
    )
    if random_crop and hold:
        raise ValueError(
            "crop_scale crops larger pictures anew in every epoch; use --loader workers, or --crop-scale 1"
        )
    if random_crop:
        dataset.transform = v2.RandomResizedCrop(size, scale=(config.crop_scale, 1.0), interpolation=bicubic)
    else:
        dataset.transform = v2.Compose([v2.Resize(round(size / crop_pct), interpolation=bicubic), v2.CenterCrop(size)])
    if not hold:
        return dataset
    images = torch.stack([torch.as_tensor(dataset[i][0]) for i in range(len(dataset))])
    return ImageDataset(images, dataset.targets, dataset.classes, mean=dataset.mean, std=dataset.std)


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _print_row(row: dict[str, Any]) -> None:
    from tqdm.auto import tqdm

    shown = "  ".join(f"{name} {row[name]:.4f}" for name in _SHOWN if row[name] is not None)
    speed = f"{row['images_per_second']:.0f} images/s"
    tqdm.write(f"epoch {row['epoch']:3d}  step {row['step']:6d}  lr {row['lr']:.2e}  {shown}  {speed}")
