"""The exercises' checks, and how one is written down; `vitcourse.course.checks` shows it by an example."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module

from . import probes
from .cases import Case, Property, Random
from .running import Outcome, run


class TODO(Exception):
    """Stands in the blank of an exercise: ``raise TODO``. Nothing else counts as "not attempted"."""


@dataclass(frozen=True)
class Mistake:
    """A plausible wrong answer, and the misconception behind it."""

    key: str
    message: str
    faulty: Callable


@dataclass
class Check:
    """Everything the course knows of one exercise. Made by `check`."""

    name: str
    reference_path: str
    cases: Callable[[Random], Iterable[Case | Property]]
    level: int
    minutes: int
    why: str
    hints: tuple[str, ...]
    tolerance: float | None
    gradients: bool | tuple[str, ...]
    seconds: float
    blanks: int
    exempt: dict[str, str]
    # How one call is made. An exercise that may crash or hang its process brings a runner of its own.
    runner: Callable[..., Outcome]
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def topic(self) -> str:
        """The lesson: ``vit`` of ``vit.image_to_patch``."""
        return self.name.partition(".")[0]

    @property
    def short_name(self) -> str:
        """The name of the function or class that the learner writes."""
        return self.name.partition(".")[2]

    @property
    def reference(self) -> Callable:
        """The library's own part."""
        module, _, attribute = self.reference_path.rpartition(".")
        return getattr(import_module(module), attribute)

    def mistake(self, key: str, message: str, faulty: Callable | None = None) -> Callable:
        """Catalogue a plausible wrong answer; a decorator, or a call with the faulty function or class.

        `message` names the misconception without giving the answer away. A learner reads it when their answer does
        exactly what `faulty` does, on every case. `key` is a short slug by which tests refer to the mistake.
        """
        if faulty is None:
            return lambda faulty: self.mistake(key, message, faulty)
        if any(key == known.key for known in self.mistakes):
            raise ValueError(f"{self.name} already has a mistake {key!r}; choose another key")
        self.mistakes.append(Mistake(key, message, faulty))
        return faulty

    def find_mistake(self, key: str) -> Mistake:
        """The catalogued mistake of that key."""
        for mistake in self.mistakes:
            if mistake.key == key:
                return mistake
        raise ValueError(f"{self.name} has no mistake {key!r}; it has {[mistake.key for mistake in self.mistakes]}")


CHECKS: dict[str, Check] = {}


def check(
    name: str,
    *,
    reference: str,
    level: int,
    minutes: int,
    why: str,
    hints: Sequence[str] = (),
    tolerance: float | None = None,
    gradients: bool | tuple[str, ...] = True,
    seconds: float = 10.0,
    blanks: int = 1,
    exempt: Mapping[str, str] | None = None,
    runner: Callable[..., Outcome] = run,
) -> Callable[[Callable[[Random], Iterable[Case | Property]]], Check]:
    """Register the check of exercise `name` over a generator of cases; see `vitcourse.course.checks` for an example.

    Args:
        name: ``"<topic>.<function or class>"``.
        reference: dotted path of the library's part, imported when it is first needed.
        level: difficulty, 1 to 5.
        minutes: how long it takes, about.
        why: one sentence on why it matters.
        hints: steps, the first the gentlest.
        tolerance: largest error, as a fraction of the largest value expected; None takes one that fits the dtype.
        gradients: compare gradients with regard to inputs and parameters too; or the names of the inputs whose
            gradients count, where others (sizes, masks) are numbers that nobody trains. Set it to False where the
            answer itself differentiates with regard to its inputs.
        seconds: time limit of one call.
        blanks: how many the exercise has, so that one that is left among others can be named.
        exempt: which of `probes.KINDS`, or of `lint.RULES`, do not apply, each with the reason.
        runner: makes one call, with the signature of `running.run`.

    Raises:
        ValueError: the name has no topic, `level` or `minutes` is out of range, or what is exempted has no such name
            or no reason.
    """
    if not re.fullmatch(r"[a-z]\w*\.[A-Za-z]\w*", name):
        raise ValueError(f"exercise name {name!r} should read '<topic>.<function or class>'")
    if not 1 <= level <= 5 or minutes < 1:
        raise ValueError(f"{name}: level {level} should be 1 to 5, and minutes {minutes} at least 1")

    for kind, reason in (exempt or {}).items():
        if kind not in (*probes.KINDS, *probes.RULES):
            raise ValueError(f"{name} exempts {kind!r}, which is none of {', '.join((*probes.KINDS, *probes.RULES))}")
        if not reason.strip():
            raise ValueError(f"{name} exempts {kind!r} without a reason")

    def register(cases: Callable[[Random], Iterable[Case | Property]]) -> Check:
        CHECKS[name] = Check(
            name, reference, cases, level, minutes, why, tuple(hints), tolerance, gradients, seconds, blanks,
            dict(exempt or {}), runner,
        )  # fmt: skip
        return CHECKS[name]

    return register
