"""TimeSformer (Bertasius et al. 2021, "Is Space-Time Attention All You Need for Video Understanding?").

Parameter names are the authors', and so those of timm's ViT wherever that has the part.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from vitcourse.layers import drop_path_rates, init_linear
from vitcourse.video.backbone import ClipTransformer, init_blocks
from vitcourse.video.positions import resize_time_embed
from vitcourse.video.tubelets import ClipGrid
from vitcourse.vit import Attention, Block

ATTENTION_TYPES = ("divided", "joint", "space_only")


class DividedBlock(Block):
    """Attention along time, then in each frame, then the MLP (sec. 3, "T+S", eq. 11 and fig. 2).

    A patch looks at the patches in its own place in all frames, then at those of its own frame and at [CLS]. [CLS]
    takes no part in time; it looks at each frame in a copy of its own, and what the copies find is averaged (as the
    authors' code has it). ``temporal_fc`` starts at zero: then the block is ViT's, frame by frame.

    Args:
        dim, num_heads, mlp_ratio, qkv_bias, drop, drop_path: see :class:`vitcourse.vit.Block`. A branch is skipped for
            a whole clip.
        attn_layer: builds the token mixer in space; the one in time is :class:`vitcourse.vit.Attention`.

    >>> block = DividedBlock(32, num_heads=4)
    >>> block(torch.zeros(2, 1 + 3 * 4 * 5, 32), (3, 4, 5, 1)).shape
    torch.Size([2, 61, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        attn_layer: Callable[..., nn.Module] = Attention,
    ) -> None:
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, drop, drop_path, attn_layer=attn_layer)
        self.temporal_norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.temporal_attn = Attention(dim, num_heads, qkv_bias)
        self.temporal_fc = nn.Linear(dim, dim)
        self.start_as_image_block()

    def start_as_image_block(self) -> None:
        """What attention along time finds counts for nothing yet."""
        nn.init.zeros_(self.temporal_fc.weight)
        nn.init.zeros_(self.temporal_fc.bias)

    def forward(self, x: Tensor, grid: ClipGrid) -> Tensor:
        """(B, 1 + t · h · w, D) -> the same."""
        cls, patches = x[:, :1], self._along_time(x[:, 1:], grid[0])
        x = torch.cat([cls, patches], dim=1) + self.drop_path(self._in_frames(cls, patches, grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _along_time(self, patches: Tensor, t: int) -> Tensor:
        columns = rearrange(patches, "b (t n) d -> (b n) t d", t=t)
        found = self.temporal_fc(self.temporal_attn(self.temporal_norm1(columns)))
        return patches + self.drop_path(rearrange(found, "(b n) t d -> b (t n) d", b=patches.shape[0]))

    def _in_frames(self, cls: Tensor, patches: Tensor, grid: ClipGrid) -> Tensor:
        t, h, w, prefix = grid
        copies, patches = repeat(cls, "b 1 d -> (b t) 1 d", t=t), rearrange(patches, "b (t n) d -> (b t) n d", t=t)
        frames = self.attn(self.norm1(torch.cat([copies, patches], dim=1)), (h, w, prefix))
        frames = rearrange(frames, "(b t) n d -> b t n d", t=t)
        return torch.cat([frames[:, :, 0].mean(1, keepdim=True), frames[:, :, 1:].flatten(1, 2)], dim=1)


class TimeSformer(ClipTransformer):
    """TimeSformer (sec. 3): clips (B, C, T, H, W) to logits (B, num_classes).

    Clips of any number of frames and any size are taken that the tubelets divide: positions are then interpolated,
    linearly in time and bicubically in space.

    A new model with divided attention says of a still clip what a ViT with the same weights says of its image:
    attention along time ends in a layer that starts at zero, and so do the positions in time. ``load_weights`` of an
    image model ("timm:vit_base_patch16_224") starts from there, its attention along time with the weights of that in
    space, as in the authors' code.

    Args:
        img_size: side of the frames that the positions are made for, or (height, width), in pixels.
        patch_size: side of a patch, or (height, width), in pixels.
        num_frames: frames of a clip that the positions are made for.
        tubelet_size: frames of a tubelet; the paper's is 1, a frame is embedded by itself.
        in_chans: channels of a frame.
        num_classes: width of the head; 0 for none, then the model returns pooled features (B, D).
        attention_type: ``"divided"`` (time, then space), ``"joint"`` (all tokens of the clip together) or
            ``"space_only"`` (each frame by itself; [CLS] is averaged over the frames before the norm, as the authors
            have it, and nothing tells the order of the frames).
        global_pool: ``"token"`` (the [CLS] token) or ``"avg"`` (mean of the patch tokens of all frames).
        embed_dim: width D of a token.
        depth: number of blocks.
        num_heads: heads of the attention in each.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: biases on the projection to queries, keys and values.
        drop_rate: dropout before the head and in the MLPs.
        drop_path_rate: stochastic depth at the last block; it grows linearly from 0 at the first.
        norm_eps: added to the variance by every norm.
        attn_layer: builds each block's token mixer, which gets a frame's grid (None with joint attention); see
            :class:`vitcourse.vit.Attention`.

    Raises:
        ValueError: sizes that do not divide, unknown options, in ``forward`` a wrong rank or number of channels.
        TypeError: in ``forward``, integer clips.

    >>> model = TimeSformer(32, patch_size=8, num_frames=4, num_classes=10, embed_dim=48, depth=2, num_heads=4)
    >>> model(torch.zeros(2, 3, 4, 32, 32)).shape, model(torch.zeros(1, 3, 6, 40, 24)).shape
    (torch.Size([2, 10]), torch.Size([1, 10]))
    >>> [tuple(m.shape) for m in model.feature_maps(torch.zeros(2, 3, 4, 32, 32))]
    [(2, 48, 4, 4, 4)]
    """

    started = "attention along time starts at zero, so on a still clip the model says what that one says"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_frames: int = 8,
        tubelet_size: int = 1,
        in_chans: int = 3,
        num_classes: int = 400,
        attention_type: str = "divided",
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        attn_layer: Callable[..., nn.Module] = Attention,
    ) -> None:
        sizes = (img_size, patch_size, num_frames, tubelet_size)
        super().__init__(*sizes, in_chans, num_classes, global_pool, embed_dim)
        if attention_type not in ATTENTION_TYPES:
            raise ValueError(f"attention_type {attention_type!r} is unknown; use one of {', '.join(ATTENTION_TYPES)}")
        self.attention_type = attention_type
        if attention_type != "space_only":
            self.time_embed = nn.Parameter(torch.zeros(1, num_frames // tubelet_size, embed_dim))
        block = DividedBlock if attention_type == "divided" else Block
        self.blocks = nn.ModuleList(
            block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, drop_path, attn_layer=attn_layer)
            for drop_path in drop_path_rates(drop_path_rate, depth)
        )
        # As in our ViT, which normalises the pooled vector rather than the tokens where it takes their mean.
        self.norm = nn.LayerNorm(embed_dim) if global_pool == "token" else nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim) if global_pool == "avg" else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()
        self._set_eps(norm_eps)

    def _init_weights(self) -> None:
        init_blocks(self.blocks)
        self.head.apply(init_linear)
        for block in self.blocks:
            if isinstance(block, DividedBlock):
                block.start_as_image_block()

    def forward_features(self, x: Tensor) -> Tensor:
        """Clips (B, C, T, H, W) to tokens (B, 1 + t · h · w, D), normalised where tokens are: [CLS], then by time."""
        x, grid = self.tokens(x)
        return self.norm(self.forward_tokens(x, grid))

    def tokens(self, x: Tensor) -> tuple[Tensor, ClipGrid]:
        """Clips (B, C, T, H, W) to tokens (B, 1 + t · h · w, D) with all their positions, and the grid they lie on."""
        cls, x, grid = self.embed(x)
        if self.attention_type != "space_only":
            x = x + resize_time_embed(self.time_embed, grid[0])[:, :, None]
        return torch.cat([cls, x.flatten(1, 2)], dim=1), grid

    def forward_tokens(self, x: Tensor, grid: ClipGrid | None) -> Tensor:
        """The blocks on tokens that :meth:`tokens` made, or, with joint attention and a grid of None, some of them.

        Raises:
            ValueError: a grid of None where attention is not joint.
        """
        x, inner = self._for_blocks(x, grid)
        for block in self.blocks:
            x = self._run(block, x, inner)
        return self._of_blocks(x, grid)

    def _for_blocks(self, x: Tensor, grid: ClipGrid | None) -> tuple[Tensor, tuple[int, ...] | None]:
        """Tokens (B, 1 + t · h · w, D) as the blocks take them, and the grid that these are told."""
        if self.attention_type == "joint":
            return x, None
        if grid is None:
            raise ValueError(
                f"attention_type {self.attention_type!r} needs to know where the tokens lie, and grid is None, as for "
                "a part of them; use attention_type='joint'"
            )
        if self.attention_type == "divided":
            return x, grid
        t = grid[0]
        copies = repeat(x[:, :1], "b 1 d -> (b t) 1 d", t=t)
        return torch.cat([copies, rearrange(x[:, 1:], "b (t n) d -> (b t) n d", t=t)], dim=1), grid[1:]

    def _of_blocks(self, x: Tensor, grid: ClipGrid | None) -> Tensor:
        """The way back."""
        if self.attention_type != "space_only":
            return x
        x = rearrange(x, "(b t) n d -> b t n d", t=grid[0])
        return torch.cat([x[:, :, 0].mean(1, keepdim=True), x[:, :, 1:].flatten(1, 2)], dim=1)

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + t · h · w, D) to logits (B, num_classes)."""
        x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1)
        return self.head(self.head_drop(self.fc_norm(x)))

    def feature_maps(self, x: Tensor, indices: Sequence[int] = (-1,)) -> list[Tensor]:
        """Patch tokens as maps of clips, final norm applied, [CLS] left out.

        Args:
            x: clips (B, C, T, H, W).
            indices: blocks whose outputs are wanted, counted from 0, or from the end with −1; all are at one stride.

        Returns:
            a list of (B, D, t, h, w).

        Raises:
            ValueError: a block index that does not exist.
        """
        wanted, maps = self._wanted(indices), {}
        x, grid = self.tokens(x)
        x, inner = self._for_blocks(x, grid)
        for i, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            x = self._run(block, x, inner)
            if i in wanted:
                tokens = self.fc_norm(self.norm(self._of_blocks(x, grid)))[:, 1:]
                maps[i] = rearrange(tokens, "b (t h w) d -> b d t h w", t=grid[0], h=grid[1])
        return [maps[i] for i in wanted]

    def time_from_image(self, state: Mapping[str, Tensor], of_time: Mapping[str, Tensor]) -> dict[str, Any]:
        """Attention along time with the weights of that in space, the layer after it and the positions zero."""
        new = {name: torch.zeros_like(tensor) for name, tensor in of_time.items()}
        for name in new:
            image = name.replace("temporal_", "")
            if ".temporal_fc." not in name and image in state:
                new[name] = state[image]
        return new
