"""Taking heads and hidden channels out of a model: what is left are ordinary, smaller layers."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vitcourse.layers import Mlp

from .units import Structure, prunable, structure, units_of


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
    layers = prunable(model)
    chosen = {name: list(map(int, units)) for name, units in keep.items()}
    for name, units in chosen.items():
        if name not in layers:
            raise ValueError(f"the model has no prunable layer {name!r}; it has {', '.join(layers)}")
        available = units_of(layers[name])
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
