"""Modules that several model families share, how they start, and what every model asks of its input."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that count: (B, N, D) and a boolean mask (B, N) -> (B, D).

    Raises:
        TypeError, ValueError: another type or shape of the mask.

    >>> masked_mean(torch.tensor([[[1.0], [2.0], [9.0]]]), torch.tensor([[True, True, False]]))
    tensor([[1.5000]])
    """
    if mask is None:
        return x.mean(dim=1)
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise (TypeError if mask.dtype != torch.bool else ValueError)(
            f"mask must be boolean (B, N) = {tuple(x.shape[:2])}, got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    # Where, not times: what is not to count may be NaN.
    return x.masked_fill(~mask[..., None], 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


class Mlp(nn.Module):
    """Two linear layers with a non-linearity between them: (…, D) -> (…, D).

    Args:
        dim: width D of the input and, unless ``out_dim`` is given, of the output.
        hidden_dim: width between the two layers.
        act_layer: the non-linearity; GELU, as in ViT.
        drop: dropout probability after each layer.
        out_dim: width of the output.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, dim if out_dim is None else out_dim)
        self.drop = nn.Dropout(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, skip the branch for a random part of the batch.

    The survivors are scaled by 1/(1 − p), so the expectation is unchanged.

    Args:
        p: probability that a sample skips the branch, 0 ≤ p < 1.

    Raises:
        ValueError: p outside [0, 1).
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"drop path probability {p} is outside [0, 1)")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class LayerScale(nn.Module):
    """A learnt factor per channel on a residual branch, small at first (Touvron et al. 2021, CaiT, eq. 3)."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def init_linear(module: nn.Module) -> None:
    """ViT's initial weights for linear layers: truncated normal of σ = 0.02, biases zero. For ``module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth grows linearly with depth, from 0 at the first block to ``rate`` at the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def check_images(x: Tensor, in_chans: int) -> None:
    """What every model asks of its input.

    Raises:
        ValueError: not (B, in_chans, H, W).
        TypeError: not floating point.
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images must be (B, {in_chans}, H, W), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"images must be floating point, got {x.dtype}; scale to [0, 1] and normalise them first")


def widened(x: Tensor) -> Tensor:
    """float32 of what is narrower; float64 stays: what a loss computes with.

    >>> widened(torch.zeros(1, dtype=torch.bfloat16)).dtype, widened(torch.zeros(1, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
