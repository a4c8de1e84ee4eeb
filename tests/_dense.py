"""What the tests of dense prediction share."""

import torch
from torch import Tensor, nn

from vitcourse import create_model


def randomised(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Every parameter and running statistic is drawn anew: zeros at the start hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * std + (1 if parameter.ndim == 1 and "weight" in name else 0))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=std)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def plain(**arguments) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "num_classes": 0, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return create_model("vit_tiny", **{**sizes, **arguments})


def swin(**arguments) -> nn.Module:
    sizes = {"img_size": 32, "num_classes": 0, "embed_dim": 8, "depths": (1, 1, 1), "num_heads": (1, 2, 2)}
    return create_model("swin_tiny", **{**sizes, "window_size": 4, **arguments})


def coatnet(**arguments) -> nn.Module:
    sizes = {"stem_dim": 8, "embed_dim": (8, 16, 32), "depths": (1, 1, 1), "layout": "CCT", "strides": (2, 2, 2)}
    return create_model("coatnet_0", **{"img_size": 32, "num_classes": 0, "head_dim": 8, **sizes, **arguments})


BACKBONES = {"plain": plain, "swin": swin, "coatnet": coatnet}


def target(boxes: list, labels: list, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """A target; with ``size`` also masks, of the boxes' pixels."""
    made = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }
    if size is not None:
        made["masks"] = torch.zeros(len(labels), *size, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(made["masks"], boxes, strict=True):
            mask[int(y1) : int(y2), int(x1) : int(x2)] = True
    return made


def random_boxes(count: int, size: tuple[int, int], smallest: int = 4) -> Tensor:
    """Boxes (count, 4) inside of an image, in corners."""
    height, width = size
    low = torch.rand(count, 2) * torch.tensor([width - smallest, height - smallest])
    room = torch.tensor([width, height]) - low - smallest
    return torch.cat([low, low + smallest + torch.rand(count, 2) * room], dim=1)
