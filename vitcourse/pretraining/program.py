"""What ``vitcourse train --objective …`` needs beside ``vitcourse train``."""

import argparse
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from vitcourse.train.arguments import args_of, given
from vitcourse.train.config import TrainConfig
from vitcourse.train.task import Task
from vitcourse.weights import save_weights

from . import make_objective
from .options import option_fields


def prepare(
    options: argparse.Namespace,
    recipe: dict[str, Any],
    encoder: nn.Module,
    train_set: Dataset,
    config: TrainConfig,
    out_dir: str,
) -> tuple[nn.Module, Task]:
    """What is trained and the task; for BEiT with a tokenizer, which is trained first where none is given."""
    name = options.objective
    chosen = {**args_of(recipe, "objective", name), **given(options, option_fields(name))}
    model, task = make_objective(name, encoder, **chosen)
    if name == "beit":
        from .tokenizer import provide_tokenizer

        provide_tokenizer(model, task.options, train_set, config, f"{out_dir}/tokenizer", options.resume, options.quiet)
    return model, task


def finish(options: argparse.Namespace, model: nn.Module, config: TrainConfig, out_dir: str) -> None:
    """Keep what was trained beside the encoder, and say how to use both."""
    whole, file = f"{out_dir}/pretrainer.safetensors", f"{out_dir}/final.safetensors"
    save_weights(model, whole, half=config.save_dtype == "fp16")
    if not options.quiet:
        print(
            f"{file} holds the encoder, {whole} all that was trained\n"
            f"what it has learnt:  vitcourse evaluate {file} --data {options.data}\n"
            f"to fine-tune it:     vitcourse train --weights {file} --data {options.data}\n"
            f"in Python:           create_model({file!r}, num_classes=…)"
        )
