"""Where weights come from: a hub, a file, a model, and what else these tell beside the tensors."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitcourse.registry import Preprocess, build_model, nearest, restore_forms

from .facts import Facts, facts_of
from .wrappers import plain_name, unwrap


@dataclass
class Source:
    """A checkpoint: its tensors, how its images were prepared, and what is known of the model that it is of."""

    state: dict[str, Tensor]
    preprocess: Preprocess | None = None
    facts: Facts = field(default_factory=dict)


def read_source(source: Any) -> Source:
    """What :func:`vitcourse.load_weights` takes.

    Raises:
        ValueError: an unknown source, or a corrupt file.
        FileNotFoundError: no such file.
        ImportError: timm or torchvision is needed and not installed.
    """
    model = unwrap(source)
    if isinstance(model, nn.Module):
        return _of_module(model)
    if isinstance(source, Mapping):
        return Source(_plain(source))
    text = str(source)
    library, _, name = text.partition(":")
    if library in _HUBS and name:
        return _HUBS[library](name)
    if text.endswith((".safetensors", ".pth", ".pt")):
        return _from_file(Path(text))
    raise ValueError(
        f"weights source {text!r} is unknown; use 'timm:NAME', 'torchvision:NAME', the path of a .safetensors, .pth or "
        ".pt file, a state dict or a model"
    )


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {plain_name(name): tensor for name, tensor in state.items()}


def _of_module(module: nn.Module) -> Source:
    return Source(_plain(module.state_dict()), _preprocess_of(module), facts_of(module))


def _preprocess_of(module: nn.Module) -> Preprocess | None:
    """What a model of ours or timm's carries along about its images."""
    if isinstance(getattr(module, "preprocess", None), Preprocess):
        return module.preprocess
    cfg = getattr(module, "pretrained_cfg", None)
    if not cfg:
        return None
    return Preprocess(
        img_size=tuple(cfg["input_size"][-2:]),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg.get("interpolation", "bicubic"),
        crop_pct=cfg.get("crop_pct", 0.875),
    )


def _from_timm(name: str) -> Source:
    return _of_module(_peer("timm").create_model(name, pretrained=True))


def _from_torchvision(name: str) -> Source:
    models = _peer("torchvision").models
    name, _, which = name.partition(".")
    try:
        weights = models.get_model_weights(name)[which or "DEFAULT"]
    except (KeyError, ValueError) as error:
        known = nearest(name, models.list_models())
        raise ValueError(f"torchvision has no weights {name!r} {which!r}{known}") from error
    transform = weights.transforms()
    size, resize = transform.crop_size[0], transform.resize_size[0]
    preprocess = Preprocess(
        size, tuple(transform.mean), tuple(transform.std), transform.interpolation.value, round(size / resize, 4)
    )
    return Source(
        _plain(weights.get_state_dict(progress=False, check_hash=True)), preprocess, {"img_size": (size,) * 2}
    )


_HUBS: dict[str, Callable[[str], Source]] = {"timm": _from_timm, "torchvision": _from_torchvision}


def _peer(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"weights of {package} need the package: pip install {package}") from error


# ------------------------------------------------------------------------------------------------------------- files

_STATE_KEYS = ("state_dict", "model", "model_state_dict", "module")  # under which training scripts put the state dict


def _from_file(path: Path) -> Source:
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"weights file {path} cannot be read as tensors alone ({type(error).__name__}); it is corrupt, or a "
            "pickle of other things, which is never run: save a state dict instead"
        ) from error
    if isinstance(state, Mapping):
        state = next((state[key] for key in _STATE_KEYS if key in state), state)
    if not (isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())):
        raise ValueError(f"weights file {path} holds no state dict (a mapping of names to tensors)")
    return Source(_plain(state))


def _from_safetensors(path: Path) -> Source:
    saved = read_metadata(path)
    from safetensors.torch import load_file

    preprocess = saved.get("preprocess")
    if preprocess:
        preprocess = Preprocess(**{k: tuple(v) if isinstance(v, list) else v for k, v in preprocess.items()})
    facts = facts_of(skeleton(saved)) if "model" in saved else {}
    return Source(_plain(load_file(path)), preprocess, facts)


def skeleton(saved: Mapping[str, Any]) -> nn.Module:
    """The model that a file's header describes, without numbers: on the meta device."""
    with torch.device("meta"):
        return restore_forms(build_model(saved["model"], saved["model_args"]), saved)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What :func:`vitcourse.save_weights` wrote beside the tensors; empty for a file of another origin.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or a truncated one.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("vitcourse", "{}"))
    except SafetensorError as error:
        raise ValueError(f"weights file {path} is corrupt ({error}); download or train it again") from error
