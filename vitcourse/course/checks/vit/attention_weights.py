"""The check of `vit.attention_weights`."""

from vitcourse.course.checks import call, check

from ._shared import scores


@check(
    "vit.attention_weights",
    reference="vitcourse.layers.attention_weights",
    level=2,
    minutes=10,
    why="This is the one operation in which tokens exchange information.",
    hints=[
        "Every query meets every key in a dot product: one matrix product, with one of the two transposed.",
        "The variance of a dot product grows with its length D. Divide by its standard deviation.",
        "The weights of one query, over all keys, sum to one: over which axis does the softmax run?",
    ],
)
def attention_weights(rng):
    yield call(rng.normal(2, 3, 5, 16), rng.normal(2, 3, 7, 16))
    yield call(rng.normal(1, 2, 6, 8), rng.normal(1, 2, 4, 8)).on("a batch of one")
    yield call(rng.strided(2, 2, 3, 4), rng.strided(2, 2, 5, 4)).on("non-contiguous inputs")


attention_weights.mistake(
    "no-scale",
    "the scores are not scaled: they grow with the width D, and the softmax saturates",
    lambda q, k: scores(q, k).softmax(-1),
)
attention_weights.mistake(
    "scale-by-width",
    "the scores are divided by D itself: the variance of a dot product grows like D, its spread more slowly",
    lambda q, k: (scores(q, k) / q.shape[-1]).softmax(-1),
)
attention_weights.mistake(
    "multiplied",
    "the scale works in the wrong direction: it makes the scores of wide heads, large as they are, larger still",
    lambda q, k: (scores(q, k) * q.shape[-1] ** 0.5).softmax(-1),
)
attention_weights.mistake(
    "over-queries",
    "the softmax runs over the queries: here all queries compete for a key; each query should spread one unit over the keys",
    lambda q, k: (scores(q, k) * q.shape[-1] ** -0.5).softmax(-2),
)
attention_weights.mistake(
    "over-heads",
    "the softmax runs over the heads, which then compete with each other; heads are independent",
    lambda q, k: (scores(q, k) * q.shape[-1] ** -0.5).softmax(1),
)
attention_weights.mistake(
    "scale-after",
    "the scale is applied after the softmax: the rows no longer sum to one",
    lambda q, k: scores(q, k).softmax(-1) * q.shape[-1] ** -0.5,
)
attention_weights.mistake(
    "no-softmax",
    "these are the scores: nothing turns them into weights that are positive and sum to one yet",
    lambda q, k: scores(q, k) * q.shape[-1] ** -0.5,
)
