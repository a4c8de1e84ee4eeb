"""Which tiles make our attention kernels the fastest on this chip? The evidence for ``hardware/flash/plans.py``.

    python -m benchmarks.tiles                                         needs CUDA; an hour and more
    python -m benchmarks.tiles --only 197 --dims 64 --steps forward    one shape; a minute or two
    python -m benchmarks.tiles --only 197 --batch 1                    one image, as for inference
    python -m benchmarks.tiles --only 49 --dims 32 --bias              with a bias, as in Swin's windows

Every tiling that could be sensible is compiled and timed, in bfloat16 and in turns with the one that ships. Where a
step has two kernels one of them is varied at a time. A tiling whose results differ is not timed: compilers, too, make
mistakes. Results: ``tiles.json``.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.attention import BIASED_LENGTHS, HEADS, LENGTHS, full_batch
from benchmarks.common import captured, in_turns, ratio, require_kernels, with_earlier, write_results
from vitcourse.hardware.flash import ops, plans
from vitcourse.hardware.flash.plans import Plan, Tile

STEPS = ("forward", "backward", "dbias")
DTYPE = torch.bfloat16
KEY = ("step", "n", "head_dim", "batch", "bias", "kernels")  # of a row

# Queries, keys, warps and stages that are tried; None is as many keys as there are.
SIDES: dict[str, tuple[tuple[int | None, ...], ...]] = {
    "forward_short": ((16, 32, 64, 128), (None,), (4, 8), (1,)),
    "forward_long": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "backward_short": ((16, 32, 64), (None,), (4, 8, 16), (1, 2)),
    "backward_dq": ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
    "backward_dkdv": ((32, 64), (64, 128), (4, 8), (1, 2, 3)),
    "backward_dbias": ((32, 64, 128), (32, 64), (4, 8), (1, 2)),
}


@dataclass(frozen=True)
class Shape:
    """N queries and as many keys, of D dimensions each, in (batch, heads) sequences."""

    n: int
    head_dim: int
    batch: int
    biased: bool

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.batch, HEADS[self.head_dim], self.n, self.head_dim


def shipped(step: str, shape: Shape, capability: tuple[int, int]) -> tuple[Plan, ...]:
    """What `plans` chooses: the kernels of a step."""
    of_chip = shape.head_dim, DTYPE, capability
    if step == "forward":
        return (plans.forward(shape.n, *of_chip, shape.biased),)
    return plans.backward(shape.n, *of_chip, shape.biased) if step == "backward" else (plans.dbias(*of_chip),)


def candidates(step: str, shape: Shape, capability: tuple[int, int]) -> Iterator[tuple[Plan, ...]]:
    """The kernels that ship, and the others that would do; each once."""
    few = shape.n <= plans.SHORT + 16 * (step == "forward") and shape.head_dim <= 64
    first = shipped(step, shape, capability)
    found = [first]
    if step == "forward":
        found += [(plan,) for name in ("forward_short",) * few + ("forward_long",) for plan in tilings(name, shape)]
    elif step == "dbias":
        found += [(plan,) for plan in tilings("backward_dbias", shape)]
    else:
        long = plans.backward(2 * plans.SHORT, shape.head_dim, DTYPE, capability, shape.biased)
        queries, keys = first if len(first) == 2 else (_with_tail(long[0], shape.n), long[1])
        found += [(plan,) for plan in tilings("backward_short", shape) if few]
        found += [(plan, keys) for plan in tilings("backward_dq", shape)]
        found += [(queries, plan) for plan in tilings("backward_dkdv", shape)]
    yield from (choice for i, choice in enumerate(found) if choice not in found[:i])


def tilings(kernel: str, shape: Shape) -> Iterator[Plan]:
    for queries, keys, warps, stages in product(*SIDES[kernel]):
        tile = Tile(queries, keys or plans.padded(shape.n), warps, stages)
        if kernel == "forward_short":
            sizes = {"HEAD_DIM": shape.head_dim, "BLOCK_D": plans.padded(shape.head_dim), "BLOCK_Q": queries}
            for pieces in dict.fromkeys((plans.pieces(shape.n), ((0, tile.keys),))):
                if len(pieces) > 1 or tile.keys <= plans.SHORT:
                    yield Plan(kernel, sizes | {"PIECES": pieces}, warps, stages)
        elif kernel in ("forward_long", "backward_dq"):
            yield plans.plan(kernel, tile, shape.head_dim, TAIL=plans.tail(shape.n, tile.keys))
        else:
            yield plans.plan(kernel, tile, shape.head_dim)


def _with_tail(plan: Plan, n_k: int) -> Plan:
    return plan._replace(constants=plan.constants | {"TAIL": plans.tail(n_k, plan.constants["BLOCK_K"])})


def work(step: str, shape: Shape, device: str) -> Callable[[tuple[Plan, ...]], tuple[Tensor, ...]]:
    """The step on random inputs, views of a packed projection, as a function of its kernels."""
    b, h, n, d = shape.sizes
    qkv, dout = (torch.randn(b, n, x, h, d, device=device, dtype=DTYPE) for x in (3, 1))
    dout = dout.transpose(1, 3).squeeze(2)
    bias = torch.randn(1, h, n, n, device=device, dtype=DTYPE) if shape.biased else None
    q, k, v = ops.unpack(qkv)
    scale = d**-0.5
    saved = ops.launch_forward(q, k, v, bias, scale)

    def run(chosen: tuple[Plan, ...]) -> tuple[Tensor, ...]:
        with patch.object(plans, step, lambda *_, **__: chosen if step == "backward" else chosen[0]):
            if step == "forward":
                return ops.launch_forward(q, k, v, bias, scale)
            if step == "backward":
                return ops.flash_backward(dout, q, k, v, bias, *saved, scale)
            return (ops.flash_dbias(dout, q, k, v, bias, *saved, scale),)

    return run


def measure(
    step: str,
    shape: Shape,
    device: str,
    capability: tuple[int, int],
    capture: Callable[[Callable[[], Any]], Callable[[], Any]],
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for every choice of kernels that runs: µs, and the speed-up over what ships; the fastest first."""
    run = work(step, shape, device)
    choices = list(candidates(step, shape, capability))
    expected, steps = run(choices[0]), {}
    for choice in choices:
        try:
            if agree(run(choice), expected):
                steps[label(choice)] = capture(lambda choice=choice: run(choice))
            else:
                print(f"wrong results: {label(choice)}", file=sys.stderr)
        except Exception as error:  # a compiler may fail in many ways, and most often there is too little on the chip
            print(f"{label(choice)}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
    taken = in_turns(steps, device, rounds)
    ships = label(choices[0])
    rows = [
        {
            "step": step,
            "n": shape.n,
            "head_dim": shape.head_dim,
            "batch": shape.batch,
            "bias": shape.biased,
            "kernels": name,
            "ships": name == ships,
            "us": 1e6 * min(times),
            "speedup": ratio(taken[ships], times)["ratio"],
        }
        for name, times in taken.items()
    ]
    return sorted(rows, key=lambda row: -row["speedup"])


def agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """To some roundings of the largest number. Both are from our kernels: tests say how exact these are."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return all((a - b).abs().max() <= 8 * torch.finfo(DTYPE).eps * b.abs().max() for a, b in pairs)


def label(choice: tuple[Plan, ...]) -> str:
    """Kernels with their tiles, warps and stages."""
    return ", ".join(
        f"{plan.kernel} "
        + " ".join(f"{name}={size}" for name, size in plan.constants.items() if name not in ("HEAD_DIM", "BLOCK_D"))
        + f" warps={plan.warps} stages={plan.stages}"
        for plan in choice
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="lengths")
    parser.add_argument("--dims", type=int, nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--steps", nargs="+", default=list(STEPS[:2]), choices=STEPS)
    parser.add_argument("--batch", type=int, help="instead of a full one, as in benchmarks.attention")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args(argv)
    require_kernels(parser)
    if "dbias" in arguments.steps and not arguments.bias:
        parser.error("the step dbias needs --bias")
    rows, capability = [], torch.cuda.get_device_capability()
    lengths = arguments.only or list(BIASED_LENGTHS if arguments.bias else LENGTHS)
    for dim, n, step in product(arguments.dims, lengths, arguments.steps):
        shape = Shape(n, dim, arguments.batch or full_batch(n), arguments.bias)
        found = measure(step, shape, "cuda", capability, captured, arguments.rounds)
        rows += found
        for row in [row for i, row in enumerate(found) if i < 3 or row["ships"]]:
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
        write_results("tiles", with_earlier("tiles", rows, "cuda", itemgetter(*KEY)), "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
