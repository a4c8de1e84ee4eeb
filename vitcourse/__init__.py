"""vitcourse: Vision Transformers from scratch, as a course and as a library.

>>> import vitcourse
>>> model = vitcourse.create_model("vit_tiny_patch16_224", num_classes=10)
>>> model.num_prefix_tokens
1
"""

from importlib import import_module
from typing import Any

from .startup import before_torch

__version__ = "0.1.0"

_EXPORTS = {
    "create_model": "factory",
    "list_models": "registry",
    "load_weights": "weights",
    "predict": "inference",
    "register_model": "registry",
    "save_weights": "weights",
    "VisionTransformer": "vit",
}
__all__ = [*_EXPORTS]

before_torch()


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``import vitcourse`` stays light."""
    if name in _EXPORTS:
        return getattr(import_module(f"vitcourse.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'vitcourse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
