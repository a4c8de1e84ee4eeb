"""Accuracy and loss of a model on a data set."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse.devices import device_of, resolve_device
from vitcourse.inference import MeanStd, evaluating, find_mean_std, normalise

from .batches import Pairs, Share, eval_batches
from .config import TrainConfig
from .runtime import autocast


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig | None = None,
    *,
    mean_std: MeanStd | None = None,
    share: Share | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> dict[str, float]:
    """Mean cross-entropy and accuracy of ``model`` on a data set: ``{"val_loss", "val_accuracy"}``.

    Args:
        model: images (B, C, H, W) to logits (B, num_classes); it is evaluated where it lies.
        dataset: pairs (image, label); uint8 images are normalised as in :func:`vitcourse.inference.find_mean_std`.
        config: gives precision, ``eval_batch_size``, ``loader`` and ``num_workers``.
        mean_std: used in place of what ``find_mean_std`` finds.
        share: which of several processes this is; each then takes its share of the images, every image exactly once.
        reduce: sums a tensor over these processes.

    Raises:
        ValueError: an empty data set, a label out of range, no mean and std for uint8 images, or a ``config.device``
            on which the model does not lie.

    >>> from vitcourse.data import open_dataset
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    >>> sorted(evaluate(model, open_dataset("fashion_mnist_subset", "test")))
    ['val_accuracy', 'val_loss']
    """
    total = torch.zeros(2, device=device_of(model))

    def add(logits: Tensor, labels: Tensor) -> None:
        nonlocal total
        loss = F.cross_entropy(logits, labels, reduction="sum")
        total = total.to(loss.device) + torch.stack([loss, (logits.argmax(1) == labels).sum()])

    visit_logits(model, dataset, add, config, mean_std=mean_std, share=share)
    loss, correct = reduce(total).tolist()
    return {"val_loss": loss / len(dataset), "val_accuracy": correct / len(dataset)}


def visit_logits(
    model: nn.Module,
    dataset: Dataset,
    visit: Callable[[Tensor, Tensor], None],
    config: TrainConfig | None = None,
    *,
    mean_std: MeanStd | None = None,
    share: Share | None = None,
) -> None:
    """Call ``visit(logits, labels)``, (B, num_classes) in float32 and (B,), for every batch of a data set.

    The other arguments, and what is raised, are those of :func:`evaluate`.
    """
    if len(dataset) == 0:
        raise ValueError("dataset is empty; give a data set with at least one image")
    config = config or TrainConfig()
    device = device_of(model) or resolve_device(config.device)
    asked = resolve_device(config.device) if config.device != "auto" else device
    if asked.type != device.type or (share is None and asked.index not in (None, device.index)):
        raise ValueError(f"the model lies on {device}, and device is {config.device!r}; move it: model.to(device)")
    mean_std = mean_std or find_mean_std(model, dataset, device)
    batches = eval_batches(dataset, share or Share(), config, device, Pairs(getattr(model, "num_classes", None)))
    with evaluating(model), torch.inference_mode(), autocast(device, config.precision):
        for images, labels in batches:
            visit(model(normalise(images, mean_std)).float(), labels)
