"""Image classification, the task of whoever asks for no other; and a task made of two functions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse.inference import MeanStd, find_mean_std, normalise

from .augment import Mixer, augment
from .batches import Share, check_labels
from .config import TrainConfig
from .evaluation import evaluate
from .task import AUGMENTATIONS, Part, Reduce, Task, check_not_empty

LossFn = Callable[[nn.Module, Tensor, Tensor], Tensor]
EvalFn = Callable[[nn.Module, Dataset], dict[str, float]]


class Classification(Task):
    """Pairs (image, label) and cross-entropy, with every augmentation of :class:`TrainConfig`."""

    name = "classification"
    metrics = ("val_loss", "val_accuracy")
    best = ("val_accuracy", "max")
    counts_samples = True
    takes_pairs = True
    augments = AUGMENTATIONS

    num_classes: int | None = None  # None: unknown, and labels are not looked at
    mean_std: MeanStd | None = None
    config: TrainConfig

    def check_data(self, model: nn.Module, train_set: Dataset, val_set: Dataset | None, config: TrainConfig) -> None:
        self.num_classes = self._find_num_classes(model, train_set, config)
        for dataset, name in ((train_set, "train_set"), (val_set, "val_set")):
            if dataset is not None:
                self._check_dataset(dataset, name, model)
        if (config.mixup or config.cutmix) and self.num_classes is None:
            raise ValueError("mixup and cutmix need the number of classes; give the model `num_classes`")

    def _find_num_classes(self, model: nn.Module, train_set: Dataset, config: TrainConfig) -> int | None:
        classes = getattr(train_set, "classes", None)
        return getattr(model, "num_classes", None) or (len(classes) if classes else None)

    def _check_dataset(self, dataset: Dataset, name: str, model: nn.Module) -> None:
        """Is it empty, do its labels and images fit the model?"""
        check_not_empty(dataset, name)
        classes = getattr(dataset, "classes", None)
        if classes is not None and self.num_classes is not None and len(classes) != self.num_classes:
            raise ValueError(
                f"the model's num_classes is {self.num_classes} but {name} has {len(classes)} classes; "
                f"build the model with num_classes={len(classes)}"
            )
        targets = getattr(dataset, "targets", None)
        if targets is not None and self.num_classes is not None:
            check_labels(torch.as_tensor(targets), self.num_classes, name)
        self.check_sample(dataset[0], model, name)

    def check_sample(self, sample: Any, model: nn.Module, name: str) -> None:
        """Raise ValueError unless what the model takes comes first in a sample of the data set called ``name``."""
        check_image(sample[0], model, name)

    def setup(self, model: nn.Module, train_set: Dataset, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.mean_std = find_mean_std(model, train_set, device)

    def check_batch(self, batch: tuple[Tensor, Tensor]) -> None:
        if self.num_classes is not None:
            check_labels(batch[1], self.num_classes, "the data set")

    def prepare(self, batch: tuple[Tensor, Tensor], part: Part | None) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if part is not None:
            images = augment(images, part.index, part.epoch, self.config)
        images = normalise(images, self.mean_std)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if part is None or not (self.config.mixup or self.config.cutmix):
            return images, labels
        return Mixer(self.config, self.num_classes, part.step, part.size)(images, labels, part.start)

    def mean_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, a mean over the images; targets are labels (B,) or, mixed, shares (B, num_classes)."""
        logits = model(images)
        if logits.ndim != 2 or (self.num_classes and logits.shape[1] != self.num_classes):
            expected = f"(B, {self.num_classes or 'num_classes'})"
            raise ValueError(f"the model's output has shape {tuple(logits.shape)}, expected logits {expected}")
        return F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return self.contribution(model, batch, 1)

    def contribution(self, model: nn.Module, batch: tuple[Tensor, Tensor], expected: float) -> tuple[Tensor, int]:
        # Of a whole batch the weight is exactly 1: no sum is formed and divided again, which would round.
        images, targets = batch
        return self.mean_loss(model, images, targets) * (len(images) / expected), len(images)

    def evaluate(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: TrainConfig | None = None,
        *,
        share: Share | None = None,
        reduce: Reduce = lambda total: total,
    ) -> dict[str, float]:
        return evaluate(model, dataset, config, mean_std=self.mean_std, share=share, reduce=reduce)


class FunctionTask(Classification):
    """What ``fit(loss_fn=…, eval_fn=…)`` means: images prepared as for classification, then the caller's functions.

    Args:
        loss_fn: ``loss_fn(model, images, labels)``, a mean over the images.
        eval_fn: ``eval_fn(model, val_set)``, a dict that joins the row; its ``val_accuracy`` chooses the best weights.
    """

    def __init__(self, loss_fn: LossFn | None = None, eval_fn: EvalFn | None = None) -> None:
        self.loss_fn, self.eval_fn = loss_fn, eval_fn
        if eval_fn is not None:  # who knows what the model gives
            self.name = "custom"

    def _find_num_classes(self, model: nn.Module, train_set: Dataset, config: TrainConfig) -> int | None:
        """None where a loss of the caller's own needs none."""
        if self.loss_fn is not None and not (config.mixup or config.cutmix):
            return None
        return super()._find_num_classes(model, train_set, config)

    def mean_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return (self.loss_fn or super().mean_loss)(model, images, targets)

    def evaluate(self, model: nn.Module, dataset: Dataset, *args: Any, **options: Any) -> dict[str, float]:
        if self.eval_fn is not None:
            return self.eval_fn(model, dataset)
        return super().evaluate(model, dataset, *args, **options)


def check_image(image: Any, model: nn.Module, name: str) -> None:
    if not isinstance(image, Tensor) or image.ndim != 3:
        what = f"a tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"images of {name} must be tensors (C, H, W), got {what}; convert them in the transform")
    channels, *size = image.shape
    in_chans, img_size = getattr(model, "in_chans", channels), getattr(model, "img_size", size)
    if in_chans != channels:
        raise ValueError(f"{name} has {channels}-channel images, the model's in_chans is {in_chans}; make them agree")
    img_size = [img_size] * 2 if isinstance(img_size, int) else list(img_size)
    if img_size != size:
        raise ValueError(
            f"{name} has images of {size[0]}×{size[1]}, the model's img_size is {img_size[0]}×{img_size[1]}; "
            f"build the model with img_size={size[0]} or resize the images"
        )
    if image.is_floating_point() and not bool(image.isfinite().all()):
        raise ValueError(f"{name} has NaN or infinite pixels; check the transform and the files")
