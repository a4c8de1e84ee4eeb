"""SmoothQuant: outliers are moved from the activations, which are hard to quantize, to the weights, which are easy."""

from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from .calibration import watch_inputs

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
    into the LayerNorm before the layer, so the model computes the same function at the same cost.

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
        ValueError: alpha outside [0, 1]; no pair found; a pair that is no LayerNorm with weights and Linear; see also
            :func:`watch_inputs`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} is outside [0, 1]")
    if not inplace:
        model = deepcopy(model)
    found = [_modules(model, *pair) for pair in (_find_pairs(model) if pairs is None else pairs)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no LayerNorm followed by a Linear as in ViT's blocks; name pairs")
    linears = {str(i): linear for i, (_, linear) in enumerate(found)}
    largest: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        peaks = x.detach().abs().flatten(0, -2).amax(dim=0)
        largest[name] = torch.maximum(largest[name], peaks) if name in largest else peaks.clone()

    missed = watch_inputs(model, linears, batches, see)
    if missed:
        raise ValueError(
            f"these never ran: {', '.join(missed[:4])}; give batches of images that pass through all layers"
        )
    for i, (norm, linear) in enumerate(found):
        _fold(norm, linear, smoothing_factors(largest[str(i)], linear.weight, alpha))
    return model


def smoothing_factors(largest: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s (in,) from max|X| per channel (in,) and the weight (out, in), eq. 4; channels that are always 0 keep theirs."""
    largest, weights = largest.float(), weight.detach().float().abs().amax(dim=0)
    s = largest.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((largest > 0) & (weights > 0), s, 1.0)


def _fold(norm: nn.LayerNorm, linear: nn.Linear, s: Tensor) -> None:
    with torch.no_grad():
        norm.weight /= s
        if norm.bias is not None:
            norm.bias /= s
        linear.weight *= s


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
    return norm, linear
