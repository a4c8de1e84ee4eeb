"""Answers to `efficient_attention.linear_attention`."""

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("efficient_attention.linear_attention")


def context(k, v):
    return torch.einsum("bhnm,bhnd->bhmd", k, v)


@right
def einsums(q, k, v):
    return torch.einsum("bhnm,bhmd,bhn->bhnd", q, context(k, v), 1 / torch.einsum("bhnm,bhm->bhn", q, k.sum(2)))


@right
def a_column_of_ones(q, k, v):
    """Values with a one appended: the normaliser comes out as the last channel."""
    out = q @ (k.transpose(-1, -2) @ torch.cat([v, torch.ones_like(v[..., :1])], dim=-1))
    return out[..., :-1] / out[..., -1:]


@right
def token_by_token(q, k, v):
    """A loop over the keys, as a recurrent network would have it."""
    state, total = 0, 0
    for n in range(k.shape[2]):
        state = state + k[:, :, n, :, None] * v[:, :, n, None]
        total = total + k[:, :, n]
    return torch.stack(
        [(q[:, :, n, None] @ state)[:, :, 0] / (q[:, :, n] * total).sum(-1, True) for n in range(q.shape[2])], dim=2
    )


@variant("quadratic")
def scores_first(q, k, v):
    scores = torch.einsum("bhnm,bhkm->bhnk", q, k)
    return F.normalize(scores, p=1, dim=-1) @ v


@variant("quadratic")
def query_by_query_but_all_at_once(q, k, v):
    scores = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1, keepdim=True)
    return (scores * v.unsqueeze(2)).sum(3) / scores.sum(3)


@variant("quadratic")
def in_tiles_of_queries(q, k, v):
    rows = [tile @ k.mT for tile in q.split(16, dim=2)]
    return torch.cat([row / row.sum(-1, keepdim=True) @ v for row in rows], dim=2)


@variant("quadratic")
def query_by_query(q, k, v):
    out = []
    for n in range(q.shape[2]):
        weights = (q[:, :, n, None] * k).sum(-1)
        out.append(torch.einsum("bhk,bhkd->bhd", weights / weights.sum(-1, keepdim=True), v))
    return torch.stack(out, dim=2)


@variant("no-normaliser")
def numerator_only(q, k, v):
    return torch.einsum("bhnm,bhmd->bhnd", q, context(k, v))


@variant("divided-by-n")
def mean_over_the_keys(q, k, v):
    return q @ (k.unsqueeze(-1) * v.unsqueeze(-2)).mean(2)


@variant("one-normaliser")
def summed_over_everything(q, k, v):
    total = torch.einsum("bhm,bhm->bh", q.sum(2), k.sum(2))
    return (q @ context(k, v)) / total[:, :, None, None]


@variant("features-normalised")
def distributions_over_features(q, k, v):
    return F.normalize(q, p=1, dim=-1) @ context(F.normalize(k, p=1, dim=-1), v)


@variant("softmax-again")
def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@unknown
def normalised_over_the_queries(q, k, v):
    return (q / q.sum(2, keepdim=True)) @ context(k, v)


@unknown
def with_an_epsilon_of_a_tenth(q, k, v):
    return (q @ context(k, v)) / (q @ k.sum(2).unsqueeze(-1) + 0.1)


@unknown
def heads_summed(q, k, v):
    return (q @ context(k, v)) / (q @ k.sum(2).unsqueeze(-1)).sum(1, keepdim=True)


@unknown
def keys_cut_off(q, k, v):
    return einsums(q, k.detach(), v)


@unknown
def relu_first(q, k, v):
    return einsums(F.relu(q - 0.2) + 1e-3, k, v)
