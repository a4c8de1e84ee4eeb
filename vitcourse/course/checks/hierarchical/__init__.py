"""Checks of lesson 01: windows, their shift and its mask, and the Swin Transformer made of them."""

EXERCISES = (
    "window_partition",
    "window_reverse",
    "shift_mask",
    "relative_position_index",
    "WindowAttention",
    "PatchMerging",
    "SwinTransformer",
)
