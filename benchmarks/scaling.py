"""Time and memory of every attention of direction 5 while the number of tokens grows from 196 to 16 384.

    python -m benchmarks.scaling                  on the CPU, one thread
    python -m benchmarks.scaling --device cuda

A slope is that of a straight line through the points on logarithmic axes: 1 is linear, 2 is quadratic. Linear and
sparse attention have to stay at 1.15 or less, in time and in memory; softmax attention that forms its matrix is about 2
over the longest three sequences. Exits with an error where that is missed.

The tokens that are counted are patches. BigBird's pattern has one prefix token beside them, its global one.

Time is for the forward pass. Memory is the largest sum of tensors that are alive together, inputs not counted, in the
forward pass and with the backward pass; what a fused kernel allocates inside is not seen on a CPU.

Merging takes tokens away instead: it is measured in a whole ViT-B/16 of 224 pixels, as time over that of the plain one.
"""

import argparse
import sys
import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vitcourse
from benchmarks.common import in_turns, ratio, seconds, write_results
from vitcourse.efficient_attention import (
    BigBirdAttention,
    LinearAttention,
    LocalAttention,
    RandomBlockAttention,
    RandomFeatureAttention,
    TwoSoftmaxAttention,
    merge_tokens,
)
from vitcourse.efficient_attention.mixer import TokenMixer
from vitcourse.layers import attention
from vitcourse.vit import Grid

Attend = Callable[[Tensor, Tensor, Tensor, Grid], Tensor]

SIDES = (14, 28, 56, 84, 128)  # 196 to 16 384 patches
PREFIX = {"local + global + random": 1}  # prefix tokens; none of the others
HEADS, WIDTH = 1, 64
FLATTEST, QUADRATIC = 1.15, (1.8, 2.2)
MERGED, MERGING_BATCH = (0, 8, 16), 4  # tokens that go in each block of ViT-B/16; images at a time
MIXERS: dict[str, Callable[[], TokenMixer]] = {
    "linear, elu + 1": lambda: LinearAttention(WIDTH, HEADS),
    "linear, two softmaxes": lambda: TwoSoftmaxAttention(WIDTH, HEADS),
    "random features": lambda: RandomFeatureAttention(WIDTH, HEADS, num_features=64),
    "local 7 × 7": lambda: LocalAttention(WIDTH, HEADS),
    "random blocks": lambda: RandomBlockAttention(WIDTH, HEADS),
    "local + global + random": lambda: BigBirdAttention(WIDTH, HEADS),
}


def candidates(device: str) -> dict[str, Attend]:
    """Every attention as a function of q, k, v (B, H, N, D) and the grid; the projections around it are left out."""
    softmax = {
        f"softmax, {backend}": lambda q, k, v, grid, backend=backend: attention(q, k, v, backend=backend)
        for backend in ("math", "sdpa")
    }
    return softmax | {name: make().to(device).mix for name, make in MIXERS.items()}


def inputs(grid: Grid, device: str, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor, Grid]:
    h, w, prefix = grid
    packed = torch.randn(3, 1, HEADS, prefix + h * w, WIDTH, device=device)
    return *(t.requires_grad_(requires_grad) for t in packed.unbind()), grid


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.known:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(attend: Attend, grid: Grid, device: str, backward: bool) -> int:
    """The most memory that one call needs beside its inputs."""
    x = inputs(grid, device, backward)
    if device != "cuda":
        with PeakMemory() as memory:
            memory.known.add(id(x[0].untyped_storage()))
            _call(attend, x, backward)
        return memory.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _call(attend, x, backward)
    return torch.cuda.max_memory_allocated() - before


def _call(attend: Attend, x: tuple[Tensor, Tensor, Tensor, Grid], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = attend(*x)
        if backward:
            torch.autograd.grad(out.sum(), x[:3])


@torch.no_grad()
def shortest(attend: Attend, grid: Grid, device: str, budget: float) -> float:
    """Seconds of the quickest call, of one and as many more as fit the budget, at most 50."""
    x = inputs(grid, device)
    first = seconds(lambda: attend(*x), device, 1)
    more = min(50, int(budget / max(first, 1e-5)))
    return min([first, *(seconds(lambda: attend(*x), device, 1) for _ in range(more))])


def slope(tokens: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def measure(device: str, budget: float, passes: int) -> list[dict[str, Any]]:
    """One row for each attention and length; all are measured in turn, so that a busy minute spoils one pass only."""
    attentions = candidates(device)
    cases = [(name, (side, side, PREFIX.get(name, 0))) for name, side in product(attentions, SIDES)]
    times = [
        {(name, grid): shortest(attentions[name], grid, device, budget) for name, grid in cases} for _ in range(passes)
    ]
    rows = []
    for name, grid in cases:
        row = {"name": name, "tokens": grid[0] * grid[1], "prefix": grid[2], "heads": HEADS, "head_dim": WIDTH}
        row["milliseconds"] = 1e3 * min(taken[name, grid] for taken in times)
        # The matrices of 16 384² numbers need not be filled to be counted.
        where = "meta" if device == "cpu" and name == "softmax, math" else device
        row["bytes"], row["bytes_training"] = (
            peak_bytes(attentions[name], grid, where, backward) for backward in (False, True)
        )
        rows.append(row)
        print("{name:24s} {tokens:6d} tokens {milliseconds:10.3f} ms {bytes:13,d} bytes".format(**row), flush=True)
    return rows


@torch.no_grad()
def measure_merging(device: str, rounds: int) -> list[dict[str, Any]]:
    """The plain ViT-B/16 and the same with merging, in turns: milliseconds, and time over that of the plain one."""
    model = vitcourse.create_model("vit_base_patch16_224").to(device).eval()
    images = torch.randn(MERGING_BATCH, 3, 224, 224, device=device)
    models = {r: merge_tokens(model, r) if r else model for r in MERGED}
    taken = in_turns({str(r): lambda net=net: net(images) for r, net in models.items()}, device, rounds, warmup=1)
    rows = []
    for r in MERGED:
        row = {"model": "vit_base_patch16_224", "merged": r, "batch": MERGING_BATCH}
        row["milliseconds"] = 1e3 * min(taken[str(r)])
        rows.append(row | ratio(taken[str(r)], taken["0"]))
        print("{model}, {merged} tokens merged in each block: {milliseconds:.0f} ms, {ratio:.2f}".format(**rows[-1]))
    return rows


def judge(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """The slopes of each attention, and whether all targets are met."""
    slopes, good = [], True
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        tokens = [row["tokens"] for row in own]
        fits = {key: slope(tokens, [row[key] for row in own]) for key in ("milliseconds", "bytes", "bytes_training")}
        late = slope(tokens[-3:], [row["milliseconds"] for row in own[-3:]])
        if name == "softmax, math":
            good &= QUADRATIC[0] <= late <= QUADRATIC[1]
        elif not name.startswith("softmax"):
            good &= max(fits.values()) <= FLATTEST
        slopes.append(
            {"name": name, "slope": fits.pop("milliseconds"), "slope_late": late}
            | {f"slope_{key}": value for key, value in fits.items()}
        )
        print(
            "{name:24s} slope in time {slope:.2f} (from 3136 on {slope_late:.2f}), in memory {slope_bytes:.2f}, "
            "training {slope_bytes_training:.2f}".format(**slopes[-1])
        )
    return slopes, good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds for each attention and length, in each pass")
    parser.add_argument("--passes", type=int, default=3, help="times that everything is measured")
    parser.add_argument("--rounds", type=int, default=7, help="times that merging is measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = measure(options.device, options.budget, options.passes)
    slopes, good = judge(rows)
    rows += slopes + measure_merging(options.device, options.rounds)
    write_results("scaling" if options.device == "cpu" else "scaling_cuda", rows, options.device)
    if not good:
        sys.exit(f"missed: linear and sparse slopes at most {FLATTEST}, softmax between {QUADRATIC}")


if __name__ == "__main__":
    main()
