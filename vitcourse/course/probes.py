"""What no exercise has to remember: further cases, derived from those of its check, on which every answer is tried.

Each is made from one declared case by a change, one of `KINDS`, and the reference is asked first: what it refuses, or
answers with numbers that are not finite, does not apply. A function is called on all of them. A class is built once,
its weights change as in training, and the one instance gets all the calls, so that what it keeps from the first is
seen. What does not apply although the reference would take it, the check exempts, with a reason::

    @check(..., exempt={"batch": "a table of positions is one for all images"})
"""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cases import Case
from .comparing import Finding, Level, compare, differs
from .running import Outcome, isolated, leaves, map_tensors, named_inputs

if TYPE_CHECKING:
    from .trial import Trial

# What a learner reads of each kind of change.
KINDS = {
    "batch": "with another batch size",
    "single": "with a batch of one",
    "larger": "on larger inputs",
    "smaller": "on smaller inputs",
    "transposed": "with rows and columns exchanged",
    "large": "with large values",
    "tiny": "with tiny values",
    "integers": "on integers from 0 to 255",
    "training": "in training mode",
    "evaluation": "on the first input, in evaluation mode",
}
# What `lint` asks of the cases of a check can be exempted, too.
RULES = ("distinct", "odd", "deep", "square", "sizes")
# Powers of two: nothing is rounded. The largest that leaves the reference finite is taken.
SCALES = {"large": (2.0**10, 2.0**5, 2.0**2), "tiny": (2.0**-10, 2.0**-5)}
SIDES = {"h", "w", "height", "width"}  # of a grid, where they are numbers of their own


@dataclass(frozen=True)
class Probe:
    """One call more: the changes that made it, and what the reference does."""

    kinds: tuple[str, ...]
    case: Case
    expected: Outcome
    gradients: bool | tuple[str, ...]


@dataclass
class Series:
    """The probes made from case number `i` of a check; of a class they are calls of one instance."""

    i: int
    probes: list[Probe] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------- changes of a case


def _slots(case: Case) -> list[Any]:
    return [*case.args, *case.kwargs.values()]


def _with_slots(case: Case, slots: list[Any]) -> Case:
    n = len(case.args)
    return replace(case, args=tuple(slots[:n]), kwargs=dict(zip(case.kwargs, slots[n:], strict=True)))


def _on_tensors(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    return _with_slots(case, map_tensors(_slots(case), change))


def _tensors(case: Case) -> list[Tensor]:
    return [leaf for _, leaf in leaves(_slots(case)) if isinstance(leaf, Tensor) and leaf.ndim]


def _shapes(case: Case) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in _tensors(case)]


def _fit(tensor: Tensor, sizes: dict[int, int]) -> Tensor:
    """Axes of these sizes get new ones. Rows beyond the last are mixtures of two: other numbers of the same kind."""
    for axis, old in enumerate(tensor.shape):
        if (new := sizes.get(old, old)) == old:
            continue
        number = torch.arange(new)
        first = tensor.index_select(axis, number % old)
        if new > old and not _counts(tensor):
            beyond = (number >= old).view(-1, *[1] * (tensor.ndim - axis - 1))
            mixed = 0.625 * first + 0.375 * tensor.index_select(axis, (number + 1) % old)
            first = torch.where(beyond, mixed, first)
        tensor = first
    return tensor


def _counts(tensor: Tensor) -> bool:
    """Whole numbers stay whole, and keep their size: they number things, or count them."""
    return not tensor.is_floating_point() or torch.equal(tensor, tensor.round())


def resized(case: Case, sizes: dict[int, int]) -> Case:
    """All axes of these sizes get new ones, in all tensors alike: in a good case equal sizes mean the same thing.

    >>> resized(Case((torch.zeros(2, 5), torch.zeros(5, 3)), {}), {5: 7}).args[1].shape
    torch.Size([7, 3])
    """
    return _on_tensors(case, lambda tensor: _fit(tensor, sizes))


def _is_grid(value: Any) -> bool:
    """(h, w), or (h, w, prefix tokens)."""
    return isinstance(value, tuple) and len(value) in (2, 3) and all(type(n) is int for n in value)


def _with_side(case: Case, slot: int, side: int, new: int) -> Case:
    """One side of a grid changes, and with it the number of tokens, where some axis counts them."""
    slots = _slots(case)
    grid = list(slots[slot])
    tokens = grid[0] * grid[1]
    grid[side] = new
    slots[slot] = tuple(grid)
    axes = {n for tensor in _tensors(case) for n in tensor.shape}
    extra = next((extra for extra in range(4) if tokens + extra in axes), None)
    case = _with_slots(case, slots)
    return case if extra is None else resized(case, {tokens + extra: grid[0] * grid[1] + extra})


def _names(case: Case, signature_of: Callable) -> list[str]:
    return [*list(named_inputs(signature_of, case))[: len(case.args)], *case.kwargs]


def _resizings(case: Case, names: list[str], sizes_for: Callable[[int], list[int]]) -> Iterator[Callable]:
    """For each size of a case a function: case to candidates that have another one, the best first."""
    slots = _slots(case)
    for i, (name, value) in enumerate(zip(names, slots, strict=True)):
        for side in (0, 1) if _is_grid(value) else ():
            yield lambda c, i=i, side=side: [_with_side(c, i, side, n) for n in sizes_for(_slots(c)[i][side])]
        if name in SIDES and type(value) is int:
            yield lambda c, i=i: [
                _with_slots(c, [n if j == i else v for j, v in enumerate(_slots(c))]) for n in sizes_for(_slots(c)[i])
            ]
    for size in _sizes(case)[1:]:  # the first is the batch's

        def candidates(c: Case, size: int = size) -> list[Case]:
            return [resized(c, {size: n}) for n in sizes_for(size) if n not in _sizes(c)]

        yield candidates


def _sizes(case: Case) -> list[int]:
    """The sizes of all axes, the batch's first."""
    return list(dict.fromkeys(n for tensor in _tensors(case) for n in tensor.shape))


def _larger(n: int) -> list[int]:
    return [2 * n, n + 1, n + 2]  # first what patches and windows still divide


def _smaller(n: int) -> list[int]:
    return [*(n // p for p in (2, 3) if n % p == 0), *([n - 1] if n > 2 else [])]


def transposed(case: Case, names: list[str]) -> list[Case]:
    """Rows and columns exchanged: in grids, and in images, whose channels come first, or last."""
    slots = [(v[1], v[0], *v[2:]) if _is_grid(v) else v for v in _slots(case)]
    sides = [i for i, name in enumerate(names) if name in SIDES and type(slots[i]) is int]
    for i, j in zip(sides, reversed(sides), strict=True):
        slots[i] = _slots(case)[j]
    turned = _with_slots(case, slots)
    if sum(tensor.ndim == 4 for tensor in _tensors(case)) != 1:
        return [turned]
    images = [_on_tensors(turned, lambda t, a=axes: t.transpose(*a) if t.ndim == 4 else t) for axes in ((2, 3), (1, 2))]
    return [image for image in images if _shapes(image) != _shapes(case)]


def scaled(case: Case, factor: float) -> Case:
    """All floating-point numbers times `factor`."""
    return _on_tensors(case, lambda tensor: tensor if _counts(tensor) else tensor * factor)


def integers(case: Case) -> Case:
    """Floating-point numbers become bytes, as pixels are."""

    def bytes_of(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        low, high = tensor.aminmax()
        return ((tensor - low) / ((high - low) or 1) * 255).round().to(torch.uint8)

    return _on_tensors(case, bytes_of)


# ------------------------------------------------------------------------------------------------- asking the reference


class _Oracle:
    """What the reference makes of changed cases: in evaluation mode, which leaves it as it was, without gradients."""

    def __init__(self, trial: "Trial", i: int) -> None:
        self.case, self.known = trial.cases[i], trial.expected[i]
        self.names = _names(self.case, getattr(trial.spec.runner, "signature_of", trial.reference))
        self.run = trial.kept(trial.reference, i)

    def answer(self, case: Case) -> Any:
        """The output; None where it refuses, or is not finite though for the declared case it is."""
        if _same(case, self.case):
            return None
        output = self.run.output(replace(case, training=False))
        return output if _finite(output) or not _finite(self.known.output) else None

    def first(self, cases: Iterable[Case]) -> Case | None:
        """The first of them that the reference takes."""
        return next((case for case in cases if self.answer(case) is not None), None)

    def all_resized(self, sizes_for: Callable[[int], list[int]]) -> Case | None:
        """As many sizes changed as the reference allows."""
        found = self.case
        for candidates in _resizings(self.case, self.names, sizes_for):
            found = self.first(candidates(found)) or found
        return None if found is self.case else found


def _finite(output: Any) -> bool:
    return all(leaf.isfinite().all() for _, leaf in leaves(output) if isinstance(leaf, Tensor))


def _same(a: Case, b: Case) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, dict) and isinstance(y, dict):
            return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
        if isinstance(x, list | tuple) and isinstance(y, list | tuple):
            return len(x) == len(y) and all(map(equal, x, y))
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y

    return all(map(equal, _slots(a), _slots(b)))


_Changes = Iterator[tuple[tuple[str, ...], Case]]
_SIZED = {"larger": ("batch", _larger, lambda n: [n + 1, 2 * n]), "smaller": ("single", _smaller, lambda n: [1])}


def _other_sizes(ask: _Oracle, exempt: Container[str], sized: str) -> _Changes:
    """Larger or smaller inputs, and more or fewer of them: together where they can, which saves calls."""
    counted, sizes_for, batches = _SIZED[sized]
    case = None if sized in exempt else ask.all_resized(sizes_for)
    kinds, base = (sized,) if case else (), case or ask.case
    if counted not in exempt and (sizes := _sizes(ask.case)):
        free = [n for n in batches(sizes[0]) if n == 1 or n not in _sizes(base)]
        if both := ask.first(resized(base, {sizes[0]: n}) for n in free):
            kinds, case = (counted, *kinds), both
    if case:
        yield kinds, case


def _other_values(ask: _Oracle, exempt: Container[str]) -> _Changes:
    if "transposed" not in exempt and (case := ask.first(transposed(ask.case, ask.names))):
        yield ("transposed",), case
    for kind, factors in SCALES.items():
        if kind not in exempt and (case := ask.first(scaled(ask.case, factor) for factor in factors)):
            yield (kind,), case
    # Pixels as bytes are for those who move values, and do not compute with them: what comes out are bytes, too.
    if "integers" not in exempt and _only_bytes(ask.answer(case := integers(ask.case))):
        yield ("integers",), case


def _only_bytes(output: Any) -> bool:
    return {getattr(leaf, "dtype", None) for _, leaf in leaves(output)} == {torch.uint8}


def _changes(ask: _Oracle, exempt: Container[str]) -> _Changes:
    """All changed cases that the reference takes."""
    yield from _other_sizes(ask, exempt, "larger")
    yield from _other_sizes(ask, exempt, "smaller")
    yield from _other_values(ask, exempt)
    if ask.case.init is not None:
        for kind, training in (("training", True), ("evaluation", False)):
            if kind not in exempt:
                yield (kind,), replace(ask.case, training=training)


def _again(ask: _Oracle, exempt: Container[str]) -> _Changes:
    """One call more of a class that is built in another way: what it may keep, and training, at once."""
    for kinds, case in _other_sizes(ask, {*exempt, "larger"}, "larger"):
        yield (*kinds, "training"), replace(case, training="training" not in exempt)


# ------------------------------------------------------------------------------------------------------------- judging


def derive(trial: "Trial", exempt: Container[str]) -> list[Series]:
    """All probes of a trial: from the first case, and from each other way in which a case builds a class."""
    found, seen = [], []
    for i, case in enumerate(trial.cases):
        if not isinstance(case, Case) or case.init in seen:
            continue
        seen.append(case.init)
        ask = _Oracle(trial, i)
        with isolated(trial.seed):
            rows = list((_again if found else _changes)(ask, exempt))
        calls = [(case, _with_gradients(kinds) and trial.gradients_of(i)) for kinds, case in rows]
        pairs = zip(rows, calls, strict=True)
        found.append(Series(i, [Probe(kinds, case, ask.run(*call), call[1]) for (kinds, case), call in pairs]))
    return found


def _with_gradients(kinds: tuple[str, ...]) -> bool:
    """Once with new sizes and once in training: elsewhere they are rounding, or the same."""
    return "larger" in kinds or "batch" in kinds or "training" in kinds


@dataclass(frozen=True)
class Failure:
    """The first probe that an answer fails, what it did, and what a learner reads of it."""

    i: int
    probe: Probe
    got: Outcome
    text: str


def first_failure(trial: "Trial", answer: Callable) -> Failure | None:
    """Try an answer, all declared cases of which are right, on the probes."""
    for series in trial.series:
        earlier = [trial.cases[series.i]]
        run = trial.kept(answer, series.i)
        for probe in series.probes:
            got = run(probe.case, probe.gradients)
            if finding := _compare(trial, probe, got):
                return _failure(trial, answer, series.i, probe, got, finding, tuple(earlier))
            earlier.append(probe.case)
    return None


def _compare(trial: "Trial", probe: Probe, got: Outcome) -> Finding | None:
    return compare(probe.expected, got, trial.spec.tolerance, Level.GRADIENTS if probe.gradients else Level.EFFECTS)


def _failure(
    trial: "Trial", answer: Callable, i: int, probe: Probe, got: Outcome, finding: Finding, earlier: tuple[Case, ...]
) -> Failure:
    """Name what broke: the change, or that it was not the first call."""
    told = finding.text
    what = ", ".join(KINDS[kind] for kind in probe.kinds)
    if {"batch", "single", "larger", "smaller", "transposed"} & set(probe.kinds):
        what = f"{what} ({_described(probe.case, trial)})"
    if probe.case.init is None:
        return Failure(i, probe, got, f"right on other inputs, but {what}: {told}")
    alone = trial.run_case(answer, i, probe.case, probe.gradients)
    if probe.case.training and _is_random(trial, answer, i, probe, alone):
        return Failure(i, probe, alone, "in training mode the output changes from call to call: is there dropout?")
    if _compare(trial, probe, alone):
        other = "" if probe.case.training else "right on other inputs, but "
        return Failure(i, probe, alone, f"{other}{what}: {told}")
    told = f"right when called once; called a second time, {what}: {told}; is something kept from an earlier call?"
    return Failure(i, replace(probe, case=replace(probe.case, earlier=earlier)), got, told)


def _is_random(trial: "Trial", answer: Callable, i: int, probe: Probe, got: Outcome) -> bool:
    other = trial.run_case(answer, i, probe.case, False, other_seed=1)
    return not (got.error or other.error) and bool(differs(got.output, other.output))


def _described(case: Case, trial: "Trial") -> str:
    """The inputs that have a size: ``x (2, 24, 8), grid (4, 6, 0)``."""
    named = named_inputs(getattr(trial.spec.runner, "signature_of", trial.reference), case)
    sizes = {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in named.items()}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if isinstance(size, (tuple, int)))
