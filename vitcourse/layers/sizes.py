"""Padding, cropping and sizes, for maps of any size, also while a graph is traced that is for all of them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def always(*conditions: bool) -> bool:
    """Whether conditions on sizes hold; while a graph is traced, whether they do for all sizes that it is for.

    An ``if`` on a size that a graph knows as a symbol only would bind the graph to sizes of one outcome. This binds
    it to none: where the answer depends on the size, it is no.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(condition) for condition in conditions)
    return all(conditions)


def at_least_two(count: int) -> int:
    """The count; for a graph whose count is unknown, two at least: one would be a case of its own, and bind the graph.

    For counts of parts of which more do no harm.
    """
    if not torch.compiler.is_compiling() or always(count < 2) or always(count >= 2):
        return count
    return torch.sym_max(count, 2)


def units_in(length: int, unit: int) -> int:
    """⌈length / unit⌉, as a compiler can reason about it: it has no quotient of a negative number."""
    return (length + unit - 1) // unit


def pad_to_multiple(x: Tensor, units: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Zeros at the end of some axes, up to the next multiple of a unit each; ``x`` itself where nothing is to be added.

    >>> pad_to_multiple(torch.zeros(1, 3, 30, 32), (16, 16), axes=(2, 3)).shape
    torch.Size([1, 3, 32, 32])
    """
    return pad_to(x, [units_in(x.shape[axis], unit) * unit for axis, unit in zip(axes, units, strict=True)], axes)


def pad_to(x: Tensor, lengths: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Zeros at the end of some axes, up to these lengths."""
    missing = {axis: length - x.shape[axis] for axis, length in zip(axes, lengths, strict=True)}
    if always(*(count == 0 for count in missing.values())):
        return x
    # F.pad wants the last axis first, and of each axis its beginning first.
    return F.pad(x, [n for axis in range(x.ndim - 1, min(axes) - 1, -1) for n in (0, missing.get(axis, 0))])


def crop(x: Tensor, lengths: Sequence[int], axes: Sequence[int]) -> Tensor:
    """The beginning of some axes: what :func:`pad_to` was given."""
    for axis, length in zip(axes, lengths, strict=True):
        if always(length == x.shape[axis]):
            continue
        if always(length <= x.shape[axis]):
            x = x.narrow(axis, 0, length)
        else:  # a compiler that cannot prove it would bind its graph to it
            x = x.index_select(axis, torch.arange(length, device=x.device))
    return x


def to_pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """``7`` -> ``(7, 7)``; a pair stays as it is.

    Raises:
        ValueError: not a positive integer or a pair of them.
    """
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, (int, torch.SymInt)) and v > 0 for v in pair):
        raise ValueError(f"{name} {value!r} must be a positive integer or a pair of them (height, width)")
    return pair
