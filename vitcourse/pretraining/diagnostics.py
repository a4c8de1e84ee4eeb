"""Has the encoder learnt anything, or collapsed? Numbers that need no labels, and a watch that speaks up in time."""

import math
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse.inference import MeanStd, evaluating

from .distributed import rank
from .views import View

PROBED, AT_ONCE = 256, 64  # images
FALLS = 2  # of the spread in a row, before a small one is called a collapse
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
    counts = counts.cpu()
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.xlogy(shares, shares).sum().item()
    return {"code_use": (counts > 0).double().mean().item(), "code_perplexity": round(math.exp(entropy), 6)}


@dataclass
class Probe:
    """Two views of some training images, always the same, on which the encoder is looked at.

    Attributes:
        views: two tensors (N, C, H, W), normalised.
        first, last: the spread of what is watched, before the training and when it was looked at last.
        falls: how often in a row it has become less.
        told: what has been said of each last.
    """

    views: tuple[Tensor, Tensor]
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    falls: dict[str, int] = field(default_factory=dict)
    told: dict[str, str | None] = field(default_factory=dict)

    @torch.no_grad()
    def measure(self, encoder: nn.Module) -> dict[str, float]:
        """Effective rank, alignment and uniformity of the encoder's features."""
        with evaluating(encoder):
            first, second = (torch.cat([encoder(x).flatten(1) for x in view.split(AT_ONCE)]) for view in self.views)
        return {
            "effective_rank": effective_rank(first),
            "alignment": alignment(first, second),
            "uniformity": uniformity(first),
        }

    @torch.no_grad()
    def watch(self, model: nn.Module, step: int) -> dict[str, str | None]:
        """Say on stderr, once, that features or embeddings collapse; returns of what kind, or None.

        Args:
            model: its ``watched(images)`` gives what is watched by name, (N, D) each, and ``healthy_spread(name)``
                how far apart that should be; None: as before the training.
        """
        with evaluating(model):
            parts = [model.watched(x) for x in self.views[0].split(AT_ONCE)]
        seen = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        kinds: dict[str, str | None] = {}
        for name, x in seen.items():
            if not x.isfinite().all():
                continue  # the engine looks for the cause
            now, healthy = spread(x), model.healthy_spread(name) or self.first.setdefault(name, spread(x))
            # What is close together and moves apart is no collapse, but the beginning.
            self.falls[name] = self.falls.get(name, 0) + 1 if now < self.last.get(name, 0.0) else 0
            self.last[name] = now
            falling = self.falls[name] >= FALLS or self.told.get(name) == "complete"
            kinds[name] = collapse_of(x, healthy, falling)
            if kinds[name] and kinds[name] != self.told.get(name) and rank() == 0:
                print(f"vitcourse: step {step}: {_told(name, kinds[name], x, healthy)}", file=sys.stderr)
            self.told[name] = kinds[name]
        return kinds


def spread(x: Tensor) -> float:
    """Root of the mean squared distance of features (N, D) from their mean.

    >>> spread(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    1.0
    """
    return (x.float() - x.float().mean(0)).square().sum(1).mean().sqrt().item()


def collapse_of(x: Tensor, healthy: float, falling: bool = True) -> str | None:
    """``"complete"``: all images have nearly the same features. ``"dimensional"``: they lie along a line.

    Complete means that the :func:`spread` is less than a tenth of a ``healthy`` one, and still ``falling``.
    """
    if falling and spread(x) < healthy / 10:
        return "complete"
    return "dimensional" if x.shape[1] > 2 and effective_rank(x) < 2 else None


def _told(name: str, kind: str, x: Tensor, healthy: float) -> str:
    if kind == "complete":
        return (
            f"the {name} collapse: those of different images are {spread(x) / healthy:.4f} times as far apart as they "
            "should be; a falling loss tells nothing now"
        )
    return (
        f"the {name} collapse to {effective_rank(x):.1f} of {x.shape[1]} dimensions; what images differ in besides is "
        "lost"
    )


def probe_of(dataset: Dataset, mean_std: MeanStd | None, seed: int, device: torch.device) -> Probe:
    """A probe of up to :data:`PROBED` images, evenly distributed over a data set of pairs."""
    from vitcourse.data import Augmented

    index = torch.linspace(0, len(dataset) - 1, min(PROBED, len(dataset))).long()
    pairs = Augmented(dataset, seed=seed).__getitems__(index.tolist())
    images = torch.stack([torch.as_tensor(image) for image, _ in pairs]).to(device)
    first, second = (PROBE_VIEW(images, mean_std, seed=seed, epoch=-1, index=index, view=view) for view in (0, 1))
    return Probe((first, second))
