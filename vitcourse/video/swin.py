"""Video Swin Transformer (Liu et al. 2022), from top to bottom. Parts and names are those of our Swin for images."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from vitcourse.hierarchical.swin import PatchMerging, SwinBlock, SwinStage, check_stages
from vitcourse.layers import drop_path_rates, init_linear, pad_to_multiple, to_pair
from vitcourse.video.checkpoints import adapt_swin, swin_names
from vitcourse.video.tubelets import TubeletEmbed, check_clips
from vitcourse.video.window_attention import WindowAttention3d
from vitcourse.video.windows import Triple, to_triple

PATCHES = "patch_embed.proj.weight"


class FrameMerging(PatchMerging):
    """Patch merging in each frame; the number of frames stays: (B, T, H, W, C) -> (B, T, ⌈H/2⌉, ⌈W/2⌉, 2C) (sec. 3.1).

    >>> import torch
    >>> FrameMerging(32)(torch.zeros(2, 3, 7, 8, 32)).shape
    torch.Size([2, 3, 4, 4, 64])
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class NormTubeletEmbed(TubeletEmbed):
    """Tubelets to normalised vectors, channels last: (B, C, T, H, W) -> (B, T/t, H/p, W/p, D)."""

    def __init__(self, tubelet_size: int, patch_size: int | tuple[int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__(tubelet_size, patch_size, in_chans, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(rearrange(super().forward(x), "b d t h w -> b t h w d"))


class VideoSwin(nn.Module):
    """Video Swin Transformer (fig. 1): clips (B, C, T, H, W) to logits (B, num_classes).

    Clips of any size and number of frames are taken: filled with zeros at the end of each axis to the next multiple of
    the tubelet, and maps to the next multiple of the window; see :class:`WindowAttention3d` for what becomes of that
    padding. A compiled graph is for one size.

    Weights of an image Swin make a model that says of a still clip what that one says of its image, where no map is
    padded: filters are inflated to their mean, and biases are the same for all distances in time (sec. 3.3).

    Args:
        img_size: side of the frames that it is meant for, or (height, width), in pixels; nothing depends on it.
        patch_size: side of a tubelet, or (height, width), in pixels.
        num_frames: frames of a clip that it is meant for; nothing depends on it.
        tubelet_size: frames of a tubelet.
        in_chans: channels of a frame.
        num_classes: width of the head; 0 for none, then the model returns pooled features.
        embed_dim: width of the first stage; each further stage is twice as wide.
        depths: number of blocks of each stage. Every second one shifts its windows by half.
        num_heads: heads of the attention in each stage.
        window_size: side of a window in tokens, or (frames, height, width).
        mlp_ratio: hidden width of the MLP over the stage's width.
        qkv_bias: biases on the projection to queries, keys and values.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth at the last block; it grows linearly from 0 at the first.
        mask_padding: hide padding and strangers, and count distances, exactly, instead of as torchvision does.

    Raises:
        ValueError: sizes that do not fit together, in ``forward`` a wrong rank or number of channels.
        TypeError: in ``forward``, integer clips.

    >>> import torch
    >>> model = VideoSwin(56, num_frames=8, num_classes=10, embed_dim=24, depths=(2, 2), num_heads=(2, 4))
    >>> model(torch.zeros(2, 3, 8, 56, 56)).shape
    torch.Size([2, 10])
    >>> [tuple(m.shape) for m in model.feature_maps(torch.zeros(2, 3, 5, 50, 75))]
    [(2, 24, 3, 13, 19), (2, 48, 3, 7, 10)]
    """

    num_prefix_tokens = 0
    global_pool = "avg"
    inflation = "mean"  # how filters of images become filters of clips; see inflate_weight

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        num_frames: int = 32,
        tubelet_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 400,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Triple = (8, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = to_pair(img_size, "img_size"), to_pair(patch_size, "patch_size")
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        self.window_size = to_triple(window_size, "window_size")
        if num_frames < 1 or tubelet_size < 1:
            raise ValueError(f"num_frames {num_frames} and tubelet_size {tubelet_size} must be at least 1")
        dims = [embed_dim * 2**i for i in range(len(depths))]
        check_stages(dims, depths, num_heads)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.embed_dim, self.num_features = embed_dim, dims[-1]
        self.feature_info = [{"num_chs": dim, "reduction": self.patch_size[0] * 2**i} for i, dim in enumerate(dims)]

        self.patch_embed = NormTubeletEmbed(tubelet_size, self.patch_size, in_chans, embed_dim)
        self.layers = nn.ModuleList()
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        regular = partial(WindowAttention3d, window_size=self.window_size, mask_padding=mask_padding)
        mixers = (regular, partial(regular, shift_size=tuple(n // 2 for n in self.window_size)))
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            blocks = [
                SwinBlock(dim, heads, mlp_ratio, qkv_bias, drop_path=rate, attn_layer=mixers[j % 2])
                for j, rate in enumerate(islice(rates, depth))
            ]
            self.layers.append(SwinStage(blocks, FrameMerging(dim // 2) if i > 0 else None))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = nn.Sequential(OrderedDict(drop=nn.Dropout(drop_rate), fc=self._make_classifier(num_classes)))
        self.apply(init_linear)

    def _make_classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside norms and biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

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
        """Clips (B, C, T, H, W) to a map of tubelets (B, t, h, w, D)."""
        check_clips(x, self.in_chans)
        return self.patch_embed(pad_to_multiple(x, (self.tubelet_size, *self.patch_size), axes=(2, 3, 4)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Clips (B, C, T, H, W) to the last stage's map (B, t, h, w, D), normalised."""
        x = self.embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """The last map (B, t, h, w, D) to logits (B, num_classes)."""
        return self.head(x.mean(dim=(1, 2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def feature_maps(self, x: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """The stages' maps, finest first, the final norm applied to the last stage's.

        Args:
            x: clips (B, C, T, H, W).
            indices: stages whose maps are wanted, counted from 0, or from the end with −1; all where None.

        Returns:
            a list of (B, C_i, t, H_i, W_i), whose channels and strides in space ``feature_info`` tells.

        Raises:
            ValueError: a stage that does not exist.
        """
        count = len(self.layers)
        indices = range(count) if indices is None else indices
        if not all(-count <= i < count for i in indices):
            raise ValueError(f"indices {tuple(indices)} name stages that do not exist; the model has {count}")
        wanted, maps = [i % count for i in indices], []
        x = self.embed(x)
        for stage in self.layers[: max(wanted, default=-1) + 1]:
            x = stage(x)
            maps.append(x)
        if len(maps) == count:
            maps[-1] = self.norm(x)
        return [rearrange(maps[i], "b t h w d -> b d t h w") for i in wanted]

    def checkpoint_names(self, names: Collection[str]) -> Callable[[str], str]:
        """How to call what a checkpoint with these names has; see :mod:`vitcourse.video.checkpoints`."""
        return swin_names(names)

    def facts_in(self, state: Mapping[str, Tensor]) -> dict[str, str]:
        """That the windows of an image model are windows of one frame."""
        of_images = PATCHES in state and state[PATCHES].ndim == 4
        mixers = [name for name, module in self.named_modules() if isinstance(module, WindowAttention3d)]
        return {f"{name}.mixer": WindowAttention3d.__name__ for name in mixers} if of_images else {}

    def adapt_state_dict(
        self, state: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """A checkpoint of torchvision, the authors or an image Swin in this model's names and windows."""
        state, of_images = adapt_swin(state, self, facts or {})
        if of_images:
            print(
                f"vitcourse: the weights are an image model's: filters are inflated ({self.inflation}), and biases are "
                "alike for all distances in time, so on a still clip the model says what that one says",
                file=sys.stderr,
            )
        return state
