"""Making Vision Transformers fit the hardware: FlashAttention in Triton, quantization, pruning.

Each part is imported on first use: `flash` needs Triton only where a kernel runs.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "flash_attention": "flash",
    "flash_attention_qkvpacked": "flash",
    "quantize_model": "quantize",
    "prune_model": "prune",
}
__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"vitcourse.hardware.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'vitcourse.hardware' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
