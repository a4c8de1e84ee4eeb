"""Answers to `efficient_attention.random_feature_attention`."""

import math

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("efficient_attention.random_feature_attention")


def logs(x, w, scale=None, half=0.5):
    x = x * (x.shape[-1] ** -0.25 if scale is None else scale)
    return torch.einsum("bhnd,md->bhnm", x, w) - half * (x * x).sum(-1, keepdim=True)


def ratio(q, k, v):
    return (q @ (k.mT @ v)) / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)


def stabilised(log_q, log_k, v):
    return ratio((log_q - log_q.amax(-1, True)).exp(), (log_k - log_k.amax((-1, -2), True)).exp(), v)


@right
def one_maximum_for_all_keys(q, k, v, projection):
    """The stabiliser of the paper's code, without its ε."""
    return stabilised(logs(q, projection), logs(k, projection), v)


@right
def two_softmaxes(q, k, v, projection):
    """Each feature spreads one unit over the keys; what it weighed moves over to the queries."""
    log_k = logs(k, projection)
    weighed = log_k.logsumexp(2, keepdim=True)
    return (logs(q, projection) + weighed).softmax(-1) @ (torch.softmax(log_k, 2).mT @ v)


@variant("quadratic")
def log_sum_exp(q, k, v, projection):
    """Weights of every pair by logsumexp over the features: quadratic, and exact for any length."""
    rows = [torch.logsumexp(row + logs(k, projection), -1) for row in logs(q, projection).split(1, dim=2)]
    return F.softmax(torch.stack(rows, 2), -1) @ v


@variant("quadratic")
def features_multiplied(q, k, v, projection):
    log_q, log_k = logs(q, projection), logs(k, projection)
    most = log_k.amax(2, keepdim=True)
    scores = torch.softmax(log_q + most, -1) @ (log_k - most).exp().mT
    return F.normalize(scores, p=1, dim=-1) @ v


@variant("no-stabiliser")
def as_in_the_lemma(q, k, v, projection):
    root_m = projection.shape[0] ** 0.5
    return ratio(logs(q, projection).exp() / root_m, logs(k, projection).exp() / root_m, v)


@variant("no-half-square")
def only_the_projection(q, k, v, projection):
    return stabilised(logs(q, projection, half=0.0), logs(k, projection, half=0.0), v)


@variant("square-not-halved")
def whole_square(q, k, v, projection):
    return stabilised(logs(q, projection, half=1.0), logs(k, projection, half=1.0), v)


@variant("no-scale")
def unscaled(q, k, v, projection):
    return stabilised(logs(q, projection, 1.0), logs(k, projection, 1.0), v)


@variant("scaled-twice")
def each_by_root_d(q, k, v, projection):
    scale = 1 / math.sqrt(q.shape[-1])
    return stabilised(logs(q, projection, scale), logs(k, projection, scale), v)


@variant("stabilised-per-key")
def both_alike(q, k, v, projection):
    q, k = (torch.exp(x - x.max(dim=-1, keepdim=True).values) for x in (logs(q, projection), logs(k, projection)))
    return ratio(q, k, v)


@variant("no-normaliser")
def estimate_of_the_numerator(q, k, v, projection):
    q, k = (logs(x, projection).exp() / math.sqrt(len(projection)) for x in (q, k))
    return q @ (k.mT @ v)


@unknown
def trigonometric(q, k, v, projection):
    return ratio(*(torch.cos(torch.einsum("bhnd,md->bhnm", x, projection)) for x in (q, k)), v)


@unknown
def scaled_on_one_side(q, k, v, projection):
    return stabilised(logs(q, projection, q.shape[-1] ** -0.5), logs(k, projection, 1.0), v)


@unknown
def an_epsilon_in_the_features(q, k, v, projection):
    log_q, log_k = logs(q, projection), logs(k, projection)
    return ratio((log_q - log_q.amax(-1, True)).exp() + 0.01, (log_k - log_k.amax((-1, -2), True)).exp() + 0.01, v)


@unknown
def exact(q, k, v, projection):
    return F.scaled_dot_product_attention(q, k, v)


@unknown
def features_of_its_own(q, k, v, projection):
    w = projection / projection.norm(dim=-1, keepdim=True)
    return stabilised(logs(q, w), logs(k, w), v)
