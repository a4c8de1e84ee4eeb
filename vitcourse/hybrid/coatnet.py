"""CoAtNet (Dai et al. 2021, "CoAtNet: Marrying Convolution and Attention for All Data Sizes"), from top to bottom."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from math import prod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitcourse.hybrid.blocks import MBConv, RelativeAttention, RelativeBlock, table_size
from vitcourse.hybrid.stem import init_conv
from vitcourse.layers import check_images, drop_path_rates, init_linear, pad_to_multiple, to_pair
from vitcourse.vit import resize_pos_embed
from vitcourse.vit.positions import grid_of_checkpoint, size_of_source


class CoAtNet(nn.Module):
    """CoAtNet (fig. 4, table 3): images (B, C, H, W) to logits (B, num_classes).

    A stem of two 3×3 convolutions, then stages of MBConv (``C``) or relative attention (``T``); the first block of a
    stage shrinks the map. Mean over the map, layer norm, a hidden layer with tanh, the head. The paper does not mention
    the hidden layer; the authors' released code has it, and the paper's 25 M parameters of CoAtNet-0 ask for it.

    Convolutions start from He's normal distribution (fan-out), linear layers from Xavier's uniform one, the tables of
    offsets and the head from a truncated normal of σ = 0.02, all biases from zero: what timm does, but for the head.

    Images of any size that the strides divide are taken; the tables of offsets are then interpolated. So does a graph
    of ``torch.export``, with ``32 * Dim("rows")`` for the height where the strides' product is 32, for instance.

    Args:
        img_size: side of the images that the tables of offsets are made for, or (height, width), in pixels.
        in_chans: channels of the image.
        num_classes: width of the head; 0 for none, then the model returns the hidden layer's features (B, D).
        stem_dim: channels of the stem.
        embed_dim: channels of each stage; D is the last.
        depths: blocks in each stage.
        layout: a letter for each stage, ``C`` or ``T``, in any order.
        stem_stride: stride of the stem, 1 or 2.
        strides: stride of each stage, 1 or 2.
        head_dim: width of an attention head.
        downsample: where an MBConv block has its stride; see :class:`MBConv`.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth at the last block; it grows linearly from 0 at the first. For ImageNet-1k the
            paper takes 0.2, 0.3, 0.5 and 0.7 for CoAtNet-0 to -3.

    Raises:
        ValueError: stages that differ in number, unknown letters, sizes that do not divide; in ``forward`` a wrong rank
            or number of channels.
        TypeError: in ``forward``, integer images.

    >>> small = dict(stem_dim=16, embed_dim=(32, 64, 64, 64), depths=(1, 1, 1, 1), stem_stride=1, strides=(2, 2, 1, 1))
    >>> model = CoAtNet(img_size=28, in_chans=1, num_classes=10, layout="CCTT", **small)
    >>> model(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 10])
    >>> [tuple(m.shape) for m in model.feature_maps(torch.zeros(3, 1, 28, 28))]
    [(3, 32, 14, 14), (3, 64, 7, 7), (3, 64, 7, 7), (3, 64, 7, 7)]
    """

    num_prefix_tokens = 0
    global_pool = "avg"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_dim: int = 64,
        embed_dim: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 3, 5, 2),
        layout: str = "CCTT",
        stem_stride: int = 2,
        strides: Sequence[int] = (2, 2, 2, 2),
        head_dim: int = 32,
        downsample: str = "expand",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check_stages(layout, embed_dim, depths, strides, stem_stride, head_dim)
        self.img_size, self.in_chans, self.num_classes = to_pair(img_size, "img_size"), in_chans, num_classes
        self.num_features = self.embed_dim = embed_dim[-1]
        self.layout, self.head_dim = layout, head_dim
        self.total_stride = stem_stride * prod(strides)
        self.grad_checkpointing = False
        self._check_divisible(self.img_size)

        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem_dim, 3, stride=stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(stem_dim),
            nn.GELU(),
            nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False),
        )
        self.stages, self.feature_info = nn.ModuleList(), []
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        width, reduction = stem_dim, stem_stride
        for letter, dim, depth, stride in zip(layout, embed_dim, depths, strides, strict=True):
            reduction *= stride
            if letter == "C":
                block = partial(MBConv, downsample=downsample)
            else:
                grid_size = (self.img_size[0] // reduction, self.img_size[1] // reduction)
                block = partial(RelativeBlock, num_heads=dim // head_dim, grid_size=grid_size)
            first = block(width, dim, stride=stride, drop_path=next(rates))
            rest = (block(dim, dim, drop_path=next(rates)) for _ in range(depth - 1))
            self.stages.append(nn.Sequential(first, *rest))
            self.feature_info.append({"num_chs": dim, "reduction": reduction})
            width = dim

        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pre_logits = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(_init_weights)
        self.reset_classifier(num_classes)

    def _check_divisible(self, size: Sequence[int]) -> None:
        for side in size:
            if side % self.total_stride or side == 0:
                low = side // self.total_stride * self.total_stride
                options = f"{low} or {low + self.total_stride}" if low else f"{self.total_stride}"
                raise ValueError(
                    f"img_size {side} is not divisible by {self.total_stride}, the product of all strides; "
                    f"use {options}"
                )

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside norms and biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations: less memory, more time."""
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new, randomly initialised head in place; 0 classes for none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head.apply(init_linear).to(self.norm.weight)

    def _stage_outputs(self, x: Tensor) -> Iterator[Tensor]:
        check_images(x, self.in_chans)
        self._check_divisible(x.shape[-2:])
        # Adds nothing, but tells a compiler that sizes are multiples: it would take each for a quotient of quotients.
        x = pad_to_multiple(x, (self.total_stride, self.total_stride), axes=(2, 3))
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = _checkpointed(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
            yield x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last stage's map (B, h, w, D); the norm follows the mean, in the head."""
        *_, x = self._stage_outputs(x)
        return rearrange(x, "b d h w -> b h w d")

    def forward_head(self, x: Tensor) -> Tensor:
        """The last stage's map (B, h, w, D) to logits (B, num_classes)."""
        return self.head(self.head_drop(self.pre_logits(self.norm(x.mean(dim=(1, 2))))))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def feature_maps(self, x: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """What a dense head eats: the stages' maps, finest first, the final norm applied to the last stage's.

        Args:
            x: images (B, C, H, W).
            indices: stages whose maps are wanted, counted from 0, or from the end with −1; all where None.

        Returns:
            a list of (B, C_i, H_i, W_i), whose channels and strides ``feature_info`` tells.

        Raises:
            ValueError: a stage that does not exist.
        """
        count = len(self.stages)
        indices = range(count) if indices is None else indices
        if not all(-count <= i < count for i in indices):
            raise ValueError(f"indices {tuple(indices)} name stages that do not exist; the model has {count}")
        wanted = [i % count for i in indices]
        maps = list(islice(self._stage_outputs(x), max(wanted) + 1))
        if len(maps) == count:
            maps[-1] = rearrange(self.norm(rearrange(maps[-1], "b d h w -> b h w d")), "b h w d -> b d h w")
        return [maps[i] for i in wanted]

    def checkpoint_names(self, names: Collection[str]) -> Callable[[str], str]:
        """How to call what a checkpoint with these names has: timm's names become this model's."""
        return _from_timm if any(name.startswith("stem.conv1.") for name in names) else str

    def adapt_state_dict(
        self, state: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Another checkpoint in this model's names and sizes: timm's names, tables of offsets interpolated.

        timm's ``coatnet_0_224`` to ``coatnet_4_224`` are this architecture with ``downsample="depthwise"``. Its
        pretrained weights are all of its own ``_rw`` variants (SiLU, other expansion, a norm with activation before
        each MBConv), which this model does not have.

        Args:
            state: its tensors by name.
            facts: what else is known of it; see :meth:`vitcourse.vit.VisionTransformer.adapt_state_dict`.

        Raises:
            ValueError: a table could be that of several maps.
        """
        rename, size = self.checkpoint_names(state), size_of_source(facts or {})
        if rename is _from_timm:
            state = {name: _in_our_layout(name, tensor, self.head_dim) for name, tensor in state.items()}
        state = {rename(name): tensor for name, tensor in state.items()}
        for name, module in self.named_modules():
            key = f"{name}.relative_position_bias_table"
            if isinstance(module, RelativeAttention) and key in state:
                stride, own = self.img_size[0] // module.grid_size[0], table_size(module.grid_size)
                known = size and table_size((size[0] // stride, size[1] // stride))
                table = grid_of_checkpoint(len(state[key]), own, known, key, "source_img_size" in (facts or {}))
                if table is not None:
                    state[key] = resize_pos_embed(state[key][None], table, own)[0]
        return state


def _check_stages(
    layout: str,
    embed_dim: Sequence[int],
    depths: Sequence[int],
    strides: Sequence[int],
    stem_stride: int,
    head_dim: int,
) -> None:
    if not layout or set(layout) - set("CT"):
        raise ValueError(f"layout {layout!r} must be letters C (convolution) and T (transformer), such as 'CCTT'")
    if not len(layout) == len(embed_dim) == len(depths) == len(strides):
        raise ValueError(
            f"layout {layout!r} has {len(layout)} stages, but embed_dim {len(embed_dim)}, depths {len(depths)} and "
            f"strides {len(strides)}; give one of each for every stage"
        )
    if {stem_stride, *strides} - {1, 2}:
        raise ValueError(f"stem_stride {stem_stride} and strides {tuple(strides)} must be 1 or 2")
    if min(depths) < 1:
        raise ValueError(f"depths {tuple(depths)} must be at least 1; leave a stage out of the layout instead")
    for letter, dim in zip(layout, embed_dim, strict=True):
        if letter == "T" and dim % head_dim:
            raise ValueError(f"embed_dim {dim} of a T stage is not divisible by head_dim {head_dim}")


def _init_weights(module: nn.Module) -> None:
    init_conv(module)
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block without keeping its activations; batch norm's running statistics see the batch once, not twice."""
    if torch.compiler.is_compiling():  # the compiler recomputes without side effects
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(block)))


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


_TIMM_NAMES = (
    (r"^stem\.norm1\.act\.", "stem.2."),
    (r"^stem\.conv1\.", "stem.0."),
    (r"^stem\.norm1\.", "stem.1."),
    (r"^stem\.conv2\.", "stem.3."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.shortcut\.expand\.", ".shortcut.proj."),
    (r"\.conv1_1x1\.", ".expand."),
    (r"\.conv2_kxk\.", ".depthwise."),
    (r"\.conv3_1x1\.", ".project."),
    (r"\.norm1\.norm\.", ".norm1."),
    (r"\.norm1\.act\.", ".act."),
    (r"\.attn\.rel_pos\.", ".attn."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.pre_logits\.fc\.", "pre_logits.0."),
    (r"^head\.pre_logits\.act\.", "pre_logits.1."),
    (r"^head\.fc\.", "head."),
)


def _from_timm(name: str) -> str:
    for theirs, ours in _TIMM_NAMES:
        name = re.sub(theirs, ours, name)
    return name


def _in_our_layout(name: str, tensor: Tensor, head_dim: int) -> Tensor:
    """timm's linear layers are 1×1 convolutions, its q, k and v lie together by head."""
    if re.search(r"\.(qkv|attn\.proj|fc1|fc2)\.weight$", name):
        tensor = tensor.flatten(1)
    if ".qkv." in name:
        tensor = rearrange(tensor, "(heads three d) ... -> (three heads d) ...", three=3, d=head_dim)
    return tensor
