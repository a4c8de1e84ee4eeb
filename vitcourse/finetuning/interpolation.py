"""Between two models, and among several: WiSE-FT (Wortsman et al. 2022), ensembles, and where they agree."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


def interpolate(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    """(1 - α) start + α end, tensor by tensor (Wortsman et al. 2022, eq. 1); 0 and 1 give the ends to the last bit.

    Args:
        start, end: state dicts with the same names and shapes. Integers, such as a batch norm's count, are those of
            the nearer end.
        alpha: 0 for the start, 1 for the end; beyond them the line goes on.

    Raises:
        ValueError: names or shapes that differ.

    >>> interpolate({"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([1.0, 4.0])}, 0.25)
    {'w': tensor([0.2500, 2.5000])}
    """
    differing = sorted(start.keys() ^ end.keys())
    differing += [name for name in start.keys() & end.keys() if start[name].shape != end[name].shape]
    if differing:
        raise ValueError(
            f"start and end differ in {', '.join(differing[:3])}; between models of another form there is no line: "
            "merge_lora first, and give both the same head, or leave the heads out"
        )
    mixed = {}
    for name, first in start.items():
        last = end[name].to(first.device)
        if alpha in (0, 1) or not first.is_floating_point():
            mixed[name] = (last if alpha >= 0.5 else first).clone()
        else:
            mixed[name] = first * (1 - alpha) + last.to(first.dtype) * alpha
    return mixed


def interpolation_path(
    model: nn.Module,
    start: State,
    end: State,
    measure: Callable[[nn.Module], Mapping[str, Any]],
    alphas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> list[dict[str, Any]]:
    """What ``measure`` finds at points of the line from ``start`` to ``end``: one row for each α, with α in it.

    The model is left with the weights that it had. Where the old task and the new have different heads, leave them
    out of ``start`` and ``end``, and let ``measure`` put each in its place.

    Raises:
        ValueError: a name that the model does not have; see :func:`interpolate`.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> ends = [{"weight": torch.tensor([[w]])} for w in (1.0, 3.0)]
    >>> interpolation_path(layer, *ends, lambda m: {"w": m.weight.item()}, alphas=(0, 0.5))
    [{'alpha': 0, 'w': 1.0}, {'alpha': 0.5, 'w': 2.0}]
    """
    own = model.state_dict()
    if unknown := sorted(start.keys() - own.keys()):
        raise ValueError(f"start has {', '.join(unknown[:3])}, which {type(model).__name__} has not")
    before, rows = {name: tensor.clone() for name, tensor in own.items()}, []
    try:
        for alpha in alphas:
            model.load_state_dict({**before, **interpolate(start, end, alpha)})
            rows.append({"alpha": alpha, **measure(model)})
    finally:
        model.load_state_dict(before)
    return rows


def agreement(predictions: Sequence[Tensor]) -> Tensor:
    """How often each two of M classifiers say the same: (M, M), 1 on the diagonal.

    Args:
        predictions: of each classifier its classes (N,), or probabilities (N, K).

    Raises:
        ValueError: none, or of different images.

    >>> agreement([torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 1])])
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    said = _classes(predictions)
    return (said[:, None] == said[None]).float().mean(-1)


def shared_mistakes(predictions: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Of the mistakes of classifier i, the share that j makes too, of whatever kind: (M, M); NaN where i makes none.

    >>> shared_mistakes([torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 0])], torch.tensor([0, 1, 2, 2]))
    tensor([[1.0000, 1.0000],
            [0.6667, 1.0000]])
    """
    wrong = (_classes(predictions) != labels).float()  # (M, N)
    return wrong @ wrong.T / wrong.sum(1, keepdim=True)


def ensemble(probabilities: Iterable[Tensor]) -> Tensor:
    """The mean of several classifiers' probabilities (N, K), which their argmax is taken of.

    >>> ensemble([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])])
    tensor([[0.7500, 0.2500]])
    """
    probabilities = list(probabilities)
    if not probabilities or any(p.shape != probabilities[0].shape for p in probabilities):
        raise ValueError(f"probabilities must be (N, K) alike, got {[tuple(p.shape) for p in probabilities]}")
    return torch.stack(probabilities).mean(0)


def _classes(predictions: Sequence[Tensor]) -> Tensor:
    """(M, N)"""
    said = [p.argmax(1) if p.ndim == 2 else p for p in predictions]
    if not said or any(s.shape != said[0].shape for s in said):
        raise ValueError(f"predictions must be of the same images, got {[tuple(p.shape) for p in predictions]}")
    return torch.stack(said)
