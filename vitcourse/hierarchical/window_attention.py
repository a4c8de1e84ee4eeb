"""Attention inside windows, shifted or not, with relative position bias: the token mixer of Swin (Liu et al. 2021)."""

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vitcourse.hierarchical.windows import Pair, cached_relative_position_index, cached_shift_mask
from vitcourse.layers import always, at_least_two, attention, attention_weights, crop, pad_to, pad_to_multiple, to_pair
from vitcourse.vit import Grid, refuse_mask, whole_grid


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, shifted or not, with relative position bias (sec. 3.2, eq. 4).

    A token mixer, as :class:`vitcourse.vit.Attention` is: called with x (B, h · w, D) and ``grid = (h, w, 0)``.

    A map that the windows do not divide is padded with zeros on the right and below. By default the padding takes
    part in the attention: timm's models were trained and are run that way, and the logits agree. timm also rolls
    before it pads, so that on such maps some strangers from the opposite border see each other. ``mask_padding=True``
    is exact instead: each token sees the tokens of its own, displaced window and nothing else, and along an axis that
    is no longer than a window nothing is displaced.

    Args:
        dim: width D.
        num_heads: heads H, each D/H wide.
        qkv_bias: biases on the projection to queries, keys and values.
        window_size: side of a window in tokens, or (height, width).
        shift_size: by how many tokens the windows are displaced, or (rows, columns); 0 for regular windows.
        mask_padding: see above.
        backend: see :func:`vitcourse.layers.attention`.

    Raises:
        ValueError: dim is not divisible by num_heads; windows or shifts out of range; in ``forward``, prefix tokens, a
            part of the tokens, or a mask.

    >>> mixer = WindowAttention(32, num_heads=4, window_size=7, shift_size=3)
    >>> mixer(torch.zeros(2, 14 * 10, 32), (14, 10, 0)).shape
    torch.Size([2, 140, 32])
    """

    head_axes: ClassVar[dict[str, int | None]] = {"relative_position_bias_table": 1}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        window_size: int | Pair = 7,
        shift_size: int | Pair = 0,
        mask_padding: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.window_size = to_pair(window_size, "window_size")
        self.shift_size = (shift_size, shift_size) if isinstance(shift_size, int) else tuple(shift_size)
        if not all(0 <= s < w for s, w in zip(self.shift_size, self.window_size, strict=True)):
            raise ValueError(f"shift_size {shift_size!r} must be at least 0 and less than window_size {window_size!r}")
        self.mask_padding = mask_padding
        self.backend = backend
        self.recorder: list[Tensor] | None = None  # see vitcourse.vit.record_attention
        self._make_projection(dim, qkv_bias)
        self._make_position_bias()
        self.proj = nn.Linear(dim, dim)

    def _make_projection(self, dim: int, bias: bool) -> None:
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)

    def _make_position_bias(self) -> None:
        p, q = self.window_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * p - 1) * (2 * q - 1), self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side: (…, D) -> (…, 3 · D)."""
        return self.qkv(x)

    def position_bias(self, like: Tensor) -> Tensor:
        """The table spread out to all pairs of tokens in a window: (H, N, N)."""
        return self._spread(self.relative_position_bias_table, like)

    def _spread(self, table: Tensor, like: Tensor) -> Tensor:
        index = cached_relative_position_index(self.window_size, like=like)
        return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
        if self.recorder is None:
            return attention(q, k, v, scale=scale, bias=bias, backend=self.backend)
        weights = attention_weights(q, k, scale=scale, bias=bias)
        self.recorder.append(rearrange(weights, "b (w h) n m -> (b w) h n m", h=self.num_heads))
        return weights @ v

    def forward(self, x: Tensor, grid: Grid | None, mask: Tensor | None = None) -> Tensor:
        h, w, prefix = whole_grid(grid, self)
        refuse_mask(mask, self)
        if prefix:
            raise ValueError(
                f"windows have no place for {prefix} prefix tokens; build the model with class_token=False, "
                "reg_tokens=0 and global_pool='avg'"
            )
        p, r = self.window_size
        shift = self._shift_on(h, w)
        x = self._roll_and_pad(x.unflatten(1, (h, w)), shift)
        rows, columns = at_least_two(x.shape[1] // p), at_least_two(x.shape[2] // r)
        qkv = pad_to(self.project(x), (rows * p, columns * r), axes=(1, 2))
        # One copy cuts the map into windows and splits the heads.
        sizes = {"t": 3, "h": self.num_heads, "i": rows, "j": columns, "p": p, "r": r}
        q, k, v = rearrange(qkv, "b (i p) (j r) (t h d) -> t b (i j) h (p r) d", **sizes)
        bias, mask = self.position_bias(x), self._mask(h, w, shift, x)
        if mask is None:  # one bias for all windows, which therefore count as batch …
            bias, q, k, v = bias[None], q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        else:  # … or one bias for each window, which counts as a head: bias and mask are never copied along the batch
            bias = bias.masked_fill(mask[:, None], float("-inf")).flatten(0, 1)[None]
            q, k, v = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)
        batch, dim = x.shape[0], self.num_heads * q.shape[-1]
        x = self.attend(q, k, v, bias).view(batch, rows, columns, self.num_heads, p, r, q.shape[-1])
        # To one axis, then to four: a compiler that merges i and p alone asks for what it cannot prove.
        x = rearrange(x, "b i j h p r d -> (b i p j r h d)").view(batch, rows * p, columns * r, dim)
        return self.proj(self._crop_and_roll_back(x, shift, h, w).flatten(1, 2))

    def _shift_on(self, h: int, w: int) -> Pair:
        """Where padding is masked, an axis that fits into one window needs no displaced ones."""
        if not self.mask_padding:
            return self.shift_size
        sizes = zip((h, w), self.window_size, self.shift_size, strict=True)
        return tuple(s * torch.sym_min((n - 1) // p, 1) for n, p, s in sizes)  # 0 for n ≤ p, without a branch

    def _mask(self, h: int, w: int, shift: Pair, like: Tensor) -> Tensor | None:
        p, r = self.window_size
        whole = not self.mask_padding or always(h % p == 0, w % r == 0)
        if whole and always(*(s == 0 for s in shift)):
            return None
        return cached_shift_mask((h, w), self.window_size, shift, self.mask_padding, like=like)

    def _roll_and_pad(self, x: Tensor, shift: Pair) -> Tensor:
        """Bring displaced windows to where regular ones lie. Padding first keeps each of them in one piece."""
        back = (-shift[0], -shift[1])
        if self.mask_padding:
            return _roll(pad_to_multiple(x, self.window_size, axes=(1, 2)), back)
        return pad_to_multiple(_roll(x, back), self.window_size, axes=(1, 2))

    def _crop_and_roll_back(self, x: Tensor, shift: Pair, h: int, w: int) -> Tensor:
        if self.mask_padding:
            return crop(_roll(x, shift), (h, w), axes=(1, 2))
        return _roll(crop(x, (h, w), axes=(1, 2)), shift)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift_size={self.shift_size}, mask_padding={self.mask_padding}"


def _roll(x: Tensor, by: Pair) -> Tensor:
    if always(*(n == 0 for n in by)):
        return x
    if all(isinstance(n, int) for n in by):
        return torch.roll(x, by, dims=(1, 2))
    for axis, n in zip(
        (1, 2), by, strict=True
    ):  # a graph in which the shift depends on the size; ONNX has no such roll
        length = x.shape[axis]
        source = torch.arange(length, device=x.device) - n
        source = torch.where(source < 0, source + length, torch.where(source >= length, source - length, source))
        x = x.index_select(axis, source)
    return x
