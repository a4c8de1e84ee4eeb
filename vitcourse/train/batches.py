"""Which images are in which step, and how they reach the device.

A whole run is one list of batches, fixed by the seed. A resumed run starts further down the list; a process or a
micro-batch takes a part of each entry.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .augment import seed_of
from .config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """The global batches of a run: epoch after epoch, each in an order given by (seed, epoch).

    >>> plan = Plan(num_images=10, batch_size=4, drop_last=False, seed=0)
    >>> plan.steps_per_epoch, len(plan.batch(2)), plan.epoch_of(3)
    (3, 2, 1)
    """

    num_images: int
    batch_size: int
    drop_last: bool
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        rounding = 0 if self.drop_last else self.batch_size - 1
        return (self.num_images + rounding) // self.batch_size

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Tensor:
        """Indices (B,) of the images of global step ``step``."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permutation(self.num_images, self.seed, epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


def even_slices(start: int, stop: int, parts: int) -> list[slice]:
    """Cut ``start:stop`` into at most ``parts`` slices of about equal length at even distances, so no pair is parted.

    >>> even_slices(0, 10, 3)
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    pairs = (stop - start + 1) // 2
    share, rest = divmod(pairs, parts)
    slices = []
    for part in range(parts):
        end = min(stop, start + 2 * (share + (part < rest)))
        if end > start:
            slices.append(slice(start, end))
        start = end
    return slices


@dataclass(frozen=True)
class Share:
    """What one process of several does of each batch, and in how many micro-batches."""

    rank: int = 0
    world: int = 1
    accum: int = 1

    def slices(self, batch_size: int) -> list[slice]:
        """The micro-batches of this process, as slices of the global batch."""
        mine = even_slices(0, batch_size, self.world)
        return even_slices(mine[self.rank].start, mine[self.rank].stop, self.accum) if self.rank < len(mine) else []


def in_memory(dataset: Dataset) -> tuple[Tensor, Tensor] | None:
    """The images (N, C, H, W) and labels (N,) of a data set that holds them as a tensor and has no transform."""
    if isinstance(dataset, Subset):
        whole = in_memory(dataset.dataset)
        return whole and (whole[0][dataset.indices], whole[1][dataset.indices])
    images = getattr(dataset, "images", None)
    if not isinstance(images, Tensor) or getattr(dataset, "transform", None) is not None:
        return None
    return images, torch.as_tensor(dataset.targets)


def choose_memory(dataset: Dataset, loader: str) -> tuple[Tensor, Tensor] | None:
    """``in_memory(dataset)`` as the ``loader`` option wants it.

    Raises:
        ValueError: ``loader="memory"`` and a data set that is not held in memory.
    """
    if loader == "workers":
        return None
    held = in_memory(dataset)
    if held is None and loader == "memory":
        raise ValueError(
            "loader 'memory' needs a data set with a tensor `images` (N, C, H, W), `targets` and no transform; "
            "use loader 'workers'"
        )
    return held


def train_batches(
    dataset: Dataset,
    plan: Plan,
    share: Share,
    steps: range,
    config: TrainConfig,
    device: torch.device,
    num_classes: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches (images, labels) of one process in ``steps``, in order, on the device.

    One iterator serves all epochs, so that worker processes start once and read ahead across their borders.

    Raises:
        ValueError: a label that is not below ``num_classes`` (None: not looked at).
    """
    keys = (
        [(plan.epoch_of(step), index) for index in plan.batch(step)[part].tolist()]
        for step in steps
        for part in share.slices(len(plan.batch(step)))
    )
    held = choose_memory(dataset, config.loader)
    if held is None:
        from vitcourse.data import Augmented

        seeded = dataset if isinstance(dataset, Augmented) else Augmented(dataset, seed=config.seed)
        yield from _load(seeded, keys, config, device, num_classes)
        return
    images, labels = (t.to(device) for t in held)
    for batch in keys:
        index = torch.tensor([i for _, i in batch], device=device)
        yield images[index], labels[index]


def eval_batches(
    dataset: Dataset, share: Share, config: TrainConfig, device: torch.device, num_classes: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of ``dataset`` once, over all processes together: process r has images r, r + world, …"""
    mine = torch.arange(share.rank, len(dataset), share.world)
    chunks = [chunk for chunk in mine.split(config.eval_batch_size) if len(chunk)]
    held = choose_memory(dataset, "workers" if config.loader == "workers" else "auto")
    if held is None:
        yield from _load(dataset, [chunk.tolist() for chunk in chunks], config, device, num_classes)
        return
    for chunk in chunks:
        yield held[0][chunk].to(device), held[1][chunk].to(device)


def _load(
    dataset: Dataset, batches: Iterable[list[Any]], config: TrainConfig, device: torch.device, num_classes: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    pinned = device.type == "cuda"  # copies while it computes, which is safe from memory that stays where it is
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.num_workers,
        pin_memory=pinned,
        generator=torch.Generator().manual_seed(config.seed),  # else it would draw from the global one
    )
    for images, labels in loader:
        if num_classes is not None:
            check_labels(labels, num_classes, "the data set")
        yield images.to(device, non_blocking=pinned), labels.to(device, non_blocking=pinned)


def check_data(dataset: Dataset, name: str, *, num_classes: int | None, model: torch.nn.Module) -> None:
    """Look at a data set before a run: is it empty, do its labels and images fit the model?

    Raises:
        ValueError: it is empty, a label is out of range, or channels, size or the number of classes differ.
    """
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; give a data set with at least one image")
    classes = getattr(dataset, "classes", None)
    if classes is not None and num_classes is not None and len(classes) != num_classes:
        raise ValueError(
            f"the model's num_classes is {num_classes} but {name} has {len(classes)} classes; "
            f"build the model with num_classes={len(classes)}"
        )
    targets = getattr(dataset, "targets", None)
    if targets is not None and num_classes is not None:
        check_labels(torch.as_tensor(targets), num_classes, name)
    image, _ = dataset[0]
    check_image(image, model, name)


def check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"label {wrong} of {name} is out of range; the model's num_classes is {num_classes}, so labels are 0 to "
            f"{num_classes - 1}"
        )


def check_image(image: Any, model: torch.nn.Module, name: str) -> None:
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
