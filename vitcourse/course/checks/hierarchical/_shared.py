"""What several checks of this lesson share."""

import torch
from einops import rearrange


def differ(region, window_size):
    """(H, W) numbers of a kind to (windows, N, N): who is not of one kind."""
    region = rearrange(region, "(i p) (j q) -> (i j) (p q)", p=window_size[0], q=window_size[1])
    return region[:, :, None] != region[:, None]


def wrapped(size, shift):
    """For each row, and for each column, of the rolled map: did it go around the edge?"""
    return (torch.arange(n) >= n - s for n, s in zip(size, shift, strict=True))


def mask_of(size, window_size, shift):
    """(windows, N, N): who must not see each other."""
    down, across = wrapped(size, shift)
    return differ(2 * down[:, None] + across, window_size)
