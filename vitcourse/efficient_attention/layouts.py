"""Who attends to whom on the grid of patches, as tables of indices: what makes the cost of attention sparse.

Queries are taken in blocks of neighbouring patches, and each block gets a list of keys. The tables depend on sizes
alone: they are made once for each grid and device, and shared by all layers (:mod:`.tables`).
"""

from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitcourse.efficient_attention.mixer import check_counts
from vitcourse.efficient_attention.tables import concrete, shared
from vitcourse.vit import Grid

Coordinates = tuple[np.ndarray, np.ndarray]  # rows and columns


class Layout(NamedTuple):
    """A sparse pattern over P prefix tokens and h · w patches, which are numbered together, prefix tokens first.

    Every query of a block sees the keys of its block, but for those that are hidden from it. Prefix tokens see all.

    Attributes:
        queries: (blocks, Q) numbers of tokens. Where a block reaches over the edge of the grid, a patch is repeated.
        keys: (blocks, K) numbers of tokens; some are fillers, and hidden.
        hidden: (blocks, Q, K), true where a query must not see a key; (blocks, 1, K) where all of a block see the same.
        home: (h · w) where each patch is found among the queries, counted through all blocks.
        prefix: P.
    """

    queries: Tensor
    keys: Tensor
    hidden: Tensor
    home: Tensor
    prefix: int


def layout_mask(layout: Layout) -> Tensor:
    """The pattern as a matrix, to look at and to test with: it has N² entries, which the computation never makes.

    Returns:
        (N, N), true where the query of this row sees the key of this column.

    >>> layout_mask(local_layout((1, 5, 0), 3, 2)).int()
    tensor([[1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 1],
            [0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    seen = (~layout.hidden).expand(-1, layout.queries.shape[1], -1).flatten(0, 1)[layout.home]  # (h w, K)
    keys = layout.keys.repeat_interleave(layout.queries.shape[1], 0)[layout.home]
    n = layout.prefix + len(layout.home)
    mask = torch.ones(n, n, dtype=torch.bool, device=keys.device)
    mask[layout.prefix :] = False
    rows = torch.arange(layout.prefix, n, device=keys.device)[:, None].expand_as(keys)
    mask[rows[seen], keys[seen]] = True
    return mask


def neighbourhood_mask(grid: Grid, window_size: int) -> Tensor:
    """Who sees whom in local attention, straight from the definition.

    Args:
        grid: rows and columns of patches, and the number of prefix tokens, which see all and are seen by all.
        window_size: odd side of the square around a patch; at the border of the grid the square is cut off.

    Returns:
        (N, N), true where the query of this row sees the key of this column.

    Raises:
        ValueError: a window that is not odd and positive, or a grid without patches.

    >>> neighbourhood_mask((1, 3, 1), 3).int()
    tensor([[1, 1, 1, 1],
            [1, 1, 1, 0],
            [1, 1, 1, 1],
            [1, 0, 1, 1]], dtype=torch.int32)
    """
    check_window(window_size)
    h, w, prefix = check_grid(grid)
    place = torch.cartesian_prod(torch.arange(h), torch.arange(w))  # (h w, 2)
    near = (place[:, None] - place).abs().amax(dim=-1) <= window_size // 2
    mask = torch.ones(prefix + h * w, prefix + h * w, dtype=torch.bool)
    mask[prefix:, prefix:] = near
    return mask


def check_window(window_size: int) -> None:
    if not isinstance(window_size, Integral) or window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size {window_size!r} must be odd and positive, so that a patch is in the middle")


def check_grid(grid: Grid) -> Grid:
    """The grid as a tuple of three ints."""
    h, w, prefix = concrete(grid)
    if h < 1 or w < 1 or prefix < 0:
        raise ValueError(f"grid {tuple(grid)} needs at least one row and one column of patches, and no negative prefix")
    return h, w, prefix


# ---------------------------------------------------------------------------------------------------------- patterns


def local_layout(grid: Grid, window_size: int, block_size: int, device: torch.device | None = None) -> Layout:
    """Each patch sees the ``window_size`` × ``window_size`` patches around it, as far as the grid reaches.

    A block of queries gathers the square that holds all their neighbourhoods (the "halo" of Vaswani et al. 2021,
    "Scaling Local Self-Attention", sec. 2.1), and hides from each query what lies outside its own.

    Args:
        grid: rows and columns of patches, and the number of prefix tokens.
        window_size: odd side of the neighbourhood.
        block_size: side of a block of queries.
        device: where the tables are wanted.

    Raises:
        ValueError: a window that is not odd, sizes that are not positive, or a grid without patches.
    """
    check_window(window_size)
    check_counts(1, block_size=block_size)
    grid = check_grid(grid)
    return Layout(*_local(device, grid, window_size, block_size), prefix=grid[2])


def block_layout(
    grid: Grid, block_size: int, radius: int, num_random: int, seed: int, device: torch.device | None = None
) -> Layout:
    """Each block sees the blocks up to ``radius`` away, itself among them, and ``num_random`` others.

    The local and random parts of BigBird (Zaheer et al. 2020, sec. 2), with squares of patches for stretches of text.

    Args:
        grid: rows and columns of patches, and the number of prefix tokens.
        block_size: side of a block.
        radius: 0 for no neighbours but the block itself, 1 for the eight around it, and so on.
        num_random: others, drawn without repetition, as far as there are any.
        seed: of the draw.
        device: where the tables are wanted.

    Raises:
        ValueError: sizes out of range, or a grid without patches.
    """
    check_counts(1, block_size=block_size)
    check_counts(0, radius=radius, num_random=num_random, seed=seed)
    grid = check_grid(grid)
    return Layout(*_blocks(device, grid, block_size, radius, num_random, seed), prefix=grid[2])


@shared
def _local(grid: Grid, window_size: int, block_size: int) -> tuple[np.ndarray, ...]:
    h, w, prefix = grid
    radius = window_size // 2
    queries = _squares(grid, block_size, 0)
    keys = _squares(grid, block_size, radius)
    places = [np.clip(axis, 0, n - 1) for axis, n in zip(queries, (h, w), strict=True)]
    far = [abs(a[:, :, None] - b[:, None]) > radius for a, b in zip(places, keys, strict=True)]
    return _tables(grid, queries, keys, hidden=far[0] | far[1])


@shared
def _blocks(grid: Grid, block_size: int, radius: int, num_random: int, seed: int) -> tuple[np.ndarray, ...]:
    h, w, _ = grid
    rows, columns = -(-h // block_size), -(-w // block_size)
    chosen = _random_blocks(rows, columns, radius, num_random, seed)
    queries = _squares(grid, block_size, 0)
    # A filler, block −1, is a square of patches that do not exist.
    outside = [np.concatenate([axis, np.full_like(axis[:1], -1)]) for axis in queries]
    keys = tuple(axis[chosen].reshape(len(chosen), -1) for axis in outside)
    return _tables(grid, queries, keys, hidden=np.zeros((1, 1, 1), dtype=bool))


def _random_blocks(rows: int, columns: int, radius: int, num_random: int, seed: int) -> np.ndarray:
    """For each block the blocks that it sees, neighbours first, filled up with −1: (rows · columns, …)."""
    rng = np.random.RandomState(seed)  # its stream is frozen for good: a saved model finds its pattern again
    lists = []
    for i in range(rows):
        for j in range(columns):
            near = [
                y * columns + x
                for y in range(max(i - radius, 0), min(i + radius + 1, rows))
                for x in range(max(j - radius, 0), min(j + radius + 1, columns))
            ]
            wanted = min(len(near) + num_random, rows * columns)
            while len(near) < wanted:
                other = rng.randint(rows * columns)
                if other not in near:
                    near.append(other)
            lists.append(near)
    longest = max(map(len, lists))
    return np.array([near + [-1] * (longest - len(near)) for near in lists])


def _squares(grid: Grid, block_size: int, margin: int) -> Coordinates:
    """Rows and columns of the patches of each block with a margin around it, (blocks, (p + 2 · margin)²) each.

    Some lie outside the grid.
    """
    h, w, _ = grid
    inner = np.arange(-margin, block_size + margin)
    tops, lefts = (np.arange(0, n, block_size) for n in (h, w))
    shape = (len(tops), len(lefts), len(inner), len(inner))
    rows = np.broadcast_to((tops[:, None] + inner)[:, None, :, None], shape)
    columns = np.broadcast_to((lefts[:, None] + inner)[None, :, None, :], shape)
    return tuple(axis.reshape(len(tops) * len(lefts), -1) for axis in (rows, columns))


def _tables(grid: Grid, queries: Coordinates, keys: Coordinates, hidden: np.ndarray) -> tuple[np.ndarray, ...]:
    """The four tables of a layout. Prefix tokens join the keys of every block; what is outside the grid is hidden."""
    h, w, prefix = grid
    query_numbers = _numbers(grid, queries)
    blocks = len(query_numbers)
    patches = np.flatnonzero(_inside(grid, queries))  # places of real patches among the queries
    home = np.empty(h * w, dtype=np.int64)
    home[query_numbers.ravel()[patches] - prefix] = patches
    key_numbers = np.concatenate([np.tile(np.arange(prefix), (blocks, 1)), _numbers(grid, keys)], axis=1)
    hidden = hidden | ~_inside(grid, keys)[:, None]
    hidden = np.concatenate([np.zeros((*hidden.shape[:2], prefix), dtype=bool), hidden], axis=2)
    return query_numbers, key_numbers, hidden, home


def _inside(grid: Grid, places: Coordinates) -> np.ndarray:
    rows, columns = places
    return (rows >= 0) & (rows < grid[0]) & (columns >= 0) & (columns < grid[1])


def _numbers(grid: Grid, places: Coordinates) -> np.ndarray:
    """Numbers of the tokens at these places; those outside the grid get that of the nearest patch."""
    h, w, prefix = grid
    rows, columns = places
    return prefix + np.clip(rows, 0, h - 1) * w + np.clip(columns, 0, w - 1)
