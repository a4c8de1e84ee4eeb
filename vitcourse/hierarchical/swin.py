"""Swin Transformer (Liu et al. 2021, "Hierarchical Vision Transformer using Shifted Windows"), from top to bottom.

Parameter names are timm's, so its checkpoints load as they are.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import islice
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitcourse.hierarchical.checkpoints import adapt_checkpoint, checkpoint_names, facts_in, pretrained_window
from vitcourse.hierarchical.window_attention import WindowAttention
from vitcourse.hierarchical.windows import Pair
from vitcourse.layers import (
    check_images,
    drop_path_rates,
    init_linear,
    pad_to_multiple,
    to_pair,
)
from vitcourse.vit.model import Block
from vitcourse.vit.patches import PatchEmbed


class SwinBlock(Block):
    """A pre-norm block with attention inside windows (eq. 3), called with x (B, h · w, D) and ``grid = (h, w, 0)``.

    Args:
        dim: width D.
        num_heads: heads of the attention.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: biases on the projection to queries, keys and values.
        drop_path: probability of skipping each branch (stochastic depth).
        attn_layer: builds the token mixer; windows are set by ``functools.partial``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        attn_layer: Callable[..., nn.Module] = WindowAttention,
    ) -> None:
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, drop_path=drop_path, attn_layer=attn_layer)
        self.norm1.eps = self.norm2.eps = 1e-5  # ViT's is 1e-6


class PatchMerging(nn.Module):
    """Halve the map: four neighbours become one token, normalised, then projected (sec. 3.1).

    (B, H, W, C) -> (B, ⌈H/2⌉, ⌈W/2⌉, 2C); an odd side is padded with a row or column of zeros.

    >>> PatchMerging(32)(torch.zeros(1, 7, 8, 32)).shape
    torch.Size([1, 4, 4, 64])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def gather(self, x: Tensor) -> Tensor:
        """Four neighbours side by side, the two of the left column first: (B, ⌈H/2⌉, ⌈W/2⌉, 4C)."""
        x = pad_to_multiple(x, (2, 2), axes=(1, 2))
        return rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(self.gather(x)))


class NormPatchEmbed(PatchEmbed):
    """Patches to normalised vectors, channels last: (B, C, H, W) -> (B, H/p, W/p, D)."""

    def __init__(self, patch_size: int | Pair = 4, in_chans: int = 3, embed_dim: int = 96) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(rearrange(super().forward(x), "b d h w -> b h w d"))


class SwinStage(nn.Module):
    """Blocks at one resolution, after patch merging where the map shrinks: (B, H, W, C) -> (B, H', W', C').

    So for maps of clips (B, T, H, W, C), with blocks that take ``grid = (t, h, w, 0)``.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        size = tuple(x.shape[1:-1])
        x = x.flatten(1, -2)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, (*size, 0), use_reentrant=False)
            else:
                x = block(x, (*size, 0))
        return x.unflatten(1, size)


class SwinTransformer(nn.Module):
    """Swin Transformer (Liu et al. 2021, fig. 3): images (B, C, H, W) to logits (B, num_classes).

    Images of any size are taken: filled with zeros on the right and below to the next multiple of the patch, and maps
    to the next multiple of the window; see :class:`WindowAttention` for what becomes of that padding. A graph of
    ``torch.export`` for any size is one for two tokens or more along each axis of the last map: ``Dim("height",
    min=33)`` for patches of 4 and four stages.

    Args:
        img_size: side of the images, or (height, width), in pixels. Where it makes a stage's map no longer than a
            window, that stage's windows shrink to the map, and their shift is 0 (as in timm). Images of other sizes
            keep these windows.
        patch_size: side of a patch, or (height, width), in pixels.
        in_chans: channels of the image.
        num_classes: width of the head; 0 for none, then the model returns pooled features.
        global_pool: ``"avg"`` or ``"max"`` over the last map.
        embed_dim: width of the first stage; each further stage is twice as wide.
        depths: number of blocks of each stage. Every second one shifts its windows by half.
        num_heads: heads of the attention in each stage.
        window_size: side of a window in tokens, or (height, width).
        mlp_ratio: hidden width of the MLP over the stage's width.
        qkv_bias: biases on the projection to queries, keys and values.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth at the last block; it grows linearly from 0 at the first.
        mask_padding: hide padding and strangers exactly, instead of what timm does.
        pretrained_window_sizes: for Swin V2 with other windows than it was trained with: those of each stage then, 0
            where they are the same. Weights that tell them bring them along.
        attn_layer, block_layer, merge_layer: build the parts; :mod:`vitcourse.hierarchical.swin_v2` has others.

    Raises:
        ValueError: sizes that do not fit together, unknown options, in ``forward`` a wrong rank or number of channels.
        TypeError: in ``forward``, integer images.

    >>> model = SwinTransformer(img_size=56, num_classes=10, embed_dim=24, depths=(2, 2), num_heads=(2, 4))
    >>> model(torch.zeros(2, 3, 56, 56)).shape
    torch.Size([2, 10])
    >>> [tuple(m.shape) for m in model.feature_maps(torch.zeros(2, 3, 50, 75))]
    [(2, 24, 13, 19), (2, 48, 7, 10)]
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        img_size: int | Pair = 224,
        patch_size: int | Pair = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Pair = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mask_padding: bool = False,
        pretrained_window_sizes: Sequence[int | Pair] | None = None,
        attn_layer: Callable[..., nn.Module] = WindowAttention,
        block_layer: Callable[..., nn.Module] = SwinBlock,
        merge_layer: Callable[..., nn.Module] = PatchMerging,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = to_pair(img_size, "img_size"), to_pair(patch_size, "patch_size")
        self.window_size = to_pair(window_size, "window_size")
        if global_pool not in ("avg", "max"):
            raise ValueError(f"global_pool {global_pool!r} is unknown; use 'avg' or 'max'")
        dims = [embed_dim * 2**i for i in range(len(depths))]
        check_stages(dims, depths, num_heads)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.embed_dim, self.num_features = embed_dim, dims[-1]
        self.feature_info = [{"num_chs": dim, "reduction": self.patch_size[0] * 2**i} for i, dim in enumerate(dims)]

        self.patch_embed = NormPatchEmbed(self.patch_size, in_chans, embed_dim)
        self.layers = nn.ModuleList()
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        size = tuple(-(-n // p) for n, p in zip(self.img_size, self.patch_size, strict=True))
        pretrained = _pretrained_windows(pretrained_window_sizes, len(depths))
        self.pretrained_window_sizes = pretrained_window_sizes or (0,) * len(depths)
        if any(pretrained) and "pretrained_window_size" not in signature(attn_layer).parameters:
            raise ValueError("pretrained_window_sizes are for Swin V2, whose biases are a function of the distance")
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            if i > 0:
                size = tuple(-(-n // 2) for n in size)
            mixers = [
                partial(attn_layer, mask_padding=mask_padding, **windows, **pretrained[i])
                for windows in _windows(size, self.window_size, depth)
            ]
            blocks = [
                block_layer(dim, heads, mlp_ratio, qkv_bias, drop_path=rate, attn_layer=mixer)
                for mixer, rate in zip(mixers, islice(rates, depth), strict=True)
            ]
            self.layers.append(SwinStage(blocks, merge_layer(dim // 2) if i > 0 else None))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = nn.Sequential(OrderedDict(drop=nn.Dropout(drop_rate), fc=self._make_classifier(num_classes)))
        self.apply(init_linear)

    def _make_classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside norms and biases."""
        kinds = ("relative_position_bias_table", "logit_scale", "cpb_mlp")
        return {name for name, _ in self.named_parameters() if any(kind in name for kind in kinds)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations: less memory, more time."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new, randomly initialised head in place; 0 classes for none."""
        self.num_classes = num_classes
        self.head.fc = self._make_classifier(num_classes)
        self.head.fc.apply(init_linear).to(self.norm.weight)

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to a map of patches (B, h, w, D)."""
        check_images(x, self.in_chans)
        return self.patch_embed(pad_to_multiple(x, self.patch_size, axes=(2, 3)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last stage's map (B, h, w, D), normalised."""
        x = self.embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """The last map (B, h, w, D) to logits (B, num_classes)."""
        return self.head(x.mean(dim=(1, 2)) if self.global_pool == "avg" else x.amax(dim=(1, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def feature_maps(self, x: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """What a dense head eats: the stages' maps, finest first.

        The final norm is applied to the last stage's map, the only one that it was trained for; the others are as they
        leave their stage, as timm hands them out.

        Args:
            x: images (B, C, H, W).
            indices: stages whose maps are wanted, counted from 0, or from the end with −1; all where None.

        Returns:
            a list of (B, C_i, H_i, W_i), whose channels and strides ``feature_info`` tells.

        Raises:
            ValueError: a stage that does not exist.
        """
        count = len(self.layers)
        indices = range(count) if indices is None else indices
        if not all(-count <= i < count for i in indices):
            raise ValueError(f"indices {tuple(indices)} name stages that do not exist; the model has {count}")
        wanted, maps = [i % count for i in indices], []
        x = self.embed(x)
        for stage in self.layers[: max(wanted) + 1]:
            x = stage(x)
            maps.append(x)
        if len(maps) == count:
            maps[-1] = self.norm(x)
        return [rearrange(maps[i], "b h w d -> b d h w") for i in wanted]

    def checkpoint_names(self, names: Collection[str]) -> Callable[[str], str]:
        """How to call what a checkpoint with these names has; see :mod:`vitcourse.hierarchical.checkpoints`."""
        return checkpoint_names(names)

    def facts_in(self, state: Mapping[str, Tensor]) -> dict[str, Pair]:
        """What a checkpoint's tensors tell that are not learnt: the windows that it was trained with."""
        return facts_in(state, self)

    def adapt_state_dict(
        self, state: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Another library's checkpoint in this model's names, its position biases in this model's windows."""
        return adapt_checkpoint(state, self, facts)

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Take over what the parameters of a checkpoint depend on: the windows that it was trained with.

        Where it does not tell, the windows are those that the model was built for.
        """
        stages = []
        for i, stage in enumerate(self.layers):
            for j, block in enumerate(stage.blocks):
                if hasattr(block.attn, "pretrained_window_size"):
                    block.attn.adopt(pretrained_window(facts, f"layers.{i}.blocks.{j}.attn"))
            stages.append(getattr(stage.blocks[0].attn, "pretrained_window_size", None) or 0)
        if hasattr(self, "model_args") and tuple(stages) != tuple(self.pretrained_window_sizes):
            self.model_args["pretrained_window_sizes"] = tuple(stages)


def check_stages(dims: Sequence[int], depths: Sequence[int], num_heads: Sequence[int]) -> None:
    if not depths or len(depths) != len(num_heads) or min(depths) < 1:
        raise ValueError(
            f"depths {tuple(depths)} and num_heads {tuple(num_heads)} need one positive number for each stage"
        )
    for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
        if heads < 1 or dim % heads:
            raise ValueError(
                f"stage {i} is {dim} wide (embed_dim · 2^{i}), which num_heads {heads} does not divide; "
                "change embed_dim or num_heads"
            )


def _pretrained_windows(windows: Sequence[int | Pair] | None, stages: int) -> list[dict[str, Pair]]:
    """The argument of each stage's attention, where one is due."""
    windows = (0,) * stages if windows is None else windows
    if len(windows) != stages:
        raise ValueError(f"pretrained_window_sizes {tuple(windows)} must have one entry for each of {stages} stages")
    none = (0, (0, 0), [0, 0])
    return [{} if w in none else {"pretrained_window_size": to_pair(w, "pretrained_window_sizes")} for w in windows]


def _windows(size: Sequence[int], window: Pair, depth: int) -> list[dict[str, Pair]]:
    """Windows of each block of a stage: regular and shifted in turn, no larger than the map."""
    shift = tuple(w // 2 if n > w else 0 for n, w in zip(size, window, strict=True))
    window = tuple(min(n, w) for n, w in zip(size, window, strict=True))
    return [{"window_size": window, "shift_size": shift if i % 2 else (0, 0)} for i in range(depth)]
