"""Which kernel, with which tiles, for which shape on which chip.

A fixed table: trying tiles at run time would cost seconds in every process, and the winner, and with it the last bits
of every result, could change from run to run. So far the table rests on what the compiler says (``benchmarks/aot.py``:
next to no spills, and more than one block to a multiprocessor where possible), and not yet on a clock, which
``benchmarks/tiles.py`` would ask.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

# Where attention(backend="auto") takes these kernels: (compute capability, type, D, with backward pass, with bias) ->
# ranges of N, both ends included, each with the fewest sequences, B · H. Only what benchmarks/attention.py has measured
# as faster than every backend of PyTorch may stand here, with its results committed. No GPU has been at hand yet.
FASTER: dict[tuple[tuple[int, int], torch.dtype, int, bool, bool], tuple[tuple[int, int, int], ...]] = {}

SHORT, SHORT_BIASED = 256, 128  # up to so many keys one program holds all of them; a bias needs registers, too
BIAS_PROGRAMS = 1024  # of the kernel for the gradient of a shared bias: enough for any chip, and the same on each


class Tile(NamedTuple):
    """Queries and keys of a tile, and how its kernel is launched."""

    queries: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """A kernel's name, its constexpr arguments, and how it is launched."""

    kernel: str
    constants: dict[str, Any]
    warps: int
    stages: int


# For D up to 64, and up to 128. On Hopper and the big Blackwell chips ("shared") matrix instructions read shared
# memory, and leave registers to spare for tiles; on all others ("registers") operands pass through registers. There are
# no matrix instructions for exact float32: its tiles are small, and no reason to prefer these kernels.
LONG: dict[str, dict[str, tuple[Tile, Tile]]] = {
    "shared": {
        "forward_long": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        "backward_dq": (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        "backward_dkdv": (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
    },
    "registers": {
        "forward_long": (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        "backward_dq": (Tile(128, 64, 8, 2), Tile(32, 32, 4, 2)),
        "backward_dkdv": (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
    },
    "float32": {
        "forward_long": (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
        "backward_dq": (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        "backward_dkdv": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
}

# Where the tile of a bias would not fit beside the others.
BIASED: dict[str, dict[str, tuple[Tile, Tile]]] = {
    "shared": {
        "forward_long": (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        "backward_dq": (Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        "backward_dkdv": (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
        "backward_dbias": (Tile(64, 64, 8, 1), Tile(64, 32, 8, 1)),
    },
    "registers": {
        "forward_long": (Tile(64, 64, 4, 2), Tile(64, 32, 8, 2)),
        "backward_dq": (Tile(64, 64, 8, 2), Tile(32, 32, 8, 1)),
        "backward_dkdv": (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
        "backward_dbias": (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    "float32": {"backward_dbias": (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1))},
}

# The one backward kernel for few keys, for D up to 64, by the number of keys, without a bias and with one.
BACKWARD_SHORT: dict[str, tuple[tuple[Tile, ...], tuple[Tile, ...]]] = {
    "shared": (
        (Tile(64, 64, 4, 1), Tile(64, 128, 8, 1), Tile(32, 256, 8, 1)),
        (Tile(32, 64, 4, 1), Tile(32, 128, 8, 1)),
    ),
    "registers": ((Tile(16, 64, 4, 1), Tile(32, 128, 8, 1)), (Tile(16, 64, 4, 1), Tile(32, 128, 8, 1))),
    "float32": ((), ()),
}


def is_faster(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    *,
    backward: bool,
    biased: bool,
    n_k: int,
    sequences: int,
) -> bool:
    """Whether measurements say that these kernels are the fastest."""
    ranges = FASTER.get((capability, dtype, head_dim, backward, biased), ())
    return any(first <= n_k <= last and sequences >= fewest for first, last, fewest in ranges)


@cache
def forward(n_k: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int], biased: bool) -> Plan:
    """For few keys one kernel on all chips: 64 queries at a time, and the keys in pieces."""
    kind, width = _kind(dtype, capability), padded(head_dim)
    if kind == "float32" or width > 64 or n_k > (SHORT_BIASED if biased else SHORT + 16):
        return _long("forward_long", kind, head_dim, biased, n_k)
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": width, "BLOCK_Q": 64, "PIECES": pieces(n_k)}
    return Plan("forward_short", constants, 4, 1)


@cache
def backward(
    n_k: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int], biased: bool
) -> tuple[Plan, ...]:
    """One kernel where a tile holds all keys, two elsewhere."""
    kind, width = _kind(dtype, capability), padded(head_dim)
    for tile in BACKWARD_SHORT[kind][biased]:
        if width <= 64 and n_k <= tile.keys:
            return (plan("backward_short", tile, head_dim),)
    return _long("backward_dq", kind, head_dim, biased, n_k), _long("backward_dkdv", kind, head_dim, biased)


@cache
def dbias(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Plan:
    return _long("backward_dbias", _kind(dtype, capability), head_dim, biased=True)


def pieces(n_k: int) -> tuple[tuple[int, int], ...]:
    """Powers of two that together hold n_k keys, as (first key, size): all of them full, but for the last.

    >>> pieces(197)
    ((0, 128), (128, 64), (192, 16))
    """
    found, first = [], 0
    while n_k > first:
        left = n_k - first
        size = (
            128 if left > 80 and first == 0 else 64 if left > 16 else 16
        )  # a second 128 would cost too many registers
        found.append((first, size))
        first += size
    return tuple(found)


def padded(length: int) -> int:
    """The power of two, at least 16, that a tile's side of this length needs."""
    return max(16, 1 << (length - 1).bit_length())


def tail(n_k: int, block: int) -> int:
    """Size of the last tile of keys, after those of ``block``: 0 where nothing is left over."""
    left = n_k % block
    return left and padded(left)


def _kind(dtype: torch.dtype, capability: tuple[int, int]) -> str:
    if dtype == torch.float32:
        return "float32"
    return "shared" if capability[0] in (9, 10) else "registers"


def _long(kernel: str, kind: str, head_dim: int, biased: bool, n_k: int | None = None) -> Plan:
    """``n_k`` where the kernel goes through the keys, and needs to know what is left at the end."""
    tiles = LONG[kind] | BIASED[kind] if biased else LONG[kind]
    tile = tiles[kernel][padded(head_dim) > 64]
    return plan(kernel, tile, head_dim, **({} if n_k is None else {"TAIL": tail(n_k, tile.keys)}))


def plan(kernel: str, tile: Tile, head_dim: int, **constants: int) -> Plan:
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_Q": tile.queries, "BLOCK_K": tile.keys}
    return Plan(kernel, sizes | constants, tile.warps, tile.stages)
