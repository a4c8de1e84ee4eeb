"""What ``vitcourse train --objective …`` needs beside ``vitcourse train``."""

import argparse
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from vitcourse.train.cli import given
from vitcourse.train.config import TrainConfig
from vitcourse.train.task import Task

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
    chosen = {**recipe.get("objective_args", {}), **given(options, option_fields(name))}
    model, task = make_objective(name, encoder, **chosen)
    if name == "beit":
        from .tokenizer import provide_tokenizer

        provide_tokenizer(model, task.options, train_set, config, f"{out_dir}/tokenizer", options.resume, options.quiet)
    return model, task
