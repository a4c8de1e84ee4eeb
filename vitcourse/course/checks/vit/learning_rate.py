"""The check of `vit.learning_rate`."""

import math

from vitcourse.course.checks import call, check
from vitcourse.train import TrainConfig


@check(
    "vit.learning_rate",
    reference="vitcourse.train.learning_rate",
    level=2,
    minutes=15,
    why="Transformers are touchy in their first steps. The warm-up gets them through, the cosine lets them settle.",
    hints=[
        "Two regimes: step < warmup_steps, and the rest.",
        "Warm-up: the steps 0 … warmup_steps − 1 climb evenly, and step 0 is already above zero: (step + 1) / "
        "(warmup_steps + 1).",
        "Cosine: let t run from 0 at the end of the warm-up to 1 at the last step, total_steps − 1. Half a cosine, "
        "(1 + cos πt) / 2, falls from 1 to 0; stretch it between lr and min_lr.",
    ],
)
def learning_rate(rng):
    config = TrainConfig(lr=0.8, min_lr=0.1, warmup=0.2)
    total = 10 * rng.integer(3, 7) + 4  # a fifth of it ends in .8, of three steps more in .4: rounded up, and down
    warm = round(0.2 * total)
    yield call(0, total, config).on("the first step")
    yield call(warm - 1, total, config).on("the end of the warm-up")
    yield call(warm, total, config).on("the first step after the warm-up")
    for quarter in (1, 3):  # in the middle a straight line would pass
        yield call(warm + quarter * (total - warm) // 4, total, config).on(f"the cosine, {quarter} quarter(s) down")
    yield call(total - 1, total, config).on("the last step")
    yield call(1, total + 3, config).on("a run of another length")
    yield call(0, total, TrainConfig(lr=0.8, min_lr=0.1, warmup=0.0)).on("a run without warm-up")


def _rate(step, total, config, *, start=1, peak=None, warm=None, until=None, low=None, shift=True, half=1.0):
    warm = round(config.warmup * total) if warm is None else warm
    low = config.min_lr if low is None else low
    if step < warm:
        return config.lr * (step + start) / (warm + (start if peak is None else peak))
    t = (step - warm) / ((until or total - 1) - warm) if shift else step / (total - 1)
    return low + (config.lr - low) * (1 + math.cos(half * math.pi * t)) / 2


learning_rate.mistake(
    "zero-first-step",
    "the first step has a rate of zero, so one batch is wasted",
    lambda step, total_steps, config: _rate(step, total_steps, config, start=0),
)
learning_rate.mistake(
    "peak-too-early",
    "the warm-up arrives one step early: its last step already has the full rate, which belongs to the step after it",
    lambda step, total_steps, config: _rate(step, total_steps, config, peak=0),
)
learning_rate.mistake(
    "no-warm-up",
    "there is no warm-up: the rate starts at its peak",
    lambda step, total_steps, config: _rate(step, total_steps, config, warm=0),
)
learning_rate.mistake(
    "cosine-from-zero",
    "the cosine does not start where the warm-up ends: it has been falling since step 0, so the rate jumps",
    lambda step, total_steps, config: _rate(step, total_steps, config, shift=False),
)
learning_rate.mistake(
    "no-floor",
    "the rate falls to zero; min_lr is forgotten",
    lambda step, total_steps, config: _rate(step, total_steps, config, low=0.0),
)
learning_rate.mistake(
    "full-period",
    "the cosine runs through a whole period and climbs again",
    lambda step, total_steps, config: _rate(step, total_steps, config, half=2.0),
)
learning_rate.mistake(
    "never-arrives",
    "the last step is not at the floor: steps are counted from 0, so the last one is total_steps − 1",
    lambda step, total_steps, config: _rate(step, total_steps, config, until=total_steps),
)
