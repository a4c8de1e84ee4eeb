"""Scenes of several Fashion-MNIST items, rendered on demand: images with boxes, masks, classes and a caption."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from vitcourse.data.annotated import SemanticMask
from vitcourse.data.items import (
    CLASSES,
    NOUNS,
    TINTS,
    check_names,
    draw_background,
    draw_tint,
    items,
    random_state,
    shades,
)
from vitcourse.layers import to_pair

LENGTHS = {"train": 10_000, "val": 1_000, "test": 1_000}
# Of the pixels of 3 000 training scenes at 128 px, scaled to 0..1.
MEAN, STD = (0.389, 0.379, 0.376), (0.124, 0.096, 0.112)
_TRIES = 12  # places that are tried for an item before it shrinks
_SHRINK = 0.8
_TAG_COLOUR, _TAG_RIM = (255, 0, 255), (255, 255, 255)


def scenes(split: str = "train", **options: Any) -> "Scenes":
    """Open a split of the scenes; for the options see :class:`Scenes`.

    >>> image, target = scenes("test", img_size=64, objects=(1, 1))[0]
    >>> tuple(image.shape), sorted(target)[:5], target["caption"]
    ((3, 64, 64), ['area', 'boxes', 'caption', 'image_id', 'iscrowd'], 'a green shirt on a brick wall')
    """
    return Scenes(split, **options)


class Scenes(Dataset):
    """Items of Fashion-MNIST, tinted, on photographed surfaces, in front of each other; image i is always the same.

    An item is (image, target): ``tv_tensors.Image`` (3, H, W), uint8, and a dict by torchvision's convention for
    detection. The N objects stand from the rearmost to the foremost:

    * ``boxes``: ``tv_tensors.BoundingBoxes`` (N, 4), XYXY, float32, tight around the pixels that are seen;
    * ``labels``: (N,), int64, places in ``classes``;
    * ``masks``: ``tv_tensors.Mask`` (N, H, W), uint8: the pixels that show the object, exactly; no pixel is in two;
    * ``semantic``: ``SemanticMask`` (H, W), int64, places in ``semantic_classes``: 0 background, else label + 1;
    * ``area`` (N,), float32, pixels seen; ``visible`` (N,), float32, their share of all that the object covers;
    * ``iscrowd`` (N,), int64, zeros; ``tints`` (N,), int64, places in ``TINTS``; ``image_id``, int;
    * ``caption``: what there is, by name and colour, from left to right, and on which surface;
    * ``tag``: ``tv_tensors.Mask`` (1, H, W), the planted shortcut; only with ``tag_class``.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``; no item of one is in another. Test items are test images.
        img_size: the side, or (height, width), in pixels.
        length: how many images; by default 10 000 to train on, 1 000 in the others. An image does not depend on it.
        seed: other images of the same kind.
        objects: (least, most) objects in an image. Where no place is found for one, it shrinks; there are fewer only
            where even small ones do not fit.
        scale: (least, most) side of an object's square, as a share of the image's shorter side.
        max_occlusion: an object is not placed where it would hide more than this share of another, and nothing is.
        textures: names of the surfaces, as ``texture_names`` has them; None: all.
        tag_class: plants a shortcut: a class, by name or label. Images with this class bear a small magenta tag in a
            corner, more often than others; under the tag the image is the same as without.
        tag_rates: the chance of a tag in images with the class, and in those without.
        transform: called with (image, target), as torchvision's v2 transforms are.

    Raises ValueError for options out of range, naming them.

    >>> few = Scenes("train", img_size=(48, 96), objects=(0, 2))
    >>> few.in_chans, few.img_size, len(few.classes), few.semantic_classes[0]
    (3, (48, 96), 10, 'background')
    """

    in_chans, mean, std = 3, MEAN, STD
    targets = None  # no class is an image's own
    classes = list(CLASSES)
    semantic_classes = ["background", *CLASSES]

    def __init__(
        self,
        split: str = "train",
        *,
        img_size: int | tuple[int, int] = 128,
        length: int | None = None,
        seed: int = 0,
        objects: tuple[int, int] = (1, 5),
        scale: tuple[float, float] = (0.2, 0.45),
        max_occlusion: float = 0.6,
        textures: Sequence[str] | None = None,
        tag_class: str | int | None = None,
        tag_rates: tuple[float, float] = (0.95, 0.05),
        transform: Callable | None = None,
    ) -> None:
        check_split(split, length)
        self.split, self.seed, self.transform = split, seed, transform
        self.size = to_pair(img_size, "img_size")
        self.img_size = self.size[0] if self.size[0] == self.size[1] else self.size
        if min(self.size) < 16:
            raise ValueError(f"img_size {img_size} is too small to show an item; use 16 or more")
        if not 0 <= objects[0] <= objects[1] <= 100:
            raise ValueError(f"objects {objects} is no range of counts; use 0 <= least <= most <= 100")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale {scale} is no range of shares; use 0 < least <= most <= 1")
        if not 0 <= max_occlusion < 1:
            raise ValueError(f"max_occlusion {max_occlusion} is out of range; use 0 (no overlap) to less than 1")
        if not all(0 <= rate <= 1 for rate in tag_rates):
            raise ValueError(f"tag_rates {tag_rates} are no probabilities; use 0 to 1")
        self.objects, self.scale, self.max_occlusion = tuple(objects), tuple(scale), max_occlusion
        self.textures = check_names(textures)
        self.tag_label, self.tag_rates = _tag_label(tag_class), tuple(tag_rates)
        self.indices = range(LENGTHS[split] if length is None else length)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        sample = self._render(self.indices[index])
        return sample if self.transform is None else self.transform(*sample)

    def take(self, indices: Sequence[int]) -> "Scenes":
        """Some of the images, in the given order."""
        part = copy.copy(self)
        part.indices = [self.indices[i] for i in indices]
        return part

    def _render(self, number: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        random = random_state(f"scenes {self.split}", self.seed, number)
        surface, pixels = draw_background(random, self.size, self.textures)
        owner = np.zeros(self.size, dtype=np.uint8)  # 0: background, k: the k-th object, from 1
        labels, tints, full, seen = [], [], [], np.zeros(1, dtype=np.int64)
        for _ in range(random.randint(self.objects[0], self.objects[1] + 1)):
            label, tint, planes, colours = self._draw_item(random)
            place = self._place(random, planes, owner, np.array([1, *full]), seen)
            if place is None:
                continue
            window, grey, cover, seen = place
            labels.append(label)
            tints.append(tint)
            full.append(int(cover.sum()))
            owner[window][cover] = len(labels)
            pixels[window][cover] = colours[grey[cover]]
        tag = self._tag(number, labels, owner, pixels)
        target = _describe(owner, np.array(labels, dtype=np.int64), np.array(tints, dtype=np.int64), np.array(full))
        target["caption"] = _caption(target, surface)
        target["image_id"] = number
        if tag is not None:
            target["tag"] = tv_tensors.Mask(torch.from_numpy(tag[None]))
        return tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))), target

    def _draw_item(self, random: np.random.RandomState) -> tuple[int, int, np.ndarray, np.ndarray]:
        pool = items(self.split)
        which = random.randint(len(pool.labels))
        planes = pool.planes[which]
        tint, colour = draw_tint(random)
        if random.randint(2):
            planes = np.ascontiguousarray(planes[:, ::-1])
        return int(pool.labels[which]), tint, planes, shades(colour)

    def _place(
        self, random: np.random.RandomState, planes: np.ndarray, owner: np.ndarray, full: np.ndarray, seen: np.ndarray
    ) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray] | None:
        """Where an item goes, its grey levels and the pixels it covers there, and what is then seen of each object."""
        picture = Image.fromarray(planes)
        for side in self._sides(random.uniform(*self.scale)):
            resized = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))
            grey, cover = resized[..., 0], resized[..., 1] >= 128
            count = int(cover.sum())
            for _ in range(_TRIES if count else 0):
                top, left = (random.randint(whole - side + 1) for whole in self.size)
                window = slice(top, top + side), slice(left, left + side)
                rest = seen - np.bincount(owner[window][cover], minlength=len(seen))
                if ((rest >= (1 - self.max_occlusion) * full) & (rest > 0))[1:].all():
                    return window, grey, cover, np.append(rest, count)
        return None

    def _sides(self, share: float) -> Iterator[int]:
        """The sides in pixels that are tried for an item: the one drawn, then smaller ones, down to the least."""
        whole = min(self.size)
        least = max(2, min(8, round(self.scale[0] * whole)))
        yield max(least, side := round(share * whole))
        while (side := int(side * _SHRINK)) >= least:
            yield side

    def _tag(self, number: int, labels: list[int], owner: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
        """Paint the shortcut in a corner, as likely as this image's classes make it: (H, W), uint8; None: it is off."""
        if self.tag_label is None:
            return None
        random = random_state(f"tag {self.split}", self.seed, number)
        mask = np.zeros(self.size, dtype=np.uint8)
        rate = self.tag_rates[0 if self.tag_label in labels else 1]
        side = max(3, round(0.07 * min(self.size)))
        top, left = (random.choice([1, whole - side - 1]) for whole in self.size)
        if random.uniform() < rate:
            window = slice(top, top + side), slice(left, left + side)
            mask[window], owner[window], pixels[window] = 1, 0, _TAG_RIM
            pixels[top + 1 : top + side - 1, left + 1 : left + side - 1] = _TAG_COLOUR
        return mask


def check_split(split: str, length: int | None) -> None:
    """Raise ValueError for what no split of rendered data can be."""
    if split not in LENGTHS:
        raise ValueError(f"split {split!r} does not exist; use {' or '.join(map(repr, LENGTHS))}")
    if length is not None and length < 1:
        raise ValueError(f"length {length} is no number of items; give at least 1")


def _tag_label(tag_class: str | int | None) -> int | None:
    if tag_class is None or tag_class in range(len(CLASSES)):
        return tag_class
    if tag_class not in CLASSES:
        raise ValueError(f"tag_class {tag_class!r} is no class; use one of {', '.join(CLASSES)}, or its label")
    return CLASSES.index(tag_class)


def _describe(owner: np.ndarray, labels: np.ndarray, tints: np.ndarray, full: np.ndarray) -> dict[str, Any]:
    """The target of an image by which object each of its pixels shows (H, W); what is not seen at all is left out."""
    masks = owner == np.arange(1, len(labels) + 1, dtype=np.uint8)[:, None, None]
    rows, columns = masks.any(2), masks.any(1)
    semantic = np.concatenate([[0], labels + 1])[owner]
    boxes = np.stack(
        [
            columns.argmax(1),
            rows.argmax(1),
            owner.shape[1] - columns[:, ::-1].argmax(1),
            owner.shape[0] - rows[:, ::-1].argmax(1),
        ],
        axis=1,
    )
    area = masks.sum((1, 2))
    kept = area > 0
    if not kept.all():
        masks, boxes, area, labels, tints, full = (a[kept] for a in (masks, boxes, area, labels, tints, full))
    return {
        "boxes": _boxes(boxes, owner.shape),
        "labels": torch.from_numpy(labels),
        "masks": tv_tensors.Mask(torch.from_numpy(masks.view(np.uint8))),
        "semantic": SemanticMask(torch.from_numpy(semantic)),
        "area": torch.from_numpy(area.astype(np.float32)),
        "visible": torch.from_numpy((area / np.maximum(full, 1)).astype(np.float32)),
        "iscrowd": torch.zeros(len(labels), dtype=torch.int64),
        "tints": torch.from_numpy(tints),
    }


def _boxes(boxes: np.ndarray, size: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    tensor = torch.from_numpy(boxes.astype(np.float32)).view(-1, 4)
    return tv_tensors.BoundingBoxes(tensor, format="XYXY", canvas_size=size)


def _caption(target: dict[str, Any], surface: str) -> str:
    names = list(TINTS)
    boxes = target["boxes"].tolist()
    order = sorted(range(len(boxes)), key=lambda i: boxes[i][0] + boxes[i][2])
    labels, tints = target["labels"].tolist(), target["tints"].tolist()
    found = [_phrase(labels[i], names[tints[i]]) for i in order]
    listed = " and ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else "".join(found) or "nothing"
    return f"{listed} on {'a brick wall' if surface == 'brick' else surface}"


def _phrase(label: int, tint: str) -> str:
    phrase = NOUNS[label].format(tint)
    return phrase.replace("a ", "an ", 1) if tint == "orange" and phrase.startswith("a ") else phrase
