"""``vitcourse course``: `start` and `progress` for learners; `build`, `check`, `mistakes` for authors."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.command == "progress":
        from vitcourse.course import progress

        try:
            table = progress.table([_topic(name) for name in args.lessons])
        except OSError as error:
            raise SystemExit(f"{error}; set VITCOURSE_PROGRESS to the file of your progress") from error
        print(table)
        return 0
    try:
        from vitcourse.course import builder, lessons
    except ImportError as error:
        print(f"{error}; install what notebooks need: pip install 'vitcourse[lab]'", file=sys.stderr)
        return 1
    try:
        if args.command == "mistakes":
            print(builder.catalogue(), end="")
            return 0
        if args.command == "start":
            print(*builder.start(args.root, args.folder), sep="\n")
            return 0
        chosen = lessons.find_lessons(args.root, args.lessons)
        if args.command == "build":
            failures = builder.build(chosen, force=args.force, jobs=args.jobs, seconds=args.seconds)
        else:
            failures = builder.check(chosen)
    except lessons.BuildError as error:
        failures = [str(error)]
    print(*failures, sep="\n", end="\n" if failures else "", file=sys.stderr)
    return 1 if failures else 0


def _topic(name: str) -> str:
    """The topic of "00", "vit" or "00_vit"."""
    from vitcourse.course import checks

    for number, topic in enumerate(checks.TOPICS):
        if name in (topic, f"{number:02d}", f"{number:02d}_{topic}"):
            return topic
    raise SystemExit(f"no lesson is called {name!r}; there are {', '.join(checks.TOPICS)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitcourse course", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    root = argparse.ArgumentParser(add_help=False)
    root.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="folder of the course")
    some = argparse.ArgumentParser(add_help=False)
    some.add_argument("lessons", nargs="*", help="such as 00, vit or 00_vit; all, if none is named")

    build = commands.add_parser("build", parents=[some, root], help="make and run the notebooks whose source changed")
    build.add_argument("--force", action="store_true", help="run the others too")
    build.add_argument("--jobs", type=int, default=1, help="lessons at a time (default 1)")
    build.add_argument("--seconds", type=int, default=600, help="time limit of a cell (default 600)")
    commands.add_parser("check", parents=[some, root], help="verify that notebooks are in sync with their source")
    commands.add_parser("progress", parents=[some], help="show what you have solved")
    start = commands.add_parser("start", parents=[root], help="copy notebooks that you do not have yet")
    start.add_argument("folder", nargs="?", type=Path, default=Path("work"), help="where to (default: work)")
    commands.add_parser("mistakes", parents=[root], help="print the table of exercises and mistakes")
    return parser
