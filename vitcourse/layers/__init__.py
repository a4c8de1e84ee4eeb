"""Parts that two or more model families share: one door to attention, the MLP, and two regularisers.

Read :mod:`~vitcourse.layers.dot_product`, :mod:`~vitcourse.layers.parts`, then :mod:`~vitcourse.layers.sizes`.
"""

from vitcourse.layers.dot_product import (
    ATTENTION_BACKENDS,
    attention,
    attention_qkvpacked,
    attention_weights,
    check_mask,
    flash_attention,
    math_attention,
    sdpa_attention,
)
from vitcourse.layers.parts import (
    DropPath,
    LayerScale,
    Mlp,
    check_images,
    drop_path_rates,
    init_linear,
    masked_mean,
    widened,
)
from vitcourse.layers.sizes import always, at_least_two, crop, pad_to, pad_to_multiple, to_pair, units_in

__all__ = [
    "ATTENTION_BACKENDS",
    "DropPath",
    "LayerScale",
    "Mlp",
    "always",
    "at_least_two",
    "attention",
    "attention_qkvpacked",
    "attention_weights",
    "check_images",
    "check_mask",
    "crop",
    "drop_path_rates",
    "flash_attention",
    "init_linear",
    "masked_mean",
    "math_attention",
    "pad_to",
    "pad_to_multiple",
    "sdpa_attention",
    "to_pair",
    "units_in",
    "widened",
]
