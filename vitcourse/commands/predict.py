"""``vitcourse predict``: what a weights file sees in pictures, as a table, as JSON, as a contact sheet."""

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from vitcourse.commands import (
    TaskProgram,
    add_running,
    add_weights,
    check_suffix,
    guarded,
    open_weights,
    positive,
)


def main(argv: list[str] | None = None) -> int:
    """Predict as the arguments say. Returns 0, or 1 after a line on stderr for each thing that is wrong."""
    return guarded(run, argv)


def run(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)
    form = options.format or ("json" if str(options.out).lower().endswith(".json") else "csv")
    check_suffix("--out", options.out, ".csv", ".json")
    check_suffix("--sheet", options.sheet, ".png", ".pdf", ".svg")
    files = _files(options.files)
    model, task = open_weights(options.weights, options.device)
    records = task.predict(model, files, options)
    failed = [record for record in records if "error" in record]
    for record in failed:
        print(f"error: {record['error']}", file=sys.stderr)
    text = json.dumps(records, indent=2, ensure_ascii=False) + "\n" if form == "json" else _table(task, records)
    if options.out:
        Path(options.out).write_text(text, encoding="utf-8", newline="")
    else:
        print(text, end="")
    whole = [record for record in records if "error" not in record]
    if options.sheet and whole:
        task.sheet(whole).savefig(options.sheet)
    return 1 if failed else 0


def _files(names: list[str]) -> list[Path]:
    """The files, and in place of a folder the pictures in it, by name.

    Raises:
        ValueError: a folder without pictures.
    """
    found: list[Path] = []
    for path in map(Path, names):
        if not path.is_dir():
            found.append(path)
            continue
        from vitcourse.data.folders import is_picture

        inside = sorted(p for p in path.iterdir() if is_picture(p.name))
        if not inside:
            raise ValueError(f"folder {path} has no pictures in it; give files, or a folder that has")
        found += inside
    return found


def _table(task: TaskProgram, records: list[dict[str, Any]]) -> str:
    rows = task.rows([record for record in records if "error" not in record])
    text = io.StringIO()
    if rows:
        table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return text.getvalue()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitcourse predict",
        description="Say what a weights file sees in pictures, prepared as those were that it was trained on. A file "
        "that cannot be read is named, and the others go on.",
        allow_abbrev=False,
    )
    add_weights(parser)
    parser.add_argument("files", metavar="FILE", nargs="+", help="a picture, or a folder with pictures right in it")
    parser.add_argument("--top", type=positive, default=5, help="classes per picture, likeliest first (%(default)s)")
    parser.add_argument("--format", choices=("csv", "json"), help="by default what --out ends in, or else csv")
    parser.add_argument("--out", metavar="FILE", help="write there instead of to stdout, a .csv or .json")
    parser.add_argument("--sheet", metavar="FILE", help="draw a contact sheet there, a .png, .pdf or .svg")
    add_running(parser, batch_size=64)
    return parser
