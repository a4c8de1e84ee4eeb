"""Where a patch lies: fixed sine-cosine codes, and learnt ones brought to another grid."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitcourse.devices import widest_float
from vitcourse.layers import always


def sincos_2d(h: int, w: int, dim: int, temperature: float = 10000.0) -> Tensor:
    """Fixed 2-D sine-cosine positions, as in MoCo v3 (Chen et al. 2021) and MAE (He et al. 2022).

    A quarter of the channels each: sin and cos of the column, sin and cos of the row, at geometric frequencies.

    Args:
        h, w: rows and columns of patches.
        dim: number of channels, a multiple of 4.
        temperature: the longest wavelength is 2π times this, in patches.

    Returns:
        (h · w, dim), float32.

    Raises:
        ValueError: dim is not a multiple of 4.

    >>> sincos_2d(14, 14, 192).shape
    torch.Size([196, 192])
    """
    if dim % 4:
        raise ValueError(f"dim {dim} is not a multiple of 4, which sine-cosine positions need in two dimensions")
    omega = temperature ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    across, down = columns.reshape(-1, 1) * omega, rows.reshape(-1, 1) * omega
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1).float()


def resize_matrix(n_in: int, n_out: int, *, antialias: bool = True, device: torch.device | None = None) -> Tensor:
    """The (n_out, n_in) matrix of bicubic resizing along one axis, equal to ``F.interpolate(mode="bicubic")``.

    Bicubic resizing is linear and separable, so a map is resized by two matrix products, rows then columns. They
    trace into one graph for all sizes, which ``interpolate`` with its size argument does not.

    Args:
        n_in, n_out: lengths before and after.
        antialias: widen the filter when shrinking, and use the a = −½ kernel, as PIL does; otherwise a = −¾, as
            PyTorch does by default.

    Returns:
        (n_out, n_in), in double precision where the device has it.
    """
    ratio = n_in / n_out
    dtype = widest_float(device)
    centre = (torch.arange(n_out, device=device, dtype=dtype)[:, None] + 0.5) * ratio - 0.5  # in input pixels
    if antialias:
        stretch = torch.sym_max(n_in, n_out) / n_out  # max(ratio, 1), without a branch that binds a graph to one side
        weight = _cubic((torch.arange(n_in, device=device) - centre) / stretch, a=-0.5)
        weight = weight / weight.sum(dim=1, keepdim=True)  # what the filter loses beyond the border is shared out
    else:
        wide = _cubic(torch.arange(-2, n_in + 2, device=device) - centre, a=-0.75)  # two pixels beyond either border …
        edge = torch.arange(-2, n_in + 2, device=device).clamp(0, n_in - 1)
        weight = wide @ F.one_hot(edge, n_in).to(wide)  # … repeat the outermost pixel
    return weight


def _cubic(x: Tensor, a: float) -> Tensor:
    """The cubic convolution kernel (Keys 1981, eq. 4), zero from |x| = 2 on."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is made here may be used in training later
def _cached_resize_matrix(n_in: int, n_out: int, antialias: bool, device: torch.device) -> Tensor:
    return resize_matrix(n_in, n_out, antialias=antialias, device=device)


def full_precision(device_type: str) -> AbstractContextManager:
    """Autocast off. ``meta`` tensors have none; torch 2.11 cannot ask a device about that inside of a graph."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def resize_pos_embed(
    pos_embed: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    antialias: bool = True,
) -> Tensor:
    """Bicubic interpolation of position embeddings to another grid of patches, of any aspect ratio.

    Args:
        pos_embed: (1, prefix + h · w, D).
        old_grid: rows and columns of patches that ``pos_embed`` was made for.
        new_grid: rows and columns wanted.
        num_prefix_tokens: leading positions ([CLS], registers) that are no part of the grid and stay as they are.
        antialias: as timm does; see :func:`resize_matrix`.

    Returns:
        (1, prefix + h' · w', D).

    Raises:
        ValueError: ``pos_embed`` does not have the length that ``old_grid`` says.

    >>> resize_pos_embed(torch.zeros(1, 1 + 14 * 14, 8), (14, 14), (10, 24), num_prefix_tokens=1).shape
    torch.Size([1, 241, 8])
    """
    if pos_embed.shape[1] != num_prefix_tokens + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"pos_embed has {pos_embed.shape[1]} positions, but old_grid {tuple(old_grid)} with "
            f"{num_prefix_tokens} prefix tokens has {num_prefix_tokens + old_grid[0] * old_grid[1]}"
        )
    if always(*(a == b for a, b in zip(old_grid, new_grid, strict=True))):
        return pos_embed
    traced = torch.compiler.is_compiling() or type(pos_embed) not in (Tensor, nn.Parameter)  # what is fake, do not keep
    matrix = resize_matrix if traced else _cached_resize_matrix
    rows, columns = (
        matrix(n_in, n_out, antialias=antialias, device=pos_embed.device)
        for n_in, n_out in zip(old_grid, new_grid, strict=True)
    )
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    with full_precision(pos_embed.device.type):
        exact = torch.promote_types(patches.dtype, torch.float32)
        grid = rearrange(patches.to(exact), "1 (h w) d -> h w d", h=old_grid[0])
        wide = torch.bmm(columns.to(exact).expand(old_grid[0], -1, -1), grid)  # (h, x, d)
        resized = torch.bmm(rows.to(exact).expand(new_grid[1], -1, -1), wide.transpose(0, 1))  # (x, y, d)
    resized = rearrange(resized.to(prefix.dtype), "x y d -> 1 (y x) d")
    return torch.cat([prefix, resized], dim=1)


def size_of_source(facts: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the images that a checkpoint was trained on: the caller's word, or what its model says."""
    return facts.get("source_img_size") or facts.get("img_size")


def grid_of_checkpoint(
    count: int, own: tuple[int, int], known: tuple[int, int] | None, what: str, sure: bool = False
) -> tuple[int, int] | None:
    """Rows and columns of a table that comes with a checkpoint.

    Args:
        count: positions in the table.
        own: rows and columns that the model has.
        known: those that the checkpoint's model or file tells, or the caller.
        what: the table's name.
        sure: whether the table must have the known rows and columns.

    Returns:
        rows and columns; None where the table cannot be of such a model, so that shapes will tell what differs.

    Raises:
        ValueError: nobody knows, and the model is not square, so that the table may or may not be; another count than
            the sure one.

    >>> grid_of_checkpoint(196, (24, 24), None, "pos_embed")
    (14, 14)
    """
    if known is not None:
        if known[0] * known[1] == count:
            return known
        if sure:
            raise ValueError(
                f"{what} of the weights has {count} positions, and source_img_size makes {known[0]}×{known[1]} of them"
            )
        return None
    side = isqrt(count)
    if own[0] == own[1] or count == 1:
        return (side, side) if side * side == count else None
    if count == own[0] * own[1] or side * side == count:
        raise ValueError(
            f"{what} of the weights has {count} positions, and nothing says of how many rows and columns: "
            f"{own[0]}×{own[1]}, as in the model, is not the only reading; say of what size the images were: "
            "load_weights(…, source_img_size=(height, width))"
        )
    return None


def fit_pos_embed(
    pos_embed: Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    num_prefix_tokens: int,
    facts: Mapping[str, Any],
) -> Tensor:
    """The positions (1, prefix + N, D) of a checkpoint on a model's grid of patches, where they can be of another.

    Args:
        pos_embed: the checkpoint's.
        grid_size, patch_size: the model's.
        num_prefix_tokens: leading positions that are no patch's.
        facts: what else is known of the checkpoint; see :func:`size_of_source`.

    Raises:
        ValueError: the positions could be those of several grids.
    """
    size = size_of_source(facts)
    known = size and (-(-size[0] // patch_size[0]), -(-size[1] // patch_size[1]))
    count, sure = pos_embed.shape[1] - num_prefix_tokens, "source_img_size" in facts
    grid = grid_of_checkpoint(count, grid_size, known, "pos_embed", sure)
    return pos_embed if grid is None else resize_pos_embed(pos_embed, grid, grid_size, num_prefix_tokens)
