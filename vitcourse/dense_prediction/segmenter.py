"""Segmenter (Strudel et al. 2021, "Transformer for Semantic Segmentation"): a token for each class beside patches."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitcourse.layers import drop_path_rates
from vitcourse.vit import Block

from .masks import full_size
from .pyramid import level_of, one_map
from .segmentation import SemanticModel


class MaskTransformer(nn.Module):
    """The decoder (section 3.2): class tokens join the patches for some blocks; products of both are the masks (eq. 5).

    As in the authors' code, both are projected and brought to length 1 before the product, and the K products of a
    patch are normalised.

    Args:
        in_dim: width of the map.
        num_classes: K.
        embed_dim: width of the decoder.
        depth: number of blocks.
        num_heads: heads of the attention in each.
        mlp_ratio: hidden width of the MLPs over ``embed_dim``.
        drop_path_rate: stochastic depth at the last block.

    >>> MaskTransformer(24, num_classes=5, embed_dim=16, num_heads=4)(torch.rand(2, 24, 6, 4)).shape
    torch.Size([2, 5, 6, 4])
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int,
        depth: int = 2,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, embed_dim)
        self.cls_embed = nn.Parameter(torch.empty(1, num_classes, embed_dim))
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim)
        for block in self.blocks:
            block.norm1.eps = block.norm2.eps = self.norm.eps  # 1e-5; ViT's is 1e-6
        scale = embed_dim**-0.5
        self.proj_patch = nn.Parameter(scale * torch.randn(embed_dim, embed_dim))
        self.proj_classes = nn.Parameter(scale * torch.randn(embed_dim, embed_dim))
        self.mask_norm = nn.LayerNorm(num_classes)
        nn.init.trunc_normal_(self.cls_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, in_dim, h, w) to masks (B, K, h, w), logits over the classes."""
        h, w = x.shape[-2:]
        classes = self.cls_embed.shape[1]
        x = self.embed(rearrange(x, "b d h w -> b (h w) d"))
        x = torch.cat([self.cls_embed.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, (h, w, classes))
        x = self.norm(x)
        patches = F.normalize(x[:, classes:] @ self.proj_patch.to(x.dtype), dim=-1)
        tokens = F.normalize(x[:, :classes] @ self.proj_classes.to(x.dtype), dim=-1)
        masks = self.mask_norm(patches @ tokens.transpose(1, 2))
        return rearrange(masks, "b (h w) k -> b k h w", h=h)


class Segmenter(SemanticModel):
    """A backbone and a :class:`MaskTransformer` on one of its maps; masks are enlarged bilinearly to the image.

    Args:
        backbone: see :class:`.base.DenseModel`.
        num_classes: K.
        embed_dim: width of the decoder; by default that of the map.
        depth: blocks of the decoder.
        num_heads: of the decoder; by default one for 64 channels.
        drop_path_rate: stochastic depth of the decoder.
        level: the backbone's map, counted from 0 or from the end with −1; a ViT has one.

    >>> from vitcourse import create_model
    >>> model = Segmenter(create_model("vit_tiny", img_size=32, patch_size=8, num_classes=0, depth=1), 5, depth=1)
    >>> model(torch.rand(2, 3, 32, 48)).shape
    torch.Size([2, 5, 32, 48])
    """

    head_names = ("decoder.cls_embed", "decoder.mask_norm")

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 150,
        embed_dim: int | None = None,
        depth: int = 2,
        num_heads: int | None = None,
        drop_path_rate: float = 0.0,
        level: int = -1,
    ) -> None:
        super().__init__(backbone, num_classes)
        width, self.stride = level_of(backbone, level)
        self.level, dim = level, embed_dim or width
        heads = max(1, dim // 64) if num_heads is None else num_heads
        self.decoder = MaskTransformer(width, num_classes, dim, depth, heads, drop_path_rate=drop_path_rate)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) to logits (B, K, H, W); targets are not looked at."""
        masks = self.decoder(one_map(self.backbone, x, self.level))
        extent = tuple(n * self.stride for n in masks.shape[-2:])
        return full_size(masks, extent, x.shape[-2:])

    def no_weight_decay(self) -> set[str]:
        return {*super().no_weight_decay(), "cls_embed"}

    def reset_classifier(self, num_classes: int) -> None:
        """Other classes: new tokens, and a new norm of their masks."""
        self.num_classes, old = num_classes, self.decoder.cls_embed
        self.decoder.cls_embed = nn.Parameter(old.new_empty(1, num_classes, old.shape[2]))
        nn.init.trunc_normal_(self.decoder.cls_embed, std=0.02)
        self.decoder.mask_norm = nn.LayerNorm(num_classes).to(old)
