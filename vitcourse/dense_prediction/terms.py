"""A loss of several terms, each as a sum and what it is divided by, so that a task of the engine can add them up."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Term(NamedTuple):
    """One term of a loss.

    Attributes:
        total: the sum (), not yet weighted.
        count: what it is divided by, over the whole batch: boxes, masks, pixels.
        weight: of the term in the loss.
    """

    total: Tensor
    count: Tensor
    weight: float = 1.0

    @property
    def mean(self) -> Tensor:
        """What a record shows: the sum over the count, or the sum itself where nothing is counted."""
        return self.total / self.count.clamp(min=1)


Terms = Mapping[str, Term]


def mean_loss(terms: Terms) -> Tensor:
    """The loss () of one batch on its own: each term over its own count, weighted.

    >>> mean_loss({"a": Term(torch.tensor(6.0), torch.tensor(3.0)), "b": Term(torch.tensor(1.0), torch.tensor(2.0), 4)})
    tensor(4.)
    """
    return sum(term.weight * term.mean for term in terms.values())


def sum_and_count(terms: Terms) -> tuple[Tensor, Tensor]:
    """The loss as a task of the engine wants it: a sum over all terms, and the one count that all of them have.

    Sums and counts of micro-batches, or of several processes, then add up to those of the whole batch.

    Raises:
        ValueError: terms with different counts, whose means over parts do not add up to the mean over all.

    >>> three = torch.tensor(3.0)
    >>> sum_and_count({"a": Term(torch.tensor(6.0), three), "b": Term(torch.tensor(1.0), three, weight=4)})
    (tensor(10.), tensor(3.))
    """
    (first, *others) = terms.items()
    for name, term in others:
        if term.count is not first[1].count and not torch.equal(term.count, first[1].count):
            raise ValueError(
                f"terms {first[0]!r} and {name!r} are divided by different counts, {first[1].count.item():g} and "
                f"{term.count.item():g}, and have no sum that micro-batches and processes could share; use a loss with "
                "class_count='objects'"
            )
    return sum(term.weight * term.total for term in terms.values()), first[1].count


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5), one for each logit.

    >>> round(focal_loss(torch.zeros(1), torch.ones(1)).item(), 4)  # 0.25 · (1 - 0.5)² · ln 2
    0.0433
    """
    error = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    wrong = p + targets - 2 * p * targets  # 1 - p_t
    return error * wrong**gamma * (alpha * targets + (1 - alpha) * (1 - targets))
