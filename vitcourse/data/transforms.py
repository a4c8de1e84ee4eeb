"""From pixels to what a model eats: checked, augmented, resized, normalised. All pipelines of torchvision's v2."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")  # torchvision has no others for tensors


def as_image(image: Any, in_chans: int | None = None) -> tv_tensors.Image:
    """Turn a PIL image, a uint8 array (H, W[, C]) or a tensor ([B,] C, H, W) into a checked ``tv_tensors.Image``.

    Raises TypeError for integers other than uint8 (nobody knows their range), and ValueError for a wrong rank, for
    channels other than ``in_chans`` (None: 1 or 3), and for floats that are NaN, infinite or clearly not in 0..1
    (what a bicubic resize overshoots is let through).

    >>> as_image(torch.full((1, 2, 2), 255.0))
    Traceback (most recent call last):
    ValueError: image reaches from 255.0 to 255.0; give floats in 0..1 (divide by 255), or uint8
    """
    if not isinstance(image, Tensor):
        image = v2.functional.to_image(image)
    if image.ndim not in (3, 4) or image.shape[-3] not in (1, 3) or not image.numel():
        raise ValueError(f"image has shape {tuple(image.shape)}; give (C, H, W) or (B, C, H, W) with C = 1 or 3")
    if in_chans is not None and image.shape[-3] != in_chans:
        raise ValueError(
            f"image has {image.shape[-3]} channels where {in_chans} are due; convert with the transform's in_chans"
        )
    if image.is_floating_point():
        low, high = (value.item() for value in image.aminmax())
        if not (low > -1 and high < 2):  # put so that NaN fails too
            raise ValueError(f"image reaches from {low} to {high}; give floats in 0..1 (divide by 255), or uint8")
    elif image.dtype != torch.uint8:
        raise TypeError(f"image has dtype {image.dtype}; give uint8 in 0..255, or floats in 0..1")
    return image if isinstance(image, tv_tensors.Image) else tv_tensors.Image(image)


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
        interpolation: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``, antialiased.
        in_chans: 1 or 3 converts between grey and colour first; None leaves the channels as they are.

    Raises ValueError for values out of range, naming them.

    >>> train_transform(32, (0.5,), (0.5,), crop="pad", in_chans=3)(torch.rand(1, 28, 28)).shape
    torch.Size([3, 32, 32])
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
    steps = _checked(mean, in_chans)
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

    >>> eval_transform(224, IMAGENET_MEAN, IMAGENET_STD, crop_pct=0.9)(torch.rand(3, 480, 640)).shape
    torch.Size([3, 224, 224])
    """
    mode = _check_transform(img_size, mean, std, interpolation, in_chans)
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct {crop_pct} is not a part of the image; use 0 < crop_pct <= 1")
    resize = v2.Resize(int(img_size / crop_pct), interpolation=mode)
    steps = [*_checked(mean, in_chans), resize, v2.CenterCrop(img_size), *_to_normalised(mean, std)]
    return v2.Compose([*steps, v2.ToPureTensor()])


# Steps that draw no random numbers, hence may be applied to many images at once.
_FIXED = (v2.CenterCrop, v2.Grayscale, v2.Normalize, v2.Resize, v2.RGB, v2.ToDtype, v2.ToPureTensor)


def split_fixed_tail(transform: Callable | None) -> tuple[list[Callable], list[Callable]]:
    """Cut a pipeline in two: the steps up to the last random one, and the steps after it, fit for whole batches."""
    if transform is None:
        return [], []
    if not isinstance(transform, v2.Compose):
        return [transform], []
    steps = list(transform.transforms)
    end = len(steps)
    while end and (type(steps[end - 1]) in _FIXED or getattr(steps[end - 1], "func", None) is as_image):
        end -= 1
    return steps[:end], steps[end:]


def apply(steps: Sequence[Callable], image: Any) -> Any:
    """Pass ``image``, or a batch of them, through ``steps``."""
    for step in steps:
        image = step(image)
    return image


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
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(f"interpolation {interpolation!r} is unknown; use one of {', '.join(_INTERPOLATIONS)}")
    return InterpolationMode(interpolation)


def _checked(mean: Sequence[float], in_chans: int | None) -> list[Callable]:
    """The first steps: check the image, convert its channels; three means must not turn grey into colour unasked."""
    due = len(mean) if in_chans is None and len(mean) > 1 else None
    return [partial(as_image, in_chans=due), *{None: [], 1: [v2.Grayscale(1)], 3: [v2.RGB()]}[in_chans]]


def _to_normalised(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
