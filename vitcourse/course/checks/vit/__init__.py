"""Checks of lesson 00: from pixels to a trained Vision Transformer."""

EXERCISES = (
    "image_to_patch",
    "sincos_2d",
    "attention_weights",
    "Attention",
    "Block",
    "VisionTransformer",
    "learning_rate",
    "resize_pos_embed",
)
