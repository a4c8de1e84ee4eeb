"""The check of `efficient_attention.proportional_attention`."""

from vitcourse.course.checks import call, check


@check(
    "efficient_attention.proportional_attention",
    reference="vitcourse.efficient_attention.proportional_attention",
    level=2,
    minutes=10,
    gradients=("q", "k", "v"),
    why="Without it ten patches of sky that became one token would count as one patch.",
    hints=[
        "A key that stands for s patches should count as s equal keys would. What is s · exp(score), as one exponential?",
        "It depends on the key alone: an axis of one for the heads, and one for the queries.",
    ],
)
def proportional_attention(rng):
    def sizes(*shape):
        return rng.integers(1, 6, shape).double()

    yield call(*(rng.normal(2, 3, 5, 4) for _ in range(3)), sizes(2, 5))
    yield call(rng.normal(1, 2, 4, 3), rng.normal(1, 2, 6, 3), rng.normal(1, 2, 6, 5), sizes(1, 6)).on(
        "more keys than queries"
    )


def _weighing(change):
    def attend(q, k, v, size):
        return change(q @ k.mT, q.shape[-1] ** -0.5, size[:, None, None]) @ v

    return attend


proportional_attention.mistake(
    "size-without-log",
    "the size itself is added to the scores: inside the exponential, three patches then count like e³",
    _weighing(lambda scores, scale, size: (scores * scale + size).softmax(-1)),
)
proportional_attention.mistake(
    "no-effect",
    "the sizes have no effect: they are left out, or added along the queries, where the softmax cancels them",
    _weighing(lambda scores, scale, size: (scores * scale).softmax(-1)),
)
proportional_attention.mistake(
    "after-softmax",
    "the weights are multiplied after the softmax, so they no longer sum to one",
    _weighing(lambda scores, scale, size: (scores * scale).softmax(-1) * size),
)
proportional_attention.mistake(
    "scaled-with-the-scores",
    "the logarithm of the size is scaled together with the scores, so it counts for less than it should",
    _weighing(lambda scores, scale, size: ((scores + size.log()) * scale).softmax(-1)),
)
proportional_attention.mistake(
    "no-scale",
    "the scores are not scaled: they grow with the width of a head",
    _weighing(lambda scores, scale, size: (scores + size.log()).softmax(-1)),
)
proportional_attention.mistake(
    "large-tokens-avoided",
    "the sign is wrong: the more patches a token stands for, the less it is looked at",
    _weighing(lambda scores, scale, size: (scores * scale - size.log()).softmax(-1)),
)
