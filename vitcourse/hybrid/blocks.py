"""CoAtNet's two blocks (Dai et al. 2021): MBConv, and a transformer block with relative attention.

Both take and return maps, (B, C, H, W) -> (B, C', H/s, W/s), so a stage is any sequence of them. Both normalise before
they act: x + f(norm(x)), and where they shrink the map, Proj(Pool(x)) + f(norm(x)) (appendix A.1, eq. 4 and 5).
"""

from collections import OrderedDict
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vitcourse.hierarchical.windows import cached_relative_position_index
from vitcourse.layers import DropPath, Mlp, attention, attention_weights, check_mask
from vitcourse.vit import Grid, resize_pos_embed, whole_grid


def make_shortcut(in_dim: int, dim: int, stride: int) -> nn.Module:
    """Proj(Pool(x)), the way past a block that shrinks the map or widens it; the identity past all others.

    The pool is a 2×2 mean, as in the code that the authors released with MaxViT, and in timm; the appendix speaks of
    max pooling. It has no parameters and next to no cost, so the paper's table cannot tell them apart.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stride > 1:
        layers["pool"] = nn.AvgPool2d(stride)
    if in_dim != dim:
        layers["proj"] = nn.Conv2d(in_dim, dim, 1)
    return nn.Sequential(layers)


class SqueezeExcite(nn.Module):
    """Weigh the channels by what the whole map holds (Hu et al. 2018, eq. 2 to 4): (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: channels C.
        hidden_dim: channels in the bottleneck.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.act(self.fc1(x.mean(dim=(2, 3))))).sigmoid()
        return x * rearrange(gate, "b c -> b c 1 1")


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-excitation (Sandler et al. 2018), pre-activation: (B, C, H, W) -> (B, C', h, w).

    Norm, 1×1 to four times the channels, depthwise 3×3, squeeze-excitation, 1×1 back; batch norm and GELU after each of
    the first two convolutions. Expansion and squeeze count from the *output* channels C' (4 C' and C'/4): that gives
    the paper's numbers of parameters. Batch norm has PyTorch's momentum 0.1 and ε = 1e-5.

    Args:
        in_dim: channels C.
        dim: channels C' of the output.
        stride: 1, or 2 to halve the map.
        downsample: which convolution takes the stride. ``"expand"``, the first 1×1, is eq. 5 and gives the GMACs of the
            paper's table. ``"depthwise"`` sees every pixel; it costs the whole model 3 to 10 % more GMACs, and the
            authors report it as the more accurate (CoAtNet-0: 82.0 % against 81.6 % on ImageNet-1k). timm has this one.
        drop_path: probability of skipping the branch.

    Raises:
        ValueError: another ``downsample``.

    >>> MBConv(8, 16, stride=2)(torch.zeros(1, 8, 28, 28)).shape
    torch.Size([1, 16, 14, 14])
    """

    def __init__(
        self, in_dim: int, dim: int, stride: int = 1, downsample: str = "expand", drop_path: float = 0.0
    ) -> None:
        super().__init__()
        if downsample not in ("expand", "depthwise"):
            raise ValueError(f"downsample {downsample!r} is unknown; use 'expand' or 'depthwise'")
        hidden = 4 * dim
        strides = (stride, 1) if downsample == "expand" else (1, stride)
        self.shortcut = make_shortcut(in_dim, dim, stride)
        self.pre_norm = nn.BatchNorm2d(in_dim)
        self.expand = nn.Conv2d(in_dim, hidden, 1, stride=strides[0], bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride=strides[1], padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act = nn.GELU()
        self.se = SqueezeExcite(hidden, max(dim // 4, 1))
        self.project = nn.Conv2d(hidden, dim, 1)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.act(self.norm1(self.expand(self.pre_norm(x))))
        x = self.act(self.norm2(self.depthwise(x)))
        return shortcut + self.drop_path(self.project(self.se(x)))


class RelativeAttention(nn.Module):
    """Self-attention with a learnt bias for every offset, w_{i−j} (eq. 3, the "pre-softmax" form).

    y_i = Σ_j softmax_j(q_i · k_j / √d + w_{i−j}) v_j, with a table w for each head. The bias does not depend on where i
    is, only on how far j lies from it: attention gains the translation equivariance of a convolution.

    A token mixer as :class:`vitcourse.vit.Attention` is, so a ViT takes it too (the paper's ViT_Rel):
    ``VisionTransformer(attn_layer=partial(RelativeAttention, grid_size=(14, 14)), class_token=False,
    global_pool="avg", pos_embed="none")``.

    Args:
        dim: width D of the output.
        num_heads: heads H, each D/H wide.
        qkv_bias: biases on the projection to queries, keys and values.
        grid_size: rows and columns of the map that the table is made for. Other maps get it interpolated (bicubic).
        in_dim: width of the input; D where None.
        backend: see :func:`vitcourse.layers.attention`.

    Raises:
        ValueError: dim is not divisible by num_heads; in ``forward``, prefix tokens, which have no offsets, or a part
            of the tokens.

    >>> mixer = RelativeAttention(32, num_heads=4, grid_size=(4, 4))
    >>> mixer(torch.zeros(2, 16, 32), (4, 4, 0)).shape, mixer.relative_position_bias_table.shape
    (torch.Size([2, 16, 32]), torch.Size([49, 4]))
    """

    head_axes: ClassVar[dict[str, int | None]] = {"relative_position_bias_table": 1}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        *,
        grid_size: tuple[int, int],
        in_dim: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads, self.grid_size, self.backend = num_heads, tuple(grid_size), backend
        self.recorder: list[Tensor] | None = None  # see vitcourse.vit.record_attention
        self.qkv = nn.Linear(dim if in_dim is None else in_dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        rows, columns = table_size(self.grid_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows * columns, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def position_bias(self, size: tuple[int, int], like: Tensor) -> Tensor:
        """The table spread out to all pairs of positions on a map: (1, H, N, N), of the dtype of ``like``."""
        table = self.relative_position_bias_table
        table = resize_pos_embed(table[None], table_size(self.grid_size), table_size(size))[0].to(like.dtype)
        index = cached_relative_position_index(size, like=like)
        return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)[None]

    def forward(self, x: Tensor, grid: Grid | None, mask: Tensor | None = None) -> Tensor:
        h, w, prefix = whole_grid(grid, self)
        if prefix:
            raise ValueError(f"relative attention has no offsets for {prefix} prefix tokens; use class_token=False")
        qkv = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        q, k, v = qkv.unbind(0)
        bias = self.position_bias((h, w), like=q)
        if self.recorder is None:
            x = attention(q, k, v, bias=bias, mask=mask, backend=self.backend)
        else:  # fused kernels never form the weights, so whoever wants to see them pays for the plain equation
            check_mask(mask, (*q.shape[:3], h * w))
            weights = attention_weights(q, k, bias=bias, mask=mask)
            self.recorder.append(weights)
            x = weights @ v
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)"))


def table_size(grid_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of offsets between the positions of a map: 14 × 14 positions have 27 × 27."""
    return 2 * grid_size[0] - 1, 2 * grid_size[1] - 1


class RelativeBlock(nn.Module):
    """Pre-norm transformer block with relative attention: (B, C, H, W) -> (B, C', h, w).

    Where it shrinks the map, Proj(Pool(x)) + Attention(Pool(norm(x))) (eq. 4): queries, keys and values all come from
    the pooled map, and are projected to C' channels at once.

    Args:
        in_dim: channels C.
        dim: channels C' of the output.
        num_heads: heads of the attention.
        grid_size: rows h and columns w of the output that the table of offsets is made for.
        stride: 1, or 2 to halve the map.
        drop_path: probability of skipping each branch.

    >>> RelativeBlock(8, 16, num_heads=2, grid_size=(7, 7), stride=2)(torch.zeros(1, 8, 14, 14)).shape
    torch.Size([1, 16, 7, 7])
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_heads: int,
        grid_size: tuple[int, int],
        stride: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.shortcut = make_shortcut(in_dim, dim, stride)
        self.norm1 = nn.LayerNorm(in_dim, eps=1e-6)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.attn = RelativeAttention(dim, num_heads, grid_size=grid_size, in_dim=in_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(rearrange(x, "b c h w -> b h w c"))
        normed = self.pool(rearrange(normed, "b h w c -> b c h w"))
        h, w = normed.shape[-2:]
        x = rearrange(self.shortcut(x), "b c h w -> b (h w) c")
        x = x + self.drop_path(self.attn(rearrange(normed, "b c h w -> b (h w) c"), (h, w, 0)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return rearrange(x, "b (h w) c -> b c h w", h=h)  # a view: the channels of a position stay side by side
