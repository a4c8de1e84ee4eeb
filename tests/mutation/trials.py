"""The verdict on one mutant: does it differ from the reference on the domain, and does the grader reject it?"""

import contextlib
import io
import multiprocessing
import time
import warnings
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from unittest import mock

import torch

from vitcourse.course import checks, grading
from vitcourse.course.running import run

from .answers import solution
from .domain import INPUTS, SECONDS, Domain

SEEDS = (0, 1, 2)  # of the trials; the grader has to reject a mutant on every one
PATIENCE = 120.0  # seconds, for one mutant; ten times as many where another process interprets it


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        status: ``"equivalent"``, ``"rejected"`` or ``"survived"``; ``"broken"`` where the cell does not even define the
            answer, and ``"hung"`` where its process had to be ended: neither counts, and the latter is listed.
        differs: what the first difference from the reference is, on the domain; "" where there is none.
        on: the draws of the domain that it took to find it.
        accepted: the seeds on which the grader accepts it.
        raises: whether that difference is an exception, or no end.
    """

    status: str
    differs: str = ""
    on: int = 0
    accepted: tuple[int, ...] = ()
    raises: bool = False

    @property
    def counts(self) -> bool:
        return self.status in ("rejected", "survived")


class Examiner:
    """Gives verdicts on the mutants of one exercise."""

    def __init__(self, name: str) -> None:
        spec = checks.find(name)
        self.solution = solution(name)
        self.domain = Domain(spec)
        spec = replace(spec, seconds=min(spec.seconds, SECONDS))
        self.trials = [grading.Trial(spec, seed) for seed in SEEDS]

    def verdict(self, source: str | None = None, inputs: int = INPUTS) -> Verdict:
        """The verdict on a changed cell; without one, on the reference solution itself."""
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                answer = self.solution.answer(source)
            except Exception as error:
                return Verdict("broken", repr(error))
            found = self.domain.difference(answer, inputs)
            accepted = tuple(trial.seed for trial in self.trials if _accepts(trial, answer))
        if found is None:
            return Verdict("equivalent", on=inputs, accepted=accepted)
        return Verdict("survived" if accepted else "rejected", found.text, found.draw + 1, accepted, found.raises)


def _accepts(trial: grading.Trial, answer: object) -> bool:
    # Which mistake it is makes no difference, and takes most of the time.
    with mock.patch.object(grading, "_diagnose", lambda *_: None):
        return grading.judge(trial, answer).status == "right"


class Worker:
    """A process that gives verdicts, and is replaced when a mutant ends it or does not come to an end."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self.seconds = 0.0  # of CPU time that the verdicts took

    def verdict(self, name: str, source: str | None) -> Verdict:
        if self._process is None:
            self._pipe, end = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(end,), daemon=True)
            self._process.start()
            end.close()
        try:
            self._pipe.send((name, source))
            patience = PATIENCE if checks.find(name).runner is run else 10 * PATIENCE
            if self._pipe.poll(patience):
                answer, seconds = self._pipe.recv()
                self.seconds += seconds
                if isinstance(answer, Exception):
                    raise RuntimeError(f"{name} cannot be examined: {answer}") from answer
                return answer
            problem = f"no end after {patience:.0f} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            problem = "the process ended"
        self.stop()
        return Verdict("hung", problem)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


_examiner = cache(Examiner)


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    _limit_memory()
    while True:
        try:
            name, source = pipe.recv()
        except EOFError:
            return
        started = _cpu_seconds()
        try:
            answer: Verdict | Exception = _examiner(name).verdict(source)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}; {error.__cause__!r}")
        pipe.send((answer, _cpu_seconds() - started))


def _cpu_seconds() -> float:
    """Of this process; kernels are interpreted in another one, whose time is not seen here."""
    return time.process_time()


def _limit_memory() -> None:
    """A mutant that asks for 20 GB gets an error, and nobody else has to give it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, resource.getrlimit(resource.RLIMIT_DATA)[1]))
