"""`expect`: a claim of a lesson that must hold on every machine."""

import math
from typing import Any

import torch

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
    """Print ``✓ label ≥ bound``, never the measured value, which varies from machine to machine; raise if it is not so.

    >>> expect("accuracy", 0.84, at_least=0.81)
    ✓ accuracy ≥ 0.81
    >>> expect("parameters", 86_567_656, equals=86_567_656)
    ✓ parameters = 86567656
    >>> expect("loss at the start", 2.31, close_to=2.30, tol=0.05)
    ✓ loss at the start = 2.3 ± 0.05

    Raises:
        ExpectationError: the value is out of bounds, or NaN; the message has the measured value.
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
    if not all(bool(holds()) for _, holds in claims):
        raise ExpectationError(f"{label}: measured {value}, expected {text}")
    print(f"✓ {label} {text}")


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(expected, torch.Tensor):
        return torch.equal(torch.as_tensor(value), torch.as_tensor(expected))
    return value == expected
