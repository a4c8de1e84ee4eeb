"""The check of `pretraining.info_nce`."""

import torch
import torch.nn.functional as F

from vitcourse.course.checks import call, check


@check(
    "pretraining.info_nce",
    reference="vitcourse.pretraining.info_nce",
    level=2,
    minutes=10,
    why="The loss of MoCo, SimCLR and CLIP: a classification whose labels nobody had to write.",
    hints=[
        "One matrix product has all likenesses: (B, N), once both sides have length 1.",
        "Each row is the logits of a classification. Which class is the right one in row 0, in row 1?",
        'F.cross_entropy(…, reduction="none"), and the factor of the equation.',
    ],
)
def info_nce(rng):
    yield call(rng.normal(4, 6), rng.normal(7, 6), 0.5)
    yield call(rng.normal(5, 3), rng.normal(5, 3), 0.2).on("as many keys as queries")
    yield call(rng.normal(1, 4), rng.normal(3, 4), 0.07).on("one query")


def _cosines(q, k):
    return F.normalize(q, dim=1) @ F.normalize(k, dim=1).T


def _own(q):
    return torch.arange(len(q))


def _loss(q, k, tau, likeness=_cosines, sharpen=lambda s, tau: s / tau, own=_own, factor=lambda tau: 2 * tau):
    """The contrast in its steps, each of which a mistake may replace."""
    return F.cross_entropy(sharpen(likeness(q, k), tau), own(q), reduction="none") * factor(tau)


def _catalogue(key, message, **change):
    info_nce.mistake(key, message, lambda queries, keys, temperature: _loss(queries, keys, temperature, **change))


_catalogue("not-normalised", "likeness is the plain product, so long embeddings win", likeness=lambda q, k: q @ k.T)
_catalogue(
    "queries-only",
    "only the queries have length 1; the keys should, too",
    likeness=lambda q, k: F.normalize(q, dim=1) @ k.T,
)
_catalogue(
    "normalised-over-the-batch",
    "each dimension is normalised over the batch; each embedding should be, over its dimensions",
    likeness=lambda q, k: F.normalize(q, dim=0) @ F.normalize(k, dim=0).T,
)
_catalogue("distances", "likeness is a distance, and the farthest key wins", likeness=lambda q, k: torch.cdist(q, k))
_catalogue(
    "times-temperature",
    "the cosines are multiplied by the temperature; dividing makes them sharper",
    sharpen=lambda s, tau: s * tau,
)
_catalogue("no-temperature", "the temperature does not reach the logits", sharpen=lambda s, tau: s)
_catalogue("no-factor", "the factor before the logarithm is missing", factor=lambda tau: 1)
_catalogue("half-the-factor", "the factor is half of what the equation has", factor=lambda tau: tau)
_catalogue(
    "first-key",
    "every query is asked for the first key; each has one of its own",
    own=lambda q: torch.zeros_like(_own(q)),
)


@info_nce.mistake("mean", "one number comes back; each query has a loss of its own")
def _(queries, keys, temperature):
    return _loss(queries, keys, temperature).mean()


@info_nce.mistake(
    "over-the-queries", "the softmax runs over the queries of a key; it should run over the keys of a query"
)
def _(queries, keys, temperature):
    logits = _cosines(queries, keys) / temperature
    return -logits.log_softmax(0)[_own(queries), _own(queries)] * 2 * temperature


@info_nce.mistake("without-its-own", "its own key is missing among those that a query chooses from")
def _(queries, keys, temperature):
    logits = _cosines(queries, keys) / temperature
    own = F.one_hot(_own(queries), len(keys)).bool()
    return (logits.masked_fill(own, -torch.inf).logsumexp(1) - logits[own]) * 2 * temperature


@info_nce.mistake("no-negatives", "only the likeness of the pairs counts; nothing keeps others apart")
def _(queries, keys, temperature):
    return -2 * _cosines(queries, keys)[_own(queries), _own(queries)]
