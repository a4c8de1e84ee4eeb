"""Where in time a token lies: learnt positions brought to another number of frames, and fixed ones."""

import torch
from torch import Tensor

from vitcourse.layers import always
from vitcourse.vit.positions import full_precision, sincos_2d


def linear_matrix(n_in: int, n_out: int, device: torch.device | None = None) -> Tensor:
    """The (n_out, n_in) matrix of linear resizing, equal to ``F.interpolate(mode="linear")``.

    >>> linear_matrix(2, 4)
    tensor([[1.0000, 0.0000],
            [0.7500, 0.2500],
            [0.2500, 0.7500],
            [0.0000, 1.0000]])
    """
    centre = (torch.arange(n_out, device=device)[:, None] + 0.5) * (n_in / n_out) - 0.5  # in input frames
    centre = centre.clamp(0, n_in - 1)
    return (1 - (centre - torch.arange(n_in, device=device)).abs()).clamp(min=0)


def resize_time_embed(time_embed: Tensor, frames: int, num_prefix_tokens: int = 0) -> Tensor:
    """Linear interpolation of positions in time: the same clip, seen in more or fewer frames.

    The authors of TimeSformer take the nearest position instead, and so let frames share one; transformers goes on to
    mix frames and patches where their number is not ``num_frames``.

    Args:
        time_embed: (1, prefix + T, D).
        frames: how many are wanted.
        num_prefix_tokens: leading positions that are no frame's, and stay as they are.

    Returns:
        (1, prefix + frames, D); ``time_embed`` itself where it is for so many.

    >>> resize_time_embed(torch.tensor([[[0.0], [4.0]]]), 4).flatten().tolist()
    [0.0, 1.0, 3.0, 4.0]
    """
    old = time_embed.shape[1] - num_prefix_tokens
    if always(old == frames):
        return time_embed
    with full_precision(time_embed.device.type):
        exact = torch.promote_types(time_embed.dtype, torch.float32)
        matrix = linear_matrix(old, frames, device=time_embed.device).to(exact)
        resized = matrix @ time_embed[:, num_prefix_tokens:].to(exact)
    return torch.cat([time_embed[:, :num_prefix_tokens], resized.to(time_embed.dtype)], dim=1)


def sincos_3d(t: int, h: int, w: int, dim: int, temperature: float = 10000.0) -> Tensor:
    """Fixed sine-cosine positions in time and space: half of the channels each (as in V-JEPA, Bardes et al. 2024).

    Args:
        t, h, w: moments, rows and columns.
        dim: number of channels, a multiple of 8.
        temperature: the longest wavelength is 2π times this, in tubelets.

    Returns:
        (t · h · w, dim), float32, by time and then in reading order.

    Raises:
        ValueError: dim is not a multiple of 8.

    >>> sincos_3d(8, 14, 14, 384).shape
    torch.Size([1568, 384])
    """
    if dim % 8:
        raise ValueError(f"dim {dim} is not a multiple of 8, which sine-cosine positions need in three dimensions")
    omega = temperature ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(t)[:, None] * omega
    in_time = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    in_space = sincos_2d(h, w, dim // 2, temperature)
    return torch.cat([in_time.repeat_interleave(h * w, 0), in_space.repeat(t, 1)], dim=1)
