"""``vitcourse predict``: what a weights file sees in pictures, as a table, as JSON, as a contact sheet."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable
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
    model, task = open_weights(options.weights, options.device)
    options.batch_size = options.batch_size or task.BATCH_SIZE
    files = _files(options.files, *task.WANTED)
    records = task.predict(model, files, options)
    failed = [record for record in records if "error" in record]
    for record in failed:
        print(f"error: {record['error']}", file=sys.stderr)
    told = [{key: value for key, value in record.items() if not key.startswith("_")} for record in records]
    text = json.dumps(told, indent=2, ensure_ascii=False) + "\n" if form == "json" else _table(task, told)
    if options.out:
        Path(options.out).write_text(text, encoding="utf-8", newline="")
    else:
        print(text, end="")
    whole = [record for record in records if "error" not in record]
    if options.sheet and whole:
        task.sheet(whole).savefig(options.sheet)
    return 1 if failed else 0


def _files(names: list[str], what: str, is_wanted: Callable[[str], bool]) -> list[Path]:
    """The files, and in place of a folder the pictures, or videos, in it, by name.

    Raises:
        ValueError: a folder without any.
    """
    found: list[Path] = []
    for path in map(Path, names):
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if is_wanted(p.name))
        if not inside:
            raise ValueError(f"folder {path} has no {what} in it; give files, or a folder that has")
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
        description="Say what a weights file sees in pictures, prepared as those were that it was trained on: classes "
        "of pictures or of videos; objects, with boxes in pixels of the picture, turned upright as its EXIF says; the "
        "share of each class of pixels. A file that cannot be read is named, and the others go on.",
        allow_abbrev=False,
    )
    add_weights(parser)
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="a picture, or a folder with pictures right in it; videos of clips' models",
    )
    parser.add_argument("--top", type=positive, default=5, help="classes per picture, likeliest first (%(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=0.3, help="objects are told whose score is at least this (%(default)s)"
    )
    parser.add_argument("--clips", type=positive, default=1, help="clips of each video, averaged (%(default)s)")
    parser.add_argument(
        "--fps", type=float, help="frames a second of a clip; as the weights were trained, or those of the file"
    )
    parser.add_argument(
        "--out-dir",
        metavar="FOLDER",
        help="draw boxes and masks into pictures there, NAME_found.png, and write masks of classes, NAME_mask.png",
    )
    parser.add_argument("--format", choices=("csv", "json"), help="by default what --out ends in, or else csv")
    parser.add_argument("--out", metavar="FILE", help="write there instead of to stdout, a .csv or .json")
    parser.add_argument("--sheet", metavar="FILE", help="draw a contact sheet there, a .png, .pdf or .svg")
    add_running(parser)
    return parser
