"""Files of what fine-tuning has changed: kilobytes beside a model that many tasks share."""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from vitcourse.inference import is_frozen_norm
from vitcourse.registry import in_head
from vitcourse.weights import HEADER_KEYS, read_metadata, unwrap
from vitcourse.weights.files import check_path, write_tensors
from vitcourse.weights.wrappers import plain_state

from .methods import FineTuning, restore_adapters
from .parts import free_names


def save_adapter(model: nn.Module, path: str | Path, **metadata: Any) -> None:
    """Write what fine-tuning has changed of a model: its head, and its prompts, low-rank updates or biases.

    The file names the model that it belongs to, and has a fingerprint of its frozen weights.

    Args:
        model: made ready by :func:`vitcourse.finetuning.finetune`, with a method that freezes something.
        path: where to, a ``.safetensors`` file; replaced in one step.
        metadata: anything else worth keeping, as JSON can hold it.

    Raises:
        ValueError: nothing of the model is frozen, so that the file would be no smaller than the model's.
    """
    check_path(path)
    model = unwrap(model)
    names, state = changed_names(model), plain_state(model)
    if len(names) == len(state):
        raise ValueError("nothing of the model is frozen, so all of it may have changed; use save_weights")
    header = {
        "adapter": {
            **_describe(model),
            "fingerprint": fingerprint(model, without=names),
            "adapters": getattr(model, "adapters", []),
            "classes": getattr(model, "classes", None),
            "num_classes": getattr(model, "num_classes", None),
        },
        **metadata,
    }
    write_tensors({name: tensor for name, tensor in state.items() if name in names}, path, header)


def save_adapter_of_run(model: nn.Module, task: FineTuning, out_dir: str | Path) -> None:
    """Write ``adapter.safetensors`` into a finished run's folder, where its method leaves most of the model as it was.

    It has the best weights, or the final ones where nothing validates; ``model`` has them then too.
    """
    from safetensors.torch import load_file

    folder = Path(out_dir)
    if task.method.trained(model) is None:
        return
    file = next(f for f in (folder / "best.safetensors", folder / "final.safetensors") if f.exists())
    inside = unwrap(model)
    names = changed_names(inside)
    inside.load_state_dict({k: v for k, v in load_file(file).items() if k in names}, strict=False)
    facts = {k: v for k, v in read_metadata(file).items() if k not in HEADER_KEYS | {"classes"}}
    inside.classes = read_metadata(file).get("classes")
    save_adapter(inside, folder / "adapter.safetensors", **facts)


def changed_names(model: nn.Module) -> set[str]:
    """Names in the state dict of what has changed, or will: what is trained, adapters, and statistics that move."""
    adapters = {
        name
        for name, _ in model.named_parameters()
        if in_head(model, name) or name.startswith("prompts.") or ".lora_" in name
    }
    names = adapters if hasattr(model, "adapters") else free_names(model)
    for path, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None and not is_frozen_norm(module):
            names |= {f"{path}.{name}" for name, _ in module.named_buffers(recurse=False)}
    return names


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """A checksum of a model's tensors, by name, shape and value; the same on every device.

    >>> fingerprint(nn.Linear(2, 2)) == fingerprint(nn.Linear(2, 2))
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_state(model).items()):
        if name not in without:
            tensor = tensor.detach().cpu()
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _describe(model: nn.Module) -> dict[str, Any]:
    return {
        "model": getattr(model, "name", type(model).__name__),
        "width": getattr(model, "num_features", None) or getattr(model, "embed_dim", None),
    }


def load_adapter(model: nn.Module, path: str | Path, *, check_base: bool = True) -> nn.Module:
    """Change a model, in place, as the one was changed that :func:`save_adapter` has saved; returns ``model``.

    All but low-rank updates or prompts, where the file has some, and the head is frozen then, as when it was made.

    Args:
        model: with the weights that fine-tuning began with; its head may be any.
        path: the file.
        check_base: refuse a model with other weights than those; False for the same weights in another precision, or
            at another resolution.

    Raises:
        ValueError: no file of an adapter; a model of another name, width or weights; one that has adapters already.
        FileNotFoundError: no such file.
    """
    from safetensors.torch import load_file

    saved = read_metadata(path).get("adapter")
    if saved is None:
        raise ValueError(f"{path} holds no adapter; save_adapter writes one, and create_model(path) reads whole models")
    inside, state = unwrap(model), load_file(path)
    _check_fits(inside, saved, path)
    if check_base and fingerprint(inside, without=_own_head(inside) | state.keys()) != saved["fingerprint"]:
        raise ValueError(
            f"{path} belongs to a {saved['model']} with other weights than this one has; load those first, or give "
            "check_base=False if they are the same in another precision or at another resolution"
        )
    if saved["num_classes"] is not None and saved["num_classes"] != getattr(inside, "num_classes", None):
        inside.reset_classifier(saved["num_classes"])
    if saved["adapters"]:
        restore_adapters(inside, saved["adapters"])
    missing = state.keys() - plain_state(inside).keys()
    if missing:
        raise ValueError(f"{path} has {', '.join(sorted(missing)[:3])}, which {saved['model']} has not")
    inside.load_state_dict(state, strict=False)
    if saved["classes"]:
        inside.classes = saved["classes"]
    return model


def _own_head(model: nn.Module) -> set[str]:
    return {name for name in plain_state(model) if in_head(model, name)}


def _check_fits(model: nn.Module, saved: dict[str, Any], path: str | Path) -> None:
    own = _describe(model)
    if own["width"] != saved["width"]:
        raise ValueError(
            f"{path} is for a {saved['model']}, {saved['width']} wide, and the model is {own['width']} wide; build the "
            "model that it was trained with"
        )
    if own["model"] != saved["model"]:
        raise ValueError(f"{path} is for a {saved['model']}, and the model is a {own['model']}; build the former")
    if hasattr(model, "adapters"):
        raise ValueError("the model has adapters already; load the file into the model that they were added to")
