"""The cases of a check from one seed, with what the reference does on them; what is kept of an answer's call."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from . import catalogue, probes
from .answers import bound
from .cases import Case, Property, Random, call
from .catalogue import Check, Mistake
from .comparing import Finding, Level, compare
from .running import Kept, Outcome, execute, isolated, named_inputs, random_weights, run


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
        with bound(self.function):
            if isinstance(self.case, Property):
                return self.case.predicate(self.function)
            spec = catalogue.CHECKS[self.name]
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
