"""Is our attention faster than PyTorch's, and how far is it from what the chip allows?

    python -m benchmarks.attention                          needs CUDA
    python -m benchmarks.attention --only 197 257 --dims 64   some lengths and head dimensions

Forward, and forward + backward, in bfloat16, against every backend of ``scaled_dot_product_attention`` and
FlexAttention, in turns. Inputs are three tensors of their own, or one packed projection as in a model, of which the
others get views; then the gradient is packed as well. Everything is captured in CUDA graphs: the clock sees kernels,
not Python. The floor is what the same chip needs to move the bytes at its measured copy speed, or to do the sums at its
measured matmul speed, whichever is longer. Results: ``attention.json``.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import in_turns, ratio, write_results
from vitcourse.hardware import flash_attention, flash_attention_qkvpacked

LENGTHS = (50, 197, 257, 577, 785, 1025, 4096)
HEADS = {64: 12, 32: 24, 80: 16, 128: 6}  # by head dimension
TOKENS = 2**16  # of a batch, about; of short sequences 256 at most
DTYPE = torch.bfloat16
PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Case:
    n: int
    head_dim: int
    packed: bool
    backward: bool

    @property
    def heads(self) -> int:
        return HEADS[self.head_dim]

    @property
    def batch(self) -> int:
        return max(1, min(256, TOKENS // self.n))

    @property
    def target(self) -> float:
        """The speed-up over the fastest peer that we want."""
        return 1.3 if self.n <= 257 else 1.0


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def leaves(case: Case, device: str) -> tuple[Tensor, ...]:
    """What gradients are taken of: the packed projection, or q, k and v."""
    b, h, n, d = case.batch, case.heads, case.n, case.head_dim
    shapes = [(b, n, 3, h, d)] if case.packed else [(b, h, n, d)] * 3
    return tuple(torch.randn(s, device=device, dtype=DTYPE, requires_grad=case.backward) for s in shapes)


def contestants(case: Case) -> dict[str, Callable[..., Tensor]]:
    """Functions of the leaves; ours comes first."""

    def unpacking(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """With the copies that a model needs: views in, heads merged again."""
        if not case.packed:
            return function
        return lambda qkv: function(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)

    ours = (lambda qkv: flash_attention_qkvpacked(qkv).transpose(1, 2).flatten(2)) if case.packed else flash_attention
    peers = {name: unpacking(partial(sdpa, backend)) for name, backend in PEERS.items()}
    return {"ours": ours, "ours, views": unpacking(flash_attention), **peers, "flex": unpacking(torch.compile(flex))}


def step(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Callable[[], Any]:
    """The forward pass, and the backward pass where the leaves want gradients."""
    if not tensors[0].requires_grad:
        return torch.no_grad()(lambda: function(*tensors))
    gradient = torch.randn_like(function(*tensors))
    return lambda: torch.autograd.grad(function(*tensors), tensors, gradient)


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """The same kernels, launched at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


def prepared(
    case: Case, device: str, capture: Callable[[Callable[[], Any]], Callable[[], Any]]
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """A step of everybody who can do the case, and what kept the others."""
    tensors, steps, failed = leaves(case, device), {}, {}
    for name, function in contestants(case).items():
        try:
            steps[name] = capture(step(function, tensors))
        except RuntimeError as error:  # out of memory, or a backend that does not take the shape
            failed[name] = str(error).splitlines()[0]
            if name == "ours":
                raise
    return steps, failed


def traffic(case: Case) -> int:
    """Bytes that have to be read and written: q, k, v, out; and dout, these four once more, dq, dk, dv."""
    return (12 if case.backward else 4) * case.batch * case.heads * case.n * case.head_dim * DTYPE.itemsize


def operations(case: Case) -> int:
    """Operations of the matrix products: two in the forward pass, five in the backward pass."""
    return (7 if case.backward else 2) * 2 * case.batch * case.heads * case.n**2 * case.head_dim


def chip_speed(device: str, rounds: int) -> tuple[float, float]:
    """Measured bytes a second of a copy, read and written, and operations a second of a matrix product."""
    source, square = torch.empty(2**29, dtype=DTYPE, device=device), torch.randn(8192, 8192, dtype=DTYPE, device=device)
    target = torch.empty_like(source)
    taken = in_turns({"copy": lambda: target.copy_(source), "matmul": lambda: square @ square}, device, rounds)
    return 2 * source.nbytes / min(taken["copy"]), 2 * 8192**3 / min(taken["matmul"])


def measure(
    case: Case, steps: dict[str, Callable[[], Any]], speed: tuple[float, float], device: str, rounds: int
) -> dict:
    """One row: times in µs, our speed-up over the fastest peer, and how far we are from the floor."""
    taken = in_turns(steps, device, rounds)
    peers = {name: times for name, times in taken.items() if not name.startswith("ours")}
    best = min(peers, key=lambda name: min(peers[name]))
    floor = max(traffic(case) / speed[0], operations(case) / speed[1])
    quartiles = ratio(peers[best], taken["ours"])
    return {
        "n": case.n,
        "head_dim": case.head_dim,
        "batch": case.batch,
        "heads": case.heads,
        "inputs": "packed" if case.packed else "separate",
        "backward": case.backward,
        **{f"{name} us": 1e6 * min(times) for name, times in taken.items()},
        "best_peer": best,
        "speedup": quartiles["ratio"],
        "speedup_low": quartiles["ratio_low"],
        "speedup_high": quartiles["ratio_high"],
        "views_speedup": ratio(peers[best], taken["ours, views"])["ratio"],
        "floor us": 1e6 * floor,
        "times_the_floor": min(taken["ours"]) / floor,
        "target": case.target,
        "passed": quartiles["ratio"] >= case.target,
    }


def faster(rows: list[dict[str, Any]]) -> dict[tuple[int, bool], tuple[tuple[int, int], ...]]:
    """Lengths where ``attention(backend="auto")`` should take our kernels, by head dimension and direction.

    Judged by the slower way in: q, k, v as separate tensors or views, whose gradients a model would have to stack.
    Neighbours among the measured lengths that both win make a range.
    """
    found: dict[tuple[int, bool], tuple[tuple[int, int], ...]] = {}
    for key in dict.fromkeys((row["head_dim"], row["backward"]) for row in rows):
        speedups: dict[int, list[float]] = {}
        for row in rows:
            if (row["head_dim"], row["backward"]) == key:
                speedups.setdefault(row["n"], []).append(row["views_speedup"])
        ranges: list[tuple[int, int]] = []
        previous_won = False
        for n in sorted(speedups):
            won = min(speedups[n]) >= 1
            if won and previous_won:
                ranges[-1] = (ranges[-1][0], n)
            elif won:
                ranges.append((n, n))
            previous_won = won
        found[key] = tuple(ranges)
    return found


def cases(lengths: list[int], dims: list[int]) -> Iterator[Case]:
    for dim in dims:
        for n in lengths:
            for packed in (True, False):
                for backward in (False, True):
                    yield Case(n, dim, packed, backward)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", default=list(LENGTHS), metavar="N", help="lengths")
    parser.add_argument("--dims", type=int, nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, and torch.cuda.is_available() is false")
    rows, speed = [], chip_speed("cuda", arguments.rounds)
    print(f"copies {speed[0] / 1e12:.2f} TB/s, bfloat16 products {speed[1] / 1e12:.0f} TFLOP/s")
    for case in cases(arguments.only, arguments.dims):
        steps, failed = prepared(case, "cuda", captured)
        rows.append(measure(case, steps, speed, "cuda", arguments.rounds) | {"failed": failed})
        print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    write_results("attention", rows, "cuda")
    capability = torch.cuda.get_device_capability()
    print("for FASTER in vitcourse/hardware/flash/plans.py:")
    for (dim, backward), ranges in faster(rows).items():
        print(f"    ({capability}, {DTYPE}, {dim}, {backward}): {ranges},")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
