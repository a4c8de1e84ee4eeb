"""Checks of lesson 03: masking and painting, contrast and momentum, collapse and what prevents it, discrete words."""

EXERCISES = (
    "random_masking",
    "patch_targets",
    "Decoder",
    "info_nce",
    "momentum_at",
    "effective_rank",
    "sigreg",
    "straight_through",
)
