"""Images with boxes, masks or a class for every pixel, from the files of a user; an item is (image, target)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from vitcourse.data.cocomask import decode_mask
from vitcourse.data.folders import Faults
from vitcourse.data.reading import read_image, read_mask
from vitcourse.data.transforms import IMAGENET_MEAN, IMAGENET_STD

IGNORE = 255  # in a semantic mask: what no loss and no metric counts


class SemanticMask(tv_tensors.Mask):
    """A class for every pixel, (H, W), int64; v2 transforms treat it as a mask, and fill it by a rule of its own."""


@dataclass(frozen=True)
class Annotation:
    """What is known of one image before it is read.

    Attributes:
        file: of the image.
        image_id: its number.
        where: what an error names, such as the annotation's file.
        size: (height, width), or None where it is not told.
        boxes, labels, iscrowd: (n, 4), XYXY in pixels; (n,); (n,); or None where there are no objects to find.
        segmentations: n of COCO's, or None.
        semantic: the file of a semantic mask, or None.
    """

    file: str
    image_id: int
    where: str
    size: tuple[int, int] | None = None
    boxes: np.ndarray | None = None
    labels: np.ndarray | None = None
    iscrowd: np.ndarray | None = None
    segmentations: tuple[Any, ...] | None = None
    semantic: str | None = None


class AnnotatedImages(Dataset):
    """Images of a user with their annotations: what ``coco:PATH``, ``voc:PATH`` and ``masks:PATH`` open.

    An item is (image, target): ``tv_tensors.Image`` (3, H, W), uint8, upright, and a dict by torchvision's convention
    for detection, with those of these keys that the files give:

    * ``boxes``: ``tv_tensors.BoundingBoxes`` (N, 4), XYXY, float32, pixels from the corner; N may be 0;
    * ``labels`` (N,), int64, places in ``classes``, from 0; ``area`` (N,), float32; ``iscrowd`` (N,), int64;
    * ``masks``: ``tv_tensors.Mask`` (N, H, W), uint8, where COCO's file has a segmentation for every object;
    * ``semantic``: ``SemanticMask`` (H, W), int64, places in ``semantic_classes``, or 255: counts for nothing. With
      ``masks`` it is made of them, for up to 254 classes: 0 background, else label + 1, crowds 255, small objects
      before large ones;
    * ``image_id``, int.

    Raises ValueError, which names the file, for an image that cannot be decoded, or is of another size than its
    annotation or mask, and for masks with values beyond the classes.
    """

    in_chans, img_size, mean, std = 3, None, IMAGENET_MEAN, IMAGENET_STD
    targets = None  # no class is an image's own

    def __init__(
        self,
        annotations: Sequence[Annotation],
        classes: Sequence[str],
        *,
        semantic_classes: Sequence[str] | None = None,
        binary: bool = False,
        transform: Callable | None = None,
    ) -> None:
        if not annotations:
            raise ValueError("there are no images; give at least one")
        self.annotations, self.classes = list(annotations), list(classes)
        self.semantic_classes = list(semantic_classes or ["background", *classes])
        self.binary, self.transform = binary, transform

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self._read(self.annotations[index])
        return (image, target) if self.transform is None else self.transform(image, target)

    def _read(self, annotation: Annotation) -> tuple[Any, dict[str, Any]]:
        image = read_image(annotation.file, 3)
        size = tuple(image.shape[-2:])
        if annotation.size not in (None, size):
            turned = "; it was turned upright, as its EXIF says" if annotation.size == size[::-1] else ""
            raise ValueError(
                f"{annotation.file} has {size[1]} × {size[0]} pixels, but {annotation.where} says "
                f"{annotation.size[1]} × {annotation.size[0]}{turned}; correct one of them"
            )
        return image, self._target(annotation, size)

    def take(self, indices: Sequence[int]) -> "AnnotatedImages":
        """Some of the images, in the given order."""
        part = copy.copy(self)
        part.annotations = [self.annotations[i] for i in indices]
        return part

    def usable(self, faults: Faults) -> "AnnotatedImages":
        """Those that can be read, where ``faults`` are left out: each is read once, for that. Else all, unread.

        Raises ValueError where none can.
        """
        if faults.on_error == "raise":
            return self
        kept = [i for i, annotation in enumerate(self.annotations) if self._is_readable(annotation, faults)]
        if not kept:
            raise ValueError(f"none of {len(self)} images can be read; the first: {faults.first}")
        return self if len(kept) == len(self) else self.take(kept)

    def _is_readable(self, annotation: Annotation, faults: Faults) -> bool:
        try:
            self._read(annotation)
        except (ValueError, FileNotFoundError) as error:
            faults.add(error)
            return False
        return True

    def _target(self, annotation: Annotation, size: tuple[int, int]) -> dict[str, Any]:
        target: dict[str, Any] = {"image_id": annotation.image_id}
        if annotation.boxes is not None:
            boxes = torch.from_numpy(annotation.boxes)
            target["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
            target["labels"] = torch.from_numpy(annotation.labels)
            target["iscrowd"] = torch.from_numpy(annotation.iscrowd)
            target["area"] = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        if annotation.segmentations is not None:
            masks = _decode_all(annotation, *size)
            target["masks"], target["area"] = tv_tensors.Mask(masks), masks.sum((1, 2)).float()
            if len(self.classes) < IGNORE:
                target["semantic"] = SemanticMask(semantic_of(masks, target["labels"], target["iscrowd"]))
        if annotation.semantic is not None:
            target["semantic"] = SemanticMask(self._read_semantic(annotation, size))
        return target

    def _read_semantic(self, annotation: Annotation, size: tuple[int, int]) -> Tensor:
        values = read_mask(annotation.semantic)
        if values.shape != size:
            raise ValueError(
                f"{annotation.semantic} has {values.shape[1]} × {values.shape[0]} pixels, its image {annotation.file} "
                f"{size[1]} × {size[0]}; a mask must have the size of its image"
            )
        there = np.unique(values)
        if self.binary:
            if len(there) > 2 or not set(there.tolist()) <= {0, 1, 255}:
                raise ValueError(
                    f"{annotation.semantic} has the values {_few(there)}, not only 0 and 255; for more classes write "
                    "their names into classes.txt beside the folders, one a line, in the order of the values; where "
                    "they come from JPEG's losses or smoothed edges, save the masks as PNG, without"
                )
            return torch.from_numpy((values > 0).astype(np.int64))
        count = len(self.semantic_classes)
        if (wrong := there[(there >= count) & (there != IGNORE)]).size:
            raise ValueError(
                f"{annotation.semantic} has the value {wrong[0]}, but there are {count} classes, 0 to {count - 1} (and "
                f"{IGNORE}: counts for nothing); name all classes in classes.txt, or correct the mask"
            )
        return torch.from_numpy(values.astype(np.int64))


def _few(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:6])) + (", …" if len(values) > 6 else "")


def _decode_all(annotation: Annotation, height: int, width: int) -> Tensor:
    masks = np.zeros((len(annotation.segmentations), height, width), dtype=np.uint8)
    for mask, segmentation in zip(masks, annotation.segmentations, strict=True):
        try:
            mask[:] = decode_mask(segmentation, height, width)
        except ValueError as error:
            raise ValueError(f"{annotation.where}, image {annotation.file}: {error}; correct the annotation") from error
    return torch.from_numpy(masks)


def semantic_of(masks: Tensor, labels: Tensor, iscrowd: Tensor | None = None) -> Tensor:
    """Instance masks (N, H, W) to label + 1 for every pixel (H, W), int64; 0 where there is none, 255 for crowds.

    Where masks overlap, the smaller object is seen: it is more likely to lie in front.

    >>> semantic_of(torch.tensor([[[1, 1, 0]], [[0, 1, 0]]]), torch.tensor([4, 2])).tolist()
    [[5, 3, 0]]
    """
    semantic = torch.zeros(masks.shape[1:], dtype=torch.int64)
    values = labels + 1 if iscrowd is None else torch.where(iscrowd.bool(), IGNORE, labels + 1)
    for k in masks.sum((1, 2)).argsort(descending=True, stable=True).tolist():
        semantic[masks[k].bool()] = values[k]
    return semantic


def check_boxes(
    boxes: np.ndarray, names: Sequence[str], size: tuple[int, int], where: str, faults: Faults
) -> tuple[np.ndarray, np.ndarray, int]:
    """Boxes (n, 4), XYXY, of an image (height, width): clipped to it, which of them can be used (n,), how many it cut.

    A box that reaches out of the image by at most a pixel is a matter of rounding, and not counted as cut.

    Adds to ``faults`` a ValueError that names ``where`` and which, for every box that is not finite, has no area, or
    lies outside.
    """
    height, width = size
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    clipped = np.clip(boxes, 0, [width, height, width, height])
    with np.errstate(invalid="ignore"):
        empty = ~((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
        outside = ~((clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1]))
    unusable = empty | outside | ~np.isfinite(boxes).all(1)
    cut = int((np.abs(clipped - boxes)[~unusable] > 1).any(1).sum())
    for k in np.flatnonzero(unusable):
        box = "[" + ", ".join(f"{value:g}" for value in boxes[k]) + "]"
        what = "has no area" if empty[k] else f"lies outside the image of {width} × {height} pixels"
        faults.add(
            ValueError(
                f"{where}: the box {box} (x0, y0, x1, y1) of {names[k]} {what}; correct it, or leave it out with "
                "on_error='skip'"
            )
        )
    return clipped.astype(np.float32), ~unusable, cut


def images_by_stem(files: Sequence[str], source: Path) -> dict[str, str]:
    """Files by their name without its ending; raises ValueError for two of one stem."""
    by_stem: dict[str, str] = {}
    for file in files:
        stem = Path(file).relative_to(source).with_suffix("").as_posix()
        if stem in by_stem:
            raise ValueError(f"{by_stem[stem]} and {file} differ only in their endings; keep one of them")
        by_stem[stem] = file
    return by_stem
