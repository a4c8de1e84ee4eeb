"""The training engine: ``fit`` in a program, ``vitcourse train`` in a shell.

Read in this order: ``config`` (every choice there is), ``optim`` (how weights move), ``task`` (what is learned) and
``classification`` (what is learned unless asked otherwise), ``augment`` (how images are varied), ``batches`` (which
images, when), ``runtime`` (on what device), ``evaluation``, ``ledger`` (what is measured), ``record`` (what is left on
disk), ``engine`` (the run itself); ``kinds`` (what the command line can train), ``arguments``, ``program``, ``cli``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import TrainConfig, TrainingError, list_recipes, load_recipe

if TYPE_CHECKING:
    from .classification import Classification
    from .engine import fit
    from .evaluation import evaluate
    from .optim import Ema, learning_rate, param_groups
    from .record import History
    from .task import Part, Task

__all__ = [
    "Classification",
    "Ema",
    "History",
    "Part",
    "Task",
    "TrainConfig",
    "TrainingError",
    "evaluate",
    "fit",
    "learning_rate",
    "list_recipes",
    "load_recipe",
    "main",
    "param_groups",
]

# Imported on first use, so that the command line can print its help without PyTorch.
_LAZY = {
    "Classification": "classification",
    "Ema": "optim",
    "History": "record",
    "Part": "task",
    "Task": "task",
    "evaluate": "evaluation",
    "fit": "engine",
    "learning_rate": "optim",
    "param_groups": "optim",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: list[str] | None = None) -> int:
    """The command line; see ``vitcourse train --help``. Returns the exit code."""
    from .cli import main

    return main(argv)
