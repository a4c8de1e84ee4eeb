"""Hungarian matching (Carion et al. 2020, section 3.1): which prediction answers for which object."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Match(NamedTuple):
    """Pairs of a prediction and an object, over all images of a batch.

    Attributes:
        image: (M,), the image of each pair.
        query: (M,), its prediction.
        object: (M,), its object, counted through all targets of the batch one after the other.
    """

    image: Tensor
    query: Tensor
    object: Tensor


def needs(package: str, what: str) -> Any:
    """A package that the library runs without.

    Raises:
        ImportError: it is not there, and how to get it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}: pip install 'vitcourse[dense]'") from error


@torch.no_grad()
def hungarian(costs: Sequence[Tensor]) -> Match:
    """The pairs with the least sum of costs, for each image on its own.

    What is no number is never taken while there is another choice; where there are more objects than predictions, the
    dearest objects have none.

    Args:
        costs: for each image (Q, n), of each prediction for each object.

    Raises:
        ImportError: scipy is needed.

    >>> match = hungarian([torch.tensor([[1.0, 2.0], [0.0, 5.0], [9.0, 9.0]]), torch.zeros(3, 0)])
    >>> match.query.tolist(), match.object.tolist()
    ([0, 1], [1, 0])
    """
    solve = needs("scipy.optimize", "Hungarian matching").linear_sum_assignment
    flat = torch.cat([cost.flatten() for cost in costs])
    parts = flat.cpu().split([cost.numel() for cost in costs])  # waits once
    images, queries, objects, before = [], [], [], 0
    for i, (part, cost) in enumerate(zip(parts, costs, strict=True)):
        rows, columns = map(torch.as_tensor, solve(_with_numbers(part.view(cost.shape)).numpy()))
        images.append(torch.full_like(rows, i))
        queries.append(rows)
        objects.append(columns + before)
        before += cost.shape[1]
    return Match(*(torch.cat(part).to(flat.device) for part in (images, queries, objects)))


def _with_numbers(cost: Tensor) -> Tensor:
    """What is no number made dearer than all pairs of numbers together, but no more: sums must not forget the rest."""
    known = cost.isfinite()
    if known.all():
        return cost
    cost = cost.double()
    most = cost[known].abs().max() if known.any() else cost.new_zeros(())
    return cost.where(known, 1 + 2 * min(cost.shape) * most)
