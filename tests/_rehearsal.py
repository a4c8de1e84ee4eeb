"""Run lessons on a pretend accelerator, training cut short, and tell which cells fail. A process of its own:

    python tests/_rehearsal.py [--mac | --cpu] [--student] 00_vit 01_hierarchical …

One line of JSON on stdout for each lesson. A cell that only misses an expectation has not failed: nothing is learnt in
three steps. Whatever else it raises is the device's doing, or the cut's.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import linecache
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"MPLBACKEND": "agg", "TRITON_INTERPRET": "1", "VITCOURSE_PROGRESS": "off", "VITCOURSE_PROFILE": "quick"}
os.environ["VITCOURSE_STRICT"] = "1"
os.environ.pop("VITCOURSE_DEVICE", None)

import pretend_device

STEPS, BATCH, IMAGES = 2, 16, 60  # of every training; of every data set


def cut_short() -> None:
    """Train a few steps and evaluate on a few images: enough to see where every tensor lies."""
    from vitcourse import data, train

    fit, subset, open_dataset = train.fit, data.subset, data.open_dataset

    def fit_briefly(model: Any, train_set: Any, val_set: Any = None, config: Any = None, **options: Any) -> Any:
        config = dataclasses.replace(config or train.TrainConfig(), max_steps=STEPS, batch_size=BATCH)
        return fit(model, train_set, val_set, config, **options)

    def few(dataset: Any, n: int, *args: Any, **options: Any) -> Any:
        return subset(dataset, min(n, len(dataset)), *args, **options)

    train.fit, data.subset = fit_briefly, few
    data.open_dataset = lambda *args, **options: few(open_dataset(*args, **options), IMAGES)


def briefly(cell: str) -> str:
    """A lesson's own loops end early whose length is a default, ``def train(…, steps=…)``; nothing is timed twice."""
    cell = re.sub(r"(\bdef \w+\(.*\bsteps=)\d+", rf"\g<1>{3 * STEPS}", cell)
    cell = re.sub(r"(\bdef \w+\(.*\brepeats=)\d+", r"\g<1>1", cell)
    return re.sub(r"for _ in range\(\d+\)", "for _ in range(1)", cell) if "perf_counter" in cell else cell


def rehearse(stem: str, edition: str) -> dict[str, Any]:
    """Run every cell of a lesson, the first one too; a cell that fails does not stop the others."""
    from vitcourse.course.expectations import ExpectationError
    from vitcourse.course.lessons import Lesson, render

    started, root = time.process_time(), Path(__file__).resolve().parents[1]
    cells = [cell.source for cell in render(Lesson(root, stem), edition).cells if cell.cell_type == "code"]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    failures, missed, printed = [], [], io.StringIO()
    for i, cell in enumerate(cells):
        file, begun = f"<{stem}, cell {i}>", time.process_time()
        cell = briefly(cell)
        linecache.cache[file] = (len(cell), None, cell.splitlines(keepends=True), file)  # Triton reads the source
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(cell, file, "exec"), namespace)
        except ExpectationError as error:
            missed.append(str(error).partition(":")[0])
        except Exception as error:
            trace = "".join(traceback.format_exception(error)[-8:])
            failures.append(f"cell {i}: {type(error).__name__}: {error}\n{trace}")
        if (seconds := time.process_time() - begun) > 1:
            print(f"{file}: {seconds:.1f} s", file=sys.stderr)
    failures += [line for line in printed.getvalue().splitlines() if line.startswith("✗")]  # answers to exercises
    seconds = time.process_time() - started
    return {"lesson": stem, "device": str(namespace["session"].device), "failures": failures, "missed": missed,
            "seconds": seconds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mac", action="store_true", help="a device without float64")
    parser.add_argument("--cpu", action="store_true", help="no device: what does the cut alone do?")
    parser.add_argument("--student", action="store_true", help="the edition with the blanks")
    parser.add_argument("lessons", nargs="+")
    options = parser.parse_args()
    if not options.cpu:
        pretend_device.install(float64=not options.mac)
    cut_short()
    for stem in options.lessons:
        print(json.dumps(rehearse(stem, "student" if options.student else "solved")), flush=True)


if __name__ == "__main__":
    main()
