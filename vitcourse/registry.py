"""Models by name, and weights from timm, torchvision or a file."""

import difflib
import fnmatch
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

MODEL_MODULES = ("vit", "hierarchical", "hybrid")  # what list_models imports; a new model family is named here


@dataclass(frozen=True)
class Preprocess:
    """How the images were prepared that a model was trained on; feed it others and it will be wrong, silently.

    ``vitcourse.data.eval_transform(**asdict(model.preprocess))`` does the same to new images.

    Attributes:
        img_size: side of the square image in pixels.
        mean, std: per channel, on a scale where white is 1.
        interpolation: how images are resized.
        crop_pct: the part of the resized image's side that the centre crop keeps.
    """

    img_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., nn.Module]
    preprocess: Preprocess
    defaults: dict[str, Any]


_models: dict[str, _Entry] = {}


def register_model(
    name: str, build: Callable[..., nn.Module], preprocess: Preprocess | None = None, **defaults: Any
) -> None:
    """Make ``create_model(name)`` return ``build(**defaults)``.

    Args:
        name: what the model is called.
        build: the model's class, or a function that returns one.
        preprocess: how the images for it are prepared; ImageNet's mean and std at 224 pixels by default.
        defaults: arguments of ``build``, which callers of ``create_model`` may override.

    Raises:
        ValueError: the name is taken.
    """
    if name in _models:
        raise ValueError(f"a model named {name!r} is registered already")
    _models[name] = _Entry(build, preprocess or Preprocess(), defaults)


def _registered() -> dict[str, _Entry]:
    for module in MODEL_MODULES:
        import_module(f"vitcourse.{module}")
    return _models


def list_models(pattern: str = "*") -> list[str]:
    """Names that :func:`create_model` knows, sorted; ``pattern`` is a shell wildcard.

    >>> list_models("vit_base_patch16*")
    ['vit_base_patch16_224', 'vit_base_patch16_384']
    """
    return sorted(fnmatch.filter(_registered(), pattern))


def create_model(
    name: str, *, weights: str | Path | Mapping[str, Tensor] | nn.Module | None = None, **overrides: Any
) -> nn.Module:
    """Build a model by name, or rebuild one from a file that :func:`save_weights` wrote, be it pruned or quantized.

    Args:
        name: one of :func:`list_models`, or the path of a ``.safetensors`` file written by this library.
        weights: what :func:`load_weights` takes. With ``num_classes`` given too, a checkpoint of another number of
            classes leaves the head untrained, and one line on stderr says so.
        overrides: arguments of the model's class (``num_classes``, ``img_size``, ``in_chans``, ``drop_path_rate``, …).

    Returns:
        the model; ``model.preprocess`` says how its images are prepared.

    Raises:
        ValueError: an unknown name, with the nearest ones; a file that does not say how its model is built, or another
            number of classes for a quantized one; see also the model's class and :func:`load_weights`.
        TypeError: an argument that the model does not have, with the nearest.

    >>> create_model("vit_tiny", img_size=32, patch_size=4, num_classes=10)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    new_head, saved = "num_classes" in overrides, {}
    if str(name).endswith(".safetensors"):
        if weights is not None:
            raise ValueError(
                f"{name} holds weights already; leave out the argument weights, or build the model by name"
            )
        saved = read_metadata(name)
        if "model" not in saved:
            raise ValueError(
                f"{name} does not say which model it is for; use create_model(model_name, weights={name!r})"
            )
        name, weights, overrides = saved["model"], name, {**saved["model_args"], **overrides}

    models = _registered()
    if name not in models:
        raise ValueError(f"model {name!r} is unknown{_nearest(name, models)}; vitcourse.list_models() names all")
    entry = models[name]
    _check_arguments(name, entry.build, overrides)
    model = entry.build(**{**entry.defaults, **overrides})
    model.name, model.model_args = name, dict(overrides)
    model.preprocess = _fit_preprocess(entry.preprocess, model)
    _reshape(model, saved, weights)
    if weights is not None:
        load_weights(model, weights, new_head=new_head)
    return model


def _reshape(model: nn.Module, saved: Mapping[str, Any], path: Any) -> None:
    """Give the model the form that pruning and quantization had given it before it was saved."""
    try:
        if "structure" in saved:
            from vitcourse.hardware.prune import prune_like

            prune_like(model, saved["structure"])
        if "quantization" in saved:
            if getattr(model, "num_classes", None) != saved["model_args"].get("num_classes"):
                raise ValueError(
                    "quantized models are not trained for other classes; train the real one, then quantize"
                )
            from vitcourse.hardware.quantize import quantize_like

            quantize_like(model, saved["quantization"])
    except ValueError as error:
        raise ValueError(f"{path} cannot be rebuilt: {error}") from error


def _nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _check_arguments(name: str, build: Callable[..., nn.Module], overrides: dict[str, Any]) -> None:
    parameters = inspect.signature(build).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for argument in overrides:
        if argument not in parameters:
            raise TypeError(f"model {name!r} has no argument {argument!r}{_nearest(argument, list(parameters))}")


def _fit_preprocess(preprocess: Preprocess, model: nn.Module) -> Preprocess:
    """Bring size and channels in line with what the model was built for."""
    side = max(getattr(model, "img_size", (preprocess.img_size,)))
    channels = getattr(model, "in_chans", len(preprocess.mean))
    if channels != len(preprocess.mean):
        preprocess = replace(preprocess, mean=(0.5,) * channels, std=(0.5,) * channels)
    return replace(preprocess, img_size=side)


# --------------------------------------------------------------------------------------------------------- weights


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor] | nn.Module,
    *,
    strict: bool = True,
    new_head: bool = False,
) -> nn.Module:
    """Load weights into ``model``, in place, and with them the mean, std and size that they were trained with.

    Args:
        model: one of this library's models.
        source: ``"timm:NAME"`` or ``"torchvision:NAME[.WEIGHTS]"`` (downloads pretrained weights on first use), the
            path of a ``.safetensors`` file or of a ``.pth``/``.pt`` file (read with ``weights_only=True``), a state
            dict, or a model of timm or torchvision.
        strict: every parameter must find its tensor, and every tensor its parameter; otherwise one line on stderr says
            what did not.
        new_head: where the classes differ in number, keep the model's own, untrained head, and say so on stderr; for
            a model without a head, leave out that of the checkpoint.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown source; a corrupt file; parameters that are missing, left over or of another shape.
        FileNotFoundError: no such file.
        ImportError: timm or torchvision is needed and not installed.
    """
    state, preprocess = _read(source)
    adapt = getattr(model, "adapt_state_dict", None)
    state = adapt(dict(state)) if adapt else dict(state)
    own = model.state_dict()
    if new_head:
        state = _keep_head(state, own)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if reshaped or (strict and (missing or unexpected)):
        raise ValueError(_describe(source, model, own, state, missing, unexpected, sorted(reshaped)))
    if missing or unexpected:
        print(
            f"vitcourse: weights loaded in part; missing: {_some(missing)}; left over: {_some(unexpected)}",
            file=sys.stderr,
        )
    model.load_state_dict(state, strict=strict)
    if preprocess is not None:
        model.preprocess = preprocess
    return model


def _keep_head(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {k: v for k, v in state.items() if k in own or not k.startswith("head.")}
    heads = [k for k in own if k.startswith("head.") and (k not in state or state[k].shape != own[k].shape)]
    if heads:
        classes = next((state[k].shape[0] for k in heads if k in state), "no")
        wanted = own[heads[0]].shape[0]
        print(f"vitcourse: weights are for {classes} classes, not {wanted}: the head starts untrained", file=sys.stderr)
    return {**state, **{k: own[k] for k in heads}}


def _some(names: list[str]) -> str:
    return (", ".join(names[:4]) or "none") + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _describe(
    source: Any,
    model: nn.Module,
    own: dict[str, Tensor],
    state: dict[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    reshaped: list[str],
) -> str:
    what = str(source) if isinstance(source, (str, Path)) else type(source).__name__
    lines = [f"weights from {what} do not fit {getattr(model, 'name', type(model).__name__)}:"]
    if missing:
        lines.append(f"  missing: {_some(missing)}")
    if unexpected:
        lines.append(f"  not in the model: {_some(unexpected)}")
    shapes = [f"{k} is {tuple(state[k].shape)}, the model's {tuple(own[k].shape)}" for k in reshaped]
    if shapes:
        lines.append(f"  of another shape: {_some(shapes)}")
    if any(k.startswith("head.") for k in reshaped):
        lines.append("  for other classes and an untrained head: load_weights(…, new_head=True), or num_classes in")
        lines.append("  create_model(name, num_classes=…, weights=…)")
    if what.endswith(".safetensors") and read_metadata(what).keys() & {"structure", "quantization"}:
        lines.append("  the file holds a pruned or quantized model, which create_model(path) builds")
    return "\n".join(lines)


def _read(source: Any) -> tuple[Mapping[str, Tensor], Preprocess | None]:
    if isinstance(source, nn.Module):
        return source.state_dict(), _preprocess_of(source)
    if isinstance(source, Mapping):
        return source, None
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


def _preprocess_of(module: nn.Module) -> Preprocess | None:
    """What a model of ours or timm's carries along about its images."""
    if isinstance(getattr(module, "preprocess", None), Preprocess):
        return module.preprocess
    cfg = getattr(module, "pretrained_cfg", None)
    if not cfg:
        return None
    return Preprocess(
        img_size=cfg["input_size"][-1],
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg.get("interpolation", "bicubic"),
        crop_pct=cfg.get("crop_pct", 0.875),
    )


def _from_timm(name: str) -> tuple[Mapping[str, Tensor], Preprocess | None]:
    module = _peer("timm").create_model(name, pretrained=True)
    return module.state_dict(), _preprocess_of(module)


def _from_torchvision(name: str) -> tuple[Mapping[str, Tensor], Preprocess | None]:
    models = _peer("torchvision").models
    name, _, which = name.partition(".")
    try:
        weights = models.get_model_weights(name)[which or "DEFAULT"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"torchvision has no weights {name!r} {which!r}{_nearest(name, models.list_models())}"
        ) from error
    transform = weights.transforms()
    size, resize = transform.crop_size[0], transform.resize_size[0]
    preprocess = Preprocess(
        size, tuple(transform.mean), tuple(transform.std), transform.interpolation.value, round(size / resize, 4)
    )
    return weights.get_state_dict(progress=False, check_hash=True), preprocess


_HUBS: dict[str, Callable[[str], tuple[Mapping[str, Tensor], Preprocess | None]]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
}


def _peer(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"weights of {package} need the package: pip install {package}") from error


def _from_file(path: Path) -> tuple[Mapping[str, Tensor], Preprocess | None]:
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    if path.suffix != ".safetensors":
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"weights file {path} cannot be read as tensors alone ({type(error).__name__}); it is corrupt, or a "
                "pickle of other things, which is never run: save a state dict instead"
            ) from error
        if isinstance(state, Mapping):
            state = state.get("state_dict", state.get("model", state))
        if not (isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())):
            raise ValueError(f"weights file {path} holds no state dict (a mapping of names to tensors)")
        return state, None
    saved = read_metadata(path)
    from safetensors.torch import load_file

    preprocess = saved.get("preprocess")
    if preprocess:
        preprocess = Preprocess(**{k: tuple(v) if isinstance(v, list) else v for k, v in preprocess.items()})
    return load_file(path), preprocess


def save_weights(model: nn.Module, path: str | Path, *, half: bool = False, **metadata: Any) -> None:
    """Write a model's weights to a safetensors file that :func:`create_model` can rebuild the model from.

    Args:
        model: built by :func:`create_model`; its name, arguments and ``preprocess`` go into the file's header, and so
            does how it was pruned and quantized.
        path: where to; replaced in one step, so that a crash leaves the old file or the new one.
        half: store floating-point tensors as float16, at half the size.
        metadata: anything else worth keeping beside them (accuracy, command, seed), as JSON can hold it.
    """
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous() for k, v in tensors_to_save(model).items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    if hasattr(model, "name"):
        metadata = {**_recipe(model), **metadata}
    if isinstance(getattr(model, "preprocess", None), Preprocess):
        metadata = {"preprocess": asdict(model.preprocess), **metadata}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode  # as the umask has it; safetensors may put a file of its own in its place
    save_file(state, partial, metadata={"format": "pt", "vitcourse": json.dumps(metadata)})
    partial.chmod(mode)
    partial.replace(path)


def tensors_to_save(model: nn.Module) -> dict[str, Tensor]:
    """The state dict; in float16 what modules list in ``half_in_files``, where nothing is lost by it."""
    modules = model.named_modules(remove_duplicate=False)
    halves = {f"{path}.{name}".lstrip(".") for path, m in modules for name in getattr(m, "half_in_files", ())}
    state = _plain_state(model) if hasattr(model, "name") else model.state_dict()
    return {k: _half_if_exact(v) if k in halves else v for k, v in state.items()}


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of what create_model builds: zeros that ``magnitude_prune`` holds are in the weights."""
    state = model.state_dict()
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module.parametrizations if is_parametrized(module) else ():
            held = f"{path}.parametrizations.{name}."
            state = {k: v for k, v in state.items() if not k.startswith(held)}
            state[f"{path}.{name}"] = getattr(module, name).detach()
    return state


def _half_if_exact(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor


def _recipe(model: nn.Module) -> dict[str, Any]:
    """What create_model needs to build ``model`` again, its present head, and what pruning and quantization did."""
    arguments = dict(model.model_args)
    if hasattr(model, "num_classes"):
        arguments["num_classes"] = model.num_classes
    try:
        json.dumps(arguments)
    except TypeError:  # a class, such as attn_layer
        print(
            f"vitcourse: {model.name} was built with arguments no file can hold ({', '.join(model.model_args)}); "
            "its weights are saved alone: build the model in code, then load_weights",
            file=sys.stderr,
        )
        return {}
    made = {key: getattr(model, key) for key in ("structure", "quantization") if hasattr(model, key)}
    return {"model": model.name, "model_args": arguments, **made}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What :func:`save_weights` wrote beside the tensors; empty for a file of another origin.

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
