"""Transformers for clips (B, C, T, H, W): TimeSformer, Video Swin, ViViT's factorised encoder, and their named sizes.

Read :mod:`~vitcourse.video.tubelets`, :mod:`~vitcourse.video.positions`, :mod:`~vitcourse.video.backbone`,
:mod:`~vitcourse.video.timesformer`, :mod:`~vitcourse.video.maps`, :mod:`~vitcourse.video.vivit`; then
:mod:`~vitcourse.video.windows`, :mod:`~vitcourse.video.window_attention`, :mod:`~vitcourse.video.swin`; then
:mod:`~vitcourse.video.single_frame` (is time used at all?), :mod:`~vitcourse.video.mae` and
:mod:`~vitcourse.video.task` (of the training engine).
"""

from importlib import import_module
from typing import Any

from vitcourse.hierarchical import SIZES as SWIN_SIZES
from vitcourse.registry import Preprocess, register_model
from vitcourse.video.checkpoints import inflate_bias_table, resize_bias_table_3d
from vitcourse.video.positions import resize_time_embed
from vitcourse.video.swin import FrameMerging, VideoSwin
from vitcourse.video.timesformer import DividedBlock, TimeSformer
from vitcourse.video.tubelets import (
    ClipGrid,
    TubeletEmbed,
    check_clips,
    clip_to_tubelets,
    inflate_weight,
    tubelets_to_clip,
)
from vitcourse.video.vivit import FactorisedEncoder
from vitcourse.video.window_attention import WindowAttention3d
from vitcourse.video.windows import (
    relative_position_index_3d,
    shift_mask_3d,
    window_partition_3d,
    window_reverse_3d,
)
from vitcourse.vit import SIZES

_MODULES = {  # what imports more than models need
    "maps": ("BlockAttention", "attention_maps"),
    "task": ("VideoClassification",),
    "mae": ("VideoMaskedAutoencoder", "tube_masking", "tubelet_targets"),
    "single_frame": ("freeze_frames", "reverse_frames", "shuffle_frames", "single_frame_bias"),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [
    "ClipGrid",
    "DividedBlock",
    "FactorisedEncoder",
    "FrameMerging",
    "TimeSformer",
    "TubeletEmbed",
    "VideoSwin",
    "WindowAttention3d",
    "check_clips",
    "clip_to_tubelets",
    "inflate_bias_table",
    "inflate_weight",
    "relative_position_index_3d",
    "resize_bias_table_3d",
    "resize_time_embed",
    "shift_mask_3d",
    "tubelets_to_clip",
    "window_partition_3d",
    "window_reverse_3d",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_KINETICS = Preprocess(mean=(0.45,) * 3, std=(0.225,) * 3, interpolation="bilinear")  # of TimeSformer's authors
_SWIN = Preprocess(interpolation="bilinear")
_VIVIT = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")

for _size in ("tiny", "small", "base", "large"):
    register_model(f"timesformer_{_size}", TimeSformer, _KINETICS, **SIZES[_size])
    register_model(f"vivit_{_size}", FactorisedEncoder, _VIVIT, **SIZES[_size])
# Bertasius et al. 2021, sec. 4.1: the default, high resolution, and long clips.
for _name, _side, _frames in (("patch16_224", 224, 8), ("patch16_448", 448, 16), ("patch16_224_long", 224, 96)):
    register_model(
        f"timesformer_base_{_name}", TimeSformer, _KINETICS, **SIZES["base"], img_size=_side, num_frames=_frames
    )
register_model("vivit_base_patch16x2_224", FactorisedEncoder, _VIVIT, **SIZES["base"])  # Arnab et al. 2021, table 2
for _size in ("tiny", "small", "base"):  # Liu et al. 2022, sec. 3.1
    register_model(f"video_swin_{_size}", VideoSwin, _SWIN, **SWIN_SIZES[_size])
