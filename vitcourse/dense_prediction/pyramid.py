"""Maps at several strides, all of one width: from a hierarchical backbone (FPN), and from a plain ViT (ViTDet)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .base import channels_of, strides_of


class FeaturePyramid(nn.Module):
    """Feature pyramid network (Lin et al. 2017, "Feature Pyramid Networks for Object Detection", section 3).

    Top-down: each map gets a 1×1 convolution and the next coarser sum, enlarged by nearest neighbour; a 3×3
    convolution of each sum is the output. No non-linearity (section 3, end).

    Args:
        in_channels: of each map, finest first.
        channels: of every map of the result.
        extra: coarser maps beside: ``""`` for none; ``"pool"``, every second pixel of the last (section 4.1);
            ``"p6p7"``, two 3×3 convolutions of stride 2 on the last, with ReLU between (FCOS, section 3.2).

    >>> maps = [torch.zeros(2, 8, 12, 16), torch.zeros(2, 16, 6, 8)]
    >>> [tuple(m.shape) for m in FeaturePyramid([8, 16], 4, extra="p6p7")(maps)]
    [(2, 4, 12, 16), (2, 4, 6, 8), (2, 4, 3, 4), (2, 4, 2, 2)]
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, extra: str = "") -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.extra = make_extra(extra, channels)
        for module in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(module.weight, a=1)
            nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, H_i, W_i), finest first, to maps (B, channels, H_i, W_i), and the extra ones."""
        x, outputs = None, []
        for lateral, output, finer in zip(self.lateral[::-1], self.output[::-1], maps[::-1], strict=True):
            side = lateral(finer)
            x = side if x is None else side + F.interpolate(x, size=side.shape[-2:], mode="nearest")
            outputs.append(output(x))
        return self.extra(outputs[::-1])


class ExtraLevels(nn.Module):
    """No further map: the list as it is."""

    count = 0

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return maps


class PooledLevel(ExtraLevels):
    """One more map: every second row and column of the coarsest."""

    count = 1

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [*maps, maps[-1][..., ::2, ::2]]


class P6P7(ExtraLevels):
    """Two more maps: convolutions of stride 2, one on the coarsest map, one on that one's result after a ReLU."""

    count = 2

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6, self.p7 = (nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(2))
        for module in (self.p6, self.p7):
            nn.init.kaiming_uniform_(module.weight, a=1)
            nn.init.zeros_(module.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        p6 = self.p6(maps[-1])
        return [*maps, p6, self.p7(p6.relu())]


def make_extra(extra: str, channels: int) -> ExtraLevels:
    """The coarser maps by name; see :class:`FeaturePyramid`.

    Raises:
        ValueError: an unknown name.
    """
    if extra == "p6p7":
        return P6P7(channels)
    if extra not in ("", "pool"):
        raise ValueError(f"extra {extra!r} is unknown; use '', 'pool' or 'p6p7'")
    return PooledLevel() if extra else ExtraLevels()


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of maps (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class SimpleFeaturePyramid(nn.Module):
    """The pyramid of ViTDet (Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection").

    All maps come from the last one of a plain ViT: enlarged four times, twice, as it is, and halved (section 3 and
    figure 2c); then a 1×1 and a 3×3 convolution, each with layer norm.

    Args:
        dim: width D of the ViT's tokens, a multiple of 4.
        channels: of every map of the result.
        scales: of the maps, finest first; among 4, 2, 1 and 0.5.
        extra: see :class:`FeaturePyramid`.

    Raises:
        ValueError: another scale; a width that cannot be divided.

    >>> [tuple(m.shape) for m in SimpleFeaturePyramid(16, 8)([torch.zeros(1, 16, 6, 4)])]
    [(1, 8, 24, 16), (1, 8, 12, 8), (1, 8, 6, 4), (1, 8, 3, 2)]
    """

    def __init__(
        self, dim: int, channels: int = 256, scales: Sequence[float] = (4, 2, 1, 0.5), extra: str = ""
    ) -> None:
        super().__init__()
        if not scales or set(scales) - {4, 2, 1, 0.5} or list(scales) != sorted(scales, reverse=True):
            raise ValueError(f"scales {tuple(scales)} must be some of 4, 2, 1 and 0.5, the largest first")
        if dim % 4:
            raise ValueError(f"embed_dim {dim} of the backbone is not a multiple of 4, which a map at scale 4 needs")
        self.stages = nn.ModuleList(self._stage(dim, channels, scale) for scale in scales)
        self.extra = make_extra(extra, channels)

    @staticmethod
    def _stage(dim: int, channels: int, scale: float) -> nn.Sequential:
        resize: list[nn.Module] = []
        if scale == 4:
            resize = [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), LayerNorm2d(dim // 2), nn.GELU()]
            resize.append(nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2))
        elif scale == 2:
            resize = [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)]
        elif scale == 0.5:
            resize = [nn.MaxPool2d(2, stride=2, ceil_mode=True)]  # an odd row or column is kept
        width = int(dim // scale) if scale > 1 else dim
        return nn.Sequential(
            *resize,
            *(nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)),
            *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)),
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """A list whose last map is (B, D, h, w) to maps (B, channels, h · scale, w · scale), and the extra ones."""
        return self.extra([stage(maps[-1]) for stage in self.stages])


class Neck(NamedTuple):
    """How a pyramid is made of a backbone's maps.

    Attributes:
        module: maps to maps of one width.
        indices: what ``feature_maps`` is asked for.
        strides: of the pyramid's maps in pixels, finest first.
    """

    module: nn.Module
    indices: list[int]
    strides: list[int]


def make_neck(backbone: nn.Module, channels: int = 256, levels: Sequence[float] | None = None, extra: str = "") -> Neck:
    """A pyramid for a backbone of any kind; for the arguments see :class:`Pyramid`."""
    strides = strides_of(backbone)
    if len(strides) == 1:
        indices, scales = [-1], (4, 2, 1, 0.5) if levels is None else tuple(levels)
        module: nn.Module = SimpleFeaturePyramid(channels_of(backbone)[0], channels, scales, extra)
        strides = [int(strides[0] / scale) for scale in scales]
        if strides[0] < 1:
            raise ValueError(f"levels {scales} would make a map finer than pixels of patches of {strides_of(backbone)}")
    else:
        indices = list(range(len(strides)) if levels is None else levels)
        if not indices or not all(i in range(len(strides)) for i in indices) or indices != sorted(indices):
            raise ValueError(f"levels {tuple(indices)} must be stages of the backbone, of which it has {len(strides)}")
        module = FeaturePyramid([channels_of(backbone)[i] for i in indices], channels, extra)
        strides = [strides[i] for i in indices]
    for _ in range(module.extra.count):
        strides.append(2 * strides[-1])
    return Neck(module, indices, strides)


class Pyramid(nn.Module):
    """A backbone of any kind, and maps of one width at several strides from it.

    Args:
        backbone: a hierarchical model, whose stages feed a :class:`FeaturePyramid`, or one with a single map, such as a
            ViT, under a :class:`SimpleFeaturePyramid`.
        channels: of every map.
        levels: the stages of a hierarchical backbone, or the scales of a plain one; all where None.
        extra: see :class:`FeaturePyramid`.

    Attributes:
        strides: of the maps in pixels, finest first.

    Raises:
        ValueError: levels that do not exist; an unknown ``extra``.

    >>> from vitcourse import create_model
    >>> backbone = create_model("vit_tiny", img_size=64, num_classes=0, depth=1)
    >>> model = Pyramid(backbone, channels=16)
    >>> model.strides, [tuple(m.shape[2:]) for m in model(torch.zeros(1, 3, 64, 96))]
    ([4, 8, 16, 32], [(16, 24), (8, 12), (4, 6), (2, 3)])
    """

    def __init__(
        self, backbone: nn.Module, channels: int = 256, levels: Sequence[float] | None = None, extra: str = ""
    ) -> None:
        super().__init__()
        self.backbone, self.channels = backbone, channels
        self.neck, self.indices, self.strides = make_neck(backbone, channels, levels, extra)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) to a list of (B, channels, H / stride, W / stride), rounded up, finest first."""
        return self.neck(self.backbone.feature_maps(x, self.indices))


def level_of(backbone: nn.Module, index: int) -> tuple[int, int]:
    """Channels and stride of one of a backbone's maps, counted from 0 or from the end with −1.

    Raises:
        ValueError: there is no such map.
    """
    count = len(backbone.feature_info)
    if not -count <= index < count:
        raise ValueError(f"level {index} does not exist; the backbone has {count} map{'s' * (count > 1)}")
    info = backbone.feature_info[index]
    return info["num_chs"], info["reduction"]


def one_map(backbone: nn.Module, x: Tensor, index: int) -> Tensor:
    """One of a backbone's maps (B, C_i, H_i, W_i)."""
    return backbone.feature_maps(x, [-1 if len(backbone.feature_info) == 1 else index])[0]


def valid_tokens(valid: Tensor, size: Sequence[int]) -> Tensor:
    """Which pixels of a map (h, w) are of an image and not of padding beside it: (B, H, W) -> (B, h, w), boolean."""
    return F.interpolate(valid[:, None].float(), size=tuple(size), mode="nearest")[:, 0].to(torch.bool)
