"""Images to patches and back, and patches to vectors."""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

from vitcourse.layers import to_pair


def image_to_patch(x: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Cut images into non-overlapping patches and flatten each, row by row.

    Args:
        x: images (B, C, H, W).
        patch_size: side of a patch in pixels, or (height, width).

    Returns:
        (B, H/p · W/p, p · p · C): patches in reading order; inside one, channels run fastest.

    Raises:
        ValueError: not four axes, or a side that the patch size does not divide.

    >>> import torch
    >>> image_to_patch(torch.zeros(2, 3, 224, 224), 16).shape
    torch.Size([2, 196, 768])
    """
    p1, p2 = to_pair(patch_size, "patch_size")
    if x.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got shape {tuple(x.shape)}")
    check_divisible(x.shape[-2:], (p1, p2))
    return rearrange(x, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p1, p2=p2)


def patch_to_image(patches: Tensor, patch_size: int | tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`image_to_patch`.

    Args:
        patches: (B, h · w, p · p · C).
        patch_size: side of a patch in pixels, or (height, width).
        grid: rows h and columns w of patches.

    Returns:
        images (B, C, h · p, w · p).

    Raises:
        ValueError: shapes that do not fit the grid or the patch size.

    >>> import torch
    >>> image = torch.rand(1, 3, 32, 48)
    >>> torch.equal(patch_to_image(image_to_patch(image, 16), 16, (2, 3)), image)
    True
    """
    p1, p2 = to_pair(patch_size, "patch_size")
    h, w = grid
    if patches.ndim != 3 or patches.shape[1] != h * w or patches.shape[2] % (p1 * p2):
        raise ValueError(
            f"patches of shape {tuple(patches.shape)} are not (B, {h * w}, {p1 * p2} · C) "
            f"for a {h}×{w} grid of {p1}×{p2} patches"
        )
    return rearrange(patches, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=h, w=w, p1=p1, p2=p2)


def check_divisible(size: Sequence[int], patch: tuple[int, int]) -> None:
    for side, p in zip(size, patch, strict=True):
        if side % p:
            low = side // p * p
            options = f"{low} or {low + p}" if low else f"{p}"
            raise ValueError(f"img_size {side} is not divisible by patch_size {p}; use {options}, or pad=True")


class PatchEmbed(nn.Module):
    """Patches to vectors by one strided convolution: (B, C, H, W) -> (B, D, H/p, W/p).

    The convolution sees each patch once, so it is the same linear map as :class:`LinearPatchEmbed` (sec. 3.1, eq. 1).
    """

    def __init__(self, patch_size: int | tuple[int, int] = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.patch_size = to_pair(patch_size, "patch_size")
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class LinearPatchEmbed(nn.Module):
    """Patches to vectors as the paper writes it: flatten, then a linear layer. (B, C, H, W) -> (B, D, H/p, W/p)."""

    def __init__(self, patch_size: int | tuple[int, int] = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.patch_size = p1, p2 = to_pair(patch_size, "patch_size")
        self.proj = nn.Linear(p1 * p2 * in_chans, embed_dim)

    @classmethod
    def from_conv(cls, conv: PatchEmbed) -> "LinearPatchEmbed":
        """The same map with the same weights, rearranged from those of a convolutional patch embedding."""
        weight = conv.proj.weight
        linear = cls(conv.patch_size, weight.shape[1], weight.shape[0]).to(weight)
        linear.load_state_dict(
            {"proj.weight": rearrange(weight, "d c p1 p2 -> d (p1 p2 c)"), "proj.bias": conv.proj.bias}
        )
        return linear

    def to_conv(self) -> PatchEmbed:
        """The same map as a strided convolution."""
        (p1, p2), weight = self.patch_size, self.proj.weight
        conv = PatchEmbed(self.patch_size, weight.shape[1] // (p1 * p2), weight.shape[0]).to(weight)
        conv_weight = rearrange(weight, "d (p1 p2 c) -> d c p1 p2", p1=p1, p2=p2)
        conv.load_state_dict({"proj.weight": conv_weight, "proj.bias": self.proj.bias})
        return conv

    def forward(self, x: Tensor) -> Tensor:
        h = x.shape[-2] // self.patch_size[0]
        return rearrange(self.proj(image_to_patch(x, self.patch_size)), "b (h w) d -> b d h w", h=h)
