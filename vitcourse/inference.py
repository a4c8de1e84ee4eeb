"""A model at work: evaluation mode, and images as it wants them. Training, pruning and quantization share this."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse.devices import device_of

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
    >>> frozen_modules(model) == [model[0]]
    True
    >>> frozen_modules(model.eval())
    []
    """
    if model.training:
        return [module for module in model.modules() if not module.training]
    return [module for module in model.modules() if is_frozen_norm(module)]


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm, or another layer with running statistics, of whose parameters none is trained."""
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


def ignored_mean_std(model: nn.Module, dataset: Dataset) -> str | None:
    """A line about a data set's mean and std that a model passes over for a mean and std nobody measured; else None.

    A model for other channels than three is built with 0.5 for each; files and whoever sets ``preprocess`` know better.
    """
    preprocess, own = getattr(model, "preprocess", None), [getattr(dataset, name, None) for name in ("mean", "std")]
    if preprocess is None or None in own or len(preprocess.mean) == 3:
        return None
    used = [tuple(preprocess.mean), tuple(preprocess.std)]
    if {*used[0], *used[1]} != {0.5} or used == [tuple(value) for value in own]:
        return None
    if getattr(dataset[0][0], "dtype", None) != torch.uint8:  # taken as it is
        return None
    told = " and ".join(", ".join(f"{number:.3g}" for number in value) for value in own)
    return (
        f"images are normalised by model.preprocess, mean 0.5 and std 0.5, and not by the data's own {told}; for a "
        "model that is not trained yet: model.preprocess = replace(model.preprocess, mean=data.mean, std=data.std)"
    )


def normalise(images: Tensor, mean_std: MeanStd | None) -> Tensor:
    """uint8 images (B, C, H, W), or clips (B, C, T, H, W), to standardised float32; floats are what they should be."""
    if mean_std is None or images.is_floating_point():
        return images
    mean, std = (values.unsqueeze(1) if images.ndim == 5 else values for values in mean_std)
    return (images.float() / 255 - mean) / std


class Predictions(NamedTuple):
    """What a classifier says of N images.

    Attributes:
        probabilities: (N, K), on the CPU; each row sums to 1.
        classes: the K names, or numbers where the model knows no names.
    """

    probabilities: Tensor
    classes: list[str]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image the ``k`` likeliest classes, likeliest first, with their probabilities.

        >>> Predictions(torch.tensor([[0.25, 0.75]]), ["cat", "dog"]).top(1)
        [[('dog', 0.75)]]
        """
        values, indices = self.probabilities.topk(min(k, len(self.classes)))
        return [
            [(self.classes[i], p) for i, p in zip(row.tolist(), ps.tolist(), strict=True)]
            for row, ps in zip(indices, values, strict=True)
        ]


def image_transform(model: nn.Module) -> Callable[[Any], Tensor]:
    """What makes of a picture or tensor the (C, H, W) that ``model`` takes: ``eval_transform`` by its ``preprocess``.

    Raises:
        ValueError: the model does not say how its images are prepared.
    """
    from vitcourse.data import eval_transform

    preprocess = getattr(model, "preprocess", None)
    if preprocess is None:
        raise ValueError(
            "the model does not say how its images are prepared; set model.preprocess = "
            "vitcourse.registry.Preprocess(img_size=…, mean=…, std=…)"
        )
    channels = getattr(model, "in_chans", len(preprocess.mean))
    return eval_transform(**asdict(preprocess), in_chans=channels if channels in (1, 3) else None)


def predict(model: nn.Module, images: Any, *, batch_size: int = 64) -> Predictions:
    """Class probabilities of pictures, prepared as ``model.preprocess`` says.

    Args:
        model: images to logits (B, K), as :func:`vitcourse.create_model` gives it; it computes where it lies.
        images: one picture or several: paths, PIL images, tensors (C, H, W), or a batch (B, C, H, W); of what
            :func:`vitcourse.data.read_image` and :func:`vitcourse.data.eval_transform` take.
        batch_size: pictures at a time.

    Raises:
        ValueError: no image; one that cannot be read, named; a model that has no ``preprocess``, or gives no logits.

    >>> from PIL import Image
    >>> from vitcourse import create_model
    >>> model = create_model("vit_tiny", img_size=32, patch_size=8, num_classes=3, depth=1)
    >>> found = predict(model, [Image.new("RGB", (40, 30)), torch.rand(3, 64, 64)])
    >>> tuple(found.probabilities.shape), found.classes
    ((2, 3), ['0', '1', '2'])
    """
    transform = image_transform(model)
    pictures = list(_each(images))
    if not pictures:
        raise ValueError("images is empty; give at least one picture")
    parts = [
        probabilities(model, torch.stack([transform(picture) for picture in pictures[i : i + batch_size]]))
        for i in range(0, len(pictures), batch_size)
    ]
    found = torch.cat(parts)
    return Predictions(found, class_names(model, found.shape[1]))


def _each(images: Any) -> Iterable[Any]:
    from vitcourse.data.reading import is_picture

    one = is_picture(images) or getattr(images, "ndim", None) in (2, 3)
    return [images] if one else images


def probabilities(model: nn.Module, batch: Tensor) -> Tensor:
    """Softmax (B, K) of the logits of a prepared batch (B, C, H, W), on the CPU.

    Raises:
        ValueError: the model's output is no logits.
    """
    with evaluating(model), torch.inference_mode():
        logits = model(batch.to(device_of(model) or batch.device))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
        raise ValueError(f"the model's output has {what}, expected logits (B, num_classes); predict is for classifiers")
    return logits.float().softmax(dim=1).cpu()


def class_names(model: nn.Module, count: int) -> list[str]:
    """``model.classes``, or numbers where it has none, or had another head when it learned them."""
    names = getattr(model, "classes", None)
    return list(names) if names and len(names) == count else [str(i) for i in range(count)]
