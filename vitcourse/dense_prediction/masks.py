"""Masks as a set (Cheng et al. 2022, Mask2Former, sections 3.1 and 3.3): how queries' masks are matched, compared with
those of objects, at all pixels or at sampled points, and read out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcourse.layers import crop, pad_to, widened

from .boxes import Target
from .matching import Match, hungarian
from .set_loss import ClassCount, class_term, count_objects
from .terms import Term, Terms


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (n, H, W) at points (n, P, 2), column and row as parts of the map: (n, P).

    >>> sample(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.5, 0.5], [0.25, 0.5]]])).tolist()
    [[0.5, 0.0]]
    """
    if not len(maps):
        return maps.new_zeros(0, points.shape[1]) + maps.sum()
    return F.grid_sample(maps[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


def uncertain_points(logits: Tensor, count: int, oversample: float = 3.0, importance: float = 0.75) -> Tensor:
    """Points where masks (n, h, w) are undecided, and others: (n, count, 2) (Kirillov et al. 2020, PointRend, 3.1).

    Args:
        logits: the predicted masks.
        count: points of each mask.
        oversample: how many times as many are drawn, of which the most undecided are taken.
        importance: share of the points that are taken so; the others are just random.
    """
    drawn = torch.rand(len(logits), int(count * oversample), 2, device=logits.device)
    chosen = int(importance * count)
    nearest = sample(logits, drawn).abs().neg().topk(chosen, dim=1).indices
    points = drawn.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([points, torch.rand(len(logits), count - chosen, 2, device=logits.device)], dim=1)


def dice_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """1 − Dice coefficient of masks (n, P) (Milletari et al. 2016), 1 added above and below: (n,)."""
    p = logits.sigmoid()
    return 1 - (2 * (p * wanted).sum(-1) + 1) / (p.sum(-1) + wanted.sum(-1) + 1)


def pairwise_costs(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and Dice loss of each mask (Q, P) with each other (n, P): (Q, n) twice."""
    p = logits.sigmoid()
    error = (F.softplus(logits).sum(-1)[:, None] - logits @ wanted.T) / logits.shape[1]
    dice = 1 - (2 * p @ wanted.T + 1) / (p.sum(-1)[:, None] + wanted.sum(-1) + 1)
    return error, dice


@dataclass(frozen=True)
class MaskSetLoss:
    """Class, binary cross-entropy and Dice of the matched masks (Mask2Former, section 3.3; EoMT, section 3.1).

    Attributes:
        class_weight, mask, dice: weights of the terms, and of the costs.
        no_object, class_count: see :func:`.set_loss.class_term`.
        points: how many points a mask is compared at; None: all pixels of the targets, whose masks are matched at the
            resolution of the predicted ones.
        oversample, importance: see :func:`uncertain_points`.
    """

    class_weight: float = 2.0
    mask: float = 5.0
    dice: float = 5.0
    no_object: float = 0.1
    class_count: ClassCount = "objects"
    points: int | None = None
    oversample: float = 3.0
    importance: float = 0.75

    @torch.no_grad()
    def match(self, logits: Tensor, masks: Tensor, targets: Sequence[Target]) -> Match:
        """Logits (B, Q, K + 1) and masks' logits (B, Q, h, w) to the pairs."""
        costs = []
        for p, found, target in zip(widened(logits).softmax(-1), widened(masks), targets, strict=True):
            error, dice = pairwise_costs(*self._comparable(found, target["masks"].to(found)))
            costs.append(self.mask * error + self.dice * dice - self.class_weight * p[:, target["labels"]])
        return hungarian(costs)

    def _comparable(self, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        if self.points is None:
            return found.flatten(1), F.interpolate(wanted[None], found.shape[-2:], mode="area")[0].flatten(1)
        points = torch.rand(1, self.points, 2, device=found.device)
        return sample(found, points.expand(len(found), -1, -1)), sample(wanted, points.expand(len(wanted), -1, -1))

    def __call__(self, logits: Tensor, masks: Tensor, targets: Sequence[Target], match: Match | None = None) -> Terms:
        """Terms ``class``, ``mask`` and ``dice`` of one layer's predictions; targets have ``masks`` (n, H, W)."""
        match = self.match(logits, masks, targets) if match is None else match
        found = widened(masks[match.image, match.query])
        wanted = torch.cat([target["masks"] for target in targets]).to(found)[match.object]
        if self.points is None:
            found = F.interpolate(found[:, None], wanted.shape[-2:], mode="bilinear").flatten(1)
            wanted = wanted.flatten(1)
        else:
            with torch.no_grad():
                points = uncertain_points(found, self.points, self.oversample, self.importance)
                wanted = sample(wanted, points)
            found = sample(found, points)
        error = F.binary_cross_entropy_with_logits(found, wanted, reduction="none").mean(1).sum()
        count = count_objects(targets, logits.device)
        return {
            "class": class_term(widened(logits), match, targets, self.no_object, self.class_weight, self.class_count),
            "mask": Term(error, count, self.mask),
            "dice": Term(dice_loss(found, wanted).sum(), count, self.dice),
        }


def widen_masks(targets: Sequence[Target], extent: tuple[int, int]) -> list[Target]:
    """Targets whose masks are filled up on the right and below, as a backbone with ``pad`` fills images."""
    return [{**target, "masks": pad_to(target["masks"], extent, axes=(1, 2))} for target in targets]


def full_size(masks: Tensor, extent: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Maps (B, Q, h, w) of a padded image of ``extent`` pixels, bilinearly to its pixels, without the padding."""
    return crop(F.interpolate(masks, extent, mode="bilinear"), size, axes=(2, 3))


def semantic_scores(logits: Tensor, masks: Tensor) -> Tensor:
    """How much each pixel is of each class (B, K, H, W): Σ over queries of class times mask probability.

    Args:
        logits: (B, Q, K + 1).
        masks: logits (B, Q, H, W).
    """
    return torch.einsum("bqk,bqhw->bkhw", widened(logits).softmax(-1)[..., :-1], widened(masks).sigmoid())


def instances(logits: Tensor, masks: Tensor, threshold: float = 0.0) -> list[dict[str, Tensor]]:
    """Objects of each image, the surest first: ``masks`` (n, H, W), ``scores`` (n,) and ``labels`` (n,).

    A score is the probability of the likeliest class times the mean probability inside of the mask.

    Args:
        logits: (B, Q, K + 1).
        masks: logits (B, Q, H, W).
        threshold: scores must be above.
    """
    scores, labels = widened(logits).softmax(-1)[..., :-1].max(-1)
    found = []
    for s, label, m in zip(scores, labels, widened(masks), strict=True):
        inside = m > 0
        s = s * (m.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        order = s.argsort(descending=True, stable=True)
        order = order[s[order] > threshold]
        found.append({"masks": inside[order], "scores": s[order], "labels": label[order]})
    return found
