"""The set loss of DETR (Carion et al. 2020, section 3.1): match, then compare. The class part is EoMT's, too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from vitcourse.layers import widened

from .boxes import Target, giou
from .matching import Match, hungarian
from .terms import Term, Terms

ClassCount = Literal["weights", "objects"]


def count_objects(targets: Sequence[Target], device: torch.device) -> Tensor:
    """Objects in the whole batch, ()."""
    return torch.tensor(float(sum(len(target["labels"]) for target in targets)), device=device)


def class_term(
    logits: Tensor,
    match: Match,
    targets: Sequence[Target],
    no_object: float,
    weight: float,
    class_count: ClassCount,
) -> Term:
    """Cross-entropy of all predictions (B, Q, K + 1), those without an object towards the last class, "no object".

    Args:
        no_object: weight of these, which are in the majority (section 3.1: 0.1).
        weight: of the term.
        class_count: what the sum is divided by: ``"weights"`` of all predictions, as the authors' code does, or the
            number of ``"objects"``, as for the other terms, so that parts of a batch add up.
    """
    labels = torch.cat([target["labels"] for target in targets])
    wanted = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)
    wanted[match.image, match.query] = labels[match.object]
    weights = logits.new_ones(logits.shape[2])
    weights[-1] = no_object
    total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weights, reduction="sum")
    count = weights[wanted].sum() if class_count == "weights" else count_objects(targets, logits.device)
    return Term(total, count, weight)


@dataclass(frozen=True)
class BoxSetLoss:
    """Class, L1 and GIoU of the matched boxes. Boxes are centre, width and height, as parts of the image.

    The weights are also those of the matching, where the class counts by its probability (section 3.1).

    Attributes:
        class_weight, l1, giou: weights of the terms.
        no_object, class_count: see :func:`class_term`.
    """

    class_weight: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1
    class_count: ClassCount = "objects"

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Match:
        """Logits (B, Q, K + 1) and boxes (B, Q, 4) to the pairs; each target's ``boxes`` (n, 4) are parts, too."""
        counts = [len(target["labels"]) for target in targets]
        image = torch.arange(len(counts), device=boxes.device).repeat_interleave(torch.tensor(counts).to(boxes.device))
        labels = torch.cat([target["labels"] for target in targets])
        found = widened(boxes)[image]  # (n, Q, 4): for each object all predictions of its image
        wanted = torch.cat([target["boxes"] for target in targets]).to(found)[:, None]
        corners = (box_convert(x, "cxcywh", "xyxy") for x in (found, wanted))
        cost = self.l1 * (found - wanted).abs().sum(-1) - self.giou * giou(*corners)
        cost = cost - self.class_weight * widened(logits).softmax(-1)[image, :, labels]
        return hungarian([part.T for part in cost.split(counts)])

    def __call__(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target], match: Match | None = None) -> Terms:
        """Terms ``class``, ``l1`` and ``giou`` of one layer's predictions."""
        match = self.match(logits, boxes, targets) if match is None else match
        found = widened(boxes[match.image, match.query])
        wanted = torch.cat([target["boxes"] for target in targets]).to(found)[match.object]
        count = count_objects(targets, logits.device)
        return {
            "class": class_term(widened(logits), match, targets, self.no_object, self.class_weight, self.class_count),
            **self.box_terms(found, wanted, count),
        }

    def box_terms(self, found: Tensor, wanted: Tensor, count: Tensor) -> Terms:
        """Terms ``l1`` and ``giou`` of boxes (n, 4) against those that they ought to be."""
        overlap = giou(box_convert(found, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
        return {
            "l1": Term((found - wanted).abs().sum(), count, self.l1),
            "giou": Term((1 - overlap).sum(), count, self.giou),
        }


def named(terms: Terms, suffix: str) -> Terms:
    """The same terms, a suffix to their names."""
    return {f"{name}{suffix}": term for name, term in terms.items()}
