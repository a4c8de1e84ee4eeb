"""Inputs from an exercise's domain, drawn without a look at the cases of its check, and what an answer does on them."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from vitcourse.course.cases import Case, Random
from vitcourse.course.catalogue import Check
from vitcourse.course.comparing import compare
from vitcourse.course.running import Outcome, random_weights

INPUTS = 200  # that a mutant is compared with the reference on
SECONDS = 3.0  # for one call of a mutant


class Draws(Random):
    """Random inputs and choices of one draw, whose floats are of one type: float64 mostly, else float32."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.dtype = torch.float32 if self.sometimes(1 / 6) else torch.float64

    def size(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return self.integer(low, high + 1)

    def sometimes(self, share: float) -> bool:
        return self.number(0, 1) < share

    def number(self, low: float, high: float) -> float:
        """A Python float in [low, high)."""
        return float(self.uniform(low=low, high=high))

    def spread(self, *options: float) -> float:
        """One of these standard deviations. float32 is too coarse for large exponents: they get float64."""
        chosen = self.choice(options)
        self.dtype = torch.float64 if chosen > 1 else self.dtype
        return chosen

    def floats(self, *shape: int, spread: float = 1.0) -> Tensor:
        """Normal numbers times `spread`, at times not contiguous."""
        make = self.strided if self.sometimes(1 / 6) else self.normal
        return make(*shape, dtype=self.dtype).mul_(spread)

    def positive(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers in [low, high)."""
        return self.uniform(*shape, low=low, high=high, dtype=self.dtype)


# The calls of one draw: of a function one, of a class as many as its instance is to take, one after the other.
Generator = Callable[[Draws], Case | list[Case]]
_DOMAINS: dict[str, Generator] = {}


class Difference(NamedTuple):
    """Where an answer first does something else than the reference, and what."""

    draw: int
    text: str
    raises: bool


def domain(name: str) -> Callable[[Generator], Generator]:
    """Register what draws the inputs of exercise `name`, from what its lesson and its docstring allow."""
    return lambda generator: _DOMAINS.setdefault(name, generator)


class Domain:
    """The inputs of one exercise, drawn from a seed, and what the reference does on each; made when first needed."""

    def __init__(self, spec: Check, seed: int = 0) -> None:
        import_module(f"{__package__}.domains.{spec.topic}")
        self.spec, self.seed, self.generator = spec, seed, _DOMAINS[spec.name]
        self.expected = cache(self._expected)

    def cases(self, i: int) -> list[Case]:
        """The calls of draw `i`."""
        drawn = self.generator(Draws(self._seed(i)))
        return drawn if isinstance(drawn, list) else [drawn]

    def difference(self, answer: Callable, inputs: int = INPUTS) -> Difference | None:
        """The first draw on which `answer` does something else than the reference, and what; None if there is none.

        Compared is what grading compares: output, changes of the inputs, gradients, within the same tolerance.
        """
        for i in range(inputs):
            cases, weights, expected = self.expected(i)
            got = self._outcomes(answer, cases, weights, i)
            for right, own in zip(expected, got, strict=True):
                if finding := compare(right, own, self.spec.tolerance):
                    return Difference(i, finding.text, own.error is not None)
        return None

    def _seed(self, i: int) -> int:
        return 7_000_001 + 1_000_003 * self.seed + i  # far from those that trials are given

    def _expected(self, i: int) -> tuple[list[Case], dict[str, Tensor], list[Outcome]]:
        cases = self.cases(i)
        weights = random_weights(self.spec.reference, cases[0], self._seed(i)) if cases[0].init is not None else {}
        outcomes = self._outcomes(self.spec.reference, cases, weights, i, patience=30)
        for outcome in outcomes:
            if outcome.error or outcome.backward_error:
                problem = f"the reference of {self.spec.name} fails on draw {i} of its domain: {cases}"
                raise RuntimeError(problem) from outcome.error or outcome.backward_error
        return cases, weights, outcomes

    def _outcomes(
        self, answer: Callable, cases: list[Case], weights: dict[str, Tensor], i: int, patience: float = 1.0
    ) -> list[Outcome]:
        """What the answer does in each call; of a class, all are calls of one instance."""
        made: list = []

        def once(*args: object, **kwargs: object) -> object:
            if not made:
                made.append(answer(*args, **kwargs))
            return made[0]

        spec, outcomes = self.spec, []
        for case in cases:
            target = answer if case.init is None else once
            limits = {"gradients": spec.gradients, "seconds": patience * SECONDS, "seed": self._seed(i)}
            outcomes.append(spec.runner(target, case, weights, spec.reference, **limits))
        return outcomes
