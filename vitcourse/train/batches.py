"""Which images are in which step, and how they reach the device.

A whole run is one list of batches, fixed by the seed. A resumed run starts further down the list; a process or a
micro-batch takes a part of each entry.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from vitcourse.devices import map_tensors

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


class Batcher(Protocol):
    """Who says what a batch is: a task, or :class:`Pairs`."""

    takes_pairs: bool  # (images, labels), which may also be taken at once from a data set that holds them

    def collate(self, samples: list[Any]) -> Any: ...

    def check_batch(self, batch: Any) -> None: ...


def check_plan(plan: Plan, share: Share) -> None:
    """Raise ValueError unless every batch has samples, and every process a part of it."""
    n, size = plan.num_images, plan.batch_size
    if plan.drop_last and n < size:
        raise ValueError(f"train_set has {n} images, fewer than batch_size {size}; use --batch-size {n} or less")
    last = size if plan.drop_last else min(size, n % size or size)
    if len(even_slices(0, last, share.world)) < share.world:
        raise ValueError(
            f"a batch of {last} images is too small for {share.world} processes, who take pairs; use "
            "--drop-last and a larger --batch-size"
        )


def in_memory(dataset: Dataset) -> tuple[Tensor, Tensor] | None:
    """The images (N, C, H, W) and labels (N,) of a data set that holds them as a tensor and has no transform."""
    if isinstance(dataset, Subset):
        whole = in_memory(dataset.dataset)
        return whole and (whole[0][dataset.indices], whole[1][dataset.indices])
    images = getattr(dataset, "images", None)
    if not isinstance(images, Tensor) or getattr(dataset, "transform", None) is not None:
        return None
    return images, torch.as_tensor(dataset.targets)


def choose_memory(dataset: Dataset, loader: str, batcher: Batcher) -> tuple[Tensor, Tensor] | None:
    """``in_memory(dataset)`` as the ``loader`` option wants it, for whoever takes pairs.

    Raises:
        ValueError: ``loader="memory"`` and a data set that is not held in memory, or a task with batches of its own.
    """
    if loader == "workers":
        return None
    if not batcher.takes_pairs and loader == "memory":
        raise ValueError("loader 'memory' is for pairs (image, label), and this task has other batches; use 'workers'")
    held = in_memory(dataset) if batcher.takes_pairs else None
    if held is None and loader == "memory":
        raise ValueError(
            "loader 'memory' needs a data set with a tensor `images` (N, C, H, W), `targets` and no transform; "
            "use loader 'workers'"
        )
    return held


@dataclass(frozen=True)
class Pairs:
    """Images (B, C, H, W) and labels (B,) below ``num_classes`` (None: not looked at)."""

    num_classes: int | None = None
    takes_pairs = True

    def collate(self, samples: list[Any]) -> Any:
        return default_collate(samples)

    def check_batch(self, batch: tuple[Tensor, Tensor]) -> None:
        if self.num_classes is not None:
            check_labels(batch[1], self.num_classes, "the data set")


def train_batches(
    dataset: Dataset,
    plan: Plan,
    share: Share,
    steps: range,
    config: TrainConfig,
    device: torch.device,
    batcher: Batcher,
) -> Iterator[Any]:
    """The micro-batches of one process in ``steps``, in order, on the device.

    One iterator serves all epochs, so that worker processes start once and read ahead across their borders.

    Raises:
        ValueError: what ``batcher.check_batch`` finds; a data set that is to be held in memory, and cannot be.
    """
    keys = (
        [(plan.epoch_of(step), index) for index in plan.batch(step)[part].tolist()]
        for step in steps
        for part in share.slices(len(plan.batch(step)))
    )
    held = choose_memory(dataset, config.loader, batcher)
    if held is None:
        from vitcourse.data import Augmented

        seeded = dataset if isinstance(dataset, Augmented) else Augmented(dataset, seed=config.seed)
        yield from _load(seeded, keys, config, device, batcher)
        return
    images, labels = (t.to(device) for t in held)
    for batch in keys:
        index = torch.tensor([i for _, i in batch], device=device)
        yield images[index], labels[index]


def eval_batches(
    dataset: Dataset, share: Share, config: TrainConfig, device: torch.device, batcher: Batcher
) -> Iterator[Any]:
    """Every sample of ``dataset`` once, over all processes together: process r has samples r, r + world, …"""
    mine = torch.arange(share.rank, len(dataset), share.world)
    chunks = [chunk for chunk in mine.split(config.eval_batch_size) if len(chunk)]
    held = choose_memory(dataset, "workers" if config.loader == "workers" else "auto", batcher)
    if held is None:
        if not batcher.takes_pairs:  # views that are drawn at random are the same in every evaluation
            from vitcourse.data import Augmented

            dataset = Augmented(dataset, seed=config.seed)
        yield from _load(dataset, [chunk.tolist() for chunk in chunks], config, device, batcher)
        return
    for chunk in chunks:
        yield held[0][chunk].to(device), held[1][chunk].to(device)


def _load(
    dataset: Dataset, batches: Iterable[list[Any]], config: TrainConfig, device: torch.device, batcher: Batcher
) -> Iterator[Any]:
    pinned = device.type == "cuda"  # copies while it computes, which is safe from memory that stays where it is
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.num_workers,
        collate_fn=batcher.collate,
        pin_memory=pinned,
        generator=torch.Generator().manual_seed(config.seed),  # else it would draw from the global one
    )
    for batch in loader:
        batcher.check_batch(batch)
        yield map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=pinned))


def check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"label {wrong} of {name} is out of range; the model's num_classes is {num_classes}, so labels are 0 to "
            f"{num_classes - 1}"
        )


def has_bad_numbers(sample: Any) -> bool:
    """Whether something in a sample is NaN or infinite.

    >>> has_bad_numbers((torch.tensor([0.0, torch.inf]), 3))
    True
    """
    found: list[bool] = []
    map_tensors(sample, lambda t: found.append(t.is_floating_point() and not bool(t.isfinite().all())))
    return any(found)
