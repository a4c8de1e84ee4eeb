"""Answers to the exercises, as learners write them: the proof that the checks diagnose rightly.

A folder a lesson, a file an exercise: ``mistakes/vit/block.py`` proves ``vitcourse/course/checks/vit/block.py``. The
answers do not know the catalogue there: they reach the same numbers by other means. Each file has three lists of them.

* ``VARIANTS`` make a catalogued mistake, and have to be told that mistake.
* ``UNKNOWN`` are wrong in another way, and have to be rejected without a diagnosis.
* ``RIGHT`` are right, and have to be accepted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Answers(NamedTuple):
    """The lists that ``test_course.py`` reads, and a decorator for each; all decorators return the answer as it is."""

    VARIANTS: list[tuple[str, str, Callable]]
    UNKNOWN: list[tuple[str, Callable]]
    RIGHT: list[tuple[str, Callable]]
    variant: Callable[[str], Any]
    unknown: Callable[[Callable], Any]
    right: Callable[[Callable], Any]


def collect(exercise: str) -> Answers:
    """New, empty lists: ``VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("vit.Block")``.

    Then ``@variant("post-norm")``, ``@unknown`` and ``@right`` stand above the answers, with the key of the mistake.
    """
    variants, unknown, right = [], [], []

    def into(entries: list, *names: str) -> Callable:
        return lambda answer: entries.append((exercise, *names, answer)) or answer

    return Answers(variants, unknown, right, lambda key: into(variants, key), into(unknown), into(right))
