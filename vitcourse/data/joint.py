"""Transforms that an image shares with its boxes and masks, those that a clip's frames share, and their batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from vitcourse.data.annotated import IGNORE, SemanticMask
from vitcourse.data.transforms import resize_to
from vitcourse.layers import to_pair

PER_OBJECT = ("boxes", "labels", "masks", "area", "visible", "iscrowd", "tints")  # what of a target has N entries


def dense_train_transform(
    img_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    hflip: bool = True,
    min_size: float = 2.0,
) -> v2.Compose:
    """Augment (image, target) for training: the image to float32 (3, height, width), normalised, the target with it.

    Large-scale jitter (Ghiasi et al., 2021, section 3): resized by a random factor, then a random part of it is cut
    out, or padded at the right and below. Objects of which less is left than ``min_size`` pixels in height or width are
    dropped, and so are crowds, which nothing should learn to find.

    Args:
        img_size: the side of a square, or (height, width).
        mean, std: three values, of pixels scaled to 0..1; padding has the colour ``mean``.
        scale: the factors, where 1 just fits the image into ``img_size``.
        hflip: mirror every other image.
        min_size: in pixels.

    >>> from vitcourse.data import scenes
    >>> dataset = scenes("train", transform=dense_train_transform(64, (0.5,) * 3, (0.25,) * 3))
    >>> image, target = dataset[0]
    >>> tuple(image.shape), tuple(target["semantic"].shape), type(target["boxes"]).__name__
    ((3, 64, 64), (64, 64), 'Tensor')
    """
    size = to_pair(img_size, "img_size")
    _check_three(mean, std)
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale {scale} is no range of factors; use 0 < low <= high")
    steps = [v2.RandomHorizontalFlip()] if hflip else []
    steps += [
        v2.ScaleJitter(size, scale_range=scale),
        v2.RandomCrop(size, pad_if_needed=True, fill=_fill(mean)),
        KeepVisible(min_size, drop_crowds=True),
    ]
    return v2.Compose([*steps, *_to_normalised(mean, std)])


def dense_eval_transform(img_size: int | tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """Prepare (image, target) for evaluation: letterboxed, normalised; arguments as for ``dense_train_transform``.

    >>> from vitcourse.data import scenes
    >>> image, target = scenes("test", transform=dense_eval_transform((32, 64), (0.5,) * 3, (0.25,) * 3))[0]
    >>> tuple(image.shape), (target["semantic"] == 255).sum().item()
    ((3, 32, 64), 1024)
    """
    size = to_pair(img_size, "img_size")
    _check_three(mean, std)
    return v2.Compose([Letterbox(size, _fill(mean)), *_to_normalised(mean, std)])


class Letterbox(v2.Transform):
    """Resize to just fit into ``size`` (height, width), keeping proportions; pad at the right and below.

    Padding on two sides only keeps coordinates simple: those of the original are those here, divided by ``factor``.
    uint8 images are resized by Pillow, as :class:`Resize` does it; masks to the nearest pixel.

    Args:
        size: (height, width).
        fill: as torchvision's ``Pad`` takes it; by default 0, and 255 for semantic masks.

    >>> box = tv_tensors.BoundingBoxes([[0, 0, 200, 100]], format="XYXY", canvas_size=(100, 200))
    >>> Letterbox((64, 64))(torch.zeros(3, 100, 200, dtype=torch.uint8), box)[1].tolist()
    [[0, 0, 64, 32]]
    """

    def __init__(self, size: tuple[int, int], fill: Any = None) -> None:
        super().__init__()
        self.size, self.fill = size, {SemanticMask: IGNORE, "others": 0} if fill is None else fill

    def factor(self, height: int, width: int) -> float:
        """By what an image's sides are multiplied."""
        return min(self.size[0] / height, self.size[1] / width)

    def forward(self, *inputs: Any) -> Any:
        outputs = super().forward(*inputs)
        target = outputs[1] if len(inputs) == 2 else None
        if isinstance(target, dict) and "area" in target:  # which torchvision does not know
            target["area"] = target["area"] * self.factor(*v2.functional.get_size(inputs[0])) ** 2
        return outputs

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(next(x for x in flat_inputs if isinstance(x, Tensor)))
        factor = self.factor(height, width)
        resized = [max(1, round(side * factor)) for side in (height, width)]
        return {"size": resized, "padding": [0, 0, self.size[1] - resized[1], self.size[0] - resized[0]]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        kind = type(inpt)
        if isinstance(inpt, tv_tensors.Mask):
            inpt = v2.functional.resize(inpt, params["size"])
        elif isinstance(inpt, Tensor) and not isinstance(inpt, tv_tensors.BoundingBoxes):
            inpt = resize_to(inpt, tuple(params["size"]), "bilinear")
        else:
            inpt = self._call_kernel(v2.functional.resize, inpt, params["size"])
        fill = self.fill.get(kind, self.fill.get("others", 0))
        return self._call_kernel(v2.functional.pad, inpt, params["padding"], fill=fill)


class KeepVisible(v2.Transform):
    """After a crop: boxes tight around what is still seen, and only objects of which enough is.

    Where there are masks, boxes are tight around them; else they are clipped to the image.

    Args:
        min_size: the least height and width of a box, in pixels.
        drop_crowds: leave out objects with ``iscrowd`` 1.

    >>> masks = tv_tensors.Mask(torch.tensor([[[0, 1], [0, 1]], [[0, 0], [0, 0]]]))
    >>> boxes = tv_tensors.BoundingBoxes([[0.0, 0, 2, 2], [0, 0, 1, 1]], format="XYXY", canvas_size=(2, 2))
    >>> target = {"masks": masks, "boxes": boxes, "labels": torch.tensor([3, 4])}
    >>> _, seen = KeepVisible(1)(torch.zeros(3, 2, 2), target)
    >>> seen["boxes"].tolist(), seen["labels"].tolist()
    ([[1.0, 0.0, 2.0, 2.0]], [3])
    """

    def __init__(self, min_size: float = 1.0, drop_crowds: bool = False) -> None:
        super().__init__()
        if not min_size > 0:
            raise ValueError(f"min_size {min_size} is no length in pixels; use more than 0")
        self.min_size, self.drop_crowds = min_size, drop_crowds

    def forward(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "boxes" not in target:
            return image, target
        target = dict(target)
        if "masks" in target:
            masks = target["masks"].as_subclass(Tensor)
            target["area"], boxes = masks.sum((1, 2)).float(), _tight_boxes(masks)
        else:
            boxes = v2.functional.clamp_bounding_boxes(target["boxes"]).as_subclass(Tensor)
            target["area"] = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        target["boxes"] = tv_tensors.wrap(boxes.to(target["boxes"].dtype), like=target["boxes"])
        kept = (boxes[:, 2:] - boxes[:, :2] >= self.min_size).all(1)
        if self.drop_crowds and "iscrowd" in target:
            kept &= target["iscrowd"] == 0
        for key in PER_OBJECT:
            if key in target:
                entry = target[key]
                chosen = entry.as_subclass(Tensor)[kept]
                target[key] = tv_tensors.wrap(chosen, like=entry) if isinstance(entry, tv_tensors.TVTensor) else chosen
        return image, target


def _tight_boxes(masks: Tensor) -> Tensor:
    """(N, H, W) -> (N, 4), XYXY, the far edges exclusive; zeros for empty masks."""
    masks = masks.bool()
    boxes, seen = torch.zeros(len(masks), 4), masks.flatten(1).any(1)
    if seen.any():
        boxes[seen] = masks_to_boxes(masks[seen]) + torch.tensor([0, 0, 1, 1])
    return boxes


def collate_dense(samples: Sequence[tuple[Tensor, dict[str, Any]]], multiple: int = 1) -> dict[str, Any]:
    """Pairs (image, target) to one batch; images of different sizes are padded with 0 at the right and below.

    Args:
        samples: what ``dense_train_transform`` gives.
        multiple: sides become multiples of it, such as the largest stride of a backbone.

    Returns:
        ``images`` (B, C, H, W); ``pixel_mask`` (B, H, W), True where the image is; ``targets``, a list of dicts, whose
        masks are padded with 0; and ``semantic`` (B, H, W), padded with 255, where all targets have one.

    Raises ValueError for no samples, and for images that are no tensors (C, H, W) of one number of channels.

    >>> batch = collate_dense([(torch.ones(3, 4, 6), {}), (torch.ones(3, 5, 3), {})], multiple=4)
    >>> tuple(batch["images"].shape), batch["pixel_mask"].sum((1, 2)).tolist()
    ((2, 3, 8, 8), [24, 15])
    """
    if not samples or multiple < 1:
        raise ValueError(f"{len(samples)} samples, multiple {multiple}; give at least one sample, and multiple >= 1")
    shapes = [tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__ for image, _ in samples]
    if any(len(shape) != 3 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"images {shapes} are not all (C, H, W) with equal C; use a transform of vitcourse.data")
    height, width = (-(-max(shape[k] for shape in shapes) // multiple) * multiple for k in (1, 2))

    def padded(tensor: Tensor, value: int) -> Tensor:
        room = (0, width - tensor.shape[-1], 0, height - tensor.shape[-2])
        return F.pad(tensor.as_subclass(Tensor), room, value=value)

    targets = [dict(target) for _, target in samples]
    for target in targets:
        for key, value in (("masks", 0), ("tag", 0), ("semantic", IGNORE)):
            if key in target:
                target[key] = padded(target[key], value)
    batch = {
        "images": torch.stack([padded(image, 0) for image, _ in samples]),
        "pixel_mask": torch.stack([padded(torch.ones(shape[1:], dtype=torch.bool), 0) for shape in shapes]),
        "targets": targets,
    }
    if all("semantic" in target for target in targets):
        batch["semantic"] = torch.stack([target["semantic"] for target in targets])
    return batch


class ClipTransform:
    """A transform of images, drawn once for all frames of a clip (C, T, H, W).

    Args:
        transform: such as ``train_transform`` and ``eval_transform`` build. Mirrored clips have mirrored motions: build
            it with ``hflip=False`` where left and right are labels.

    >>> from vitcourse.data import eval_transform, moving
    >>> clip, _ = moving("test", transform=ClipTransform(eval_transform(32, (0.4,) * 3, (0.1,) * 3)))[0]
    >>> tuple(clip.shape), clip.dtype
    ((3, 8, 32, 32), torch.float32)
    """

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.transform = transform

    def __call__(self, clip: Tensor) -> Tensor:
        if clip.ndim != 4:
            raise ValueError(f"clip has shape {tuple(clip.shape)}; give (C, T, H, W)")
        return self.transform(clip.transpose(0, 1)).transpose(0, 1).contiguous()  # frames as a batch of images


def _fill(mean: Sequence[float]) -> dict[Any, Any]:
    colour = [round(255 * value) for value in mean]
    return {tv_tensors.Image: colour, SemanticMask: IGNORE, "others": 0}


def _check_three(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean {mean} and std {std} must have three values, those of std positive")


def _to_normalised(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return [to_float, v2.Normalize(list(mean), list(std)), v2.ToPureTensor()]
