"""Grade Triton kernels out of harm's way: in a process of their own, on buffers that are guarded by NaN.

A kernel can do what no Python function can: read its neighbour's memory without an error, write over it, end its
process, or never return. So the answer is sent, as source, to a worker that lives for many calls and is replaced when
one kills it. Inputs on a CPU, which all of a check's own are, are worked on by Triton's interpreter, with or without a
GPU: it knows every address that is read. Inputs on a GPU go to a second worker, which compiles.

This is how a check gets such a runner::

    def launch(kernel, x, scale):
        out = kernels.empty_like(x)  # NaN until it is written, guarded like the inputs
        kernel[(triton.cdiv(x.shape[-2], 16),)](x, out, *x.stride(), *x.shape, scale, BLOCK=16)
        return out


    @check("hardware.scale_rows", reference="…", runner=KernelRunner(launch), …)
    def scale_rows(rng):
        yield call(rng.normal(3, 20, 8, dtype=torch.float32), 0.5).on("20 rows, which is no multiple of the block")

`launch` is a function of a module, so that the worker can import it. Every tensor that it is given lies in a larger
buffer of NaN, with NaN between its rows of rows too: what is read beyond the end of one head is not the next head's
first row. What is written there is found after the call, and so is a result to which nothing was written. The
interpreter refuses to read there, or anywhere but in what `launch` is given and what `empty_like` makes.
"""

import ast
import atexit
import inspect
import itertools
import linecache
import math
import os
import pickle
import queue
import subprocess
import sys
import textwrap
import threading
import traceback
import types
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from importlib import import_module
from importlib.metadata import version
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vitcourse.layers import say_once

from .cases import Case
from .running import Outcome, OutOfBounds, TimeLimit, _frozen, isolated, leaves, map_tensors, named_inputs

ROWS, COLUMNS, MARGIN = 64, 16, 8192  # of NaN after the rows and the columns of a tensor, and before and after it all


# ------------------------------------------------------------------------------------------------------------- buffers


@dataclass
class _Guard:
    """A buffer of NaN, and the places in it that a tensor owns."""

    buffer: Tensor
    owned: Tensor

    def owns(self, addresses: np.ndarray) -> np.ndarray:
        """Which of the addresses are those of the tensor's values."""
        places, between = np.divmod(addresses.astype(np.int64) - self.buffer.data_ptr(), self.buffer.element_size())
        inside = (places >= 0) & (places < len(self.buffer)) & (between == 0)
        return inside & self.owned.numpy()[np.where(inside, places, 0)]

    def touched(self) -> int:
        """How many values outside the tensor have been written."""
        changed = ~self.buffer.isnan() if self.buffer.is_floating_point() else self.buffer != _filler(self.buffer.dtype)
        return int((changed & ~self.owned).sum())


_guards: list[_Guard] = []  # of the call that is being made


def empty_like(tensor: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A guarded tensor for `launch` to have its results written to, NaN (or the smallest integer) until then."""
    empty = _guarded(tuple(tensor.shape) if shape is None else shape, dtype or tensor.dtype, tensor.device)
    if empty.is_floating_point():
        _bits(empty).fill_(_untouched(empty.dtype))
    return empty


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


def _guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    padded = list(shape)
    for axis, extra in zip((-1, -2), (COLUMNS, ROWS), strict=True):
        if len(shape) > -axis:  # a vector has margins only
            padded[axis] += extra
    size = math.prod(padded)
    buffer = torch.full((size + 2 * MARGIN,), _filler(dtype), dtype=dtype, device=device)
    owned = torch.zeros(buffer.shape, dtype=torch.bool, device=device)
    inside = tuple(slice(n) for n in shape)
    owned[MARGIN : MARGIN + size].view(padded)[inside] = True
    _guards.append(_Guard(buffer, owned))
    return buffer[MARGIN : MARGIN + size].view(padded)[inside]


def _filler(dtype: torch.dtype) -> float | int:
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def _guard(tensor: Tensor) -> Tensor:
    return _guarded(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)


class StrayRead(OutOfBounds):
    """A kernel reads outside the tensors that it was given."""


class NotStored(OutOfBounds):
    """A kernel has written nowhere in its result."""


def _watch_reads() -> None:
    """Have the interpreter look at every address before it reads there. Loads of all kinds end in the one method."""
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load

    @wraps(load)
    def watched(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        owned = np.zeros(addresses.shape, dtype=bool)
        for guard in _guards:
            owned |= guard.owns(addresses)
        if strays := int((~owned).sum()):
            raise StrayRead(f"{strays} values are read outside the tensors: does every load have a mask?")
        return load(self, pointers, mask, *args, **kwargs)

    InterpreterBuilder.create_masked_load = watched


@contextmanager
def _guarding() -> Any:
    """No margin may have been written to by the end of the block."""
    _guards.clear()
    try:
        yield
        if touched := sum(guard.touched() for guard in _guards):
            raise OutOfBounds(f"{touched} values are written outside the tensors: does every store have a mask?")
    finally:
        _guards.clear()


# -------------------------------------------------------------------------------------------------- the learner's code


@dataclass(frozen=True)
class _Source:
    """A kernel as text, with the globals that it uses: modules by name, other kernels as text, constants."""

    name: str
    text: str
    line: int
    uses: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Module:
    name: str


def _plain(kernel: Any) -> Callable:
    """The Python function inside a kernel."""
    return getattr(kernel, "fn", kernel)


def _source(kernel: Any) -> _Source:
    function = _plain(kernel)
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    text = "".join(textwrap.dedent("".join(lines)).splitlines(keepends=True)[tree.lineno - 1 :])
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    scope = function.__globals__ | inspect.getclosurevars(function).nonlocals
    uses = {name: _portable(scope[name]) for name in names if name in scope and scope[name] is not kernel}
    return _Source(function.__name__, text, first + tree.lineno - 1, {k: v for k, v in uses.items() if v is not None})


def _portable(value: Any) -> Any:
    """What the worker needs to have the same global; None for what no kernel can use."""
    if isinstance(value, types.ModuleType):
        return _Module(value.__name__)
    if hasattr(value, "fn") and hasattr(value, "run"):  # a kernel, compiled or interpreted
        return _source(value)
    try:
        pickle.dumps(value)
    except Exception:
        return None
    return value


def _is_blank(source: _Source) -> bool:
    """Does the kernel still say ``raise TODO``? A compiler would only say that it knows no ``raise``."""
    raised = (node.exc for node in ast.walk(ast.parse(source.text)) if isinstance(node, ast.Raise))
    return any(isinstance(error, ast.Name) and error.id == "TODO" for error in raised)


# ----------------------------------------------------------------------------------------------------------- the runner


@dataclass(frozen=True)
class KernelRunner:
    """A runner for `check`, which calls ``launch(kernel, *args, **kwargs)`` in the worker.

    Args:
        launch: a module's function that allocates the outputs with `empty_like`, launches the kernel, and returns them.
    """

    launch: Callable
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
        from .grading import TODO

        source = _source(answer)
        if _is_blank(source):
            return Outcome(error=TODO())
        on_cpu = all(leaf.is_cpu for _, leaf in leaves((case.args, case.kwargs)) if isinstance(leaf, Tensor))
        return _worker(interpreting=on_cpu).run((source, self.launch, case.args, case.kwargs, seed), seconds)


class KernelError(Exception):
    """What a kernel raised in the worker; a subclass carries the name of the original error."""

    __module__ = "builtins"


@cache
def _error_type(name: str) -> type[KernelError]:
    return type(name, (KernelError,), {"__module__": "builtins"})


class Worker:
    """A process that interprets or compiles kernels, started at the first call, and again after one that ended it."""

    def __init__(self, interpreting: bool) -> None:
        self._interpreting = interpreting
        self._process: subprocess.Popen | None = None
        self._answers: queue.Queue = queue.Queue()

    def run(self, request: tuple, seconds: float) -> Outcome:
        """The outcome of one call: of a crash, an error that says so; after `seconds`, a `TimeLimit`."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            _send(self._process.stdin, request)
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            return Outcome(error=TimeLimit())
        except BrokenPipeError:
            answer = None
        except BaseException:  # an interrupt: the answer must not be taken for that of the next call
            self.stop()
            raise
        if answer is None:
            code = self._process.wait()
            self.stop()
            return Outcome(error=_error_type("Crash")(f"the kernel ended its process (exit code {code})"))
        if isinstance(answer, Outcome):
            return answer
        name, message, trace = answer
        known = {error.__name__: error for error in (OutOfBounds, StrayRead, NotStored)}
        error = known.get(name, _error_type(name))(message)
        error.add_note(trace)
        return Outcome(error=error)

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if self._interpreting:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
            if version("triton").startswith("3.6.") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
                problem = "Triton 3.6 cannot interpret loops with NumPy 2.4 or newer"
                say_once(f"{problem}; pip install 'numpy<2.4', or a newer PyTorch")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # it finds what we have found
        command = [sys.executable, "-m", "vitcourse.course.kernels"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._answers = queue.Queue()
        threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True).start()
        if self._answers.get() != "ready":
            raise RuntimeError("the process that runs kernels does not start; its error is on stderr")

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with suppress(OSError):
                self._process.stdin.close()
            self._process = None


@cache
def _worker(interpreting: bool) -> Worker:
    worker = Worker(interpreting)
    atexit.register(worker.stop)
    return worker


def _send(pipe: BinaryIO, message: Any) -> None:
    content = pickle.dumps(message)
    pipe.write(len(content).to_bytes(8, "little") + content)
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    """The next message; None at the end of the stream."""
    size = pipe.read(8)
    return pickle.loads(pipe.read(int.from_bytes(size, "little"))) if len(size) == 8 else None


def _listen(pipe: BinaryIO, answers: queue.Queue) -> None:
    with pipe:
        while (message := _receive(pipe)) is not None:
            answers.put(message)
    answers.put(None)


# ------------------------------------------------------------------------------------------------- inside the worker

_files = itertools.count()


def _load(source: _Source) -> Any:
    """The kernel of a source, under line numbers that are those of the learner's cell."""
    import triton

    scope = {"__name__": "kernels", "tl": triton.language}  # a helper may not name it, and yet needs it
    scope |= {name: _restore(value) for name, value in source.uses.items()}
    file = f"<kernel {next(_files)}>"
    text = "\n" * (source.line - 1) + source.text
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), scope)
    scope[source.name] = triton.jit(scope[source.name])
    return scope[source.name]


def _restore(value: Any) -> Any:
    if isinstance(value, _Module):
        return import_module(value.name)
    return _load(value) if isinstance(value, _Source) else value


_loaded: dict[str, Any] = {}  # compiled kernels are kept between calls


def _call(source: _Source, launch: Callable, args: tuple, kwargs: dict[str, Any], seed: int) -> Outcome:
    key = repr(source)
    if key not in _loaded:
        _loaded[key] = _load(source)
    kernel = _loaded[key]
    with isolated(seed), _guarding():
        args, kwargs = map_tensors((args, kwargs), _guard)
        inputs = named_inputs(partial(launch, kernel), Case(args, kwargs))
        outcome = Outcome(before=_frozen(inputs))
        output = launch(kernel, *args, **kwargs)
        outcome.after = _frozen(inputs)
        outcome.output = map_tensors(output, lambda tensor: tensor.detach().clone())
    _refuse_untouched(outcome.output)
    return outcome


def _serve() -> None:
    """Answer requests until the parent is gone. What a kernel prints goes to stderr, never between the answers."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        _watch_reads()
    _send(answers, "ready")
    while (request := _receive(sys.stdin.buffer)) is not None:
        try:
            answer: Any = _call(*request)
        except BaseException as error:
            cause = error.__cause__ or error  # the interpreter wraps what a kernel raises
            answer = (type(cause).__name__, str(cause), traceback.format_exc())
        _send(answers, answer)


if __name__ == "__main__":
    # Under this name the classes would differ from those in the requests.
    import_module("vitcourse.course.kernels")._serve()
