"""All that needs a GPU, in stages: the most valuable first, each with a budget, and resumed where it was.

    python -m benchmarks.gpu                                all stages, in their order
    python -m benchmarks.gpu --stages kernels attention     some of them
    python -m benchmarks.gpu --copy-to FOLDER               results are copied there after every step
    python -m benchmarks.gpu --list                         what there is to do, and what it needs

A GPU is often lent for a quarter of an hour. The first three stages take ten minutes together: what has not ended by
then is stopped, with the results that it has. A step that ended by itself, well or not, is not run again on the same
device with the same sources and versions (but for ``--again``); one that was stopped, or never begun, is. Every step
is written down as it ends, in ``benchmarks/results/gpu.json``; what it printed is in ``runs/gpu``.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import default_device, require_kernels, with_earlier, write_results
from vitcourse.paths import results_dir

ROOT = Path(__file__).parents[1]
PRINTED = Path("runs/gpu")
GRACE = 10  # seconds between the request to end and the end
Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One command. It is over when it ends, or when the time of its stage is."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """Steps that share a budget, the most valuable first, and the modules without which none can run."""

    name: str
    seconds: int
    steps: tuple[Step, ...]
    needs: tuple[str, ...] = ()


def module(name: str, *arguments: str) -> Step:
    label = " ".join((name.removeprefix("benchmarks."), *arguments))
    return Step(label, (sys.executable, "-m", name, *arguments))


def pytest(path: str, *arguments: str) -> Step:
    label = " ".join((path, *arguments))
    return Step(label, (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, *arguments))


def notebook(file: Path) -> Step:
    return pytest(file.relative_to(ROOT).as_posix(), "--nbval")


# Lengths of ViTs at 224, 384 and 256 pixels, then of small images and large ones. Each takes about a minute.
LENGTHS = (197, 577, 257, 50, 1025, 785, 65, 129, 273, 4096)
TESTS = ("quantize", "layers", "efficient_attention", "vit", "hierarchical", "hybrid", "registry", "course", "train")
LESSONS = sorted(ROOT.glob("solutions/*.ipynb"), key=lambda file: ("hardware" not in file.stem, file.stem))
NOTEBOOKS = ("nbval", "nbclient", "ipykernel", "jupytext", "timm")
SANITIZE = ("make", "sanitize", f"PYTHON={sys.executable}")


def stages() -> tuple[Stage, ...]:
    """The first three fit into ten minutes."""
    flash = [pytest("tests/gpu/test_flash.py", "-k", f"{which}test_lengths") for which in ("not ", "")]
    kernels = (*flash, *(pytest(f"tests/gpu/test_{name}.py") for name in TESTS))
    attention = (module("benchmarks.attention", "--dims", "64", "--only", str(n)) for n in LENGTHS)
    rest = (
        module("benchmarks.models"),
        module("benchmarks.quantization"),
        Step("sanitize", SANITIZE),
        *(module("benchmarks.attention", "--dims", dim) for dim in ("32", "80", "128")),
        module("benchmarks.attention", "--dims", "32", "--bias"),
        module("benchmarks.scaling", "--device", "cuda"),
        module("benchmarks.tiles"),
        module("benchmarks.importtime"),
        *(notebook(ROOT / "notebooks" / file.name) for file in LESSONS),
        module("benchmarks.tables"),
    )
    return (
        Stage("kernels", 240, kernels, ("pytest", "triton")),
        Stage("attention", 200, tuple(attention), ("triton",)),
        Stage("lessons", 160, tuple(notebook(file) for file in LESSONS), NOTEBOOKS),
        Stage("rest", 1500, rest),
    )


def sources(root: Path = ROOT) -> str:
    """A fingerprint of all that the steps run."""
    digest = hashlib.sha256()
    for folder in ("vitcourse", "tests", "benchmarks", "solutions"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def key(row: Row) -> tuple[str, str]:
    return row["stage"], row["step"]


class Record:
    """The rows of all steps, kept in the results file, and copied to where they survive the machine."""

    def __init__(self, device: str, fingerprint: str, copy_to: Path | None = None) -> None:
        self.device, self.sources, self.copy_to = device, fingerprint, copy_to
        self.rows: list[Row] = [row for row in with_earlier("gpu", [], device, key) if row["sources"] == fingerprint]

    def outcome(self, stage: Stage, step: Step) -> str | None:
        """ "passed", "failed", "stopped" or "missing modules"; None if the step has not begun."""
        found = [row["outcome"] for row in self.rows if key(row) == (stage.name, step.name)]
        return found[-1] if found else None

    def add(self, stage: Stage, step: Step, outcome: str, seconds: float = 0.0, last: str = "") -> None:
        row = {"stage": stage.name, "step": step.name, "outcome": outcome, "seconds": seconds, "last_line": last}
        self.rows = [old for old in self.rows if key(old) != key(row)] + [row | {"sources": self.sources}]
        write_results("gpu", self.rows, self.device)
        if self.copy_to is not None:
            self.copy_to.mkdir(parents=True, exist_ok=True)
            for file in [*results_dir().glob("*.json"), *PRINTED.glob("*.txt")]:
                shutil.copy(file, self.copy_to)


def run_stage(stage: Stage, record: Record, again: bool = False) -> None:
    """Run what has not ended yet, until the budget of the stage is spent."""
    lacking = [name for name in stage.needs if find_spec(name) is None]
    end = time.monotonic() + stage.seconds
    for step in stage.steps:
        before = record.outcome(stage, step)
        if before == "passed" or (before == "failed" and not again):
            print(f"{stage.name}: {step.name}: {before}, before", flush=True)
        elif lacking:
            record.add(stage, step, f"missing {', '.join(lacking)}")
        elif (left := end - time.monotonic()) > 0:
            print(f"{stage.name}: {step.name} …", flush=True)
            outcome, seconds, last = run_step(step, left, PRINTED / f"{stage.name} {step.name}.txt".replace("/", "-"))
            record.add(stage, step, outcome, seconds, last)
            print(f"{stage.name}: {step.name}: {outcome} after {seconds:.0f} s: {last}", flush=True)
        else:
            print(f"{stage.name}: {step.name}: not begun, the {stage.seconds} s are over", flush=True)


def run_step(step: Step, seconds: float, printed: Path) -> tuple[str, float, str]:
    """How the step ended, after how many seconds, and the last line that it printed."""
    printed.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with printed.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            step.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment(), start_new_session=True
        )
        try:
            outcome = "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            outcome = "stopped"
        finally:  # what it started, too
            _end(process)
    lines = printed.read_text(encoding="utf-8", errors="replace").split("\n")
    return outcome, time.monotonic() - start, next((line for line in reversed(lines) if line.strip()), "")


def _environment() -> dict[str, str]:
    """That of this process, in which the steps find the modules of this tree."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _end(process: subprocess.Popen) -> None:
    """Ask, so that pytest counts what it has run, and then insist."""
    for how in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


def show(chosen: list[Stage], record: Record) -> bool:
    """A line a stage; whether all of its steps have passed."""
    good = True
    for stage in chosen:
        outcomes = [record.outcome(stage, step) or "not begun" for step in stage.steps]
        counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
        good &= set(outcomes) <= {"passed"}
        print(f"{stage.name:10s} {stage.seconds:5d} s  " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    return good


def main(argv: list[str] | None = None) -> int:
    everything = {stage.name: stage for stage in stages()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(everything), default=list(everything))
    parser.add_argument("--copy-to", type=Path, metavar="FOLDER", help="where results are copied after every step")
    parser.add_argument("--again", action="store_true", help="run what failed before once more")
    parser.add_argument("--list", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    chosen = [everything[name] for name in options.stages]
    if options.list:
        show(chosen, Record(default_device(), sources(), None))
        needed = sorted({name for stage in chosen for name in stage.needs if find_spec(name) is None})
        print(f"missing here: {', '.join(needed) or 'nothing'}")
        print("to carry along, 20 MB:  pip download --dest wheels nbval nbclient ipykernel jupytext einops")
        print("                        pip download --dest wheels --no-deps timm")
        return 0
    require_kernels(parser)
    record = Record("cuda", sources(), options.copy_to)
    for stage in chosen:
        run_stage(stage, record, options.again)
    return 0 if show(chosen, record) else 1


if __name__ == "__main__":
    sys.exit(main())
