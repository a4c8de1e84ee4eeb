"""The Vision Transformer, read from top to bottom. Parameter names are timm's, so its checkpoints load as they are."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitcourse.layers import (
    DropPath,
    LayerScale,
    Mlp,
    check_images,
    drop_path_rates,
    init_linear,
    masked_mean,
    pad_to_multiple,
    to_pair,
)
from vitcourse.notices import say_once
from vitcourse.vit.attention import Attention, Grid, Merging
from vitcourse.vit.patches import PatchEmbed, check_divisible
from vitcourse.vit.positions import fit_pos_embed, resize_pos_embed, sincos_2d


class Block(nn.Module):
    """A pre-norm encoder block (eq. 2 and 3): x + mix(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: width D.
        num_heads: heads of the token mixer.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: biases on the projection to queries, keys and values.
        drop: dropout after the MLP's layers.
        drop_path: probability of skipping each branch (stochastic depth).
        init_values: where given, both branches get a :class:`vitcourse.layers.LayerScale` that starts here.
        attn_layer: builds the token mixer, called with ``dim``, ``num_heads`` and ``qkv_bias``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        attn_layer: Callable[..., nn.Module] = Attention,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn_layer(dim, num_heads=num_heads, qkv_bias=qkv_bias)
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Tensor, grid: Grid | None = None, mask: Tensor | None = None, merging: Merging | None = None
    ) -> Tensor:
        # By name, and only what there is: mixers and hooks see the arguments that they know.
        more = {name: value for name, value in (("mask", mask), ("merging", merging)) if value is not None}
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), grid, **more)))
        if merging is not None:
            x = merging.after_attention(x)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021, fig. 1): images (B, C, H, W) to logits (B, num_classes).

    Images of any size that the patch size divides are taken; the positions are then interpolated. ``torch.export`` and
    ``torch.onnx.export(dynamo=True)`` make graphs of that too, with ``dynamic_shapes=({0: Dim("batch"), 2: 16 *
    Dim("rows"), 3: 16 * Dim("columns")},)`` for patch 16; with ``pad``, ``Dim("height", min=17)`` and so on: one patch
    along an axis would be another graph.

    Args:
        img_size: side of the images that the positions are made for, or (height, width), in pixels.
        patch_size: side of a patch, or (height, width), in pixels.
        in_chans: channels of the image.
        num_classes: width of the head; 0 for none, then the model returns pooled features (B, D).
        global_pool: ``"token"`` (the [CLS] token) or ``"avg"`` (mean of the patch tokens, prefix tokens left out).
        embed_dim: width D of a token.
        depth: number of blocks.
        num_heads: heads of the attention in each.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: biases on the projection to queries, keys and values.
        init_values: initial layer scale; None for no layer scale.
        class_token: whether there is a [CLS] token.
        reg_tokens: number of register tokens (Darcet et al. 2024).
        pos_embed: ``"learned"``, ``"sincos"`` (fixed; see :func:`sincos_2d`) or ``"none"``.
        no_embed_class: positions for the patches only, none for the prefix tokens.
        drop_rate: dropout before the head and in the MLPs.
        drop_path_rate: stochastic depth at the last block; it grows linearly from 0 at the first.
        pad: fill images with zeros on the right and below to the next multiple of the patch size.
        norm_eps: added to the variance by every norm; weights of transformers bring theirs along, often 1e-12.
        embed_layer: builds the patch embedding, called with ``patch_size``, ``in_chans`` and ``embed_dim``.
        attn_layer: builds each block's token mixer; see :class:`Attention`.

    Raises:
        ValueError: sizes that do not divide, unknown options, in ``forward`` a wrong rank or number of channels.
        TypeError: in ``forward``, integer images.

    >>> model = VisionTransformer(img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, num_heads=4)
    >>> model(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 10])
    >>> [tuple(m.shape) for m in model.feature_maps(torch.zeros(3, 1, 28, 42))]
    [(3, 64, 4, 6)]
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        reg_tokens: int = 0,
        pos_embed: str = "learned",
        no_embed_class: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pad: bool = False,
        norm_eps: float = 1e-6,
        embed_layer: Callable[..., nn.Module] = PatchEmbed,
        attn_layer: Callable[..., nn.Module] = Attention,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = to_pair(img_size, "img_size"), to_pair(patch_size, "patch_size")
        if not pad:
            check_divisible(self.img_size, self.patch_size)
        if pos_embed not in ("learned", "sincos", "none"):
            raise ValueError(f"pos_embed {pos_embed!r} is unknown; use 'learned', 'sincos' or 'none'")
        self.in_chans, self.num_classes, self.embed_dim, self.pad = in_chans, num_classes, embed_dim, pad
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.grid_size = tuple(-(-s // p) for s, p in zip(self.img_size, self.patch_size, strict=True))
        self.feature_info = [{"num_chs": embed_dim, "reduction": self.patch_size[0]}]
        self.grad_checkpointing = False
        self._check_pool(global_pool, class_token)

        self.patch_embed = embed_layer(patch_size=self.patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.num_embedded_prefix_tokens = 0 if no_embed_class else self.num_prefix_tokens
        self.pos_embed = self._make_positions(pos_embed)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, drop_path, init_values, attn_layer)
            for drop_path in drop_path_rates(drop_path_rate, depth)
        )
        # timm normalises the pooled vector rather than the tokens where it takes their mean.
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6) if global_pool == "token" else nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6) if global_pool == "avg" else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()
        self._set_eps(norm_eps)

    def _set_eps(self, eps: float) -> None:
        self.norm_eps = eps
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Take over what the parameters of a checkpoint depend on and do not tell: the eps of its norms."""
        eps = facts.get("norm_eps", self.norm_eps)
        if eps != self.norm_eps:
            say_once(f"the norms take over eps {eps:g} from the weights; this model was built with {self.norm_eps:g}")
            self._set_eps(eps)
            if hasattr(self, "model_args"):
                self.model_args["norm_eps"] = eps

    def _check_pool(self, global_pool: str, class_token: bool) -> None:
        if global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool {global_pool!r} is unknown; use 'token' or 'avg'")
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool 'token' needs class_token=True; use global_pool='avg' without one")
        self.global_pool = global_pool

    def _make_positions(self, kind: str) -> nn.Parameter | None:
        if kind == "none":
            return None
        h, w = self.grid_size
        table = torch.zeros(1, self.num_embedded_prefix_tokens + h * w, self.embed_dim)
        if kind == "sincos":
            table[:, self.num_embedded_prefix_tokens :] = sincos_2d(h, w, self.embed_dim)
        else:
            nn.init.trunc_normal_(table, std=0.02)
        return nn.Parameter(table, requires_grad=kind == "learned")

    def _init_weights(self) -> None:
        """Xavier in the blocks, as the authors' code has it: a narrow model learns faster than from σ = 0.02."""
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.head.apply(init_linear)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside norms and biases."""
        return {"pos_embed", "cls_token", "reg_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations: less memory, more time."""
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new, randomly initialised head in place; 0 classes for none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head.apply(init_linear).to(next(self.parameters()))

    def embed(self, x: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> tuple[Tensor, Grid]:
        """Images (B, C, H, W) to tokens (B, prefix + h · w, D) with positions, and the grid they lie on.

        Where a boolean ``masked`` (B, h · w) is True, ``mask_token`` (1, 1, D) takes the place of the patch (BEiT).
        """
        check_images(x, self.in_chans)
        if self.pad:
            x = pad_to_multiple(x, self.patch_size, axes=(2, 3))
        else:
            check_divisible(x.shape[-2:], self.patch_size)

        x = self.patch_embed(x)  # (B, D, h, w)
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, h w, D)
        if masked is not None:
            x = torch.where(masked[..., None], mask_token.to(x.dtype), x)
        tokens = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if self.pos_embed is None:
            return torch.cat([*tokens, x], dim=1), (h, w, self.num_prefix_tokens)
        pos = resize_pos_embed(self.pos_embed, self.grid_size, (h, w), self.num_embedded_prefix_tokens)
        if self.num_embedded_prefix_tokens:
            x = torch.cat([*tokens, x], dim=1) + pos
        else:
            x = torch.cat([*tokens, x + pos], dim=1)
        return x, (h, w, self.num_prefix_tokens)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N, D) after the last block and, where tokens are normalised, the norm."""
        return self.forward_tokens(*self.embed(x))

    def forward_tokens(self, x: Tensor, grid: Grid | None, mask: Tensor | None = None) -> Tensor:
        """The blocks and the norm on tokens that :meth:`embed` made, or some of them (masked autoencoders, padding).

        Args:
            x: tokens (B, N, D), prefix tokens first.
            grid: how they lie on the image; None for a part of the patches, which not every token mixer takes.
            mask: boolean, (B, N) for tokens that nobody is to see where it is False, or broadcastable to (B, H, N, N).

        Raises:
            ValueError: a grid of None, or a mask, that the token mixer cannot honour; a mask of another shape.
        """
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None]
        for block in self.blocks:
            x = self._run(block, x, grid, *([] if mask is None else [mask]))
        return self.norm(x)

    def _run(self, block: nn.Module, x: Tensor, grid: Grid | None, *mask: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, grid, *mask, use_reentrant=False)
        return block(x, grid, *mask)

    def forward_head(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) to logits (B, num_classes); a mean is over the patches where ``mask`` (B, N) is True."""
        prefix = self.num_prefix_tokens
        if self.global_pool == "token":
            x = x[:, 0]
        else:
            x = masked_mean(x[:, prefix:], None if mask is None else mask[:, prefix:])
        return self.head(self.head_drop(self.fc_norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def feature_maps(self, x: Tensor, indices: Sequence[int] = (-1,)) -> list[Tensor]:
        """What a dense head eats: patch tokens as maps, final norm applied, prefix tokens left out.

        Args:
            x: images (B, C, H, W).
            indices: blocks whose outputs are wanted, counted from 0, or from the end with −1; all are at one stride.

        Returns:
            a list of (B, D, h, w).

        Raises:
            ValueError: a block index that does not exist.
        """
        depth = len(self.blocks)
        if not all(-depth <= i < depth for i in indices):
            raise ValueError(f"indices {tuple(indices)} name blocks that do not exist; the model has {depth}")
        wanted, outputs = [i % depth for i in indices], {}
        x, (h, w, prefix) = self.embed(x)
        for i, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            x = self._run(block, x, (h, w, prefix))
            if i in wanted:
                tokens = self.fc_norm(self.norm(x))[:, prefix:]
                outputs[i] = rearrange(tokens, "b (h w) d -> b d h w", h=h)
        return [outputs[i] for i in wanted]

    def checkpoint_names(self, names: Collection[str]) -> Callable[[str], str]:
        """How to call what a checkpoint with these names has: torchvision's names become this model's."""
        return from_torchvision if "conv_proj.weight" in names else str

    def adapt_state_dict(
        self, state: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Another checkpoint in this model's names and sizes: torchvision's names, positions interpolated.

        Args:
            state: its tensors by name.
            facts: what else is known of it: ``"img_size"``, (height, width) of its images, or ``"source_img_size"``,
                the same by the caller's word.

        Raises:
            ValueError: the positions could be those of several grids.
        """
        rename = self.checkpoint_names(state)
        state = {rename(name): tensor for name, tensor in state.items()}
        if "pos_embed" in state and self.pos_embed is not None:
            prefix = self.num_embedded_prefix_tokens
            state["pos_embed"] = fit_pos_embed(state["pos_embed"], self.grid_size, self.patch_size, prefix, facts or {})
        return state


_TORCHVISION_NAMES = (
    ("class_token", "cls_token"),
    ("conv_proj.", "patch_embed.proj."),
    ("encoder.pos_embedding", "pos_embed"),
    ("encoder.layers.encoder_layer_", "blocks."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".self_attention.in_proj_", ".attn.qkv."),
    (".self_attention.out_proj.", ".attn.proj."),
    (".self_attention.", ".attn."),
    (".mlp.linear_1.", ".mlp.fc1."),
    (".mlp.linear_2.", ".mlp.fc2."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.1.", ".mlp.act."),
    (".mlp.3.", ".mlp.fc2."),
    ("encoder.ln.", "norm."),
    ("heads.head.", "head."),
)


def from_torchvision(name: str) -> str:
    for theirs, ours in _TORCHVISION_NAMES:
        name = name.replace(theirs, ours)
    return name
