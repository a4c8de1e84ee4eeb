"""What is where in an image: detectors and segmenters on the maps of any backbone of the library.

>>> import torch
>>> from vitcourse import create_model
>>> backbone = {"backbone": "vit_tiny", "backbone_args": {"patch_size": 8, "depth": 2}}
>>> small = {"embed_dim": 32, "num_heads": 4, "encoder_depth": 0, "decoder_depth": 1, "mlp_dim": 64}
>>> model = create_model("detr", **backbone, **small, img_size=64, num_classes=3, num_queries=5)
>>> images = torch.rand(1, 3, 64, 64)
>>> targets = [{"boxes": torch.tensor([[8.0, 8, 40, 30]]), "labels": torch.tensor([2])}]
>>> from vitcourse.dense_prediction import mean_loss
>>> loss = mean_loss(model.losses(model(images, targets), targets))
>>> sorted(model.results(model(images))[0])
['boxes', 'labels', 'scores']

All models are called as ``model(images, targets)``, the targets being for those that learn to denoise; ``model.losses``
gives the terms of the loss, each a sum and a count; ``model.results`` gives objects, ``model.segment`` the classes of
pixels. Read in this order: ``boxes`` (and targets), ``terms``, ``base``, ``resnet``, ``pyramid``, ``fcos``;
``segmentation``, ``unet``, ``segmenter``; ``matching``, ``set_loss``, ``detr_layers``, ``detr_queries``, ``detr``;
``masks``, ``eomt``; ``metrics``, ``tasks`` (of the training engine), ``models``.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "base": ("DenseModel",),
    "boxes": ("Target", "check_targets", "giou", "to_centres", "to_corners"),
    "detr": ("Detr", "DetrOutput"),
    "detr_layers": ("sine_code", "sine_positions"),
    "detr_queries": ("Denoising", "denoising_mask", "disturb"),
    "eomt": ("Eomt", "EomtOutput"),
    "fcos": ("Fcos", "FcosHead", "FcosLoss", "FcosOutput", "assign", "centerness", "points_of"),
    "masks": ("MaskSetLoss", "dice_loss", "instances", "semantic_scores", "uncertain_points"),
    "matching": ("Match", "hungarian"),
    "metrics": ("DetectionMetric", "SegmentationMetric", "near_boundary"),
    "resnet": ("ResNet",),
    "pyramid": ("FeaturePyramid", "Pyramid", "SimpleFeaturePyramid"),
    "segmentation": ("IGNORED", "PixelLoss", "SemanticModel", "check_map", "to_map", "to_masks"),
    "segmenter": ("MaskTransformer", "Segmenter"),
    "set_loss": ("BoxSetLoss",),
    "tasks": ("Detection", "Segmentation"),
    "terms": ("Term", "Terms", "focal_loss", "mean_loss", "sum_and_count"),
    "unet": ("UNet", "UNetDecoder", "Unetr"),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    """Import the parts on first use: who asks for a classifier shall not wait for torchvision."""
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
