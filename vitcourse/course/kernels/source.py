"""The learner's kernel as text, which is how it reaches the worker, and the kernel of such a text there."""

import ast
import inspect
import itertools
import linecache
import pickle
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

FILE = "<kernel "  # begins the name of the file of every kernel in the worker


@dataclass(frozen=True)
class Source:
    """A kernel as text, with the globals that it uses: modules by name, other kernels as text, constants."""

    name: str
    text: str
    line: int
    blank: bool  # it still says ``raise TODO``; a compiler would only say that it knows no ``raise``
    uses: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Module:
    name: str


def source_of(kernel: Any) -> Source:
    """The text of a kernel, a function under `triton.jit`, and what it uses."""
    function = getattr(kernel, "fn", kernel)
    text, line, blank, names = _read(function)
    scope = function.__globals__ | inspect.getclosurevars(function).nonlocals
    uses = {name: _portable(scope[name]) for name in names if name in scope and scope[name] is not kernel}
    return Source(function.__name__, text, line, blank, {k: v for k, v in uses.items() if v is not None})


@lru_cache(maxsize=1000)
def _read(function: Callable) -> tuple[str, int, bool, tuple[str, ...]]:
    """Text without decorators, its line in the file, is it blank, the names in it. What they mean may change."""
    lines, first = inspect.getsourcelines(function)
    text = textwrap.dedent("".join(lines))
    tree = ast.parse(text).body[0]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    blank = any(isinstance(error, ast.Name) and error.id == "TODO" for error in raised)
    kept = "".join(text.splitlines(keepends=True)[tree.lineno - 1 :])
    return kept, first + tree.lineno - 1, blank, tuple(sorted(names))


def _portable(value: Any) -> Any:
    """What the worker needs to have the same global; None for what no kernel can use."""
    if isinstance(value, types.ModuleType):
        return _Module(value.__name__)
    if hasattr(value, "fn") and hasattr(value, "run"):  # a kernel, compiled or interpreted
        return source_of(value)
    try:
        pickle.dumps(value)
    except Exception:
        return None
    return value


# ------------------------------------------------------------------------------------------------- inside the worker

_files = itertools.count()
_loaded: dict[str, Any] = {}  # what is compiled, or taken apart for the interpreter, is kept between calls


def load(source: Source) -> Any:
    """The kernel of a source, under line numbers that are those of the learner's cell."""
    key = repr(source)
    if key not in _loaded:
        _loaded[key] = _load(source)
    return _loaded[key]


def _load(source: Source) -> Any:
    import triton

    scope = {"__name__": "kernels", "tl": triton.language}  # a helper may not name it, and yet needs it
    scope |= {name: _restore(value) for name, value in source.uses.items()}
    file = f"{FILE}{next(_files)}>"
    text = "\n" * (source.line - 1) + source.text
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), scope)
    scope[source.name] = triton.jit(scope[source.name])
    return scope[source.name]


def _restore(value: Any) -> Any:
    if isinstance(value, _Module):
        return import_module(value.name)
    return load(value) if isinstance(value, Source) else value
