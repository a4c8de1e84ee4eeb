"""What a learner meets: `exercise` over a blank, `last_attempt` and `hint` after a ✗."""

import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

from . import checks, progress
from .answers import blanks_in
from .catalogue import Check
from .grading import Verdict, grade
from .trial import Attempt

Answer = TypeVar("Answer", bound=Callable)

_attempts: dict[str, Attempt] = {}  # the last one of each exercise, in the order in which they were made
_met: list[str] = []  # the exercises of this notebook
_shown: dict[str, int] = {}  # how many hints of each have been shown
WIDTH = 100  # of lines, in columns


def exercise(name: str) -> Callable[[Answer], Answer]:
    """Grade the function or class below, print one line, and hand on the answer, or the library's part if it is wrong.

    The line is ``✓ name``, ``✗ name: what differs — why, or a hint``, or ``○ name: not attempted yet, …`` while a
    blank still says ``raise TODO``. Nothing is raised, so that a notebook always runs to its end. The hint is the first
    that `hint` has, where nothing better is known. After a ✗ a second line says where the answer is.

    Args:
        name: ``"<topic>.<name>"``, as registered in `vitcourse.course.checks`.

    Raises:
        ValueError: there is no such exercise, or the function below is not called so.
    """
    spec = checks.find(name)
    _met.append(spec.name)

    def decorate(answer: Answer) -> Answer:
        if answer.__name__ != spec.short_name:
            raise ValueError(f"this exercise is called {spec.short_name}, not {answer.__name__}; please keep the name")
        verdict = grade(spec, answer)
        _attempts.pop(spec.name, None)
        _attempts[spec.name] = verdict.attempt
        print(_told(spec, verdict))
        if verdict.status != "blank":
            progress.record(spec.name, verdict.status)
        return answer if verdict.status == "right" else spec.reference

    return decorate


def _told(spec: Check, verdict: Verdict) -> str:
    """All that is printed, in lines that are wrapped at words."""
    lines = [_line(spec, verdict)]
    if verdict.status == "wrong":
        lines.append(f'  The course goes on with its own; yours is last_attempt("{spec.short_name}").function.')
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def _line(spec: Check, verdict: Verdict) -> str:
    if verdict.status == "right":
        return f"✓ {spec.short_name}"
    if verdict.status == "blank":
        left = blanks_in(verdict.attempt.function)
        if 0 < len(left) < spec.blanks:
            return f"○ {spec.short_name}: `{left[0]}` still has a blank, the course uses its own"
        return f"○ {spec.short_name}: not attempted yet, the course uses its own"
    line = f"✗ {spec.short_name}: {verdict.text}"
    if verdict.mistake:
        return f"{line} — {verdict.mistake.message}"
    if skipped := _not_run(spec, verdict.attempt):
        return f"{line} — {skipped} is another exercise of this lesson: run its cell first"
    if verdict.telling or not spec.hints:
        return line
    _shown[spec.name] = max(_shown.get(spec.name, 0), 1)
    return f"{line} — hint: {spec.hints[0]}"


def _not_run(spec: Check, attempt: Attempt) -> str:
    """The exercise of the same lesson that an answer calls, if the notebook has not met it yet; else ""."""
    missing = attempt.error.name if isinstance(attempt.error, NameError) else ""
    full = f"{spec.topic}.{missing}"
    return missing if full in checks.CHECKS and full not in _met else ""


def last_attempt(name: str | None = None) -> Attempt:
    """Your last answer to an exercise: its ``.function``, ``.inputs``, ``.output``, ``.expected`` and ``.error``.

    ``.traceback`` is the error's as text, ``.replay()`` calls the answer again with errors let through, ``.seed`` is
    where the inputs came from. Without a name: the exercise that was run last.

    Raises:
        LookupError: nothing has been attempted yet.
    """
    if not _attempts:
        raise LookupError("no exercise has been run yet; run the cell of one first")
    if name is None:
        return next(reversed(_attempts.values()))
    spec = _find(name)
    if spec.name not in _attempts:
        raise LookupError(f"{spec.name} has not been run yet; run its cell first")
    return _attempts[spec.name]


def hint(name: str | None = None) -> None:
    """Print the next hint for an exercise; without a name, for the one that was run last."""
    spec = _find(name or last_attempt().name)
    shown = _shown.get(spec.name, 0)
    if shown < len(spec.hints):
        _shown[spec.name] = shown + 1
        told = f"{spec.short_name}, hint {shown + 1} of {len(spec.hints)}: {spec.hints[shown]}"
    else:
        told = f"{spec.short_name}: no more hints; read {spec.reference_path}, close it, and write it again"
    print(textwrap.fill(told, WIDTH, subsequent_indent="  ", break_on_hyphens=False))


def _find(name: str) -> Any:
    """A short name means the exercise of this notebook, if two lessons have one of that name."""
    met = [full for full in _met if full.partition(".")[2] == name]
    return checks.find(met[-1] if met else name)
