"""The check of `efficient_attention.linear_attention`."""

from vitcourse.course.checks import call, check, holds
from vitcourse.layers import attention

from ._shared import QUADRATIC, grows_linearly


@check(
    "efficient_attention.linear_attention",
    reference="vitcourse.efficient_attention.linear_attention",
    level=2,
    minutes=15,
    why="This one change of brackets turns a cost of N² into a cost of N.",
    hints=[
        "Which of the two products can be made first, so that nothing has two axes of tokens?",
        "φ(K)ᵀV is a small matrix, (m, D) for each head: all that a query will ever learn of keys and values.",
        "The weights of a query sum to φ(q)·Σφ(k). Sum the keys first here, too, and divide each query's output by it.",
    ],
)
def linear_attention(rng):
    yield call(rng.uniform(2, 3, 7, 5), rng.uniform(2, 3, 7, 5), rng.normal(2, 3, 7, 4))
    yield call(rng.uniform(1, 2, 6, 3), rng.uniform(1, 2, 9, 3), rng.normal(1, 2, 9, 5)).on("more keys than queries")
    once, twice = ((rng.uniform(1, 1, n, 4), rng.uniform(1, 1, n, 4), rng.normal(1, 1, n, 4)) for n in (128, 256))
    yield holds(QUADRATIC, grows_linearly(once, twice), points_to="quadratic")


linear_attention.mistake(
    "quadratic",
    "the values are right, the cost is not: queries meet keys before the keys have met the values",
    lambda q, k, v: (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True) @ v,
)
linear_attention.mistake(
    "no-normaliser",
    "the weights of a query do not sum to one: its output grows with the number of tokens",
    lambda q, k, v: q @ (k.mT @ v),
)
linear_attention.mistake(
    "divided-by-n",
    "each output is divided by the number of tokens, but the weights of a query do not sum to that",
    lambda q, k, v: q @ (k.mT @ v) / k.shape[-2],
)
linear_attention.mistake(
    "one-normaliser",
    "all queries of a head are divided by the same number; each has a sum of its own",
    lambda q, k, v: q @ (k.mT @ v) / (q @ k.sum(-2)[..., None]).sum(-2, keepdim=True),
)
linear_attention.mistake(
    "features-normalised",
    "the features of a token are made to sum to one; it is the weights of a query that should",
    lambda q, k, v: (q / q.sum(-1, keepdim=True)) @ ((k / k.sum(-1, keepdim=True)).mT @ v),
)
linear_attention.mistake(
    "softmax-again",
    "there is a softmax in it: the features take the place of the exponential, so their products are the weights",
    lambda q, k, v: attention(q, k, v),
)
