"""A pretend accelerator, for a dress rehearsal where there is none.

``install()`` registers a device "pretend" through PyTorch's ``PrivateUse1``. Its tensors say that they lie there, are
computed on the CPU, and refuse to meet tensors of the CPU, to be drawn by its generators, or to be seen by NumPy: as on
CUDA. ``install(float64=False)`` refuses double precision as well, as Apple's GPUs do. PyTorch calls it this machine's
accelerator, so `vitcourse.devices` finds it without being told.

It changes PyTorch for the whole process, and cannot be taken back: use it in a process of its own, before `vitcourse`
is imported. What it proves, and what not, says CONTRIBUTING.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_float64 = True


class _Module:
    """What ``torch.pretend`` offers, as ``torch.cuda`` does."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def get_device_name(self, device: Any = None) -> str:
        return "a pretend accelerator"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self.generator.set_state(state)


class Pretend(Tensor):
    """A tensor "on the device", around one on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "Pretend":
        if not _float64 and raw.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{NAME} has no float64; use float32 instead")
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        self = Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, device=f"{NAME}:0", **layout)
        self.raw = raw
        return self

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _compute(operator, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return Pretend(self.raw.detach())

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)
        self.raw = value.raw

    def tolist(self) -> list:
        return self.raw.tolist()

    def numpy(self, **_: Any) -> None:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> None:
        self.numpy()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.raw.__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"{self.raw!r} on {NAME}"


# ----------------------------------------------------------------------------------------------------- one operation

_BETWEEN_DEVICES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
_INDICES_ANYWHERE = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class _Operator:
    """What has to be known of an operator; asking PyTorch for it at every call would take longer than computing."""

    def __init__(self, operator: Any) -> None:
        schema = operator._schema
        self.name, self.mutable = schema.name, schema.is_mutable
        self.reads_number = self.name in ("aten::_local_scalar_dense", "aten::item")
        self.makes_views = any(result.alias_info is not None for result in schema.returns)
        self.random = torch.Tag.nondeterministic_seeded in operator.tags
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        composite = (has(self.name, key) for key in ("CompositeExplicitAutograd", "CompositeImplicitAutograd"))
        # torchvision has its own (nms, roi_align) for CUDA and for Apple's GPUs, in builds for these.
        self.exists = operator.namespace in ("aten", "prims", "prim", "torchvision") or any(composite)


_operators: dict[Any, _Operator] = {}


def _compute(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the device does with one operation: look who meets whom, compute on the CPU, hand back what is its own."""
    known = _operators.get(operator) or _operators.setdefault(operator, _Operator(operator))
    if known.reads_number:
        return operator(args[0].raw)
    target, tensors = kwargs.get("device"), _tensors((args, tuple(kwargs.values())))
    involved = any(isinstance(t, Pretend) for t in tensors)
    on_device = _here(target) or (involved and target is None)
    if involved and known.name not in _BETWEEN_DEVICES:
        _refuse_strangers(known, args, tensors)
    generator = kwargs.get("generator")
    if on_device and generator is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")

    raw_args, raw_kwargs = _map(_raw, args), {name: _map(_raw, value) for name, value in kwargs.items()}
    if target is not None:
        raw_kwargs["device"] = torch.device("cpu")
    raw_kwargs.pop("pin_memory", None)
    with torch.no_grad(), _own_numbers(on_device and known.random):
        out = operator(*raw_args, **raw_kwargs)

    if target is not None and not _here(target):  # away from the device: never the device's own memory
        inside = {id(t) for t in _tensors((raw_args, tuple(raw_kwargs.values())))}
        return _map(lambda t: t.clone() if id(t) in inside else t, out)
    if known.name == "aten::copy_":
        return args[0]
    if known.mutable:  # hand back the very tensors that came in
        given = {id(_raw(t)): t for t in tensors}
        return _map(lambda t: given[id(t)] if id(t) in given else _wrap(t, on_device), out)
    wrapped = _map(lambda t: _wrap(t, on_device), out)
    return return_and_correct_aliasing(operator, args, kwargs, wrapped) if involved and known.makes_views else wrapped


def _here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _raw(tensor: Tensor) -> Tensor:
    return tensor.raw if isinstance(tensor, Pretend) else tensor


def _wrap(tensor: Tensor, on_device: bool) -> Tensor:
    return Pretend(tensor) if on_device and not isinstance(tensor, Pretend) else tensor


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for part in tree for tensor in _tensors(part)] if isinstance(tree, (tuple, list)) else []


def _map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    return type(tree)(_map(function, part) for part in tree) if type(tree) in (tuple, list) else tree


def _refuse_strangers(known: _Operator, args: tuple, tensors: list[Tensor]) -> None:
    """Tensors of the CPU may be numbers only, or indices into a tensor of the device."""
    if known.name in _INDICES_ANYWHERE:
        indices = [] if isinstance(args[0], Pretend) else args[1]
        tensors = _tensors((args[0], args[2:], indices))
    for tensor in tensors:
        written_to = known.mutable and tensor is args[0]
        if not isinstance(tensor, Pretend) and (tensor.dim() > 0 or written_to):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:0 and {tensor.device}! ({known.name}, the latter of shape {tuple(tensor.shape)})"
            )
    if not known.exists:
        raise NotImplementedError(f"Could not run '{known.name}' with arguments from the '{NAME}' backend.")


class _own_numbers:
    """Random numbers of the device come from a generator of its own: the CPU's default one, for the time of a call."""

    def __init__(self, wanted: bool) -> None:
        self.generator = torch.pretend.generator if wanted else None

    def __enter__(self) -> None:
        if self.generator is not None:
            self.kept = torch.default_generator.get_state()
            torch.default_generator.set_state(self.generator.get_state())

    def __exit__(self, *_: Any) -> None:
        if self.generator is not None:
            self.generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(self.kept)


# ---------------------------------------------------------------------------------------------------------- PyTorch


def install(float64: bool = True) -> torch.device:
    """Make PyTorch know the device, once a process; without ``float64`` it has none, like Apple's GPUs."""
    global _float64
    _float64 = float64
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library.fallback(_fallback, "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast is allowed, and casts nothing
    # Functions that fill an `out` which they resize; that, a wrapper cannot have done to itself.
    for name in (
        "tensor",
        "as_tensor",
        "arange",
        "linspace",
        "logspace",
        "eye",
        "tril_indices",
        "triu_indices",
        "randperm",
    ):
        setattr(torch, name, _by_way_of_the_cpu(getattr(torch, name)))
    Tensor.new_tensor = lambda self, data, *, dtype=None, device=None, **options: torch.tensor(
        data, dtype=dtype or self.dtype, device=device or self.device, **options
    )
    torch.inference_mode = _no_grad_instead
    F.scaled_dot_product_attention = _fused(F.scaled_dot_product_attention)
    torch.accelerator.synchronize = lambda device=None: None  # every call is over when it returns
    _run_triton_on_the_device()
    return torch.device(NAME)


library = torch.library.Library("_", "IMPL")


def _fallback(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Operations without a tensor of ours among their inputs, such as ``zeros(device="pretend")``."""
    return _compute(operator, args, kwargs)


def _by_way_of_the_cpu(make: Callable) -> Callable:
    @wraps(make)
    def made(*args: Any, device: Any = None, requires_grad: bool = False, **options: Any) -> Tensor:
        if not _here(device):
            options |= {} if device is None else {"device": device}
            return make(*args, **options, **({"requires_grad": True} if requires_grad else {}))
        return make(*args, **options).to(device).requires_grad_(requires_grad)

    return made


def _fused(attend: Callable) -> Callable:
    """Without a gradient, attention is one operation, as on other devices; PyTorch would take it apart for ours."""

    @wraps(attend)
    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        given = (query, key, value, *args)
        tensors = _tensors((given, tuple(options.values())))
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if trained or not any(isinstance(tensor, Pretend) for tensor in tensors):
            return attend(*given, **options)
        return _compute(torch.ops.aten.scaled_dot_product_attention.default, given, options)

    return attention


class _no_grad_instead(torch.no_grad):
    """For ``inference_mode``, whose tensors have no version that a wrapper could share."""

    def __new__(cls, mode: Any = True) -> Any:
        if not isinstance(mode, bool):
            return torch.no_grad()(mode)
        return torch.no_grad() if mode else torch.enable_grad()


def _run_triton_on_the_device() -> None:
    """The device's programs are interpreted. The interpreter looks for memory, which a wrapper does not have."""
    from triton.runtime import interpreter

    call = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, *_map(_raw, args), **{name: _map(_raw, value) for name, value in kwargs.items()})

    interpreter.GridExecutor.__call__ = launch
