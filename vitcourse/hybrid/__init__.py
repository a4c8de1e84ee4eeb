"""Convolution and attention in one model: Conv-ViT (Xiao et al. 2021) and CoAtNet (Dai et al. 2021), by name.

Read :mod:`~vitcourse.hybrid.stem`, :mod:`~vitcourse.hybrid.blocks`, then :mod:`~vitcourse.hybrid.coatnet`.
"""

from typing import Any

from vitcourse.hybrid.blocks import (
    MBConv,
    RelativeAttention,
    RelativeBlock,
    SqueezeExcite,
    make_shortcut,
)
from vitcourse.hybrid.coatnet import CoAtNet
from vitcourse.hybrid.stem import ConvStem
from vitcourse.registry import register_model
from vitcourse.vit import SIZES, VisionTransformer

__all__ = [
    "CoAtNet",
    "ConvStem",
    "MBConv",
    "RelativeAttention",
    "RelativeBlock",
    "SqueezeExcite",
    "make_shortcut",
]

COATNET_SIZES: dict[str, dict[str, Any]] = {  # Dai et al. 2021, table 3
    "0": {"stem_dim": 64, "embed_dim": (96, 192, 384, 768), "depths": (2, 3, 5, 2)},
    "1": {"stem_dim": 64, "embed_dim": (96, 192, 384, 768), "depths": (2, 6, 14, 2)},
    "2": {"stem_dim": 128, "embed_dim": (128, 256, 512, 1024), "depths": (2, 6, 14, 2)},
    "3": {"stem_dim": 192, "embed_dim": (192, 384, 768, 1536), "depths": (2, 6, 14, 2)},
    "4": {"stem_dim": 192, "embed_dim": (192, 384, 768, 1536), "depths": (2, 12, 28, 2)},
}
for _size, _args in COATNET_SIZES.items():
    register_model(f"coatnet_{_size}", CoAtNet, **_args)

for _size, _args in SIZES.items():
    # one block fewer than the patchify twin: the stem costs as much (Xiao et al. 2021, sec. 4)
    _args = {**_args, "depth": _args["depth"] - 1, "embed_layer": ConvStem}
    register_model(f"convvit_{_size}", VisionTransformer, **_args)
    register_model(f"convvit_{_size}_patch16_224", VisionTransformer, **_args, patch_size=16, img_size=224)
