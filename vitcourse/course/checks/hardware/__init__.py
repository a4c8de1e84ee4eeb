"""Checks of lesson 06: attention tile by tile, few-bit integers, and what a head is worth."""

EXERCISES = (
    "attend_tile",
    "tiled_attention",
    "flash_kernel",
    "quantize",
    "pack_int4",
    "smoothing_factors",
    "taylor_score",
)

# What an exercise needs, and not every platform has.
REQUIRES = {"flash_kernel": "triton"}
