"""Checks of lesson 02: the convolutional stem, MBConv, relative attention, and CoAtNet, which is made of them."""

EXERCISES = (
    "ConvStem",
    "SqueezeExcite",
    "MBConv",
    "resize_bias_table",
    "RelativeAttention",
    "CoAtNet",
    "shift_consistency",
)
