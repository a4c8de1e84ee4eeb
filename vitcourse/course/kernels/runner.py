"""The runner of checks whose answers are kernels: guarded buffers, launches in the worker, and the rules of storing."""

import inspect
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cases import Case
from ..running import (
    KernelFault,
    Outcome,
    OutOfBounds,
    TimeLimit,
    _frozen,
    isolated,
    leaves,
    map_tensors,
    named_inputs,
)
from .buffers import MARGIN, Buffer, Pointer, length, owned, padded
from .source import Source, source_of
from .worker import Crash, Failure, worker


class StrayRead(OutOfBounds):
    """A kernel reads outside the tensors that it was given."""


class NotStored(KernelFault):
    """Some values of the result are never written, or none of them is."""


class StoredAgain(KernelFault):
    """All values of the result are written, but some more than once."""


class LeftOut(KernelFault):
    """What a mask leaves out of a load comes into the result."""


class HalfSum(KernelFault):
    """A function adds up in half precision."""


class HalfCarried(KernelFault):
    """What a loop adds up from tile to tile goes through half precision."""


class ChangedType(KernelFault):
    """A loop changes the type or the shape of a variable, and no compiler takes that."""


class RoundedInputs(KernelFault):
    """A GPU would round the inputs of a product of float32."""


_FAULTS = (OutOfBounds, StrayRead, NotStored, StoredAgain, LeftOut, HalfSum, HalfCarried, ChangedType, RoundedInputs)


class KernelError(Exception):
    """What a kernel raised in the worker; a subclass carries the name of the original error."""

    __module__ = "builtins"


@cache
def _error_type(name: str) -> type[Exception]:
    known = {fault.__name__: fault for fault in _FAULTS}
    return known.get(name) or type(name, (KernelError,), {"__module__": "builtins"})


# ------------------------------------------------------------------------------------------------------------- buffers


class _Guard:
    """A tensor in a buffer of NaN, and how often each value there has been stored.

    The buffer is filled and looked at by NumPy: for so many small ones PyTorch would wake its threads each time.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.filler = _filler(dtype)
        filled = np.full(length(shape), self.filler).view(np.uint8)
        self.buffer = torch.from_numpy(filled).to(device).view(dtype)
        self.tensor = self.buffer[MARGIN:-MARGIN].view(padded(shape))[tuple(map(slice, shape))]
        self.stored: np.ndarray | None = np.zeros(len(self.buffer), dtype=np.int32)  # None: nobody counts

    @property
    def bytes(self) -> np.ndarray:
        """The memory of the buffer itself, where that is on a CPU, or else a copy."""
        return self.buffer.view(torch.uint8).cpu().numpy()

    def take(self, data: np.ndarray) -> None:
        """Have the buffer be what it is in the worker."""
        if self.buffer.is_cpu:
            self.bytes[:] = data
        else:
            self.buffer.view(torch.uint8).copy_(torch.from_numpy(data))

    def touched(self) -> int:
        """How many values outside the tensor have been written."""
        return int(((self.bytes.view(self.filler.dtype) != self.filler) & ~owned(self.shape)).sum())

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self.buffer.untyped_storage().data_ptr()


def _filler(dtype: torch.dtype) -> np.ndarray:
    """The bits of NaN, or of the smallest integer, as an integer of the same size."""
    value = math.nan if dtype.is_floating_point else False if dtype == torch.bool else torch.iinfo(dtype).min
    return _bits(torch.tensor(value, dtype=dtype)).numpy()


class _Memory:
    """The tensors of a call."""

    def __init__(self) -> None:
        self.guards: list[_Guard] = []
        self.made: list[_Guard] = []  # by `empty_like`

    def copy(self, tensor: Tensor) -> Tensor:
        self.guards.append(_Guard(tuple(tensor.shape), tensor.dtype, tensor.device))
        return self.guards[-1].tensor.copy_(tensor)

    def pointer(self, value: Any) -> Any:
        """A tensor as the worker gets it; other values stay."""
        if not isinstance(value, Tensor):
            return value
        for i, guard in enumerate(self.guards):
            if guard.holds(value):
                return Pointer(i, value.storage_offset() * value.element_size(), _name(value.dtype))
        raise ValueError("a kernel is launched with a tensor that is neither an input nor made by `empty_like`")

    def buffers(self) -> list[Buffer]:
        return [Buffer(guard.bytes, guard.buffer.element_size(), guard.shape) for guard in self.guards]

    def refuse_strays(self) -> None:
        """No margin may have been written to."""
        if touched := sum(guard.touched() for guard in self.guards):
            raise OutOfBounds(f"{touched} values are written outside the tensors: does every store have a mask?")

    def refuse_other_than_once(self, output: Any) -> None:
        """Each value of the result, where it was made here, is stored once."""
        for _, leaf in leaves(output):
            guard = next((g for g in self.made if isinstance(leaf, Tensor) and g.holds(leaf)), None)
            if guard is not None and guard.stored is not None and leaf.dtype == guard.buffer.dtype:
                counts = torch.from_numpy(guard.stored)
                stored = counts.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
                _refuse_counts(int((stored == 0).sum()), int((stored > 1).sum()), leaf.numel())


def _refuse_counts(never: int, often: int, count: int) -> None:
    rule = "each wants one store, by one program"
    if never:
        again = f" and {often} more than once" if often else ""
        raise NotStored(f"{never} of {count} values of the result are never stored{again}: {rule}")
    if often:
        raise StoredAgain(f"{often} of {count} values of the result are stored more than once: {rule}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_memory: ContextVar[_Memory] = ContextVar("the tensors of the call that is being made")


@contextmanager
def _guarding() -> Any:
    token = _memory.set(_Memory())
    try:
        yield _memory.get()
    finally:
        _memory.reset(token)


def empty_like(tensor: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A guarded tensor for `launch` to have its results written to, NaN (or the smallest integer) until then."""
    memory = _memory.get()
    guard = _Guard(tuple(tensor.shape) if shape is None else shape, dtype or tensor.dtype, tensor.device)
    memory.guards.append(guard)
    memory.made.append(guard)
    if guard.buffer.is_floating_point():
        _bits(guard.tensor).fill_(_untouched(guard.tensor.dtype))
    return guard.tensor


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _untouched(dtype: torch.dtype) -> int:
    """The bits of a NaN that no computation gives."""
    return int(_bits(torch.tensor(math.nan, dtype=dtype))) | 0x5A


def _refuse_untouched(output: Any) -> None:
    for _, leaf in leaves(output):
        floats = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
        if floats and (_bits(leaf) == _untouched(leaf.dtype)).all():
            raise NotStored(f"none of the {leaf.numel()} values of the result was written: is there a store?")


# ------------------------------------------------------------------------------------------------------------- running


@dataclass
class _Remote:
    """Stands for the kernel in `launch`, and has it launched by the worker."""

    kernel: Any
    source: Source
    interpreting: bool
    deadline: float

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Any, *args: Any, **kwargs: Any) -> None:
        memory = _memory.get()
        if callable(grid):
            function = getattr(self.kernel, "fn", self.kernel)
            known = {name: value for name, value in kwargs.items() if name in inspect.signature(function).parameters}
            grid = grid(inspect.signature(function).bind_partial(*args, **known).arguments)
        pointers = [memory.pointer(value) for value in args], {k: memory.pointer(v) for k, v in kwargs.items()}
        request = (self.source, tuple(grid), *pointers, memory.buffers())
        answer = worker(self.interpreting).run(request, self.deadline - time.monotonic())
        if isinstance(answer, Failure):
            error = _error_type(answer.name)(answer.message)
            error.add_note(answer.trace)
            raise error
        for i, (data, stored) in answer.items():
            guard = memory.guards[i]
            guard.take(data)
            guard.stored = guard.stored + stored if stored is not None else None


@dataclass(frozen=True)
class KernelRunner:
    """A runner for `check`, which calls ``launch(kernel, *args, **kwargs)``, and has each launch made by the worker.

    Args:
        launch: allocates the outputs with `empty_like`, launches the kernel, and returns them.
        stored_once: every value of an output must be stored exactly once: none left out, and none again and again,
            which is a race between programs, or traffic for nothing. False for kernels that add up in memory.
    """

    launch: Callable
    stored_once: bool = True
    device_types = ("cuda",)  # beside the CPU, whose tensors are interpreted

    @property
    def signature_of(self) -> Callable:
        """The callable whose signature names the inputs: `launch`, its kernel given."""
        return partial(self.launch, None)

    def __call__(
        self,
        answer: Any,
        case: Case,
        weights: dict[str, Tensor],
        names: Callable,
        *,
        gradients: bool,
        seconds: float,
        seed: int,
    ) -> Outcome:
        from ..catalogue import TODO

        source = source_of(answer)
        if source.blank:
            return Outcome(error=TODO())
        on_cpu = all(leaf.is_cpu for _, leaf in leaves((case.args, case.kwargs)) if isinstance(leaf, Tensor))
        try:
            with isolated(seed), _guarding() as memory:
                return self._call(_Remote(answer, source, on_cpu, time.monotonic() + seconds), case, memory)
        except TimeoutError:
            return Outcome(error=TimeLimit())
        except (KernelFault, KernelError, Crash) as error:
            return Outcome(error=error)

    def _call(self, kernel: _Remote, case: Case, memory: _Memory) -> Outcome:
        args, kwargs = map_tensors((case.args, case.kwargs), memory.copy)
        inputs = named_inputs(self.signature_of, Case(args, kwargs))
        outcome = Outcome(before=_frozen(_cloned(inputs)))
        output = self.launch(kernel, *args, **kwargs)
        memory.refuse_strays()
        _refuse_untouched(output)
        if self.stored_once:
            memory.refuse_other_than_once(output)
        outcome.after, outcome.output = _frozen(_cloned(inputs)), _cloned(output)
        return outcome


def _cloned(tree: Any) -> Any:
    """Without the buffers that the tensors lie in."""
    return map_tensors(tree, lambda tensor: tensor.detach().clone())
