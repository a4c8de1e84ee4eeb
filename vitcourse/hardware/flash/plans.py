"""Which kernel, with which tiles, for which shape on which chip.

A fixed table: trying tiles at run time costs seconds in every process, and what wins may differ from run to run. The
table rests on compilations (``benchmarks/aot.py``: no spills, several blocks to a multiprocessor), not yet on a clock.
"""

from typing import Any, NamedTuple

SHORT = 256  # up to so many keys one program holds all of them


class Plan(NamedTuple):
    """A kernel's name, its constexpr arguments, and how it is launched."""

    kernel: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def pieces(n_k: int) -> tuple[tuple[int, int], ...]:
    """Powers of two that together hold n_k keys, as (first key, size): all of them full, but for the last.

    >>> pieces(197)
    ((0, 128), (128, 64), (192, 16))
    """
    found, first = [], 0
    while n_k - first > 16:
        left = n_k - first
        size = 128 if left > 80 else 64
        found.append((first, size))
        first += size
    if first < n_k:
        found.append((first, 16))
    return tuple(found)


def padded(head_dim: int) -> int:
    """The power of two, at least 16, that a tile needs for the head dimension."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tail(n_k: int, block: int) -> int:
    """Size of the last tile of keys, after those of ``block``: 0 where nothing is left over."""
    left = n_k % block
    return left and padded(left)


def forward(n_k: int, head_dim: int, itemsize: int, capability: tuple[int, int]) -> Plan:
    block_d = padded(head_dim)
    common = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
    if n_k <= SHORT + 16 and itemsize == 2:
        return Plan("forward_short", {**common, "BLOCK_Q": 64, "PIECES": pieces(n_k)}, 4, 1)
    return Plan("forward_long", {**common, "BLOCK_Q": 128, "BLOCK_K": 64, "TAIL": tail(n_k, 64)}, 8, 3)


def backward(n_k: int, head_dim: int, itemsize: int, capability: tuple[int, int]) -> tuple[Plan, ...]:
    block_d = padded(head_dim)
    common = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
    if n_k <= SHORT and itemsize == 2:
        return (Plan("backward_short", {**common, "BLOCK_Q": 32, "BLOCK_K": 256}, 8, 1),)
    return (
        Plan("backward_queries", {**common, "BLOCK_Q": 64, "BLOCK_K": 64, "TAIL": tail(n_k, 64)}, 4, 2),
        Plan("backward_keys", {**common, "BLOCK_Q": 64, "BLOCK_K": 64}, 4, 2),
    )


def backward_bias(n_k: int, head_dim: int, itemsize: int, capability: tuple[int, int]) -> Plan:
    return Plan(
        "backward_bias", {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_Q": 64, "BLOCK_K": 64}, 4, 1
    )
