"""Checks of lesson 04: rates by layer, what freezing saves, schedules, LoRA, prompts, and the line between models."""

EXERCISES = (
    "layer_scales",
    "backward_macs",
    "deep_first",
    "LoRALinear",
    "merged_weight",
    "insert_prompts",
    "interpolate",
    "agreement",
)
