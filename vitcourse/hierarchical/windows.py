"""Windows on a map: cut, put back, who sits where in one, and who must not see whom.

The tables here depend on sizes alone. Each is made once per size and device, and shared by all blocks.
"""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vitcourse.layers import at_least_two, to_pair, units_in

Pair = tuple[int, int]


def window_partition(x: Tensor, window_size: int | Pair) -> Tensor:
    """Cut a map into windows that do not overlap (Liu et al. 2021, sec. 3.2).

    Args:
        x: (B, H, W, C).
        window_size: side of a window in tokens, or (height, width).

    Returns:
        (B · windows, p · q, C): windows, and tokens inside one, in reading order.

    Raises:
        ValueError: not four axes, or a side that the window does not divide.

    >>> window_partition(torch.zeros(2, 14, 21, 96), 7).shape
    torch.Size([12, 49, 96])
    """
    p, q = to_pair(window_size, "window_size")
    if x.ndim != 4:
        raise ValueError(f"x must be (B, H, W, C), got shape {tuple(x.shape)}")
    if x.shape[1] % p or x.shape[2] % q:
        raise ValueError(f"a map of {x.shape[1]}×{x.shape[2]} does not divide into windows of {p}×{q}; pad it first")
    return rearrange(x, "b (i p) (j q) c -> (b i j) (p q) c", p=p, q=q)


def window_reverse(windows: Tensor, window_size: int | Pair, size: Pair) -> Tensor:
    """The inverse of :func:`window_partition`.

    Args:
        windows: (B · windows, p · q, C).
        window_size: side of a window in tokens, or (height, width).
        size: rows H and columns W of the map.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: windows of another size, or a number of them that does not make up whole maps.

    >>> x = torch.rand(2, 14, 21, 96)
    >>> torch.equal(window_reverse(window_partition(x, 7), 7, (14, 21)), x)
    True
    """
    p, q = to_pair(window_size, "window_size")
    i, j = size[0] // p, size[1] // q
    whole = (i * p, j * q) == tuple(size) and i * j > 0
    if windows.ndim != 3 or windows.shape[1] != p * q or not whole or windows.shape[0] % (i * j):
        raise ValueError(
            f"windows of shape {tuple(windows.shape)} are not (B · {i * j}, {p * q}, C), "
            f"as a map of {size[0]}×{size[1]} in windows of {p}×{q} has them"
        )
    return rearrange(windows, "(b i j) (p q) c -> b (i p) (j q) c", i=i, j=j, p=p)


def once_per_size(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Remember what ``build(*sizes, device)`` returned.

    Where a graph is traced, the table becomes part of the graph instead: remembering one of the tracer's stand-ins
    would hand it to real inputs later.
    """
    remember = lru_cache(maxsize=128)(build)

    @wraps(build)
    def look_up(*sizes: object, like: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(like) is not Tensor:
            return build(*sizes, device=like.device)
        with torch.inference_mode(False):  # training may want the same table later
            return remember(*sizes, device=like.device)

    return look_up


def relative_position_index(window_size: int | Pair, device: torch.device | None = None) -> Tensor:
    """Which row of the table of relative positions each pair of tokens looks up (sec. 3.2, "Relative position bias").

    Along an axis of p tokens the distance of two is −p + 1 … p − 1, so the table has (2p − 1) · (2q − 1) rows.

    Args:
        window_size: side of a window in tokens, or (height, width).
        device: where the index is wanted.

    Returns:
        (N, N) integers for N = p · q tokens: row of the query, column of the key.

    >>> relative_position_index((1, 3))
    tensor([[2, 1, 0],
            [3, 2, 1],
            [4, 3, 2]])
    """
    p, q = to_pair(window_size, "window_size")
    rows, columns = (t.flatten() for t in _grid(torch.arange(p, device=device), torch.arange(q, device=device)))
    down = rows[:, None] - rows + p - 1  # from 0 on
    across = columns[:, None] - columns + q - 1
    return down * (2 * q - 1) + across


def shift_mask(
    size: Pair, window_size: Pair, shift: Pair, mask_padding: bool = False, device: torch.device | None = None
) -> Tensor:
    """Who must not see whom after a map was padded and rolled by ``shift`` (sec. 3.2 and fig. 4).

    Displaced windows cut the map at ``shift``, ``shift + window`` and so on, which leaves narrower windows at the
    borders. The roll packs the narrow ones of opposite borders into one full window, where they are strangers.

    Args:
        size: rows and columns of the map, before it is padded to a multiple of the window.
        window_size: (height, width) of a window.
        shift: by how many rows and columns the windows are displaced.
        mask_padding: hide padding from everybody but padding.
        device: where the mask is wanted.

    Returns:
        (windows, N, N), true where the query of this row must not see the key of this column.

    >>> shift_mask((1, 4), (1, 2), (0, 1)).int()  # columns 1 2 | 3 0: the last window holds two strangers
    tensor([[[0, 0],
             [0, 0]],
    <BLANKLINE>
            [[0, 1],
             [1, 0]]], dtype=torch.int32)
    """
    rows, columns = (
        regions(n, window, by, mask_padding, device) for n, window, by in zip(size, window_size, shift, strict=True)
    )
    region = torch.stack(_grid(rows, columns), dim=-1)  # (H, W, 2)
    region = window_partition(region[None], window_size)  # (windows, N, 2)
    return (region[:, :, None] != region[:, None]).any(dim=-1)


def regions(n: int, window: int, shift: int, mask_padding: bool, device: torch.device | None) -> Tensor:
    """For each row of the padded, rolled map, the number of the displaced window that it belongs to."""
    count = units_in(n, window)
    place = torch.arange(count * window, device=device)
    rolled = place + shift >= count * window  # from the beginning of the map, which lies before the first cut
    region = place.div(window, rounding_mode="floor").masked_fill(rolled, -1)
    if mask_padding:
        origin = torch.where(rolled, place + shift - count * window, place + shift)  # the roll brings this row here
        region = region.masked_fill(origin >= n, -2)
    return F.pad(region, (0, (at_least_two(count) - count) * window))


def _grid(rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    return torch.meshgrid(rows, columns, indexing="ij")


cached_relative_position_index = once_per_size(relative_position_index)
cached_shift_mask = once_per_size(shift_mask)
