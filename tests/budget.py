"""What tests and lessons cost: measured in CPU seconds, kept in ``budget.json``, held against what they may cost.

    python -m tests.budget                                      everything: about half an hour
    python -m tests.budget hardware solutions/00_vit.ipynb      some accounts
    python -m tests.budget --missing                            those with files that have no entry
    python -m tests.budget --show                               the accounts; measures nothing

The files of an account run in one process, as those of a worker do: on one thread, with nothing compiled beforehand.
The CPU seconds of a file are also those of the processes that it waits for; what two files import is charged to the
first, and what is no file's, Python's start and workers that live on, to ``start and end``. Lessons run from their
source, as the builder runs them, without AVX-512, which most laptops lack. ``test_budget.py`` reads the file, and
measures nothing.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import device_name, versions
from tests.stems import ROOT, files_of_tests, notebooks
from tests.thorough import MACHINES
from vitcourse.course.checks import TOPICS

FILE = Path(__file__).with_suffix(".json")
LESSONS = 13  # when the course is complete
# CPU seconds. A direction and two notebooks a lesson and the rest: 87 core-minutes, of 45 minutes on two cores.
DIRECTION, NOTEBOOK, SHARED, INSTALLATION, SITE = 102, 90, 840, 480, 180
WHOLE = 45 * 2 * 60
MORE = {"hardware": 28}  # kernels are interpreted there, and compiled for chips that are not here


class Account(NamedTuple):
    name: str
    allowed: int
    files: tuple[str, ...]

    @property
    def entries(self) -> tuple[str, ...]:
        """Its lines in the budget."""
        return self.files if self.files == (self.name,) else (*self.files, f"{self.name}: start and end")


def direction_of(file: str) -> str | None:
    """The direction that a test file belongs to: its own, or that of the module that it is called after.

    >>> [direction_of(f"tests/test_{name}.py") for name in ("vit", "quantize_kernels", "dense_detr", "cli")]
    ['vit', 'hardware', 'dense_prediction', None]
    """
    stem = Path(file).stem.removeprefix("test_")
    for topic in TOPICS:
        parts = {path.stem for path in (ROOT / "vitcourse" / topic).glob("[a-z]*") if path.suffix in ("", ".py")}
        shared = {path.stem for path in (ROOT / "vitcourse").glob("[a-z]*")}
        names = {topic, topic.partition("_")[0], *parts - shared}  # dense_detr is of dense_prediction
        if any(stem == name or stem.startswith(f"{name}_") for name in names):
            return topic
    return None


def accounts() -> list[Account]:
    """Who may spend how much on what."""
    of = {file: direction_of(file) for file in files_of_tests()}
    topics = [topic for topic in TOPICS if topic in of.values()]
    return [
        *(
            Account(topic, DIRECTION + MORE.get(topic, 0), tuple(file for file in of if of[file] == topic))
            for topic in topics
        ),
        Account("shared", SHARED, tuple(file for file in of if of[file] is None)),
        *(Account(name, NOTEBOOK, (name,)) for name in notebooks()),
    ]


def read() -> dict[str, float]:
    """Measured CPU seconds, by test file and by notebook."""
    return json.loads(FILE.read_text(encoding="utf-8"))["seconds"] if FILE.exists() else {}


def problems(seconds: dict[str, float]) -> list[str]:
    """What is wrong with a budget: entries that are missing or of no file, accounts that are overdrawn."""
    found = []
    for account in accounts():
        missing = [entry for entry in account.entries if entry not in seconds]
        found += [f"{entry} has no entry: python -m tests.budget {account.name}" for entry in missing]
        spent = sum(seconds.get(entry, 0) for entry in account.entries)
        if spent > account.allowed:
            found.append(f"{account.name}: {spent:.1f} CPU seconds, allowed are {account.allowed}")
    gone = seconds.keys() - {entry for account in accounts() for entry in account.entries}
    return found + [f"{entry} is no test file or notebook: drop it" for entry in sorted(gone)]


def run(*files: str, plugin: str | None = None, **options: Any) -> subprocess.CompletedProcess:
    """Run test files, or a notebook, in a process, on one thread; `options` are those of `subprocess.run`."""
    environment = os.environ | MACHINES["one thread"] | options.pop("env", {})
    if files[0].endswith(".ipynb"):
        environment |= MACHINES["avx2"]
        command = ["-c", f"from tests.budget import run_lesson; run_lesson({files[0]!r})"]
    else:
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(["-p", plugin] if plugin else []), *files]
    # As on most machines, bytecode is kept: else every pytest rewrites the assertions of its plugins anew.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = os.path.join(tempfile.gettempdir(), "vitcourse-bytecode")
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, **options)


def measure(account: Account) -> dict[str, float]:
    """CPU seconds of an account, by entry.

    Raises:
        RuntimeError: something fails, so that nobody knows what it would have cost.
    """
    import resource  # not on Windows

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "seconds.json"
        if run(*account.files, plugin="tests._cpu", env={"VITCOURSE_CPU": str(report)}).returncode:
            raise RuntimeError(f"{account.name} fails: measure it when it passes")
        found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {file: found.get(file, 0.0) for file in account.entries[:-1]}
    found[account.entries[-1]] = spent - sum(found.values())
    return {entry: round(value, 1) for entry, value in found.items()}


def run_lesson(entry: str) -> None:
    """Execute an edition of a lesson as its source says, and keep nothing."""
    from vitcourse.course.builder import execute
    from vitcourse.course.lessons import EDITIONS, Lesson, render

    folder, stem = Path(entry).parent.name, Path(entry).stem
    (edition,) = [edition for edition, name in EDITIONS.items() if name == folder]
    execute(render(Lesson(ROOT, stem), edition), ROOT / folder, 600)


def write(seconds: dict[str, float]) -> None:
    record = {"device": device_name("cpu"), "versions": versions(), "date": datetime.date.today().isoformat()}
    record["seconds"] = dict(sorted(seconds.items()))
    FILE.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(seconds: dict[str, float]) -> Iterator[str]:
    for account in accounts():
        spent = sum(seconds.get(entry, 0) for entry in account.entries)
        yield f"{account.name:<42}{spent:7.1f} of {account.allowed:4d} CPU s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {account.name: account for account in accounts()}
    parser.add_argument("accounts", nargs="*", metavar="ACCOUNT", help=f"some of {', '.join(known)}; without any, all")
    parser.add_argument("--missing", action="store_true", help="those with files that have no entry")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if unknown := [name for name in options.accounts if name not in known]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    entries = {entry for account in known.values() for entry in account.entries}
    chosen = [known[name] for name in options.accounts] or list(known.values())
    if options.missing:
        chosen = [account for account in chosen if not set(account.entries) <= read().keys()]
    for account in [] if options.show else chosen:
        measured = measure(account)
        write({entry: value for entry, value in read().items() if entry in entries} | measured)
    print(*table(read()), *problems(read()), sep="\n")
    return 1 if problems(read()) else 0


if __name__ == "__main__":
    sys.exit(main())
