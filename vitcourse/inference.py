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


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Parts of a model that stay in evaluation mode while the rest trains.

    * Of a model in training mode: those that somebody has put in evaluation mode.
    * Of a model that is in evaluation mode as a whole, as one is that was loaded for use or has been trained before:
      batch norms of whose parameters none is trained. Whoever freezes these wants their statistics kept; dropout and
      the like come to life again.

    >>> model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Dropout())
    >>> frozen_modules(model)
    [BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)]
    >>> frozen_modules(model.eval())
    []
    """
    if model.training:
        return [module for module in model.modules() if not module.training]
    return [module for module in model.modules() if _is_frozen_norm(module)]


def _is_frozen_norm(module: nn.Module) -> bool:
    trained = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
    return getattr(module, "running_mean", None) is not None and bool(trained) and not any(trained)


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
