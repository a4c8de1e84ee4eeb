"""What a run has seen since its last record: losses that are still on the device, and the sums of an epoch."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import TrainingError


class Ledger:
    """Losses and gradient norms are noted without waiting for the device, and fetched many at once.

    Args:
        reduce: sums a tensor over all processes, each of which has its share of a loss.
        precision: under ``"fp16"`` a gradient may overflow, and such a step is left out.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], precision: str) -> None:
        self.reduce, self.precision = reduce, precision
        self.pending: list[Tensor] = []
        self.loss, self.norm, self.samples, self.seconds = 0.0, 0.0, 0, 0.0

    def add(self, loss: Tensor, norm: Tensor, samples: int) -> None:
        self.pending.append(torch.stack([loss.float(), norm.float()]))
        self.samples += samples

    def settle(self) -> tuple[int, str] | None:
        """Fetch what is pending. Where something is not finite: how many steps ago it was noted, and what it is."""
        started, steps = time.perf_counter(), len(self.pending)
        losses, norms = torch.stack(self.pending, dim=1)
        losses, norms = self.reduce(losses).tolist(), norms.tolist()
        self.pending.clear()
        self.seconds += time.perf_counter() - started  # this is where a GPU is waited for
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not math.isfinite(loss):
                return steps - i, "loss"
            if not math.isfinite(norm) and self.precision != "fp16":
                return steps - i, "gradient"
            self.loss += loss
            self.norm += norm if math.isfinite(norm) else 0.0
        return None

    def close(self, steps: int) -> tuple[dict[str, float], dict[str, float]]:
        """Means over the ``steps`` of the epoch, and its speed; begins anew."""
        means = {"train_loss": self.loss / steps, "grad_norm": self.norm / steps}
        speed = {"seconds": self.seconds, "images_per_second": self.samples / max(self.seconds, 1e-9)}
        self.load([0.0, 0.0, 0, 0.0])
        return means, speed

    def state(self) -> list[Any]:
        return [self.loss, self.norm, self.samples, self.seconds]

    def load(self, state: list[Any]) -> None:
        self.loss, self.norm, self.samples, self.seconds = state


def check_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """Raise TrainingError where fp16's loss scaling has found no scale that works."""
    if scaler.is_enabled() and scaler.get_scale() < 2**-14:
        raise TrainingError(
            f"fp16 gradients overflow at every scale (step {step}); use --precision fp32, or lower --lr"
        )
