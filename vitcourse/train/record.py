"""What a run leaves on disk: checkpoints, metrics, the config. Every file is replaced in one step."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .config import TrainConfig, TrainingError


class History(list[dict[str, Any]]):
    """One row (a dict) per epoch: epoch and step (both counted from 1), lr, train_loss, grad_norm, what the task
    measures (val_loss and val_accuracy), seconds and images_per_second. Epochs without an evaluation have None for its
    results.

    >>> History([{"epoch": 1, "val_accuracy": 0.5}, {"epoch": 2, "val_accuracy": 0.7}]).column("val_accuracy")
    [0.5, 0.7]
    """

    def column(self, name: str) -> list[Any]:
        """One quantity over the epochs, where it was measured."""
        return [row[name] for row in self if row.get(name) is not None]


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Have ``write`` fill a file beside ``path`` and put it in place: a crash leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "posix":  # the new name itself lies in the folder
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(folder)
        os.close(folder)


class RunFolder:
    """The folder of one run: ``config.json``, ``last.pt``, ``metrics.csv``, ``best`` and ``final.safetensors``; the
    command line adds ``test.json``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def claim(self, config: TrainConfig, about: dict[str, Any], *, resume: bool) -> None:
        """Make the folder that of this run, or see that the run in it is the same.

        Raises:
            ValueError: it has the checkpoint of a run, and ``resume`` is false or the settings differ.
        """
        about = json.loads(json.dumps(about))  # tuples become lists, as they do in the file
        config_file = self.path / "config.json"
        if self.checkpoint.exists() and not resume:
            raise ValueError(f"out_dir {self.path} already has a run; continue it with --resume, or choose another")
        if self.checkpoint.exists():
            _check_same(json.loads(config_file.read_text(encoding="utf-8")), config, about, self.path)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"config": asdict(config), "about": about}, indent=2)
        write_atomically(config_file, lambda f: f.write(text.encode()))

    @property
    def checkpoint(self) -> Path:
        return self.path / "last.pt"

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        write_atomically(self.checkpoint, lambda f: torch.save(state, f))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, on the CPU; None if the run was ended before its first.

        Raises:
            TrainingError: the file is damaged.
        """
        if not self.checkpoint.exists():
            return None
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise TrainingError(
                f"checkpoint {self.checkpoint} cannot be read ({type(error).__name__}); delete it to start over"
            ) from error

    def write_metrics(self, history: History) -> None:
        """All rows again: a few kilobytes, and no row can then be missing or double after a resume."""
        text = io.StringIO()
        table = csv.DictWriter(text, dict.fromkeys(name for row in history for name in row))
        table.writeheader()
        table.writerows(history)
        write_atomically(self.path / "metrics.csv", lambda f: f.write(text.getvalue().encode()))


def _check_same(then: dict[str, Any], config: TrainConfig, about: dict[str, Any], path: Path) -> None:
    changes = config.differences(then["config"])
    earlier = {"task": about["task"], **then["about"]}  # a run from before there were tasks does not name its own
    changes += [f"{k}: {earlier.get(k)!r} then, {v!r} now" for k, v in about.items() if earlier.get(k) != v]
    if changes:
        raise ValueError(
            f"the run in {path} cannot be continued with other settings:\n  "
            + "\n  ".join(changes)
            + "\nGive the old ones, or choose another folder"
        )


class TensorBoard:
    """Writes history rows for TensorBoard; ``step`` is where this process starts, later entries are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError(
                "tensorboard is not installed; pip install tensorboard, or leave out --tensorboard"
            ) from error
        self.writer = SummaryWriter(str(path), purge_step=step)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, float):
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()
