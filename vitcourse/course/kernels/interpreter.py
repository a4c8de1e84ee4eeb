"""Triton's interpreter, made to watch: what a kernel reads, stores and adds up. It runs in the worker, without PyTorch.

`watch` changes the interpreter of this process for good. After it, `run` makes one launch.
"""

import ast
import copy
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.language import core  # noqa: F401 (`_patch_lang` looks for it here)
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

from .buffers import Buffer, Pointer, owned
from .source import FILE, Source, load


class Fault(Exception):
    """A rule is broken. `kind` is the name of the error that the learner gets, `place` a file and a line."""

    def __init__(self, kind: str, text: str, place: tuple[str, int] | None = None) -> None:
        super().__init__(text)
        self.kind, self.place = kind, place


def _place() -> tuple[str, int]:
    """Where the learner's kernel has come to."""
    frame = sys._getframe(1)
    while not frame.f_code.co_filename.startswith(FILE):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


# -------------------------------------------------------------------------------------------------------------- memory


class _Region:
    """A buffer, where it lies, and how often each of its values has been stored."""

    def __init__(self, buffer: Buffer) -> None:
        self.data, self.itemsize = np.array(buffer.data), buffer.itemsize
        self.owned = owned(buffer.shape)
        self.stored = np.zeros(self.owned.size, dtype=np.int32)
        self.begin = self.data.ctypes.data
        self.end = self.begin + self.data.size

    def places(self, addresses: np.ndarray) -> np.ndarray:
        """Which of the tensor's values lie at the addresses; others are left out."""
        places, between = np.divmod(addresses.astype(np.int64) - self.begin, self.itemsize)
        places = places[(places >= 0) & (places < self.owned.size) & (between == 0)]
        return places[self.owned[places]]


@dataclass
class _Launch:
    """One run over all programs. In `unset` places, what a mask leaves out of a load is NaN, elsewhere 0."""

    regions: list[_Region]
    unset: set[tuple[str, int]] | None  # None: everywhere

    def __post_init__(self) -> None:
        self.left_out: set[tuple[str, int]] = set()  # where loads have a mask and no `other`

    def touch(self, pointers: TensorHandle, mask: Any, storing: bool) -> int:
        """How many of the addresses that the mask lets through are no tensor's."""
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, np.shape(mask)))
        addresses = addresses[np.broadcast_to(mask, addresses.shape)]
        if not addresses.size:
            return 0
        low, high, found = addresses.min(), addresses.max(), 0
        for region in self.regions:
            if high >= region.begin and low < region.end:
                places = region.places(addresses)
                found += places.size
                if storing:
                    np.add.at(region.stored, places, 1)
        return addresses.size - found

    def other(self, pointers: TensorHandle) -> TensorHandle:
        """What stands where a mask is false and nobody has said what should."""
        place = _place()
        self.left_out.add(place)
        dtype, unset = pointers.get_element_ty(), self.unset is None or place in self.unset
        kind = interpreter._get_np_dtype(dtype)  # of integers, for types that NumPy does not have
        bits = b"\xff" if unset else b"\0"  # all bits set are a NaN in every floating point type
        fill = unset if kind.kind == "b" else np.frombuffer(bits * kind.itemsize, kind)[0]
        return TensorHandle(np.full(pointers.data.shape, fill, kind), dtype)

    def same_results(self, other: "_Launch") -> bool:
        return all(np.array_equal(a.data, b.data) for a, b in zip(self.regions, other.regions, strict=True))


_launch = _Launch([], None)  # the one that is being made


def _watched_load(plain: Callable) -> Callable:
    @wraps(plain)
    def load(self: Any, pointers: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        there = np.asarray(mask.data, dtype=bool)
        if strays := _launch.touch(pointers, there, storing=False):
            raise Fault("StrayRead", f"{_values(strays)} read outside the tensors: does every load have a mask?")
        if other is None and not there.all():
            other = _launch.other(pointers)
        return plain(self, pointers, mask, other, *args, **kwargs)

    return load


def _watched_store(plain: Callable) -> Callable:
    @wraps(plain)
    def store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_stray_stores(pointers, mask)
        return plain(self, pointers, value, mask, *args, **kwargs)

    return store


def _watched_atomic(plain: Callable, pointer: int, mask: int | None) -> Callable:
    @wraps(plain)
    def atomic(self: Any, *args: Any) -> Any:
        _refuse_stray_stores(args[pointer], args[mask] if mask is not None else None)
        return plain(self, *args)

    return atomic


def _refuse_stray_stores(pointers: TensorHandle, mask: Any) -> None:
    there = np.asarray(True if mask is None else mask.data, dtype=bool)
    if strays := _launch.touch(pointers, there, storing=True):
        raise Fault("OutOfBounds", f"{_values(strays)} written outside the tensors: does every store have a mask?")


def _values(count: int) -> str:
    return "1 value is" if count == 1 else f"{count} values are"


# ----------------------------------------------------------------------------------------------------------- precision
#
# Every value remembers from which variables of a loop it has been computed (those that the loop changes, as they were
# when a tile began), and for each of them whether anything on the way was in half precision. A variable that has been
# computed from itself in this way loses bits at every tile.


def _is_half(dtype: tl.dtype) -> bool:
    return dtype.scalar.is_floating() and dtype.scalar.primitive_bitwidth < 32


def _inherit(sources: Iterable[Any], results: Iterable[Any]) -> None:
    past: dict[Any, bool] = {}
    for source in sources:
        for variable, rounded in getattr(source, "past", {}).items():
            past[variable] = rounded or past.get(variable, False)
    if past:
        for result in results:
            if isinstance(result, TensorHandle):
                result.past = dict.fromkeys(past, True) if _is_half(result.dtype) else past


def _traced(plain: Callable) -> Callable:
    @wraps(plain)
    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        _inherit(args, result if isinstance(result, tuple) else (result,))
        return result

    return traced


def _watched_reduction(plain: Callable) -> Callable:
    @wraps(plain)
    def apply(self: Any, values: Any) -> Any:
        tensors = values if isinstance(values, tuple) else (values,)
        if self.combine_fn is tl.standard._sum_combine and _is_half(tensors[0].dtype):
            raise Fault("HalfSum", f"numbers are added up in {_name(tensors[0].dtype)}; sums want float32")
        result = plain(self, values)
        results = result if isinstance(result, tuple) else (result,)
        _inherit([tensor.handle for tensor in tensors], [tensor.handle for tensor in results])
        return result

    return apply


def _watched_dot(plain: Callable) -> Callable:
    @wraps(plain)
    def dot(self: Any, a: Any, b: Any, total: Any, input_precision: Any, *args: Any) -> Any:
        if _is_half(total.dtype):
            raise Fault("HalfSum", f"`tl.dot` adds up in {_name(total.dtype)}; sums want float32")
        if a.dtype == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            raise Fault(
                "RoundedInputs",
                "a GPU rounds the float32 inputs of this `tl.dot` to ten bits, unless it is told not to",
            )
        return plain(self, a, b, total, input_precision, *args)

    return dot


def _name(dtype: tl.dtype) -> str:
    return repr(dtype.scalar).removeprefix("triton.language.")


class Carried:
    """The variables that a loop takes from tile to tile; `assigned` has the lines that change them, from the loop's."""

    def __init__(self, assigned: dict[str, int], values: dict[str, Any]) -> None:
        frame = sys._getframe(1)
        self.first = {}  # the types before the loop
        if frame.f_code.co_filename.startswith(FILE):  # and not Triton's own functions
            file = frame.f_code.co_filename
            self.places = {name: (file, frame.f_lineno + line) for name, line in assigned.items()}
            self.first = {name: _type(values[name]) for name in assigned if isinstance(values.get(name), tl.tensor)}

    def step(self, values: dict[str, Any]) -> None:
        """A tile begins, or the last one has ended."""
        for name in self.first:
            value = values.get(name)
            if isinstance(value, tl.tensor):
                self._check(name, value)
                value.handle.past = getattr(value.handle, "past", {}) | {(self, name): False}

    def _check(self, name: str, value: tl.tensor) -> None:
        before, now, place = self.first[name], _type(value), self.places[name]
        if getattr(value.handle, "past", {}).get((self, name)) or (now != before and _is_half(value.dtype)):
            text = f"`{name}` goes through half precision at every tile; what is added up over many wants float32"
            raise Fault("HalfCarried", text, place)
        if now != before:
            text = f"`{name}` is {before} before the loop and {now} after a tile: this does not compile for a GPU"
            raise Fault("ChangedType", text, place)


def _type(value: tl.tensor) -> str:
    shape = [str(size) for size in value.handle.data.shape] if value.type.is_block() else ["a scalar"]
    return f"{_name(value.dtype)} ({', '.join(shape)})"


class _Marking(interpreter.ASTTransformer):
    """Has every loop report its variables when a tile begins, and when the last has ended."""

    def _mark(self, node: ast.For | ast.While) -> list[ast.stmt]:
        stored = (n for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name))
        assigned = {n.id: n.lineno - node.lineno for n in stored if isinstance(n.ctx, ast.Store)}
        self.generic_visit(node)
        name = f"__carried_{node.lineno}_{node.col_offset}"
        begin, step = ast.parse(f"{name} = __carried__({assigned!r}, locals())\n{name}.step(locals())").body
        for added in (*ast.walk(begin), *ast.walk(step)):
            ast.copy_location(added, node)
        node.body.insert(0, step)
        return [begin, node, copy.deepcopy(step)]

    visit_For = visit_While = _mark


# ------------------------------------------------------------------------------------------------------------- running


def _speaks() -> None:
    """Its globals name the modules whose functions are to be interpreted."""


def _remembering(plain: Callable) -> Callable:
    """The function of a type without its table, which it makes anew at every call."""
    known: dict[tuple[type, str], np.dtype] = {}

    @wraps(plain)
    def get(dtype: tl.dtype) -> np.dtype:
        key = type(dtype), dtype.name
        if key not in known:
            known[key] = plain(dtype)
        return known[key]

    return get


def watch() -> None:
    """Make the interpreter of this process watch."""
    for name, method in list(vars(InterpreterBuilder).items()):
        if name.startswith("create_") and not any(word in name for word in ("load", "store", "atomic")):
            setattr(InterpreterBuilder, name, _traced(method))
    InterpreterBuilder.create_masked_load = _watched_load(InterpreterBuilder.create_masked_load)
    InterpreterBuilder.create_masked_store = _watched_store(InterpreterBuilder.create_masked_store)
    InterpreterBuilder.create_atomic_cas = _watched_atomic(InterpreterBuilder.create_atomic_cas, 0, None)
    InterpreterBuilder.create_atomic_rmw = _watched_atomic(InterpreterBuilder.create_atomic_rmw, 1, 3)
    InterpreterBuilder.create_dot = _watched_dot(InterpreterBuilder.create_dot)
    ReduceScanOpInterface.apply = _watched_reduction(ReduceScanOpInterface.apply)
    interpreter.FunctionRewriter.ast_transformer = _Marking()
    interpreter.__carried__ = Carried  # it hands its globals to the functions that it rewrites
    # Numbers do not overflow silently in Python alone: on a GPU they do, and a wrong address is found anyway.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    # Triton puts its language under the interpreter at every launch and every call of a function of its own, and takes
    # it out again: a quarter of the time. Here it may stay.
    interpreter._patch_lang(_speaks)
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()
    interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype)  # a tenth


def run(
    source: Source, grid: tuple[int, ...], args: tuple, kwargs: dict[str, Any], buffers: list[Buffer]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Launch a kernel: the bytes of each buffer that was stored to, and how often each of its values was.

    Raises:
        Fault: a rule is broken.
        Exception: the kernel's own.
    """
    kernel = load(source)

    def once(unset: set[tuple[str, int]] | None) -> _Launch:
        global _launch
        _launch = _Launch([_Region(buffer) for buffer in buffers], unset)
        with np.errstate(all="ignore"):
            _run(kernel, grid, args, kwargs)
        return _launch

    launch = once(unset=None)
    if launch.left_out and not launch.same_results(filled := once(unset=set())):
        guilty = [place for place in sorted(launch.left_out) if not once({place}).same_results(filled)]
        text = "what the mask of this load leaves out comes into the result, and nothing says what it is"
        raise Fault("LeftOut", text, (guilty or sorted(launch.left_out))[0])
    return {i: (region.data, region.stored) for i, region in enumerate(launch.regions) if region.stored.any()}


def _run(kernel: Any, grid: tuple[int, ...], args: tuple, kwargs: dict[str, Any]) -> None:
    function = kernel.rewrite()
    constants = interpreter.GridExecutor(function, kernel.arg_names, grid).constexprs
    kwargs = {name: value for name, value in kwargs.items() if name in kernel.arg_names}  # and no num_warps
    given = inspect.getcallargs(kernel.fn, *args, **kwargs)
    given = {name: value if name in constants else _converted(value) for name, value in given.items()}
    builder, grid = interpreter.interpreter_builder, (*grid, 1, 1)[:3]
    builder.set_grid_dim(*grid)
    for place in itertools.product(*map(range, grid)):
        builder.set_grid_idx(*place)
        function(**given)


_NAMES = {"bool": "int1", "float8_e5m2": "float8e5", "float8_e4m3fn": "float8e4nv"}  # others are called alike


def _converted(value: Any) -> Any:
    if not isinstance(value, Pointer):
        return interpreter._implicit_cvt(value)
    dtype = tl.pointer_type(getattr(tl, _NAMES.get(value.dtype, value.dtype)))
    address = _launch.regions[value.buffer].begin + value.offset
    return tl.tensor(TensorHandle(np.array([address], dtype=np.uint64), dtype), dtype)
