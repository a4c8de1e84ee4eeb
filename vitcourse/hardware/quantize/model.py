"""A whole model at once."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from vitcourse.hardware.patterns import as_patterns, matches
from vitcourse.notices import say_once
from vitcourse.weights import tensors_to_save

from . import formulas
from .calibration import OBSERVERS, Observer, watch_inputs
from .checks import GROUP_SIZES
from .linear import Int4Linear, Int8Conv2d, Int8Linear, Quantized, SplitAttention, W8A8Linear

SCHEMES = {
    "int8": "int8 weights, real activations",
    "w8a8": "int8 weights, int8 activations with a scale per token",
    "w8a8_static": "int8 weights, int8 activations with one scale, from calibration",
    "int4": "4-bit weights in groups, real activations",
}
# Subclasses may use their weights otherwise; the second, out_proj of nn.MultiheadAttention, does not.
QUANTIZABLE = (nn.Linear, NonDynamicallyQuantizableLinear, nn.Conv2d)


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
    """Put integers in the place of the weights of every ``nn.Linear`` and ``nn.Conv2d``.

    * Linear layers follow the scheme.
    * So do both projections of ``nn.MultiheadAttention``, whose weights it reads itself.
    * Convolutions keep int8 weights in all schemes, a scale per output channel, and real activations.
    * All other parameters of two or more dimensions (positions, class and register tokens, embeddings, tables of
      relative positions) are rounded to float16, and stored so in a file. The model computes with them in float32.
    * Norms and biases stay what they are. So do weights that are tied to a table, those of subclasses of ``nn.Linear``
      and ``nn.Conv2d``, which may use them otherwise, and of other convolutions; one line on stderr says so.
    * A module that reads ``layer.weight`` and does not call the layer (torchvision's Swin, PyTorch's encoder on its
      fast path) gets real numbers, made of the integers at every use, and rounds no activations.

    All that remains real is frozen, since the model is for inference now. The file that
    :func:`vitcourse.save_weights` writes is as much smaller, and ``create_model(path)`` builds the same model
    from it. The state dict loads into another model that went through the same call, too:

    >>> from vitcourse import create_model
    >>> model = create_model("vit_tiny", img_size=32, patch_size=8, num_classes=10)
    >>> small = quantize_model(model, "int4", skip="head")
    >>> f"{model_bytes(model) / model_bytes(small):.1f} times smaller"
    '7.2 times smaller'
    >>> fresh = create_model("vit_tiny", img_size=32, patch_size=8, num_classes=10)
    >>> quantize_model(fresh, "int4", skip="head").load_state_dict(small.state_dict())
    <All keys matched successfully>

    Args:
        model: any module.
        scheme: ``"int8"`` (weights only, a scale per output channel), ``"w8a8"`` (and activations, a scale per token,
            found as they come), ``"w8a8_static"`` (and activations, one scale per layer, found on ``batches``) or
            ``"int4"`` (weights only, a scale per group).
        skip: names of modules to leave alone with all that is in them, or of such other parameters, as shell wildcards:
            ``"head"``, ``["blocks.0", "*.fc2"]``, ``"pos_embed"``.
        group_size: for int4: how many neighbouring inputs share a scale at most: 32, 64, 128 or 256. Where it does not
            divide a layer's inputs, the layer has smaller groups, if they need less filling up with zeros.
        batches: for w8a8_static, and needed there: images (B, C, H, W) as the model takes them, or (images, labels)
            pairs. Layers that they never reach have no scale, and will refuse to run; one line on stderr names them.
        observer: for w8a8_static: ``"minmax"``, ``"percentile"`` (99.99 % of the magnitudes are covered), or what
            makes an observer per layer, such as ``lambda: PercentileObserver(99.9)``.
        inplace: change ``model`` itself, which saves the memory of a copy.

    Returns:
        the quantized copy, or ``model``; ``model.quantization`` says how it was made.

    Raises:
        ValueError: an unknown scheme, group size or observer; no batches for w8a8_static; a skip pattern that matches
            nothing, with the nearest names; no linear layer or convolution left; one whose weight is parametrized, as
            by ``magnitude_prune``; weights or activations that are NaN or infinite.
        TypeError: skip is neither a name nor a sequence of names, or an observer makes no observers.
    """
    _check(scheme, group_size)
    observer = _maker(observer)
    if batches is not None and scheme != "w8a8_static":
        raise ValueError(f"batches are for scheme 'w8a8_static'; {scheme!r} needs none")
    if batches is None and scheme == "w8a8_static":
        raise ValueError(
            "scheme 'w8a8_static' needs batches of images, to find the scales of activations on; 'w8a8' finds them as "
            "they come, and quantize_like(model, quantization) makes the form of a model whose weights are to be loaded"
        )
    patterns = _patterns(model, skip)
    if not inplace:
        model = deepcopy(model)
    _split_attentions(model, patterns)
    scales = None
    if scheme == "w8a8_static":
        linears = {name: layer for name, layer in _layers(model, patterns).items() if isinstance(layer, nn.Linear)}
        scales = _input_scales(model, linears, batches, observer)
    model = _quantize(model, scheme, patterns, group_size, scales)
    _tell_what_stays_real(model, scheme, patterns)
    return model


def quantize_like(model: nn.Module, how: Mapping[str, Any]) -> nn.Module:
    """Give ``model``, in place, the form of a quantized one, whose weights then fit.

    Args:
        model: built as the quantized one was before.
        how: its ``model.quantization``.

    Returns:
        ``model``. Layers with static activations refuse to run until weights are loaded, and with them their scales.

    Raises:
        ValueError: another mapping than :func:`quantize_model` leaves; otherwise as there.

    >>> small = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), "int4", skip="1")
    >>> quantize_like(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), small.quantization)
    Sequential(
      (0): Int4Linear(in_features=64, out_features=64, bias=True, group_size=64)
      (1): Linear(in_features=64, out_features=2, bias=True)
    )
    """
    if how.keys() != {"scheme", "skip", "group_size"}:
        raise ValueError(
            f"quantization {dict(how)} does not consist of scheme, skip and group_size; another version of the library "
            "wrote it: quantize the real weights again"
        )
    _check(how["scheme"], how["group_size"])
    patterns = _patterns(model, how["skip"])
    _split_attentions(model, patterns)
    return _quantize(model, how["scheme"], patterns, how["group_size"])


def describe_quantization(model: nn.Module) -> dict[str, Any]:
    """What :func:`quantize_like` needs to make the same of a real model: a head that was exchanged since stays real."""
    known = model.quantization
    real = [name for name, m in model.named_modules() if type(m) in QUANTIZABLE and not matches(name, known["skip"])]
    return {**known, "skip": [*known["skip"], *real]}


def _check(scheme: str, group_size: int) -> None:
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is unknown; use one of {', '.join(map(repr, SCHEMES))}")
    if not isinstance(group_size, int) or group_size not in GROUP_SIZES:
        raise ValueError(f"group_size {group_size!r} must be 32, 64, 128 or 256")


def _patterns(model: nn.Module, skip: str | Sequence[str]) -> list[str]:
    if skip is None or not all(isinstance(pattern, str) for pattern in skip):
        raise TypeError(f"skip must be a name or a list of names, got {skip!r}; leave it out to skip nothing")
    return as_patterns(skip, [name for name, _ in model.named_modules() if name] + [*_tables(model, [])])


def _maker(observer: str | Callable[[], Observer]) -> Callable[[], Observer]:
    """What makes an observer."""
    if isinstance(observer, str) and observer not in OBSERVERS:
        raise ValueError(f"observer {observer!r} is unknown; use one of {', '.join(map(repr, OBSERVERS))}")
    if not isinstance(observer, str) and not callable(observer):
        raise TypeError(f"observer {observer!r} must make one per layer, as lambda: PercentileObserver(99.9) does")
    return OBSERVERS[observer] if isinstance(observer, str) else observer


def _quantize(
    model: nn.Module, scheme: str, patterns: list[str], group_size: int, input_scales: dict[str, Tensor] | None = None
) -> nn.Module:
    """The model, changed in place; static scales that are not given are NaN."""
    build, replaced, first = _builder(scheme, group_size, input_scales), {}, {}
    for name, layer in _layers(model, patterns).items():
        replaced[id(layer)] = small = build(name, layer)
        small.tie(first.setdefault(id(layer.weight), small))
    for module, name in _tables(model, patterns).values():
        _round_to_half(module, name)
    model = _replace(model, replaced).requires_grad_(False)
    model.quantization = {"scheme": scheme, "skip": patterns, "group_size": group_size}
    if scheme.startswith("w8a8") and next(model.buffers()).device.type == "cpu" and not formulas.HAS_FAST_INT8:
        say_once("this CPU has no 8-bit products (VNNI); int8 sums are made of float32: exact, not fast")
    return model


def _split_attentions(model: nn.Module, patterns: list[str]) -> None:
    """Make a linear layer of the input projection of every ``nn.MultiheadAttention``, if it is not left out."""
    for name, module in list(model.named_modules()):
        whole = type(module) is nn.MultiheadAttention and module.in_proj_weight is not None  # kdim = vdim = embed_dim
        if whole and not matches(f"{name}.in_proj_weight".lstrip("."), patterns):
            SplitAttention.split(module)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all tensors as ``save_weights`` stores them: what a file takes up, but for its header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_to_save(model).values())


def _layers(model: nn.Module, patterns: list[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear layers and convolutions by name, each once, but for those that a pattern leaves out."""
    tables = {id(getattr(owner, name)) for owner, name in _tables(model, []).values()}
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, _ConvNd)) or matches(name, patterns):
            continue
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"the weight of {name!r} is parametrized: call make_permanent(model) if magnitude_prune did it, "
                "torch.nn.utils.parametrize.remove_parametrizations otherwise, or leave the layer out by skip="
            )
        if type(module) in QUANTIZABLE and module.weight.numel() and id(module.weight) not in tables:
            layers[name] = module
    if not layers:
        quantized = any(isinstance(m, Quantized) for m in model.modules())
        cause = "it is quantized already" if quantized else "it has none, or all are skipped, empty or tied to a table"
        raise ValueError(f"{type(model).__name__} has no nn.Linear or nn.Conv2d to quantize: {cause}")
    return layers


def _tables(model: nn.Module, patterns: list[str]) -> dict[str, tuple[nn.Module, str]]:
    """Parameters of two or more dimensions that belong to no linear layer or convolution: their owners and names."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, _ConvNd, Quantized)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if parameter.ndim >= 2 and parameter.numel() and not matches(full, patterns):
                found[full] = (module, name)
    return found


def _round_to_half(module: nn.Module, name: str) -> None:
    """Round a parameter to float16, if that moves nothing by more than 2⁻¹¹ of the largest magnitude; else leave it."""
    parameter = getattr(module, name)
    rounded = parameter.detach().half().to(parameter.dtype)
    if parameter.is_meta or (rounded - parameter).abs().max() <= 2**-11 * parameter.abs().max():
        parameter.data = rounded
        module.half_in_files = (*getattr(module, "half_in_files", ()), name)


def _builder(
    scheme: str, group_size: int, input_scales: dict[str, Tensor] | None
) -> Callable[[str, nn.Linear | nn.Conv2d], Quantized]:
    """What makes a quantized layer of a name and a real layer."""

    def build(name: str, layer: nn.Linear | nn.Conv2d) -> Quantized:
        if isinstance(layer, nn.Conv2d):
            return Int8Conv2d(layer, name)
        if scheme == "int8":
            return Int8Linear(layer, name)
        if scheme == "int4":
            return Int4Linear(layer, name, _fitting(group_size, layer.in_features))
        if scheme == "w8a8":
            return W8A8Linear(layer, name)
        scale = torch.full((1, 1), torch.nan) if input_scales is None else input_scales[name]
        return W8A8Linear(layer, name, scale.to(layer.weight.device))

    return build


def _fitting(group_size: int, inputs: int) -> int:
    """Of the sizes up to this one, the largest of those that need the fewest zeros to fill up the last group."""
    return min((size for size in GROUP_SIZES if size <= group_size), key=lambda size: (-inputs % size, -size))


def _input_scales(
    model: nn.Module, linears: dict[str, nn.Linear], batches: Iterable, observer: Callable[[], Observer]
) -> dict[str, Tensor]:
    """A (1, 1) scale for the activations that enter each layer; NaN for one that none of the batches reaches."""
    observers = {name: observer() for name in linears}
    missed = watch_inputs(model, linears, batches, lambda name, x: observers[name].observe(x))
    if missed:
        print(
            f"vitcourse: these never ran, and have no input scale: {', '.join(missed)}; right for layers whose "
            "weight the model reads itself; to others give batches that reach them, for without a scale they refuse to "
            "run",
            file=sys.stderr,
        )
    return {
        name: torch.full((1, 1), torch.nan) if name in missed else seen.scale().reshape(1, 1)
        for name, seen in observers.items()
    }


def _replace(module: nn.Module, replaced: dict[int, Any]) -> nn.Module:
    """``module`` with every child that is in ``replaced`` exchanged, at every place where it stands."""
    if id(module) in replaced:
        return replaced[id(module)]
    for name, child in module._modules.items():  # named_children() would leave out what stands there twice
        if child is not None:
            setattr(module, name, _replace(child, replaced))
    return module


def _tell_what_stays_real(model: nn.Module, scheme: str, patterns: list[str]) -> None:
    """A line on stderr about weights, and one about activations, that have no integers though nobody asked for it."""
    kinds: Counter[str] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, _ConvNd, nn.MultiheadAttention)):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and not matches(f"{path}.{name}".lstrip("."), patterns):
                    kinds[f"{type(module).__name__}.{name}"] += parameter.numel()
    if kinds:
        print(
            f"vitcourse: {kinds.total():,} weights stay real, of {', '.join(kinds)}: only nn.Linear and nn.Conv2d "
            "themselves, tied to no table, are quantized",
            file=sys.stderr,
        )
    if scheme.startswith("w8a8") and any(isinstance(module, SplitAttention) for module in model.modules()):
        print(
            "vitcourse: activations stay real in nn.MultiheadAttention, which reads its weights and calls no layer",
            file=sys.stderr,
        )
