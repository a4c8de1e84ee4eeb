"""The machinery of the lessons: exercises with checks, claims that must hold, progress, and the notebook builder.

A lesson needs these names::

    from vitcourse import course
    from vitcourse.course import TODO, exercise, expect, hint, last_attempt

    session = course.setup()
"""

from .exercises import exercise, hint, last_attempt
from .expectations import ExpectationError, expect
from .grading import TODO
from .session import Session, setup

__all__ = ["TODO", "ExpectationError", "Session", "exercise", "expect", "hint", "last_attempt", "setup"]
