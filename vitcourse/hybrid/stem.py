"""The convolutional stem of Xiao et al. 2021 ("Early Convolutions Help Transformers See Better")."""

import torch
from torch import Tensor, nn

from vitcourse.layers import to_pair


class ConvStem(nn.Module):
    """Patches to vectors by small convolutions: (B, C, H, W) -> (B, D, H/p, W/p).

    One 3×3 convolution of stride 2 for every factor of 2 in the patch size, each with batch norm and ReLU, each with
    twice the channels of the one before; a 1×1 convolution ends it (sec. 4). The last 3×3 has D channels, so patch 16
    and D = 192 or 384 give the widths of the paper's 1 and 4 GF models, (24, 48, 96, 192) and (48, 96, 192, 384).

    At patch 16 and 224 pixels the stem costs what one transformer block does: with one block fewer, every ViT size has
    the MACs of its patchify twin within 1.5 %. A stem for patch 4 or 8 costs less than a block, so there the model ends
    up to 5 % below its twin.

    Batch norm has PyTorch's momentum 0.1 and ε = 1e-5. Convolutions start from He's normal distribution (fan-out).

    Args:
        patch_size: 2, 4, 8, 16 or 32 pixels, the same in both directions.
        in_chans: channels of the image.
        embed_dim: width D of a token.

    Raises:
        ValueError: another patch size; a width that cannot be halved often enough.

    >>> ConvStem(patch_size=16, embed_dim=192)(torch.zeros(2, 3, 224, 224)).shape
    torch.Size([2, 192, 14, 14])
    """

    def __init__(self, patch_size: int | tuple[int, int] = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.patch_size = to_pair(patch_size, "patch_size")
        side = self.patch_size[0]
        if self.patch_size != (side, side) or side not in (2, 4, 8, 16, 32):
            raise ValueError(
                f"patch_size {patch_size!r} cannot be reached by halving; use 2, 4, 8, 16 or 32 in both directions"
            )
        stages = side.bit_length() - 1
        first, rest = divmod(embed_dim, 2 ** (stages - 1))
        if rest:
            raise ValueError(
                f"embed_dim {embed_dim} is not divisible by {2 ** (stages - 1)}, so the {stages} convolutions of patch "
                f"size {side} cannot double their channels; use {embed_dim - rest or 2 ** (stages - 1)}"
            )
        widths = [in_chans, *(first * 2**i for i in range(stages))]
        layers: list[nn.Module] = []
        for width_in, width in zip(widths[:-1], widths[1:], strict=True):
            conv = nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv2d(embed_dim, embed_dim, 1)
        self.apply(init_conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.convs(x))


@torch.no_grad()
def init_conv(module: nn.Module) -> None:
    """He's normal distribution over what one output feeds (fan-out), biases zero. For ``module.apply``.

    ``nn.init.kaiming_normal_`` counts all channels of a grouped convolution; a depthwise one feeds only its own.
    """
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[:, 0].numel() // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
