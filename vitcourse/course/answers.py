"""The learner's own code: its functions, its blanks, its lines."""

import contextlib
import dis
import traceback
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any


def functions_of(answer: Callable) -> Iterator[Any]:
    for value in vars(answer).values() if isinstance(answer, type) else (answer,):
        value = getattr(value, "__func__", value)
        if hasattr(value, "__code__"):
            yield value


def blanks_in(answer: Callable) -> list[str]:
    """The names of the functions of an answer that still say ``raise TODO``, once for each time."""
    return [
        function.__name__
        for function in functions_of(answer)
        for code in _codes(function.__code__)
        for step in dis.get_instructions(code)
        if step.opname == "LOAD_GLOBAL" and step.argval == "TODO"
    ]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def line_of(answer: Callable, error: BaseException | None) -> int | None:
    """The line of the answer's cell or file in which `error` was raised."""
    files = {function.__code__.co_filename for function in functions_of(answer)}
    lines = (
        [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
        if error
        else []
    )
    return lines[-1] if lines else None


@contextlib.contextmanager
def bound(answer: Callable) -> Iterator[None]:
    """Give the answer its name while it runs: a decorator runs before Python does so.

    ``super(Name, self)`` needs it, and a function that calls itself.
    """
    function = next(functions_of(answer), None)
    if function is None:
        yield
        return
    namespace, missing = function.__globals__, object()
    before = namespace.get(answer.__name__, missing)
    namespace[answer.__name__] = answer
    try:
        yield
    finally:
        if before is missing:
            namespace.pop(answer.__name__, None)
        else:
            namespace[answer.__name__] = before
