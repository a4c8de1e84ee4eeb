"""Detection and segmentation as tasks of the engine: ``fit(model, images, val_images, config, task=Detection())``.

A loss is a sum over what the model's terms count (points that have a box, objects, pixels), divided by their number in
the whole step: micro-batches and processes add up to what one batch gives, to rounding. What is drawn at random in a
step (dropout, DETR's noise, EoMT's masks, sampled points) is drawn for each micro-batch by itself. A model whose terms
have different counts (``class_count="weights"``) has no such sum, and is refused.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse.data import collate_dense
from vitcourse.devices import device_of, kept_random_state, resolve_device, seed_all, widest_float
from vitcourse.inference import evaluating
from vitcourse.train import Task, TrainConfig
from vitcourse.train.batches import Share
from vitcourse.train.runtime import autocast
from vitcourse.train.task import Reduce, pair
from vitcourse.weights import unwrap

from .boxes import Target
from .metrics import COCO_SMALL, DetectionMetric, SegmentationMetric
from .segmentation import to_masks
from .terms import sum_and_count

Batch = Mapping[str, Any]
Metric = DetectionMetric | SegmentationMetric


class DenseTask(Task):
    """What :class:`Detection` and :class:`Segmentation` share.

    Samples are (image, target) as ``dense_train_transform`` and ``dense_eval_transform`` of ``vitcourse.data`` give
    them: the data set has its transform.

    Args:
        augments: fields of TrainConfig that the training images' transform heeds, and that may therefore be set.
        per_class: ``evaluate`` also has a value for each class that occurs.
    """

    # Of a backbone that gives fewer maps than it has stages, and where there is no object, parts get no gradient.
    partly_trained = True
    least_count = 1.0
    wants: Collection[str]  # of a model's `wants`, those that this task has

    def __init__(self, augments: Collection[str] = (), per_class: bool = False) -> None:
        self.augments, self.per_class = augments, per_class

    def check_data(self, model: nn.Module, train_set: Dataset, val_set: Dataset | None, config: TrainConfig) -> None:
        self.bind(model)
        super().check_data(model, train_set, val_set, config)
        for dataset, name in ((train_set, "train_set"), (val_set, "val_set")):
            names = None if dataset is None else self.class_names(dataset)
            if names is not None and len(names) != unwrap(model).num_classes:
                raise ValueError(
                    f"the model's num_classes is {unwrap(model).num_classes} but {name} has {len(names)} classes; "
                    f"build the model with num_classes={len(names)}"
                )
        if val_set is not None:
            self.make_metric(model, val_set)  # a package that is missing is better named now than after an epoch

    def bind(self, model: nn.Module) -> None:
        """Take from the model what its targets must be.

        Raises:
            ValueError: a model that is not for this task.
        """
        model = unwrap(model)
        wanted = getattr(model, "wants", None)
        if wanted not in self.wants:
            raise ValueError(
                f"task {self.name!r} is not for a {type(model).__name__}; use a model of vitcourse.dense_prediction: "
                f"{self.models}"
            )
        self.in_chans, self.check_targets = model.in_chans, model.check_targets
        self.kind: str = wanted
        self.collate = self.make_collate(wanted)  # no method: workers shall not be sent the model

    models: str  # names of those that it is for

    def make_collate(self, wanted: str) -> Callable[[list[Any]], Batch]:
        raise NotImplementedError

    def make_metric(self, model: nn.Module, dataset: Dataset) -> Metric:
        raise NotImplementedError

    def check(self, sample: Any) -> None:
        image, target = sample
        if not (isinstance(image, Tensor) and image.is_floating_point()):
            raise ValueError(
                "images are not prepared yet; give the data set a transform, vitcourse.data.dense_train_transform to "
                "train on, dense_eval_transform to evaluate"
            )
        if image.ndim != 3 or image.shape[0] != self.in_chans:
            raise ValueError(
                f"images have shape {tuple(image.shape)}, the model's in_chans is {self.in_chans}; make them agree"
            )
        for key in self.keys(self.kind):
            if key not in target:
                have = ", ".join(k for k in ("boxes", "masks", "semantic") if k in target) or "none of its kind"
                raise ValueError(f"targets have no {key!r}, which the model learns from ({have}); {self.remedy[key]}")

    def keys(self, wanted: str) -> Sequence[str]:
        """What a sample's target must have."""
        raise NotImplementedError

    remedy: Mapping[str, str]

    def check_batch(self, batch: Batch) -> None:
        images = batch["images"]
        self.check_targets(batch["targets"], len(images), tuple(images.shape[-2:]))

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        if hasattr(model, "anneal"):
            model.anneal(step, total)

    def after_step(self, model: nn.Module, step: int, total: int) -> None:
        if hasattr(model, "anneal") and step == total - 1:  # however short a run was, what is kept runs without masks
            model.anneal(total, total)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.sum_and_count(model, model(batch["images"], batch["targets"]), batch)

    def sum_and_count(self, model: nn.Module, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return sum_and_count(unwrap(model).losses(output, batch["targets"]))

    def evaluate(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: TrainConfig | None = None,
        *,
        share: Share | None = None,
        reduce: Reduce = lambda total: total,
    ) -> dict[str, float | None]:
        """The ``metrics`` of ``model`` on ``dataset``, at the size that images have after the data set's transform.

        Batches are no larger than in training. Several processes each look at some of the images, and all of them
        get the result of all images.
        """
        config, share = config or TrainConfig(), share or Share()
        config = replace(config, eval_batch_size=min(config.eval_batch_size, config.batch_size))
        device = device_of(model) or resolve_device(config.device)
        self.bind(model)
        metric = self.make_metric(model, dataset)
        totals = torch.zeros(2, dtype=widest_float(device), device=device)
        with kept_random_state(), evaluating(model), torch.inference_mode(), autocast(device, config.precision):
            seed_all(config.seed)
            for batch in self.batches(dataset, share, config, device):
                output = model(batch["images"])
                totals += pair(*self.sum_and_count(model, output, batch), like=totals)
                self.add(metric, unwrap(model), output, batch)
        if share.world > 1:
            metric.gather()
        return {"val_loss": self.mean(*reduce(totals).tolist()), **metric.compute()}

    def add(self, metric: Metric, model: nn.Module, output: Any, batch: Batch) -> None:
        """Hold what a model has found against the targets."""
        raise NotImplementedError


class Detection(DenseTask):
    """Objects: their boxes, or, of a model that wants them (``eomt``), their masks; by mean average precision.

    Crowds (``iscrowd``) are not learned from, and in an evaluation what overlaps them does not count. Objects are
    small, medium and large as COCO has it of images of 640 pixels: below 32² and 96² pixels there, and as much less as
    images are smaller; of masks, whatever their images' size, as COCO has it.

    >>> import torch
    >>> from vitcourse import create_model
    >>> from vitcourse.data import dense_train_transform, scenes
    >>> few = scenes("train", length=4, img_size=32, transform=dense_train_transform(32, (0.4,) * 3, (0.1,) * 3))
    >>> backbone = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    >>> model = create_model("fcos", backbone_args=backbone, img_size=32, num_classes=10, channels=16, num_convs=1)
    >>> task = Detection()
    >>> task.bind(model)
    >>> batch = task.collate([few[0], few[1]])
    >>> total, count = task.loss(model, batch)
    >>> total.ndim, len(batch["targets"])
    (0, 2)
    """

    name = "detection"
    metrics = ("val_loss", "map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar")
    best = ("map", "max")
    per_sample = 8.0
    wants = ("boxes", "masks")
    models = "fcos, detr, or eomt for masks of objects"
    remedy = {
        "boxes": "scenes, coco:PATH and voc:PATH have boxes; folders of masks are for task 'segmentation'",
        "labels": "scenes, coco:PATH and voc:PATH have objects with labels",
        "masks": "scenes and coco:PATH with segmentations have masks of objects; for boxes use fcos or detr",
    }

    def keys(self, wanted: str) -> Sequence[str]:
        return ("labels", wanted)

    def make_collate(self, wanted: str) -> Callable[[list[Any]], Batch]:
        return partial(collate_objects, shapes=wanted)

    def make_metric(self, model: nn.Module, dataset: Dataset) -> DetectionMetric:
        masks = unwrap(model).wants == "masks"
        small = COCO_SMALL if masks else COCO_SMALL * max(unwrap(model).img_size) / 640
        return DetectionMetric(masks, small, classes=self.class_names(dataset) if self.per_class else None)

    def add(self, metric: DetectionMetric, model: nn.Module, output: Any, batch: Batch) -> None:
        pairs = zip(batch["targets"], batch["crowds"], strict=True)
        metric.update(model.results(output), [_with_crowds(target, crowds) for target, crowds in pairs])


def _with_crowds(target: Target, crowds: Target) -> Target:
    both = {key: torch.cat([target[key], crowds[key]]) for key in target}
    iscrowd = torch.zeros_like(both["labels"])
    iscrowd[len(target["labels"]) :] = 1
    return {**both, "iscrowd": iscrowd}


class Segmentation(DenseTask):
    """A class for every pixel, by mean IoU over the classes that occur, and accuracy near boundaries.

    A target has ``semantic`` (H, W), in which 255 counts for nothing. Of a model that wants masks (``eomt``), those of
    the classes that an image has are the objects.

    >>> Segmentation().best
    ('miou', 'max')
    """

    name = "segmentation"
    metrics = ("val_loss", "miou", "pixel_accuracy", "boundary_accuracy")
    best = ("miou", "max")
    wants = ("map", "masks")
    models = "unet, segmenter or eomt"
    remedy = {"semantic": "scenes, masks:PATH and coco:PATH with segmentations have a class for every pixel"}

    def keys(self, wanted: str) -> Sequence[str]:
        return ("semantic",)

    def check(self, sample: Any) -> None:
        super().check(sample)
        if self.kind == "map":
            self.per_sample = float(sample[1]["semantic"].numel())

    def class_names(self, dataset: Dataset) -> list[str] | None:
        return getattr(dataset, "semantic_classes", None)

    def make_collate(self, wanted: str) -> Callable[[list[Any]], Batch]:
        return partial(collate_pixels, masks=wanted == "masks")

    def make_metric(self, model: nn.Module, dataset: Dataset) -> SegmentationMetric:
        return SegmentationMetric(
            unwrap(model).num_classes, classes=self.class_names(dataset) if self.per_class else None
        )

    def add(self, metric: SegmentationMetric, model: nn.Module, output: Any, batch: Batch) -> None:
        metric.update(model.segment(output), batch["semantic"])


def collate_objects(samples: Sequence[tuple[Tensor, dict[str, Any]]], shapes: str) -> Batch:
    """Samples to a batch for :class:`Detection`: ``images``, ``targets`` to learn from, and ``crowds``.

    Args:
        samples: (image, target).
        shapes: ``"boxes"`` or ``"masks"``.
    """
    batch = collate_dense(samples)
    targets, crowds = [], []
    for target in batch["targets"]:
        iscrowd = target.get("iscrowd", torch.zeros_like(target["labels"])).bool()
        # A mask of which no pixel is left after resizing is of an object that cannot be seen.
        seen = target["masks"].flatten(1).bool().any(1) if shapes == "masks" else torch.ones_like(iscrowd)
        one, crowd = ({key: target[key][which] for key in ("labels", shapes)} for which in (seen & ~iscrowd, iscrowd))
        targets.append(one)
        crowds.append(crowd)
    return {"images": batch["images"], "targets": targets, "crowds": crowds}


def collate_pixels(samples: Sequence[tuple[Tensor, dict[str, Any]]], masks: bool) -> Batch:
    """Samples to a batch for :class:`Segmentation`: ``images``, ``semantic`` (B, H, W) and ``targets``.

    Args:
        samples: (image, target).
        masks: whether ``targets`` are masks of classes, and not the map itself.
    """
    batch = collate_dense(samples)
    semantic = batch["semantic"].long()
    targets = [to_masks(one) for one in semantic] if masks else semantic
    return {"images": batch["images"], "semantic": semantic, "targets": targets}
