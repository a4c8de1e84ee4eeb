"""How the weights move: parameter groups, optimizers, the learning-rate schedule, the running mean."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig

# Tables that are looked up or added, not multiplied with: shrinking them towards zero has no meaning.
NOT_DECAYED = {"pos_embed", "cls_token", "reg_token", "mask_token", "relative_position_bias_table"}


def param_groups(model: nn.Module, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """Two groups for an optimizer: matrices with decay; vectors, tokens and positions without.

    Without decay are all parameters of fewer than two dimensions (norms, biases, layer scale), those whose last name
    is a token or a position table, and those that ``model.no_weight_decay()`` names, in full or by the last name.
    Frozen parameters are left out.

    >>> [len(group["params"]) for group in param_groups(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))]
    [1, 3]
    """
    excluded = NOT_DECAYED | set(model.no_weight_decay() if hasattr(model, "no_weight_decay") else ())
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name in excluded or name.rpartition(".")[2] in excluded
            (others if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class SGDW(torch.optim.Optimizer):
    """SGD with momentum and decoupled weight decay (Loshchilov and Hutter 2019, algorithm 1).

    ``buffer = momentum * buffer + gradient``, then ``p = (1 - lr * weight_decay) * p - lr * buffer``. The decay is
    multiplied by the group's rate, as in PyTorch's AdamW and timm's ``sgdw``, and never enters the buffer. PyTorch's
    own SGD adds ``weight_decay * p`` to the gradient instead, so that momentum makes ``1 / (1 - momentum)`` times as
    much of it.

    Raises:
        ValueError: a negative rate, momentum or decay.

    >>> p = nn.Parameter(torch.tensor([1.0]))
    >>> p.grad = torch.tensor([2.0])
    >>> SGDW([p], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    >>> p.item()  # 0.95 of the 1, less 0.1 of the 2
    0.75
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        for name, value in defaults.items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            change = [p.grad for p in params]
            if group["momentum"]:
                change = self._buffers(params)
                torch._foreach_mul_(change, group["momentum"])
                torch._foreach_add_(change, [p.grad for p in params])
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, change, alpha=-group["lr"])
        return loss

    def _buffers(self, params: list[Tensor]) -> list[Tensor]:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [self.state[p]["momentum_buffer"] for p in params]


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or :class:`SGDW`, over ``groups``.

    A group without a ``weight_decay`` of its own takes ``config.weight_decay``.

    Raises:
        ValueError: no parameter to train.
    """
    groups = [group for group in groups if len(group["params"])]
    if not groups:
        raise ValueError("the model has no trainable parameter; set requires_grad=True on some")
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return SGDW(groups, momentum=config.momentum, **options)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, betas=(config.momentum, config.beta2), fused=fused, **options)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of step ``step`` (from 0): linear warm-up, then half a cosine to ``min_lr`` at the last step.

    A pure function of the step, so a resumed run has no scheduler state to restore.
    (Loshchilov and Hutter 2017, eq. 5, without restarts; warm-up: Goyal et al. 2017, section 2.2.)

    >>> config = TrainConfig(lr=1.0, min_lr=0.0, warmup=0.2)
    >>> [round(learning_rate(step, 11, config), 2) for step in (0, 1, 2, 6, 10)]
    [0.33, 0.67, 1.0, 0.5, 0.0]
    """
    warmup_steps = round(config.warmup * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate times its own ``lr_scale`` (1 where a group has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class Ema:
    """A running mean of a model's weights (Polyak and Juditsky 1992), kept in a copy of the model.

    ``mean = d * mean + (1 - d) * weights`` with ``d = min(decay, (1 + step) / (10 + step))``, so that the random
    start is soon forgotten. Buffers are copied.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> ema = Ema(model, decay=0.9)
    >>> old, _ = ema.model.weight.item(), model.weight.data.add_(1.0)
    >>> ema.update(model, step=0)
    >>> round(ema.model.weight.item() - old, 4)  # d = 1/10 at step 0
    0.9
    """

    wraps = "model"  # see vitcourse.weights.unwrap

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        means, weights = _floats(self.model), _floats(model)
        torch._foreach_lerp_(means, weights, 1 - decay)
        for mean, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            mean.copy_(buffer)


def _floats(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]
