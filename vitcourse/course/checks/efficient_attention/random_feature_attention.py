"""The check of `efficient_attention.random_feature_attention`."""

import torch

from vitcourse import efficient_attention
from vitcourse.course.checks import call, check, holds

from ._shared import QUADRATIC, grows_linearly


@check(
    "efficient_attention.random_feature_attention",
    reference="vitcourse.efficient_attention.random_feature_attention",
    level=4,
    minutes=30,
    why="It makes the weights of a trained softmax model usable in O(N), at an error that you choose.",
    hints=[
        "1/√D is on the product of q and k. Half of it, as a power, belongs to each of them.",
        "Work with the logarithm of the features, Wx − |x|²/2, as long as you can, and take the exponential last.",
        "What may be subtracted from log φ(q)? Whatever is the same for all keys: any number for each query. And from "
        "log φ(k)? Whatever is the same for all keys, too. Then the linear attention of exercise 1 cancels it.",
    ],
    exempt={
        "large": "how far below the largest the features may reach is a choice; a case with long queries and keys is declared",
    },
)
def random_feature_attention(rng):
    yield call(rng.normal(2, 3, 7, 5), rng.normal(2, 3, 7, 5), rng.normal(2, 3, 7, 4), rng.normal(6, 5))
    yield call(rng.normal(1, 2, 6, 4), rng.normal(1, 2, 9, 4), rng.normal(1, 2, 9, 5), rng.normal(8, 4)).on(
        "more keys than queries"
    )
    # Queries and heads differ in length, so that one maximum for all of them is of no use to most.
    q = rng.normal(1, 2, 4, 4) * torch.tensor([1.0, 200.0, 5.0, 200.0], dtype=torch.float64)[:, None]
    k = rng.normal(1, 2, 5, 4) * torch.tensor([200.0, 1.0], dtype=torch.float64)[:, None, None]
    yield call(q, k, rng.normal(1, 2, 5, 3), rng.normal(7, 4)).on("long queries and keys")
    once, twice = ((*(rng.normal(1, 1, n, 3) for _ in range(3)), rng.normal(4, 3)) for n in (128, 256))
    yield holds(QUADRATIC, grows_linearly(once, twice), points_to="quadratic")


def _logarithms(x, projection, power=0.25, square=0.5):
    x = x * x.shape[-1] ** -power
    return x @ projection.mT - square * x.square().sum(-1, keepdim=True)


def _features(power=0.25, square=0.5, stabilise=True, per_key=False, normalise=True):
    """Random-feature attention in its steps, each of which a mistake may replace."""

    def attend(q, k, v, projection):
        log_q, log_k = (_logarithms(x, projection, power, square) for x in (q, k))
        if stabilise:
            most = log_k.amax(-1 if per_key else -2, keepdim=True)
            log_q = log_q if per_key else log_q + most
            log_q, log_k = log_q - log_q.amax(-1, keepdim=True), log_k - most
        phi_q, phi_k = log_q.exp(), log_k.exp()
        if not normalise:
            return phi_q @ (phi_k.mT @ v) / projection.shape[0]
        return efficient_attention.linear_attention(phi_q, phi_k, v)

    return attend


random_feature_attention.mistake(
    "no-stabiliser",
    "the exponential underflows for long vectors: all features become zero, and zero is divided by zero",
    _features(stabilise=False),
)
random_feature_attention.mistake(
    "no-half-square",
    "the term that takes a vector's own length out is missing, so the features estimate something else than exp(q·k)",
    _features(square=0.0),
)
random_feature_attention.mistake(
    "square-not-halved",
    "too much of a vector's own length is taken out: compare the exponents in E[exp(w·x)]",
    _features(square=1.0),
)
random_feature_attention.mistake(
    "no-scale", "the scores are not scaled: this approximates softmax(q kᵀ), without 1/√D", _features(power=0.0)
)
random_feature_attention.mistake(
    "scaled-twice", "q and k are both scaled in full, so their product is scaled twice", _features(power=0.5)
)
random_feature_attention.mistake(
    "stabilised-per-key",
    "each key loses a maximum of its own: that changes how much it weighs against the other keys",
    _features(per_key=True),
)


@random_feature_attention.mistake(
    "quadratic",
    "the values are right, the cost is not: weights of all pairs of tokens are computed, which features are to avoid",
)
def _(q, k, v, projection):
    pairs = (_logarithms(q, projection)[:, :, :, None] + _logarithms(k, projection)[:, :, None]).logsumexp(-1)
    return pairs.softmax(-1) @ v


random_feature_attention.mistake(
    "no-normaliser",
    "the weights of a query do not sum to one: the sum of the estimates stands under the fraction",
    _features(stabilise=False, normalise=False),
)
