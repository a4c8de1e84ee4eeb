"""The machinery of the lessons: exercises with checks, claims that must hold, progress, and the notebook builder.

A lesson needs these names::

    from vitcourse import course
    from vitcourse.course import TODO, exercise, expect, hint, last_attempt

    session = course.setup()
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "TODO": "catalogue",
    "ExpectationError": "expectations",
    "Session": "session",
    "exercise": "exercises",
    "expect": "expectations",
    "hint": "exercises",
    "last_attempt": "exercises",
    "setup": "session",
}
__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    """Import the names on first use: the process that interprets kernels does without PyTorch."""
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
