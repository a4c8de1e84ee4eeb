"""Hierarchical Vision Transformers: Swin (Liu et al. 2021) and Swin V2 (Liu et al. 2022), and their named sizes.

Read :mod:`~vitcourse.hierarchical.windows`, :mod:`~vitcourse.hierarchical.window_attention`,
:mod:`~vitcourse.hierarchical.swin`, then :mod:`~vitcourse.hierarchical.swin_v2`.
"""

from typing import Any

from vitcourse.hierarchical.checkpoints import resize_bias_table
from vitcourse.hierarchical.swin import PatchMerging, SwinBlock, SwinTransformer
from vitcourse.hierarchical.swin_v2 import CosineWindowAttention, PostNormBlock, PostNormMerging, log_spaced_offsets
from vitcourse.hierarchical.window_attention import WindowAttention
from vitcourse.hierarchical.windows import relative_position_index, shift_mask, window_partition, window_reverse
from vitcourse.registry import Preprocess, register_model

__all__ = [
    "CosineWindowAttention",
    "PatchMerging",
    "PostNormBlock",
    "PostNormMerging",
    "SwinBlock",
    "SwinTransformer",
    "WindowAttention",
    "log_spaced_offsets",
    "relative_position_index",
    "resize_bias_table",
    "shift_mask",
    "window_partition",
    "window_reverse",
]

SIZES: dict[str, dict[str, Any]] = {  # Liu et al. 2021, sec. 3.3; heads are 32 wide
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
V2: dict[str, Any] = {
    "attn_layer": CosineWindowAttention,
    "block_layer": PostNormBlock,
    "merge_layer": PostNormMerging,
}

for _size, _args in SIZES.items():
    for _name in (f"swin_{_size}", f"swin_{_size}_patch4_window7_224"):
        register_model(_name, SwinTransformer, Preprocess(crop_pct=0.9), **_args)
for _size in ("base", "large"):
    register_model(
        f"swin_{_size}_patch4_window12_384",
        SwinTransformer,
        Preprocess(img_size=384, crop_pct=1.0),
        **SIZES[_size],
        img_size=384,
        window_size=12,
    )
for _size in ("tiny", "small", "base"):
    for _window in (8, 16):
        register_model(
            f"swinv2_{_size}_window{_window}_256",
            SwinTransformer,
            Preprocess(img_size=256, crop_pct=0.9),
            **SIZES[_size],
            **V2,
            img_size=256,
            window_size=_window,
        )
for _size in ("base", "large"):
    register_model(
        f"swinv2_{_size}_window12_192", SwinTransformer, Preprocess(img_size=192, crop_pct=0.9), **SIZES[_size], **V2,
        img_size=192, window_size=12,
    )  # fmt: skip
    for _window, _side, _crop in ((16, 256, 0.9), (24, 384, 1.0)):  # fine-tuned from the one above
        register_model(
            f"swinv2_{_size}_window12to{_window}_192to{_side}",
            SwinTransformer,
            Preprocess(img_size=_side, crop_pct=_crop),
            **SIZES[_size],
            **V2,
            img_size=_side,
            window_size=_window,
            pretrained_window_sizes=(12, 12, 12, 6),
        )
