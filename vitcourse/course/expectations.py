"""`expect`: a claim of a lesson that must hold on every machine.

With VITCOURSE_STRICT=1, which the builder and the tests set, a claim that does not hold raises: in a cell whose output
nobody compares it is seen, too. Without it, in a learner's notebook, it prints ``✗`` and the lesson goes on.

What is measured varies from machine to machine. It stands in parentheses, and `MEASURED` matches it: whoever compares
outputs leaves it out.
"""

import math
import os
from numbers import Integral
from typing import Any

import torch

STRICT = "VITCOURSE_STRICT"
MEASURED = r" \(measured [^()\n]*\)"
_UNSET = object()


class ExpectationError(AssertionError):
    """A measured value is not what the lesson claims."""


def expect(
    label: str,
    value: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    equals: Any = _UNSET,
    close_to: float | None = None,
    tol: float | None = None,
) -> None:
    """Print ``✓ label ≥ bound (measured value)``, or ``✗`` if it is not so. A value that must be exact is the bound.

    >>> expect("accuracy", 0.84321, at_least=0.81)
    ✓ accuracy ≥ 0.81 (measured 0.8432)
    >>> expect("parameters", 86_567_656, equals=86_567_656)
    ✓ parameters = 86567656
    >>> expect("loss at the start", 2.31, close_to=2.30, tol=0.05)
    ✓ loss at the start = 2.3 ± 0.05 (measured 2.31)

    Raises:
        ExpectationError: under VITCOURSE_STRICT=1, the value is out of bounds, or NaN; the message has the value.
        ValueError: no bound is given, or `close_to` without `tol`: such a check could not fail, or not be read.
    """
    if at_least is None and at_most is None and equals is _UNSET and close_to is None:
        raise ValueError(f"expect({label!r}) has no bound and cannot fail; give at_least, at_most, equals or close_to")
    if (close_to is None) != (tol is None):
        raise ValueError(f"expect({label!r}): close_to and tol belong together, got {close_to} and {tol}")
    for name, bound in (("at_least", at_least), ("at_most", at_most), ("close_to", close_to), ("tol", tol)):
        if bound is not None and math.isnan(bound):
            raise ValueError(f"expect({label!r}): {name} is NaN")

    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    claims = []
    if at_least is not None:
        claims.append((f"≥ {at_least}", lambda: value >= at_least))
    if at_most is not None:
        claims.append((f"≤ {at_most}", lambda: value <= at_most))
    if close_to is not None:
        claims.append((f"= {close_to} ± {tol}", lambda: abs(value - close_to) <= tol))
    if equals is not _UNSET:
        claims.append((f"= {equals}", lambda: _equal(value, equals)))
    text = " and ".join(claim for claim, _ in claims)
    if all(bool(holds()) for _, holds in claims):
        print(f"✓ {label} {text}" + (f" (measured {_short(value)})" if equals is _UNSET else ""))
        return
    told = f"{label}: measured {value}, expected {text}"
    if os.environ.get(STRICT) == "1":
        raise ExpectationError(told)
    print(f"✗ {told}. The lesson goes on; what it says next may not hold here")


def _short(value: Any) -> str:
    """Four digits of what is no whole number: as much as a reader compares.

    >>> _short(0.000123456), _short(8), _short(1.0)
    ('0.0001235', '8', '1')
    """
    return str(int(value)) if isinstance(value, Integral) else f"{value:.4g}"


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(expected, torch.Tensor):
        return torch.equal(torch.as_tensor(value), torch.as_tensor(expected))
    return value == expected
