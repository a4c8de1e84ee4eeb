"""Decoders that climb back to the pixels, with what the encoder saw on its way down at their side.

U-Net (Ronneberger et al. 2015) over the maps of a hierarchical backbone (with Swin: Cao et al. 2022, Swin-Unet), and
UNETR (Hatamizadeh et al. 2022) over layers of a plain ViT, which has one resolution only.
"""

from collections.abc import Sequence
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcourse.layers import crop, pad_to
from vitcourse.vit import VisionTransformer

from .base import channels_of, strides_of
from .segmentation import SemanticModel, evenly


class ConvBlock(nn.Sequential):
    """Two 3×3 convolutions, each with a norm and ReLU (U-Net, section 2).

    Group norm, and not batch norm: batches are small, and parts of a batch shall give what the whole does.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        layers: list[nn.Module] = []
        for width in (in_channels, channels):
            layers += [nn.Conv2d(width, channels, 3, padding=1, bias=False), norm(channels), nn.ReLU()]
        super().__init__(*layers)


def norm(channels: int) -> nn.GroupNorm:
    """Group norm in groups of 8 channels or so."""
    return nn.GroupNorm(gcd(max(1, channels // 8), channels), channels)


class UpBlock(nn.Module):
    """One step up: fewer channels, more pixels, a skip connection beside, a :class:`ConvBlock`.

    Args:
        in_channels: of the coarse map.
        channels: of the result.
        skip_channels: of the finer map beside it; 0 to leave it out.
    """

    def __init__(self, in_channels: int, channels: int, skip_channels: int) -> None:
        super().__init__()
        self.skips = skip_channels > 0
        self.reduce = nn.Conv2d(in_channels, channels, 1)
        self.block = ConvBlock(channels + skip_channels, channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, in_channels, h, w) and a finer map (B, skip_channels, H, W) -> (B, channels, H, W).

        Without a skip connection the finer map tells the size alone.
        """
        x = F.interpolate(self.reduce(x), skip.shape[-2:], mode="bilinear")
        return self.block(torch.cat([x, skip], dim=1) if self.skips else x)


class UNetDecoder(nn.Module):
    """From the coarsest of several maps back to the finest: a list of (B, C_i, H_i, W_i) -> (B, C_0, H_0, W_0).

    Args:
        in_channels: of each map, finest first; results on the way have as many.
        skips: whether the finer maps take part, or only tell their size.

    >>> maps = [torch.rand(1, 8, 13, 10), torch.rand(1, 16, 7, 5)]
    >>> UNetDecoder([8, 16])(maps).shape
    torch.Size([1, 8, 13, 10])
    """

    def __init__(self, in_channels: Sequence[int], skips: bool = True) -> None:
        super().__init__()
        steps = zip(in_channels[1:], in_channels[:-1], strict=True)
        self.blocks = nn.ModuleList(UpBlock(coarse, fine, fine * skips) for coarse, fine in steps)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for block, skip in zip(self.blocks[::-1], maps[-2::-1], strict=True):
            x = block(x, skip)
        return x


class UNet(SemanticModel):
    """A U-Net whose way down is a hierarchical backbone: images (B, C, H, W) to logits (B, K, H, W).

    The image itself, through two convolutions, is the finest skip connection: the backbone's finest map has 1/16 of its
    pixels. Sizes are what the backbone takes; each step up goes to the size of the map that it meets.

    Args:
        backbone: a model with maps at several strides.
        num_classes: K.
        channels: of the last step, at full resolution.
        levels: which of the backbone's maps; all where None.
        skips: whether the way up sees the way down; without, only the coarsest map is left.

    Raises:
        ValueError: a backbone with one map only.

    >>> from vitcourse import create_model
    >>> backbone = create_model("swin_tiny", img_size=64, num_classes=0, depths=(1, 1), num_heads=(2, 4))
    >>> UNet(backbone, 3, channels=8)(torch.rand(2, 3, 50, 66)).shape
    torch.Size([2, 3, 50, 66])
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 21,
        channels: int = 32,
        levels: Sequence[int] | None = None,
        skips: bool = True,
    ) -> None:
        super().__init__(backbone, num_classes)
        strides = strides_of(backbone)
        self.indices = list(range(len(strides)) if levels is None else levels)
        if len(self.indices) < 2 or not all(i in range(len(strides)) for i in self.indices):
            raise ValueError(
                f"levels {tuple(self.indices)} must be two or more maps of the backbone, of which it has "
                f"{len(strides)}; for a plain ViT use Unetr"
            )
        widths = [channels_of(backbone)[i] for i in self.indices]
        self.stem = ConvBlock(self.in_chans, channels) if skips else None
        self.decoder = UNetDecoder(widths, skips)
        self.last = UpBlock(widths[0], channels, channels * skips)
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) to logits (B, K, H, W); targets are not looked at."""
        maps = self.backbone.feature_maps(x, self.indices)
        return self.head(self.last(self.decoder(maps), x if self.stem is None else self.stem(x)))

    def reset_classifier(self, num_classes: int) -> None:
        """Other classes: a new, randomly initialised head."""
        self.num_classes, like = num_classes, self.head.weight
        self.head = nn.Conv2d(like.shape[1], num_classes, 1).to(like)


class Unetr(SemanticModel):
    """UNETR in two dimensions (section 3.1 and figure 2): a plain ViT's layers, deconvolved, are the skip connections.

    For patches of p = 2^k pixels, k layers are tapped, evenly apart; each is brought to a finer resolution than the
    next one, the first to half that of the image; the image itself is the finest.

    Args:
        backbone: a :class:`vitcourse.VisionTransformer`.
        num_classes: K.
        channels: at full resolution; twice as many at every halving.
        skips: whether layers before the last, and the image, take part.

    Raises:
        ValueError: a backbone that is no plain ViT; patches that are not squares of 2, 4, 8 … pixels; fewer blocks
            than layers to tap.

    >>> from vitcourse import create_model
    >>> backbone = create_model("vit_tiny", img_size=32, patch_size=4, num_classes=0, depth=2)
    >>> Unetr(backbone, 3, channels=8)(torch.rand(2, 3, 32, 48)).shape
    torch.Size([2, 3, 32, 48])
    """

    def __init__(
        self, backbone: VisionTransformer, num_classes: int = 21, channels: int = 32, skips: bool = True
    ) -> None:
        super().__init__(backbone, num_classes)
        if not isinstance(backbone, VisionTransformer):
            raise ValueError(
                f"backbone is a {type(backbone).__name__}; Unetr is for a plain ViT, for others there is UNet"
            )
        p, q = backbone.patch_size
        steps = p.bit_length() - 1
        if p != q or p < 2 or p != 2**steps:
            raise ValueError(f"patch_size {(p, q)} of the backbone cannot be reached by halving; use 2, 4, 8, 16 or 32")
        if len(backbone.blocks) < steps:
            raise ValueError(f"backbone has {len(backbone.blocks)} blocks, and {steps} are tapped for patches of {p}")
        widths = [channels * 2**i for i in range(steps + 1)]  # at strides 1, 2, … p
        dim, self.skips = backbone.embed_dim, skips
        self.indices = evenly(len(backbone.blocks), steps) if skips else [-1]
        self.stem = ConvBlock(self.in_chans, channels) if skips else None
        self.rise = nn.ModuleList(_rise(dim, widths[i], steps - i) for i in range(1, steps)) if skips else None
        inputs = [*widths[1:-1], dim]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in zip(inputs, widths, strict=False))
        self.blocks = nn.ModuleList(ConvBlock(width * (1 + skips), width) for width in widths[:-1])
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) to logits (B, K, H, W); targets are not looked at."""
        *tapped, top = self.backbone.feature_maps(x, self.indices)
        size, patch = x.shape[-2:], self.backbone.patch_size[0]
        skips: list[Tensor] = []
        if self.skips:
            whole = pad_to(x, [n * patch for n in top.shape[-2:]], axes=(2, 3))  # as the backbone saw it
            skips = [self.stem(whole), *(rise(layer) for rise, layer in zip(self.rise, tapped, strict=True))]
        for i in reversed(range(len(self.up))):
            top = self.up[i](top)
            top = self.blocks[i](torch.cat([top, skips[i]], dim=1) if self.skips else top)
        return crop(self.head(top), size, axes=(2, 3))

    reset_classifier = UNet.reset_classifier


def _rise(dim: int, channels: int, steps: int) -> nn.Sequential:
    """A layer's map, enlarged 2^steps times, by deconvolutions with a convolution after each (figure 2, blue)."""
    layers: list[nn.Module] = []
    for i in range(steps):
        layers += [nn.ConvTranspose2d(channels if i else dim, channels, 2, stride=2)]
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def plain_or_pyramid(backbone: nn.Module, num_classes: int = 21, **options: object) -> UNet | Unetr:
    """The decoder that fits a backbone: :class:`Unetr` for a plain ViT, :class:`UNet` for all others."""
    return (Unetr if isinstance(backbone, VisionTransformer) else UNet)(backbone, num_classes, **options)
