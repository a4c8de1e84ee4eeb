"""Triton's interpreter, without looking for the functions of ``triton.language`` anew at every launch and every call.

It replaces them while a kernel runs, and finds them by listing modules: about a fifth of the time that small kernels
take. What they are does not change. Importing this module is enough; where Triton works otherwise, it does nothing.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter


def _builtins(package: object) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: object, builder: object, scope: object) -> None:
    for name in _NAMES[package] if package in _NAMES else _builtins(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # and not replaced already
            interpreter._patch_attr(package, name, member, builder, scope)


if list(inspect.signature(interpreter._patch_builtin).parameters) == ["pkg", "builder", "scope"]:
    _NAMES = {
        package: _builtins(package) for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    }
    interpreter._patch_builtin = _patch_builtin
