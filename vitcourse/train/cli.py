"""``vitcourse train``: a model and a data set by name, every field of TrainConfig as a flag."""

import argparse
import ast
import os
import shlex
import sys
import types
import typing
from dataclasses import Field, replace
from typing import Any

from vitcourse.pretraining.options import OBJECTIVES, option_fields

from .config import TrainConfig, TrainingError, config_fields, list_recipes, load_recipe
from .splits import VAL_SHARE, VALIDATION, Splits, measure_on_test, open_splits, validation_of_earlier_run

_SHOWN = ("train_loss", "val_loss", "chance", "val_accuracy", "effective_rank", "alignment", "uniformity", "code_use")


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
    from vitcourse.devices import resolve_device

    from .engine import fit

    resolve_device(config.device)  # a wrong one is better found before anything is opened

    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # of the initial weights
    model_args = {**recipe.get("model_args", {}), **options.model_args}
    supervised = options.objective == SUPERVISED
    if not supervised and (options.method or options.method_args or "method" in recipe):
        raise ValueError(
            f"--method fine-tunes with labels, and --objective {options.objective} learns without; leave one out"
        )
    named = options.model or model_in_file(options.weights)
    named = named if supervised else f"{options.objective}-{named}"
    out_dir = options.out_dir or f"runs/{named}-{options.data.partition(':')[0]}"
    splits, about = choose_splits(options, recipe, out_dir)
    classes = len(splits.train.classes) if supervised else 0
    model_args = {"num_classes": classes, "in_chans": splits.train.in_chans, **model_args}
    if options.model:
        model = create_model(options.model, weights=options.weights, **model_args)
    else:
        model = create_model(options.weights, **model_args)
    if options.weights is None:
        of_data = {"mean": splits.train.mean, "std": splits.train.std, "crop_pct": 1.0}
        model.preprocess = replace(model.preprocess, **of_data).for_model(model)

    is_main = os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate launch set it
    if splits.notice and is_main:
        print(f"vitcourse: {splits.notice}", file=sys.stderr)
    train_set = fit_size(splits.train, model, config, train=True)
    if supervised:
        trained, task = model, choose_method(model, options, recipe)
        if task and is_main:
            _tell_method(task, options)
    else:
        from vitcourse.pretraining.program import finish, prepare

        trained, task = prepare(options, recipe, model, train_set, config, out_dir)
    fit(
        trained,
        train_set,
        splits.val and fit_size(splits.val, model, config, train=False),
        config,
        out_dir=out_dir,
        resume=options.resume,
        on_epoch_end=None if options.quiet else _print_row,
        about={"data": options.data, "model_args": model_args, "weights": options.weights, **about},
        command="python -m vitcourse.train " + shlex.join(a for a in argv if a != "--resume"),
        progress=not options.quiet,
        task=task,
    )
    if not supervised:
        if is_main:
            finish(options, trained, config, out_dir)
        return
    if task and is_main:
        from vitcourse.finetuning.files import save_adapter_of_run

        save_adapter_of_run(model, task, out_dir)
    if splits.test:
        results = measure_on_test(out_dir, fit_size(splits.test, model, config, train=False), config)
        if is_main and not options.quiet:
            _print_test(results)


def model_in_file(path: str) -> str:
    """The name of the model that a weights file was saved from.

    Raises:
        ValueError: it does not say.
        FileNotFoundError: no such file.
    """
    from vitcourse.weights import read_metadata

    saved = read_metadata(path) if path.endswith(".safetensors") else {}
    if "adapter" in saved:
        raise ValueError(
            f"--weights {path} holds what fine-tuning has changed, and not the model; give that one's file"
        )
    if "model" not in saved:
        raise ValueError(f"--model is missing, and --weights {path} does not say which model it is for; name it")
    return saved["model"]


def _tell_method(task: Any, options: argparse.Namespace) -> None:
    if options.weights is None:
        print("vitcourse: --method starts from random weights; --weights names trained ones", file=sys.stderr)
    if not options.quiet:
        print(task.report())


def choose_method(model: Any, options: argparse.Namespace, recipe: dict[str, Any]) -> Any:
    """The task that fine-tunes ``model`` as ``--method`` says; None without one, for all of the model is trained then.

    Raises:
        ValueError: as ``finetune`` does; arguments of no method.
    """
    name = options.method or recipe.get("method")
    given = {**args_of(recipe, "method", name), **options.method_args}
    if name is None:
        if given:
            raise ValueError(f"--method-args {', '.join(given)} are for a --method; name one")
        return None
    from vitcourse.finetuning import finetune

    return finetune(model, name, **given)


def args_of(recipe: dict[str, Any], kind: str, name: str | None) -> dict[str, Any]:
    """What a recipe says of its objective, or of its method; nothing where another one was asked for.

    >>> args_of({"objective": "mae", "objective_args": {"mask_ratio": 0.5}}, "objective", "moco")
    {}
    """
    return recipe.get(f"{kind}_args", {}) if recipe.get(kind, name) == name else {}


def choose_splits(options: argparse.Namespace, recipe: dict[str, Any], out_dir: str) -> tuple[Splits, dict[str, str]]:
    """The images, and what the run's folder keeps about them; a run is continued as it was begun.

    Raises:
        ValueError: the run in ``out_dir`` validates on something else than ``--val`` says.
    """
    earlier = validation_of_earlier_run(out_dir, options.data) if options.resume else None
    if earlier and options.val not in (None, earlier):
        raise ValueError(
            f"the run in {out_dir} validates on {earlier}; continue it with --val {earlier}, or choose another folder"
        )
    splits = open_splits(
        options.data,
        earlier or options.val or recipe.get("val"),
        options.val_share,
        root=options.data_root,
        download=options.download,
    )
    return splits, {} if earlier else {"val": splits.chosen_on}


def parse(argv: list[str]) -> tuple[argparse.Namespace, TrainConfig, dict[str, Any]]:
    """The arguments: what is not a field of TrainConfig, the config, and the recipe that both start from."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe")
    first.add_argument("--objective")
    known = first.parse_known_args(argv)[0]
    recipe = load_recipe(known.recipe) if known.recipe else {}
    objective = known.objective or recipe.get("objective", SUPERVISED)
    parser = make_parser(recipe, objective)
    options = parser.parse_args(argv)
    if not (options.model or options.weights):
        parser.error("--model is missing: name a model, or a file with --weights that says which it is for")
    return options, TrainConfig(**{**recipe.get("train", {}), **given(options, config_fields())}), recipe


SUPERVISED = "supervised"


class _UNSET:
    """Stands for a flag that was not given, since None is a value."""


def make_parser(recipe: dict[str, Any], objective: str = SUPERVISED) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitcourse train",
        description="Train a model of vitcourse. Launched by torchrun or accelerate launch, the same command uses "
        "several devices.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help=f"start from a recipe: {', '.join(list_recipes())}, or a .toml file")
    parser.add_argument(
        "--objective",
        choices=(SUPERVISED, *OBJECTIVES),
        default=recipe.get("objective", SUPERVISED),
        help="what is learned: the classes, or without labels; --objective NAME --help lists what can be chosen then "
        "(%(default)s)",
    )
    parser.add_argument(
        "--model", default=recipe.get("model"), help="name of a model; by default the one of the file in --weights"
    )
    parser.add_argument(
        "--model-args",
        type=_model_args,
        default={},
        metavar="KEY=VALUE,…",
        help="arguments of the model, such as img_size=28,depths=(2,2,6,2),global_pool=avg",
    )
    parser.add_argument("--weights", help="weights to start from: a file, timm:NAME, torchvision:NAME or hf:NAME")
    parser.add_argument(
        "--method",
        help="how to fine-tune these weights: full, linear, bitfit, vpt_shallow, vpt_deep, lora, staged, layer_decay "
        f"({recipe.get('method', 'full')})",
    )
    parser.add_argument(
        "--method-args",
        type=_model_args,
        default={},
        metavar="KEY=VALUE,…",
        help="options of the method, such as rank=4,targets=(q,v) or schedule=shallow_first,stages=4",
    )
    parser.add_argument(
        "--data",
        default=recipe.get("data"),
        required="data" not in recipe,
        help="fashion_mnist_subset, fashion_mnist, cifar10, … or imagefolder:PATH",
    )
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
    _add_fields(parser.add_argument_group("training"), config_fields(), recipe.get("train", {}))
    if objective in OBJECTIVES:
        group = parser.add_argument_group(f"objective {objective}", OBJECTIVES[objective].__doc__)
        _add_fields(group, option_fields(objective), args_of(recipe, "objective", objective))
    return parser


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


def _model_args(text: str) -> dict[str, Any]:
    """``a=1,b=true,c=x,d=(2,2)`` as a dict: literals of Python or of a recipe, and else strings.

    >>> _model_args("depths=(2,(2,6)),class_token=false,global_pool=avg,note='a,b'")
    {'depths': (2, (2, 6)), 'class_token': False, 'global_pool': 'avg', 'note': 'a,b'}
    """
    pairs: dict[str, Any] = {}
    for item in _split_outside_brackets(text):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (equals and key.isidentifier() and value):
            raise argparse.ArgumentTypeError(f"{item!r} is not KEY=VALUE")
        if key in pairs:
            raise argparse.ArgumentTypeError(f"{item!r} gives {key} a second time")
        try:
            pairs[key] = ast.literal_eval(_Words().visit(ast.parse(value, mode="eval")))
        except (ValueError, SyntaxError):
            if value[0] in "([{\"'":
                raise argparse.ArgumentTypeError(f"{item!r} cannot be read; write it as in Python") from None
            pairs[key] = value
    return pairs


def _split_outside_brackets(text: str) -> list[str]:
    """Cut at the commas that are in no brackets and no quotes."""
    items, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += 0 if quote else (character in "([{") - (character in ")]}")
        if character == "," and not quote and depth == 0:
            items.append("")
        else:
            items[-1] += character
    if quote or depth:
        raise argparse.ArgumentTypeError(f"{items[-1]!r} has {'a quote' if quote else 'brackets'} without a partner")
    return [item for item in items if item.strip()]


class _Words(ast.NodeTransformer):
    """Bare words stand for strings, but true and false for what they say."""

    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.Constant({"true": True, "false": False}.get(node.id, node.id))


def fit_size(dataset: Any, model: Any, config: TrainConfig, *, train: bool) -> Any:
    """``dataset`` with uint8 images of ``model.img_size`` and ``model.in_chans``; what fits already stays as it is.

    For validation and testing they are what ``eval_transform(**asdict(model.preprocess))`` makes of them, but for the
    normalisation. With ``loader="memory"`` files are read now, once, and held.

    Raises:
        ValueError: random crops of larger pictures are asked for, of images that are to be held; scenes or clips.
    """
    import torch
    from torchvision.transforms import InterpolationMode, v2

    from vitcourse.data import ImageDataset
    from vitcourse.data.transforms import resize_and_crop
    from vitcourse.layers import to_pair

    if not isinstance(dataset, ImageDataset):
        raise ValueError(
            f"items of {type(dataset).__name__} are no images with one label each; name a task that takes them"
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


def _print_row(row: dict[str, Any]) -> None:
    from tqdm import tqdm

    shown = "  ".join(f"{name} {row[name]:.4f}" for name in _SHOWN if row.get(name) is not None)
    speed = f"{row['images_per_second']:.0f} images/s"
    tqdm.write(f"epoch {row['epoch']:3d}  step {row['step']:6d}  lr {row['lr']:.2e}  {shown}  {speed}")


def _print_test(results: dict[str, dict[str, float]]) -> None:
    from tqdm import tqdm

    for name, row in results.items():
        shown = "  ".join(f"{key} {row[key]:.4f}" for key in ("test_loss", "test_accuracy"))
        tqdm.write(f"epoch {row['epoch']:3d}  {name}.safetensors  {shown}")
