"""``vitcourse train``: a model and a data set by name, every field of TrainConfig as a flag."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from importlib import import_module
from typing import Any

from .arguments import SUPERVISED, args_of, given, parse
from .config import TrainConfig, TrainingError, config_fields
from .kinds import CLASSIFY, TASKS
from .splits import Splits, measure_on_test, open_splits, validation_of_earlier_run

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
    check_together(options, config, recipe)
    import torch

    from vitcourse.devices import resolve_device

    from .engine import fit

    resolve_device(config.device)  # a wrong one is better found before anything is opened

    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # of the initial weights
    supervised, program = options.objective == SUPERVISED, import_module(TASKS[options.task].program)
    chosen = choose_task_options(options, recipe)
    model_args = {**recipe.get("model_args", {}), **options.model_args}
    named = options.model or model_in_file(options.weights)
    named = named if supervised else f"{options.objective}-{named}"
    out_dir = options.out_dir or f"runs/{named}-{options.data.partition(':')[0]}"
    data_args = {**program.data_args(options, model_args), **choose_data_args(options, recipe)}
    splits, about = choose_splits(options, recipe, out_dir, data_args)
    model = program.make_model(options, model_args, splits.train)
    if options.weights is None and options.backbone_weights is None:
        of_data = {"mean": splits.train.mean, "std": splits.train.std, "crop_pct": 1.0}
        model.preprocess = replace(model.preprocess, **of_data).for_model(model)

    is_main = os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate launch set it
    if splits.notice and is_main:
        print(f"vitcourse: {splits.notice}", file=sys.stderr)
    train_set = program.prepare(splits.train, model, config, chosen, train=True)
    if supervised:
        trained, task = model, choose_method(model, options, recipe)
        if task and is_main:
            _tell_method(task, options)
        task = task or program.make_task(options.task)
    else:
        from vitcourse.pretraining.program import finish, prepare

        trained, task = prepare(options, recipe, model, train_set, config, out_dir)
    fit(
        trained,
        train_set,
        splits.val and program.prepare(splits.val, model, config, chosen, train=False),
        config,
        out_dir=out_dir,
        resume=options.resume,
        on_epoch_end=None if options.quiet else partial(_print_row, (*_SHOWN, *task.metrics)),
        about=_facts(options, data_args, chosen, model_args) | about,
        command="python -m vitcourse.train " + shlex.join(a for a in argv if a != "--resume"),
        progress=not options.quiet,
        task=task,
    )
    if not supervised:
        if is_main:
            finish(options, trained, config, out_dir)
        return
    if hasattr(task, "method") and is_main:
        from vitcourse.finetuning.files import save_adapter_of_run

        save_adapter_of_run(model, task, out_dir)
    if splits.test:
        test_set = program.prepare(splits.test, model, config, chosen, train=False)
        results = measure_on_test(out_dir, test_set, config, task.evaluate)
        if is_main and not options.quiet:
            _print_test(results)


def _facts(
    options: argparse.Namespace, data_args: dict[str, Any], chosen: Any, model_args: dict[str, Any]
) -> dict[str, Any]:
    """What a run's folder keeps and compares when it is continued; what was not chosen is left out."""
    more = {
        "data_args": data_args,
        "backbone_weights": options.backbone_weights,
        "task_args": asdict(chosen) if chosen else None,
    }
    facts = {"data": options.data, "model_args": model_args, "weights": options.weights}
    return facts | {name: value for name, value in more.items() if value}


def check_together(options: argparse.Namespace, config: TrainConfig, recipe: dict[str, Any]) -> None:
    """Raise ValueError for what cannot be asked for together."""
    supervised, kind = options.objective == SUPERVISED, TASKS[options.task]
    method = options.method or recipe.get("method")
    if not supervised and options.task_was_given:
        raise ValueError(
            f"--objective {options.objective} says how images are learned from without labels, and --task "
            f"{options.task} what is learned with them; leave one out"
        )
    if not supervised and (method or options.method_args):
        raise ValueError(
            f"--method fine-tunes with labels, and --objective {options.objective} learns without; leave one out"
        )
    if options.task != CLASSIFY and (method or options.method_args):
        raise ValueError(f"--method fine-tunes classifiers of images; leave it out with --task {options.task}")
    if options.task == CLASSIFY and options.backbone_weights:
        raise ValueError("--backbone-weights is for --task detect, segment and video; a classifier has --weights")
    if options.weights and options.backbone_weights:
        raise ValueError(
            "--weights are those of the whole model, and --backbone-weights of a part of it; leave one out"
        )
    asked = {**recipe.get("train", {}), **given(options, config_fields())}
    if refused := [name for name in kind.unheeded if asked.get(name, kind.defaults.get(name)) not in _OFF[name]]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in refused)
        instead = "; images are varied by --min-scale, --max-scale and --hflip" if kind.options else ""
        raise ValueError(f"task {options.task} does not heed {flags}; leave it out{instead}")


_OFF = {"label_smoothing": (0, None), "crop_scale": (1, None)}


def choose_task_options(options: argparse.Namespace, recipe: dict[str, Any]) -> Any:
    """The options that the task has of its own; None where it has none."""
    kind = TASKS[options.task].options
    return kind and kind(**{**args_of(recipe, "task", options.task), **given(options, fields(kind))})


def choose_data_args(options: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    """What ``open_dataset`` is told beside the name: of a recipe where it is its data set, and of the flags."""
    of_recipe = args_of(recipe, "data", options.data)
    on_error = {"on_error": options.on_error} if options.on_error else {}
    return {**of_recipe, **options.data_args, **on_error}


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


def choose_splits(
    options: argparse.Namespace, recipe: dict[str, Any], out_dir: str, data_args: dict[str, Any] | None = None
) -> tuple[Splits, dict[str, str]]:
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
        **(data_args or {}),
    )
    return splits, {} if earlier else {"val": splits.chosen_on}


def _print_row(names: Sequence[str], row: dict[str, Any]) -> None:
    from tqdm import tqdm

    shown = "  ".join(f"{name} {row[name]:.4f}" for name in dict.fromkeys(names) if row.get(name) is not None)
    speed = f"{row['images_per_second']:.0f} images/s"
    tqdm.write(f"epoch {row['epoch']:3d}  step {row['step']:6d}  lr {row['lr']:.2e}  {shown}  {speed}")


def _print_test(results: dict[str, dict[str, float]]) -> None:
    from tqdm import tqdm

    for name, row in results.items():
        shown = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if key != "epoch" and value is not None)
        tqdm.write(f"epoch {row['epoch']:3d}  {name}.safetensors  {shown}")
