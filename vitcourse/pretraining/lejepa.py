"""LeJEPA (Balestriero and LeCun 2025): views agree, and the embeddings of all images are an isotropic Gaussian."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitcourse.layers import widened
from vitcourse.train.task import Part
from vitcourse.vit.positions import full_precision

from .distributed import mlp, summed
from .objective import Pretrainer, PreTraining, dim_of
from .options import LejepaOptions
from .views import View

KNOTS, T_MAX = 17, 3.0  # where the characteristic functions are compared: 0, 3/16, …, 3


def random_directions(dim: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` unit vectors (dim, count), evenly distributed over the sphere."""
    directions = torch.randn(dim, count, generator=generator)
    return directions / directions.norm(dim=0)


def quadrature(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Knots t (K,) in [0, 3], the Gaussian's characteristic function exp(-t²/2) there, and the weights of the integral.

    Trapezoids, twice, since the integrand over [-3, 3] is even; the window of Epps and Pulley is the function itself.
    """
    t = torch.linspace(0, T_MAX, KNOTS, dtype=like.dtype, device=like.device)
    phi = (-t.square() / 2).exp()
    weights = torch.full_like(t, 2 * T_MAX / (KNOTS - 1))
    weights[0] = weights[-1] = T_MAX / (KNOTS - 1)
    return t, phi, weights * phi


def sigreg(x: Tensor, directions: Tensor, joint: bool = False) -> Tensor:
    """How far embeddings (…, N, D) are from N(0, I), along ``directions`` (D, M): Epps and Pulley's test, a mean.

    T = N ∫ |φ_N(t) - φ(t)|² exp(-t²/2) dt, with φ_N the mean of exp(i t x · a) over the embeddings (section 4). Of a
    Gaussian sample T is :func:`gaussian_level`, whatever N; of embeddings that are all 0 it grows with N.

    Args:
        joint: the N embeddings are those of all processes together.
    """
    t, phi, weights = quadrature(x)
    angles = (x @ directions.to(x))[..., None] * t  # (…, N, M, K)
    sums = torch.stack([angles.cos().sum(-3), angles.sin().sum(-3)])
    count = x.new_tensor(x.shape[-2])
    if joint:
        sums, count = summed(sums), summed(count)
    real, imaginary = sums / count
    return (((real - phi).square() + imaginary.square()) @ weights * count).mean()


def gaussian_level() -> float:
    """What :func:`sigreg` is, on average, of a sample of N(0, I): the integral of (1 - φ²) φ.

    >>> round(gaussian_level(), 3)
    1.052
    """
    _, phi, weights = quadrature(torch.zeros(1, dtype=torch.float64))
    return ((1 - phi.square()) @ weights).item()


def disagreement(x: Tensor, global_views: int) -> Tensor:
    """Mean squared distance of all views' embeddings (V, N, D) from the mean of the first ``global_views``."""
    return (x - x[:global_views].mean(0)).square().mean()


def view_list(options: LejepaOptions, hflip: bool) -> list[View]:
    """Large views of at least ``min_crop`` of the image, then small ones, of a sixth of that to that."""
    shares = {name: getattr(options, name) for name in ("jitter", "grayscale", "solarize")}
    how = {**shares, "hflip": hflip, "blur": options.blur / 2}
    side = (options.local_size,) * 2 if options.local_size else None
    small = View(min_crop=options.min_crop / 6, max_crop=options.min_crop, size=side, **how)
    return [View(min_crop=options.min_crop, **how)] * options.global_views + [small] * options.local_views


class LeJEPA(Pretrainer):
    """An encoder and a projector. There is no teacher, no predictor, and gradients flow through all views.

    Args:
        encoder: any model without a head, images to features (B, D).
        hidden_dim, out_dim: widths of the projector, of three layers with batch norm over all views together.

    >>> from vitcourse import create_model
    >>> encoder = create_model("vit_tiny", img_size=28, patch_size=7, in_chans=1, num_classes=0, depth=1)
    >>> LeJEPA(encoder, hidden_dim=32, out_dim=16)(torch.rand(4, 1, 28, 28), torch.rand(4, 1, 14, 14)).shape
    torch.Size([2, 4, 16])
    """

    def __init__(self, encoder: nn.Module, hidden_dim: int = 2048, out_dim: int = 64) -> None:
        super().__init__(encoder)
        self.out_dim = out_dim
        self.projector = mlp([dim_of(encoder), hidden_dim, hidden_dim, out_dim], last_norm=False)

    def watched(self, images: Tensor) -> dict[str, Tensor]:
        features = self.encoder(images)
        return {"features": features, "embeddings": self.projector(features)}

    def healthy_spread(self, name: str) -> float | None:
        return self.out_dim**0.5 if name == "embeddings" else None  # SIGReg makes each of its dimensions one wide

    def forward(self, *views: Tensor) -> Tensor:
        """Views, each (B, C, H, W) of a size of its own, to embeddings (V, B, out_dim)."""
        features = torch.cat([self.encoder(view) for view in views])
        return self.projector(features).unflatten(0, (len(views), -1))


class GaussianEmbedding(PreTraining):
    """The task of a :class:`LeJEPA`: (1 - λ) · :func:`disagreement` + λ · :func:`sigreg` (section 5, algorithm 2)."""

    name = "lejepa"
    best = None
    augments = ("hflip",)
    couples_batch = True
    gathers_batch = True
    smallest_batch: ClassVar[int] = 2

    def __init__(self, options: LejepaOptions | None = None) -> None:
        super().__init__(options or LejepaOptions())

    def setup(self, model, train_set, config, device) -> None:
        side, patch = self.options.local_size, getattr(model.encoder, "patch_size", (1, 1))
        if any(side % p for p in patch):
            both, told = math.lcm(*patch), patch[0] if len(set(patch)) == 1 else patch
            raise ValueError(
                f"local_size {side} is not divisible by the encoder's patch_size {told}; use "
                f"{side // both * both or both}"
            )
        super().setup(model, train_set, config, device)
        self.views = view_list(self.options, config.hflip)

    def inputs(self, images: Tensor, part: Part) -> tuple[list[Tensor], Tensor]:
        place = {"seed": self.config.seed, "epoch": part.epoch, "index": part.index}
        views = [
            self.laid_out(view(images, self.mean_std, **place, view=number)) for number, view in enumerate(self.views)
        ]
        # On the CPU, so that all devices and processes draw the same.
        generator = self.generator(part, torch.device("cpu"))
        return views, random_directions(self.options.out_dim, self.options.directions, generator).to(images.device)

    def loss(self, model: nn.Module, batch: tuple[list[Tensor], Tensor]) -> tuple[Tensor, int]:
        views, directions = batch
        x = model(*views)
        with full_precision(x.device.type):
            x = widened(x)
            weight = self.options.sigreg
            apart = disagreement(x, self.options.global_views)
            # Where SIGReg is off, nothing is computed that would be multiplied by 0.
            total = (1 - weight) * apart + (weight * sigreg(x, directions, joint=model.training) if weight else 0)
        return total * len(views[0]), len(views[0])

    def chance(self) -> float:
        """The loss of embeddings that are Gaussian and know nothing of the image: other views tell nothing of one.

        A global view is part of the mean that it is compared with, a local one is not.
        """
        large, small, weight = self.options.global_views, self.options.local_views, self.options.sigreg
        apart = (large * (1 - 1 / large) + small * (1 + 1 / large)) / (large + small)
        return (1 - weight) * apart + weight * gaussian_level()


def make(encoder: nn.Module, options: LejepaOptions) -> tuple[LeJEPA, GaussianEmbedding]:
    return LeJEPA(encoder, options.hidden_dim, options.out_dim), GaussianEmbedding(options)
