"""Views of images, made in batches on the device that trains: a pure function of (seed, epoch, index, view)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcourse.inference import MeanStd
from vitcourse.train.augment import uniform

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision has it
BLUR = (0.1, 2.0)  # standard deviations in pixels, of pictures of 224 pixels


@dataclass(frozen=True)
class View:
    """How one view is drawn; by default it is the image.

    Attributes:
        min_crop, max_crop: the share of the image's area that a crop keeps.
        hflip: whether half of the views are mirrored.
        jitter: strength of brightness and contrast, for four of five; saturation has half of it, and hue a fourth.
        grayscale, blur, solarize: shares of the views that get these.
        size: (height, width) in pixels; None for the image's.
    """

    min_crop: float = 1.0
    max_crop: float = 1.0
    hflip: bool = False
    jitter: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0
    size: tuple[int, int] | None = None

    def __call__(
        self, images: Tensor, mean_std: MeanStd | None, *, seed: int, epoch: int, index: Tensor, view: int
    ) -> Tensor:
        """This view of images (B, C, H, W), normalised.

        Floating-point images are normalised already: they are cropped, mirrored and blurred, and keep their colours.

        Args:
            seed, epoch, index (B,), view: what all that is drawn depends on, ``view`` being the view's number.

        >>> crop, images = View(min_crop=0.2), torch.rand(2, 1, 8, 8)
        >>> first = crop(images, None, seed=0, epoch=3, index=torch.tensor([5, 7]), view=0)
        >>> alone = crop(images[1:], None, seed=0, epoch=3, index=torch.tensor([7]), view=0)
        >>> torch.equal(first[1:], alone), torch.equal(first, images)
        (True, False)
        """
        draws = uniform(16, seed, epoch, index, view)  # (B, 16), on the CPU: nobody waits for the device
        is_raw = not images.is_floating_point()
        x = images.float() / 255 if is_raw else images
        if self.min_crop < 1 or self.hflip or self.size:
            boxes = crop_boxes(draws[:, :4], self.min_crop, self.max_crop)
            mirrored = draws[:, 4] < 0.5 if self.hflip else torch.zeros(len(draws), dtype=torch.bool)
            x = resized_crop(x, boxes, mirrored, self.size or tuple(x.shape[-2:]))
        if is_raw and self.jitter:
            x = _where(draws[:, 5] < 0.8, x, lambda part, rows: colour_jitter(part, draws[rows, 6:10], self.jitter))
        if is_raw and self.grayscale and x.shape[1] == 3:
            x = _where(draws[:, 10] < self.grayscale, x, lambda part, _: grey(part).expand_as(part))
        if self.blur:
            sigma = (BLUR[0] + (BLUR[1] - BLUR[0]) * draws[:, 11]) * min(x.shape[-2:]) / 224
            x = _where(draws[:, 12] < self.blur, x, lambda part, rows: gaussian_blur(part, sigma[rows]))
        if is_raw and self.solarize:
            x = _where(draws[:, 13] < self.solarize, x, lambda part, _: torch.where(part >= 0.5, 1 - part, part))
        if is_raw and mean_std is not None:
            x = (x - mean_std[0]) / mean_std[1]
        return x


def _where(chosen: Tensor, x: Tensor, change) -> Tensor:
    """``change(x[rows], rows)`` in the rows where ``chosen`` (B,), on the CPU, is True."""
    rows = chosen.nonzero()[:, 0]
    if not len(rows):
        return x
    there = rows.to(x.device)
    return x.index_copy(0, there, change(x[there], rows).to(x.dtype))


def crop_boxes(draws: Tensor, smallest: float, largest: float = 1.0) -> Tensor:
    """Boxes (B, 4) of random crops, (top, left, height, width) in shares of the image, from ``draws`` (B, 4).

    The area is uniform between the two bounds, the logarithm of the shape between 3:4 and 4:3 (Szegedy et al. 2015,
    section 6); what is longer than the image is cut to it.

    >>> crop_boxes(torch.tensor([[0.5, 0.5, 0.0, 1.0]]), 0.0, 0.5).tolist()
    [[0.0, 0.5, 0.5, 0.5]]
    """
    area = smallest + (largest - smallest) * draws[:, 0]
    ratio = torch.exp((2 * draws[:, 1] - 1) * math.log(4 / 3))
    height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    return torch.stack([draws[:, 2] * (1 - height), draws[:, 3] * (1 - width), height, width], dim=1)


def resized_crop(x: Tensor, boxes: Tensor, mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut ``boxes`` (B, 4) out of images (B, C, H, W), mirror some, and resize them, bilinearly, to ``size``."""
    top, left, height, width = boxes.unbind(1)
    sign, zero = 1 - 2 * mirrored.float(), torch.zeros_like(top)
    across = torch.stack([sign * width, zero, 2 * left + width - 1], dim=1)
    down = torch.stack([zero, height, 2 * top + height - 1], dim=1)
    theta = torch.stack([across, down], dim=1).to(x)  # (B, 2, 3), from places in the view to places in the image
    places = F.affine_grid(theta, [len(x), x.shape[1], *size], align_corners=False)
    return F.grid_sample(x, places, mode="bilinear", padding_mode="border", align_corners=False)


def grey(x: Tensor) -> Tensor:
    """Brightness (B, 1, H, W) of images with one or three channels."""
    return x if x.shape[1] == 1 else (x * x.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)


def colour_jitter(x: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Brightness, contrast, saturation and hue of images (B, C, H, W) in 0..1, by ``draws`` (B, 4), in this order.

    Factors as torchvision's ``ColorJitter(strength, strength, strength / 2, strength / 4)``, which shuffles the order.
    """
    bright, contrast, saturate, hue = ((2 * draws - 1).to(x).t()[:, :, None, None, None]).unbind(0)
    x = (x * (1 + strength * bright)).clamp(0, 1)
    middle = grey(x).mean(dim=(1, 2, 3), keepdim=True)
    x = (middle + (x - middle) * (1 + strength * contrast)).clamp(0, 1)
    if x.shape[1] == 1:
        return x
    x = (grey(x) + (x - grey(x)) * (1 + strength / 2 * saturate)).clamp(0, 1)
    return shift_hue(x, strength / 4 * hue[:, 0])


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of images (B, 3, H, W) by ``shift`` (B, 1, 1) of the whole circle."""
    value, low = x.amax(1), x.amin(1)
    spread = (value - low).clamp(min=1e-12)
    r, g, b = x.unbind(1)
    hue = torch.where(value == r, (g - b) / spread, torch.where(value == g, 2 + (b - r) / spread, 4 + (r - g) / spread))
    turns = torch.stack([n + hue + 6 * shift for n in (5, 3, 1)], dim=1) % 6
    chroma = (value - low)[:, None]
    return value[:, None] - chroma * torch.minimum(turns, 4 - turns).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur images (B, C, H, W) by ``sigma`` (B,) pixels each: rows, then columns."""
    radius = min(math.ceil(3 * BLUR[1] * min(x.shape[-2:]) / 224), min(x.shape[-2:]) - 1)
    if radius < 1:
        return x
    steps = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (steps / sigma[:, None].clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(x).repeat_interleave(x.shape[1], dim=0)  # (B C, 2 r + 1)
    flat = F.pad(x.flatten(0, 1)[None], [radius] * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel)).view_as(x)
