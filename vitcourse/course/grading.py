"""How an answer is graded, and its mistake recognised."""

import contextlib
import io
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from vitcourse.devices import resolve_device, widest_float

from . import probes
from .answers import bound, line_of
from .cases import Case, Property
from .catalogue import TODO, Check, Mistake
from .comparing import Finding, Level, compare, describe_error, is_evidence
from .limits import TimeLimit
from .running import Outcome, leaves, map_tensors
from .trial import Attempt, Trial


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


def grade(spec: Check, answer: Callable, seed: int | None = None) -> Verdict:
    """Grade `answer` on fresh inputs; `seed` replays earlier ones."""
    return judge(Trial(spec, secrets.randbits(31) if seed is None else seed), answer)


def judge(trial: Trial, answer: Callable) -> Verdict:
    """Grade `answer` on the cases of `trial`."""
    outcomes: list[Outcome] = []
    with bound(answer):
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
    line = line_of(answer, error)
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
