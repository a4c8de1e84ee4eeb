"""ViViT's factorised encoder (Arnab et al. 2021, "ViViT: A Video Vision Transformer", model 2).

``blocks`` and ``norm`` are those of a ViT, by its names; what begins with ``time_`` looks along time.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vitcourse.layers import drop_path_rates, init_linear
from vitcourse.video.backbone import ClipTransformer, init_blocks
from vitcourse.video.positions import resize_time_embed
from vitcourse.video.tubelets import ClipGrid
from vitcourse.vit import Attention, Block


class FactorisedEncoder(ClipTransformer):
    """ViViT, model 2 (sec. 3.3, fig. 4): a ViT sees each tubelet's moment by itself, a second transformer what it says.

    Clips (B, C, T, H, W) to logits (B, num_classes). The first encoder makes one vector of each moment, its [CLS] token
    after the norm; the second, with a [CLS] token and positions of its own, makes one of all of them. Late fusion costs
    least of the paper's models. Weights of an image model are the first encoder's, its filters inflated at the centre;
    the second starts untrained (sec. 3.4).

    Args:
        num_frames: frames of a clip that the positions in time are made for.
        tubelet_size: frames of a tubelet.
        global_pool: ``"token"`` (each encoder's [CLS]) or ``"avg"`` (means over the patches, then over the moments).
        depth, time_depth: blocks of the first and of the second encoder.
        img_size, patch_size, in_chans, num_classes, embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, norm_eps,
            attn_layer: see :class:`vitcourse.video.TimeSformer`; the heads and widths are both encoders'.
        drop_path_rate: stochastic depth at the last block; it grows linearly from 0 at the first of both encoders.

    Raises:
        ValueError: sizes that do not divide, unknown options, in ``forward`` a wrong rank or number of channels.
        TypeError: in ``forward``, integer clips.

    >>> model = FactorisedEncoder(32, 8, num_frames=8, num_classes=10, embed_dim=48, depth=2, num_heads=4)
    >>> model(torch.zeros(2, 3, 8, 32, 32)).shape
    torch.Size([2, 10])
    >>> model.forward_features(torch.zeros(2, 3, 8, 32, 32)).shape  # [CLS] and four moments
    torch.Size([2, 5, 48])
    """

    started = "the encoder along time starts untrained, and on a still clip the other one says what that one says"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_frames: int = 32,
        tubelet_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 400,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        time_depth: int = 4,
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
        if depth < 1 or time_depth < 1:
            raise ValueError(f"depth {depth} and time_depth {time_depth} must be at least 1")
        rates = drop_path_rates(drop_path_rate, depth + time_depth)
        options = (embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate)
        self.blocks = nn.ModuleList(Block(*options, rate, attn_layer=attn_layer) for rate in rates[:depth])
        self.norm = nn.LayerNorm(embed_dim)
        self.time_cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.time_embed = nn.Parameter(torch.zeros(1, 1 + num_frames // tubelet_size, embed_dim))
        self.time_blocks = nn.ModuleList(Block(*options, rate) for rate in rates[depth:])
        self.time_norm = nn.LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        for tokens in (self.time_cls_token, self.time_embed):
            nn.init.trunc_normal_(tokens, std=0.02)
        for blocks in (self.blocks, self.time_blocks):
            init_blocks(blocks)
        self.head.apply(init_linear)
        self._set_eps(norm_eps)

    def forward_moments(self, x: Tensor) -> Tensor:
        """Clips (B, C, T, H, W) to tokens of each moment (B, t, 1 + h · w, D) after the first encoder's norm."""
        x, (t, *grid) = self._moments(x)
        for block in self.blocks:
            x = self._run(block, x, tuple(grid))
        return self.norm(x).unflatten(0, (-1, t))

    def _moments(self, x: Tensor) -> tuple[Tensor, ClipGrid]:
        """Clips (B, C, T, H, W) to tokens of each moment (B · t, 1 + h · w, D), and the grid they lie on."""
        cls, x, grid = self.embed(x)
        return torch.cat([cls[:, None].expand(-1, grid[0], -1, -1), x], dim=2).flatten(0, 1), grid

    def forward_features(self, x: Tensor) -> Tensor:
        """Clips (B, C, T, H, W) to [CLS] and moments (B, 1 + t, D) after the second encoder's norm."""
        moments = self.forward_moments(x)
        moments = moments[:, :, 0] if self.global_pool == "token" else moments[:, :, 1:].mean(2)
        cls = self.time_cls_token.expand(len(moments), -1, -1)
        x = torch.cat([cls, moments], dim=1) + resize_time_embed(self.time_embed, moments.shape[1], 1)
        for block in self.time_blocks:
            x = self._run(block, x, None)
        return self.time_norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """[CLS] and moments (B, 1 + t, D) to logits (B, num_classes)."""
        return self.head(self.head_drop(x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1)))

    def feature_maps(self, x: Tensor, indices: Sequence[int] = (-1,)) -> list[Tensor]:
        """Patch tokens of the first encoder as maps of clips, its norm applied, [CLS] left out.

        They do not know of each other along time.

        Args:
            x: clips (B, C, T, H, W).
            indices: blocks of the first encoder, counted from 0, or from the end with −1; all are at one stride.

        Returns:
            a list of (B, D, t, h, w).

        Raises:
            ValueError: a block index that does not exist.
        """
        wanted, maps = self._wanted(indices), {}
        x, (t, *grid) = self._moments(x)
        for i, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            x = self._run(block, x, tuple(grid))
            if i in wanted:
                maps[i] = rearrange(self.norm(x)[:, 1:], "(b t) (h w) d -> b d t h w", t=t, h=grid[0])
        return [maps[i] for i in wanted]

    def time_from_image(self, state: Mapping[str, Tensor], of_time: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The second encoder as it is."""
        return dict(of_time)
