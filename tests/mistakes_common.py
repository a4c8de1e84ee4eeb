"""What the files of answers, mistakes_<topic>.py, share: three lists, and the decorators that fill them."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Answers(NamedTuple):
    """The lists that ``test_course.py`` reads, and a decorator for each; all decorators return the answer as it is."""

    VARIANTS: list[tuple[str, str, Callable]]
    UNKNOWN: list[tuple[str, Callable]]
    RIGHT: list[tuple[str, Callable]]
    variant: Callable[[str, str], Any]
    unknown: Callable[[str], Any]
    right: Callable[[str], Any]


def collect() -> Answers:
    """New, empty lists: ``VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect()``."""
    variants, unknown, right = [], [], []

    def into(entries: list, *names: str) -> Callable:
        return lambda answer: entries.append((*names, answer)) or answer

    return Answers(
        variants,
        unknown,
        right,
        lambda name, key: into(variants, name, key),
        lambda name: into(unknown, name),
        lambda name: into(right, name),
    )
