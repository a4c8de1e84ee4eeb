"""What a learner meets: `exercise` over a blank, `last_attempt` and `hint` after a ✗."""

from collections.abc import Callable
from typing import Any, TypeVar

from . import checks, progress
from .grading import Attempt, Check, Verdict, grade

Answer = TypeVar("Answer", bound=Callable)

_attempts: dict[str, Attempt] = {}  # the last one of each exercise, in the order in which they were made
_hints: dict[str, tuple[str, ...]] = {}  # all steps of each exercise that was met
_shown: dict[str, int] = {}  # how many of them have been shown


def exercise(name: str, hint: str | None = None) -> Callable[[Answer], Answer]:
    """Grade the function or class below, print one line, and hand on the answer, or the library's part if it is wrong.

    The line is ``✓ name``, ``✗ name: what differs — why, or a hint``, or ``○ name: not attempted yet, …`` while the
    blank still says ``raise TODO``. Nothing is raised, so that a notebook always runs to its end.

    Args:
        name: ``"<topic>.<name>"``, as registered in `vitcourse.course.checks`.
        hint: shown beside a ✗ whose cause is not recognised; the first step of `hint`.

    Raises:
        ValueError: there is no such exercise, or the function below is not called so.
    """
    spec = checks.find(name)
    _hints[spec.name] = ((hint,) if hint else ()) + spec.hints

    def decorate(answer: Answer) -> Answer:
        if answer.__name__ != spec.short_name:
            raise ValueError(f"this exercise is called {spec.short_name}, not {answer.__name__}; please keep the name")
        verdict = grade(spec, answer)
        _attempts.pop(spec.name, None)
        _attempts[spec.name] = verdict.attempt
        print(_line(spec, verdict))
        if verdict.status != "blank":
            progress.record(spec.name, verdict.status)
        return answer if verdict.status == "right" else spec.reference

    return decorate


def _line(spec: Check, verdict: Verdict) -> str:
    if verdict.status == "right":
        return f"✓ {spec.short_name}"
    if verdict.status == "blank":
        return f"○ {spec.short_name}: not attempted yet, the course uses its own"
    line = f"✗ {spec.short_name}: {verdict.text}"
    if verdict.mistake:
        return f"{line} — {verdict.mistake.message}"
    if not _hints[spec.name]:
        return line
    _shown[spec.name] = max(_shown.get(spec.name, 0), 1)
    return f"{line} — hint: {_hints[spec.name][0]}"


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
    steps = _hints.get(spec.name, spec.hints)
    shown = _shown.get(spec.name, 0)
    if shown < len(steps):
        _shown[spec.name] = shown + 1
        print(f"{spec.short_name}, hint {shown + 1} of {len(steps)}: {steps[shown]}")
    else:
        print(f"{spec.short_name}: no more hints; read {spec.reference_path}, close it, and write it again")


def _find(name: str) -> Any:
    """A short name means the exercise of this notebook, if two lessons have one of that name."""
    met = [full for full in _hints if full.partition(".")[2] == name]
    return checks.find(met[-1] if met else name)
