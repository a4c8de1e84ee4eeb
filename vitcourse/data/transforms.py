"""From pixels to what a model eats: checked, augmented, resized, normalised. All pipelines of torchvision's v2."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from vitcourse.data.reading import is_picture, read_image
from vitcourse.layers import to_pair

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")  # torchvision has no others for tensors
_GREY_WEIGHTS = (19595, 38470, 7471)  # ITU-R 601 in 65536ths, as Pillow has them: grey stays the grey that it was


def as_image(image: Any, in_chans: int | None = None) -> tv_tensors.Image:
    """Turn a picture, a uint8 array (H, W[, C]) or a tensor ([B,] C, H, W) into a checked ``tv_tensors.Image``.

    A picture is what ``read_image`` takes, which also converts it to ``in_chans``: a path, bytes, a file object, a PIL
    image. Arrays and tensors are taken as they are.

    Raises as ``read_image`` does, TypeError for integers other than uint8 (nobody knows their range), and ValueError
    for a wrong rank, for channels other than ``in_chans`` (None: 1 or 3), and for floats that are NaN, infinite or
    clearly not in 0..1 (what a bicubic resize overshoots is let through).

    >>> as_image(torch.full((1, 2, 2), 255.0))
    Traceback (most recent call last):
    ValueError: image reaches from 255.0 to 255.0; give floats in 0..1 (divide by 255), or uint8
    """
    if is_picture(image):
        image = read_image(image, in_chans)
    elif not isinstance(image, Tensor):
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
    img_size: int | tuple[int, int],
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
    """Augment an image for training: what ``as_image`` takes -> float32 (C, height, width), normalised.

    Args:
        img_size: the side of a square, or (height, width).
        mean, std: one value, or one for each channel, of pixels scaled to 0..1; three make three channels of a grey
            picture, but of no tensor.
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
    size = _check_transform(img_size, mean, std, interpolation, in_chans)
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
        steps.append(v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode(interpolation)))
    else:
        shift = [max(1, side // 8) for side in reversed(size)]  # torchvision pads in x first
        steps += [Resize(size, interpolation), v2.RandomCrop(size, padding=shift)]
    if hflip:
        steps.append(v2.RandomHorizontalFlip())
    if randaugment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=randaugment))
    steps += _to_normalised(mean, std)
    if random_erasing:
        steps.append(v2.RandomErasing(random_erasing, value="random"))
    return v2.Compose([*steps, v2.ToPureTensor()])


def eval_transform(
    img_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    interpolation: str = "bicubic",
    crop_pct: float = 1.0,
    in_chans: int | None = None,
) -> v2.Compose:
    """Prepare an image as timm evaluates: what ``as_image`` takes -> float32 (C, height, width), normalised.

    The image is resized until it just covers ``img_size / crop_pct`` (rounded down), and its centre is cut out. The
    pixels are those of ``timm.data.create_transform``, to which 8-bit images, also as tensors, are resized by Pillow.
    Arguments as for ``train_transform``; ``crop_pct`` in (0, 1].

    >>> eval_transform(224, IMAGENET_MEAN, IMAGENET_STD, crop_pct=0.9)(torch.rand(3, 480, 640)).shape
    torch.Size([3, 224, 224])
    """
    _check_transform(img_size, mean, std, interpolation, in_chans)
    steps = [*_checked(mean, in_chans), *resize_and_crop(img_size, interpolation, crop_pct), *_to_normalised(mean, std)]
    return v2.Compose([*steps, v2.ToPureTensor()])


def resize_and_crop(
    img_size: int | tuple[int, int], interpolation: str = "bicubic", crop_pct: float = 1.0
) -> list[Callable]:
    """The steps of ``eval_transform`` that bring a ``tv_tensors.Image`` to its size; uint8 stays uint8."""
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct {crop_pct} is not a part of the image; use 0 < crop_pct <= 1")
    size = to_pair(img_size, "img_size")
    return [Resize(tuple(math.floor(side / crop_pct) for side in size), interpolation), v2.CenterCrop(size)]


class Resize:
    """Resize images ([B,] C, H, W) so that they just cover ``size`` (height, width), keeping their proportions.

    Sizes are rounded as timm has it. uint8 images are resized by Pillow, to the same pixels on every processor, which
    PyTorch's kernels do not promise; floats by PyTorch, antialiased.

    >>> Resize((20, 20))(torch.zeros(3, 30, 45, dtype=torch.uint8)).shape
    torch.Size([3, 20, 30])
    """

    def __init__(self, size: tuple[int, int], interpolation: str = "bicubic") -> None:
        self.size, self.interpolation = size, interpolation

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size}, {self.interpolation!r})"

    def __call__(self, image: Tensor) -> Tensor:
        return resize_to(image, self.size_of(*image.shape[-2:]), self.interpolation)

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """What an image of ``height`` × ``width`` is resized to."""
        short = min(height, width)
        if self.size[0] == self.size[1]:  # torchvision's rule, which timm follows for squares
            return tuple(int(self.size[0] * side / short) for side in (height, width))
        ratio = min(height / self.size[0], width / self.size[1])
        return round(height / ratio), round(width / ratio)


def resize_to(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize images ([B,] C, H, W) to exactly ``size`` (height, width), as :class:`Resize` does it."""
    if tuple(size) == tuple(image.shape[-2:]):
        return image
    if image.dtype == torch.uint8:
        return tv_tensors.wrap(_resize_by_pillow(image, size, interpolation), like=image)
    mode = "nearest-exact" if interpolation == "nearest" else interpolation  # Pillow's nearest
    return v2.functional.resize(image, list(size), InterpolationMode(mode), antialias=True)


def _resize_by_pillow(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Every channel by itself, which is what Pillow does with the channels of a colour image."""
    height, width = size
    how = Image.Resampling[interpolation.upper()]
    planes = image.as_subclass(Tensor).cpu().contiguous().flatten(0, -3).numpy()
    resized = np.stack([np.asarray(Image.fromarray(plane).resize((width, height), how)) for plane in planes])
    return torch.from_numpy(resized).view(*image.shape[:-2], height, width).to(image.device)


# Steps that draw no random numbers, hence may be applied to many images at once.
_FIXED = (Resize, v2.CenterCrop, v2.Grayscale, v2.Normalize, v2.Resize, v2.RGB, v2.ToDtype, v2.ToPureTensor)


def split_fixed_tail(transform: Callable | None) -> tuple[list[Callable], list[Callable]]:
    """Cut a pipeline in two: the steps up to the last random one, and the steps after it, fit for whole batches."""
    if transform is None:
        return [], []
    if not isinstance(transform, v2.Compose):
        return [transform], []
    steps = list(transform.transforms)
    end = len(steps)
    while end and (type(steps[end - 1]) in _FIXED or _function(steps[end - 1]) in (as_image, to_channels, to_float)):
        end -= 1
    return steps[:end], steps[end:]


def _function(step: Callable) -> Callable:
    return step.func if isinstance(step, partial) else step


def apply(steps: Sequence[Callable], image: Any) -> Any:
    """Pass ``image``, or a batch of them, through ``steps``."""
    for step in steps:
        image = step(image)
    return image


def to_channels(image: Tensor, in_chans: int) -> Tensor:
    """Grey ([B,] 1, H, W) to RGB, or RGB to grey as Pillow weighs it (ITU-R 601), which turns equal channels to one.

    >>> to_channels(torch.full((3, 1, 1), 255, dtype=torch.uint8), 1).item()
    255
    """
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans {in_chans!r} cannot be made; use 1 (grey) or 3 (RGB)")
    if image.shape[-3] == in_chans:
        return image
    plain = image.as_subclass(Tensor)
    if in_chans == 3:
        return tv_tensors.wrap(plain.expand(*plain.shape[:-3], 3, -1, -1), like=image)
    weights = torch.tensor(_GREY_WEIGHTS, device=plain.device).view(3, 1, 1)
    if plain.is_floating_point():
        grey = (plain * (weights / 65536).to(plain.dtype)).sum(-3, keepdim=True)
    else:
        grey = (((plain * weights).sum(-3, keepdim=True) + 32768) >> 16).to(plain.dtype)
    return tv_tensors.wrap(grey, like=image)


def to_float(image: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in 0..1, divided as timm and the engine do; floats become float32."""
    return tv_tensors.wrap(image.as_subclass(Tensor).float() / (1 if image.is_floating_point() else 255), like=image)


def _check_transform(
    img_size: int | tuple[int, int], mean: Sequence[float], std: Sequence[float], interpolation: str, in_chans: Any
) -> tuple[int, int]:
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
    return to_pair(img_size, "img_size")


def _checked(mean: Sequence[float], in_chans: int | None) -> list[Callable]:
    """The first steps: check the image, convert its channels; three means must not turn grey into colour unasked."""
    due = len(mean) if in_chans is None and len(mean) > 1 else None
    return [partial(as_image, in_chans=due), *([partial(to_channels, in_chans=in_chans)] if in_chans else [])]


def _to_normalised(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [to_float, v2.Normalize(list(mean), list(std))]
