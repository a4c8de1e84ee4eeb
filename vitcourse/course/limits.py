"""A limit to the time that an answer may take."""

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class TimeLimit(BaseException):
    """The answer ran too long. A BaseException, so that ``except Exception`` in an endless loop does not swallow it."""


class _Withdrawn(BaseException):
    """Takes the place of a `TimeLimit` that came too late."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimit` in the block after `seconds`, even in an endless loop of Python code."""
    in_main = threading.current_thread() is threading.main_thread()
    with _alarm(seconds) if in_main and hasattr(signal, "setitimer") else _watcher(seconds):
        yield


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeLimit

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    # The second argument repeats the alarm: a bare `except:` in the loop survives only one.
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, handler)
        if remaining:
            remaining = max(remaining - (time.monotonic() - started), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, remaining, interval)


@contextmanager
def _watcher(seconds: float) -> Iterator[None]:
    """For Windows and for threads, which know no alarm signal."""
    thread = ctypes.c_ulong(threading.get_ident())
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    lock, over, fired = threading.Lock(), False, False

    def stop() -> None:
        nonlocal fired
        with lock:
            if not over:
                fired = True
                raise_in(thread, ctypes.py_object(TimeLimit))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
        timer.cancel()
        if fired:
            _withdraw(thread, raise_in)


def _withdraw(thread: ctypes.c_ulong, raise_in: Callable[..., int]) -> None:
    """Take back an exception that was set but perhaps not raised yet: another one takes its place, and is caught.

    Setting none leaves Python 3.11 looking for one at every step, and a debugger in an endless loop.
    """
    try:
        raise_in(thread, ctypes.py_object(_Withdrawn))
        while True:
            pass
    except _Withdrawn:
        return
