"""Data sets by name: the embedded subset, rendered scenes and clips, torchvision's, and folders of a user."""

import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from vitcourse.data.coco import coco_splits, open_coco
from vitcourse.data.datasets import ImageDataset
from vitcourse.data.embedded import fashion_mnist_subset
from vitcourse.data.folders import IMAGE_SUFFIXES, SPLITS, Faults, files_by_class, is_picture, splits_of
from vitcourse.data.masks import masks_splits, open_masks
from vitcourse.data.moving import Moving
from vitcourse.data.reading import read_image
from vitcourse.data.scenes import Scenes
from vitcourse.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from vitcourse.data.video import open_videos
from vitcourse.data.voc import open_voc, voc_splits


@dataclass(frozen=True)
class _Source:
    """A torchvision data set: its class and folder, what it calls the splits, the statistics of its training pixels."""

    name: str
    folder: str
    splits: dict[str, dict[str, Any]]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


_FLAG = {"train": {"train": True}, "test": {"train": False}}
_NAMED = {"train": {"split": "train"}, "test": {"split": "test"}}
_WITH_VAL = {**_NAMED, "val": {"split": "val"}}
_PETS = {"train": {"split": "trainval"}, "test": {"split": "test"}}
_FASHION = _Source("FashionMNIST", "FashionMNIST/raw", _FLAG, (0.2860,), (0.3530,))
_TORCHVISION = {
    "cifar10": _Source("CIFAR10", "cifar-10-batches-py", _FLAG, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Source("CIFAR100", "cifar-100-python", _FLAG, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "dtd": _Source("DTD", "dtd", _WITH_VAL),
    "fashion_mnist": _FASHION,
    "flowers102": _Source("Flowers102", "flowers-102", _WITH_VAL),
    "food101": _Source("Food101", "food-101", _NAMED),
    "mnist": _Source("MNIST", "MNIST/raw", _FLAG, (0.1307,), (0.3081,)),
    "oxford_iiit_pet": _Source("OxfordIIITPet", "oxford-iiit-pet", _PETS),
    "stl10": _Source("STL10", "stl10_binary", _NAMED),
}
_RENDERED = {"scenes": Scenes, "moving": Moving}
_LAYOUT = """expected a folder per class in a folder per split:
    PATH/train/cat/1.jpg   PATH/train/dog/2.jpg
    PATH/val/cat/3.jpg     PATH/val/dog/4.jpg      (or valid, or validation)
    PATH/test/cat/5.jpg    PATH/test/dog/6.jpg
"""


def _open_folder(top: Path, split: str, transform: Callable | None = None, on_error: str = "raise") -> ImageDataset:
    files = files_by_class(top, split, is_picture, _LAYOUT, "images", IMAGE_SUFFIXES)
    faults = Faults(on_error)
    if on_error == "skip":
        of, files = sum(map(len, files.values())), {name: _readable(found, faults) for name, found in files.items()}
        faults.tell("images", of, top)
    images = [file for found in files.values() for file in found]
    targets = [label for label, found in enumerate(files.values()) for _ in found]
    return ImageDataset(images, targets, list(files), mean=IMAGENET_MEAN, std=IMAGENET_STD, transform=transform)


def _readable(files: Sequence[str], faults: Faults) -> list[str]:
    """Those of the pictures that can be decoded."""
    kept = []
    for file in files:
        try:
            read_image(file)
        except (ValueError, FileNotFoundError) as error:
            faults.add(error)
        else:
            kept.append(file)
    return kept


# A user's own: which splits a folder has, and how one is opened.
_FOLDERS: dict[str, tuple[Callable[[Path], list[str]], Callable[..., Dataset]]] = {
    "imagefolder": (splits_of, _open_folder),
    "coco": (coco_splits, open_coco),
    "voc": (voc_splits, open_voc),
    "masks": (masks_splits, open_masks),
    "video": (splits_of, open_videos),
}
_SPECS = ("fashion_mnist_subset", *_TORCHVISION, *_RENDERED, *(f"{kind}:PATH" for kind in _FOLDERS))


def open_dataset(
    spec: str,
    split: str = "train",
    *,
    transform: Callable | None = None,
    root: str | Path | None = None,
    download: bool = False,
    **options: Any,
) -> Dataset:
    """Open one split of a data set.

    Args:
        spec: ``"fashion_mnist_subset"`` (embedded: 10 000 images to train on, 2 000 to test); one of torchvision's:
            ``"cifar10"``, ``"cifar100"``, ``"dtd"``, ``"fashion_mnist"``, ``"flowers102"``, ``"food101"``,
            ``"mnist"``, ``"oxford_iiit_pet"``, ``"stl10"``; or ``"imagefolder:PATH"``, a folder of your own with
            PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg (or valid, or validation), PATH/test/CLASS/*.jpg, or both.
            Its classes are those of train; that a class has no images in another split is said on stderr.
            Rendered on demand, with targets for detection and segmentation: ``"scenes"``, and clips of motions:
            ``"moving"``. Your own with annotations: ``"coco:PATH"``, ``"voc:PATH"``, ``"masks:PATH"``, a folder of
            images and one of masks, and ``"video:PATH"``, with PATH/train/CLASS/*.mp4; an error shows the layout.
        split: ``"train"``, ``"test"``, or ``"val"``, of those that ``split_names`` gives. Where there is no ``"val"``,
            ``hold_out`` makes one of ``"train"``. (``"train"`` of the pets is what its authors call trainval.)
        transform: applied to each image, such as ``train_transform`` and ``eval_transform`` build.
        root: where torchvision's data sets lie; by default $VITCOURSE_DATASETS, or else ~/.cache/vitcourse.
        download: fetch a torchvision data set that is not there yet.
        options: of :class:`Scenes`, :class:`Moving`, ``open_coco``, ``open_voc``, ``open_masks`` or ``open_videos``.

    An item is (image, label); without a transform the image is a ``tv_tensors.Image`` (C, H, W), uint8. It is
    (image, target) of scenes, coco, voc and masks, as :class:`Scenes` and :class:`AnnotatedImages` say, and
    (clip, label) of moving and video, the clip uint8 (C, T, H, W).
    ``mean`` and ``std`` are those of the set's own training pixels, or ImageNet's where images come as files.

    Raises ValueError for an unknown spec or split, a corrupt file and classes that train does not have,
    FileNotFoundError for what is not there, and TypeError for options of another data set. Each names the file or
    folder and the remedy.

    >>> open_dataset("cifar_10")
    Traceback (most recent call last):
    ValueError: spec 'cifar_10' is no data set; did you mean 'cifar10' or 'cifar100'?
    """
    known = split_names(spec)
    kind, _, path = spec.partition(":")
    if kind in _FOLDERS:
        _check_split(spec, split, SPLITS)
        _check_options(spec, options, _FOLDERS[kind][1])
        return _FOLDERS[kind][1](Path(path).expanduser(), split, transform=transform, **options)
    _check_split(spec, split, known)
    _check_options(spec, options, _RENDERED.get(spec))
    if spec in _RENDERED:
        return _RENDERED[spec](split, transform=transform, **options)
    if spec == "fashion_mnist_subset":
        images, targets = fashion_mnist_subset(split)
        classes = datasets.FashionMNIST.classes
        return ImageDataset(images, targets, classes, mean=_FASHION.mean, std=_FASHION.std, transform=transform)
    home = root or os.environ.get("VITCOURSE_DATASETS", "~/.cache/vitcourse")
    return _open_torchvision(spec, split, transform, Path(home).expanduser(), download)


def split_names(spec: str) -> list[str]:
    """Which of ``"train"``, ``"val"`` and ``"test"`` a data set has.

    Raises ValueError for an unknown spec, and for two folders that could both be ``"val"``.

    >>> split_names("cifar10"), split_names("dtd")
    (['train', 'test'], ['train', 'val', 'test'])
    """
    kind, _, path = spec.partition(":")
    if kind in _FOLDERS:
        if not path:
            raise ValueError(f"spec {kind!r} names no folder; write {kind}:PATH")
        return _FOLDERS[kind][0](Path(path).expanduser())
    if spec == "fashion_mnist_subset":
        return ["train", "test"]
    if spec in _RENDERED:
        return list(SPLITS)
    if spec in _TORCHVISION:
        return [split for split in SPLITS if split in _TORCHVISION[spec].splits]
    close = difflib.get_close_matches(kind, _SPECS, n=2)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known are {', '.join(_SPECS)}"
    raise ValueError(f"spec {spec!r} is no data set; {hint}")


def _check_split(spec: str, split: str, known: Sequence[str]) -> None:
    if split not in known:
        raise ValueError(f"split {split!r} of {spec} does not exist; use {' or '.join(map(repr, known))}")


def _check_options(spec: str, options: Mapping[str, Any], opener: Callable | None) -> None:
    """Raise TypeError for an option that a data set does not have, naming those that it has."""
    known = [] if opener is None else [p.name for p in inspect.signature(opener).parameters.values()]
    known = [name for name in known if name not in ("top", "split", "transform")]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(
            f"{spec} has no option {', '.join(unknown)}; " + (f"it has {', '.join(known)}" if known else "leave it out")
        )


# --- torchvision's data sets ---


def _open_torchvision(spec: str, split: str, transform: Callable | None, root: Path, download: bool) -> ImageDataset:
    source = _TORCHVISION[spec]
    folder = root / source.folder
    if not (download or folder.is_dir()):
        raise FileNotFoundError(
            f"{spec} is not at {folder}; download it with download=True (on the command line --download), "
            f"or say with root in which folder {source.folder} lies"
        )
    kind = getattr(datasets, source.name)
    try:
        original = kind(str(root), download=download, **source.splits[split])
    except ImportError as error:
        raise ImportError(f"{spec} needs the package {error.name}; install it: pip install {error.name}") from error
    except Exception as error:  # torchvision lets through whatever its readers raise
        damaged = ", ".join(map(str, _damaged_files(kind, folder))) or folder
        raise ValueError(
            f"{spec} cannot be read: {damaged} is missing, incomplete or corrupt ({type(error).__name__}: {error}); "
            f"delete {folder} and open it with download=True (on the command line --download)"
        ) from error
    targets = _first_attribute(original, "targets", "labels", "_labels")
    images = _first_attribute(original, "data", "_images", "_image_files")
    if not isinstance(images, list):
        images = _to_nchw(torch.as_tensor(images))
    return ImageDataset(images, targets, original.classes, mean=source.mean, std=source.std, transform=transform)


def _damaged_files(kind: type, folder: Path) -> list[Path]:
    """Which files do not have torchvision's checksum (CIFAR, STL-10), or the length in their header (MNIST's)."""
    listed = [*getattr(kind, "train_list", []), *getattr(kind, "test_list", [])]
    wrong_sum = [folder / name for name, md5, *_ in listed if not check_integrity(folder / name, md5)]
    return wrong_sum + [file for file in sorted(folder.glob("*-ubyte")) if not _is_whole_idx(file.read_bytes())]


def _is_whole_idx(content: bytes) -> bool:
    """IDX is MNIST's format: two zeros, a type (8: uint8), the rank, a big-endian uint32 for each side, the values."""
    if len(content) < 4:
        return False
    sides = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, content[3] + 1)]
    return content[:3] == b"\0\0\x08" and len(content) == 4 + 4 * len(sides) + torch.Size(sides).numel()


def _first_attribute(dataset: Any, *names: str) -> Any:
    """torchvision's data sets agree on no name for their labels and images."""
    return next(getattr(dataset, name) for name in names if hasattr(dataset, name))


def _to_nchw(images: Tensor) -> Tensor:
    """(N, H, W), (N, H, W, 3) or (N, 3, H, W) -> (N, C, H, W)."""
    if images.ndim == 3:
        return images.unsqueeze(1)
    return images.permute(0, 3, 1, 2).contiguous() if images.shape[3] == 3 else images
