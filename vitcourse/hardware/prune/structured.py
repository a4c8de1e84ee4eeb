"""Structured pruning: heads and MLP channels are taken out for good, and an ordinary, smaller model is left."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse.layers import Mlp

from .importance import NO_IMAGES, Batch, batches, taylor_importance
from .surgery import keep_units
from .units import count_macs, counted, macs_per_unit, prunable, structure, units_of, within


@torch.inference_mode(False)
def prune_model(
    model: nn.Module,
    calibration: Dataset | Iterable[Batch],
    *,
    macs: float = 0.6,
    rounds: int = 3,
    finetune: Callable[[nn.Module], object] | None = None,
    importance: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    channel_multiple: int = 8,
    min_heads: int = 1,
) -> nn.Module:
    """A smaller copy of ``model``: the heads and MLP channels that matter least for what they cost are removed.

    In each round the units of all layers are ranked together, by their importance over their MACs. The least
    worthy go, until the round's share of the way to ``macs`` is done; then ``finetune`` may repair the model. Several
    small steps can lose less than a large one: what is left takes over work, so its importance changes.

    Args:
        model: has layers that :func:`structure` names. It is not changed.
        calibration: as in :func:`taylor_importance`, which reads it once a round. The more images, the less the ranks
            depend on which.
        macs: the part of the MACs that shall remain, 0 < macs < 1. The result is at most that.
        rounds: steps on the way.
        finetune: called with the smaller model after each round, to train it in place.
        importance: gives scores in place of ``taylor_importance(model, calibration)``, for another loss, say: for each
            layer of ``structure(model)`` as many finite numbers as it has units.
        channel_multiple: MLP channels go in groups of so many; hardware likes multiples of 8 or more.
        min_heads: heads that every attention layer keeps. Each MLP keeps ``channel_multiple`` channels, or what it has.

    Returns:
        an ordinary module. A file of :func:`vitcourse.save_weights` is opened by ``create_model(path)``.

    Raises:
        ValueError: a value out of range; a ratio that cannot be reached; nothing to prune; no images; scores that do
            not fit; more ``min_heads`` than a layer has.
        TypeError: calibration that is not batches (images, labels).
    """
    _check_options(macs, rounds=rounds, channel_multiple=channel_multiple, min_heads=min_heads)
    if isinstance(calibration, Iterator):
        calibration = list(calibration)  # every round reads it
    pruned = copy.deepcopy(model)
    example = next((images[:1] for images, _ in batches(pruned, calibration)), None)
    if example is None:
        raise ValueError(NO_IMAGES)
    full = count_macs(pruned, example)
    for step in range(1, rounds + 1):
        target = full * (1 - (1 - macs) * step / rounds)
        scores = _checked(importance(pruned), pruned) if importance else taylor_importance(pruned, calibration)
        costs, total = macs_per_unit(pruned, example)
        keep, remaining = _choose(scores, costs, total - target, _floors(pruned, min_heads, channel_multiple))
        if remaining > 0:
            held = sum(costs[name] * len(units) for name, units in keep.items()) / full
            raise ValueError(
                f"macs {macs} cannot be reached: round {step} ends at {(target + remaining) / full:.3f}. "
                f"{held:.3f} is what min_heads {min_heads} and channel_multiple {channel_multiple} keep, and "
                f"{(target + remaining) / full - held:.3f} cannot be pruned, most of it in "
                + _not_prunable(pruned, example, full)
            )
        keep_units(pruned, keep)
        if finetune is not None:
            finetune(pruned)
    return pruned


def _check_options(macs: float, **counts: int) -> None:
    if not isinstance(macs, (int, float)) or not 0 < macs < 1:
        raise ValueError(f"macs {macs!r} must be between 0 and 1: the part of the multiply–adds that shall remain")
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _checked(scores: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What a caller's importance gave, if it is a finite number for each unit."""
    expected = structure(model)
    if not isinstance(scores, Mapping):
        raise ValueError(f"importance must return a mapping of layers to scores, got {type(scores).__name__}")
    if wrong := sorted(expected.keys() ^ scores.keys()):
        raise ValueError(f"importance must give scores of what structure(model) names; missing or unknown: {wrong}")
    tensors = {name: torch.as_tensor(scores[name]) for name in expected}
    for name, score in tensors.items():
        if score.shape != (expected[name],):
            shape = tuple(score.shape)
            raise ValueError(f"importance must give {expected[name]} scores of {name}, one a unit; got shape {shape}")
        if not score.isfinite().all():
            raise ValueError(f"importance gave scores of {name} that are NaN or infinite")
    return tensors


def _not_prunable(model: nn.Module, images: Tensor, full: int) -> str:
    """For a message: the modules that hold nothing to prune, with their part of the MACs, largest first."""
    root, layers = f"{type(model).__name__}.", prunable(model)
    counts = counted(model, images).get_flop_counts()
    macs = {name.removeprefix(root): sum(kinds.values()) / 2 for name, kinds in counts.items() if name.startswith(root)}
    apart = [n for n in macs if not any(within(n, layer) or within(layer, n) for layer in layers)]
    whole = [n for n in apart if not any(n != other and within(n, other) for other in apart)]
    largest = sorted(whole, key=macs.get, reverse=True)[:3]
    return ", ".join(f"{n} ({macs[n] / full:.3f})" for n in largest)


def _floors(model: nn.Module, min_heads: int, channel_multiple: int) -> dict[str, tuple[int, int]]:
    """For each layer: how many units stay at least, and how many go at a time."""
    floors = {}
    for name, layer in prunable(model).items():
        heads = type(layer) is not Mlp
        if heads and units_of(layer) < min_heads:
            raise ValueError(f"min_heads {min_heads} is more than the {units_of(layer)} heads that {name} has")
        floors[name] = (min_heads, 1) if heads else (channel_multiple, channel_multiple)
    return floors


def _choose(
    scores: Mapping[str, Tensor], costs: dict[str, float], surplus: float, floors: dict[str, tuple[int, int]]
) -> tuple[dict[str, list[int]], float]:
    """The units that stay when the least important per MAC have gone, and the surplus that is left (≤ 0 if none is)."""
    candidates, orders, kept = [], {}, {}
    for name, score in scores.items():
        least, group = floors[name]
        orders[name], kept[name] = score.argsort(descending=True), len(score)
        # From the end of the order, a first group that leaves a multiple, then whole groups.
        edges = [len(score), *range((len(score) - 1) // group * group, least - 1, -group)]
        for end, start in zip(edges, edges[1:], strict=False):
            worth = score[orders[name][start:end]].sum().item() / (costs[name] * (end - start))
            candidates.append((worth, name, start, costs[name] * (end - start)))
    # Within a layer a later group is worth less, so sorting keeps the order of its groups.
    for _, name, start, saved in sorted(candidates, key=lambda c: (c[0], -c[2])):
        if surplus <= 0:
            break
        surplus, kept[name] = surplus - saved, min(kept[name], start)
    return {name: sorted(orders[name][: kept[name]].tolist()) for name in scores}, surplus
