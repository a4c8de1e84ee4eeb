"""The Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"), and its named sizes.

Read :mod:`~vitcourse.vit.patches`, :mod:`~vitcourse.vit.positions`, :mod:`~vitcourse.vit.attention`, then
:mod:`~vitcourse.vit.model`.
"""

from dataclasses import replace
from typing import Any

from vitcourse.registry import Preprocess, register_model
from vitcourse.vit.attention import Attention, Grid, record_attention, refuse_mask, whole_grid
from vitcourse.vit.model import Block, VisionTransformer
from vitcourse.vit.patches import LinearPatchEmbed, PatchEmbed, image_to_patch, patch_to_image
from vitcourse.vit.positions import resize_matrix, resize_pos_embed, sincos_2d

__all__ = [
    "Attention",
    "Block",
    "Grid",
    "LinearPatchEmbed",
    "PatchEmbed",
    "VisionTransformer",
    "image_to_patch",
    "patch_to_image",
    "record_attention",
    "refuse_mask",
    "resize_matrix",
    "resize_pos_embed",
    "sincos_2d",
    "whole_grid",
]

SIZES: dict[str, dict[str, Any]] = {  # Touvron et al. 2021 (Ti, S), Dosovitskiy et al. 2021, table 1 (B, L, H)
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
_HALF = Preprocess(img_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.9)

for _size, _args in SIZES.items():
    register_model(f"vit_{_size}", VisionTransformer, _HALF, **_args)
    for _patch in (8, 14, 16, 32):
        for _side in (224, 384):
            if _side % _patch == 0:
                register_model(
                    f"vit_{_size}_patch{_patch}_{_side}",
                    VisionTransformer,
                    replace(_HALF, crop_pct=0.9 if _side == 224 else 1.0),
                    **_args,
                    patch_size=_patch,
                    img_size=_side,
                )
