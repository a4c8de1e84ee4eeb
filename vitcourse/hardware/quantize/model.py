"""A whole model at once."""

import difflib
import fnmatch
import sys
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import OBSERVERS, Observer, watch_inputs
from .linear import Int4Linear, Int8Linear, QuantizedLinear, W8A8Linear
from .ops import HAS_FAST_INT8

SCHEMES = {
    "int8": "int8 weights, real activations",
    "w8a8": "int8 weights, int8 activations with a scale per token",
    "w8a8_static": "int8 weights, int8 activations with one scale, from calibration",
    "int4": "4-bit weights in groups, real activations",
}


def quantize_model(
    model: nn.Module,
    scheme: str = "int8",
    *,
    skip: str | Sequence[str] = (),
    group_size: int = 64,
    batches: Iterable | None = None,
    observer: str | Callable[[], Observer] = "minmax",
    inplace: bool = False,
) -> nn.Module:
    """Put integers in the place of every ``nn.Linear``'s weights.

    Convolutions, norms, positions and biases stay what they are; all that remains real is frozen, since the model is
    for inference now. Its state dict is as much smaller, and loads into another model that went through the same call:

    >>> from vitcourse import create_model
    >>> model = create_model("vit_tiny", img_size=32, patch_size=8, num_classes=10)
    >>> small = quantize_model(model, "int4", skip="head")
    >>> f"{model_bytes(model) / model_bytes(small):.1f} times smaller"
    '6.6 times smaller'
    >>> fresh = create_model("vit_tiny", img_size=32, patch_size=8, num_classes=10)
    >>> quantize_model(fresh, "int4", skip="head").load_state_dict(small.state_dict())
    <All keys matched successfully>

    Args:
        model: any module; subclasses of ``nn.Linear`` are left alone, for they may use their weights otherwise.
        scheme: ``"int8"`` (weights only, a scale per output channel), ``"w8a8"`` (and activations, a scale per token,
            found as they come), ``"w8a8_static"`` (and activations, one scale per layer, found on ``batches``) or
            ``"int4"`` (weights only, a scale per group).
        skip: names of modules to leave alone with all that is in them, as shell wildcards: ``"head"``,
            ``["blocks.0", "*.fc2"]``.
        group_size: for int4: how many neighbouring inputs share a scale: 32, 64, 128 or 256.
        batches: for w8a8_static: images (B, C, H, W) as the model takes them, or (images, labels) pairs. Without them
            the activations' scales are NaN until weights are loaded, and one line on stderr says so.
        observer: for w8a8_static: ``"minmax"``, ``"percentile"`` (99.99 % of the magnitudes are covered), or what
            makes an observer per layer, such as ``lambda: PercentileObserver(99.9)``.
        inplace: change ``model`` itself, which saves the memory of a copy.

    Returns:
        the quantized copy, or ``model``; ``model.quantization`` says how it was made.

    Raises:
        ValueError: an unknown scheme or observer; a skip pattern that matches no module, with the nearest names; no
            linear layer left; weights or activations that are NaN or infinite.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is unknown; use one of {', '.join(map(repr, SCHEMES))}")
    if batches is not None and scheme != "w8a8_static":
        raise ValueError(f"batches are for scheme 'w8a8_static'; {scheme!r} needs none")
    patterns = [skip] if isinstance(skip, str) else list(skip)
    if not inplace:
        model = deepcopy(model)
    linears = _linears(model, patterns)
    build = _builder(model, scheme, linears, group_size, batches, observer)
    replaced = {id(linear): build(name, linear) for name, linear in linears.items()}
    model = _replace(model, replaced).requires_grad_(False)
    model.quantization = {"scheme": scheme, "skip": patterns, "group_size": group_size}
    if scheme.startswith("w8a8") and next(model.buffers()).device.type == "cpu" and not HAS_FAST_INT8:
        print(
            "vitcourse: this CPU has no 8-bit products (VNNI); int8 sums are made of float32: exact, not fast",
            file=sys.stderr,
        )
    return model


def model_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of the state dict: what a file of them takes up, but for its header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _linears(model: nn.Module, patterns: list[str]) -> dict[str, nn.Linear]:
    """Linear layers by name, each once, but for those whose name, or a parent's, a pattern matches."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "model.named_modules() names all"
            raise ValueError(f"skip pattern {pattern!r} matches no module; {hint}")

    def skipped(name: str) -> bool:
        parts = name.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatch.fnmatchcase(path, pattern) for path in paths for pattern in patterns)

    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and not skipped(name)}
    if not linears:
        quantized = any(isinstance(m, QuantizedLinear) for m in model.modules())
        cause = "it is quantized already" if quantized else "it has none, or all are skipped"
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize: {cause}")
    return linears


def _builder(
    model: nn.Module,
    scheme: str,
    linears: dict[str, nn.Linear],
    group_size: int,
    batches: Iterable | None,
    observer: str | Callable[[], Observer],
) -> Callable[[str, nn.Linear], QuantizedLinear]:
    """What makes a quantized layer of a name and a linear layer."""
    if scheme == "int8":
        return lambda name, linear: Int8Linear(linear, name)
    if scheme == "int4":
        return lambda name, linear: Int4Linear(linear, name, group_size)
    if scheme == "w8a8":
        return lambda name, linear: W8A8Linear(linear, name)
    scales = _input_scales(model, linears, batches, observer)
    return lambda name, linear: W8A8Linear(linear, name, scales[name].to(linear.weight.device))


def _input_scales(
    model: nn.Module, linears: dict[str, nn.Linear], batches: Iterable | None, observer: str | Callable[[], Observer]
) -> dict[str, Tensor]:
    """A (1, 1) scale for the activations that enter each layer."""
    if isinstance(observer, str):
        if observer not in OBSERVERS:
            raise ValueError(f"observer {observer!r} is unknown; use one of {', '.join(map(repr, OBSERVERS))}")
        observer = OBSERVERS[observer]
    if batches is None:
        print("vitcourse: w8a8_static without batches: the input scales are NaN until loaded", file=sys.stderr)
        return {name: torch.full((1, 1), torch.nan) for name in linears}
    observers = {name: observer() for name in linears}
    watch_inputs(model, linears, batches, lambda name, x: observers[name].observe(x))
    return {name: watching.scale().reshape(1, 1) for name, watching in observers.items()}


def _replace(module: nn.Module, replaced: dict[int, Any]) -> nn.Module:
    """``module`` with every child that is in ``replaced`` exchanged, at every place where it stands."""
    if id(module) in replaced:
        return replaced[id(module)]
    for name, child in module._modules.items():  # named_children() would leave out what stands there twice
        if child is not None:
            setattr(module, name, _replace(child, replaced))
    return module
