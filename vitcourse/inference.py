"""A model at work: evaluation mode, and images as it wants them. Training, pruning and quantization share this."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

MeanStd = tuple[Tensor, Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each part has its own mode back, be it a batch norm that was frozen.

    >>> model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Dropout())
    >>> with evaluating(model):
    ...     any(part.training for part in model.modules())
    False
    >>> [part.training for part in model.modules()]
    [True, False, True]
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def find_mean_std(model: nn.Module, dataset: Dataset, device: torch.device) -> MeanStd | None:
    """Per channel (C, 1, 1): the model's own mean and std if it has some, else the data set's; None if neither has.

    Raises:
        ValueError: neither has, and the images are uint8.
    """
    source = getattr(model, "preprocess", None) or dataset
    if hasattr(source, "mean"):
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (source.mean, source.std))
        return mean, std
    if torch.as_tensor(dataset[0][0]).dtype == torch.uint8:
        raise ValueError("uint8 images need mean and std to be normalised; set model.preprocess or the data set's")
    return None


def normalise(images: Tensor, mean_std: MeanStd | None) -> Tensor:
    """uint8 images (B, C, H, W) to standardised float32; floating-point images are what they should be already."""
    if mean_std is None or images.is_floating_point():
        return images
    mean, std = mean_std
    return (images.float() / 255 - mean) / std
