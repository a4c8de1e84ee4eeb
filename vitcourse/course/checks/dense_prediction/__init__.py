"""Checks of lesson 07: pyramids, points and boxes, skip connections, queries' masks, and the prediction of sets."""

EXERCISES = (
    "top_down",
    "fcos_targets",
    "giou",
    "UpBlock",
    "query_mask",
    "match",
    "set_loss",
    "denoising_mask",
)
