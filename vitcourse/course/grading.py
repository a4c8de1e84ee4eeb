"""The checks of exercises: how one is written down, and how an answer is graded and its mistake recognised.

How to write one is shown in `vitcourse.course.checks`.
"""

import contextlib
import dis
import io
import re
import secrets
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

import torch

from vitcourse.devices import resolve_device, widest_float

from . import probes
from .cases import Case, Property, Random, call
from .comparing import Finding, Level, compare, describe_error, is_evidence
from .running import (
    Kept,
    Outcome,
    TimeLimit,
    execute,
    isolated,
    leaves,
    map_tensors,
    named_inputs,
    random_weights,
    run,
)


class TODO(Exception):
    """Stands in the blank of an exercise: ``raise TODO``. Nothing else counts as "not attempted"."""


@dataclass(frozen=True)
class Mistake:
    """A plausible wrong answer, and the misconception behind it."""

    key: str
    message: str
    faulty: Callable


@dataclass
class Check:
    """Everything the course knows of one exercise. Made by `check`."""

    name: str
    reference_path: str
    cases: Callable[[Random], Iterable[Case | Property]]
    level: int
    minutes: int
    why: str
    hints: tuple[str, ...]
    tolerance: float | None
    gradients: bool | tuple[str, ...]
    seconds: float
    blanks: int
    exempt: dict[str, str]
    # How one call is made. An exercise that may crash or hang its process brings a runner of its own.
    runner: Callable[..., Outcome]
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def topic(self) -> str:
        """The lesson: ``vit`` of ``vit.image_to_patch``."""
        return self.name.partition(".")[0]

    @property
    def short_name(self) -> str:
        """The name of the function or class that the learner writes."""
        return self.name.partition(".")[2]

    @property
    def reference(self) -> Callable:
        """The library's own part."""
        module, _, attribute = self.reference_path.rpartition(".")
        return getattr(import_module(module), attribute)

    def mistake(self, key: str, message: str, faulty: Callable | None = None) -> Callable:
        """Catalogue a plausible wrong answer; a decorator, or a call with the faulty function or class.

        `message` names the misconception without giving the answer away. A learner reads it when their answer does
        exactly what `faulty` does, on every case. `key` is a short slug by which tests refer to the mistake.
        """
        if faulty is None:
            return lambda faulty: self.mistake(key, message, faulty)
        if any(key == known.key for known in self.mistakes):
            raise ValueError(f"{self.name} already has a mistake {key!r}; choose another key")
        self.mistakes.append(Mistake(key, message, faulty))
        return faulty

    def find_mistake(self, key: str) -> Mistake:
        """The catalogued mistake of that key."""
        for mistake in self.mistakes:
            if mistake.key == key:
                return mistake
        raise ValueError(f"{self.name} has no mistake {key!r}; it has {[mistake.key for mistake in self.mistakes]}")


CHECKS: dict[str, Check] = {}


def check(
    name: str,
    *,
    reference: str,
    level: int,
    minutes: int,
    why: str,
    hints: Sequence[str] = (),
    tolerance: float | None = None,
    gradients: bool | tuple[str, ...] = True,
    seconds: float = 10.0,
    blanks: int = 1,
    exempt: Mapping[str, str] | None = None,
    runner: Callable[..., Outcome] = run,
) -> Callable[[Callable[[Random], Iterable[Case | Property]]], Check]:
    """Register the check of exercise `name` over a generator of cases; see `vitcourse.course.checks` for an example.

    Args:
        name: ``"<topic>.<function or class>"``.
        reference: dotted path of the library's part, imported when it is first needed.
        level: difficulty, 1 to 5.
        minutes: how long it takes, about.
        why: one sentence on why it matters.
        hints: steps, the first the gentlest.
        tolerance: largest error, as a fraction of the largest value expected; None takes one that fits the dtype.
        gradients: compare gradients with regard to inputs and parameters too; or the names of the inputs whose
            gradients count, where others (sizes, masks) are numbers that nobody trains. Set it to False where the
            answer itself differentiates with regard to its inputs.
        seconds: time limit of one call.
        blanks: how many the exercise has, so that one that is left among others can be named.
        exempt: which of `probes.KINDS`, or of `lint.RULES`, do not apply, each with the reason.
        runner: makes one call, with the signature of `running.run`.

    Raises:
        ValueError: the name has no topic, `level` or `minutes` is out of range, or what is exempted has no such name
            or no reason.
    """
    if not re.fullmatch(r"[a-z]\w*\.[A-Za-z]\w*", name):
        raise ValueError(f"exercise name {name!r} should read '<topic>.<function or class>'")
    if not 1 <= level <= 5 or minutes < 1:
        raise ValueError(f"{name}: level {level} should be 1 to 5, and minutes {minutes} at least 1")

    for kind, reason in (exempt or {}).items():
        if kind not in (*probes.KINDS, *probes.RULES):
            raise ValueError(f"{name} exempts {kind!r}, which is none of {', '.join((*probes.KINDS, *probes.RULES))}")
        if not reason.strip():
            raise ValueError(f"{name} exempts {kind!r} without a reason")

    def register(cases: Callable[[Random], Iterable[Case | Property]]) -> Check:
        CHECKS[name] = Check(
            name, reference, cases, level, minutes, why, tuple(hints), tolerance, gradients, seconds, blanks,
            dict(exempt or {}), runner,
        )  # fmt: skip
        return CHECKS[name]

    return register


# ------------------------------------------------------------------------------------------------------------ verdicts


@dataclass
class Attempt:
    """What a learner's answer did on the case that decided."""

    name: str
    function: Callable
    case: Case | Property | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    expected: Any = None
    error: BaseException | None = None
    seed: int = 0

    @property
    def traceback(self) -> str:
        """The traceback of `error`, as text; "" without one."""
        return "".join(traceback.format_exception(self.error)) if self.error else ""

    def replay(self) -> Any:
        """Call the answer again on the same inputs, with errors let through: try ``%debug`` after it."""
        with _bound(self.function):
            if isinstance(self.case, Property):
                return self.case.predicate(self.function)
            spec = CHECKS[self.name]
            if spec.runner is run:
                return execute(self.function, self.case, self.weights, spec.reference, False).output
            outcome = spec.runner(
                self.function, self.case, self.weights, spec.reference,
                gradients=False, seconds=spec.seconds, seed=self.seed,
            )  # fmt: skip
            if outcome.error:
                raise outcome.error
            return outcome.output

    def __repr__(self) -> str:
        state = type(self.error).__name__ if self.error else "no error"
        return f"Attempt({self.name!r}, inputs: {', '.join(self.inputs) or 'none'}; {state}; seed={self.seed})"


@dataclass(frozen=True)
class Verdict:
    """The judgement of an answer. `text` says what differs, `mistake` why, where that is known.

    `telling`: the text says what to mend, and a hint would only distract from it.
    """

    status: Literal["right", "wrong", "blank"]
    attempt: Attempt
    text: str = ""
    mistake: Mistake | None = None
    telling: bool = False


class Trial:
    """All cases of a check from one seed, each with what the reference does on it; any number of answers can follow."""

    def __init__(self, spec: Check, seed: int) -> None:
        self.spec, self.seed, self.reference = spec, seed, spec.reference
        self._faulty: dict[tuple[str, int], Outcome] = {}
        with isolated(seed):
            self.cases = list(spec.cases(Random(seed)))
        if not self.cases:
            raise ValueError(f"the check of {spec.name} yields no cases, so it cannot fail")
        for case in self.cases:
            if isinstance(case, Property) and case.points_to:
                spec.find_mistake(case.points_to)
        self.weights = [
            random_weights(self.reference, case, seed + i) if isinstance(case, Case) and case.init is not None else {}
            for i, case in enumerate(self.cases)
        ]
        # The reference gets ten times the time: a busy machine must not fail it.
        self.expected = [
            self._run(self.reference, i, spec.gradients, 10 * spec.seconds) for i in range(len(self.cases))
        ]
        for case, expected in zip(self.cases, self.expected, strict=True):
            if expected.error or (isinstance(case, Property) and not expected.output):
                raise RuntimeError(f"the reference of {spec.name} fails its own check {case}") from expected.error

    def outcome(self, answer: Callable, i: int) -> Outcome:
        """What `answer` does on case `i`."""
        return self._run(answer, i, self.gradients_of(i), self.spec.seconds)

    def faulty(self, mistake: Mistake, i: int) -> Outcome:
        """What a catalogued mistake does on case `i`."""
        if (mistake.key, i) not in self._faulty:
            self._faulty[mistake.key, i] = self.outcome(mistake.faulty, i)
        return self._faulty[mistake.key, i]

    def _run(self, answer: Callable, i: int, gradients: bool | tuple[str, ...], seconds: float) -> Outcome:
        case, limits = self.cases[i], {"seconds": seconds, "seed": self.seed + i}
        if isinstance(case, Property):
            return run(lambda: bool(case.predicate(answer)), call(), {}, lambda: None, gradients=False, **limits)
        return self.spec.runner(answer, case, self.weights[i], self.reference, gradients=gradients, **limits)

    @cached_property
    def series(self) -> list[probes.Series]:
        """The further cases that are made from those of the check, when an answer gets so far."""
        return probes.derive(self, self.spec.exempt)

    def gradients_of(self, i: int) -> bool | tuple[str, ...]:
        """Those that are compared on case `i` and on what is made from it."""
        return self.expected[i].attached and self.spec.gradients

    def _limits(self, answer: Callable, i: int) -> dict[str, Any]:
        return {"seconds": self.spec.seconds * (10 if answer is self.reference else 1), "seed": self.seed + i}

    def run_case(
        self, answer: Callable, i: int, case: Case, gradients: bool | tuple[str, ...], other_seed: int = 0
    ) -> Outcome:
        """What `answer` does on a case that was made from case `i`."""
        limits = self._limits(answer, i)
        limits["seed"] += other_seed
        return self.spec.runner(answer, case, self.weights[i], self.reference, gradients=gradients, **limits)

    def kept(self, answer: Callable, i: int) -> Kept:
        """Makes calls like that of case `i`, one after the other: if the answer is a class, of one instance."""
        limits = self._limits(answer, i)
        return Kept(answer, self.cases[i], self.weights[i], self.reference, runner=self.spec.runner, **limits)

    def compare(self, i: int, got: Outcome) -> Finding | None:
        finding = compare(self.expected[i], got, self.spec.tolerance)
        case = self.cases[i]
        if finding and isinstance(case, Property) and finding.level is Level.OUTPUT:
            return replace(finding, text=case.text)
        return finding

    def attempt(
        self, answer: Callable, i: int, got: Outcome, case: Case | None = None, expected: Outcome | None = None
    ) -> Attempt:
        """What is kept of a call: of case `i`, or of another that was made from it."""
        case, expected = case or self.cases[i], expected or self.expected[i]
        attempt = Attempt(self.spec.name, answer, case, self.weights[i], seed=self.seed, error=got.error)
        attempt.output, attempt.expected = got.output, expected.output
        if isinstance(case, Case):
            attempt.inputs = named_inputs(getattr(self.spec.runner, "signature_of", self.reference), case)
        return attempt


def grade(spec: Check, answer: Callable, seed: int | None = None) -> Verdict:
    """Grade `answer` on fresh inputs; `seed` replays earlier ones."""
    return judge(Trial(spec, secrets.randbits(31) if seed is None else seed), answer)


def judge(trial: Trial, answer: Callable) -> Verdict:
    """Grade `answer` on the cases of `trial`."""
    outcomes: list[Outcome] = []
    with _bound(answer):
        for i in range(len(trial.cases)):
            # What the answer prints is shown once, not for every case.
            with contextlib.nullcontext() if i == 0 else contextlib.redirect_stdout(io.StringIO()):
                outcomes.append(trial.outcome(answer, i))
            attempt = trial.attempt(answer, i, outcomes[-1])
            if isinstance(outcomes[-1].error, TODO):
                return Verdict("blank", attempt)
            if finding := trial.compare(i, outcomes[-1]):
                text = _with_place(finding.text, trial.cases[i], answer, outcomes[-1].error)
                return Verdict("wrong", attempt, text, _diagnose(trial, answer, outcomes, finding), finding.telling)
        with contextlib.redirect_stdout(io.StringIO()):
            failure = probes.first_failure(trial, answer)
        if failure:
            probe, got = failure.probe, failure.got
            text = _with_place(failure.text, probe.case, answer, got.error)
            return Verdict(
                "wrong", trial.attempt(answer, failure.i, got, probe.case, probe.expected), text, telling=True
            )
        if text := _elsewhere(trial, answer):
            return Verdict("wrong", attempt, text, telling=True)
    return Verdict("right", attempt)


def _with_place(text: str, case: Case | Property, answer: Callable, error: BaseException | None) -> str:
    line = _line(answer, error)
    place = ", ".join(filter(None, (case.label, f"line {line}" if line else "")))
    return f"{text} ({place})" if place else text


def _diagnose(trial: Trial, answer: Callable, outcomes: list[Outcome], finding: Finding) -> Mistake | None:
    """The one catalogued mistake that does on every case what the answer does; None where none or several do."""
    failed = trial.cases[len(outcomes) - 1]
    if isinstance(failed, Property) and failed.points_to and finding.level is Level.OUTPUT:
        return trial.spec.find_mistake(failed.points_to)
    if isinstance(outcomes[-1].error, TimeLimit):
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        for i in range(len(outcomes), len(trial.cases)):
            outcomes.append(trial.outcome(answer, i))
            if isinstance(outcomes[-1].error, TimeLimit):
                return None
        found = [mistake for mistake in trial.spec.mistakes if _makes(trial, mistake, outcomes, finding.level)]
    return found[0] if len(found) == 1 else None


def _makes(trial: Trial, mistake: Mistake, outcomes: list[Outcome], level: Level) -> bool:
    evidence = False
    calls_first = sorted(enumerate(outcomes), key=lambda pair: isinstance(trial.cases[pair[0]], Property))
    for i, got in calls_first:
        faulty = trial.faulty(mistake, i)
        if compare(faulty, got, trial.spec.tolerance, upto=max(level, Level.OUTPUT)):
            return False
        if isinstance(trial.cases[i], Case):
            evidence |= is_evidence(trial.expected[i], faulty, got, trial.spec.tolerance)
    return evidence


def _elsewhere(trial: Trial, answer: Callable) -> str:
    """On the session's device, if that is no CPU, nothing may have been left on one. One case is enough to tell."""
    spec, device = trial.spec, resolve_device()
    i = next((i for i, case in enumerate(trial.cases) if isinstance(case, Case)), None)
    if i is None or device.type == "cpu" or device.type not in getattr(spec.runner, "device_types", (device.type,)):
        return ""
    case = trial.cases[i]
    args, kwargs = map_tensors((case.args, case.kwargs), lambda tensor: _moved(tensor, device))
    moved = replace(case, args=args, kwargs=kwargs)
    right, own = (
        spec.runner(
            function, moved, trial.weights[i], trial.reference,
            gradients=False, seconds=spec.seconds, seed=trial.seed,
        )
        for function in (trial.reference, answer)
    )  # fmt: skip
    if right.error:
        return ""
    if own.error:
        text = _with_place(describe_error(own.error), case, answer, own.error)
        return f"right on the CPU, but on {device}: {text}"
    for (_, a), (_, b) in zip(leaves(right.output), leaves(own.output), strict=True):
        if isinstance(a, torch.Tensor) and a.device != b.device:
            return f"right on the CPU, but on {device} the output is on {b.device}, expected on {a.device}"
    return ""


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Inputs are float64, which some devices do not have. What matters there is where tensors lie."""
    single = tensor.is_floating_point() and tensor.dtype.itemsize > widest_float(device).itemsize
    return tensor.to(device, torch.float32 if single else tensor.dtype)


# --------------------------------------------------------------------------------------------- the learner's own code


def _functions(answer: Callable) -> Iterator[Any]:
    for value in vars(answer).values() if isinstance(answer, type) else (answer,):
        value = getattr(value, "__func__", value)
        if hasattr(value, "__code__"):
            yield value


def blanks_in(answer: Callable) -> list[str]:
    """The names of the functions of an answer that still say ``raise TODO``, once for each time."""
    return [
        function.__name__
        for function in _functions(answer)
        for step in dis.get_instructions(function)
        if step.opname == "LOAD_GLOBAL" and step.argval == "TODO"
    ]


def _line(answer: Callable, error: BaseException | None) -> int | None:
    """The line of the answer's cell or file in which `error` was raised."""
    files = {function.__code__.co_filename for function in _functions(answer)}
    lines = (
        [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
        if error
        else []
    )
    return lines[-1] if lines else None


@contextlib.contextmanager
def _bound(answer: Callable) -> Iterator[None]:
    """Give the answer its name while it runs: a decorator runs before Python does so.

    ``super(Name, self)`` needs it, and a function that calls itself.
    """
    function = next(_functions(answer), None)
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
