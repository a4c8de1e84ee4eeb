"""Attention whose cost is sparse: each block of patches gathers the keys that it may see, and no (N, N) matrix is made.

Prefix tokens ([CLS], registers) are global: they see all tokens, and all tokens see them. For more global tokens, give
the model registers (``reg_tokens``).
"""

import torch
from torch import Tensor

from vitcourse.efficient_attention.layouts import (
    Layout,
    block_layout,
    check_grid,
    check_window,
    layout_mask,
    local_layout,
)
from vitcourse.efficient_attention.mixer import TokenMixer, check_counts
from vitcourse.layers import attention, attention_weights
from vitcourse.vit import Grid

GATHERED_KEYS = 2**14  # of a head at a time: they fit a cache, where 2**16 took a CPU a third longer


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Softmax attention over the keys that a layout lists: O(N · K) in time, with K keys for each query.

    Long sequences are taken in pieces, so that without gradients the memory for gathered keys is bounded.

    Args:
        q: queries (B, H, N, D), prefix tokens first.
        k: keys (B, H, N, D).
        v: values (B, H, N, D_v).
        layout: who sees whom, among as many tokens.
        scale: factor on the dot products; 1/√D where None.
        backend: see :func:`vitcourse.layers.attention`.

    Returns:
        (B, H, N, D_v): what attention with the mask of :func:`layout_mask` gives.

    Raises:
        ValueError: another number of tokens than the layout is made for.

    >>> q, k, v = torch.randn(3, 2, 4, 1 + 6 * 9, 8)
    >>> sparse_attention(q, k, v, local_layout((6, 9, 1), window_size=5, block_size=4)).shape
    torch.Size([2, 4, 55, 8])
    """
    (B, H), (blocks, size), prefix = q.shape[:2], layout.queries.shape, layout.prefix
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[2] != prefix + len(layout.home):
            raise ValueError(
                f"{name} has {x.shape[2]} tokens, but the layout is for {prefix} prefix tokens and "
                f"{len(layout.home)} patches; make one for your grid"
            )

    def gather(x: Tensor, numbers: Tensor) -> Tensor:
        """(B, H, N, D) -> (B · H, blocks, tokens of a block, D)."""
        return x.index_select(2, numbers.flatten()).reshape(B * H, *numbers.shape, x.shape[-1])

    pieces = []
    at_once = max(1, GATHERED_KEYS // layout.keys.size(1))
    for queries, keys, hidden in zip(*(table.split(at_once) for table in layout[:3]), strict=True):
        gathered = gather(q, queries), gather(k, keys), gather(v, keys)
        pieces.append(attention(*gathered, scale=scale, bias=_bias(hidden, q.dtype), backend=backend))
    out = torch.cat(pieces, dim=1).reshape(B, H, blocks * size, v.shape[-1]).index_select(2, layout.home)
    if prefix == 0:
        return out
    return torch.cat([attention(q[:, :, :prefix], k, v, scale=scale, backend=backend), out], dim=2)


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)


class SparseAttention(TokenMixer):
    """A token mixer over a sparse layout; subclasses say which."""

    def layout(self, grid: Grid, device: torch.device | None = None) -> Layout:
        """Who sees whom on this grid, as tables of indices."""
        raise NotImplementedError

    def attention_mask(self, grid: Grid, device: torch.device | None = None) -> Tensor:
        """The same as a matrix (N, N), true where a query sees a key: for drawing, and for comparison."""
        return layout_mask(self.layout(grid, device))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None) -> Tensor:
        return sparse_attention(q, k, v, self.layout(_checked(grid, q.shape[2]), q.device), backend=self.backend)

    def weights(self, q: Tensor, k: Tensor, grid: Grid | None) -> Tensor:
        seen = self.attention_mask(_checked(grid, q.shape[2]), q.device)
        return attention_weights(q, k, bias=_bias(~seen, q.dtype))


def _checked(grid: Grid | None, tokens: int) -> Grid:
    if grid is None:
        raise ValueError("grid is None; sparse attention needs grid=(rows, columns, num_prefix_tokens)")
    h, w, prefix = check_grid(grid)
    if prefix + h * w != tokens:
        raise ValueError(f"grid {tuple(grid)} has {prefix} + {h}·{w} = {prefix + h * w} tokens, but x has {tokens}")
    return h, w, prefix


class LocalAttention(SparseAttention):
    """Each patch sees a square of patches around it (Parmar et al. 2018; computed as in Vaswani et al. 2021).

    Args:
        dim: width D.
        num_heads: heads H, each D/H wide.
        qkv_bias: biases on the projection to queries, keys and values.
        window_size: odd side of the square, in patches.
        block_size: side of the squares of queries that gather their keys together: changes the cost, not the result.

    Raises:
        ValueError: an even window, or sizes that are not positive; in ``forward``, a grid that does not fit the tokens.

    >>> LocalAttention(64, num_heads=4, window_size=5)(torch.zeros(2, 1 + 6 * 9, 64), (6, 9, 1)).shape
    torch.Size([2, 55, 64])
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, window_size: int = 7, block_size: int = 4
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        check_window(window_size)
        check_counts(1, block_size=block_size)
        self.window_size, self.block_size = window_size, block_size

    def layout(self, grid: Grid, device: torch.device | None = None) -> Layout:
        return local_layout(grid, self.window_size, self.block_size, device)


class RandomBlockAttention(SparseAttention):
    """Each square block of patches sees itself and a few blocks that were drawn once for all.

    Args:
        dim: width D.
        num_heads: heads H, each D/H wide.
        qkv_bias: biases on the projection to queries, keys and values.
        block_size: side of a block, in patches.
        num_random: blocks that a block sees beside itself.
        seed: of the draw, which otherwise depends on the grid alone. Layers with different seeds pass information on
            faster: ``attn_layer=lambda dim, **kw: RandomBlockAttention(dim, seed=next(counter), **kw)``.

    Raises:
        ValueError: sizes out of range; in ``forward``, a grid that does not fit the tokens.

    >>> RandomBlockAttention(64, num_heads=4)(torch.zeros(2, 1 + 6 * 9, 64), (6, 9, 1)).shape
    torch.Size([2, 55, 64])
    """

    radius = 0

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        block_size: int = 4,
        num_random: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        check_counts(1, block_size=block_size)
        check_counts(0, num_random=num_random, seed=seed)
        self.block_size, self.num_random, self.seed = block_size, num_random, seed

    def layout(self, grid: Grid, device: torch.device | None = None) -> Layout:
        return block_layout(grid, self.block_size, self.radius, self.num_random, self.seed, device)


class BigBirdAttention(RandomBlockAttention):
    """Local, random and global attention together: BigBird (Zaheer et al. 2020) on squares of patches.

    A block sees itself and the blocks around it, some random ones, and the prefix tokens, which see everything: the
    paper's BigBird-ETC, whose global tokens are extra ones.

    Args:
        dim: width D.
        num_heads: heads H, each D/H wide.
        qkv_bias: biases on the projection to queries, keys and values.
        block_size: side of a block, in patches.
        num_random: blocks that a block sees beside its neighbourhood.
        radius: how many blocks the neighbourhood reaches in every direction.
        seed: of the draw; see :class:`RandomBlockAttention`.

    Raises:
        ValueError: sizes out of range; in ``forward``, a grid that does not fit the tokens.

    >>> mixer = BigBirdAttention(64, num_heads=4, block_size=2, num_random=1)
    >>> mixer(torch.zeros(2, 1 + 6 * 9, 64), (6, 9, 1)).shape
    torch.Size([2, 55, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        block_size: int = 4,
        num_random: int = 2,
        radius: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, block_size, num_random, seed)
        check_counts(0, radius=radius)
        self.radius = radius
