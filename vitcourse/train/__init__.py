"""The training engine: ``fit`` in a program, ``python -m vitcourse.train`` in a shell.

Read in this order: ``config`` (every choice there is), ``optim`` (how weights move), ``augment`` (how images are
varied), ``batches`` (which images, when), ``runtime`` (on what device), ``evaluation``, ``record`` (what is left on
disk), ``engine`` (the run itself), ``cli``.
"""

from .config import TrainConfig, TrainingError, list_recipes, load_recipe
from .engine import fit
from .evaluation import evaluate
from .optim import Ema, learning_rate, param_groups
from .record import History

__all__ = [
    "Ema",
    "History",
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


def main(argv: list[str] | None = None) -> int:
    """The command line; see ``python -m vitcourse.train --help``. Returns the exit code."""
    from .cli import main

    return main(argv)
