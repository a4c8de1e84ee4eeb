"""Data sets of (image, label): in memory or in files, with reproducible augmentation, and balanced parts of them."""

import hashlib
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors

from vitcourse.data.reading import read_image
from vitcourse.data.transforms import apply, as_image, split_fixed_tail, to_channels

# What every data set of this package tells about itself.
FACTS = ("classes", "targets", "in_chans", "img_size", "mean", "std")
_SOME_HAVE = ("semantic_classes",)  # those with a class for every pixel


class ImageDataset(Dataset):
    """Pairs (image, label), and the facts that a model and a recipe ask for.

    Args:
        images: a tensor (N, C, H, W), uint8 or float in 0..1, kept in memory; or N image files, read as RGB
            by ``read_image``.
        targets: N integer labels, counted from 0.
        classes: the names of the classes.
        mean, std: a value per channel, of pixels scaled to 0..1.
        transform: called with each image; without one, an image is a ``tv_tensors.Image`` (C, H, W).
        in_chans: 1 or 3 makes grey or colour of the images; None leaves a tensor as it is and reads files as RGB.

    ``in_chans`` is the number of channels; ``img_size`` the side of the images, (height, width) where they are not
    square, or None where it varies. A pipeline that draws no random numbers is applied to whole batches of in-memory
    images, which is many times faster.

    Raises ValueError if images, targets and classes do not fit together or a file cannot be decoded, and as
    ``as_image`` does.

    >>> blobs = ImageDataset(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [0, 1], ["a", "b"], mean=(0.5,), std=(0.5,))
    >>> blobs.in_chans, blobs.img_size, blobs[1][1]
    (3, 8, 1)
    """

    def __init__(
        self,
        images: Tensor | Sequence[str | Path],
        targets: Sequence[int],
        classes: Sequence[str],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        transform: Callable | None = None,
        in_chans: int | None = None,
    ) -> None:
        if len(images) != len(targets) or not len(images):
            raise ValueError(f"{len(images)} images and {len(targets)} targets; give one label per image, at least one")
        self.in_chans, self.img_size = in_chans or 3, None
        if isinstance(images, Tensor):
            if images.ndim != 4:
                raise ValueError(f"images have shape {tuple(images.shape)}; give (N, C, H, W)")
            images = as_image(images)
            images = (to_channels(images, in_chans) if in_chans else images).as_subclass(Tensor)
            self.in_chans, height, width = images.shape[1:]
            self.img_size = height if height == width else (height, width)
        self.images = images
        self.targets = [int(label) for label in targets]
        self.classes = list(classes)
        self.mean, self.std = tuple(mean), tuple(std)
        self.transform = transform
        _check_labels(torch.tensor(self.targets), len(self.classes))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        image = tv_tensors.Image(image) if isinstance(image, Tensor) else read_image(image, self.in_chans)
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def take(self, indices: Sequence[int]) -> "ImageDataset":
        """Some of the items, in the given order, with the same facts and transform."""
        images = self.images[list(indices)] if isinstance(self.images, Tensor) else [self.images[i] for i in indices]
        return self._like(images, [self.targets[i] for i in indices], self.in_chans)

    def to_channels(self, in_chans: int) -> "ImageDataset":
        """The same items in grey (1) or colour (3)."""
        return self._like(self.images, self.targets, in_chans)

    def _like(self, images: Any, targets: list[int], in_chans: int) -> "ImageDataset":
        facts = {"mean": self.mean, "std": self.std, "transform": self.transform, "in_chans": in_chans}
        return ImageDataset(images, targets, self.classes, **facts)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        """The same items as one by one; a DataLoader fetches its batches here."""
        drawn, fixed = split_fixed_tail(self.transform)
        if drawn or not fixed or not isinstance(self.images, Tensor):
            return [self[index] for index in indices]
        images = apply(fixed, tv_tensors.Image(self.images[indices]))
        return list(zip(images, [self.targets[index] for index in indices], strict=True))


class Augmented(Dataset):
    """``dataset`` under a random transform that depends on (seed, epoch, index) alone.

    An item's key is ``(epoch, index)``, which a sampler hands out, so that augmentation is the same with any number
    of workers, in any order and after a restart; a bare ``index`` means epoch 0. For each item PyTorch's CPU
    generator is seeded, and it is put back afterwards: the global random state is untouched. torchvision's v2
    transforms draw from that generator; one that draws from ``random`` or ``numpy.random`` would not be reproducible.

    ``transform`` may be None where ``dataset`` has its own, which is then seeded too; items need not be pairs then. The
    facts (``classes``, ``targets``, ...) are those of ``dataset``.

    >>> from vitcourse.data import open_dataset, train_transform
    >>> fashion = open_dataset("fashion_mnist_subset", "test")
    >>> augmented = Augmented(fashion, train_transform(28, fashion.mean, fashion.std), seed=1)
    >>> torch.equal(augmented[3, 7][0], augmented[3, 7][0]), torch.equal(augmented[3, 7][0], augmented[4, 7][0])
    (True, False)
    """

    def __init__(self, dataset: Dataset, transform: Callable | None = None, seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getattr__(self, name: str) -> Any:
        if name in (*FACTS, *_SOME_HAVE):
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int | tuple[int, int]]) -> list[tuple[Any, int]]:
        drawn, fixed = split_fixed_tail(self.transform)
        state = torch.default_generator.get_state()
        try:
            items = [self._draw(drawn, *(key if isinstance(key, tuple) else (0, key))) for key in keys]
        finally:
            torch.default_generator.set_state(state)
        if self.transform is None:
            return items  # of whatever form: several views, boxes, clips
        images, labels = zip(*items, strict=True)
        if fixed and len({getattr(image, "shape", None) for image in images}) == 1:
            images = apply(fixed, torch.stack(images))
        else:
            images = [apply(fixed, image) for image in images]
        return list(zip(images, labels, strict=True))

    def _draw(self, steps: list[Callable], epoch: int, index: int) -> Any:
        # Hashed, because a sum such as seed + epoch + index would come to the same for many items.
        key = hashlib.blake2b(struct.pack("<3q", self.seed, epoch, index), digest_size=8).digest()
        torch.default_generator.manual_seed(int.from_bytes(key, "little"))
        item = self.dataset[index]
        return item if self.transform is None else (apply(steps, item[0]), item[1])


def subset(dataset: Dataset, n: int, seed: int = 0) -> Subset:
    """``n`` items of ``dataset``, class-balanced: the classes' shares differ by one at most. Same seed, same items.

    Items without a class of their own (``targets`` is None) count as one class.

    Raises ValueError if n is below 1, or if a class has fewer items than its share.

    >>> from vitcourse.data import open_dataset
    >>> few = subset(open_dataset("fashion_mnist_subset"), 40)
    >>> len(few), few.targets.count(3)
    (40, 4)
    """
    if n < 1:
        raise ValueError(f"n {n} is no number of items; give at least 1")
    targets = _strata(dataset)
    labels, counts = np.unique(targets, return_counts=True)
    random = np.random.RandomState(seed)  # the legacy generator, because NumPy promises never to change its stream
    shares = np.full(len(labels), n // len(labels))
    shares[random.permutation(len(labels))[: n % len(labels)]] += 1
    if (shares > counts).any():
        short = int(np.argmax(shares > counts))
        raise ValueError(
            f"n {n} takes {shares[short]} of {_called(dataset, labels[short])}, which has {counts[short]}; "
            f"give n of at most {counts.min() * len(labels)}"
        )
    chosen = [random.permutation(np.flatnonzero(targets == label)) for label in labels]
    chosen = [members[:share] for members, share in zip(chosen, shares, strict=True)]
    part = Subset(dataset, np.sort(np.concatenate(chosen)).tolist())
    for fact in (fact for fact in (*FACTS, *_SOME_HAVE) if hasattr(dataset, fact)):
        setattr(part, fact, getattr(dataset, fact))
    part.targets = None if dataset.targets is None else targets[part.indices].tolist()
    return part


def _strata(dataset: Dataset) -> np.ndarray:
    """The class of each item; 0 where items have none of their own, as scenes of several objects."""
    return np.zeros(len(dataset), dtype=np.int64) if dataset.targets is None else np.asarray(dataset.targets)


def _called(dataset: Dataset, label: int) -> str:
    return "the data set" if dataset.targets is None else f"class {dataset.classes[label]!r}"


def hold_out(dataset: Dataset, share: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Cut a training split in two: what is left to train on, and ``share`` of every class to validate on.

    Choosing weights, a learning rate or the end of a training by the test images spoils them: what was chosen because
    it does well there does less well elsewhere. Same seed, same images; each class gives one image at least, but not
    its only one. ``dataset`` may be a ``subset``, and any data set of this package; where items have no class of their
    own (``targets`` is None), as scenes of several objects, they count as one class.

    Raises ValueError if share is not between 0 and 1, or nothing can be held out.

    >>> from vitcourse.data import open_dataset
    >>> train, val = hold_out(open_dataset("fashion_mnist_subset"), 0.05)
    >>> len(train), len(val), val.targets.count(3)
    (9500, 500, 50)
    """
    if not 0 < share < 1:
        raise ValueError(f"share {share} is no part of the images; use 0 < share < 1")
    targets, groups = _strata(dataset), _groups(dataset)
    _, firsts, group_of = np.unique(groups, return_index=True, return_inverse=True)
    targets = targets[firsts]  # of each group
    random = np.random.RandomState(seed)
    held: list[int] = []
    for label in np.unique(targets):
        members = random.permutation(np.flatnonzero(targets == label))
        held += members[: min(max(1, round(share * len(members))), len(members) - 1)].tolist()
    if not held:
        raise ValueError("every class has one image only, so none can be held out; add images, or validate on others")
    chosen = np.isin(group_of, held)
    return _take(dataset, np.flatnonzero(~chosen).tolist()), _take(dataset, np.flatnonzero(chosen).tolist())


def _groups(dataset: Dataset) -> np.ndarray:
    """Which items belong together: each by itself, unless the data set knows better."""
    if isinstance(dataset, Subset):
        return _groups(dataset.dataset)[dataset.indices]
    return np.asarray(getattr(dataset, "groups", range(len(dataset))))


def _take(dataset: Dataset, indices: list[int]) -> Dataset:
    if isinstance(dataset, Subset):
        return _take(dataset.dataset, [dataset.indices[i] for i in indices])
    return dataset.take(indices)


def check_batch(
    images: Tensor, labels: Tensor | None = None, *, in_chans: int | None = None, num_classes: int | None = None
) -> None:
    """Check what a model is about to be fed: float images (B, C, H, W), finite, and labels (B,) that fit its head.

    Raises TypeError for a wrong dtype and ValueError for everything else, naming what is wrong and the remedy.

    >>> check_batch(torch.rand(2, 1, 28, 28), torch.tensor([0, 12]), num_classes=10)
    Traceback (most recent call last):
    ValueError: labels reach from 0 to 12, but there are 10 classes; labels count from 0, so num_classes=13 is needed
    """
    if not images.is_floating_point():
        raise TypeError(f"images have dtype {images.dtype}; a model takes floats; use a transform of vitcourse.data")
    if images.ndim != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}; a model takes (B, C, H, W)")
    if in_chans is not None and images.shape[1] != in_chans:
        raise ValueError(
            f"images have {images.shape[1]} channels, but the model's in_chans is {in_chans}; "
            f"build the model with in_chans={images.shape[1]}, or the transform with in_chans={in_chans}"
        )
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinite values; check the data set and the transform's mean and std")
    if labels is not None:
        _check_labels(labels, num_classes)


def _check_labels(labels: Tensor, num_classes: int | None) -> None:
    if labels.is_floating_point():
        raise TypeError(f"labels have dtype {labels.dtype}; give integers")
    if labels.ndim != 1:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; give (B,)")
    low, high = (int(value) for value in labels.aminmax())
    if num_classes is not None and not 0 <= low <= high < num_classes:
        raise ValueError(
            f"labels reach from {low} to {high}, but there are {num_classes} classes; "
            f"labels count from 0, so num_classes={high + 1} is needed"
        )
