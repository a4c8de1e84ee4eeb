"""Are the cases of a check good ones? Rules that `tests/test_course_cases.py` holds every exercise to.

The probes count as cases. What cannot apply to an exercise, its check exempts by the name of the rule, with a reason.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from .cases import Case
from .probes import KINDS
from .running import leaves, named_inputs
from .trial import Trial


def _all_cases(trial: Trial) -> list[Case]:
    declared = [case for case in trial.cases if isinstance(case, Case)]
    return declared + [probe.case for series in trial.series for probe in series.probes]


def _shapes(case: Case) -> list[tuple[int, ...]]:
    tree = [*case.args, *case.kwargs.values()]
    return [tuple(leaf.shape) for _, leaf in leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim > 1]


def _numbers(trial: Trial) -> dict[str, list[tuple[int, ...]]]:
    """What whole numbers each argument has, of the constructor and of the call, over all cases."""
    found: dict[str, list[tuple[int, ...]]] = {}
    signature_of = getattr(trial.spec.runner, "signature_of", trial.reference)
    for case in _all_cases(trial):
        given = named_inputs(signature_of, case)
        if case.init is not None:
            args, kwargs = case.init
            given |= inspect.signature(trial.reference).bind(*args, **kwargs).arguments
        for name, value in given.items():
            if numbers := _whole(value):
                found.setdefault(name, []).append(numbers)
    return found


def _whole(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, tuple) else (value,)
    return values if all(type(n) is int for n in values) else ()


def _distinct(trial: Trial) -> Iterator[str]:
    shapes = [_shapes(case) for case in trial.cases if isinstance(case, Case)]
    if any(shapes) and not any(all(len(set(shape)) == len(shape) for shape in one) for one in shapes if one):
        yield "no case whose tensors have axes of different sizes only: an exchange of two would pass"


_HALVED = re.compile(r"size|grid|depth|block|^[hw]$")  # arguments that somebody may halve, or divide and round


def _odd(trial: Trial) -> Iterator[str]:
    for name, values in _numbers(trial).items():
        if _HALVED.search(name) and not any(n % 2 and n > 1 for numbers in values for n in numbers):
            yield f"`{name}` is never odd, {sorted(set(values))}: what is halved, or rounded, goes unseen"


def _deep(trial: Trial) -> Iterator[str]:
    for name, values in _numbers(trial).items():
        if name.startswith("depth") and max(max(numbers) for numbers in values) < 3:
            yield f"`{name}` is never 3 or more, {sorted(set(values))}: blocks that are shared, or skipped, go unseen"


def _not_square(trial: Trial) -> Iterator[str]:
    for name, values in _numbers(trial).items():
        pairs = [numbers for numbers in values if len(numbers) > 1]
        if pairs and not any(numbers[0] != numbers[1] for numbers in pairs):
            yield f"`{name}` is always square, {sorted(set(pairs))}: rows taken for columns go unseen"
    images = [shape for case in _all_cases(trial) for shape in _shapes(case) if len(shape) == 4]
    if images and not any(h != w for *_, h, w in images):
        yield "all images are square: rows taken for columns go unseen"


WANTED = {"batch", "single", "larger", "smaller", "large", "tiny"}  # of the kinds of probes


def _sizes(trial: Trial) -> Iterator[str]:
    if not any(map(_shapes, _all_cases(trial))):
        return
    ran = {kind for series in trial.series for probe in series.probes for kind in probe.kinds}
    if any(shape[0] == 1 for case in _all_cases(trial) for shape in _shapes(case)[:1]):
        ran.add("single")
    for kind in sorted(WANTED):
        if kind not in ran | trial.spec.exempt.keys():
            yield f"no case {KINDS[kind]}: the reference refuses what is derived; declare one, or exempt {kind!r}"


RULES: dict[str, Callable[[Trial], Iterator[str]]] = {
    "distinct": _distinct,
    "odd": _odd,
    "deep": _deep,
    "square": _not_square,
    "sizes": _sizes,
}


def flaws(trial: Trial) -> list[str]:
    """What the cases of a check leave unseen, but for the rules that it exempts."""
    return [flaw for name in RULES if name not in trial.spec.exempt for flaw in flaws_of(trial, name)]


def flaws_of(trial: Trial, rule: str) -> list[str]:
    """What one of the rules finds."""
    return list(RULES[rule](trial))
