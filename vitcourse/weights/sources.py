"""Where weights come from: a hub, a file, a model, and what else these tell beside the tensors."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitcourse.devices import kept_random_state
from vitcourse.registry import Preprocess, build_model, nearest, restore_forms

from . import huggingface
from .facts import Facts, facts_of
from .wrappers import plain_name, plain_state, unwrap


@dataclass
class Source:
    """A checkpoint: its tensors, how its images were prepared, and what is known of the model that it is of.

    Attributes:
        of: which of our models it is for, where that is known; for messages.
    """

    state: dict[str, Tensor]
    preprocess: Preprocess | None = None
    facts: Facts = field(default_factory=dict)
    of: str = ""


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
        return _plain(_state_in(source, "the mapping"))
    text = str(source)
    library, _, name = text.partition(":")
    if library in _HUBS and name:
        return _HUBS[library](name)
    if text.lower().endswith((".safetensors", *_PICKLES)):
        return _from_file(Path(text).expanduser())
    raise ValueError(
        f"weights source {text!r} is unknown; use 'timm:NAME', 'torchvision:NAME', 'hf:NAME', the path of a "
        f".safetensors, {', '.join(_PICKLES)} file, a state dict or a model"
    )


def _of_module(module: nn.Module) -> Source:
    if huggingface.family_of(state := plain_state(module)):
        return _of_transformers(state, module.config.to_dict() if hasattr(module, "config") else None)
    return Source(plain_state(module), _preprocess_of(module), facts_of(module))


def _preprocess_of(module: nn.Module) -> Preprocess | None:
    """What a model of ours or timm's carries along about its images."""
    if isinstance(getattr(module, "preprocess", None), Preprocess):
        return module.preprocess
    cfg = getattr(module, "pretrained_cfg", None)
    if not cfg or not {"input_size", "mean", "std"} <= cfg.keys():
        return None
    return Preprocess(
        img_size=tuple(cfg["input_size"][-2:]),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg.get("interpolation", "bicubic"),
        crop_pct=cfg.get("crop_pct", 0.875),
    )


def _from_timm(name: str) -> Source:
    timm = _peer("timm")
    try:
        return _of_module(timm.create_model(name, pretrained=True))
    except RuntimeError as error:  # an unknown model or tag, or one without weights
        known = [] if name in timm.list_models() else timm.list_models(pretrained=True)
        raise ValueError(f"timm has no weights {name!r}: {error}{nearest(name, known)}") from error


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
    state = weights.get_state_dict(progress=False, check_hash=True)
    return Source(_state_in(state, f"torchvision's {name}"), preprocess, {"img_size": (size, size)})


def _from_hugging_face(name: str) -> Source:
    state, config, preprocess = huggingface.read_files(name, huggingface.fetcher(name))
    return _of_transformers(_state_in(state, f"hf:{name}"), config, preprocess)


def _of_transformers(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None, preprocess: Preprocess | None = None
) -> Source:
    facts = huggingface.facts_of_config(config, any("classifier." in name for name in state)) if config else {}
    translated, left_out = huggingface.translate(state)
    if left_out:
        print(f"vitcourse: left out of the weights, as parts of another task: {', '.join(left_out)}", file=sys.stderr)
    family = huggingface.family_of(state)
    return Source(translated, preprocess, facts, family.ours if family else "")


def _plain(state: dict[str, Tensor], preprocess: Preprocess | None = None, facts: Facts | None = None) -> Source:
    """A checkpoint of which no more is known, be it in transformers' names."""
    known = huggingface.family_of(state)
    return _of_transformers(state, None) if known else Source(state, preprocess, facts or {})


_HUBS: dict[str, Callable[[str], Source]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "hf": _from_hugging_face,
}


def _peer(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"weights of {package} need the package: pip install {package}") from error


# ------------------------------------------------------------------------------------------------------------- files

_PICKLES = (".pth", ".pt", ".pth.tar", ".pyth", ".ckpt", ".bin")
# Under which training scripts put the state dict. A running mean is what they evaluate, and what timm takes too.
_STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "model_state", "module")


def _from_file(path: Path) -> Source:
    if path.suffix.lower() == ".safetensors":
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
    return _plain(_state_in(state, f"weights file {path}"))


def _state_in(content: Any, what: str) -> dict[str, Tensor]:
    """The state dict that a checkpoint is, or holds under one of the usual keys.

    Raises:
        ValueError: there is none.
    """
    state = content
    if isinstance(content, Mapping):
        found = [key for key in _STATE_KEYS if isinstance(content.get(key), Mapping)]
        state = content[found[0]] if found else content
        if len(found) > 1:
            print(f"vitcourse: {what} holds {' and '.join(found)}; taking {found[0]}", file=sys.stderr)
    if not (isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())):
        keys = f"; it has {', '.join(map(str, list(content)[:6]))}" if isinstance(content, Mapping) else ""
        raise ValueError(
            f"{what} holds no state dict (a mapping of names to tensors){keys}: load it, and give the part"
        )
    averaged = "n_averaged" in state  # the count of torch's AveragedModel, beside its model
    return {plain_name(name): tensor for name, tensor in state.items() if not (averaged and name == "n_averaged")}


def _from_safetensors(path: Path) -> Source:
    saved = read_metadata(path)
    from safetensors.torch import load_file

    preprocess, facts = saved.get("preprocess"), {}
    if preprocess:
        preprocess = Preprocess(**{k: tuple(v) if isinstance(v, list) else v for k, v in preprocess.items()})
    if "model" in saved:
        try:
            facts = facts_of(skeleton(saved))
        except (TypeError, ValueError) as error:
            print(f"vitcourse: what {path} says of its model cannot be compared: {error}", file=sys.stderr)
    return _plain(_state_in(load_file(path), f"weights file {path}"), preprocess, facts)


def skeleton(saved: Mapping[str, Any]) -> nn.Module:
    """The model that a file's header describes, its numbers left out (meta device) where its class can do without."""

    def build() -> nn.Module:
        return restore_forms(build_model(saved["model"], saved["model_args"]), saved)

    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError):  # a class that computes with tensors while it is built
        with kept_random_state():
            return build()


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
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"weights file {path} is corrupt ({error}); download or train it again") from error
