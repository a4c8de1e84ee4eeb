"""What a learner has solved, kept in one JSON file of theirs.

The file lies where the system keeps such state; the environment variable VITCOURSE_PROGRESS names another place, or
``off`` to keep nothing, which tests and the notebook builder do.
"""

import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from . import checks

MARKS = {"right": "✓", "wrong": "✗", None: "○"}


def path() -> Path | None:
    """Where progress is kept; None if it is not.

    Raises:
        OSError: nobody knows where the user's home folder is, as in a container with a user of no name.
    """
    chosen = os.environ.get("VITCOURSE_PROGRESS")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        state = Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        state = _home() / "Library" / "Application Support"
    else:
        state = Path(os.environ.get("XDG_STATE_HOME") or _home() / ".local" / "state")
    return state / "vitcourse" / "progress.json"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise OSError("there is no home folder") from error


def load() -> dict[str, dict]:
    """Exercise name to ``{"status", "attempts", "updated"}``. A damaged file is set aside, with a notice."""
    file = path()
    if file is None or not file.exists():
        return {}
    try:
        exercises = json.loads(file.read_text(encoding="utf-8"))["exercises"]
        if not all(entry["status"] in ("right", "wrong") and entry["attempts"] > 0 for entry in exercises.values()):
            raise ValueError("an entry has an unknown status")
        return exercises
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = _free_name(file)
        os.replace(file, aside)
        print(f"vitcourse: {file} cannot be read ({error}); kept as {aside.name}, starting anew", file=sys.stderr)
        return {}


def _free_name(file: Path) -> Path:
    names = (file.with_name(f"{file.stem}.damaged{i or ''}{file.suffix}") for i in range(10_000))
    return next(name for name in names if not name.exists())


def record(name: str, status: Literal["right", "wrong"]) -> None:
    """Note an attempt. What was right once stays so; a place that cannot be written to is a notice, not an error."""
    try:
        file = path()
        if file is None:
            return
        exercises = load()
        before = exercises.get(name, {"status": status, "attempts": 0})
        exercises[name] = {
            "status": "right" if "right" in (status, before["status"]) else "wrong",
            "attempts": before["attempts"] + 1,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _write(file, {"version": 1, "exercises": exercises})
    except OSError as error:
        print(f"vitcourse: progress is not kept ({error}); set VITCOURSE_PROGRESS to another file", file=sys.stderr)


def _write(file: Path, content: dict) -> None:
    """Replace the file in one step, so that a crash leaves the old or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1, sort_keys=True)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def table(topics: list[str] | None = None) -> str:
    """Progress over the whole course, or some lessons of it, as text."""
    done, lines, total = load(), [], []
    for number, topic in enumerate(checks.TOPICS):
        specs = [spec for spec in checks.load_all().values() if spec.topic == topic]
        if not specs or (topics and topic not in topics):
            continue
        marks = [MARKS[done.get(spec.name, {}).get("status")] for spec in specs]
        total += marks
        left = sum(spec.minutes for spec, mark in zip(specs, marks, strict=True) if mark != "✓")
        remaining = f", about {left} min left" if left else ""
        lines.append(f"{number:02d} {topic}: {marks.count('✓')} of {len(specs)}{remaining}")
        for spec, mark in zip(specs, marks, strict=True):
            tries = done.get(spec.name, {}).get("attempts", 0)
            level = "●" * spec.level + "·" * (5 - spec.level)
            lines.append(f"   {mark} {spec.short_name:<28} {level}  {spec.minutes:>3} min  {tries or '–':>3} tries")
    lines.append(f"{total.count('✓')} of {len(total)} exercises solved")
    return "\n".join(lines)
