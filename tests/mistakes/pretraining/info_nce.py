"""Answers to `pretraining.info_nce`."""

import math

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("pretraining.info_nce")


def row_by_row(unit=lambda x: x / x.norm(), others=lambda i, n: range(n), own=lambda i: i, sharp=None, factor=None):
    """A loop over the queries, with sums of exponentials in the open."""
    sharp, factor = sharp or (lambda s, tau: s / tau), factor or (lambda tau: 2 * tau)

    def loss(queries, keys, temperature):
        losses = []
        for i, query in enumerate(queries):
            scores = [sharp((unit(query) * unit(key)).sum(), temperature) for key in keys]
            among = torch.stack([scores[j] for j in others(i, len(keys))])
            losses.append(factor(temperature) * (torch.logsumexp(among, 0) - scores[own(i)]))
        return torch.stack(losses)

    return loss


right(row_by_row())


@right
def by_log_softmax(queries, keys, temperature):
    cosine = F.cosine_similarity(queries[:, None], keys[None], dim=2)
    return -2 * temperature * torch.diagonal(F.log_softmax(cosine / temperature, dim=1))


@right
def with_the_maximum_taken_out(queries, keys, temperature):
    q, k = (x * x.square().sum(1, keepdim=True).rsqrt() for x in (queries, keys))
    logits = torch.einsum("bd,nd->bn", q, k) / temperature
    top = logits.amax(1, keepdim=True).detach()
    chosen = logits.gather(1, torch.arange(len(q))[:, None])[:, 0]
    return ((logits - top).exp().sum(1).log() + top[:, 0] - chosen) * temperature * 2


variant("not-normalised")(row_by_row(unit=lambda x: x))
variant("times-temperature")(row_by_row(sharp=lambda s, tau: s * tau))
variant("no-temperature")(row_by_row(sharp=lambda s, tau: s))
variant("no-factor")(row_by_row(factor=lambda tau: 1.0))
variant("half-the-factor")(row_by_row(factor=lambda tau: tau))
variant("first-key")(row_by_row(own=lambda i: 0))
variant("without-its-own")(row_by_row(others=lambda i, n: [j for j in range(n) if j != i]))


@variant("queries-only")
def long_keys_win(queries, keys, temperature):
    logits = torch.einsum("bd,nd->bn", queries / queries.norm(dim=1, keepdim=True), keys) / temperature
    return -2 * temperature * logits.log_softmax(1).diagonal()


@variant("normalised-over-the-batch")
def by_columns(queries, keys, temperature):
    q, k = (x / x.norm(dim=0) for x in (queries, keys))
    return -2 * temperature * (q @ k.T / temperature).log_softmax(1).diagonal()


@variant("distances")
def far_is_near(queries, keys, temperature):
    apart = (queries[:, None] - keys).square().sum(2).sqrt()
    return -2 * temperature * (apart / temperature).log_softmax(1).diagonal()


@variant("mean")
def average(queries, keys, temperature):
    return by_log_softmax(queries, keys, temperature).sum() / len(queries)


@variant("over-the-queries")
def columns_for_rows(queries, keys, temperature):
    cosine = F.cosine_similarity(queries[:, None], keys[None], dim=2) / temperature
    return (cosine.logsumexp(0)[: len(queries)] - cosine.diagonal()) * 2 * temperature


@variant("no-negatives")
def only_agree(queries, keys, temperature):
    return -2 * F.cosine_similarity(queries, keys[: len(queries)])


@unknown
def upside_down(queries, keys, temperature):
    return -by_log_softmax(queries, keys, temperature)


@unknown
def probability(queries, keys, temperature):
    return (-by_log_softmax(queries, keys, temperature) / (2 * temperature)).exp()


@unknown
def natural_or_two(queries, keys, temperature):
    return by_log_softmax(queries, keys, temperature) / math.log(2)


@unknown
def gradient_stopped(queries, keys, temperature):
    return by_log_softmax(queries.detach(), keys, temperature) + 0 * queries.sum()


@unknown
def symmetric_already(queries, keys, temperature):
    n = len(queries)
    return by_log_softmax(queries, keys, temperature) + by_log_softmax(keys[:n], queries, temperature)


unknown(row_by_row(own=lambda i: -1))
unknown(row_by_row(unit=lambda x: x, sharp=lambda s, tau: s))
unknown(row_by_row(unit=lambda x: x / x.abs().sum()))
