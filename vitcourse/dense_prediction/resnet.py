"""ResNet (He et al. 2016, "Deep Residual Learning for Image Recognition"): the backbone that DETR was trained with.

torchvision's own model behind the contract of our backbones, so that its weights, timm's and those inside of DETR's
checkpoints all fit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from vitcourse.layers import check_images, init_linear, to_pair

_BLOCKS = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}


class ResNet(resnet.ResNet):
    """ResNet with four stages, at strides of 4, 8, 16 and 32 pixels.

    Args:
        img_size: side of the images, or (height, width), in pixels; any size is taken.
        in_chans: channels of an image.
        num_classes: width of the head; 0 for none, then the model returns pooled features (B, D).
        depths: blocks of each stage.
        block: ``"basic"`` or ``"bottleneck"``.
        dilated: the last stage keeps the stride of the one before (DETR's DC5).
        frozen_norms: batch norms that keep to the statistics of the weights, as DETR's do (Carion et al. 2020, section
            4: batches are too small); by default those of a backbone, which has no classes.

    Raises:
        ValueError: an unknown block, or another number of stages.

    >>> model = ResNet(depths=(1, 1, 1, 1), block="basic")
    >>> [tuple(m.shape) for m in model.feature_maps(torch.rand(1, 3, 64, 96))]
    [(1, 64, 16, 24), (1, 128, 8, 12), (1, 256, 4, 6), (1, 512, 2, 3)]
    """

    head_names = ("fc",)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        depths: Sequence[int] = (3, 4, 6, 3),
        block: str = "bottleneck",
        dilated: bool = False,
        frozen_norms: bool | None = None,
    ) -> None:
        if block not in _BLOCKS:
            raise ValueError(f"block {block!r} is unknown; use {' or '.join(map(repr, _BLOCKS))}")
        if len(depths) != 4:
            raise ValueError(f"depths {tuple(depths)} must be of four stages")
        if dilated and block == "basic":
            raise ValueError("dilated needs block='bottleneck'; torchvision's basic blocks have no dilation")
        frozen = num_classes == 0 if frozen_norms is None else frozen_norms
        norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        dilations = (False, False, dilated)
        super().__init__(_BLOCKS[block], list(depths), replace_stride_with_dilation=list(dilations), norm_layer=norm)
        self.img_size, self.in_chans = to_pair(img_size, "img_size"), in_chans
        self.num_features = 512 * _BLOCKS[block].expansion
        self.grad_checkpointing = False
        if in_chans != 3:
            self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        strides = (4, 8, 16, 16 if dilated else 32)
        widths = [self.num_features // 2**i for i in (3, 2, 1, 0)]
        self.feature_info = [{"num_chs": w, "reduction": s} for w, s in zip(widths, strides, strict=True)]
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new, randomly initialised head in place; 0 classes for none."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc.apply(init_linear).to(self.conv1.weight)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside norms and biases."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations: less memory, more time."""
        self.grad_checkpointing = enable

    def feature_maps(self, x: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """The stages' maps (B, C_i, H_i, W_i) of images (B, C, H, W); all where ``indices`` is None.

        Raises:
            ValueError: a stage that does not exist.
        """
        indices = range(4) if indices is None else indices
        if not all(-4 <= i < 4 for i in indices):
            raise ValueError(f"indices {tuple(indices)} name stages that do not exist; the model has 4")
        wanted, maps = [i % 4 for i in indices], []
        check_images(x, self.in_chans)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[: max(wanted, default=-1) + 1]:
            again = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(stage, x, use_reentrant=False) if again else stage(x)
            maps.append(x)
        return [maps[i] for i in wanted]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last stage's map (B, D, h, w)."""
        return self.feature_maps(x, (-1,))[0]

    def forward_head(self, x: Tensor) -> Tensor:
        """The last map (B, D, h, w) to logits (B, num_classes)."""
        return self.fc(self.avgpool(x).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def adapt_state_dict(
        self, state: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Another ResNet's checkpoint: counts of batches are left out, or begin with 0, as our norms want it."""
        counts = {name: tensor for name, tensor in self.state_dict().items() if name.endswith("num_batches_tracked")}
        others = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        return others | {name: state.get(name, torch.zeros_like(count)) for name, count in counts.items()}
