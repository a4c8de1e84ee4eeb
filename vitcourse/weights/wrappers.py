"""What stands around a model, such as a compiler's or a replica's wrapper, and is no part of its weights."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import AveragedModel

# A class of this library that wraps a model has an attribute `wraps`, the name of the attribute that holds it.
_WRAPS = {DistributedDataParallel: "module", DataParallel: "module", AveragedModel: "module"}
_TRANSPARENT = re.compile(r"(^|\.)(?:_orig_mod|_checkpoint_wrapped_module)\.")  # torch.compile's, also of parts


def peel(model: Any) -> Iterator[Any]:
    """``model``, what it wraps, and so on to the model inside."""
    while model is not None:
        yield model
        model = _inner(model)


def unwrap(model: Any) -> Any:
    """The model inside: without compilation, replicas, running means and merging of tokens, however often wrapped.

    >>> import torch
    >>> model = nn.Linear(2, 2)
    >>> unwrap(DataParallel(torch.compile(model))) is model
    True
    """
    *_, inside = peel(model)
    return inside


def _inner(model: Any) -> nn.Module | None:
    name = getattr(type(model), "wraps", None)
    if name is None:
        name = next((name for kind, name in _WRAPS.items() if isinstance(model, kind)), None)
    if name is None and type(model).__module__ == "timm.utils.model_ema":
        name = "module" if hasattr(model, "module") else "ema"
    if name is None and isinstance(model, nn.Module) and list(model._modules) == ["_orig_mod"]:
        name = "_orig_mod"
    return None if name is None else getattr(model, name)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without traces of compiled parts; zeros that ``magnitude_prune`` holds are in the weights."""
    state = model.state_dict()
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module.parametrizations if is_parametrized(module) else ():
            held = f"{path}.parametrizations.{name}.".removeprefix(".")
            state = {k: v for k, v in state.items() if not k.startswith(held)}
            state[f"{path}.{name}".removeprefix(".")] = getattr(module, name).detach()
    return {plain_name(name): tensor for name, tensor in state.items()}


def plain_name(name: str) -> str:
    """A parameter's name without what compilation or checkpointing of a *part* of the model put into it.

    >>> plain_name("blocks.0._orig_mod.attn.qkv.weight")
    'blocks.0.attn.qkv.weight'
    """
    return _TRANSPARENT.sub(r"\1", name)
