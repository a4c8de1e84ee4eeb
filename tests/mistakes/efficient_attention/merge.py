"""Answers to `efficient_attention.merge`."""

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("efficient_attention.merge")


def group_by_group(token, amount=lambda sizes: sizes.sum(), places=lambda place, b: place[b]):
    """Loops over images and places; ``token(x, sizes)`` merges a group, ``amount`` its sizes."""

    def run(x, size, place, count):
        tokens, sizes = [], []
        for b in range(len(x)):
            groups = [places(place, b) == new for new in range(count)]
            tokens.append(torch.stack([token(x[b, g], size[b, g]) for g in groups]))
            sizes.append(torch.stack([amount(size[b, g]) for g in groups]))
        return torch.stack(tokens), torch.stack(sizes)

    return run


def weighted(x, sizes):
    return torch.einsum("nc,n->c", x, sizes / sizes.sum())


right(group_by_group(weighted))


@right
def scattered(x, size, place, count):
    index = place.unsqueeze(-1).expand_as(x)
    total = x.new_zeros(len(x), count, x.shape[-1]).scatter_add(1, index, x * size.unsqueeze(-1))
    sizes = size.new_zeros(len(x), count).scatter_add(1, place, size)
    return total / sizes.unsqueeze(-1), sizes


@right
def shares_without_gradient(x, size, place, count):
    """The share that each token has in its group is a number, which nothing is to be learnt through."""
    with torch.no_grad():
        sizes = size.new_zeros(len(x), count).scatter_add(1, place, size)
        onto = F.one_hot(place, count).to(x) * (size / sizes.gather(1, place)).unsqueeze(-1)
    return torch.einsum("bnc,bnd->bcd", onto, x), sizes


variant("unweighted")(group_by_group(lambda x, sizes: x.mean(0)))
variant("not-divided")(group_by_group(lambda x, sizes: sizes @ x))
variant("divided-by-the-tokens")(group_by_group(lambda x, sizes: sizes @ x / len(x)))
variant("tokens-counted")(group_by_group(weighted, lambda sizes: torch.ones_like(sizes).sum()))
variant("size-averaged")(group_by_group(weighted, lambda sizes: sizes.mean()))
variant("places-of-the-first")(group_by_group(weighted, places=lambda place, b: place[0]))


@unknown
def last_one_wins(x, size, place, count):
    out = x.new_zeros(len(x), count, x.shape[-1])
    for b in range(len(x)):
        for n in range(x.shape[1]):
            out[b, place[b, n]] = x[b, n]
    return out, scattered(x, size, place, count)[1]


@unknown
def tokens_only(x, size, place, count):
    return scattered(x, size, place, count)[0]


@unknown
def inverse_sizes(x, size, place, count):
    return scattered(x, 1 / size, place, count)


@unknown
def largest(x, size, place, count):
    return group_by_group(lambda x, sizes: x.amax(0))(x, size, place, count)


@unknown
def in_place(x, size, place, count):
    out = scattered(x, size, place, count)
    size.fill_(1.0)
    return out
