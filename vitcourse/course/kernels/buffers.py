"""What crosses between the grader and its worker: tensors in larger buffers, and pointers into them. NumPy only."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ROWS, COLUMNS, MARGIN = 64, 16, 8192  # of NaN after the rows and the columns of a tensor, and before and after it all


@dataclass(frozen=True)
class Pointer:
    """A tensor that a kernel is launched with: where it begins, in bytes from the start of a buffer."""

    buffer: int
    offset: int
    dtype: str  # as PyTorch calls it


@dataclass(frozen=True)
class Buffer:
    """All the bytes of a buffer, and the shape of the tensor in it."""

    data: np.ndarray
    itemsize: int
    shape: tuple[int, ...]


def padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with the NaN after its rows and columns. A vector has margins only.

    >>> padded((2, 3, 5))
    (2, 67, 21)
    """
    if len(shape) < 2:
        return shape
    *outer, rows, columns = shape
    return (*outer, rows + ROWS, columns + COLUMNS)


def length(shape: tuple[int, ...]) -> int:
    """How many values a buffer has for a tensor of that shape."""
    return math.prod(padded(shape)) + 2 * MARGIN


@lru_cache(maxsize=100)
def owned(shape: tuple[int, ...]) -> np.ndarray:
    """Which values of the buffer are the tensor's."""
    mine = np.zeros(length(shape), dtype=bool)
    mine[MARGIN : mine.size - MARGIN].reshape(padded(shape))[tuple(map(slice, shape))] = True
    mine.flags.writeable = False
    return mine
