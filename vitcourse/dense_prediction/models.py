"""Detectors and segmenters by name, each with a backbone by name in it: so a file of all of it can be opened again."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import nn

from vitcourse.registry import build_model, register_model

Args = Mapping[str, Any]


def _backbone(name: str, args: Args | None, img_size: int | tuple[int, int], in_chans: int) -> nn.Module:
    return build_model(name, {**(args or {}), "img_size": img_size, "in_chans": in_chans, "num_classes": 0})


def _part(module: str, name: str) -> Any:
    """A class of this package, imported when it is asked for: torchvision is heavy."""
    return getattr(import_module(f"{__package__}.{module}"), name)


def build_fcos(
    backbone: str = "swin_tiny",
    backbone_args: Args | None = None,
    img_size: int | tuple[int, int] = 512,
    in_chans: int = 3,
    num_classes: int = 80,
    channels: int = 256,
    levels: Sequence[float] | None = None,
    extra: str = "p6p7",
    num_convs: int = 4,
) -> nn.Module:
    """FCOS on a backbone by name; see :class:`.fcos.Fcos`."""
    body = _backbone(backbone, backbone_args, img_size, in_chans)
    return _part("fcos", "Fcos")(body, num_classes, channels, levels, extra, num_convs)


def build_detr(
    backbone: str = "swin_tiny",
    backbone_args: Args | None = None,
    img_size: int | tuple[int, int] = 512,
    in_chans: int = 3,
    num_classes: int = 80,
    embed_dim: int = 256,
    num_queries: int = 100,
    num_heads: int = 8,
    encoder_depth: int = 6,
    decoder_depth: int = 6,
    mlp_dim: int = 2048,
    dropout: float = 0.1,
    level: int = -1,
    queries: str = "embedded",
    denoising: int = 0,
) -> nn.Module:
    """DETR on a backbone by name; see :class:`.detr.Detr`."""
    body = _backbone(backbone, backbone_args, img_size, in_chans)
    sizes = (embed_dim, num_queries, num_heads, encoder_depth, decoder_depth, mlp_dim, dropout)
    return _part("detr", "Detr")(body, num_classes, *sizes, level, queries, denoising)


def build_unet(
    backbone: str = "swin_tiny",
    backbone_args: Args | None = None,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 21,
    channels: int = 32,
    skips: bool = True,
) -> nn.Module:
    """U-Net on a hierarchical backbone by name, UNETR on a plain ViT; see :mod:`.unet`."""
    body = _backbone(backbone, backbone_args, img_size, in_chans)
    return _part("unet", "plain_or_pyramid")(body, num_classes, channels=channels, skips=skips)


def build_segmenter(
    backbone: str = "vit_small",
    backbone_args: Args | None = None,
    img_size: int | tuple[int, int] = 512,
    in_chans: int = 3,
    num_classes: int = 150,
    embed_dim: int | None = None,
    depth: int = 2,
    num_heads: int | None = None,
    drop_path_rate: float = 0.0,
    level: int = -1,
) -> nn.Module:
    """Segmenter on a backbone by name; see :class:`.segmenter.Segmenter`."""
    body = _backbone(backbone, backbone_args, img_size, in_chans)
    return _part("segmenter", "Segmenter")(body, num_classes, embed_dim, depth, num_heads, drop_path_rate, level)


def build_eomt(
    backbone: str = "vit_large",
    backbone_args: Args | None = None,
    img_size: int | tuple[int, int] = 640,
    in_chans: int = 3,
    num_classes: int = 133,
    num_queries: int = 200,
    num_blocks: int = 4,
) -> nn.Module:
    """EoMT in a plain ViT by name; see :class:`.eomt.Eomt`. The paper's are ``vit_*`` with four register tokens."""
    body = _backbone(backbone, backbone_args, img_size, in_chans)
    return _part("eomt", "Eomt")(body, num_classes, num_queries, num_blocks)


def build_resnet(
    depths: Sequence[int],
    block: str,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 0,
    dilated: bool = False,
    frozen_norms: bool | None = None,
) -> nn.Module:
    """ResNet, DETR's own backbone; see :class:`.resnet.ResNet`."""
    return _part("resnet", "ResNet")(img_size, in_chans, num_classes, depths, block, dilated, frozen_norms)


for _name, _build in {
    "fcos": build_fcos,
    "detr": build_detr,
    "unet": build_unet,
    "segmenter": build_segmenter,
    "eomt": build_eomt,
}.items():
    register_model(_name, _build)
for _name, _depths, _block in (
    ("resnet18", (2, 2, 2, 2), "basic"),
    ("resnet34", (3, 4, 6, 3), "basic"),
    ("resnet50", (3, 4, 6, 3), "bottleneck"),
    ("resnet101", (3, 4, 23, 3), "bottleneck"),
):
    register_model(_name, build_resnet, depths=_depths, block=_block)
