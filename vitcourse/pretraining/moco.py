"""MoCo v3 (Chen, Xie and He 2021): two views of an image find each other among those of all other images."""

import copy
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcourse.train.task import Part
from vitcourse.vit.positions import full_precision

from .distributed import gathered, mlp, normalised, place_in_gathered
from .objective import Pretrainer, PreTraining, dim_of
from .options import MocoOptions, ViewOptions
from .views import View


def info_nce(queries: Tensor, keys: Tensor, temperature: float, first: int = 0) -> Tensor:
    """The contrastive loss (B,) of queries (B, D) whose keys are among (N, D), row ``first`` on: algorithm 1's ``ctr``.

    Cross-entropy of the cosines over the temperature, times 2τ, as the paper has it: its chance level is 2τ log N.

    >>> x = torch.eye(3)
    >>> round(info_nce(x, x, temperature=1.0)[0].item(), 4)  # 2 · log(1 + 2 / e)
    1.1029
    """
    with full_precision(queries.device.type):
        logits = normalised(queries) @ normalised(keys).t() / temperature
        own = torch.arange(first, first + len(queries), device=logits.device)
        return F.cross_entropy(logits, own, reduction="none") * (2 * temperature)


def momentum_at(step: int, total: int, start: float) -> float:
    """The momentum of the key encoder at ``step`` of ``total``: from ``start`` to 1, half a cosine (section 3).

    >>> [round(momentum_at(step, 10, 0.99), 4) for step in (0, 5, 10)]
    [0.99, 0.995, 1.0]
    """
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / total))


def view_pair(options: ViewOptions, hflip: bool) -> tuple[View, View]:
    """The two views of MoCo v3's recipe: all of the first are blurred, some of the second solarized."""
    how = {"min_crop": options.min_crop, "hflip": hflip, "jitter": options.jitter}
    first = View(**how, grayscale=options.grayscale, blur=options.blur)
    second = View(**how, grayscale=options.grayscale, blur=options.blur / 10, solarize=options.solarize)
    return first, second


class MoCo(Pretrainer):
    """What makes queries: an encoder, a projector of three layers, a predictor of two.

    Args:
        encoder: any model without a head, images to features (B, D).
        hidden_dim, out_dim: widths of projector and predictor.
        predictor: whether there is one.
        freeze_patches: keep the random patch projection of a ViT as it is (section 4.2): its gradient is where the
            instability begins. ``encoder.patch_embed.requires_grad_(True)`` thaws it for what comes after.

    Raises:
        ValueError: ``freeze_patches`` and an encoder without a patch projection.

    >>> from vitcourse import create_model
    >>> encoder = create_model("vit_tiny", img_size=28, patch_size=7, in_chans=1, num_classes=0, depth=1)
    >>> queries = MoCo(encoder, hidden_dim=32, out_dim=16)(torch.rand(4, 1, 28, 28), torch.rand(4, 1, 28, 28))
    >>> [tuple(q.shape) for q in queries]
    [(4, 16), (4, 16)]
    """

    def __init__(
        self,
        encoder: nn.Module,
        hidden_dim: int = 4096,
        out_dim: int = 256,
        predictor: bool = True,
        freeze_patches: bool = True,
    ) -> None:
        super().__init__(encoder)
        self.out_dim = out_dim
        self.projector = mlp([dim_of(encoder), hidden_dim, hidden_dim, out_dim], last_norm=True)
        self.predictor = mlp([out_dim, hidden_dim, out_dim], last_norm=True) if predictor else nn.Identity()
        if freeze_patches:
            if not hasattr(encoder, "patch_embed"):
                raise ValueError(
                    f"freeze_patches is for models with a patch projection, and encoder is a {type(encoder).__name__}; "
                    "use freeze_patches=False"
                )
            encoder.patch_embed.requires_grad_(False)

    def watched(self, images: Tensor) -> dict[str, Tensor]:
        features = self.encoder(images)
        return {"features": features, "embeddings": self.projector(features)}

    def healthy_spread(self, name: str) -> float | None:
        return self.out_dim**0.5 if name == "embeddings" else None  # batch norm makes each of its dimensions one wide

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [self.predictor(self.projector(self.encoder(view))) for view in views]


class MomentumContrast(PreTraining):
    """The task of a :class:`MoCo`: the symmetric loss ctr(q1, k2) + ctr(q2, k1), and the momentum encoder of the keys.

    The keys of all processes are gathered; gradients need not be, since keys have none.
    """

    name = "moco"
    best = None  # a lower contrastive loss is no better encoder
    augments = ("hflip",)
    couples_batch = True
    gathers_batch = True
    smallest_batch: ClassVar[int] = 2

    def __init__(self, options: MocoOptions | None = None) -> None:
        super().__init__(options or MocoOptions())

    def setup(self, model, train_set, config, device) -> None:
        super().setup(model, train_set, config, device)
        self.views = view_pair(self.options, config.hflip)
        self.keys = copy.deepcopy(nn.Sequential(model.encoder, model.projector)).requires_grad_(False).train()

    def own_modules(self) -> nn.Module:
        return self.keys

    def inputs(self, images: Tensor, part: Part) -> list[Tensor]:
        place = {"seed": self.config.seed, "epoch": part.epoch, "index": part.index}
        return [
            self.laid_out(view(images, self.mean_std, **place, view=number)) for number, view in enumerate(self.views)
        ]

    def loss(self, model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        tau = self.options.temperature
        queries = model(*batch)
        with torch.no_grad():
            keys = [self.keys(view) for view in batch]
        first = 0
        if model.training:  # an evaluation is each process's own
            keys, first = [gathered(k) for k in keys], place_in_gathered(keys[0])
        total = info_nce(queries[0], keys[1], tau, first) + info_nce(queries[1], keys[0], tau, first)
        return total.sum(), len(batch[0])

    def after_step(self, model: nn.Module, step: int, total: int) -> None:
        start = self.options.key_momentum
        momentum = momentum_at(step + 1, total, start) if start else 0.0  # 0: no momentum encoder, in all steps
        self.move_keys(model, momentum)
        super().after_step(model, step, total)

    def move_keys(self, model: MoCo, momentum: float) -> None:
        """A step of the key encoder towards the query encoder."""
        weights = [*model.encoder.parameters(), *model.projector.parameters()]
        torch._foreach_lerp_(list(self.keys.parameters()), weights, 1 - momentum)

    def chance(self) -> float:
        return 4 * self.options.temperature * math.log(self.config.batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "keys": self.keys.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.keys.load_state_dict(state["keys"])


def make(encoder: nn.Module, options: MocoOptions) -> tuple[MoCo, MomentumContrast]:
    model = MoCo(encoder, options.hidden_dim, options.out_dim, options.predictor, options.freeze_patches)
    return model, MomentumContrast(options)
