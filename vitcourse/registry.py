"""Models by name: how each is built, and how its images are prepared."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple, get_args

from torch import nn

# What list_models imports; a new model family is named here.
MODEL_MODULES = ("vit", "hierarchical", "hybrid", "video", "pretraining.models", "dense_prediction.models")
# Who changes the form of a model, by the key under which a file keeps the new form; imported when a file has one.
FORM_MODULES = {"structure": "hardware.prune", "quantization": "hardware.quantize", "adapters": "finetuning"}


@dataclass(frozen=True)
class Preprocess:
    """How the images were prepared that a model was trained on; feed it others and it will be wrong, silently.

    ``vitcourse.data.eval_transform(**asdict(model.preprocess))`` does the same to new images.

    Attributes:
        img_size: side of the square image in pixels, or (height, width).
        mean, std: per channel, on a scale where white is 1.
        interpolation: how images are resized.
        crop_pct: the part of the resized image's side that the centre crop keeps.
    """

    img_size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    def for_model(self, model: nn.Module) -> "Preprocess":
        """The same for the size and channels that ``model`` takes.

        Grey images get the mean of the channels' values; more channels than there are values begin with them anew, as
        the filters do that :func:`vitcourse.load_weights` makes for them.
        """
        size = getattr(model, "img_size", self.img_size)
        if not isinstance(size, int) and size[0] == size[1]:
            size = size[0]
        channels = getattr(model, "in_chans", len(self.mean))
        return replace(
            self,
            img_size=size if isinstance(size, int) else tuple(size),
            mean=_per_channel(self.mean, channels),
            std=_per_channel(self.std, channels),
        )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if channels == 1 != len(values):
        return (round(sum(values) / len(values), 6),)
    return tuple(values[i % len(values)] for i in range(channels))


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., nn.Module]
    preprocess: Preprocess
    defaults: dict[str, Any]


class Form(NamedTuple):
    """What changes the layers of a model after it was built; see :func:`register_form`."""

    describe: Callable[[nn.Module], Any]
    restore: Callable[[nn.Module, Any], object]


_models: dict[str, _Entry] = {}
_forms: dict[str, Form] = {}


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


def register_form(key: str, describe: Callable[[nn.Module], Any], restore: Callable[[nn.Module, Any], object]) -> None:
    """Make files remember a change of a model's layers, such as pruning.

    Args:
        key: where a file keeps it; models that were changed have an attribute of this name.
        describe: called with such a model; what it returns is kept, as JSON can hold it.
        restore: called with a model as it was built, and with what was kept: changes the model in place.
    """
    _forms[key] = Form(describe, restore)


def forms_of(model: nn.Module) -> dict[str, Any]:
    """What :func:`restore_forms` needs to change a newly built model as ``model`` was changed."""
    return {key: form.describe(model) for key, form in _forms.items() if hasattr(model, key)}


def restore_forms(model: nn.Module, saved: Mapping[str, Any]) -> nn.Module:
    """Change a newly built ``model``, in place, as what is ``saved`` says, pruning before quantization."""
    for key, module in FORM_MODULES.items():
        if key in saved:
            import_module(f"vitcourse.{module}")
            _forms[key].restore(model, saved[key])
    return model


def _registered() -> dict[str, _Entry]:
    for module in MODEL_MODULES:
        import_module(f"vitcourse.{module}")
    return _models


def list_models(pattern: str = "*") -> list[str]:
    """Names that :func:`vitcourse.create_model` knows, sorted; ``pattern`` is a shell wildcard.

    Without those that only files are built by, such as what pre-training keeps beside its encoder.

    >>> list_models("vit_base_patch16*")
    ['vit_base_patch16_224', 'vit_base_patch16_384']
    """
    names = [name for name, entry in _registered().items() if not _missing(entry, {})]
    return sorted(fnmatch.filter(names, pattern))


def build_model(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A model by name, with its initial weights; ``model.name`` and ``model.model_args`` say how it was built.

    ``model.classes``, the classes' names, is None: nobody has trained it yet.

    Raises:
        ValueError: an unknown name, with the nearest ones; see also the model's class.
        TypeError: an argument that the model does not have, with the nearest; or one that it needs is missing.
    """
    models = _registered()
    if name not in models:
        raise ValueError(f"model {name!r} is unknown{nearest(name, models)}; vitcourse.list_models() names all")
    entry = models[name]
    _check_arguments(name, entry, arguments)
    model = entry.build(**{**entry.defaults, **arguments})
    model.name, model.model_args, model.classes = name, dict(arguments), None
    # What is made of another model prepares its images as that one does.
    preprocess = getattr(model, "preprocess", None) or entry.preprocess
    channels = getattr(model, "in_chans", len(preprocess.mean))
    if channels != len(preprocess.mean):  # nobody has trained it yet
        preprocess = replace(preprocess, mean=(0.5,) * channels, std=(0.5,) * channels)
    model.preprocess = preprocess.for_model(model)
    return model


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known ones most like it, if any are."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Modules and parameters that depend on the classes, the ones that ``reset_classifier`` makes anew.

    Models say so, those of timm in their ``pretrained_cfg``; a model that does not has all of it in ``head``.
    """
    told = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or getattr(model, "head_names", "head")
    return (told,) if isinstance(told, str) else tuple(told)


def in_head(model: nn.Module, name: str) -> bool:
    """Whether a parameter of that name depends on the classes; see :func:`head_names`."""
    return any(is_within(name, head) for head in head_names(model))


def is_within(name: str, prefix: str) -> bool:
    """Whether a dotted name is that of a part, or of something in it.

    >>> is_within("head.fc.weight", "head"), is_within("head_drop", "head")
    (True, False)
    """
    return f"{name}.".startswith(f"{prefix}.")


def takes_argument(name: str, argument: str) -> bool:
    """Whether a model of this name can be built with an argument of that one."""
    parameters = inspect.signature(_registered()[name].build).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _check_arguments(name: str, entry: _Entry, arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(entry.build).parameters
    for argument, value in arguments.items():
        if not takes_argument(name, argument):
            raise TypeError(f"model {name!r} has no argument {argument!r}{nearest(argument, parameters)}")
        kind = parameters[argument].annotation if argument in parameters else Any
        if isinstance(value, str) and not _admits_text(kind):  # as a slip on the command line leaves it
            wanted = inspect.formatannotation(kind).replace("collections.abc.", "")
            raise TypeError(f"argument {argument!r} of model {name!r} must be {wanted}, got {value!r}")
    if missing := _missing(entry, arguments):
        raise TypeError(f"model {name!r} needs {', '.join(missing)}; create_model(FILE) has them from the file")


def _missing(entry: _Entry, arguments: Mapping[str, Any]) -> list[str]:
    """The arguments that a model cannot be built without, and that nobody gives."""
    parameters, given = inspect.signature(entry.build).parameters.values(), {*entry.defaults, *arguments}
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in needed if p.name not in given]


def _admits_text(kind: Any) -> bool:
    """Whether a string is what an annotation asks for, or may be: not every annotation says."""
    kinds = (kind, *get_args(kind))
    return kind in (Any, inspect.Parameter.empty) or any(k is str or isinstance(k, str) for k in kinds)
