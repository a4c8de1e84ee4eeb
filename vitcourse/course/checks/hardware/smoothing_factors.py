"""The check of `hardware.smoothing_factors`."""

import torch

from vitcourse.course.checks import call, check


@check(
    "hardware.smoothing_factors",
    reference="vitcourse.hardware.quantize.smoothing_factors",
    level=2,
    minutes=10,
    why="A few channels with huge activations spoil the steps of all others; one multiplication, made beforehand, helps.",
    hints=[
        "The weight is (out, in): what enters through input channel j is multiplied by column j.",
        "s = max|X|^α / max|W|^(1−α), one number for each input channel.",
        "A channel that is always zero, or that no weight reads, has nothing to share: its factor is 1.",
    ],
    gradients=False,
)
def smoothing_factors(rng):
    weight = rng.normal(6, 4, dtype=torch.float32)
    yield call(rng.uniform(4, low=0.1, high=60, dtype=torch.float32), weight, 0.5)
    yield call(rng.uniform(3, low=0.1, high=60, dtype=torch.float32), rng.normal(7, 3, dtype=torch.float32), 0.8).on(
        "α = 0.8"
    )
    yield call(rng.uniform(6, low=0.1, high=9, dtype=torch.float32), rng.normal(6, 6, dtype=torch.float32), 0.3).on(
        "a square weight"
    )
    dead = rng.uniform(4, low=0.5, high=2, dtype=torch.float32)
    dead[1] = 0
    unread = weight.clone()
    unread[:, 2] = 0
    yield call(dead, unread, 0.5).on("a channel that is always zero, and one that is never read")


def _shared(factors):
    """A mistake in the formula alone: channels without any activation or weight keep theirs."""

    def faulty(largest, weight, alpha):
        columns = weight.abs().amax(0)
        return torch.where((largest > 0) & (columns > 0), factors(largest, columns, weight, alpha), 1.0)

    return faulty


smoothing_factors.mistake(
    "exponents-exchanged",
    "α and 1 − α are exchanged: α is the share of the difficulty that leaves the activations",
    _shared(lambda x, w, weight, alpha: x ** (1 - alpha) / w**alpha),
)
smoothing_factors.mistake(
    "inverted",
    "these are the factors turned over: activations are divided by s, so s should be large where they are",
    _shared(lambda x, w, weight, alpha: w ** (1 - alpha) / x**alpha),
)
smoothing_factors.mistake(
    "multiplied",
    "activation and weight are multiplied; a channel whose weights are large already should get less of the difficulty",
    _shared(lambda x, w, weight, alpha: x**alpha * w ** (1 - alpha)),
)
smoothing_factors.mistake(
    "weights-ignored",
    "only the activations decide; the weights have to be quantized afterwards, too",
    _shared(lambda x, w, weight, alpha: x**alpha),
)
smoothing_factors.mistake(
    "mean-weight",
    "the weights' mean magnitude decides; the step depends on the largest",
    _shared(lambda x, w, weight, alpha: x**alpha / weight.abs().mean(0) ** (1 - alpha)),
)
smoothing_factors.mistake(
    "signed-weight",
    "the largest weight decides, not the one with the largest magnitude",
    _shared(lambda x, w, weight, alpha: x**alpha / weight.amax(0) ** (1 - alpha)),
)
smoothing_factors.mistake(
    "of-the-outputs",
    "the weights are looked at row by row, which are outputs; the activations come in through the columns",
    lambda largest, weight, alpha: largest**alpha / weight.abs().amax(1) ** (1 - alpha),
)
smoothing_factors.mistake(
    "dead-channels",
    "right where there is something to share; a channel of zeros gets the factor 0, and an unread one infinity",
    lambda largest, weight, alpha: largest**alpha / weight.abs().amax(0) ** (1 - alpha),
)
