"""`save_weights`: a file that a model can be rebuilt from, or a refusal while the model is still there."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitcourse.notices import say_once
from vitcourse.registry import FORM_MODULES, Preprocess, forms_of, takes_argument

from .facts import COMPARED, differences, facts_of
from .sources import skeleton
from .wrappers import peel, plain_name, plain_state, unwrap

HEADER_KEYS = {
    "model",
    "model_args",
    "preprocess",
    *FORM_MODULES,
}  # what save_weights writes of a model, and nobody else


def save_weights(model: nn.Module, path: str | Path, *, half: bool = False, **metadata: Any) -> None:
    """Write a model's weights to a safetensors file that :func:`vitcourse.create_model` can rebuild the model from.

    Args:
        model: built by :func:`vitcourse.create_model`; its name, arguments and ``preprocess`` go into the file's
            header, and so does how it was pruned and quantized. Wrappers (``torch.compile``, replicas, running means,
            merging of tokens) are seen through.
        path: where to; replaced in one step, so that a crash leaves the old file or the new one.
        half: store floating-point tensors as float16, at half the size; those with numbers beyond its range stay what
            they are.
        metadata: anything else worth keeping beside them (accuracy, command, seed), as JSON can hold it; ``classes``
            are those of ``model.classes``, unless given.

    Raises:
        ValueError: the model was changed in a way from which it cannot be rebuilt; a suffix other than
            ``.safetensors``; metadata by a name that the header itself has.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path {str(path)!r} must end in .safetensors, the only format that is written")
    if reserved := sorted(metadata.keys() & HEADER_KEYS):
        raise ValueError(f"metadata {', '.join(reserved)} would take the place of what says how the model is built")
    _tell_what_is_left_out(model)
    model = unwrap(model)
    tensors = tensors_to_save(model)
    header = json.dumps({**_header(model, tensors), **_classes(model), **metadata})
    state = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    if half:
        state = {k: _half_if_finite(v) for k, v in state.items()}
    seen: set[int] = set()
    for name, tensor in state.items():  # the format knows no tensor of two names
        state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # of this call alone
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it; safetensors may put a file of its own in its place
        save_file(state, partial, metadata={"format": "pt", "vitcourse": header})
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_saveable(model: nn.Module) -> None:
    """Raise ValueError, as :func:`save_weights` would, before a training whose result it refuses."""
    model = unwrap(model)
    _header(model, tensors_to_save(model))


def _tell_what_is_left_out(model: nn.Module) -> None:
    for wrapper in peel(model):
        if told := getattr(type(wrapper), "left_out_of_files", None):
            say_once(told)


def tensors_to_save(model: nn.Module) -> dict[str, Tensor]:
    """The state dict; in float16 what modules list in ``half_in_files``, where nothing is lost by it."""
    modules = model.named_modules(remove_duplicate=False)
    halves = {
        plain_name(f"{path}.{name}".removeprefix("."))
        for path, m in modules
        for name in getattr(m, "half_in_files", ())
    }
    return {k: _half_if_exact(v) if k in halves else v for k, v in plain_state(model).items()}


def _half_if_exact(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor


def _half_if_finite(tensor: Tensor) -> Tensor:
    """In float16, but for integers, and for what would become infinite, such as a variance of batch norm."""
    half = tensor.half() if tensor.is_floating_point() else tensor
    return half if torch.equal(half.isfinite(), tensor.isfinite()) else tensor


def _header(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What create_model needs to build ``model`` again: name, arguments, present head and form; and ``preprocess``."""
    header: dict[str, Any] = {}
    if isinstance(getattr(model, "preprocess", None), Preprocess):
        header["preprocess"] = asdict(model.preprocess)
    if not hasattr(model, "model_args"):
        say_once(
            f"{type(model).__name__} was not built by create_model: the file holds its weights alone; build "
            "the model in code, then load_weights"
        )
        return header
    arguments = dict(model.model_args)
    if hasattr(model, "num_classes") and takes_argument(model.name, "num_classes"):
        arguments["num_classes"] = model.num_classes
    try:
        json.dumps(arguments)
    except TypeError:  # a class, such as attn_layer
        say_once(
            f"{model.name} was built with arguments no file can hold ({', '.join(model.model_args)}); "
            "its weights are saved alone: build the model in code, then load_weights"
        )
        return header
    header |= {"model": model.name, "model_args": arguments, **forms_of(model)}
    _check_rebuilt(header, model, tensors)
    return header


def _classes(model: nn.Module) -> dict[str, list[str]]:
    names = getattr(model, "classes", None)
    return {"classes": list(names)} if names and len(names) == getattr(model, "num_classes", None) else {}


def _shared(model: nn.Module) -> set[tuple[str, ...]]:
    """Names that one tensor has together, for each that has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(plain_name(name))
    return {tuple(sorted(group)) for group in names.values() if len(group) > 1}


def _check_rebuilt(header: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless what create_model builds from this header has these tensors' names, shapes and ties."""
    again = skeleton(json.loads(json.dumps(header)))
    rebuilt = again.state_dict()
    differing = sorted(tensors.keys() ^ rebuilt.keys())
    differing += sorted(k for k in tensors.keys() & rebuilt.keys() if tensors[k].shape != rebuilt[k].shape)
    differing += sorted(" = ".join(names) for names in _shared(model) ^ _shared(again))
    differing += differences(facts_of(model), again, (*COMPARED, "window_size", "pretrained_window_size"))
    if differing:
        raise ValueError(
            f"{header['model']} cannot be rebuilt from a file: parts were changed after it was built, such as "
            f"{', '.join(differing[:3])}; save its state dict (torch.save(model.state_dict(), path)) and build the "
            "same parts in code, or give the model an argument for the change (vitcourse.register_model); a new head "
            "is made by model.reset_classifier(num_classes)"
        )
