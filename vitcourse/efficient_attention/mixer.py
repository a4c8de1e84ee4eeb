"""What the attentions of this package share: the projections of ViT's own attention, and its two ways of running."""

from abc import abstractmethod
from numbers import Integral

import torch
from torch import Tensor

from vitcourse.vit import Attention, Grid, refuse_mask


class TokenMixer(Attention):
    """A token mixer with the parameters of :class:`vitcourse.vit.Attention`, so that its weights load as they are.

    Args:
        dim: width D.
        num_heads: heads H, each D/H wide.
        qkv_bias: biases on the projection to queries, keys and values.

    Raises:
        ValueError: dim is not divisible by num_heads.
    """

    def forward(self, x: Tensor, grid: Grid | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens x (B, N, D), prefix tokens first, that lie on ``grid`` -> (B, N, D).

        Raises:
            ValueError: a mask, or a grid of None where the mixer needs one.
        """
        refuse_mask(mask, self)
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if self.recorder is None:
            x = self.mix(q, k, v, grid)
        else:  # nobody forms these weights to compute with them; whoever wants to see them pays N²
            weights = self.weights(q, k, grid)
            self.recorder.append(weights)
            x = weights @ v
        return self.proj(x.transpose(1, 2).flatten(2))

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None) -> Tensor:
        """q, k, v (B, H, N, D/H) -> (B, H, N, D/H), at the cost that the mixer is made for."""

    @abstractmethod
    def weights(self, q: Tensor, k: Tensor, grid: Grid | None) -> Tensor:
        """The definition: the matrix (B, H, N, N) that ``mix`` multiplies v with, without ever making it."""


def single(*tensors: Tensor) -> list[Tensor]:
    """Half precision as float32, anything wider as it is. To be used where autocast is switched off.

    A sum over thousands of tokens leaves the range of float16 (65 504) and the eight bits of bfloat16.
    """
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def check_counts(least: int, **counts: int) -> None:
    """Raise a ValueError that names the first argument which is no integer of at least ``least``."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < least:
            raise ValueError(f"{name} {count!r} must be an integer of at least {least}")
