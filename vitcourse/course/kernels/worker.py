"""The process in which kernels run: how it is started, asked, and replaced, and what it does with a request."""

import atexit
import linecache
import os
import pickle
import queue
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .buffers import Buffer, Pointer
from .source import FILE, Source, load

_START = "from vitcourse.course.kernels.worker import serve; serve()"  # spawned alike on every platform
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # tiles are small


class Failure(NamedTuple):
    """What a kernel raised: the name of the error, what it says, and the whole traceback."""

    name: str
    message: str
    trace: str


class Crash(Exception):
    """The process has ended."""


class Worker:
    """A process that interprets or compiles kernels, started at the first call, and again after one that ended it."""

    def __init__(self, interpreting: bool) -> None:
        self._interpreting = interpreting
        self._process: subprocess.Popen | None = None
        self._answers: queue.Queue = queue.Queue()
        self._busy = threading.Lock()

    def run(self, request: tuple, seconds: float) -> Any:
        """What `serve` answers.

        Raises:
            Crash: the kernel ended the process.
            TimeoutError: there is no answer after `seconds`; the process has been stopped.
        """
        with self._busy:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                _send(self._process.stdin, request)
                answer = self._answers.get(timeout=max(seconds, 0))
            except queue.Empty:
                self.stop()
                raise TimeoutError from None
            except OSError:  # the pipe is broken
                answer = None
            except BaseException:  # an interrupt: the answer must not be taken for that of the next call
                self.stop()
                raise
            if answer is None:
                code = self._process.wait()
                self.stop()
                raise Crash(f"the kernel ended its process (exit code {code})")
            return answer

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if self._interpreting:
            environment |= _ONE_THREAD | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
            _warn_of_versions()
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # it finds what we have found
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
        )  # fmt: skip
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


def _warn_of_versions() -> None:
    from vitcourse.notices import say_once

    if version("triton").startswith("3.6.") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        problem = "Triton 3.6 cannot interpret loops with NumPy 2.4 or newer"
        say_once(f"{problem}; pip install 'numpy<2.4', or a newer PyTorch")


@cache
def worker(interpreting: bool) -> Worker:
    """The one of this kind."""
    made = Worker(interpreting)
    atexit.register(made.stop)
    return made


def _send(pipe: BinaryIO, message: Any) -> None:
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(len(content).to_bytes(8, "little") + content)
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    """The next message; None at the end of the stream."""
    size = pipe.read(8)
    return pickle.loads(pipe.read(int.from_bytes(size, "little"))) if len(size) == 8 else None


def _listen(pipe: BinaryIO, answers: queue.Queue) -> None:
    with pipe, suppress(EOFError, pickle.UnpicklingError):  # it may end in the middle of a message
        while (message := _receive(pipe)) is not None:
            answers.put(message)
    answers.put(None)


# ------------------------------------------------------------------------------------------------- inside the worker


def serve() -> None:
    """Answer requests until the parent is gone. What a kernel prints goes to stderr, never between the answers."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    run = _run_interpreted() if os.environ.get("TRITON_INTERPRET") == "1" else _run_compiled
    _send(answers, "ready")
    while (request := _receive(sys.stdin.buffer)) is not None:
        try:
            answer: Any = run(*request)
        except BaseException as error:
            answer = _failure(error)
        _send(answers, answer)


def _run_interpreted() -> Callable:
    from . import interpreter

    interpreter.watch()
    return interpreter.run


def _run_compiled(
    source: Source, grid: tuple[int, ...], args: tuple, kwargs: dict[str, Any], buffers: list[Buffer]
) -> dict[int, tuple[np.ndarray, None]]:
    """As `interpreter.run`, on a GPU, where nobody counts."""
    import torch

    on_device = [torch.from_numpy(np.array(buffer.data)).cuda() for buffer in buffers]

    def restore(value: Any) -> Any:
        if not isinstance(value, Pointer):
            return value
        return on_device[value.buffer][value.offset :].view(getattr(torch, value.dtype))

    load(source)[grid](*map(restore, args), **{name: restore(value) for name, value in kwargs.items()})
    return {i: (buffer.cpu().numpy(), None) for i, buffer in enumerate(on_device)}


def _failure(error: BaseException) -> Failure:
    """The innermost error (the interpreter wraps what a kernel raises), with the line of the kernel and its text."""
    trace = "".join(traceback.format_exception(error))
    chain = [error]
    while (error := chain[0].__cause__) is not None:
        chain.insert(0, error)
    message = str(chain[0])
    if place := next(filter(None, map(_place, chain)), None):
        first = (message.strip().splitlines() or [""])[0]
        line = textwrap.shorten(linecache.getline(*place), 90, placeholder=" …")
        message = f"{textwrap.shorten(first, 120, placeholder=' …')}{'' if first.endswith('?') else '.'} "
        message += f"Line {place[1]}: `{line}`"
    return Failure(getattr(chain[0], "kind", type(chain[0]).__name__), message, trace)


def _place(error: BaseException) -> tuple[str, int] | None:
    """The file and the line of the kernel, where the error came through one."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(FILE)]
    return getattr(error, "place", None) or ((frames[-1].filename, frames[-1].lineno) if frames else None)
