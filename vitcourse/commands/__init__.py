"""The program ``vitcourse``, also ``python -m vitcourse``: which commands there are, and for which tasks.

What a new direction adds is named here: a command in :data:`COMMANDS`, and in :data:`TASKS` the module that measures,
predicts and draws what a task of its own makes. Both tables hold names, and a module is imported when it is asked for:
no help loads PyTorch.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn


class Command(NamedTuple):
    """A module with ``main(argv) -> exit code``, and what the help says of it."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("vitcourse.train.cli", "train a model on a data set or on folders of images"),
    "evaluate": Command("vitcourse.commands.evaluate", "measure a weights file on a data set"),
    "predict": Command("vitcourse.commands.predict", "say what a weights file sees in pictures"),
    "course": Command("vitcourse.commands.course", "the lessons: start, progress, build, check, mistakes"),
}
TASKS = {  # by the name that stands in a weights file
    "classification": "vitcourse.commands.classification",
    "detection": "vitcourse.commands.detection",
    "segmentation": "vitcourse.commands.segmentation",
    "video": "vitcourse.commands.video",
    **dict.fromkeys(("moco", "beit", "mae", "lejepa"), "vitcourse.commands.pretraining"),
}


class TaskProgram(Protocol):
    """What a module in :data:`TASKS` offers; the commands read and write the files.

    Attributes:
        BATCH_SIZE: images, or clips, at a time, unless told otherwise.
        WANTED: what files are predicted of, and whether one of this name in a folder is such a file.
    """

    BATCH_SIZE: int
    WANTED: tuple[str, Callable[[str], bool]]

    def measure(self, model: "nn.Module", options: "argparse.Namespace") -> dict[str, Any]:
        """Metrics on ``options.data``, as JSON can hold them."""

    def report(self, result: dict[str, Any]) -> str:
        """What ``measure`` found, in a few lines for a terminal."""

    def draw(self, result: dict[str, Any]) -> "Figure":
        """What ``measure`` found, as a figure."""

    def predict(self, model: "nn.Module", files: Sequence[Path], options: "argparse.Namespace") -> list[dict[str, Any]]:
        """One record per file, as JSON can hold it, with ``"file"`` and, for one that cannot be read, ``"error"``.

        What begins with "_" is for ``sheet`` alone.
        """

    def rows(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The records of whole files as rows of a table, all with the same columns."""

    def sheet(self, records: list[dict[str, Any]]) -> "Figure":
        """The pictures of whole files with what is seen in them."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if argv is None:
        argv = sys.argv[1:]
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal may know fewer characters
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        from vitcourse import __version__

        print(f"vitcourse {__version__}")
        return 0
    if name not in COMMANDS:
        return guarded(lambda _: _refuse(name), rest)
    try:
        code = import_module(COMMANDS[name].module).main(rest)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return 1


def _refuse(name: str) -> None:
    from vitcourse.train.config import check_choice

    check_choice("command", name, COMMANDS)


def _help() -> str:
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    usage = "usage: vitcourse COMMAND …\n\nVision Transformers: train them, measure them, use them, learn them.\n"
    return "\n".join([usage, *lines, "\nvitcourse COMMAND --help says more; vitcourse --version says which this is."])


def guarded(run: Callable[[list[str]], Any], argv: list[str] | None) -> int:
    """Run a command, which gives its exit code (None: 0); what goes wrong is one line on stderr and exit code 1."""
    try:
        return run(sys.argv[1:] if argv is None else argv) or 0
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def open_weights(path: str, device: str) -> tuple["nn.Module", TaskProgram]:
    """The model of a weights file, on its device, and the program of the task that it was trained on.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it does not say how its model is built, or is of a task that has no program; an unknown device.
    """
    if not path.endswith(".safetensors"):
        raise ValueError(f"weights {path!r} is no .safetensors file; give one that vitcourse train has written")
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights file {path} does not exist; vitcourse train writes one into its --out-dir")
    from vitcourse import create_model
    from vitcourse.devices import resolve_device
    from vitcourse.weights import read_metadata

    # Files from before there were tasks are those of classifiers; a pretrainer is named by its task.
    metadata = read_metadata(path)
    around = str(metadata.get("model", "")).endswith("_pretrainer")
    task = metadata["model"].removesuffix("_pretrainer") if around else metadata.get("task", "classification")
    if task not in TASKS:
        raise ValueError(
            f"{path} was trained on task {task!r}, for which there is no program; there is one for {', '.join(TASKS)}: "
            "use create_model(path) in Python"
        )
    model = create_model(path).to(resolve_device(device))
    return model.encoder if around else model, import_module(TASKS[task])


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The weights file that a command begins with."""
    parser.add_argument("weights", metavar="WEIGHTS", help="a .safetensors file of vitcourse train, or of save_weights")


def add_running(parser: argparse.ArgumentParser) -> None:
    """Flags about how, and not what."""
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu; auto: VITCOURSE_DEVICE, or what is here")
    parser.add_argument(
        "--batch-size", type=positive, help="images at a time (128; 16 of detectors, segmenters and models of clips)"
    )


def positive(text: str) -> int:
    """The integer that an argument has to be, of 1 at least.

    >>> positive("64")
    64
    """
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def check_suffix(flag: str, path: str | None, *suffixes: str) -> None:
    """Raise ValueError, before anything is computed, for a file that could not be written."""
    if path is None:
        return
    if not path.lower().endswith(suffixes):
        raise ValueError(f"{flag} {path} must end in {' or '.join(suffixes)}")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: the folder {Path(path).parent} does not exist; make it first")
