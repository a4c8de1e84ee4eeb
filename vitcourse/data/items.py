"""What scenes and moving clips are drawn from: items of Fashion-MNIST with their silhouettes, tints, backgrounds."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from torchvision import datasets

from vitcourse.data.embedded import fashion_mnist_subset, texture, texture_names

CLASSES: tuple[str, ...] = tuple(datasets.FashionMNIST.classes)
NOUNS = (
    "a {} T-shirt",
    "{} trousers",
    "a {} pullover",
    "a {} dress",
    "a {} coat",
    "a {} sandal",
    "a {} shirt",
    "a {} sneaker",
    "a {} bag",
    "a {} ankle boot",
)
TINTS = {
    "red": (226, 62, 54),
    "orange": (245, 146, 44),
    "yellow": (244, 213, 62),
    "green": (86, 178, 74),
    "turquoise": (64, 190, 190),
    "blue": (66, 112, 224),
    "purple": (150, 86, 206),
    "pink": (242, 130, 178),
}
SIDE = 28
_INSIDE = 16  # grey levels from which a pixel belongs to the item
_VAL_SHARE = 10  # every tenth training item is left to the scenes that validate
_DARKEST = 0.35  # of a tint, where the item is black: its shape stays visible


@dataclass(frozen=True)
class Items:
    """Grey items and the shapes that they cover.

    Attributes:
        planes: (N, 28, 28, 3), uint8: grey, silhouette (0 or 255), silhouette; one picture, resized in one go.
        labels: (N,), places in ``CLASSES``.
    """

    planes: np.ndarray
    labels: np.ndarray


@cache
def items(split: str) -> Items:
    """The items of a split, which no other split has: ``"val"`` has every tenth of the training images.

    A silhouette has all pixels of 16 grey levels or more, and those between such pixels on all four sides: dark
    cloth belongs to a garment, what is seen through a handle to the bag.

    >>> [len(items(split).labels) for split in ("train", "val", "test")]
    [9000, 1000, 2000]
    """
    images, labels = fashion_mnist_subset("test" if split == "test" else "train")
    grey, targets = images[:, 0].numpy(), np.asarray(labels)
    if split != "test":
        chosen = (np.arange(len(grey)) % _VAL_SHARE == 0) == (split == "val")
        grey, targets = grey[chosen], targets[chosen]
    cover = _silhouettes(grey).astype(np.uint8) * 255
    return Items(np.stack([grey, cover, cover], axis=-1), targets)


def _silhouettes(grey: np.ndarray) -> np.ndarray:
    inside = grey >= _INSIDE
    between = np.ones_like(inside)
    for axis in (1, 2):
        between &= np.logical_or.accumulate(inside, axis=axis)
        between &= np.flip(np.logical_or.accumulate(np.flip(inside, axis), axis=axis), axis)
    return inside | between


def random_state(name: str, *numbers: int) -> np.random.RandomState:
    """A generator that depends on its arguments alone; of the legacy kind, whose stream NumPy promises never to change.

    >>> random_state("scenes", 0, 7).randint(100) == random_state("scenes", 0, 7).randint(100)
    True
    """
    key = hashlib.blake2b(name.encode() + struct.pack(f"<{len(numbers)}q", *numbers), digest_size=16).digest()
    return np.random.RandomState(np.random.PCG64(int.from_bytes(key, "little")))  # MT19937 is slow to seed


def draw_tint(random: np.random.RandomState) -> tuple[int, np.ndarray]:
    """One of ``TINTS`` and a colour near it, float (3,) in 0..255."""
    which = random.randint(len(TINTS))
    return which, np.clip(_TINTS[which] + random.uniform(-18, 18, 3), 0, 255)


_TINTS = np.array(list(TINTS.values()), dtype=np.float64)
_GREY = np.arange(256)[:, None] / 255


def shades(tint: np.ndarray) -> np.ndarray:
    """The colours of an item's 256 grey levels under a tint: (256, 3), uint8."""
    return (tint * (_DARKEST + (1 - _DARKEST) * _GREY)).round().astype(np.uint8)


@cache
def _surface(name: str) -> Image.Image:
    return Image.fromarray(texture(name)[0].numpy())


def draw_background(
    random: np.random.RandomState, size: tuple[int, int], names: Sequence[str]
) -> tuple[str, np.ndarray]:
    """The name of a texture, and a part of it, mirrored or not, in a muted colour: (H, W, 3), uint8."""
    height, width = size
    name = names[random.randint(len(names))]
    surface = _surface(name)
    zoom = min(random.uniform(0.8, 2.0), 256 / max(size))  # texture pixels per pixel of the image
    left, top = (random.uniform(0, 256 - zoom * side) for side in (width, height))
    box = (left, top, min(256.0, left + zoom * width), min(256.0, top + zoom * height))
    grey = np.asarray(surface.resize((width, height), Image.Resampling.BILINEAR, box=box))
    if random.randint(2):
        grey = grey[:, ::-1]
    dark, light = random.uniform(10, 60, 3), random.uniform(130, 200, 3)
    return name, (dark + (light - dark) * _GREY).round().astype(np.uint8)[grey]


def check_names(textures: Sequence[str] | None) -> tuple[str, ...]:
    """The textures to draw from, all by default.

    Raises ValueError for an unknown one.
    """
    known = texture_names()
    chosen = tuple(known if textures is None else textures)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise ValueError(f"textures {list(chosen)} are not all there; use some of {', '.join(known)}, or None: all")
    return chosen
