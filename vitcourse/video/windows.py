"""Windows in space and time: cut, put back, who sits where in one, and who must not see whom.

What :mod:`vitcourse.hierarchical.windows` has for maps, with frames as a first axis.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from vitcourse.hierarchical.windows import once_per_size, regions

Triple = tuple[int, int, int]


def to_triple(value: int | Sequence[int], name: str) -> Triple:
    """``7`` -> ``(7, 7, 7)``; three numbers stay as they are.

    Raises:
        ValueError: not a positive integer or three of them.
    """
    triple = tuple(value) if isinstance(value, Sequence) else (value,) * 3
    if len(triple) != 3 or not all(isinstance(v, int) and v > 0 for v in triple):
        raise ValueError(f"{name} {value!r} must be a positive integer or three of them (frames, height, width)")
    return triple


def window_partition_3d(x: Tensor, window_size: int | Triple) -> Tensor:
    """Cut a map of a clip into windows that do not overlap (Liu et al. 2022, "Video Swin Transformer", sec. 3.2).

    Args:
        x: (B, T, H, W, C).
        window_size: side of a window in tokens, or (frames, height, width).

    Returns:
        (B · windows, p · q · r, C): windows, and tokens inside one, by time and in reading order.

    Raises:
        ValueError: not five axes, or a side that the window does not divide.

    >>> window_partition_3d(torch.zeros(2, 8, 14, 21, 96), (4, 7, 7)).shape
    torch.Size([24, 196, 96])
    """
    p, q, r = to_triple(window_size, "window_size")
    if x.ndim != 5:
        raise ValueError(f"x must be (B, T, H, W, C), got shape {tuple(x.shape)}")
    t, h, w = x.shape[1:4]
    if t % p or h % q or w % r:
        raise ValueError(f"a map of {t}×{h}×{w} does not divide into windows of {p}×{q}×{r}; pad it first")
    return rearrange(x, "b (i p) (j q) (k r) c -> (b i j k) (p q r) c", p=p, q=q, r=r)


def window_reverse_3d(windows: Tensor, window_size: int | Triple, size: Triple) -> Tensor:
    """The inverse of :func:`window_partition_3d`.

    Args:
        windows: (B · windows, p · q · r, C).
        window_size: side of a window in tokens, or (frames, height, width).
        size: frames T, rows H and columns W of the map.

    Returns:
        (B, T, H, W, C).

    Raises:
        ValueError: windows of another size, or a number of them that does not make up whole maps.

    >>> x = torch.rand(2, 4, 14, 21, 96)
    >>> torch.equal(window_reverse_3d(window_partition_3d(x, (2, 7, 7)), (2, 7, 7), (4, 14, 21)), x)
    True
    """
    p, q, r = to_triple(window_size, "window_size")
    i, j, k = (n // unit for n, unit in zip(size, (p, q, r), strict=True))
    whole = (i * p, j * q, k * r) == tuple(size) and i * j * k > 0
    if windows.ndim != 3 or windows.shape[1] != p * q * r or not whole or windows.shape[0] % (i * j * k):
        raise ValueError(
            f"windows of shape {tuple(windows.shape)} are not (B · {i * j * k}, {p * q * r}, C), as a map of "
            f"{size[0]}×{size[1]}×{size[2]} in windows of {p}×{q}×{r} has them"
        )
    return rearrange(windows, "(b i j k) (p q r) c -> b (i p) (j q) (k r) c", i=i, j=j, k=k, p=p, q=q)


def relative_position_index_3d(
    window_size: int | Triple,
    table_window: int | Triple | None = None,
    by_place: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """Which row of the table of relative positions each pair of tokens looks up (sec. 3.2, "Relative Position Bias").

    Along an axis of p tokens the distance of two is −p + 1 … p − 1: the table has (2p − 1) · (2q − 1) · (2r − 1) rows.

    Args:
        window_size: side of a window in tokens, or (frames, height, width).
        table_window: that of the windows that the table was made for, where it is larger.
        by_place: look up where two tokens of the smaller window really lie. The authors and torchvision take the
            first tokens of the larger window for those of the smaller one instead, which is the same only where its
            frames are whole. Their weights were trained and are run that way.
        device: where the index is wanted.

    Returns:
        (N, N) integers for N = p · q · r tokens: row of the query, column of the key.

    >>> relative_position_index_3d((2, 1, 1)), relative_position_index_3d((1, 1, 2), (1, 1, 3))
    (tensor([[1, 0],
            [2, 1]]), tensor([[2, 1],
            [3, 2]]))
    """
    window = to_triple(window_size, "window_size")
    table = window if table_window is None else to_triple(table_window, "table_window")
    places = torch.meshgrid(*(torch.arange(n, device=device) for n in (window if by_place else table)), indexing="ij")
    index = torch.zeros((), dtype=torch.long, device=device)
    for place, n in zip(places, table, strict=True):
        place = place.flatten()
        index = index * (2 * n - 1) + place[:, None] - place + n - 1
    count = window[0] * window[1] * window[2]
    return index[:count, :count]


def shift_mask_3d(
    size: Triple, window_size: Triple, shift: Triple, mask_padding: bool = False, device: torch.device | None = None
) -> Tensor:
    """Who must not see whom after a map was padded and rolled by ``shift`` (sec. 3.2, "3D Shifted Windows").

    Args:
        size: frames, rows and columns of the map, before it is padded to a multiple of the window.
        window_size: (frames, height, width) of a window.
        shift: by how many frames, rows and columns the windows are displaced.
        mask_padding: hide padding from everybody but padding.
        device: where the mask is wanted.

    Returns:
        (windows, N, N), true where the query of this row must not see the key of this column.

    >>> shift_mask_3d((4, 1, 1), (2, 1, 1), (1, 0, 0)).int()[1]  # frames 1 2 | 3 0: the last window holds two strangers
    tensor([[0, 1],
            [1, 0]], dtype=torch.int32)
    """
    axes = [regions(*sizes, mask_padding, device) for sizes in zip(size, window_size, shift, strict=True)]
    # Whoever is in one window and in one region along each axis may see each other.
    region = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (T, H, W, 3)
    p, q, r = window_size
    region = rearrange(region, "(i p) (j q) (k r) c -> (i j k) (p q r) c", p=p, q=q, r=r)
    return (region[:, :, None] != region[:, None]).any(dim=-1)


def shift_bias_3d(*sizes: object, device: torch.device | None = None) -> Tensor:
    """:func:`shift_mask_3d` to be added to scores: −∞ where it is true, else 0. On a CPU four times as fast as to fill.

    >>> shift_bias_3d((4, 1, 1), (2, 1, 1), (1, 0, 0))[1]
    tensor([[0., -inf],
            [-inf, 0.]])
    """
    mask = shift_mask_3d(*sizes, device=device)
    return torch.zeros(mask.shape, device=device).masked_fill(mask, float("-inf"))


cached_relative_position_index_3d = once_per_size(relative_position_index_3d)
cached_shift_bias_3d = once_per_size(shift_bias_3d)
