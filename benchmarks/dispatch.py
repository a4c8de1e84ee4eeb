"""What does PyTorch's way to our attention operators cost, beside calling the functions behind them?

    python -m benchmarks.dispatch        a few seconds; no GPU is needed, and none is used

No kernel runs: what is left is Python and PyTorch, which a GPU waits for where sequences are short and few. A reason
for a door past the dispatcher would have to be found here. Times are microseconds of processor time of one call, median
over the rounds. Results: ``dispatch.json``.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import in_turns, write_results
from vitcourse.hardware.flash import ops

SHAPE = 1, 197, 3, 3, 64  # one image of ViT-Tiny: (B, N, 3, H, D)
CALLS = 100  # in a row, between two looks at the clock


class Direct(torch.autograd.Function):
    """Forward and backward pass of packed attention as autograd and Python know them, and nobody else."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float) -> Tensor:
        out, lse = ops.flash_forward_qkvpacked(qkv, None, scale)
        ctx.save_for_backward(qkv, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        qkv, out, lse = ctx.saved_tensors
        return ops.flash_backward_qkvpacked(dout, qkv, None, out, lse, ctx.scale), None


def candidates(step: str) -> dict[str, Callable[[], Any]]:
    """The step by the operator, and directly."""
    qkv = torch.randn(SHAPE, requires_grad=step == "forward + backward")
    dout = torch.randn(SHAPE[0], SHAPE[1], SHAPE[3], SHAPE[4]).transpose(1, 2)

    def operator() -> Tensor:
        return torch.ops.vitcourse.flash_forward_qkvpacked(qkv, None, 0.125)[0]

    def direct() -> Tensor:
        if qkv.requires_grad:
            return Direct.apply(qkv, 0.125)
        return ops.flash_forward_qkvpacked(qkv, None, 0.125)[0]

    def repeated(attend: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            for _ in range(CALLS):
                out = attend()
                if qkv.requires_grad:
                    torch.autograd.grad(out, qkv, dout)

        return work

    return {"operator": repeated(operator), "direct": repeated(direct)}


def measure(step: str, rounds: int) -> dict[str, Any]:
    """A row: both times, and the difference."""
    with patch.object(ops, "_launch", lambda *_: None):
        taken = in_turns(candidates(step), "cpu", rounds)
    microseconds = {name: [1e6 * t / CALLS for t in times] for name, times in taken.items()}
    differences = [a - b for a, b in zip(microseconds["operator"], microseconds["direct"], strict=True)]
    return {
        "step": step,
        **{name: statistics.median(times) for name, times in microseconds.items()},
        "dispatcher": statistics.median(differences),
        "rounds": rounds,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args(argv).rounds
    torch.set_num_threads(1)
    write_results("dispatch", [measure(step, rounds) for step in ("inference", "forward + backward")])


if __name__ == "__main__":
    main()
