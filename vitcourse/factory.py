"""`create_model`: a model by name or from a file, ready to use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitcourse.registry import build_model, restore_forms
from vitcourse.weights import load_weights, read_metadata


def create_model(
    name: str | Path, *, weights: str | Path | Mapping[str, Tensor] | nn.Module | None = None, **overrides: Any
) -> nn.Module:
    """Build a model by name, or rebuild one from a file of :func:`vitcourse.save_weights`, be it pruned or quantized.

    Args:
        name: one of :func:`vitcourse.list_models`, or the path of a ``.safetensors`` file written by this library.
        weights: what :func:`vitcourse.load_weights` takes. With ``num_classes`` given too, a checkpoint of another
            number of classes leaves the head untrained, and one line on stderr says so.
        overrides: arguments of the model's class (``num_classes``, ``img_size``, ``in_chans``, ``drop_path_rate``, …).

    Returns:
        the model; ``model.preprocess`` says how its images are prepared: mean, std, interpolation and crop as the
        weights were trained with, at the size that the model was built for. ``model.classes`` has the names of the
        classes, if a file says them and the head is still the one that it was saved with; else it is None.

    Raises:
        ValueError: an unknown name, with the nearest ones; a file that does not say how its model is built, or another
            number of classes for a quantized one; see also the model's class and :func:`vitcourse.load_weights`.
        TypeError: an argument that the model does not have, with the nearest.

    >>> import torch
    >>> create_model("vit_tiny", img_size=32, patch_size=4, num_classes=10)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    new_head = "num_classes" in overrides
    if not str(name).endswith(".safetensors"):
        model = build_model(str(name), overrides)
    elif weights is not None:
        raise ValueError(f"{name} holds weights already; leave out the argument weights, or build the model by name")
    else:
        model, weights = _from_file(name, overrides), name
    return model if weights is None else load_weights(model, weights, new_head=new_head)


def _from_file(path: str | Path, overrides: Mapping[str, Any]) -> nn.Module:
    """The model that a file was saved from, in the form that pruning and quantization had given it; weights untrained.

    Raises:
        ValueError: the file does not say how, or it cannot be done.
    """
    saved = read_metadata(path)
    if "adapter" in saved:
        raise ValueError(
            f"{path} holds what fine-tuning has changed, and not the model: build that, then "
            f"vitcourse.finetuning.load_adapter(model, {str(path)!r})"
        )
    if "model" not in saved:
        raise ValueError(
            f"{path} does not say which model it is for; use create_model(model_name, weights={str(path)!r})"
        )
    model = build_model(saved["model"], {**saved["model_args"], **overrides})
    try:
        was = {"num_classes": saved["model_args"].get("num_classes"), "in_chans": len(saved["preprocess"]["mean"])}
        for name, what in (("num_classes", "classes"), ("in_chans", "channels")) if "quantization" in saved else ():
            if getattr(model, name, was[name]) != was[name]:
                raise ValueError(
                    f"quantized models are not trained for other {what}; train the real one, then quantize"
                )
        classes = saved.get("classes")
        if classes and len(classes) == getattr(model, "num_classes", None):
            model.classes = list(classes)
        return restore_forms(model, saved)
    except ValueError as error:
        raise ValueError(f"{path} cannot be rebuilt: {error}") from error
