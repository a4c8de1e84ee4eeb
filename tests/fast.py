"""On the way: run what the changes concern, in three minutes on two cores.

    make test-fast
    python -m tests.fast --since HEAD~3

Lint, then the test files and lessons (solved, from their source) whose files differ from those of the branch `main`, or
on `main` itself from the last commit (``tests/stems.py`` says which file is whose). The nearest come first: tests of
the same name, lessons, then the cheapest, by what they cost in ``budget.json``; what does not fit is named, and left to
``make test``.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import budget
from tests.stems import DOCTESTS, ROOT, files_of_tests, notebooks, sources

SECONDS = 300  # of CPU: three minutes on two cores, less what is lost at the end, when one of them waits
UNMEASURED = 20.0  # what a file without an entry may cost


def git(*arguments: str) -> list[str]:
    """The lines that git prints.

    Raises:
        ValueError: it fails; what it says.
    """
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return done.stdout.splitlines()


def changed(since: str | None = None) -> set[str]:
    """Files that differ from a commit, also those that git does not know yet."""
    if since is None:
        on_main = git("rev-parse", "--abbrev-ref", "HEAD") == ["main"]
        (since,) = ["HEAD"] if on_main else git("merge-base", "HEAD", "main")
    return {*git("diff", "--name-only", since), *git("ls-files", "--others", "--exclude-standard")}


def concerned(files: set[str], seconds: dict[str, float]) -> list[str]:
    """The entries that the changes of `files` concern, the nearest first."""
    stems = {part.removesuffix(".py").removeprefix("test_") for file in files for part in Path(file).parts}
    entries = [*files_of_tests(), *(entry for entry in notebooks() if entry.startswith("solutions/"))]
    found = [entry for entry in entries if sources(entry) & files]

    def distance(entry: str) -> tuple[int, float]:
        if entry == DOCTESTS:
            return 3, 0
        near = entry in files or Path(entry).stem.removeprefix("test_") in stems
        return 0 if near else 1 if entry.endswith(".ipynb") else 2, seconds.get(entry, UNMEASURED)

    return sorted(found, key=distance)


def fitting(entries: Iterable[str], seconds: dict[str, float]) -> tuple[list[str], list[str]]:
    """What of it can be run in time, and what is left; the first one always can."""
    taken: list[str] = []
    left: list[str] = []
    spent = 0.0
    for entry in entries:
        cost = seconds.get(entry, UNMEASURED)
        fits = not taken or spent + cost <= SECONDS
        (taken if fits else left).append(entry)
        spent += cost * fits
    return taken, left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", metavar="COMMIT", help="take what differs from this commit")
    try:
        files, seconds = changed(parser.parse_args().since), budget.read()
    except ValueError as error:
        parser.error(f"{error}; say with --since what to compare with")
    taken, left = fitting(concerned(files, seconds), seconds)
    failed = [" ".join(["ruff", *name]) for name in (["check"], ["format", "--check"]) if _ruff(*name)]
    taken.sort(key=lambda entry: -seconds.get(entry, UNMEASURED))  # the longest first: so both cores end together
    with ThreadPoolExecutor(2) as pool:
        for entry, done in zip(taken, pool.map(_quietly, taken), strict=True):
            print(f"{'failed' if done.returncode else 'passed'}  {entry}", flush=True)
            if done.returncode:
                failed.append(entry)
                print(done.stdout)
    print(f"{len(files)} files changed, {len(taken)} of {len(taken) + len(left)} test files and lessons run")
    if left:
        print(f"left to make test: {', '.join(left)}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _ruff(*command: str) -> int:
    return subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT).returncode


def _quietly(entry: str) -> subprocess.CompletedProcess:
    return budget.run(entry, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


if __name__ == "__main__":
    sys.exit(main())
