"""Augmentation of whole batches, on the device that trains, and a pure function of (seed, epoch, index).

Random numbers are computed, not drawn: ``uniform(n, seed, epoch, index)`` hashes its keys (a counter-based generator,
Salmon et al. 2011). An image's augmentation then depends on nothing else: not on the batch it is in, on the number of
worker processes, GPUs or micro-batches, nor on where an interrupted run was taken up again.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import TrainConfig

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the constants of splitmix64 (Steele et al. 2014), as signed 64-bit integers
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift: int64's own keeps the sign


def _scramble(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def hash_keys(*keys: int | Tensor) -> Tensor:
    """64 well-mixed bits (int64) for each combination of integer keys, which broadcast."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        state = _scramble(state + _GOLDEN + torch.as_tensor(key))
    return state


def uniform(n: int, *keys: int | Tensor) -> Tensor:
    """``n`` uniform numbers in [0, 1) for each key: keys that broadcast to (B,) give (B, n), float32.

    >>> uniform(2, 0, 3, torch.tensor([7, 8])).equal(torch.stack([uniform(2, 0, 3, 7), uniform(2, 0, 3, 8)]))
    True
    """
    state = hash_keys(*keys).unsqueeze(-1) + _GOLDEN * torch.arange(1, n + 1)
    return _shift(_scramble(state), 40).float() / 2**24


def seed_of(*keys: int) -> int:
    """One non-negative seed for a generator of PyTorch's."""
    return int(_shift(hash_keys(*keys), 1))


def random_crop(images: Tensor, padding: int, draws: Tensor) -> Tensor:
    """Zero-pad (B, C, H, W) by ``padding`` and cut the old size out where ``draws`` (B, 2) say."""
    h, w = images.shape[-2:]
    top, left = (draws * (2 * padding + 1)).long().to(images.device).unbind(1)
    windows = F.pad(images, [padding] * 4).unfold(2, h, 1).unfold(3, w, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def random_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Mirror the images (B, C, H, W) whose draw (B,) is below one half."""
    mirrored = (draws < 0.5).to(images.device)[:, None, None, None]
    return torch.where(mirrored, images.flip(-1), images)


def randaugment(images: Tensor, draws: Tensor, magnitude: int) -> Tensor:
    """RandAugment (Cubuk et al. 2020) with torchvision's operations and ranges, on uint8 images (B, C, H, W).

    ``draws`` (B, 2 * num_ops) choose each image's operations and their signs. Images that drew the same are worked on
    together, so the cost on a GPU is that of some fifty small calls and not of B images.

    Raises:
        TypeError: images that are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"randaugment needs uint8 images, got {images.dtype}; leave normalising to the engine")
    images = images.clone()
    for draw in draws.split(2, dim=1):
        kinds = (draw[:, 0] * len(OPERATIONS)).long() * 2 + (draw[:, 1] < 0.5)
        for kind in kinds.unique().tolist():
            rows = (kinds == kind).nonzero()[:, 0].to(images.device)
            images[rows] = apply_operation(images[rows], OPERATIONS[kind // 2], magnitude / 30 * (-1) ** (kind % 2))
    return images


OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)


def apply_operation(images: Tensor, name: str, strength: float) -> Tensor:
    """One of RandAugment's operations on (B, C, H, W) uint8; ``strength`` in [-1, 1], whose sign is a direction."""
    from torchvision.transforms.v2 import functional as tv

    h, w = images.shape[-2:]
    shear = math.degrees(math.atan(0.3 * strength))
    blend = 1 + 0.9 * strength
    match name:
        case "shear_x":
            return tv.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=[shear, 0.0], center=[0, 0])
        case "shear_y":
            return tv.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, shear], center=[0, 0])
        case "translate_x":
            return tv.affine(images, 0.0, [int(150 / 331 * w * strength), 0], scale=1.0, shear=[0.0, 0.0])
        case "translate_y":
            return tv.affine(images, 0.0, [0, int(150 / 331 * h * strength)], scale=1.0, shear=[0.0, 0.0])
        case "rotate":
            return tv.rotate(images, 30 * strength)
        case "brightness":
            return tv.adjust_brightness(images, blend)
        case "color":
            return tv.adjust_saturation(images, blend)
        case "contrast":
            return tv.adjust_contrast(images, blend)
        case "sharpness":
            return tv.adjust_sharpness(images, blend)
        case "posterize":
            return tv.posterize(images, 8 - round(abs(strength) * 4))
        case "solarize":
            return tv.solarize(images, 255 * (1 - abs(strength)))
        case "autocontrast":
            return tv.autocontrast(images)
        case "equalize":
            return tv.equalize(images)
    return images


def augment(images: Tensor, index: Tensor, epoch: int, config: TrainConfig) -> Tensor:
    """Crop, flip and RandAugment of (B, C, H, W), as the config asks, for the images that ``index`` (B,) names."""
    if not (config.crop_padding or config.hflip or config.randaugment):
        return images
    draws = uniform(3 + 2 * config.randaugment, config.seed, epoch, index)
    if config.crop_padding:
        images = random_crop(images, config.crop_padding, draws[:, :2])
    if config.hflip:
        images = random_flip(images, draws[:, 2])
    if config.randaugment:
        images = randaugment(images, draws[:, 3:], config.randaugment_magnitude)
    return images


class Mixer:
    """MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019) within neighbouring pairs of a global batch.

    Images 2k and 2k + 1 are mixed with each other, with a ratio of the pair's own. A batch that is cut into processes
    and micro-batches at even places is therefore mixed the same as a whole one. An odd last image stays as it is.
    Where both are on, each pair takes one of the two at random.
    """

    def __init__(self, config: TrainConfig, num_classes: int, step: int, batch_size: int) -> None:
        random = np.random.default_rng((config.seed, step))
        pairs = (batch_size + 1) // 2
        cut = random.random(pairs) < (0.5 if config.mixup and config.cutmix else float(config.cutmix > 0))
        ratio = np.where(cut, random.beta(config.cutmix or 1, config.cutmix or 1, pairs), 0.0)
        ratio = np.where(cut, ratio, random.beta(config.mixup or 1, config.mixup or 1, pairs))
        ratio = np.where(random.random(pairs) < config.mix_prob, ratio, 1.0)
        self.num_classes = num_classes
        self.cut = torch.from_numpy(cut).repeat_interleave(2)[:batch_size]
        self.ratio = torch.from_numpy(ratio).float().repeat_interleave(2)[:batch_size]
        self.center = torch.from_numpy(random.random((pairs, 2))).float().repeat_interleave(2, dim=0)[:batch_size]

    def __call__(self, images: Tensor, labels: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Mix images (B, C, H, W), B from place ``start`` of the global batch on; targets become (B, num_classes)."""
        if start % 2:
            raise ValueError(f"start {start} would part a pair; cut batches at even places")
        part = slice(start, start + len(images))
        device = images.device
        partner = torch.arange(len(images), device=device) ^ 1
        partner[-1] = min(int(len(images) - 1) ^ 1, len(images) - 1)
        cut, ratio, center = (t[part].to(device) for t in (self.cut, self.ratio, self.center))

        outside = _outside_box(center, ratio, *images.shape[-2:])  # (B, H, W)
        ratio = torch.where(cut, outside.float().mean(dim=(1, 2)), ratio)  # the box was clipped at the border
        weight = torch.where(cut[:, None, None], outside.to(images), ratio.to(images)[:, None, None])[:, None]
        onehot = F.one_hot(labels, self.num_classes).to(images.dtype)
        ratio = ratio.to(images)[:, None]
        return (
            images * weight + images[partner] * (1 - weight),
            onehot * ratio + onehot[partner] * (1 - ratio),
        )


def _outside_box(center: Tensor, ratio: Tensor, h: int, w: int) -> Tensor:
    """True outside of boxes of 1 − ratio of the area around ``center`` (B, 2), clipped at the border: (B, H, W)."""
    half = (1 - ratio).sqrt()[:, None] / 2
    rows = (torch.arange(h, device=ratio.device) + 0.5) / h
    columns = (torch.arange(w, device=ratio.device) + 0.5) / w
    inside_rows = (rows - center[:, :1]).abs() < half  # (B, H)
    inside_columns = (columns - center[:, 1:]).abs() < half  # (B, W)
    return ~(inside_rows[:, :, None] & inside_columns[:, None, :])
