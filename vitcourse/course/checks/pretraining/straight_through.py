"""The check of `pretraining.straight_through`."""

from vitcourse.course.checks import call, check


@check(
    "pretraining.straight_through",
    reference="vitcourse.pretraining.straight_through",
    level=2,
    minutes=10,
    why="Rounding has no gradient; this small lie trains every model with discrete parts.",
    hints=[
        "detach() gives a tensor's values without its history.",
        "Write the output as z and something that is added to it. Which of the two may hand on a gradient?",
    ],
    exempt={"integers": "whole numbers have no gradient"},
)
def straight_through(rng):
    yield call(rng.normal(2, 3, 5), rng.normal(2, 3, 5))
    yield call(rng.normal(1, 4), rng.normal(1, 4)).on("one vector")


@straight_through.mistake(
    "codes-alone",
    "the values are right, but all of the gradient goes to the codes, and none reaches `z`: is anything detached?",
)
def _(z, quantized):
    return quantized * 1


@straight_through.mistake("both", "`z` and the codes both get the gradient; the codes should get none")
def _(z, quantized):
    return quantized + (z - z.detach())


@straight_through.mistake("all-detached", "nothing gets a gradient")
def _(z, quantized):
    return quantized.detach() + 0 * z.detach()


@straight_through.mistake("z-alone", "the values are those of `z`: nothing has been rounded")
def _(z, quantized):
    return z + (quantized - quantized.detach())


@straight_through.mistake("mean", "the values lie half way between the two")
def _(z, quantized):
    return z + (quantized - z).detach() / 2
