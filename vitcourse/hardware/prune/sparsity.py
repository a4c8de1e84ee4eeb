"""Zeros in matrices of the old size: the smallest weights anywhere, or in the 2:4 pattern that some hardware skips.

Only the pattern can save time: the sparse tensor cores of NVIDIA GPUs (compute capability 8.0 and above) do two of
every four products. On anything else a zero costs what any number costs.
"""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vitcourse.hardware.patterns import as_patterns, matches


class _Masked(nn.Module):
    """A weight with some entries held at zero, whatever training does to them."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def magnitude_prune(
    model: nn.Module,
    sparsity: float = 0.5,
    *,
    pattern: str = "unstructured",
    skip: str | Iterable[str] | None = None,
) -> nn.Module:
    """Hold the smallest weights of the linear layers at zero, in place, also while training goes on.

    The matrices keep their size, so this alone saves no time: it shows what a model can do without, and the pattern
    ``"2:4"`` is what :func:`accelerate_2_4` needs. :func:`make_permanent` ends it, and so does a file of
    :func:`vitcourse.save_weights`, which holds plain weights. Of equal ones the first become zero.

    Args:
        model: any module with linear layers.
        sparsity: part of the weights that becomes zero, over all layers together (Han et al. 2015).
        pattern: ``"unstructured"``, or ``"2:4"``: of every four neighbours in a row the two smaller go (Mishra et al.
            2021), a sparsity of 0.5.
        skip: names of modules that stay dense with all that is in them, as shell wildcards: ``"head"``,
            ``["blocks.0", "*.fc2"]``. By default the ``head``, in a model that has one; ``()`` for no module.

    Returns:
        ``model``.

    Raises:
        ValueError: a value out of range, no linear layers, widths that four does not divide, or a skip pattern that
            matches nothing, with the nearest names.

    >>> layer = nn.Linear(8, 2)
    >>> magnitude_prune(layer, pattern="2:4").weight.count_nonzero(1).tolist()
    [4, 4]
    """
    if pattern not in ("unstructured", "2:4"):
        raise ValueError(f"pattern {pattern!r} is unknown; use 'unstructured' or '2:4'")
    if not 0 < sparsity < 1 or (pattern == "2:4" and sparsity != 0.5):
        raise ValueError(f"sparsity {sparsity} must be between 0 and 1, and for pattern '2:4' it is 0.5")
    layers = _layers(model, skip)
    if pattern == "2:4":
        masks = {name: _mask_2_4(name, layer.weight.detach()) for name, layer in layers.items()}
    else:
        masks = _masks({name: layer.weight.detach().abs() for name, layer in layers.items()}, sparsity)
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", _Masked(masks[name]))
    return model


def _layers(model: nn.Module, skip: str | Iterable[str] | None) -> dict[str, nn.Linear]:
    names = [name for name, _ in model.named_modules() if name]
    patterns = [name for name in names if name == "head"] if skip is None else as_patterns(skip, names)
    modules = model.named_modules()
    layers = {name: m for name, m in modules if isinstance(m, nn.Linear) and not matches(name, patterns)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer outside skip, so there is nothing to prune")
    return layers


def _masks(sizes: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """True for the weights that stay: all but this part of all layers' together."""
    together = torch.cat([size.flatten() for size in sizes.values()])
    number = max(round(sparsity * together.numel()), 1)
    threshold = together.kthvalue(number).values
    stays = ~(together < threshold)
    equal = (together == threshold).nonzero().flatten()
    stays[equal[: number - int((~stays).sum())]] = False  # as many of the equals as are still to go
    parts = stays.split([size.numel() for size in sizes.values()])
    return {name: part.view_as(size) for (name, size), part in zip(sizes.items(), parts, strict=True)}


def _mask_2_4(name: str, weight: Tensor) -> Tensor:
    if weight.shape[1] % 4:
        raise ValueError(f"{name} has {weight.shape[1]} inputs, which four does not divide; name it in skip")
    fours = weight.abs().unflatten(1, (-1, 4))
    smaller = fours.sort(dim=2, stable=True).indices[..., :2]
    return torch.ones_like(fours, dtype=torch.bool).scatter_(2, smaller, False).flatten(1)


def make_permanent(model: nn.Module) -> nn.Module:
    """Write the zeros of :func:`magnitude_prune` into the weights, which are ordinary parameters again."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], _Masked):
            kind = type(module)  # PyTorch will take the weight off the class, which deep copies of the model share
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
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
