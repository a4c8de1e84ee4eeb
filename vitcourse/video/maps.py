"""What a TimeSformer looks at, laid out in frames, rows and columns, ready to be drawn."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from vitcourse.inference import evaluating
from vitcourse.video.timesformer import TimeSformer
from vitcourse.vit import record_attention


class BlockAttention(NamedTuple):
    """Attention weights of one block.

    Attributes:
        cls: (B, H, t, h, w), what [CLS] gives to each patch. With joint attention all of them and its own share sum to
            1, else those of each frame, which it looks at by itself.
        time: (B, H, h, w, t, t), what the patch in each place gives, from the moment of the row to that of the column;
            None but with divided attention.
    """

    cls: Tensor
    time: Tensor | None


@torch.no_grad()
def attention_maps(model: TimeSformer, clips: Tensor) -> list[BlockAttention]:
    """The attention weights of every block on clips (B, C, T, H, W), in evaluation mode.

    Raises:
        ValueError: another model, whose tokens lie otherwise; see also the model.

    >>> model = TimeSformer(32, patch_size=8, num_frames=4, embed_dim=48, depth=2, num_heads=4)
    >>> maps = attention_maps(model, torch.zeros(1, 3, 4, 32, 24))
    >>> len(maps), tuple(maps[0].cls.shape), tuple(maps[0].time.shape)
    (2, (1, 4, 4, 4, 3), (1, 4, 4, 3, 4, 4))
    """
    if not isinstance(model, TimeSformer):
        raise ValueError(
            f"model is a {type(model).__name__}, and this lays out what a TimeSformer looks at; of others record what "
            "there is by vitcourse.vit.record_attention"
        )
    with evaluating(model), record_attention(model) as weights:
        x, (t, h, w, prefix) = model.tokens(clips)
        model.forward_tokens(x, (t, h, w, prefix))
    sizes = {"t": t, "h": h, "w": w}
    if model.attention_type == "joint":
        return [BlockAttention(rearrange(m[:, :, 0, 1:], "b g (t h w) -> b g t h w", **sizes), None) for m in weights]
    in_time = weights[::2] if model.attention_type == "divided" else [None] * len(weights)
    in_space = weights[1::2] if model.attention_type == "divided" else weights
    return [
        BlockAttention(
            rearrange(space[:, :, 0, 1:], "(b t) g (h w) -> b g t h w", **sizes),
            None if time is None else rearrange(time, "(b h w) g s t -> b g h w s t", h=h, w=w),
        )
        for time, space in zip(in_time, in_space, strict=True)
    ]
