"""Where in time a token lies: learnt positions brought to another number of frames."""

import torch
from torch import Tensor

from vitcourse.layers import always
from vitcourse.vit.positions import full_precision


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
