"""The loop of every sweep: what a lesson has no time to train, run after run, each of them written down as it ends.

A ``benchmarks/lesson_<topic>.py`` says what is wanted, and how one run is trained::

    sweep("lesson_toy", __doc__, each_seed([{"name": "a"}, {"name": "b"}]), train)

    python -m benchmarks.lesson_toy             every run that runs/lesson_toy.jsonl lacks, then the results
    python -m benchmarks.lesson_toy --runs 8    eight of them, to share a machine
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import write_results
from vitcourse.hardware.prune import count_macs

Row = dict[str, Any]
SEEDS = (0, 1, 2)  # of every sweep


def sweep(
    name: str,
    about: str,
    wanted: Callable[[list[Row]], Iterable[Row]],
    train: Callable[[Row], Row],
    *,
    whole: str | None = None,
) -> None:
    """The command of a sweep: train all that is wanted and was not yet, and write the results when all is there.

    Args:
        name: of the results, and of the log ``runs/NAME.jsonl``, from which an interrupted sweep goes on.
        about: what ``--help`` says.
        wanted: what each run is called by, its seed included, in order; it is given the rows, which grow meanwhile,
            so that what comes later may depend on what came out.
        train: makes the rest of the row, ``accuracy`` included, of what a run is called by.
        whole: the column whose values make sense by themselves: a sweep that is ended by ``--runs`` writes the rows of
            those whose turn is over. Without it such a sweep writes no results.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every run")
    parser.add_argument("--runs", type=int, help="stop after so many")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    log = Path("runs") / f"{name}.jsonl"
    log.parent.mkdir(exist_ok=True)
    rows = read_log(log)
    for count, asked in enumerate(missing(wanted(rows), rows)):
        if count == options.runs:
            if whole is not None:
                write_results(name, [row for row in rows if row[whole] != asked[whole]])
            return
        rows.append({**asked, **train(asked)})
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(asked, rows[-1].get("accuracy", ""), flush=True)
    write_results(name, rows)


def each_seed(settings: list[Row]) -> Callable[[list[Row]], Iterator[Row]]:
    """Every setting with every seed, one seed after the other.

    >>> list(each_seed([{"name": "a"}, {"name": "b"}])([]))[:3]
    [{'name': 'a', 'seed': 0}, {'name': 'b', 'seed': 0}, {'name': 'a', 'seed': 1}]
    """
    return lambda rows: ({**setting, "seed": seed} for seed, setting in itertools.product(SEEDS, settings))


def missing(wanted: Iterable[Row], rows: list[Row]) -> Iterator[Row]:
    """What is wanted and in no row, while ``rows`` grows.

    >>> list(missing([{"name": "a"}, {"name": "b"}], [{"name": "a", "accuracy": 0.5}]))
    [{'name': 'b'}]
    """
    return (asked for asked in wanted if not any(asked.items() <= row.items() for row in rows))


def read_log(log: Path) -> list[Row]:
    """The rows of a log; one whose writing was interrupted is taken out of it."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        log.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def macs(model: nn.Module) -> int:
    """Multiply–adds for one image of Fashion-MNIST."""
    return count_macs(model, torch.zeros(1, 1, 28, 28))
