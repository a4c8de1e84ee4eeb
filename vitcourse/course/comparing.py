"""Say in one line how an outcome differs from the reference's."""

import math
import textwrap
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import einops
import numpy as np
import torch
from torch import Tensor

from .limits import TimeLimit
from .running import KernelFault, Outcome, WrongParameters, leaves

# Largest error allowed, as a fraction of the largest value expected. float64 leaves room for tables kept in float32.
TOLERANCE = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float16: 5e-3, torch.bfloat16: 2e-2}
DEFAULT_TOLERANCE = 1e-4


# An error this small, as a fraction of the largest value expected, and all over the output: a detail, not the formula.
TINY = 1e-3
UNIFORM = 0.1  # the mean error over the largest one, at least: it is not some places that are wrong
NEARLY = "nearly right: "
_TELLING = (NEARLY, "returns nothing")


class Level(IntEnum):
    """What a finding is about, in the order in which things are looked at."""

    ERROR = 0
    OUTPUT = 1
    EFFECTS = 2
    GRADIENTS = 3


@dataclass(frozen=True)
class Finding:
    """The first difference that was found."""

    level: Level
    text: str

    @property
    def telling(self) -> bool:
        """Does the text say what to mend, not only how large the difference is?"""
        return self.level is not Level.OUTPUT or self.text.startswith(_TELLING)


def compare(expected: Outcome, got: Outcome, tolerance: float | None, upto: Level = Level.GRADIENTS) -> Finding | None:
    """The first difference between two outcomes on the same inputs, or None; levels after `upto` are not looked at."""
    if expected.error or got.error:
        same = type(expected.error) is type(got.error) and (
            not isinstance(got.error, WrongParameters) or str(expected.error) == str(got.error)
        )
        return None if same else Finding(Level.ERROR, describe_error(got.error))
    if text := differs(expected.output, got.output, tolerance):
        return Finding(Level.OUTPUT, text)
    if upto >= Level.EFFECTS and (text := _effects(expected, got, tolerance)):
        return Finding(Level.EFFECTS, text)
    if upto >= Level.GRADIENTS and (text := _gradients(expected, got, tolerance)):
        return Finding(Level.GRADIENTS, text)
    return None


def describe_error(error: BaseException | None) -> str:
    """An exception in one line, without its place."""
    if error is None:
        return "no error is raised, though one should be"
    if isinstance(error, TimeLimit):
        return "stopped, it ran too long: a loop that never ends, or far too much work"
    if isinstance(error, (WrongParameters, KernelFault)):
        return str(error)
    lines = str(error).strip().splitlines()
    if isinstance(
        error, einops.EinopsError
    ):  # the first lines repeat what one has written, the last says what is wrong
        lines = [line for line in lines if not line.strip().startswith(("Error while", "Input"))] or lines
        lines = [" ".join(map(str.strip, lines))]
    text, in_place, _ = lines[0].partition(" has been modified by an inplace operation") if lines else ("", "", "")
    if in_place:  # what follows are shapes and counts of changes
        text += " was changed in place (by `+=`, `/=` or writing into a slice, say): make a new tensor"
    return type(error).__name__ + (f": {textwrap.shorten(text, 200, placeholder=' …')}" if text else "")


# ------------------------------------------------------------------------------------------------------------ output


def differs(expected: Any, got: Any, tolerance: float | None = None, name: str = "", floor: float = 1e-3) -> str:
    """How `got` differs from `expected`; "" where it does not. Containers are compared item by item."""
    where = f"{name}: " if name else ""
    if got is None and expected is not None:
        return f"{where}returns nothing: is a return missing?" if not name else f"{name} is None"
    if _kind(expected) != _kind(got):
        return f"{where}returns {_kind(got)}, expected {_kind(expected)}"
    if isinstance(expected, Tensor):
        return _tensors(expected, got, tolerance, where, floor)
    if isinstance(expected, np.ndarray):
        return _tensors(torch.from_numpy(expected), torch.from_numpy(got), tolerance, where, floor)
    if isinstance(expected, dict):
        return _dicts(expected, got, tolerance, name)
    if isinstance(expected, (list, tuple)):
        if len(expected) != len(got):
            return f"{where}returns {len(got)} items, expected {len(expected)}"
        pairs = enumerate(zip(expected, got, strict=True))
        items = (differs(a, b, tolerance, f"{name or 'output'}[{i}]") for i, (a, b) in pairs)
        return next(filter(None, items), "")
    if isinstance(expected, float):
        return _numbers(expected, got, tolerance, where)
    return "" if expected == got else f"{where}{_short(got)}, expected {_short(expected)}"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, np.ndarray):
        return "a NumPy array"
    if isinstance(value, (bool, np.bool_)):
        return "a bool"
    if isinstance(value, (int, float, np.number)):
        return "a number"
    if isinstance(value, (list, tuple)):
        return "a sequence"
    if isinstance(value, dict):
        return "a dict"
    if isinstance(value, str):
        return "a string"
    return "None" if value is None else f"a {type(value).__name__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dicts(expected: dict, got: dict, tolerance: float | None, name: str) -> str:
    if missing := [key for key in expected if key not in got]:
        return f"{name or 'output'} lacks the key {missing[0]!r}"
    if extra := [key for key in got if key not in expected]:
        return f"{name or 'output'} has a key too many, {extra[0]!r}"
    items = (differs(expected[key], got[key], tolerance, f"{name or 'output'}[{key!r}]") for key in expected)
    return next(filter(None, items), "")


def _numbers(expected: float, got: float, tolerance: float | None, where: str) -> str:
    got = float(got)
    if math.isnan(got) and not math.isnan(expected):
        return f"{where}is NaN"
    both_nan = math.isnan(got) and math.isnan(expected)
    close = both_nan or math.isclose(expected, got, rel_tol=tolerance or 1e-6, abs_tol=1e-12)
    return "" if close else f"{where}{_apart(got, expected)}"


def _apart(got: float, expected: float) -> str:
    """Both, with four digits or as many as it takes to tell them apart.

    >>> _apart(0.5, 2.0), _apart(0.99213, 0.99214)
    ('0.5, expected 2', '0.99213, expected 0.99214')
    """
    texts = ((f"{got:.{digits}g}", f"{expected:.{digits}g}") for digits in range(4, 18))
    return "{}, expected {}".format(*next((pair for pair in texts if pair[0] != pair[1]), (got, expected)))


def _tensors(expected: Tensor, got: Tensor, tolerance: float | None, where: str, floor: float) -> str:
    if got.shape != expected.shape:
        return f"{where}shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.dtype != expected.dtype:
        return f"{where}dtype {_name(got.dtype)}, expected {_name(expected.dtype)}"
    if got.device != expected.device:
        return f"{where}on {got.device}, expected on {expected.device}"
    if not (expected.is_floating_point() or expected.is_complex()):
        wrong = int((got != expected).sum())
        return f"{where}{wrong} of {expected.numel()} values differ" if wrong else ""
    if nan := int((got.isnan() & ~expected.isnan()).sum()):
        return f"{where}NaN in {nan} of {got.numel()} values"
    finite = expected.isfinite()
    special = ~finite & ~((got == expected) | (got.isnan() & expected.isnan()))
    if infinite := int((finite & ~got.isfinite()).sum() + special.sum()):
        return f"{where}{_infinities(expected, got)} in {infinite} of {got.numel()} values"
    if not finite.any():
        return ""
    error = (got - expected)[finite].abs().max().item()
    largest = expected[finite].abs().max().item()
    if tolerance is None:
        tolerance = TOLERANCE.get(expected.dtype, DEFAULT_TOLERANCE)
    if error <= tolerance * max(largest, floor):
        return ""
    told = f"{where}max error {error:.2g}, where values reach {largest:.2g}"
    if error <= TINY * largest and (got - expected)[finite].abs().double().mean().item() > UNIFORM * error:
        return f"{NEARLY}{told}, all over: is it an epsilon, or the precision of a step?"
    return told


def _infinities(expected: Tensor, got: Tensor) -> str:
    """What stands where only one of two tensors is infinite, or both are with opposite signs."""
    wrong = (expected != got) & ~(expected.isfinite() & got.isfinite()) & ~expected.isnan()
    pairs = torch.stack([got[wrong], expected[wrong]]).unique(dim=1).T.tolist()
    if len(pairs) == 1 and not torch.is_complex(got):
        return "{}, expected {},".format(*(f"{x:.4g}".replace("-", "−") for x in pairs[0]))
    return "infinite, or finite, in the wrong place"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------- effects, gradients


def _effects(expected: Outcome, got: Outcome, tolerance: float | None) -> str:
    """Inputs that were changed though the reference leaves them, or that were not changed as it does."""
    for name in expected.before | got.before | expected.after | got.after:
        before, right, own = (_leaf(side, name) for side in (expected.before, expected.after, got.after))
        if _same(before, right):
            if not _same(before, own):
                return f"changes its input `{name}` in place"
        elif _same(before, own):
            return f"leaves `{name}` as it was, though it should change it"
        elif text := differs(right, own, tolerance, f"`{name}` after the call"):
            return text
    return ""


_ABSENT = object()


def _leaf(side: dict[str, Any], name: str) -> Any:
    return side.get(name, _ABSENT)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return type(a) is type(b) and (a is b or a == b or a != a)


def _gradients(expected: Outcome, got: Outcome, tolerance: float | None) -> str:
    if got.attached and not expected.attached:
        return "right in value, but a gradient flows back, where none should"
    if expected.attached and not got.attached:
        return (
            "right in value, but cut off from the graph: no gradient flows back "
            "(is something detached, or turned into numbers or NumPy on the way?)"
        )
    if got.backward_error and not expected.backward_error:
        return f"right in value, but the backward pass fails: {describe_error(got.backward_error)}"
    # Some gradients are zero but for rounding (of a key's bias, say): what counts is measured against all others.
    outputs = [leaf for _, leaf in leaves(expected.output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    sizes = [_largest(gradient) for gradient in expected.gradients.values()] + [1e-3 * _largest(o) for o in outputs]
    scale = max(sizes, default=0.0)
    for name, right in expected.gradients.items():
        own = got.gradients.get(name)
        noise = 1e-9 if right is not None and right.dtype == torch.float64 else 1e-5
        reached = _largest(right) > noise * scale
        if reached and own is None:
            return f"right in value, but no gradient reaches `{name}`"
        if not reached and _largest(own) > 1e-3 * scale:
            return f"right in value, but a gradient reaches `{name}`, which should get none"
        if reached and (text := differs(right, own, tolerance, "", floor=1e-3 * scale)):
            return f"right in value, but the gradient with regard to `{name}` is not: {text.removeprefix(NEARLY)}"
    return ""


def _largest(tensor: Tensor | None) -> float:
    """The largest finite magnitude."""
    if tensor is None:
        return 0.0
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def is_evidence(reference: Outcome, faulty: Outcome, got: Outcome, tolerance: float | None) -> bool:
    """Does this case show that `got` makes the mistake of `faulty`: both wrong, and in the same way, in values?"""
    if isinstance(faulty.error, (WrongParameters, KernelFault)):
        return True
    return faulty.error is None and got.error is None and compare(reference, faulty, tolerance) is not None
