"""EoMT (Kerssies et al. 2025, "Your ViT is Secretly an Image Segmentation Model"): queries inside of a plain ViT."""

from collections.abc import Sequence
from math import log2
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitcourse.vit import VisionTransformer

from .base import DenseModel
from .boxes import Target
from .masks import MaskSetLoss, full_size, instances, semantic_scores, widen_masks
from .pyramid import LayerNorm2d
from .set_loss import named
from .terms import Terms


class EomtOutput(NamedTuple):
    """What the queries say, before each of the last blocks, where it was asked for, and at the end.

    Attributes:
        logits: (L, B, Q, K + 1), the last class being "no object".
        masks: (L, B, Q, h, w), logits.
        size, extent: (height, width) of the images, and of what the masks cover: more, where the ViT pads.
    """

    logits: Tensor
    masks: Tensor
    size: tuple[int, int]
    extent: tuple[int, int]


class Eomt(DenseModel):
    """An encoder-only mask transformer (section 3.2): a ViT, Q learnt queries among its tokens, and two small heads.

    In training each query sees, in each of the last blocks, only the patches that its mask so far covers; with a
    probability that :meth:`anneal` takes to 0, so that at the end the ViT runs as it is (section 3.3).

    Args:
        backbone: a :class:`vitcourse.VisionTransformer`; its token mixer must honour masks.
        num_classes: K.
        num_queries: Q.
        num_blocks: how many of the last blocks see queries; L₂ in the paper.

    Raises:
        ValueError: a backbone that is no plain ViT; more blocks than it has.

    >>> from vitcourse import create_model
    >>> model = Eomt(create_model("vit_tiny", img_size=64, num_classes=0, depth=3), 5, num_queries=7, num_blocks=2)
    >>> out = model(torch.rand(2, 3, 64, 96))
    >>> out.logits.shape, out.masks.shape
    (torch.Size([3, 2, 7, 6]), torch.Size([3, 2, 7, 16, 24]))
    """

    wants = "masks"
    head_names = ("class_head",)

    def __init__(
        self, backbone: VisionTransformer, num_classes: int = 133, num_queries: int = 200, num_blocks: int = 4
    ):
        super().__init__(backbone, num_classes)
        if not isinstance(backbone, VisionTransformer):
            raise ValueError(
                f"backbone is a {type(backbone).__name__}, and queries join a plain ViT; use vit_tiny, say"
            )
        if not 1 <= num_blocks <= len(backbone.blocks):
            raise ValueError(f"num_blocks {num_blocks} must be from 1 to the backbone's depth, {len(backbone.blocks)}")
        dim, self.num_queries, self.num_blocks = backbone.embed_dim, num_queries, num_blocks
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.class_head = nn.Linear(dim, num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        steps = max(1, int(log2(max(backbone.patch_size))) - 2)  # to a stride of 4 pixels
        self.upscale = nn.Sequential(*(Upscale(dim) for _ in range(steps)))
        self.register_buffer("mask_probs", torch.ones(num_blocks))
        self.phases = ("all",) * num_blocks  # the same, as a graph can be made for it
        self.register_load_state_dict_post_hook(_read_phases)
        self.criterion = MaskSetLoss()

    def forward(self, x: Tensor, targets: Sequence[Target] | None = None) -> EomtOutput:
        """Images (B, C, H, W) to predictions; targets are not looked at."""
        vit, size, found = self.backbone, tuple(x.shape[-2:]), []
        phases, first = self._phases(), len(vit.blocks) - self.num_blocks
        x, (h, w, prefix) = vit.embed(x)
        for i, block in enumerate(vit.blocks):
            if i == first:
                x = torch.cat([self.queries.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
                prefix += self.num_queries
            mask, phase = [], phases[i - first] if i >= first else "none"
            if i >= first and (self.training or phase != "none"):
                found.append(self.predict(x, (h, w)))
            if phase != "none":
                prob = self.mask_probs[i - first] if phase == "some" else None
                mask = [self.attend(found[-1][1], x.shape[1], (h, w), prob)]
            x = vit._run(block, x, (h, w, prefix), *mask)
        logits, masks = (torch.stack(part) for part in zip(*found, self.predict(x, (h, w)), strict=True))
        return EomtOutput(logits, masks, size, (h * vit.patch_size[0], w * vit.patch_size[1]))

    def predict(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """All tokens (B, N, D) to classes (B, Q, K + 1) and masks (B, Q, h', w') of the queries among them."""
        x = self.backbone.fc_norm(self.backbone.norm(x))
        queries, patches = x[:, : self.num_queries], x[:, -grid[0] * grid[1] :]
        pixels = self.upscale(rearrange(patches, "b (h w) d -> b d h w", h=grid[0]))
        return self.class_head(queries), torch.einsum("bqd,bdhw->bqhw", self.mask_head(queries), pixels)

    @torch.no_grad()
    def attend(self, masks: Tensor, length: int, grid: tuple[int, int], prob: Tensor | None = None) -> Tensor:
        """Who may attend to whom, (B, 1, N, N): queries to their mask's patches; with probability 1 − prob, to all."""
        covered = F.interpolate(masks, grid, mode="bilinear").flatten(2) > 0
        if prob is not None:
            covered |= torch.rand(*covered.shape[:2], 1, device=masks.device) > prob
        rest = length - covered.shape[2]  # queries, [CLS] and registers see and are seen
        return F.pad(covered, (rest, 0, 0, length - covered.shape[1]), value=True)[:, None]

    def anneal(self, step: int, total: int) -> None:
        """Set the masks' probabilities for a step: 1, then falling to 0 as (1 − t)^0.9, the first blocks first.

        As in the authors' settings: each fall takes a sixth of the training; the first begins after one sixth, the last
        after four, the others evenly between them. So it is in ``configs/`` of their code, github.com/tue-mps/eomt, for
        3, 4 and 5 blocks (``eomt_small_640``, ``eomt_large_640``, ``eomt_giant_640``); the power is in
        ``LightningModule.mask_annealing`` there.
        """
        t = 6 * step / max(total, 1) - torch.linspace(1, 4, self.num_blocks)
        self.set_probs(((1 - t.clamp(0, 1)) ** 0.9).tolist())

    def set_probs(self, probs: Sequence[float]) -> None:
        """The masks' probabilities, one for each of the last blocks."""
        self.mask_probs.copy_(torch.tensor(probs))
        self.phases = _phases_of(probs)

    def _phases(self) -> Sequence[str]:
        """A copy of the model may have got other buffers; only a compiler must take our word."""
        return self.phases if torch.compiler.is_compiling() else _phases_of(self.mask_probs.tolist())

    def no_weight_decay(self) -> set[str]:
        return {*super().no_weight_decay(), "queries"}

    def reset_classifier(self, num_classes: int) -> None:
        """Other classes: a new, randomly initialised head."""
        self.num_classes = num_classes
        self.class_head = nn.Linear(self.backbone.embed_dim, num_classes + 1).to(self.queries)

    def losses(self, output: EomtOutput, targets: Sequence[Target]) -> Terms:
        """The terms of the loss, of the end and of each block before (``_aux0`` …); targets have ``masks``."""
        targets = widen_masks(targets, output.extent)
        *earlier, last = zip(output.logits, output.masks, strict=True)
        terms = dict(self.criterion(*last, targets))
        for i, layer in enumerate(earlier):
            terms |= named(self.criterion(*layer, targets), f"_aux{i}")
        return terms

    def masks(self, output: EomtOutput) -> Tensor:
        """The last masks' logits (B, Q, H, W), at the size of the images."""
        return full_size(output.masks[-1], output.extent, output.size)

    def results(self, output: EomtOutput, threshold: float = 0.0) -> list[dict[str, Tensor]]:
        """Objects of each image; see :func:`.masks.instances`."""
        return instances(output.logits[-1], self.masks(output), threshold)

    def segment(self, output: EomtOutput) -> Tensor:
        """How much each pixel is of each class, (B, K, H, W); see :func:`.masks.semantic_scores`."""
        return semantic_scores(output.logits[-1], self.masks(output))


def _phases_of(probs: Sequence[float]) -> tuple[str, ...]:
    return tuple("none" if p <= 0 else "some" if p < 1 else "all" for p in probs)


def _read_phases(model: Eomt, keys: object) -> None:
    if not model.mask_probs.is_meta:
        model.phases = _phases_of(model.mask_probs.tolist())


class Upscale(nn.Sequential):
    """Twice the rows and columns (section 3.1): (B, D, h, w) -> (B, D, 2h, 2w)."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
            LayerNorm2d(dim),
        )
