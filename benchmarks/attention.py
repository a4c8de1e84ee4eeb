"""Is our attention faster than PyTorch's, and how far is it from what the chip allows?

    python -m benchmarks.attention --dims 64                  needs CUDA; about ten minutes
    python -m benchmarks.attention --dims 64 --only 197 257   some lengths
    python -m benchmarks.attention --dims 32 --bias           with a bias, as in Swin and CoAtNet
    python -m benchmarks.attention --dtype float16            instead of bfloat16

Forward, and forward + backward, against every backend of ``scaled_dot_product_attention`` and FlexAttention, in turns,
for a full batch and for one image. Inputs are three tensors of their own, or one packed projection as in a model, of
which the others get views; then the gradient is packed as well. Everything is captured in CUDA graphs: the clock sees
kernels, not Python. The floor is what the same chip needs to move the bytes at its measured copy speed, or to do the
sums at its measured matmul speed, whichever is longer; tensors that fit into the chip's cache may beat it. Results:
``attention.json``, row by row; rows of an earlier run on the same device and versions are kept.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import captured, in_turns, ratio, require_kernels, with_earlier, write_results
from vitcourse.hardware import flash_attention, flash_attention_qkvpacked

# Those that models have, and 65, 129 and 273, the shortest for which `plans` takes bigger tiles: there most is wasted.
LENGTHS = (50, 65, 129, 197, 257, 273, 577, 785, 1025, 4096)
BIASED_LENGTHS = (49, 65, 129, 196)  # Swin's windows, and CoAtNet's third stage
HEADS = {64: 12, 32: 24, 80: 16, 128: 6}  # by head dimension
TOKENS = 2**16  # of a batch, about; of short sequences 256 at most
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Case:
    n: int
    head_dim: int
    packed: bool
    backward: bool
    biased: bool = False
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def heads(self) -> int:
        return HEADS[self.head_dim]

    @property
    def target(self) -> float:
        """The speed-up over the fastest peer that we want."""
        return 1.3 if self.n <= 257 else 1.0


def full_batch(n: int) -> int:
    return max(1, min(256, TOKENS // n))


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if bias is None:
        return flex_attention(q, k, v)
    return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + bias[0, h, i, j])


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def leaves(case: Case, device: str) -> tuple[Tensor, ...]:
    """What gradients are taken of: the packed projection, or q, k and v; and the bias, which the batch shares."""
    b, h, n, d = case.batch, case.heads, case.n, case.head_dim
    shapes = [(b, n, 3, h, d)] if case.packed else [(b, h, n, d)] * 3
    shapes += [(1, h, n, n)] * case.biased
    return tuple(torch.randn(s, device=device, dtype=case.dtype, requires_grad=case.backward) for s in shapes)


def contestants(case: Case) -> dict[str, Callable[..., Tensor]]:
    """Functions of the leaves; ours come first."""

    def of_leaves(function: Attention) -> Callable[..., Tensor]:
        """With the copies that a model needs: views in, heads merged again."""
        if not case.packed:
            return lambda q, k, v, bias=None: function(q, k, v, bias)
        return lambda qkv, bias=None: function(*qkv.permute(2, 0, 3, 1, 4), bias).transpose(1, 2).flatten(2)

    def packed(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        return flash_attention_qkvpacked(qkv, bias=bias).transpose(1, 2).flatten(2)

    views = of_leaves(lambda q, k, v, bias: flash_attention(q, k, v, bias=bias))
    ours = {"ours": packed, "ours, views": views} if case.packed else {"ours": views}
    peers = {name: partial(sdpa, backend) for name, backend in PEERS.items()}
    peers["flex"] = torch.compile(flex, dynamic=False)
    return ours | {name: of_leaves(function) for name, function in peers.items()}


def step(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Callable[[], Any]:
    """The forward pass, and the backward pass where the leaves want gradients."""
    if not tensors[0].requires_grad:
        return torch.no_grad()(lambda: function(*tensors))
    gradient = torch.randn_like(function(*tensors))
    return lambda: torch.autograd.grad(function(*tensors), tensors, gradient)


def prepared(
    case: Case, device: str, capture: Callable[[Callable[[], Any]], Callable[[], Any]]
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """A step of everybody who can do the case, and what kept the others."""
    torch._dynamo.reset()  # after eight shapes FlexAttention would no longer be compiled
    tensors, steps, failed = leaves(case, device), {}, {}
    for name, function in contestants(case).items():
        try:
            steps[name] = capture(step(function, tensors))
        except Exception as error:  # a backend that does not take the shape, memory, a compiler: many types
            if name.startswith("ours"):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return steps, failed


def traffic(case: Case) -> int:
    """Bytes that have to be read and written: q, k, v, out; and dout, these four once more, dq, dk, dv; a bias."""
    tensors = (12 if case.backward else 4) * case.batch * case.n * case.head_dim
    biases = (3 if case.backward else 1) * case.n**2 * case.biased
    return (tensors + biases) * case.heads * case.dtype.itemsize


def operations(case: Case) -> int:
    """Operations of the matrix products: two in the forward pass, five in the backward pass."""
    return (7 if case.backward else 2) * 2 * case.batch * case.heads * case.n**2 * case.head_dim


def chip_speed(device: str, rounds: int) -> tuple[float, float]:
    """Measured bytes a second of a copy, read and written, and operations a second of a matrix product."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device=device)
    square, target = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device), torch.empty_like(source)
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
        "dtype": str(case.dtype).removeprefix("torch."),
        "inputs": "packed" if case.packed else "separate",
        "bias": case.biased,
        "backward": case.backward,
        **{f"{name} us": 1e6 * min(times) for name, times in taken.items()},
        "best_peer": best,
        "speedup": quartiles["ratio"],
        "speedup_low": quartiles["ratio_low"],
        "speedup_high": quartiles["ratio_high"],
        "views_speedup": ratio(peers[best], taken.get("ours, views", taken["ours"]))["ratio"],
        "floor us": 1e6 * floor,
        "times_the_floor": min(taken["ours"]) / floor,
        "target": case.target,
        "passed": quartiles["ratio"] >= case.target,
    }


def faster(rows: list[dict[str, Any]]) -> dict[tuple[str, int, bool, bool], tuple[tuple[int, int, int], ...]]:
    """Where ``attention(backend="auto")`` should take our kernels, by type, head dimension, direction and bias.

    A range is (first N, last N, fewest sequences), from lengths that are neighbours among the measured ones. Judged by
    the slower way in: q, k, v as separate tensors or views, whose gradients a model would have to stack.
    """
    found: dict[tuple[str, int, bool, bool], tuple[tuple[int, int, int], ...]] = {}
    for key in dict.fromkeys(_class(row) for row in rows):
        mine = [row for row in rows if _class(row) == key]
        ranges: list[tuple[int, int, int]] = []
        previous = None
        for n in sorted({row["n"] for row in mine}):
            fewest = _fewest([row for row in mine if row["n"] == n])
            if fewest is not None and fewest == previous:
                ranges[-1] = (ranges[-1][0], n, fewest)
            elif fewest is not None:
                ranges.append((n, n, fewest))
            previous = fewest
        found[key] = tuple(ranges)
    return found


def _class(row: dict[str, Any]) -> tuple[str, int, bool, bool]:
    return row["dtype"], row["head_dim"], row["backward"], row["bias"]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return *_class(row), row["n"], row["batch"], row["inputs"]


def _fewest(rows: list[dict[str, Any]]) -> int | None:
    """The smallest number of sequences from which on we were faster in all rows."""
    lost = [row["batch"] * row["heads"] for row in rows if row["views_speedup"] < 1]
    won = [row["batch"] * row["heads"] for row in rows if row["batch"] * row["heads"] > max(lost, default=0)]
    return min(won, default=None)


def cases(lengths: list[int], dims: list[int], biased: bool, dtype: torch.dtype) -> Iterator[Case]:
    """A full batch in both layouts, and one image as in a model."""
    for dim, n, backward in product(dims, lengths, (False, True)):
        yield Case(n, dim, True, backward, biased, full_batch(n), dtype)
        yield Case(n, dim, False, backward, biased, full_batch(n), dtype)
        yield Case(n, dim, True, backward, biased, 1, dtype)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="lengths")
    parser.add_argument("--dims", type=int, nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args(argv)
    require_kernels(parser)
    rows, speed = [], chip_speed("cuda", arguments.rounds)
    print(f"copies {speed[0] / 1e12:.2f} TB/s, bfloat16 products {speed[1] / 1e12:.0f} TFLOP/s")
    lengths = arguments.only or list(BIASED_LENGTHS if arguments.bias else LENGTHS)
    for case in cases(lengths, arguments.dims, arguments.bias, DTYPES[arguments.dtype]):
        steps, failed = prepared(case, "cuda", captured)
        rows.append(measure(case, steps, speed, "cuda", arguments.rounds) | {"failed": failed})
        print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        everything = with_earlier("attention", rows, "cuda", _key)
        write_results("attention", everything, "cuda")
        del steps  # and the memory of its graphs
        torch.cuda.empty_cache()
    print("for FASTER in vitcourse/hardware/flash/plans.py:")
    for (dtype, *key), ranges in faster(everything).items():
        print(f"    ({torch.cuda.get_device_capability()}, torch.{dtype}, {', '.join(map(str, key))}): {ranges},")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
