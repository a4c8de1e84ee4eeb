"""What Swin V2 changes (Liu et al. 2022, "Scaling Up Capacity and Resolution", fig. 1): what keeps large models stable.

Built as ``SwinTransformer(attn_layer=CosineWindowAttention, block_layer=PostNormBlock, merge_layer=PostNormMerging)``.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcourse.hierarchical.swin import PatchMerging, SwinBlock
from vitcourse.hierarchical.window_attention import WindowAttention
from vitcourse.hierarchical.windows import Pair, once_per_size
from vitcourse.vit import Grid


def log_spaced_offsets(
    window_size: Pair, pretrained_window_size: Pair | None = None, device: torch.device | None = None
) -> Tensor:
    """All distances inside a window on a logarithmic scale (sec. 3.3, eq. 4).

    Distance d is ±log₈(1 + 8 |d| / (n − 1)), where n is the length of the window that the bias was trained for: what it
    learnt of a distance then holds in a larger window too.

    Args:
        window_size: (height, width) in tokens.
        pretrained_window_size: the same in pre-training; ``window_size`` where None.
        device: where the offsets are wanted.

    Returns:
        ((2p − 1) · (2q − 1), 2) rows and columns, in the order of :func:`relative_position_index`.

    >>> log_spaced_offsets((1, 3))[:, 1]
    tensor([-1.0566, -0.7740,  0.0000,  0.7740,  1.0566])
    """
    axes = []
    for n, trained in zip(window_size, pretrained_window_size or window_size, strict=True):
        distance = torch.arange(1 - n, n, device=device, dtype=torch.float32) * (8 / max(trained - 1, 1))
        axes.append(distance.sign() * distance.abs().log1p() / math.log(8))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


cached_log_spaced_offsets = once_per_size(log_spaced_offsets)


class CosineWindowAttention(WindowAttention):
    """Window attention by cosine similarity (sec. 3.2, eq. 2), its bias a function of the distance (sec. 3.3, eq. 3).

    Scores are cos(q, k) / τ with a learnt τ of at least 0.01 for each head (``logit_scale`` is −log τ), so no pair of
    tokens can dominate the others. The bias comes from a small MLP on log-spaced distances, which carries over to
    windows of another size; it lies between 0 and 16. Keys have no bias.

    Args:
        pretrained_window_size: window that the MLP was trained for, if another; see :func:`log_spaced_offsets`.
        args, kwargs: those of :class:`WindowAttention`.
    """

    head_axes: ClassVar[dict[str, int | None]] = {
        "logit_scale": 0,
        "q_bias": 0,
        "v_bias": 0,
        "cpb_mlp.0": None,
        "cpb_mlp.2": 0,
    }

    def __init__(self, *args: Any, pretrained_window_size: Pair | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pretrained_window_size = self.built_for = pretrained_window_size

    def adopt(self, window_size: Pair | None) -> None:
        """Count offsets in this window, the one that loaded weights were trained with; None if they do not tell."""
        told = self.built_for if window_size is None else tuple(window_size)
        self.pretrained_window_size = None if told == self.window_size else told

    def _make_projection(self, dim: int, bias: bool) -> None:
        self.logit_scale = nn.Parameter(torch.full((self.num_heads, 1, 1), math.log(10)))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def _make_position_bias(self) -> None:
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, self.num_heads, bias=False))

    def project(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.qkv(x).add_(bias)  # in place, so that it stays in the type of autocast

    def position_bias(self, like: Tensor) -> Tensor:
        offsets = cached_log_spaced_offsets(self.window_size, self.pretrained_window_size, like=like)
        offsets = offsets.to(self.logit_scale.dtype)
        return self._spread(16 * self.cpb_mlp(offsets).sigmoid(), like)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
        # Windows may be counted among the heads: then the heads' scales repeat, window after window.
        factor = self.logit_scale.clamp(max=math.log(100)).exp().repeat(q.shape[1] // self.num_heads, 1, 1)
        return super().attend(F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), v, bias, scale=1.0)


class PostNormBlock(SwinBlock):
    """A block that normalises what a branch returns, not what it is given (sec. 3.2, "res-post-norm").

    The norms start at zero, so each block starts as the identity.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        nn.init.zeros_(self.norm1.weight)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor, grid: Grid | None, mask: Tensor | None = None) -> Tensor:
        mixed = self.attn(x, grid) if mask is None else self.attn(x, grid, mask)
        x = x + self.drop_path(self.norm1(mixed))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class PostNormMerging(PatchMerging):
    """Patch merging that projects first and normalises after."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(self.gather(x)))
