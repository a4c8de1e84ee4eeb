"""Structured pruning: heads and MLP channels are taken out for good, and an ordinary, smaller model is left."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from vitcourse.inference import evaluating, find_mean_std, normalise
from vitcourse.layers import Mlp

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), as the model takes them, and labels (B,)
Loss = Callable[[Tensor, Tensor], Tensor]  # logits and labels to their mean loss
Structure = dict[str, int]  # heads, or hidden channels, of each layer that has some, by the layer's name
_NO_IMAGES = "calibration holds no images; give batches (images, labels) or a data set"


# --------------------------------------------------------------------------------------------------- what can be pruned


def structure(model: nn.Module) -> Structure:
    """Heads of each attention and hidden channels of each :class:`vitcourse.layers.Mlp`, by the layer's name.

    What an attention must be like is said at :class:`vitcourse.vit.Attention`; Swin's, CoAtNet's and the mixers of
    :mod:`vitcourse.efficient_attention` are. It is all that :func:`prune_like` needs to build a pruned model again.

    >>> from vitcourse import create_model
    >>> structure(create_model("vit_tiny", img_size=32, patch_size=16, depth=1))
    {'blocks.0.attn': 3, 'blocks.0.mlp': 768}
    """
    return {name: _units(layer) for name, layer in _prunable(model).items()}


def _prunable(model: nn.Module) -> dict[str, nn.Module]:
    found = {name: layer for name, layer in model.named_modules() if type(layer) is Mlp or _can_lose_heads(layer)}
    if not found:
        raise ValueError(f"{type(model).__name__} has nothing to prune: no attention with head_axes, and no layers.Mlp")
    for name, layer in found.items():
        for part in ("fc1", "fc2") if type(layer) is Mlp else ("qkv", "proj"):
            if type(getattr(layer, part)) is not nn.Linear:
                kind = type(getattr(layer, part)).__name__
                raise ValueError(f"{name}.{part} is a {kind}, not nn.Linear; prune first, then quantize or adapt")
    return found


def _can_lose_heads(layer: nn.Module) -> bool:
    """Whether the layer says of each of its parameters where the heads are."""
    axes = getattr(layer, "head_axes", None)
    if axes is None:
        return False
    known = ("qkv", "proj", *axes)
    return all(any(_within(name, part) for part in known) for name, _ in layer.named_parameters())


def _within(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.")


def _units(layer: nn.Module) -> int:
    return layer.fc1.out_features if type(layer) is Mlp else layer.num_heads


def _outlet(layer: nn.Module) -> nn.Linear:
    """The linear layer that adds up what the heads, or the hidden channels, have found."""
    return layer.fc2 if type(layer) is Mlp else layer.proj


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply–adds of one forward pass, as ``torch.utils.flop_counter`` counts them: products only, no norms.

    >>> count_macs(nn.Linear(8, 4), torch.zeros(1, 8))
    32
    """
    return _count(model, images).get_total_flops() // 2


def _count(model: nn.Module, images: Tensor) -> FlopCounterMode:
    mixers = [(m, m.backend) for m in model.modules() if isinstance(getattr(m, "backend", None), str)]
    try:
        for mixer, _ in mixers:
            mixer.backend = "math"  # whose products every counter knows; PyTorch 2.11's knows no fused kernel of a CPU
        with evaluating(model), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
    finally:
        for mixer, backend in mixers:
            mixer.backend = backend
    return counter


def _macs_per_unit(model: nn.Module, images: Tensor) -> tuple[dict[str, float], int]:
    """MACs of one head, or channel, of each layer, which are the same for each of them, and of the whole model."""
    counter, costs = _count(model, images), {}
    counts = counter.get_flop_counts()

    def macs(name: str) -> float:
        return sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) / 2

    for name, layer in _prunable(model).items():
        aliases = [n for n, module in model.named_modules(remove_duplicate=False) if module is layer]  # counted by any
        shared = [part for part, axis in getattr(layer, "head_axes", {}).items() if axis is None]
        costs[name] = sum(macs(n) - sum(macs(f"{n}.{part}") for part in shared) for n in aliases) / _units(layer)
        if not costs[name]:
            raise ValueError(f"{name} did not run on the calibration images, so what it costs is unknown")
    return costs, counter.get_total_flops() // 2


# ----------------------------------------------------------------------------------------------------------- importance


@torch.inference_mode(False)
def taylor_importance(
    model: nn.Module, calibration: Dataset | Iterable[Batch], *, loss_fn: Loss = F.cross_entropy
) -> dict[str, Tensor]:
    """How much the loss would change without each head and each hidden channel, to first order, mean over images.

    A gate ξ = 1 on each unit's output would have the gradient ∂L/∂ξ = Σ a · ∂L/∂a over the unit's activations a; its
    absolute value is the change of an image's loss when the gate is closed (Michel et al. 2019, eq. 2, for heads;
    Molchanov et al. 2019, sec. 3.1, for channels). One forward and one backward pass give it for all units at once.

    Args:
        model: gives logits (B, num_classes); it runs in evaluation mode, and its weights' gradients stay as they are.
        calibration: batches (images, labels), ready for the model, or a data set, whose uint8 images are normalised by
            ``model.preprocess`` or the data set's mean and std.
        loss_fn: mean loss over a batch.

    Returns:
        for each layer of :func:`structure` one number ≥ 0 a head, or a channel, on the CPU.

    Raises:
        ValueError: nothing to prune; no images; a score that is NaN or infinite.
        TypeError: calibration that is not batches (images, labels).
    """
    layers = _prunable(model)
    totals = {name: torch.zeros(_units(layer), dtype=torch.float64) for name, layer in layers.items()}
    runs: list[tuple[str, Tensor]] = []  # what entered the outlet of which layer, in the order of the forward pass

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            # Below the first trainable weight there is no graph to differentiate; start one.
            runs.append((name, inputs[0] if inputs[0].requires_grad else inputs[0].requires_grad_()))

        return hook

    hooks = [_outlet(layer).register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    seen = 0
    try:
        with evaluating(model):
            for images, labels in _batches(model, calibration):
                runs.clear()
                with torch.enable_grad():
                    loss = loss_fn(model(images), labels) * len(images)  # the sum, so each image's gradient is its own
                    found = list(runs)  # the backward pass runs checkpointed blocks again
                    gradients = torch.autograd.grad(loss, [x for _, x in found])
                for name, effect in _effects(found, gradients, layers).items():
                    totals[name] += len(images) * effect.abs().mean(0).cpu()
                seen += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(_NO_IMAGES)
    for name, total in totals.items():
        if not total.isfinite().all():
            raise ValueError(
                f"the importance of {name} is not finite; look for NaN and infinity in calibration, weights and loss"
            )
    return {name: total / seen for name, total in totals.items()}


def _effects(
    runs: list[tuple[str, Tensor]], gradients: Sequence[Tensor], layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """∂L/∂ξ for each image and unit (B, units) of every layer: one gate for all runs of a layer, so they add up."""
    effects: dict[str, Tensor] = {}
    for (name, x), gradient in zip(runs, gradients, strict=True):
        effects[name] = effects.get(name, 0) + _effect(x.detach(), gradient, _units(layers[name]))
    return effects


def taylor_score(x: Tensor, gradient: Tensor, units: int) -> Tensor:
    """|Σ x · ∂L/∂x| over tokens and over each unit's stretch of the last axis, mean over images.

    Args:
        x: activations (B, …, units · width), a unit's values side by side.
        gradient: of the loss summed over images, with regard to x.
        units: heads, or channels, that the last axis holds.

    Returns:
        (units,).

    >>> taylor_score(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[1.0, -1.0, 0.0, 2.0]]]), units=2)
    tensor([1., 8.])
    """
    return _effect(x, gradient, units).abs().mean(0)


def _effect(x: Tensor, gradient: Tensor, units: int) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    effect = (x.to(exact) * gradient.to(exact)).reshape(len(x), -1, units, x.shape[-1] // units)
    return effect.sum((1, 3))


def _batches(model: nn.Module, calibration: Dataset | Iterable[Batch]) -> Iterator[Batch]:
    device = next(model.parameters()).device
    mean_std = None
    if isinstance(calibration, Dataset):
        mean_std = find_mean_std(model, calibration, device)
        calibration = DataLoader(calibration, batch_size=128)
    if not isinstance(calibration, Iterable) or isinstance(calibration, Tensor):
        raise TypeError(f"calibration is a {type(calibration).__name__}; give batches (images, labels) or a data set")
    for batch in calibration:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"calibration gave a batch of type {type(batch).__name__}; it must be (images, labels)")
        images, labels = (t.clone() if t.is_inference() else t for t in batch)
        yield normalise(images.to(device), mean_std), labels.to(device)


# -------------------------------------------------------------------------------------------------------------- surgery


def keep_units(model: nn.Module, keep: Mapping[str, Iterable[int]]) -> nn.Module:
    """Remove, in place, all heads and hidden channels of the named layers but those listed, in the order listed.

    The result computes what the model did with the removed units' outputs set to zero.

    Args:
        model: a model with layers that :func:`structure` names.
        keep: indices of the units that stay, for each layer that is to shrink.

    Returns:
        ``model``; ``model.structure`` is what :func:`structure` says of it, and goes into a file with its weights. A
        model of :func:`vitcourse.create_model` inside of a wrapper has one of its own.

    Raises:
        ValueError: a layer or a unit that does not exist, twice the same, or none left.
    """
    layers = _prunable(model)
    chosen = {name: list(map(int, units)) for name, units in keep.items()}
    for name, units in chosen.items():
        if name not in layers:
            raise ValueError(f"the model has no prunable layer {name!r}; it has {', '.join(layers)}")
        available = _units(layers[name])
        if not units or len(set(units)) < len(units) or not all(0 <= unit < available for unit in units):
            raise ValueError(f"keep[{name!r}] must list some of 0 … {available - 1}, each once; got {_some(units)}")
    for name, units in chosen.items():
        _shrink(layers[name], torch.tensor(units))
    widths = structure(model)
    for path, part in model.named_modules():
        if part is model or hasattr(part, "model_args"):  # what create_model made takes it along, out of a wrapper too
            inside = path and f"{path}."
            part.structure = {n.removeprefix(inside): units for n, units in widths.items() if n.startswith(inside)}
    return model


def _some(units: list[int]) -> str:
    return f"{units}" if len(units) <= 8 else f"{len(units)} units from {min(units)} to {max(units)}"


def _shrink(layer: nn.Module, units: Tensor) -> None:
    units = units.to(next(layer.parameters()).device)
    if type(layer) is Mlp:
        layer.fc1, layer.fc2 = _rows(layer.fc1, units), _columns(layer.fc2, units)
        return
    heads, d = layer.num_heads, layer.proj.in_features // layer.num_heads
    features = (units[:, None] * d + torch.arange(d, device=units.device)).flatten()
    layer.qkv = _rows(layer.qkv, torch.cat([features + part * heads * d for part in range(3)]))
    layer.proj = _columns(layer.proj, features)
    for name, axis in layer.head_axes.items():
        if axis is not None:
            _keep_part(layer, name, axis, units)
    layer.num_heads = len(units)


def _keep_part(layer: nn.Module, name: str, axis: int, heads: Tensor) -> None:
    """Of a parameter, or of the outputs of a linear layer, leave what belongs to these heads."""
    path, _, last = name.rpartition(".")
    owner = layer.get_submodule(path)
    part = getattr(owner, last)
    if isinstance(part, nn.Linear):
        setattr(owner, last, _rows(part, heads))
    elif part is not None:
        by_head = part.detach().unflatten(axis, (layer.num_heads, -1))
        kept = by_head.index_select(axis, heads).flatten(axis, axis + 1)
        setattr(owner, last, nn.Parameter(kept, part.requires_grad))


def _rows(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    """The layer with only these outputs."""
    return _linear(linear, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def _columns(linear: nn.Linear, columns: Tensor) -> nn.Linear:
    """The layer with only these inputs."""
    return _linear(linear, linear.weight[:, columns], linear.bias)


def _linear(like: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta").train(like.training)
    linear.weight = nn.Parameter(weight.detach().clone(), like.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), like.bias.requires_grad)
    return linear


def prune_like(model: nn.Module, widths: Structure) -> nn.Module:
    """Give ``model``, in place, the structure of a pruned one, whose weights then fit; returns ``model``.

    Raises:
        ValueError: a layer that the model does not have, or more units than it has.

    >>> from vitcourse import create_model
    >>> small = {"blocks.0.attn": 2, "blocks.0.mlp": 256}
    >>> structure(prune_like(create_model("vit_tiny", img_size=32, patch_size=16, depth=1), small)) == small
    True
    """
    return keep_units(model, {name: range(units) for name, units in widths.items()})


# ------------------------------------------------------------------------------------------------------ the whole thing


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
    example = next((images[:1] for images, _ in _batches(pruned, calibration)), None)
    if example is None:
        raise ValueError(_NO_IMAGES)
    full = count_macs(pruned, example)
    for step in range(1, rounds + 1):
        target = full * (1 - (1 - macs) * step / rounds)
        scores = _checked(importance(pruned), pruned) if importance else taylor_importance(pruned, calibration)
        costs, total = _macs_per_unit(pruned, example)
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
    root, layers = f"{type(model).__name__}.", _prunable(model)
    counts = _count(model, images).get_flop_counts()
    macs = {name.removeprefix(root): sum(kinds.values()) / 2 for name, kinds in counts.items() if name.startswith(root)}
    apart = [n for n in macs if not any(_within(n, layer) or _within(layer, n) for layer in layers)]
    whole = [n for n in apart if not any(n != other and _within(n, other) for other in apart)]
    largest = sorted(whole, key=macs.get, reverse=True)[:3]
    return ", ".join(f"{n} ({macs[n] / full:.3f})" for n in largest)


def _floors(model: nn.Module, min_heads: int, channel_multiple: int) -> dict[str, tuple[int, int]]:
    """For each layer: how many units stay at least, and how many go at a time."""
    floors = {}
    for name, layer in _prunable(model).items():
        heads = type(layer) is not Mlp
        if heads and _units(layer) < min_heads:
            raise ValueError(f"min_heads {min_heads} is more than the {_units(layer)} heads that {name} has")
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
