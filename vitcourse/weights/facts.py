"""What makes a model compute what it does, beside its parameters: heads, activations, norms, strides, pooling.

Two models whose parameters have the same names and shapes may differ in these, and then the weights of one make another
function of the other. A fact has a dotted name, as a parameter has, so that whoever translates names translates both.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

Facts = dict[str, Any]
COMPARED = (
    "activation", "eps", "global_pool", "mask_padding", "mixer", "num_heads", "pool_include_prefix", "stride",
    "where_it_normalises",
)  # fmt: skip
# Of blocks with the same parameters: those of ours, timm's and torchvision's.
_NORMS = {
    "before each branch": (
        *("Block", "DividedBlock", "SwinBlock", "SwinTransformerBlock", "EncoderBlock", "TransformerBlock2d"),
    ),
    "after each branch": ("PostNormBlock", "ResPostBlock", "SwinTransformerV2Block", "SwinTransformerBlockV2"),
}
_PLACES = {kind: place for place, kinds in _NORMS.items() for kind in kinds}


def facts_of(model: nn.Module) -> Facts:
    """All facts of a model of ours, timm's or torchvision's, by dotted name, and ``img_size`` and windows as well."""
    facts: Facts = {}
    embed = getattr(model, "patch_embed", None)
    sizes = [_sizes(getattr(o, n, None)) for o, n in ((model, "img_size"), (embed, "img_size"), (model, "image_size"))]
    facts["img_size"] = next(filter(None, sizes), None)
    facts["pool_include_prefix"] = bool(getattr(model, "pool_include_prefix", False))  # timm's
    if isinstance(getattr(model, "global_pool", None), str):
        facts["global_pool"] = model.global_pool
    for path, module in model.named_modules():
        facts |= {f"{path}.{name}".lstrip("."): value for name, value in _facts_of_module(module).items()}
    return facts


def _facts_of_module(module: nn.Module) -> Facts:
    facts: Facts = {}
    if isinstance(getattr(module, "num_heads", None), int):
        facts["num_heads"] = module.num_heads
    for name in ("window_size", "pretrained_window_size"):
        if hasattr(module, name):
            facts[name] = _sizes(getattr(module, name), axes=(2, 3))
    if isinstance(getattr(module, "mask_padding", None), bool):
        facts["mask_padding"] = module.mask_padding
    if type(module).__name__ in _PLACES:
        facts["where_it_normalises"] = _PLACES[type(module).__name__]
    if isinstance(getattr(module, "eps", None), float):
        facts["eps"] = module.eps
    if isinstance(module, nn.Conv2d):
        facts["stride"] = tuple(module.stride)
    if hasattr(module, "recorder") and type(module).__module__.startswith("vitcourse."):
        facts["mixer"] = type(module).__name__
    if not any(True for _ in module.children()) and not module.state_dict():
        facts["activation"] = module  # or dropout, or whatever else has nothing to learn
    return facts


def _sizes(size: Any, axes: tuple[int, ...] = (2,)) -> tuple[int, ...] | None:
    """Height and width, of clips with the frames before them; None for what has another number of axes."""
    sizes = (size, size) if isinstance(size, int) else size
    whole = isinstance(sizes, (tuple, list)) and len(sizes) in axes and all(isinstance(n, int) for n in sizes)
    return tuple(sizes) if whole else None


def differences(theirs: Mapping[str, Any], own: nn.Module, kinds: Collection[str] = COMPARED) -> list[str]:
    """What both models know of themselves, and say differently, one line for each kind of fact."""
    found: dict[str, list[str]] = {}
    for name, value in facts_of(own).items():
        place, _, kind = name.rpartition(".")
        if kind in kinds and name in theirs and not _same(kind, theirs[name], value):
            told = f"{_told(theirs[name])} there, {_told(value)} in the model"
            found.setdefault(kind, []).append(f"{told}{f' ({place})' if place else ''}")
    return [f"{kind}: {lines[0]}{_more(lines)}" for kind, lines in found.items()]


def _same(kind: str, a: Any, b: Any) -> bool:
    if kind != "activation":
        return a == b
    if not type(b).__module__.endswith(".activation"):  # what is no activation of PyTorch's: dropout, identity
        return True
    x = torch.linspace(-4, 4, 65)
    with torch.no_grad():
        return torch.allclose(a(x.clone()), b(x.clone()), rtol=0, atol=1e-6)


def _told(value: Any) -> str:
    return repr(value) if isinstance(value, nn.Module) else str(value)


def _more(lines: list[str]) -> str:
    return f" and {len(lines) - 1} more" if len(lines) > 1 else ""
