"""The check of `pretraining.momentum_at`."""

import math

from vitcourse.course.checks import call, check


@check(
    "pretraining.momentum_at",
    reference="vitcourse.pretraining.moco.momentum_at",
    level=1,
    minutes=5,
    why="The keys follow quickly while all is new, and stand still at the end; one line, easy to turn upside down.",
    hints=[
        "What should it be at step 0, and at the last one? Put both into the equation.",
        "Half a cosine: the angle goes from 0 to π.",
    ],
)
def momentum_at(rng):
    yield call(3, 10, 0.99)
    yield call(0, 10, 0.9).on("the first step")
    yield call(7, 7, 0.5).on("the last step")
    yield call(4, 8, 0.996).on("half of the way")
    yield call(rng.integer(1, 90), 91, 0.75).on("some step")


def _catalogue(key, message, rises):
    """`rises(share)` from 0 to 1 takes the momentum from the start to 1."""
    momentum_at.mistake(key, message, lambda step, total, start: start + (1 - start) * rises(step / total))


_catalogue("linear", "it rises along a straight line; it should be half a cosine", lambda s: s)
_catalogue("constant", "it never changes", lambda s: 0.0)
_catalogue("falls", "it begins at 1, where the keys never move, and falls", lambda s: 0.5 * (1 + math.cos(math.pi * s)))
_catalogue("quarter", "the angle goes to π/2 only: a quarter of a cosine", lambda s: 1 - math.cos(math.pi * s / 2))
_catalogue(
    "full-turn",
    "the angle goes to 2π, so it is back at its start in the end",
    lambda s: 0.5 * (1 - math.cos(2 * math.pi * s)),
)
_catalogue("degrees", "π is missing in the angle", lambda s: 0.5 * (1 - math.cos(s)))


@momentum_at.mistake("from-zero", "it begins at 0, whatever the start is")
def _(step, total, start):
    return 0.5 * (1 - math.cos(math.pi * step / total))


@momentum_at.mistake("to-zero", "it falls from the start to 0, as a learning rate would")
def _(step, total, start):
    return start * 0.5 * (1 + math.cos(math.pi * step / total))


@momentum_at.mistake("no-half", "the half before the bracket is missing, so it begins below the start")
def _(step, total, start):
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / total))
