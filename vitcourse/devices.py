"""On what device? One answer for the whole library, and the few things in which devices differ.

The engine, the graders, ``course.setup``, the command line and the benchmarks ask here, and nowhere else.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_session: torch.device | None = None  # what `use_device` chose


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device that is asked for.

    ``"auto"`` is the session's, if :func:`use_device` chose one (in a notebook ``course.setup`` does); else what the
    environment variable VITCOURSE_DEVICE names; else the accelerator that PyTorch finds here (CUDA, Apple's MPS, …);
    else the CPU.

    Raises:
        ValueError: there is no such device, at all or here.

    >>> resolve_device("cpu")
    device(type='cpu')
    >>> resolve_device("gpu")
    Traceback (most recent call last):
    ...
    ValueError: device 'gpu' is unknown; use auto, cuda, mps or cpu (a `device` argument or VITCOURSE_DEVICE chooses)
    """
    return _session if str(name) == "auto" and _session is not None else _resolve(name)


def use_device(name: str | torch.device | None = None) -> torch.device:
    """Choose what ``"auto"`` means from now on, in this process; without a name, it is decided afresh.

    Raises:
        ValueError: as :func:`resolve_device`.
    """
    global _session
    _session = _resolve("auto" if name is None else name)
    return _session


def _resolve(name: str | torch.device) -> torch.device:
    what = "device"
    if str(name) == "auto":
        what, name = "VITCOURSE_DEVICE", os.environ.get("VITCOURSE_DEVICE") or "auto"
    if str(name) == "auto":
        return accelerator() or torch.device("cpu")
    chosen_by = "(a `device` argument or VITCOURSE_DEVICE chooses)"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"{what} {str(name)!r} is unknown; use auto, cuda, mps or cpu {chosen_by}") from None
    count = _count(device.type)
    if (device.index or 0) >= count:
        here = f"this machine has {count} of them, counted from 0" if count else "use auto or cpu"
        raise ValueError(f"{what} {str(name)!r} is not available here; {here} {chosen_by}")
    return device


def _count(kind: str) -> int:
    """How many devices of a kind there are here."""
    if kind == "cpu":
        return 1
    with contextlib.suppress(RuntimeError, AttributeError):  # no such module, or one that cannot count
        return torch.get_device_module(kind).device_count()
    return 0


@cache
def accelerator() -> torch.device | None:
    """What this machine has beside its CPU, of any maker; None without."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else torch.device(found.type)


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model's numbers lie, by its first parameter or buffer; None for one that has neither."""
    return next((tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors), None)


def describe_device(device: torch.device) -> str:
    """What the device calls itself.

    >>> describe_device(torch.device("cpu"))
    'the CPU'
    """
    if device.type == "cpu":
        return "the CPU"
    name = getattr(torch.get_device_module(device), "get_device_name", None)  # Apple's has none
    return name(device) if name else str(device)


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply ``function`` to the tensors of nested tuples, lists and dicts; everything else stays.

    >>> map_tensors({"boxes": [torch.ones(2), torch.ones(3)], "name": "a"}, len)
    {'boxes': [2, 3], 'name': 'a'}
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(value, function) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree


# ----------------------------------------------------------------------------------------------- what devices differ in


def half_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit type to compute in: bfloat16 where the chip has it (compute capability 8), float16 elsewhere.

    ``torch.cuda.is_bf16_supported()`` does not tell: it also says yes where bfloat16 is emulated, slowly.
    """
    native = device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
    return torch.bfloat16 if native else torch.float16


def has_float64(device: torch.device) -> bool:
    """Whether there is double precision: not on Apple's GPUs, nor on some of Intel's."""
    return device.type in ("cpu", "cuda", "meta") or _makes_float64(device)


@cache
def _makes_float64(device: torch.device) -> bool:
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


# A compiled graph takes the answer as a constant. (As the decorator torch.compiler.assume_constant_result says, which
# imports the whole compiler.)
has_float64._dynamo_marked_constant = True


def widest_float(device: torch.device | None) -> torch.dtype:
    """float64, or float32 where a device has no more."""
    return torch.float64 if device is None or has_float64(device) else torch.float32


# ------------------------------------------------------------------------------------------------------- random numbers


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Give PyTorch's own generators back as they were, the CPU's and the accelerator's."""
    module = _in_use()
    indices = range(module.device_count()) if module else ()
    states = [module.get_rng_state(i) for i in indices]
    with torch.random.fork_rng(devices=()):
        try:
            yield
        finally:
            for i, state in zip(indices, states, strict=True):
                module.set_rng_state(state, i)


def seed_all(seed: int) -> None:
    """Seed PyTorch's own generators, those that :func:`kept_random_state` gives back.

    ``torch.manual_seed`` would seed a GPU also that nobody has used yet, later, when its state cannot be kept any more.
    """
    torch.default_generator.manual_seed(seed)
    if module := _in_use():
        getattr(module, "manual_seed_all", module.manual_seed)(seed)


def _in_use() -> ModuleType | None:
    """The module of the accelerator; None without one, or while nothing has been computed on it."""
    device = accelerator()
    module = torch.get_device_module(device) if device else None
    return module if module and getattr(module, "is_initialized", lambda: True)() else None
