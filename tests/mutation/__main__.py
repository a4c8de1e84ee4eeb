"""Bring the report on the mutation test up to date.

    python -m tests.mutation                              what has changed since the last report
    python -m tests.mutation --only 'hierarchical.*'      of some exercises
    python -m tests.mutation --force --seed 1 --dry       all of it anew, other mutants, without writing it down

The report is written after each exercise: what was stopped goes on where it was. Ends with 1 if too many survive.
"""

import argparse
import fnmatch
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import local

from vitcourse.course import checks
from vitcourse.course.running import run

from . import report
from .answers import solution
from .trials import Worker

ENOUGH_KERNELS = 40  # mutants that count: a verdict on one that is interpreted takes seconds


def examine(name: str, worker: Worker, seed: int, enough: int | None = None) -> dict:
    """The report's entry on one exercise.

    Raises:
        RuntimeError: the reference solution is not what the reference is, or the grader does not take it.
    """
    own, before = solution(name), worker.seconds
    right = worker.verdict(name, None)
    if right.status != "equivalent" or len(right.accepted) != 3:
        raise RuntimeError(f"the solution of {name} itself is no reference: {right}")
    if enough is None:
        enough = sys.maxsize if checks.find(name).runner is run else ENOUGH_KERNELS
    mutants, tally = own.mutants(seed), report.Tally(own)
    for mutant in mutants:
        if tally.counted >= enough:
            break
        tally.add(mutant.operator, mutant.source, worker.verdict(name, mutant.source))
    tally.seconds = worker.seconds - before
    return tally.entry(report.fingerprint(name), len(mutants))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of exercises, such as vit.*")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which mutants are made")
    parser.add_argument("--enough", type=int, help="mutants that count, of each exercise; all, but of a kernel 40")
    parser.add_argument("--force", action="store_true", help="also what is up to date")
    parser.add_argument("--dry", action="store_true", help="leave the report as it is")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()

    os.environ.setdefault("TRITON_INTERPRET", "1")
    entries = report.read()
    names = [name for name in report.exercises() if any(fnmatch.fnmatch(name, p) for p in options.only)]
    names = [n for n in names if options.force or entries.get(n, {}).get("fingerprint") != report.fingerprint(n)]
    workers, failed = local(), False

    def one(name: str) -> tuple[str, dict]:
        if not hasattr(workers, "own"):
            workers.own = Worker()
        return name, examine(name, workers.own, options.seed, options.enough)

    with ThreadPoolExecutor(options.jobs) as pool:
        for future in as_completed([pool.submit(one, name) for name in names]):
            try:
                name, entry = future.result()
            except RuntimeError as error:
                print(error, flush=True)
                failed = True
                continue
            entries[name] = entry
            print(
                *(f"{entry[column]} {column}," for column in report.COLUMNS),
                f"{entry['seconds']} s: {name}",
                flush=True,
            )
            for item in entry["listed"]:
                print(f"    {item['kind']} ({item['operator']}): {item['is']}", flush=True)
                print("        " + item["difference"].replace("\n", "\n        "), flush=True)
            if not options.dry:
                report.write(entries)
    total = report.totals(entries)
    print(f"{total['survived']} of {total['counted']} survive; {total['seconds'] / 60:.1f} core-minutes in all")
    return int(failed or total["survived"] > report.MOST_SURVIVE * total["counted"])


if __name__ == "__main__":
    sys.exit(main())
