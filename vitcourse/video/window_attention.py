"""Attention inside windows of space and time, shifted or not: the token mixer of Video Swin (Liu et al. 2022)."""

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vitcourse.layers import attention, attention_weights, crop, pad_to_multiple
from vitcourse.video.tubelets import ClipGrid
from vitcourse.video.windows import Triple, cached_relative_position_index_3d, cached_shift_bias_3d, to_triple
from vitcourse.vit import refuse_mask, whole_grid


class WindowAttention3d(nn.Module):
    """Multi-head self-attention inside 3-D windows, shifted or not, with relative position bias (sec. 3.2, eq. 2).

    A token mixer, called with x (B, t · h · w, D) and ``grid = (t, h, w, 0)``. Along an axis that is no longer than a
    window, the window shrinks to the map and nothing is displaced. A map that the windows do not divide is padded with
    zeros at the end of its axes, and then rolled.

    By default padding takes part in the attention, and in windows that have shrunk in rows or columns positions are
    counted as if the first tokens of a whole window were meant (see :func:`relative_position_index_3d`): the authors'
    and torchvision's models were trained and are run that way, and the logits agree. ``mask_padding=True`` is exact
    instead: each token sees the tokens of its own, displaced window and nothing else, each at its true distance.

    Args:
        dim: width D.
        num_heads: heads H, each D/H wide.
        qkv_bias: biases on the projection to queries, keys and values.
        window_size: side of a window in tokens, or (frames, height, width).
        shift_size: by how many tokens the windows are displaced, or (frames, rows, columns); 0 for regular windows.
        mask_padding: see above.
        backend: see :func:`vitcourse.layers.attention`.

    Raises:
        ValueError: dim is not divisible by num_heads; windows or shifts out of range; in ``forward``, prefix tokens, a
            part of the tokens, or a mask.

    >>> mixer = WindowAttention3d(32, num_heads=4, window_size=(2, 7, 7), shift_size=(1, 3, 3))
    >>> mixer(torch.zeros(2, 4 * 14 * 10, 32), (4, 14, 10, 0)).shape
    torch.Size([2, 560, 32])
    """

    head_axes: ClassVar[dict[str, int | None]] = {"relative_position_bias_table": 1}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        window_size: int | Triple = (8, 7, 7),
        shift_size: int | Triple = 0,
        mask_padding: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.window_size = to_triple(window_size, "window_size")
        self.shift_size = (shift_size,) * 3 if isinstance(shift_size, int) else tuple(shift_size)
        if not all(0 <= s < w for s, w in zip(self.shift_size, self.window_size, strict=True)):
            raise ValueError(f"shift_size {shift_size!r} must be at least 0 and less than window_size {window_size!r}")
        self.mask_padding = mask_padding
        self.backend = backend
        self.recorder: list[Tensor] | None = None  # see vitcourse.vit.record_attention
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        p, q, r = self.window_size
        rows = (2 * p - 1) * (2 * q - 1) * (2 * r - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def position_bias(self, window: Triple, like: Tensor) -> Tensor:
        """The table spread out to all pairs of tokens in a window of this size: (H, N, N)."""
        index = cached_relative_position_index_3d(window, self.window_size, self.mask_padding, like=like)
        return self.relative_position_bias_table.t().index_select(1, index.flatten()).unflatten(1, index.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        if self.recorder is None:
            return attention(q, k, v, bias=bias, backend=self.backend)
        weights = attention_weights(q, k, bias=bias)
        self.recorder.append(rearrange(weights, "b (w h) n m -> (b w) h n m", h=self.num_heads))
        return weights @ v

    def forward(self, x: Tensor, grid: ClipGrid | None, mask: Tensor | None = None) -> Tensor:
        *size, prefix = whole_grid(grid, self)
        refuse_mask(mask, self)
        if prefix:
            raise ValueError(f"windows have no place for {prefix} prefix tokens; leave them out")
        window, shift = self._windows_on(size)
        x = pad_to_multiple(x.unflatten(1, size), window, axes=(1, 2, 3))
        padded = x.shape[1:4] != torch.Size(size)
        sizes = dict(zip("pqr", window, strict=True))
        counts = dict(zip("ijk", (n // p for n, p in zip(x.shape[1:4], window, strict=True)), strict=True))
        # One copy cuts the map into windows and splits the heads.
        pattern = "b (i p) (j q) (k r) (three h d) -> three b (i j k) h (p q r) d"
        qkv = rearrange(self.qkv(_roll(x, shift, -1)), pattern, three=3, h=self.num_heads, **sizes)
        bias = self.position_bias(window, x)
        if any(shift) or (self.mask_padding and padded):
            # A bias for each window, which counts as a head: bias and mask are never copied along the batch.
            hidden = cached_shift_bias_3d(tuple(size), window, shift, self.mask_padding, like=x)
            bias = (bias + hidden[:, None].to(bias.dtype)).flatten(0, 1)[None]
            q, k, v = qkv.flatten(2, 3)
        else:  # one bias for all windows, which therefore count as batch
            bias = bias[None]
            q, k, v = qkv.flatten(1, 2)
        x = self.attend(q, k, v, bias).reshape(x.shape[0], -1, *q.shape[-2:])  # (B, windows · heads, N, d)
        pattern = "b (i j k h) (p q r) d -> b (i p) (j q) (k r) (h d)"
        x = rearrange(x, pattern, h=self.num_heads, **counts, **sizes)
        return self.proj(crop(_roll(x, shift, 1), size, axes=(1, 2, 3)).flatten(1, 3))

    def _windows_on(self, size: list[int]) -> tuple[Triple, Triple]:
        """Windows no larger than the map, displaced along the axes that have several of them."""
        axes = list(zip(size, self.window_size, self.shift_size, strict=True))
        return tuple(min(n, p) for n, p, _ in axes), tuple(s if n > p else 0 for n, p, s in axes)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift_size={self.shift_size}, mask_padding={self.mask_padding}"


def _roll(x: Tensor, by: Triple, sign: int) -> Tensor:
    return torch.roll(x, [sign * n for n in by], dims=(1, 2, 3)) if any(by) else x
