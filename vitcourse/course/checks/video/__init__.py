"""Checks of lesson 08: frames, inflated filters, costs, divided attention, positions in time, views, windows, tubes."""

EXERCISES = (
    "sample_frames",
    "inflate_weight",
    "attention_macs",
    "DividedBlock",
    "resize_time_embed",
    "clip_views",
    "shift_mask_3d",
    "tube_mask",
)
