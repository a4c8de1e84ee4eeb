"""Zeros in matrices of the old size: the smallest weights anywhere, or in the 2:4 pattern that some hardware skips.

Only the pattern can save time: the sparse tensor cores of NVIDIA GPUs (compute capability 8.0 and above) do two of
every four products. On anything else a zero costs what any number costs.
"""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class _Masked(nn.Module):
    """A weight with some entries held at zero, whatever training does to them."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def magnitude_prune(
    model: nn.Module, sparsity: float = 0.5, *, pattern: str = "unstructured", skip: Iterable[str] = ("head",)
) -> nn.Module:
    """Hold the smallest weights of the linear layers at zero, in place, also while training goes on.

    The matrices keep their size, so this alone saves no time: it shows what a model can do without, and the pattern
    ``"2:4"`` is what :func:`accelerate_2_4` needs. :func:`make_permanent` ends it.

    Args:
        model: any module with linear layers.
        sparsity: part of the weights that becomes zero, over all layers together (Han et al. 2015).
        pattern: ``"unstructured"``, or ``"2:4"``: of every four neighbours in a row the two smaller go (Mishra et al.
            2021), a sparsity of 0.5.
        skip: layers of these names stay dense.

    Returns:
        ``model``.

    Raises:
        ValueError: a value out of range, no linear layers, or widths that four does not divide.

    >>> layer = nn.Linear(8, 2)
    >>> magnitude_prune(layer, pattern="2:4").weight.count_nonzero(1).tolist()
    [4, 4]
    """
    if pattern not in ("unstructured", "2:4"):
        raise ValueError(f"pattern {pattern!r} is unknown; use 'unstructured' or '2:4'")
    if not 0 < sparsity < 1 or (pattern == "2:4" and sparsity != 0.5):
        raise ValueError(f"sparsity {sparsity} must be between 0 and 1, and for pattern '2:4' it is 0.5")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in set(skip)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer outside skip, so there is nothing to prune")
    if pattern == "2:4":
        masks = {name: _mask_2_4(name, layer.weight.detach()) for name, layer in layers.items()}
    else:
        sizes = torch.cat([layer.weight.detach().abs().flatten() for layer in layers.values()])
        threshold = sizes.kthvalue(max(round(sparsity * sizes.numel()), 1)).values
        masks = {name: layer.weight.detach().abs() > threshold for name, layer in layers.items()}
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", _Masked(masks[name]))
    return model


def _mask_2_4(name: str, weight: Tensor) -> Tensor:
    if weight.shape[1] % 4:
        raise ValueError(f"{name} has {weight.shape[1]} inputs, which four does not divide; name it in skip")
    fours = weight.abs().unflatten(1, (-1, 4))
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(2, fours.topk(2).indices, True).flatten(1)


def make_permanent(model: nn.Module) -> nn.Module:
    """Write the zeros of :func:`magnitude_prune` into the weights, which are ordinary parameters again."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], _Masked):
            parametrize.remove_parametrizations(module, "weight")
    return model


def accelerate_2_4(model: nn.Module) -> nn.Module:
    """Store linear weights of the 2:4 pattern compressed, in place, for the sparse tensor cores; for inference.

    They need an NVIDIA GPU of compute capability 8.0 or more, weights in float16 or bfloat16, and outputs and inputs in
    multiples of 32 and 64. Where this is not so the weights stay dense, zeros included, and a line on stderr says why.

    Returns:
        ``model``.

    Raises:
        ValueError: no linear layer has the pattern.
    """
    make_permanent(model)
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and _is_2_4(m.weight)}
    if not layers:
        raise ValueError("no linear layer has the 2:4 pattern; call magnitude_prune(model, pattern='2:4') first")
    dense: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if obstacle := _no_sparse_cores(layer.weight):
            dense.setdefault(obstacle, []).append(name or type(layer).__name__)
        else:
            sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
            layer.weight = nn.Parameter(sparse, requires_grad=False)
    for obstacle, names in dense.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"vitcourse: zeros of {names[0]}{others} are not skipped, they stay dense: {obstacle}", file=sys.stderr)
    return model


def _is_2_4(weight: Tensor) -> bool:
    return weight.shape[1] % 4 == 0 and bool((weight.unflatten(1, (-1, 4)) != 0).sum(-1).le(2).all())


def _no_sparse_cores(weight: Tensor) -> str:
    if weight.device.type != "cuda":
        return f"sparse tensor cores are NVIDIA's, and the weights are on {weight.device.type}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return f"{torch.cuda.get_device_name(weight.device)} has none (compute capability 8.0 or more)"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"the weights are {weight.dtype}; use model.half() or model.bfloat16() first"
    if weight.shape[0] % 32 or weight.shape[1] % 64:
        return f"{tuple(weight.shape)} is not in multiples of (32, 64)"
    return ""
