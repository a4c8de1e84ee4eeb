"""`load_weights`: bring a checkpoint into a model's names and sizes, or say why it does not fit."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitcourse.registry import FORM_MODULES, in_head

from .facts import differences
from .sources import Source, read_metadata, read_source
from .wrappers import plain_name, unwrap

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")  # of models inside of others
Names = Callable[[str], str]


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor] | nn.Module,
    *,
    strict: bool = True,
    new_head: bool = False,
    source_img_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Load weights into ``model``, in place, and the mean, std, interpolation and crop that they were trained with.

    Positions and tables of offsets are brought to the model's size. Filters of the first convolution are brought to
    the model's channels as timm does it: summed for one, otherwise repeated and rescaled. Prefixes of wrappers
    (``module.``, ``_orig_mod.``, ``model.``, ``backbone.``, ``encoder.``) are taken off where the names then fit. A
    line on stderr says so of prefixes and channels.

    Args:
        model: one of this library's models, perhaps compiled or otherwise wrapped.
        source: ``"timm:NAME"``, ``"torchvision:NAME[.WEIGHTS]"`` or ``"hf:OWNER/NAME[@REVISION]"`` (downloads
            pretrained weights on first use), ``"hf:FOLDER"`` for such a repository on the disk, the path of a
            ``.safetensors`` file or of a ``.pth``/``.pt`` file (read with ``weights_only=True``), a state dict, or a
            model of timm, torchvision or transformers (ViT, the encoder of MAE, BEiT, TimeSformer, DETR, EoMT).
        strict: every parameter must find its tensor, and every tensor its parameter; otherwise one line on stderr says
            what did not.
        new_head: where the classes differ in number, keep the model's own, untrained head, and say so on stderr; for
            a model without a head, leave out that of the checkpoint.
        source_img_size: size of the images that the checkpoint was trained on, or (height, width), in pixels. Models
            and files of this library know it; a state dict does not: it is taken to be of square images, if the model
            is.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown source; a corrupt file; parameters that are missing, left over or of another shape;
            positions that several grids could have; a model or file that computes otherwise (another number of heads,
            another activation …), though the parameters fit.
        FileNotFoundError: no such file, or one that cannot be downloaded.
        ImportError: timm, torchvision or huggingface_hub is needed and not installed.
    """
    target, what = unwrap(model), str(source) if isinstance(source, (str, Path)) else type(unwrap(source)).__name__
    fitted = _fit(target, read_source(source), what, strict, new_head, source_img_size)
    for line in fitted.lines:
        print(f"vitcourse: {line}", file=sys.stderr)
    names = {plain_name(name): name for name in target.state_dict()}  # parts of it may be compiled
    target.load_state_dict({names.get(k, k): v for k, v in fitted.state.items()}, strict=strict)
    if hasattr(target, "adopt"):
        target.adopt(fitted.facts)
    if fitted.preprocess is not None:
        target.preprocess = fitted.preprocess.for_model(target)
    return model


@dataclass
class _Fitted(Source):
    """A checkpoint in a model's names, and what there is to say of it."""

    lines: list[str] = field(default_factory=list)


def _fit(
    model: nn.Module,
    source: Source,
    what: str,
    strict: bool,
    new_head: bool,
    img_size: int | tuple[int, int] | None,
) -> _Fitted:
    """The checkpoint as the model takes it; nothing is changed yet, neither the model nor the source."""
    own, lines = {plain_name(name): tensor for name, tensor in model.state_dict().items()}, []
    source, prefix = _without_prefix(source, model, own)
    if prefix:
        lines.append(f"names of the weights begin with {prefix!r}, which was taken off")
    rename = _names(model, source.state)
    facts = {rename(name): value for name, value in source.facts.items()}
    if img_size is not None:
        facts["source_img_size"] = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if hasattr(model, "facts_in"):
        facts |= model.facts_in(source.state)
    adapt = getattr(model, "adapt_state_dict", None)
    state = adapt(dict(source.state), facts) if adapt else dict(source.state)
    state, line = _fit_channels(state, own, getattr(model, "in_chans", None))
    lines += line
    if new_head:
        state, line = _keep_head(state, own, model)
        lines += line

    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if reshaped or (strict and (missing or unexpected)) or (own and not own.keys() & state.keys()):
        whose = f"{what}, which are for {source.of}," if source.of else what
        raise ValueError("\n".join(_misfits(whose, model, own, state, missing, unexpected, reshaped)))
    _check_kinds(what, model, own, state)
    if others := differences(facts, model):
        raise ValueError(
            f"weights from {what} fit {_name(model)} in name and shape, but are of a model that computes otherwise:\n  "
            + "\n  ".join(others)
            + "\n  build the model as theirs is; to load them all the same, give the bare state dict"
        )
    if missing or unexpected:
        lines.append(f"weights loaded in part; missing: {_some(missing)}; left over: {_some(unexpected)}")
    return _Fitted(state, source.preprocess, facts, source.of, lines)


# ------------------------------------------------------------------------------------------------------------- names


def _names(model: nn.Module, names: Mapping[str, Any]) -> Names:
    """How a checkpoint with these names calls what the model has."""
    translation = getattr(model, "checkpoint_names", None)
    return translation(names) if translation else lambda name: name


def _without_prefix(source: Source, model: nn.Module, own: Mapping[str, Tensor]) -> tuple[Source, str]:
    """The checkpoint without the prefix, or prefixes, that keeps most of its names from fitting, and that prefix."""

    def fitting(cut: Names) -> int:
        names = {cut(name): None for name in source.state}
        rename = _names(model, names)
        return len(own.keys() & {rename(name) for name in names})

    best = max(("", *_prefixes(source.state)), key=lambda prefix: fitting(_cutting(prefix)))  # the first of equals
    cut = _cutting(best)
    state = {cut(name): tensor for name, tensor in source.state.items()}
    if not best or len(state) < len(source.state):  # two names would become one
        return source, ""
    return replace(source, state=state, facts={cut(name): value for name, value in source.facts.items()}), best


def _prefixes(names: Mapping[str, Any], so_far: str = "", depth: int = 3) -> Iterator[str]:
    for prefix in PREFIXES if depth else ():
        longer = so_far + prefix
        if any(name.startswith(longer) for name in names):
            yield longer
            yield from _prefixes(names, longer, depth - 1)


def _cutting(prefix: str) -> Names:
    """Take off as many of the prefix's parts as a name has: a head may lie beside a backbone, and not in it."""
    parts = [f"{part}." for part in prefix.split(".")[:-1]]

    def cut(name: str) -> str:
        for part in parts:
            if not name.startswith(part):
                break
            name = name.removeprefix(part)
        return name

    return cut


# ------------------------------------------------------------------------------------------- channels and the head


def _fit_channels(
    state: dict[str, Tensor], own: Mapping[str, Tensor], in_chans: int | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Filters for other channels: summed for grey images, otherwise repeated and rescaled (timm, adapt_input_conv)."""
    changed = {}
    for name in own.keys() & state.keys():
        theirs, ours = state[name].shape, own[name].shape
        others_agree = len(ours) == len(theirs) >= 4 and (theirs[0], *theirs[2:]) == (ours[0], *ours[2:])
        if others_agree and ours[1] == in_chans != theirs[1] and state[name].is_floating_point():
            changed[name] = theirs[1]
            state = {**state, name: _filters(state[name], in_chans)}
    how = "summed" if in_chans == 1 else "repeated and rescaled"
    return state, [f"{name} is for {n} channels, not {in_chans}: {how}" for name, n in changed.items()]


def _filters(weight: Tensor, in_chans: int) -> Tensor:
    """(D, C, …) -> (D, in_chans, …), with the same answer to an image or clip whose channels are all alike."""
    if in_chans == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeats = math.ceil(in_chans / weight.shape[1])
    repeated = torch.cat([weight.float()] * repeats, dim=1)[:, :in_chans] * (weight.shape[1] / in_chans)
    return repeated.to(weight.dtype)


def _keep_head(
    state: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], list[str]]:
    """The model's own head where the checkpoint's does not fit, and what there is to say of it."""
    state = {k: v for k, v in state.items() if k in own or not in_head(model, k)}
    heads = [k for k in own if in_head(model, k)]
    absent = [k for k in heads if k not in state]
    reshaped = [k for k in heads if k in state and state[k].shape != own[k].shape]
    kept = {k: own[k] for k in (*absent, *reshaped)}
    lines = []
    if reshaped or (absent and len(absent) == len(heads)):
        classes = _classes_of(state[reshaped[0]], own[reshaped[0]], model) if reshaped else "no"
        lines.append(f"weights are for {classes} classes, not {_own_classes(model, kept)}: the head starts untrained")
    elif absent:
        lines.append(f"weights have no {_some(absent)}: these start untrained")
    return {**state, **kept}, lines


def _own_classes(model: nn.Module, head: Mapping[str, Tensor]) -> int:
    return getattr(model, "num_classes", None) or next(iter(head.values())).shape[0]


def _classes_of(theirs: Tensor, own: Tensor, model: nn.Module) -> int | str:
    """How many classes a checkpoint's head is for, told by where it differs from ours, "no object" not counted."""
    if theirs.ndim != own.ndim:
        return "other"
    there, here = next((a, b) for a, b in zip(theirs.shape, own.shape, strict=True) if a != b)
    return there - here + _own_classes(model, {"": own})


# -------------------------------------------------------------------------------------------------- what does not fit


def _check_kinds(what: str, model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for numbers of another kind, or none: they would be copied as nonsense, or not at all."""

    def kind(tensor: Tensor) -> str:
        names = {
            tensor.is_floating_point(): "real",
            tensor.is_complex(): "complex",
            tensor.is_meta: "on the meta device",
        }
        return " and ".join(name for holds, name in names.items() if holds) or "integer"

    for name in own.keys() & state.keys():
        if kind(own[name]) != kind(state[name]) or own[name].is_meta:
            raise ValueError(
                f"weights from {what}: {name} is {kind(state[name])} there, and {kind(own[name])} in {_name(model)}; "
                "numbers are copied to numbers of the same kind only (on the meta device: model.to_empty first)"
            )


def _name(model: nn.Module) -> str:
    return getattr(model, "name", type(model).__name__)


def _some(names: list[str]) -> str:
    return (", ".join(names[:4]) or "none") + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _misfits(
    what: str,
    model: nn.Module,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    reshaped: list[str],
) -> list[str]:
    """The lines of a message, with the remedies there are."""
    lines = [f"weights from {what} do not fit {_name(model)}:"]
    if missing:
        lines.append(f"  missing: {_some(missing)}")
    if unexpected:
        lines.append(f"  not in the model: {_some(unexpected)}")
    if reshaped:
        shapes = [f"{k} is {tuple(state[k].shape)}, the model's {tuple(own[k].shape)}" for k in reshaped]
        lines.append(f"  of another shape: {_some(shapes)}")
    own_head = partial(in_head, model)
    if any(map(own_head, missing)) and not any(map(own_head, state)):
        lines.append(
            "  these weights have no head: create_model(name, num_classes=0), or an untrained one by new_head=True"
        )
    if any(k.endswith("prefix_bias_table") for k in unexpected):
        lines.append("  these weights have relative positions, as BEiT has them, and the model has none of that kind:")
        lines.append("  take one that has (vitcourse.list_models('beit*')), or weights of a ViT or MAE")
    if any(".temporal_" in k or k == "time_embed" for k in [*missing, *unexpected]):
        lines.append("  they look along time otherwise: build the model with the attention_type of the weights")
    if "backbone.conv1.weight" in unexpected:
        lines.append("  their backbone is a ResNet: create_model('detr', backbone='resnet50', …) has one; strict=False")
        lines.append("  takes over the rest alone, if the map of your backbone is as wide")
    if "mask_probs" in reshaped:
        lines.append("  queries join as many blocks as mask_probs has numbers: build the model with that num_blocks")
    if any(".parametrizations." in k for k in missing):
        lines.append("  parts of the model are parametrized, as by magnitude_prune: make_permanent(model) first")
    if any(map(own_head, reshaped)):
        lines.append("  for other classes and an untrained head: load_weights(…, new_head=True), or num_classes in")
        lines.append("  create_model(name, num_classes=…, weights=…)")
    if any(k.endswith(("pos_embed", "relative_position_bias_table")) for k in reshaped):
        lines.append("  for positions of images that were not square: load_weights(…, source_img_size=(height, width))")
    if what.endswith(".safetensors") and (forms := read_metadata(what).keys() & FORM_MODULES.keys()):
        kind = "an adapted model" if forms == {"adapters"} else "a pruned or quantized model"
        lines.append(f"  the file holds {kind}, which create_model(path) builds")
    return lines
