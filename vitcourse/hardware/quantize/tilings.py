"""How the kernels cut their work, by the size of the result and by the chip."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work."""

    block_m: int
    block_n: int
    block_k: int  # inputs of a step; with tl.dot, no more than a group
    num_warps: int
    num_stages: int

    def programs(self, tokens: int, features: int) -> int:
        return -(-tokens // self.block_m) * -(-features // self.block_n)

    def constants(self, in_features: int, group_size: int | None = None) -> dict[str, int]:
        """The kernel's, for a layer of this width."""
        step = min(self.block_k, group_size) if group_size and self.block_m > 1 else self.block_k
        whole = in_features % max(step, group_size or step) == 0
        sizes = {"WHOLE": whole, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": step}
        return sizes | ({"GROUP": group_size} if group_size else {})

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told besides."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# It takes up to 147 KB of shared memory, and consumer chips have 99; Blackwell would spill when it stores the result.
BIG = Tiling(block_m=128, block_n=256, block_k=128, num_warps=8, num_stages=3)
FIT_FOR_BIG = ((8, 0), (9, 0))
# From those in which what is read is used most often to those that make the most programs.
TILINGS = (
    Tiling(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    Tiling(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
    Tiling(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=3),
    Tiling(block_m=64, block_n=32, block_k=128, num_warps=4, num_stages=4),
)
FOUR_BIT_TILINGS = (  # two sums per element: more of them, or longer steps, would not fit into registers
    Tiling(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
    Tiling(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
    Tiling(block_m=64, block_n=32, block_k=64, num_warps=4, num_stages=4),
)
SOME_TOKENS = Tiling(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=4)
FEW_TOKENS = 8
FEW_TOKENS_TILINGS = (
    Tiling(block_m=1, block_n=8, block_k=512, num_warps=4, num_stages=3),
    Tiling(block_m=1, block_n=4, block_k=1024, num_warps=4, num_stages=3),
)
ENOUGH_PROGRAMS = 128  # about as many as a data-centre GPU has multiprocessors


def tilings(kernel: str, tokens: int, capability: tuple[int, int]) -> tuple[Tiling, ...]:
    """Those among which :func:`tiling` chooses."""
    if tokens <= FEW_TOKENS and kernel != "w8a8":
        return FEW_TOKENS_TILINGS
    if tokens <= 32:
        return (SOME_TOKENS,)
    if kernel == "w4a16":
        return FOUR_BIT_TILINGS
    return (BIG, *TILINGS) if kernel == "w8a8" and capability in FIT_FOR_BIG else TILINGS


def kernel_for(name: str, tile: Tiling) -> Any:
    """The Triton kernel that makes such tiles."""
    from . import kernels

    return getattr(kernels, f"{name}_few" if tile.block_m == 1 else name)


def tiling(kernel: str, tokens: int, features: int, capability: tuple[int, int]) -> Tiling:
    """The first that keeps the whole chip busy, for a result (tokens, features)."""
    choices = tilings(kernel, tokens, capability)
    busy = (tile for tile in choices if tile.programs(tokens, features) >= ENOUGH_PROGRAMS)
    return next(busy, choices[-1])
