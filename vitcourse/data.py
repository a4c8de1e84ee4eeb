"""Images with labels: the embedded data, torchvision's data sets, folders of images; and their transforms.

>>> fashion = open_dataset("fashion_mnist_subset", "test")
>>> image, label = fashion[0]
>>> tuple(image.shape), image.dtype, len(fashion), fashion.classes[label]
((1, 28, 28), torch.uint8, 2000, 'Shirt')
"""

import difflib
import hashlib
import io
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from vitcourse import paths

__all__ = [
    "Augmented",
    "ImageDataset",
    "check_batch",
    "eval_transform",
    "open_dataset",
    "photo",
    "photo_names",
    "subset",
    "texture",
    "texture_names",
    "train_transform",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What every data set of this module tells about itself.
FACTS = ("classes", "targets", "in_chans", "img_size", "mean", "std")


# --- Images, checked where they enter -----------------------------------------------------------------------------


def as_image(image: Any) -> tv_tensors.Image:
    """Turn a PIL image, a uint8 array (H, W[, C]) or a tensor (..., C, H, W) into a checked ``tv_tensors.Image``.

    Raises TypeError for integers other than uint8 (as pixels their range is anybody's guess), and ValueError for a
    wrong rank, a number of channels that is neither 1 nor 3, and NaN or infinite pixels.
    """
    if not isinstance(image, Tensor):
        image = v2.functional.to_image(image)
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image has dtype {image.dtype}; give uint8 in 0..255, or floats in 0..1")
    if image.ndim not in (3, 4) or image.shape[-3] not in (1, 3):
        raise ValueError(
            f"image has shape {tuple(image.shape)}; give (C, H, W), or (B, C, H, W) for a batch, with 1 or 3 channels"
        )
    if image.is_floating_point() and not image.isfinite().all():
        raise ValueError(f"image of shape {tuple(image.shape)} holds NaN or infinite pixels; repair or drop it")
    return image if isinstance(image, tv_tensors.Image) else tv_tensors.Image(image)


def check_batch(
    images: Tensor, labels: Tensor | None = None, *, in_chans: int | None = None, num_classes: int | None = None
) -> None:
    """Check what a model is about to be fed: float images (B, C, H, W), finite, and labels (B,) that fit its head.

    Raises TypeError for a wrong dtype and ValueError for everything else, naming what is wrong and the remedy.

    >>> check_batch(torch.rand(2, 1, 28, 28), torch.tensor([0, 12]), num_classes=10)
    Traceback (most recent call last):
    ValueError: labels reach from 0 to 12, but num_classes is 10; build the model with num_classes=13
    """
    if not images.is_floating_point():
        raise TypeError(
            f"images have dtype {images.dtype}; a model takes floats: use eval_transform or train_transform"
        )
    if images.ndim != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}; a model takes (B, C, H, W)")
    if in_chans is not None and images.shape[1] != in_chans:
        raise ValueError(
            f"images have {images.shape[1]} channels, but the model's in_chans is {in_chans}; "
            f"build the model with in_chans={images.shape[1]}, or the transform with in_chans={in_chans}"
        )
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinite values; check the data set and the transform's std")
    if labels is not None:
        _check_labels(labels, num_classes)


def _check_labels(labels: Tensor, num_classes: int | None) -> None:
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; give integers (B,)")
    if num_classes is None or not len(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise ValueError(f"labels reach from {low} to {high}; classes are counted from 0")
    if high >= num_classes:
        raise ValueError(
            f"labels reach from {low} to {high}, but num_classes is {num_classes}; "
            f"build the model with num_classes={high + 1}"
        )


def _read_image(path: Path) -> tv_tensors.Image:
    """Decode a file to RGB (3, H, W), uint8; the error names the file."""
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"{path} has pixels of type {picture.mode}, not 8-bit; convert it to 8-bit first")
            return as_image(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} has vanished; restore it or open the data set anew") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # Pillow reports broken PNGs as SyntaxError
        raise ValueError(f"{path} is not a readable image ({error}); restore or delete it") from error


# --- The data sets ------------------------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """Pairs (image, label), and the facts that a model and a recipe ask for.

    Args:
        images: a tensor (N, C, H, W), uint8 or float, held in memory; or the paths of N image files, read as RGB.
        targets: N integer labels, counted from 0.
        classes: the names of the classes.
        mean, std: a value per channel, of pixels scaled to 0..1.
        transform: called with each image; without one, an image is a ``tv_tensors.Image`` (C, H, W).

    ``in_chans`` is the number of channels, ``img_size`` the side of the images, or None where it varies. A transform
    that draws no random numbers is applied to a whole batch of in-memory images at once.

    Raises ValueError if images, targets and classes do not fit together, or as ``as_image`` does.

    >>> blobs = ImageDataset(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [0, 1], ["a", "b"], mean=(0.5,), std=(0.5,))
    >>> blobs.in_chans, blobs.img_size, blobs[1][1]
    (3, 8, 1)
    """

    def __init__(
        self,
        images: Tensor | Sequence[Path],
        targets: Sequence[int],
        classes: Sequence[str],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        transform: Callable | None = None,
    ) -> None:
        self.in_chans, self.img_size = 3, None
        if isinstance(images, Tensor):
            if images.ndim != 4:
                raise ValueError(f"images have shape {tuple(images.shape)}; give (N, C, H, W)")
            images = as_image(images).as_subclass(Tensor)
            self.in_chans, (height, width) = images.shape[1], images.shape[2:]
            self.img_size = height if height == width else None
        self.images = images
        self.targets = [int(label) for label in targets]
        self.classes = list(classes)
        self.mean, self.std = tuple(mean), tuple(std)
        self.transform = transform
        if len(self.targets) != len(images):
            raise ValueError(f"{len(images)} images, but {len(self.targets)} targets; give one label for each image")
        if not self.targets:
            raise ValueError("images is empty; a data set needs at least one image")
        _check_labels(torch.tensor(self.targets), len(self.classes))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        image = tv_tensors.Image(image) if isinstance(image, Tensor) else _read_image(image)
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        """The same items as one by one; the DataLoader asks for batches here."""
        if not (isinstance(self.images, Tensor) and is_deterministic(self.transform)):
            return [self[index] for index in indices]
        images = self.transform(tv_tensors.Image(self.images[indices]))
        return list(zip(images, [self.targets[index] for index in indices], strict=True))


class Augmented(Dataset):
    """``dataset`` under a random transform that depends on (seed, epoch, index) alone.

    An item's key is ``(epoch, index)``, which a sampler hands out, so that the augmentation is the same with any
    number of workers, in any order and after a restart; a bare ``index`` means epoch 0. PyTorch's CPU generator is
    seeded for the item and put back afterwards: the global random state is untouched. All of torchvision's v2
    transforms draw from that generator; one that draws from ``random`` or ``numpy.random`` would not be reproducible.

    ``transform`` may be None where ``dataset`` has its own, which is then seeded too. The facts (``classes``,
    ``targets``, ...) are those of ``dataset``.

    >>> fashion = open_dataset("fashion_mnist_subset", "test")
    >>> augmented = Augmented(fashion, train_transform(28, fashion.mean, fashion.std), seed=1)
    >>> torch.equal(augmented[3, 7][0], augmented[3, 7][0]), torch.equal(augmented[3, 7][0], augmented[4, 7][0])
    (True, False)
    """

    def __init__(self, dataset: Dataset, transform: Callable | None = None, seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getattr__(self, name: str) -> Any:
        if name in FACTS:
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int | tuple[int, int]]) -> list[tuple[Any, int]]:
        state = torch.default_generator.get_state()
        try:
            return [self._item(*key) if isinstance(key, tuple) else self._item(0, key) for key in keys]
        finally:
            torch.default_generator.set_state(state)

    def _item(self, epoch: int, index: int) -> tuple[Any, int]:
        # Hashed, because neighbouring seeds would be correlated, and sums like seed + epoch + index would collide.
        key = hashlib.blake2b(struct.pack("<3q", self.seed, epoch, index), digest_size=8).digest()
        torch.default_generator.manual_seed(int.from_bytes(key, "little"))
        image, label = self.dataset[index]
        return (image if self.transform is None else self.transform(image)), label


def subset(dataset: Dataset, n: int, seed: int = 0) -> Subset:
    """``n`` items of ``dataset``, class-balanced: the classes' shares differ by one at most. Same seed, same items.

    Raises ValueError if a class has too few items for its share.

    >>> few = subset(open_dataset("fashion_mnist_subset"), 40)
    >>> len(few), few.targets.count(3)
    (40, 4)
    """
    targets = np.asarray(dataset.targets)
    labels = np.unique(targets)
    share, rest = divmod(n, len(labels))
    random = np.random.RandomState(seed)  # the legacy generator, because NumPy promises never to change its stream
    with_one_more = set(random.permutation(labels)[:rest].tolist())
    indices: list[int] = []
    for label in labels.tolist():
        members = np.flatnonzero(targets == label)
        wanted = share + (label in with_one_more)
        if n < 1 or len(members) < wanted:
            raise ValueError(
                f"n {n} needs {wanted} items of class {dataset.classes[label]!r}, which has {len(members)}; "
                f"give n between 1 and {np.bincount(targets)[labels].min() * len(labels)}"
            )
        indices += random.permutation(members)[:wanted].tolist()
    part = Subset(dataset, sorted(indices))
    for fact in FACTS:
        setattr(part, fact, getattr(dataset, fact))
    part.targets = targets[part.indices].tolist()
    return part


# --- Opening a data set by its name -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A torchvision data set: its class, what it calls the splits, and the statistics of its training pixels."""

    name: str
    splits: dict[str, dict[str, Any]]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


_FLAG = {"train": {"train": True}, "test": {"train": False}}
_NAMED = {"train": {"split": "train"}, "test": {"split": "test"}}
_WITH_VAL = {**_NAMED, "val": {"split": "val"}}
_TORCHVISION = {
    "cifar10": _Source("CIFAR10", _FLAG, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Source("CIFAR100", _FLAG, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "dtd": _Source("DTD", _WITH_VAL),
    "fashion_mnist": _Source("FashionMNIST", _FLAG, (0.2860,), (0.3530,)),
    "flowers102": _Source("Flowers102", _WITH_VAL),
    "food101": _Source("Food101", _NAMED),
    "mnist": _Source("MNIST", _FLAG, (0.1307,), (0.3081,)),
    "oxford_iiit_pet": _Source("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "stl10": _Source("STL10", _NAMED),
}
_SPECS = ("fashion_mnist_subset", *_TORCHVISION, "imagefolder:PATH")


def open_dataset(
    spec: str,
    split: str = "train",
    *,
    transform: Callable | None = None,
    root: str | Path | None = None,
    download: bool = False,
) -> ImageDataset:
    """Open one split of a data set.

    Args:
        spec: ``"fashion_mnist_subset"`` (embedded: 10 000 images to train on, 2 000 to test); one of torchvision's:
            ``"cifar10"``, ``"cifar100"``, ``"dtd"``, ``"fashion_mnist"``, ``"flowers102"``, ``"food101"``,
            ``"mnist"``, ``"oxford_iiit_pet"``, ``"stl10"``; or ``"imagefolder:PATH"``, a folder of your own with
            PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg (PATH/val serves as test where there is no PATH/test).
        split: ``"train"``, ``"test"``, or ``"val"`` where a data set has one.
        transform: applied to each image, such as ``train_transform`` and ``eval_transform`` build.
        root: where torchvision's data sets lie; by default $VITCOURSE_DATASETS, or else ~/.cache/vitcourse.
        download: fetch a torchvision data set that is not there yet.

    An item is (image, label); without a transform the image is a ``tv_tensors.Image`` (C, H, W), uint8.

    Raises ValueError for an unknown spec or split, and for a corrupt file or mismatched classes; FileNotFoundError
    for what is not there. Each names the file or folder and the remedy.
    """
    kind, _, path = spec.partition(":")
    if kind == "imagefolder":
        return _open_folder(Path(path).expanduser() if path else None, split, transform)
    if spec == "fashion_mnist_subset":
        return _open_fashion_subset(split, transform)
    if spec in _TORCHVISION:
        home = Path(root or os.environ.get("VITCOURSE_DATASETS", "~/.cache/vitcourse")).expanduser()
        return _open_torchvision(spec, split, transform, home, download)
    raise ValueError(f"spec {spec!r} is no data set; {_suggest(kind, _SPECS)}")


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known are {', '.join(known)}"


def _check_split(spec: str, split: str, known: Sequence[str]) -> None:
    if split not in known:
        raise ValueError(f"split {split!r} of {spec} does not exist; use {' or '.join(map(repr, known))}")


def _open_fashion_subset(split: str, transform: Callable | None) -> ImageDataset:
    _check_split("fashion_mnist_subset", split, ("train", "test"))
    with np.load(io.BytesIO(_read_verified(paths.data_dir() / "fashion_mnist" / f"{split}.npz"))) as arrays:
        images, labels = torch.from_numpy(arrays["images"]), arrays["labels"]
    source = _TORCHVISION["fashion_mnist"]
    classes = torchvision.datasets.FashionMNIST.classes
    return ImageDataset(
        images.unsqueeze(1), labels.tolist(), classes, mean=source.mean, std=source.std, transform=transform
    )


def _open_torchvision(spec: str, split: str, transform: Callable | None, root: Path, download: bool) -> ImageDataset:
    source = _TORCHVISION[spec]
    _check_split(spec, split, tuple(source.splits))
    try:
        original = getattr(torchvision.datasets, source.name)(str(root), download=download, **source.splits[split])
    except Exception as error:  # torchvision lets through whatever its readers raise
        remedy = (
            f"delete what is there of it and try again ({type(error).__name__}: {error})"
            if download
            else f"download it with download=True (on the command line: --download), or give its folder as root; "
            f"where it is there, it is damaged: delete it and download it again ({type(error).__name__}: {error})"
        )
        kind = ValueError if "not found" not in str(error) else FileNotFoundError
        raise kind(f"{spec} cannot be read from {root}; {remedy}") from error
    targets = _first_attribute(original, "targets", "labels", "_labels")
    images = _first_attribute(original, "data", "_images", "_image_files")
    if not isinstance(images, list):
        images = _to_nchw(torch.as_tensor(images))
    return ImageDataset(images, targets, original.classes, mean=source.mean, std=source.std, transform=transform)


def _first_attribute(dataset: Any, *names: str) -> Any:
    """Torchvision's data sets agree on no name for their labels and images."""
    return next(getattr(dataset, name) for name in names if hasattr(dataset, name))


def _to_nchw(images: Tensor) -> Tensor:
    """(N, H, W), (N, H, W, 3) or (N, 3, H, W) -> (N, C, H, W)."""
    if images.ndim == 3:
        return images.unsqueeze(1)
    return images.permute(0, 3, 1, 2).contiguous() if images.shape[3] == 3 else images


_LAYOUTS = """expected one folder per class, under one folder per split:
    PATH/train/cat/1.jpg   PATH/train/dog/2.jpg
    PATH/test/cat/3.jpg    PATH/test/dog/4.jpg      (or PATH/val/...)"""


def _open_folder(path: Path | None, split: str, transform: Callable | None) -> ImageDataset:
    if path is None:
        raise ValueError("spec 'imagefolder' needs a path: imagefolder:PATH")
    _check_split(f"imagefolder:{path}", split, ("train", "val", "test"))
    if not path.is_dir():
        raise FileNotFoundError(f"imagefolder:{path}: there is no folder {path}; {_LAYOUTS}")
    folder = path / ("val" if split == "test" and not (path / "test").is_dir() else split)
    if not folder.is_dir():
        raise FileNotFoundError(f"imagefolder:{path} has no {split} split; {_LAYOUTS}\nfound {_listing(path)}")
    classes = _class_folders(folder)
    if split != "train" and (path / "train").is_dir():
        _check_same_classes(path / "train", folder)
    images, targets = [], []
    for label, name in enumerate(classes):
        members = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not members:
            raise FileNotFoundError(
                f"{folder / name} holds no image; add some ({' '.join(IMAGE_SUFFIXES)}), or delete the folder"
            )
        images += members
        targets += [label] * len(members)
    return ImageDataset(images, targets, classes, mean=IMAGENET_MEAN, std=IMAGENET_STD, transform=transform)


def _class_folders(folder: Path) -> list[str]:
    """The names of the classes; hidden folders, such as Jupyter's .ipynb_checkpoints, are none."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{folder} holds no class folders; {_LAYOUTS}\nfound {_listing(folder)}")
    return names


def _check_same_classes(train: Path, other: Path) -> None:
    in_train, in_other = set(_class_folders(train)), set(_class_folders(other))
    if in_train != in_other:
        raise ValueError(
            f"{train} and {other} hold different classes; only in {train.name}: {sorted(in_train - in_other)}, "
            f"only in {other.name}: {sorted(in_other - in_train)}; give both the same class folders"
        )


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"


# --- Embedded files -----------------------------------------------------------------------------------------------


def _read_verified(path: Path) -> bytes:
    """Read an embedded file and compare it with the SHA256SUMS beside it."""
    remedy = "restore it (git checkout -- data, or pip install --force-reinstall vitcourse)"
    manifest = path.with_name("SHA256SUMS")
    for file in (manifest, path):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {remedy}")
    sums = {name: digest for digest, name in map(str.split, manifest.read_text().splitlines())}
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sums.get(path.name):
        raise ValueError(f"{path} is corrupt: its sha256 is not the one in {manifest.name}; {remedy}")
    return content


def photo_names() -> list[str]:
    """The names that ``photo`` takes.

    >>> photo_names()
    ['astronaut', 'cat', 'coffee', 'galaxies', 'photographer', 'retina', 'rocket']
    """
    return _picture_names("photos")


def photo(name: str) -> Tensor:
    """A photograph (public domain or CC0): (3, 256, 256), uint8. Raises ValueError for an unknown name.

    >>> photo("cat").shape
    torch.Size([3, 256, 256])
    """
    return _picture("photos", name)


def texture_names() -> list[str]:
    """The names that ``texture`` takes.

    >>> texture_names()
    ['brick', 'grass', 'gravel']
    """
    return _picture_names("textures")


def texture(name: str) -> Tensor:
    """A photographed surface (CC0), grey: (3, 256, 256), uint8, three equal channels. Raises as ``photo`` does."""
    return _picture("textures", name)


def _picture_names(folder: str) -> list[str]:
    return sorted(file.stem for file in (paths.data_dir() / folder).glob("*.png"))


def _picture(folder: str, name: str) -> Tensor:
    if name not in _picture_names(folder):
        raise ValueError(f"name {name!r} is not in {folder}; {_suggest(name, _picture_names(folder))}")
    content = _read_verified(paths.data_dir() / folder / f"{name}.png")
    return as_image(Image.open(io.BytesIO(content)).convert("RGB")).as_subclass(Tensor)


# --- Transforms ---------------------------------------------------------------------------------------------------


def train_transform(
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop: str = "resized",
    scale: tuple[float, float] = (0.08, 1.0),
    hflip: bool = True,
    randaugment: int = 0,
    random_erasing: float = 0.0,
    interpolation: str = "bicubic",
    in_chans: int | None = None,
) -> v2.Compose:
    """Augment an image for training: uint8 or float (C, H, W) -> float32 (C, img_size, img_size), normalised.

    Args:
        crop: ``"resized"`` cuts out a random part, of an area in ``scale`` and a shape of 3:4 to 4:3, and resizes it
            (Szegedy et al., 2015, section 6), the rule on ImageNet; ``"pad"`` shifts the image by up to an eighth of
            its side, black coming in (as He et al., 2016, section 4.2), the rule for small images.
        hflip: mirror every other image.
        randaugment: the magnitude, 1 to 30, of two random distortions (Cubuk et al., 2020; DeiT takes 9); 0: none.
        random_erasing: the probability of noise in a rectangle (Zhong et al., 2020; DeiT takes 0.25).
        interpolation: ``"bilinear"``, ``"bicubic"``, ``"nearest"`` or ``"lanczos"``.
        in_chans: 1 or 3 converts between grey and colour first; None leaves the channels as they are.

    Raises ValueError for values out of range, naming them.
    """
    mode = _check_transform(img_size, mean, std, interpolation, in_chans)
    if crop not in ("resized", "pad"):
        raise ValueError(f"crop {crop!r} is unknown; use 'resized' or 'pad'")
    if not (isinstance(randaugment, int) and 0 <= randaugment <= 30):
        raise ValueError(f"randaugment {randaugment} is no magnitude; use an integer from 0 (off) to 30")
    if not 0 <= random_erasing <= 1:
        raise ValueError(f"random_erasing {random_erasing} is no probability; use 0 to 1")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale {scale} is no range of areas; use 0 < low <= high <= 1")
    steps: list[Callable] = [as_image, *_to_channels(in_chans)]
    if crop == "resized":
        steps.append(v2.RandomResizedCrop(img_size, scale=scale, interpolation=mode))
    else:
        steps += [v2.Resize(img_size, interpolation=mode), v2.RandomCrop(img_size, padding=max(1, img_size // 8))]
    if hflip:
        steps.append(v2.RandomHorizontalFlip())
    if randaugment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=randaugment))
    steps += _to_normalised(mean, std)
    if random_erasing:
        steps.append(v2.RandomErasing(random_erasing, value="random"))
    return v2.Compose([*steps, v2.ToPureTensor()])


def eval_transform(
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    interpolation: str = "bicubic",
    crop_pct: float = 1.0,
    in_chans: int | None = None,
) -> v2.Compose:
    """Prepare an image as timm evaluates: uint8 or float (C, H, W) -> float32 (C, img_size, img_size), normalised.

    The short side is resized to ``img_size / crop_pct`` (rounded down) and the central square cut out. Arguments as
    for ``train_transform``; ``crop_pct`` in (0, 1].

    >>> eval_transform(224, (0.5,), (0.5,), crop_pct=0.9)(photo("cat")).shape
    torch.Size([3, 224, 224])
    """
    mode = _check_transform(img_size, mean, std, interpolation, in_chans)
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct {crop_pct} is not a part of the image; use 0 < crop_pct <= 1")
    resize = v2.Resize(int(img_size / crop_pct), interpolation=mode)
    return v2.Compose(
        [
            as_image,
            *_to_channels(in_chans),
            resize,
            v2.CenterCrop(img_size),
            *_to_normalised(mean, std),
            v2.ToPureTensor(),
        ]
    )


def is_deterministic(transform: Callable | None) -> bool:
    """Whether ``transform`` is a pipeline that draws no random numbers, hence fit for whole batches."""
    fixed = (v2.Resize, v2.CenterCrop, v2.RGB, v2.Grayscale, v2.ToDtype, v2.Normalize, v2.ToPureTensor)
    return isinstance(transform, v2.Compose) and all(
        step is as_image or type(step) in fixed for step in transform.transforms
    )


def _check_transform(
    img_size: int, mean: Sequence[float], std: Sequence[float], interpolation: str, in_chans: int | None
) -> InterpolationMode:
    if not isinstance(img_size, int) or img_size < 1:
        raise ValueError(f"img_size {img_size!r} is no side of a square; give a positive integer")
    if in_chans not in (None, 1, 3):
        raise ValueError(f"in_chans {in_chans!r} cannot be made; use 1 (grey), 3 (RGB) or None (as they are)")
    if len(mean) != len(std) or len(mean) not in (1, in_chans or len(mean)):
        raise ValueError(
            f"mean {mean} and std {std} do not fit in_chans {in_chans}; give one value, or one for each channel"
        )
    if min(std) <= 0:
        raise ValueError(f"std {std} must be positive")
    modes = {mode.value: mode for mode in InterpolationMode}
    if interpolation not in modes:
        raise ValueError(f"interpolation {interpolation!r} is unknown; {_suggest(interpolation, list(modes))}")
    return modes[interpolation]


def _to_channels(in_chans: int | None) -> list[v2.Transform]:
    return {None: [], 1: [v2.Grayscale(1)], 3: [v2.RGB()]}[in_chans]


def _to_normalised(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
