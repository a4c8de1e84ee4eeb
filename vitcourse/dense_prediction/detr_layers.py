"""The transformer of DETR (Carion et al. 2020, appendix A.3 and figure 10): positions join queries and keys anew in
every layer, and norms come after the branches.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from vitcourse.layers import attention, attention_weights, check_mask


def sine_positions(valid: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine positions of a map's pixels, normalised to 2π over the valid part: (B, h, w) -> (B, h · w, dim).

    The first half of the channels is for the row, sine and cosine in turns (appendix A.4).

    Args:
        valid: True for pixels of an image, False for padding.
        dim: channels, a multiple of 4.
    """
    rows, columns = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
    rows = rows / (rows[:, -1:] + 1e-6)
    columns = columns / (columns[:, :, -1:] + 1e-6)
    return sine_code(torch.stack([rows, columns], dim=-1), dim, temperature).flatten(1, 2)


def sine_code(x: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Numbers between 0 and 1, (…, n), to sines and cosines of them, (…, dim), dim / n channels each.

    Raises:
        ValueError: dim is not a multiple of 2n.

    >>> [round(v, 3) for v in sine_code(torch.tensor([0.0, 0.125]), 4).tolist()]
    [0.0, 1.0, 0.707, 0.707]
    """
    each = dim // x.shape[-1]
    if dim % (2 * x.shape[-1]):
        raise ValueError(f"embed_dim {dim} is not a multiple of {2 * x.shape[-1]}, which sine positions need")
    i = torch.arange(each // 2, device=x.device, dtype=torch.float32)
    angle = 2 * math.pi * x[..., None] / temperature ** (2 * i / each)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


class MultiheadAttention(nn.Module):
    """Attention of one set of tokens to another, positions added to queries and keys and not to values.

    With a ``recorder``, see :func:`vitcourse.vit.record_attention`, the weights (B, H, N, M) are kept.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}; every head is as wide")
        self.num_heads = num_heads
        self.recorder: list[Tensor] | None = None
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries (B, N, D), keys and values (B, M, D), a mask that (B, H, N, M) can be filled from -> (B, N, D)."""
        parts = ((self.q, query), (self.k, key), (self.v, value))
        q, k, v = (rearrange(f(x), "b n (h d) -> b h n d", h=self.num_heads) for f, x in parts)
        if self.recorder is None:
            x = attention(q, k, v, mask=mask)
        else:
            check_mask(mask, (*q.shape[:3], k.shape[2]))
            weights = attention_weights(q, k, mask=mask)
            self.recorder.append(weights)
            x = weights @ v
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class FeedForward(nn.Sequential):
    """Two linear layers with ReLU and dropout between them."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, dim))


class EncoderLayer(nn.Module):
    """Self-attention of the map's tokens, then the MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attn, self.norm1 = MultiheadAttention(dim, num_heads), nn.LayerNorm(dim)
        self.mlp, self.norm2 = FeedForward(dim, mlp_dim, dropout), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        placed = x + position
        x = self.norm1(x + self.dropout(self.self_attn(placed, placed, x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the map's tokens, then the MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attn, self.norm1 = MultiheadAttention(dim, num_heads), nn.LayerNorm(dim)
        self.cross_attn, self.norm2 = MultiheadAttention(dim, num_heads), nn.LayerNorm(dim)
        self.mlp, self.norm3 = FeedForward(dim, mlp_dim, dropout), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Queries (B, N, D) and the encoder's tokens (B, M, D), each with their positions -> (B, N, D)."""
        placed = x + position
        x = self.norm1(x + self.dropout(self.self_attn(placed, placed, x, mask)))
        found = self.cross_attn(x + position, memory + memory_position, memory, memory_mask)
        x = self.norm2(x + self.dropout(found))
        return self.norm3(x + self.dropout(self.mlp(x)))


class BoxHead(nn.Sequential):
    """Three linear layers with ReLU between them: (…, D) -> (…, 4)."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))
