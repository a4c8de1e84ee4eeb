"""The check of `finetuning.interpolate`."""

import torch

from vitcourse.course.checks import call, check


@check(
    "finetuning.interpolate",
    reference="vitcourse.finetuning.interpolate",
    level=2,
    minutes=10,
    why="Three lines that have won back more robustness than most training tricks.",
    gradients=False,  # a state dict has no graph
    hints=[
        "At alpha = 0 all comes from `start`, at 1 all from `end`.",
        "`tensor.is_floating_point()` says whether there is a half of it.",
    ],
    exempt={
        "batch": "the tensors are the weights of two models",
        "single": "the tensors are the weights of two models",
        "larger": "the tensors are the weights of two models",
        "smaller": "the tensors are the weights of two models",
    },
)
def interpolate_cases(rng):
    def state():
        return {"weight": rng.normal(3, 5), "bias": rng.normal(3), "count": rng.integers(10, 90, (2,))}

    for alpha in (0.25, 0.75, 0.5, 0.0, 1.0):
        yield call(state(), state(), alpha).on(f"alpha = {alpha}")
    yield call(state(), dict(reversed(state().items())), 0.25).on("end's names in another order")
    yield call(state(), state(), 1.25).on("alpha = 1.25, beyond the end")

    def whole():
        names = {"norm.running_mean": rng.normal(3), "pos_embed": rng.normal(1, 4, 2)}
        return {**state(), **names, "norm.num_batches_tracked": torch.tensor(rng.integer(10, 90))}

    for alpha in (0.25, 0.75):
        yield call(whole(), whole(), alpha).on(f"statistics and positions, alpha = {alpha}")


def _mixed(start, end, of_floats, of_integers):
    return {n: (of_floats if s.is_floating_point() else of_integers)(s, end[n]) for n, s in start.items()}


def _nearer(alpha):
    return lambda s, e: (e if alpha >= 0.5 else s).clone()


interpolate_cases.mistake(
    "ends-exchanged",
    "start and end are exchanged: at alpha = 0 this is the end",
    lambda start, end, alpha: _mixed(start, end, lambda s, e: alpha * s + (1 - alpha) * e, _nearer(1 - alpha - 1e-9)),
)
interpolate_cases.mistake(
    "not-a-mean",
    "the start keeps its whole weight, and the end is added to it; the two shares should sum to one",
    lambda start, end, alpha: _mixed(start, end, lambda s, e: s + alpha * e, _nearer(alpha)),
)
interpolate_cases.mistake(
    "integers-mixed",
    "integers become fractions: a batch norm has counted whole batches",
    lambda start, end, alpha: {n: (1 - alpha) * s + alpha * end[n] for n, s in start.items()},
)
interpolate_cases.mistake(
    "integers-of-the-start",
    "integers are those of the start, wherever on the line this is; they should be those of the nearer end",
    lambda start, end, alpha: _mixed(start, end, lambda s, e: (1 - alpha) * s + alpha * e, lambda s, e: s.clone()),
)
interpolate_cases.mistake(
    "integers-left-out",
    "the integers are missing, and the state dict is no longer complete",
    lambda start, end, alpha: {n: (1 - alpha) * s + alpha * end[n] for n, s in start.items() if s.is_floating_point()},
)
