"""The images that come with the project, each file checked against the SHA256SUMS beside it."""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitcourse import paths
from vitcourse.data.reading import read_image


def photo_names() -> list[str]:
    """The names that ``photo`` takes.

    >>> photo_names()
    ['astronaut', 'cat', 'coffee', 'galaxies', 'photographer', 'retina', 'rocket']
    """
    return _names("photos")


def photo(name: str) -> Tensor:
    """A photograph (public domain or CC0): (3, 256, 256), uint8.

    Raises ValueError for an unknown name or a corrupt file, FileNotFoundError for a missing one.

    >>> photo("cat").shape
    torch.Size([3, 256, 256])
    """
    return _picture("photos", name)


def texture_names() -> list[str]:
    """The names that ``texture`` takes.

    >>> texture_names()
    ['brick', 'grass', 'gravel']
    """
    return _names("textures")


def texture(name: str) -> Tensor:
    """A photographed surface (CC0): (3, 256, 256), uint8; grey, so the channels are equal. Raises as ``photo`` does.

    >>> texture("grass").float().std() > 20
    tensor(True)
    """
    return _picture("textures", name)


def fashion_mnist_subset(split: str) -> tuple[Tensor, list[int]]:
    """Images (N, 1, 28, 28), uint8, and N labels: 10 000 for ``"train"``, 2 000 for ``"test"``. Raises as ``photo``."""
    content = read_verified(paths.data_dir() / "fashion_mnist" / f"{split}.npz")
    with np.load(io.BytesIO(content)) as arrays:
        return torch.from_numpy(arrays["images"]).unsqueeze(1), arrays["labels"].tolist()


def read_verified(path: Path) -> bytes:
    """Read a file whose sha256 stands in the SHA256SUMS beside it; raise as ``photo`` does if it does not match."""
    remedy = "restore it (git checkout -- data, or pip install --force-reinstall vitcourse)"
    manifest = path.with_name("SHA256SUMS")
    for file in (manifest, path):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {remedy}")
    content = path.read_bytes()
    expected = {name: digest for digest, name in map(str.split, manifest.read_text(encoding="utf-8").splitlines())}
    if hashlib.sha256(content).hexdigest() != expected.get(path.name):
        raise ValueError(f"{path} is corrupt: its sha256 is not the one in {manifest.name}; {remedy}")
    return content


def _names(folder: str) -> list[str]:
    return sorted(file.stem for file in (paths.data_dir() / folder).glob("*.png"))


def _picture(folder: str, name: str) -> Tensor:
    if name not in _names(folder):
        raise ValueError(f"name {name!r} is not in {folder}; use one of {', '.join(_names(folder))}")
    content = read_verified(paths.data_dir() / folder / f"{name}.png")
    return read_image(content, in_chans=3).as_subclass(Tensor)
