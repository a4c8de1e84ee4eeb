"""SmoothQuant: outliers are moved from the activations, which are hard to quantize, to the weights, which are easy."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from vitcourse.inference import evaluating

from .calibration import watch_inputs

Pair = tuple[str, str]

# A norm and the linear layer that alone reads it, by their names in one block of ViT or Swin.
PAIRS = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"), ("norm", "reduction"))


def smooth(
    model: nn.Module,
    batches: Iterable,
    alpha: float = 0.5,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Divide channels with outliers by s, and multiply the weights that read them by s (Xiao et al. 2023, eq. 3 and 4).

    With s = max|X|^α / max|W|^(1−α) per channel, activations and weights share the difficulty. The division is folded
    into the LayerNorm before the layer, so the model computes the same function at the same cost. That is checked on
    the first batch: if something else reads the norm, the model is left as it was.

    Args:
        model: with pre-norm blocks.
        batches: images (B, C, H, W) as the model takes them, or (images, labels) pairs, to find max|X| on.
        alpha: 0 leaves all the difficulty with the activations, 1 moves it all to the weights.
        pairs: names of (LayerNorm, Linear), where only this layer reads the norm; by default those of ViT's and
            Swin's blocks.
        inplace: change ``model`` itself, not a copy.

    Returns:
        the smoothed copy, or ``model``: to be given to :func:`quantize_model`.

    Raises:
        ValueError: alpha outside [0, 1]; no pair found; a pair that is no LayerNorm with weights and Linear of its
            width; a layer that never runs; an output that changes by more than rounding, which is √ε of the type of
            the weights (3.5e-4 in float32) times its norm; see also :func:`watch_inputs`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} is outside [0, 1]")
    pairs = _find_pairs(model) if pairs is None else pairs
    found = {(norm, linear): _modules(model, norm, linear) for norm, linear in pairs}
    if not found:
        raise ValueError(f"{type(model).__name__} has no LayerNorm followed by a Linear as in ViT's blocks; name pairs")
    largest, first = _watch(model, {name: linear for (_, name), (_, linear) in found.items()}, batches)
    folded = {
        pair: _folded(pair, modules, smoothing_factors(largest[pair[1]], modules[1].weight, alpha))
        for pair, modules in found.items()
    }
    _check_function(model, folded, *first)
    if not inplace:
        model = deepcopy(model)
    with torch.no_grad():
        for name, tensor in _together(folded).items():
            model.get_parameter(name).copy_(tensor)
    return model


def smoothing_factors(largest: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s (in,) from max|X| per channel (in,) and the weight (out, in), eq. 4; channels that are always 0 keep theirs."""
    largest, weights = largest.float(), weight.detach().float().abs().amax(dim=0)
    s = largest.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((largest > 0) & (weights > 0), s, 1.0)


def _watch(
    model: nn.Module, linears: dict[str, nn.Linear], batches: Iterable
) -> tuple[dict[str, Tensor], tuple[Any, Any]]:
    """max|X| per channel of what enters each layer, and the model's inputs and output on the first batch."""
    largest: dict[str, Tensor] = {}
    calls: list[tuple[Any, Any]] = []

    def see(name: str, x: Tensor) -> None:
        peaks = x.detach().abs().flatten(0, -2).amax(dim=0)
        largest[name] = torch.maximum(largest[name], peaks) if name in largest else peaks.clone()

    handle = model.register_forward_hook(lambda _, *call: None if calls else calls.append(call))
    try:
        missed = watch_inputs(model, linears, batches, see)
    finally:
        handle.remove()
    if missed:
        raise ValueError(
            f"these never ran: {', '.join(missed[:4])}; give batches that reach them, or name pairs without layers "
            "whose weight the model reads itself"
        )
    return largest, calls[0]


def _folded(pair: Pair, modules: tuple[nn.LayerNorm, nn.Linear], s: Tensor) -> dict[str, Tensor]:
    """The parameters of a norm and its layer after smoothing, by their names in the model."""
    norm, linear = modules
    changed = {f"{pair[0]}.weight": norm.weight / s, f"{pair[1]}.weight": linear.weight * s}
    if norm.bias is not None:
        changed[f"{pair[0]}.bias"] = norm.bias / s
    return {name: tensor.detach().to(linear.weight.dtype) for name, tensor in changed.items()}


def _together(folded: Mapping[Pair, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for tensors in folded.values() for name, tensor in tensors.items()}


def _check_function(
    model: nn.Module, folded: Mapping[Pair, Mapping[str, Tensor]], inputs: tuple[Any, ...], output: Any
) -> None:
    """An error that names the norms, if the model with the folded parameters has another output than before."""

    def change(parameters: Mapping[str, Tensor]) -> float:
        pairs = zip(_flat(functional_call(model, dict(parameters), inputs)), _flat(output), strict=True)
        return max(((a - b).norm().item() / max(b.norm().item(), 1e-30) for a, b in pairs), default=0.0)

    together = _together(folded)
    tolerance = max(torch.finfo(tensor.dtype).eps for tensor in together.values()) ** 0.5
    with evaluating(model), torch.inference_mode():
        by = change(together)
        if by <= tolerance:
            return
        culprits = [norm for (norm, _), alone in folded.items() if change(alone) > tolerance]
    raise ValueError(
        f"smoothing would change the output by {by:.2g} of its norm, where rounding explains {tolerance:.2g}: not only "
        f"the layer of its pair reads {', '.join(culprits[:4]) or 'one of the norms'}; name pairs of which that is true"
    )


def _flat(output: Any) -> list[Tensor]:
    """The real tensors of an output, in float32 at least."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _find_pairs(model: nn.Module) -> list[tuple[str, str]]:
    modules = dict(model.named_modules())
    candidates = [(f"{name}.{a}".lstrip("."), f"{name}.{b}".lstrip(".")) for name in modules for a, b in PAIRS]
    return [(a, b) for a, b in candidates if isinstance(modules.get(a), nn.LayerNorm) and b in modules]


def _modules(model: nn.Module, norm_name: str, linear_name: str) -> tuple[nn.LayerNorm, nn.Linear]:
    norm, linear = model.get_submodule(norm_name), model.get_submodule(linear_name)
    if not (isinstance(norm, nn.LayerNorm) and norm.elementwise_affine and type(linear) is nn.Linear):
        raise ValueError(
            f"pair ({norm_name!r}, {linear_name!r}) is {type(norm).__name__} and {type(linear).__name__}; "
            "it must be a LayerNorm with weights and the nn.Linear that reads it"
        )
    if norm.weight.shape != (linear.in_features,):
        raise ValueError(
            f"pair ({norm_name!r}, {linear_name!r}): the norm has {norm.weight.numel()} channels and the layer "
            f"{linear.in_features} inputs, so it reads something else; name pairs of which it reads the norm"
        )
    return norm, linear
