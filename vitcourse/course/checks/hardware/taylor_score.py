"""The check of `hardware.taylor_score`."""

from vitcourse.course.checks import call, check


@check(
    "hardware.taylor_score",
    reference="vitcourse.hardware.prune.taylor_score",
    level=3,
    minutes=15,
    why="One backward pass says for all heads and channels at once what the loss would be without them.",
    hints=[
        "A gate on a head multiplies all of its values. What is the derivative of the loss by the gate, at 1?",
        "Sum what belongs to one gate: the tokens of an image, and the head's stretch of channels. The signs count.",
        "Only then take magnitudes, one for each image and unit, and the mean over the images.",
    ],
    gradients=False,
)
def taylor_score(rng):
    yield call(rng.normal(4, 5, 6), rng.normal(4, 5, 6), 3)
    yield call(rng.normal(3, 2, 7), rng.normal(3, 2, 7), 7).on("channels, one value each")
    yield call(rng.normal(1, 4, 8), rng.normal(1, 4, 8), 2).on("a batch of one")
    yield call(rng.normal(2, 1, 6), rng.normal(2, 1, 6), 2).on("a single token")


def _effect(x, gradient, units):
    """(B, N, units, width)."""
    return (x * gradient).unflatten(-1, (units, -1))


taylor_score.mistake(
    "magnitudes-first",
    "the magnitude is taken of every product before they are summed: what cancels inside a head then counts as large",
    lambda x, gradient, units: _effect(x, gradient, units).abs().sum((1, 3)).mean(0),
)
taylor_score.mistake(
    "magnitude-last",
    "images are averaged before the magnitude is taken: a head that helps one and harms another looks useless",
    lambda x, gradient, units: _effect(x, gradient, units).sum((1, 3)).mean(0).abs(),
)
taylor_score.mistake(
    "signed",
    "the sign is kept; a head may lower the loss or raise it, and matters in both cases",
    lambda x, gradient, units: _effect(x, gradient, units).sum((1, 3)).mean(0),
)
taylor_score.mistake(
    "per-token",
    "the magnitude is taken for each token; one gate serves all tokens of an image, so they are summed with their signs",
    lambda x, gradient, units: _effect(x, gradient, units).sum(3).abs().sum(1).mean(0),
)
taylor_score.mistake(
    "heads-interleaved",
    "a unit gathers channels from all over the axis; its channels lie side by side",
    lambda x, gradient, units: (x * gradient).unflatten(-1, (-1, units)).sum((1, 2)).abs().mean(0),
)
taylor_score.mistake(
    "sum-of-images",
    "the images are added up; the mean does not depend on how many there are",
    lambda x, gradient, units: _effect(x, gradient, units).sum((1, 3)).abs().sum(0),
)
taylor_score.mistake(
    "mean-of-tokens",
    "the tokens are averaged; the gate's gradient is their sum",
    lambda x, gradient, units: _effect(x, gradient, units).mean((1, 3)).abs().mean(0),
)
taylor_score.mistake(
    "squared",
    "these are squares: another order of merit, in which a few images decide",
    lambda x, gradient, units: _effect(x, gradient, units).sum((1, 3)).square().mean(0),
)
taylor_score.mistake(
    "gradient-only",
    "the activations do not take part: a head whose output is zero has nothing to lose, whatever its gradient",
    lambda x, gradient, units: gradient.unflatten(-1, (units, -1)).sum((1, 3)).abs().mean(0),
)
taylor_score.mistake(
    "size-only",
    "the gradient does not take part: large outputs may well not matter to the loss",
    lambda x, gradient, units: x.unflatten(-1, (units, -1)).sum((1, 3)).abs().mean(0),
)
