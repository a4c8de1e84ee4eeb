"""Has the encoder learnt anything, or collapsed? Numbers that need no labels, and a watch that speaks up in time."""

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse.inference import MeanStd, evaluating

from .views import View

PROBED = 256  # images
PROBE_VIEW = View(min_crop=0.5, hflip=True, jitter=0.4)  # the same for all objectives, so that numbers compare


def effective_rank(features: Tensor) -> float:
    """How many directions features (N, D) spread over: the exponential of the entropy of their singular values.

    Roy and Vetterli 2007, eq. 3, of the centred features; 0 where they are all the same but for rounding. At most
    min(N - 1, D).

    >>> round(effective_rank(torch.eye(5).repeat(2, 1)), 3)
    4.0
    >>> effective_rank(torch.ones(5, 3))
    0.0
    """
    features = features.detach().float().cpu()
    if not features.isfinite().all():
        return math.nan
    centred = features - features.mean(0)
    values = torch.linalg.svdvals(centred)
    noise = torch.finfo(torch.float32).eps * max(features.shape) * torch.linalg.matrix_norm(features, 2)
    shares = values[values > noise]
    shares = shares / shares.sum()
    return math.exp(-(shares * shares.log()).sum().item()) if len(shares) else 0.0


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance between the directions of two views' features (N, D): 0 where views do not matter.

    Wang and Isola 2020, eq. 2 with α = 2. Of unrelated directions it is 2.
    """
    return (F.normalize(x.float(), dim=1) - F.normalize(y.float(), dim=1)).square().sum(1).mean().item()


def uniformity(x: Tensor) -> float:
    """How evenly the directions of features (N, D) cover the sphere: the smaller the better, 0 after a collapse.

    Wang and Isola 2020, eq. 3 with t = 2: log of the mean of exp(-2 d²) over all pairs. -4 is the limit in many
    dimensions.
    """
    return F.pdist(F.normalize(x.float(), dim=1).cpu()).square().mul(-2).exp().mean().log().item()


def code_use(counts: Tensor) -> dict[str, float]:
    """Share of the codes that are used, and as how many equally frequent ones they count (perplexity).

    >>> code_use(torch.tensor([2, 2, 0, 0]))
    {'code_use': 0.5, 'code_perplexity': 2.0}
    """
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.xlogy(shares, shares).sum().item()
    return {"code_use": (counts > 0).double().mean().item(), "code_perplexity": round(math.exp(entropy), 6)}


@dataclass
class Probe:
    """Two views of some training images, always the same, on which the encoder is looked at.

    Attributes:
        views: two tensors (N, C, H, W), normalised.
        first: the spread of the features before the training.
    """

    views: tuple[Tensor, Tensor]
    first: float | None = None
    told: str | None = None

    @classmethod
    def of(cls, images: Tensor, index: Tensor, mean_std: MeanStd | None, seed: int) -> "Probe":
        first, second = (
            PROBE_VIEW(images, mean_std, seed=seed, epoch=-1, index=index, view=number) for number in (0, 1)
        )
        return cls((first, second))

    @torch.no_grad()
    def features(self, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        with evaluating(encoder):
            return tuple(encoder(view).flatten(1).float() for view in self.views)

    def measure(self, encoder: nn.Module) -> dict[str, float]:
        """Effective rank, alignment and uniformity."""
        first, second = self.features(encoder)
        return {
            "effective_rank": effective_rank(first),
            "alignment": alignment(first, second),
            "uniformity": uniformity(first),
        }

    def watch(self, encoder: nn.Module, step: int) -> str | None:
        """Say on stderr, once for each kind, that the features collapse; returns the kind, or None."""
        features, _ = self.features(encoder)
        if not features.isfinite().all():
            return None  # the engine looks for the cause
        now = spread(features)
        self.first = now if self.first is None else self.first
        kind = collapse_of(features, self.first)
        if kind is not None and kind != self.told:
            print(f"vitcourse: step {step}: {_told(kind, features, now)}", file=sys.stderr)
        self.told = kind
        return kind


def spread(features: Tensor) -> float:
    """One minus the mean cosine between different images' features (N, D)."""
    directions = F.normalize(features.float(), dim=1)
    n = len(directions)
    return 1 - ((directions.sum(0).square().sum().item() - n) / (n * (n - 1)))


def collapse_of(features: Tensor, first: float) -> str | None:
    """``"complete"``: all images have the same features. ``"dimensional"``: they lie along one or two directions.

    ``first`` is the spread of the untrained encoder, whose features are not far apart either.
    """
    if spread(features) < min(1e-3, first / 10):
        return "complete"
    return "dimensional" if effective_rank(features) < 2 else None


def _told(kind: str, features: Tensor, now: float) -> str:
    if kind == "complete":
        return (
            f"the features collapse: those of different images have a mean cosine of {1 - now:.5f}, and tell nothing "
            "apart; a falling loss means nothing now"
        )
    return (
        f"the features collapse to {effective_rank(features):.1f} of {features.shape[1]} dimensions; what the images "
        "differ in besides is lost"
    )


def probe_of(dataset: Dataset, mean_std: MeanStd | None, seed: int, device: torch.device) -> Probe:
    """A probe of up to :data:`PROBED` images, evenly distributed over a data set of pairs."""
    from vitcourse.data import Augmented

    index = torch.linspace(0, len(dataset) - 1, min(PROBED, len(dataset))).long()
    pairs = Augmented(dataset, seed=seed).__getitems__(index.tolist())
    images = torch.stack([torch.as_tensor(image) for image, _ in pairs]).to(device)
    return Probe.of(images, index, mean_std, seed)
