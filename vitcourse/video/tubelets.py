"""Clips to tubelets and back, tubelets to vectors, and filters of images made into filters of clips."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vitcourse.layers import to_pair

ClipGrid = tuple[int, int, int, int]  # frames (of tubelets), rows, columns, then the number of prefix tokens
INFLATIONS = ("centre", "mean")


def check_clips(x: Tensor, in_chans: int) -> None:
    """What every model asks of its clips.

    Raises:
        ValueError: not (B, in_chans, T, H, W).
        TypeError: not floating point.
    """
    if x.ndim == 4:
        raise ValueError(
            f"clips must be (B, {in_chans}, T, H, W), got shape {tuple(x.shape)}; of images make clips of one frame: "
            "x[:, :, None], of one clip a batch: x[None]"
        )
    if x.ndim != 5 or x.shape[1] != in_chans:
        frames_first = x.ndim == 5 and x.shape[2] == in_chans
        remedy = "; frames come after the channels: x.transpose(1, 2)" if frames_first else ""
        raise ValueError(f"clips must be (B, {in_chans}, T, H, W), got shape {tuple(x.shape)}{remedy}")
    if not x.is_floating_point():
        raise TypeError(f"clips must be floating point, got {x.dtype}; scale to [0, 1] and normalise them first")


def check_divides(size: Sequence[int], tubelet_size: int, patch_size: tuple[int, int]) -> None:
    """Raise ValueError unless tubelets divide clips of this size (T, H, W)."""
    names = ("num_frames", "img_size", "img_size"), ("tubelet_size", "patch_size", "patch_size")
    for length, unit, whole, part in zip(size, (tubelet_size, *patch_size), *names, strict=True):
        if length % unit or length == 0:
            low = length // unit * unit
            options = f"{low} or {low + unit}" if low else f"{unit}"
            raise ValueError(f"{whole} {length} is not divisible by {part} {unit}; use {options}")


def clip_to_tubelets(x: Tensor, tubelet_size: int, patch_size: int | tuple[int, int]) -> Tensor:
    """Cut clips into tubelets that do not overlap, and flatten each (Arnab et al. 2021, sec. 3.2, "Tubelet embedding").

    Args:
        x: clips (B, C, T, H, W).
        tubelet_size: frames t of a tubelet.
        patch_size: side of a tubelet in pixels, or (height, width).

    Returns:
        (B, T/t · H/p · W/p, t · p · p · C): tubelets by time, then in reading order; inside one, channels run fastest.

    Raises:
        ValueError: not five axes, or one that the tubelet does not divide.

    >>> clip_to_tubelets(torch.zeros(2, 3, 16, 224, 224), 2, 16).shape
    torch.Size([2, 1568, 1536])
    """
    p, q = to_pair(patch_size, "patch_size")
    if x.ndim != 5:
        raise ValueError(f"clips must be (B, C, T, H, W), got shape {tuple(x.shape)}")
    check_divides(x.shape[2:], tubelet_size, (p, q))
    return rearrange(x, "b c (t s) (h p) (w q) -> b (t h w) (s p q c)", s=tubelet_size, p=p, q=q)


def tubelets_to_clip(
    tubelets: Tensor, tubelet_size: int, patch_size: int | tuple[int, int], grid: tuple[int, int, int]
) -> Tensor:
    """The inverse of :func:`clip_to_tubelets`.

    Args:
        tubelets: (B, t · h · w, s · p · p · C).
        tubelet_size: frames s of a tubelet.
        patch_size: side of a tubelet in pixels, or (height, width).
        grid: tubelets along time, rows and columns.

    Returns:
        clips (B, C, t · s, h · p, w · p).

    Raises:
        ValueError: shapes that do not fit the grid or the tubelet.

    >>> clip = torch.rand(1, 3, 4, 32, 48)
    >>> torch.equal(tubelets_to_clip(clip_to_tubelets(clip, 2, 16), 2, 16, (2, 2, 3)), clip)
    True
    """
    p, q = to_pair(patch_size, "patch_size")
    t, h, w = grid
    size = tubelet_size * p * q
    if tubelets.ndim != 3 or tubelets.shape[1] != t * h * w or tubelets.shape[2] % size:
        raise ValueError(
            f"tubelets of shape {tuple(tubelets.shape)} are not (B, {t * h * w}, {size} · C) for a {t}×{h}×{w} grid of "
            f"{tubelet_size}×{p}×{q} tubelets"
        )
    sizes = {"t": t, "h": h, "w": w, "s": tubelet_size, "p": p, "q": q}
    return rearrange(tubelets, "b (t h w) (s p q c) -> b c (t s) (h p) (w q)", **sizes)


class TubeletEmbed(nn.Module):
    """Tubelets to vectors by one strided convolution: (B, C, T, H, W) -> (B, D, T/t, H/p, W/p).

    With ``tubelet_size`` 1 it is ViT's patch embedding, frame by frame (Arnab et al. 2021, sec. 3.2, figures 2 and 3).

    >>> TubeletEmbed(2, 16, in_chans=3, embed_dim=192)(torch.zeros(1, 3, 8, 64, 64)).shape
    torch.Size([1, 192, 4, 4, 4])
    """

    def __init__(
        self,
        tubelet_size: int = 2,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        self.tubelet_size, self.patch_size = tubelet_size, to_pair(patch_size, "patch_size")
        size = (tubelet_size, *self.patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def inflate_weight(weight: Tensor, tubelet_size: int, how: str = "centre") -> Tensor:
    """Filters of images as filters of clips, which say of a still clip what the image's filters say of the image.

    Args:
        weight: (D, C, p, q).
        tubelet_size: frames t of the new filters.
        how: ``"centre"``: all of it at frame ⌊t/2⌋ and zeros elsewhere (Arnab et al. 2021, sec. 3.4, eq. 9);
            ``"mean"``: 1/t of it at each frame (eq. 8, and Carreira and Zisserman 2017).

    Returns:
        (D, C, t, p, q).

    Raises:
        ValueError: another rank, or way.

    >>> inflate_weight(torch.ones(1, 1, 1, 1), 4, "centre").flatten().tolist()
    [0.0, 0.0, 1.0, 0.0]
    >>> inflate_weight(torch.ones(1, 1, 1, 1), 4, "mean").flatten().tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    if how not in INFLATIONS:
        raise ValueError(f"how {how!r} is unknown; use 'centre' or 'mean'")
    if weight.ndim != 4:
        raise ValueError(f"filters of images must be (D, C, p, q), got shape {tuple(weight.shape)}")
    if how == "mean":
        return weight[:, :, None].repeat(1, 1, tubelet_size, 1, 1) / tubelet_size
    inflated = torch.zeros_like(weight)[:, :, None].repeat(1, 1, tubelet_size, 1, 1)
    inflated[:, :, tubelet_size // 2] = weight
    return inflated
