"""What the plain transformers for clips share: tokens of tubelets with positions, the head, and weights of images."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitcourse.layers import to_pair
from vitcourse.video.positions import resize_time_embed
from vitcourse.video.tubelets import ClipGrid, TubeletEmbed, check_clips, check_divides, inflate_weight
from vitcourse.vit import VisionTransformer, resize_pos_embed
from vitcourse.vit.model import from_torchvision
from vitcourse.vit.positions import fit_pos_embed

PATCHES = "patch_embed.proj.weight"


class ClipTransformer(nn.Module):
    """The stem and the head of a transformer for clips; what is between them is the derived class's.

    A derived class makes ``blocks`` and ``head``, and has ``forward_features``, ``forward_head`` and
    ``time_from_image``. See :class:`vitcourse.video.TimeSformer` for the arguments.
    """

    num_prefix_tokens = 1
    inflation = "centre"  # how filters of images become filters of clips; see inflate_weight

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_frames: int,
        tubelet_size: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = to_pair(img_size, "img_size"), to_pair(patch_size, "patch_size")
        if num_frames < 1 or tubelet_size < 1:
            raise ValueError(f"num_frames {num_frames} and tubelet_size {tubelet_size} must be at least 1")
        check_divides((num_frames, *self.img_size), tubelet_size, self.patch_size)
        if global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool {global_pool!r} is unknown; use 'token' or 'avg'")
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        self.in_chans, self.num_classes, self.embed_dim, self.global_pool = (
            in_chans,
            num_classes,
            embed_dim,
            global_pool,
        )
        self.grid_size = tuple(s // p for s, p in zip(self.img_size, self.patch_size, strict=True))
        self.feature_info = [{"num_chs": embed_dim, "reduction": self.patch_size[0]}]
        self.grad_checkpointing = False
        self.patch_embed = TubeletEmbed(tubelet_size, self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size[0] * self.grid_size[1], embed_dim))
        for tokens in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(tokens, std=0.02)

    # The norms' eps, which weights of transformers bring along, and a new head: as in the model of images.
    _set_eps = VisionTransformer._set_eps
    adopt = VisionTransformer.adopt
    reset_classifier = VisionTransformer.reset_classifier

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations: less memory, more time."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside norms and biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(("_embed", "cls_token"))}

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor, ClipGrid]:
        """Clips (B, C, T, H, W) to [CLS] (B, 1, D), tokens (B, t, h · w, D), with positions in space, and the grid.

        Raises:
            ValueError: another rank or number of channels; frames or sides that the tubelet does not divide.
            TypeError: integer clips.
        """
        check_clips(x, self.in_chans)
        check_divides(x.shape[2:], self.tubelet_size, self.patch_size)
        x = self.patch_embed(x)
        t, h, w = x.shape[2:]
        pos = resize_pos_embed(self.pos_embed, self.grid_size, (h, w), 1)
        tokens = rearrange(x, "b d t h w -> b t (h w) d") + pos[:, None, 1:]
        cls = (self.cls_token + pos[:, :1]).expand(x.shape[0], -1, -1)
        return cls.to(tokens.dtype), tokens, (t, h, w, 1)

    def _run(self, block: nn.Module, x: Tensor, grid: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, grid, use_reentrant=False)
        return block(x, grid)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _wanted(self, indices: Sequence[int]) -> list[int]:
        depth = len(self.blocks)
        if not all(-depth <= i < depth for i in indices):
            raise ValueError(f"indices {tuple(indices)} name blocks that do not exist; the model has {depth}")
        return [i % depth for i in indices]

    # ------------------------------------------------------------------------------------------------------- weights

    def checkpoint_names(self, names: Collection[str]) -> Callable[[str], str]:
        """How to call what a checkpoint with these names has; of torchvision it can be an image model's."""
        return from_torchvision if "conv_proj.weight" in names else str

    def adapt_state_dict(
        self, state: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Another checkpoint in this model's names and sizes; one of an image model is made one of clips.

        Positions are interpolated, bicubically in space and linearly in time. Of an image model's weights
        :func:`inflate_weight` makes filters of clips, as ``inflation`` says, and the parts that look along time start
        so that on a still clip the model says what the image model says of the image; a line on stderr says so.

        Args:
            state: its tensors by name.
            facts: what else is known of it; see :meth:`vitcourse.vit.VisionTransformer.adapt_state_dict`.

        Raises:
            ValueError: the positions could be those of several grids.
        """
        rename = self.checkpoint_names(state)
        state = {rename(name): tensor for name, tensor in state.items()}
        of_time = {name: tensor for name, tensor in self.state_dict().items() if is_of_time(name)}
        if PATCHES in state and of_time and not any(is_of_time(name) for name in state):
            state |= self.time_from_image(state, of_time)
            print(f"vitcourse: the weights are an image model's: {self.started}", file=sys.stderr)
        if PATCHES in state and state[PATCHES].ndim == 4:
            state[PATCHES] = inflate_weight(state[PATCHES], self.tubelet_size, self.inflation)
        if "pos_embed" in state:
            state["pos_embed"] = fit_pos_embed(state["pos_embed"], self.grid_size, self.patch_size, 1, facts or {})
        if "time_embed" in state and "time_embed" in of_time:
            frames = self.num_frames // self.tubelet_size
            prefix = self.time_embed.shape[1] - frames
            state["time_embed"] = resize_time_embed(state["time_embed"], frames, prefix)
        return state

    started: str  # how the parts that look along time start, for the line on stderr

    def time_from_image(self, state: Mapping[str, Tensor], of_time: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What becomes of the parts ``of_time``, which look along it, where ``state`` is an image model's."""
        raise NotImplementedError


def is_of_time(name: str) -> bool:
    """Whether a parameter belongs to what looks along time, which no model of images has."""
    return name.startswith("time_") or ".temporal_" in name


def init_blocks(blocks: nn.ModuleList) -> None:
    """Xavier, as in our ViT's blocks."""
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
