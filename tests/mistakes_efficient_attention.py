"""Answers to the exercises of lesson 05, as learners write them: the proof that its checks diagnose rightly.

None of them knows the catalogue in ``checks/efficient_attention.py``: they reach the same numbers by other means.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from mistakes_common import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect()

# --------------------------------------------------------------------------------------------------- linear_attention

LINEAR = "efficient_attention.linear_attention"


def context(k, v):
    return torch.einsum("bhnm,bhnd->bhmd", k, v)


@right(LINEAR)
def einsums(q, k, v):
    return torch.einsum("bhnm,bhmd,bhn->bhnd", q, context(k, v), 1 / torch.einsum("bhnm,bhm->bhn", q, k.sum(2)))


@right(LINEAR)
def a_column_of_ones(q, k, v):
    """Values with a one appended: the normaliser comes out as the last channel."""
    out = q @ (k.transpose(-1, -2) @ torch.cat([v, torch.ones_like(v[..., :1])], dim=-1))
    return out[..., :-1] / out[..., -1:]


@right(LINEAR)
def token_by_token(q, k, v):
    """A loop over the keys, as a recurrent network would have it."""
    state, total = 0, 0
    for n in range(k.shape[2]):
        state = state + k[:, :, n, :, None] * v[:, :, n, None]
        total = total + k[:, :, n]
    return torch.stack(
        [(q[:, :, n, None] @ state)[:, :, 0] / (q[:, :, n] * total).sum(-1, True) for n in range(q.shape[2])], dim=2
    )


@variant(LINEAR, "quadratic")
def scores_first(q, k, v):
    scores = torch.einsum("bhnm,bhkm->bhnk", q, k)
    return F.normalize(scores, p=1, dim=-1) @ v


@variant(LINEAR, "quadratic")
def query_by_query_but_all_at_once(q, k, v):
    scores = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1, keepdim=True)
    return (scores * v.unsqueeze(2)).sum(3) / scores.sum(3)


@variant(LINEAR, "quadratic")
def in_tiles_of_queries(q, k, v):
    rows = [tile @ k.mT for tile in q.split(16, dim=2)]
    return torch.cat([row / row.sum(-1, keepdim=True) @ v for row in rows], dim=2)


@variant(LINEAR, "quadratic")
def query_by_query(q, k, v):
    out = []
    for n in range(q.shape[2]):
        weights = (q[:, :, n, None] * k).sum(-1)
        out.append(torch.einsum("bhk,bhkd->bhd", weights / weights.sum(-1, keepdim=True), v))
    return torch.stack(out, dim=2)


@variant(LINEAR, "no-normaliser")
def numerator_only(q, k, v):
    return torch.einsum("bhnm,bhmd->bhnd", q, context(k, v))


@variant(LINEAR, "divided-by-n")
def mean_over_the_keys(q, k, v):
    return q @ (k.unsqueeze(-1) * v.unsqueeze(-2)).mean(2)


@variant(LINEAR, "one-normaliser")
def summed_over_everything(q, k, v):
    total = torch.einsum("bhm,bhm->bh", q.sum(2), k.sum(2))
    return (q @ context(k, v)) / total[:, :, None, None]


@variant(LINEAR, "features-normalised")
def distributions_over_features(q, k, v):
    return F.normalize(q, p=1, dim=-1) @ context(F.normalize(k, p=1, dim=-1), v)


@variant(LINEAR, "softmax-again")
def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@unknown(LINEAR)
def normalised_over_the_queries(q, k, v):
    return (q / q.sum(2, keepdim=True)) @ context(k, v)


@unknown(LINEAR)
def with_an_epsilon_of_a_tenth(q, k, v):
    return (q @ context(k, v)) / (q @ k.sum(2).unsqueeze(-1) + 0.1)


@unknown(LINEAR)
def heads_summed(q, k, v):
    return (q @ context(k, v)) / (q @ k.sum(2).unsqueeze(-1)).sum(1, keepdim=True)


@unknown(LINEAR)
def keys_cut_off(q, k, v):
    return einsums(q, k.detach(), v)


@unknown(LINEAR)
def relu_first(q, k, v):
    return einsums(F.relu(q - 0.2) + 1e-3, k, v)


# ------------------------------------------------------------------------------------------- random_feature_attention

RANDOM = "efficient_attention.random_feature_attention"


def logs(x, w, scale=None, half=0.5):
    x = x * (x.shape[-1] ** -0.25 if scale is None else scale)
    return torch.einsum("bhnd,md->bhnm", x, w) - half * (x * x).sum(-1, keepdim=True)


def ratio(q, k, v):
    return (q @ (k.mT @ v)) / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)


def stabilised(log_q, log_k, v):
    return ratio((log_q - log_q.amax(-1, True)).exp(), (log_k - log_k.amax((-1, -2), True)).exp(), v)


@right(RANDOM)
def one_maximum_for_all_keys(q, k, v, projection):
    """The stabiliser of the paper's code, without its ε."""
    return stabilised(logs(q, projection), logs(k, projection), v)


@right(RANDOM)
def two_softmaxes(q, k, v, projection):
    """Each feature spreads one unit over the keys; what it weighed moves over to the queries."""
    log_k = logs(k, projection)
    weighed = log_k.logsumexp(2, keepdim=True)
    return (logs(q, projection) + weighed).softmax(-1) @ (torch.softmax(log_k, 2).mT @ v)


@variant(RANDOM, "quadratic")
def log_sum_exp(q, k, v, projection):
    """Weights of every pair by logsumexp over the features: quadratic, and exact for any length."""
    rows = [torch.logsumexp(row + logs(k, projection), -1) for row in logs(q, projection).split(1, dim=2)]
    return F.softmax(torch.stack(rows, 2), -1) @ v


@variant(RANDOM, "quadratic")
def features_multiplied(q, k, v, projection):
    log_q, log_k = logs(q, projection), logs(k, projection)
    most = log_k.amax(2, keepdim=True)
    scores = torch.softmax(log_q + most, -1) @ (log_k - most).exp().mT
    return F.normalize(scores, p=1, dim=-1) @ v


@variant(RANDOM, "no-stabiliser")
def as_in_the_lemma(q, k, v, projection):
    root_m = projection.shape[0] ** 0.5
    return ratio(logs(q, projection).exp() / root_m, logs(k, projection).exp() / root_m, v)


@variant(RANDOM, "no-half-square")
def only_the_projection(q, k, v, projection):
    return stabilised(logs(q, projection, half=0.0), logs(k, projection, half=0.0), v)


@variant(RANDOM, "square-not-halved")
def whole_square(q, k, v, projection):
    return stabilised(logs(q, projection, half=1.0), logs(k, projection, half=1.0), v)


@variant(RANDOM, "no-scale")
def unscaled(q, k, v, projection):
    return stabilised(logs(q, projection, 1.0), logs(k, projection, 1.0), v)


@variant(RANDOM, "scaled-twice")
def each_by_root_d(q, k, v, projection):
    scale = 1 / math.sqrt(q.shape[-1])
    return stabilised(logs(q, projection, scale), logs(k, projection, scale), v)


@variant(RANDOM, "stabilised-per-key")
def both_alike(q, k, v, projection):
    q, k = (torch.exp(x - x.max(dim=-1, keepdim=True).values) for x in (logs(q, projection), logs(k, projection)))
    return ratio(q, k, v)


@variant(RANDOM, "no-normaliser")
def estimate_of_the_numerator(q, k, v, projection):
    q, k = (logs(x, projection).exp() / math.sqrt(len(projection)) for x in (q, k))
    return q @ (k.mT @ v)


@unknown(RANDOM)
def trigonometric(q, k, v, projection):
    return ratio(*(torch.cos(torch.einsum("bhnd,md->bhnm", x, projection)) for x in (q, k)), v)


@unknown(RANDOM)
def scaled_on_one_side(q, k, v, projection):
    return stabilised(logs(q, projection, q.shape[-1] ** -0.5), logs(k, projection, 1.0), v)


@unknown(RANDOM)
def an_epsilon_in_the_features(q, k, v, projection):
    log_q, log_k = logs(q, projection), logs(k, projection)
    return ratio((log_q - log_q.amax(-1, True)).exp() + 0.01, (log_k - log_k.amax((-1, -2), True)).exp() + 0.01, v)


@unknown(RANDOM)
def exact(q, k, v, projection):
    return F.scaled_dot_product_attention(q, k, v)


@unknown(RANDOM)
def features_of_its_own(q, k, v, projection):
    w = projection / projection.norm(dim=-1, keepdim=True)
    return stabilised(logs(q, w), logs(k, w), v)


# ------------------------------------------------------------------------------------------------- neighbourhood_mask

MASK = "efficient_attention.neighbourhood_mask"


def pair_by_pair(near):
    """``near(dy, dx, radius)`` for every pair of patches; prefix tokens see all and are seen by all."""

    def build(grid, window_size):
        h, w, prefix = grid
        mask = torch.ones(prefix + h * w, prefix + h * w, dtype=torch.bool)
        for i in range(h * w):
            for j in range(h * w):
                mask[prefix + i, prefix + j] = near(
                    abs(i // w - j // w), abs(i % w - j % w), window_size // 2, abs(i - j)
                )
        return mask

    return build


right(MASK)(pair_by_pair(lambda dy, dx, r, n: dy <= r and dx <= r))


@right(MASK)
def by_pooling(grid, window_size):
    """Whom does a single lit patch light up, if a window of maxima slides over the map?"""
    h, w, prefix = grid
    lit = torch.eye(h * w).reshape(h * w, 1, h, w)
    near = F.max_pool2d(lit, window_size, stride=1, padding=window_size // 2).flatten(1) > 0
    return F.pad(near, (prefix, 0, prefix, 0), value=True)


@right(MASK)
def by_kronecker(grid, window_size):
    h, w, prefix = grid
    bands = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= window_size // 2 for n in (h, w)]
    return F.pad(torch.from_numpy(np.kron(*bands)), (prefix, 0, prefix, 0), value=True)


@variant(MASK, "inverted")
def hidden_ones(grid, window_size):
    return by_kronecker(grid, window_size) == 0


variant(MASK, "along-the-sequence")(pair_by_pair(lambda dy, dx, r, n: n <= r))
variant(MASK, "diamond")(pair_by_pair(lambda dy, dx, r, n: dy + dx <= r))
variant(MASK, "whole-window-each-way")(pair_by_pair(lambda dy, dx, r, n: max(dy, dx) <= 2 * r + 1))


@variant(MASK, "height-for-width")
def divided_by_the_height(grid, window_size):
    h, w, prefix = grid
    y, x = np.divmod(np.arange(h * w), h)
    near = (abs(y[:, None] - y) <= window_size // 2) & (abs(x[:, None] - x) <= window_size // 2)
    return F.pad(torch.from_numpy(near), (prefix, 0, prefix, 0), value=True)


@variant(MASK, "prefix-not-seen")
def columns_forgotten(grid, window_size):
    mask = by_pooling(grid, window_size)
    mask[grid[2] :, : grid[2]] = False
    return mask


@variant(MASK, "prefix-blind")
def rows_forgotten(grid, window_size):
    mask = by_pooling(grid, window_size)
    mask[: grid[2], grid[2] :] = False
    return mask


@unknown(MASK)
def without_the_prefix(grid, window_size):
    return by_kronecker((*grid[:2], 0), window_size)


@unknown(MASK)
def numbers_to_add(grid, window_size):
    return torch.where(by_pooling(grid, window_size), 0.0, -math.inf)


@unknown(MASK)
def prefix_at_the_end(grid, window_size):
    return by_kronecker(grid, window_size).flip(0, 1)


@unknown(MASK)
def over_the_edge(grid, window_size):
    """The grid taken for a torus."""
    h, w, prefix = grid
    y, x = np.divmod(np.arange(h * w), w)
    dy, dx = abs(y[:, None] - y), abs(x[:, None] - x)
    near = (np.minimum(dy, h - dy) <= window_size // 2) & (np.minimum(dx, w - dx) <= window_size // 2)
    return F.pad(torch.from_numpy(near), (prefix, 0, prefix, 0), value=True)


unknown(MASK)(pair_by_pair(lambda dy, dx, r, n: dy <= r))
unknown(MASK)(pair_by_pair(lambda dy, dx, r, n: dy + dx > 0 and dy <= r and dx <= r))

# --------------------------------------------------------------------------------------------------- sparse_attention

SPARSE = "efficient_attention.sparse_attention"


def block_by_block(attend, order=lambda out, layout: out[:, :, layout.home]):
    """A loop over blocks; ``attend(q, k, v, hidden)`` is one block's attention."""

    def run(q, k, v, layout):
        prefix, outs = q.shape[2] - len(layout.home), []
        for queries, keys, hidden in zip(
            layout.queries, layout.keys, layout.hidden.expand(len(layout.keys), -1, -1), strict=True
        ):
            outs.append(attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], hidden))
        first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
        return torch.cat([first, order(torch.cat(outs, dim=2), layout)], dim=2)

    return run


def masked(q, k, v, hidden):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden.logical_not().expand(q.shape[2], -1))


right(SPARSE)(block_by_block(masked))


@right(SPARSE)
def gathered(q, k, v, layout):
    """All blocks at once by ``torch.gather``-like indexing, and attention on an axis of blocks."""
    take = lambda x, table: x.transpose(0, 2)[table].permute(3, 2, 0, 1, 4)  # noqa: E731 (B, H, blocks, tokens, D)
    scores = take(q, layout.queries) @ take(k, layout.keys).mT / math.sqrt(q.shape[-1])
    scores = torch.where(layout.hidden, -math.inf, scores)
    out = (torch.softmax(scores, -1) @ take(v, layout.keys)).flatten(2, 3).index_select(2, layout.home)
    patches = q.shape[2] - layout.home.numel()
    everything = torch.softmax(q[:, :, :patches] @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
    return torch.cat([everything, out], 2)


@variant(SPARSE, "nothing-hidden")
def table_ignored(q, k, v, layout):
    return block_by_block(lambda q, k, v, hidden: F.scaled_dot_product_attention(q, k, v))(q, k, v, layout)


@variant(SPARSE, "hidden-after-softmax")
def weights_times_zero(q, k, v, layout):
    def attend(q, k, v, hidden):
        weights = F.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        return (weights * (1 - hidden.double())) @ v

    return block_by_block(attend)(q, k, v, layout)


@variant(SPARSE, "not-put-home")
def cropped(q, k, v, layout):
    return block_by_block(masked, lambda out, layout: out.narrow(2, 0, layout.home.shape[0]))(q, k, v, layout)


@variant(SPARSE, "prefix-among-themselves")
def prefix_apart(q, k, v, layout):
    p = q.shape[2] - len(layout.home)
    out = gathered(q, k, v, layout)[:, :, p:]
    return torch.cat([F.scaled_dot_product_attention(*(x[:, :, :p] for x in (q, k, v))), out], 2) if p else out


@variant(SPARSE, "no-scale")
def scale_of_one(q, k, v, layout):
    return gathered(q * math.sqrt(q.shape[-1]), k, v, layout)


@variant(SPARSE, "dense")
def full_matrix_filled_in(q, k, v, layout):
    n, prefix = q.shape[2], q.shape[2] - len(layout.home)
    bias = torch.full((n, n), -math.inf, dtype=q.dtype)
    bias[:prefix] = 0
    hidden = layout.hidden.expand(-1, layout.queries.shape[1], -1)
    for queries, keys, secret in zip(layout.queries, layout.keys, hidden, strict=True):
        for query, row in zip(queries, secret, strict=True):
            bias[query, keys[~row]] = 0
    return (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


@variant(SPARSE, "dense")
def all_keys_block_by_block(q, k, v, layout):
    n, prefix, outs = q.shape[2], q.shape[2] - len(layout.home), []
    for queries, keys, hidden in zip(layout.queries, layout.keys, layout.hidden, strict=True):
        bias = torch.full((len(queries), n), -math.inf, dtype=q.dtype)
        for row, secret in zip(bias, hidden.expand(len(queries), -1), strict=True):
            row[keys[~secret]] = 0
        outs.append((q[:, :, queries] @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v)
    first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
    return torch.cat([first, torch.cat(outs, 2)[:, :, layout.home]], 2)


@variant(SPARSE, "scattered")
def copied_to_their_numbers(q, k, v, layout):
    prefix = q.shape[2] - len(layout.home)

    def order(out, layout):
        return torch.zeros_like(v).index_copy(2, layout.queries.reshape(-1), out)[:, :, prefix:]

    return block_by_block(masked, order)(q, k, v, layout)


@unknown(SPARSE)
def plain_attention(q, k, v, layout):
    return F.scaled_dot_product_attention(q, k, v)


@unknown(SPARSE)
def only_the_patches(q, k, v, layout):
    return gathered(q, k, v, layout)[:, :, -len(layout.home) :] * 0.5


@unknown(SPARSE)
def hidden_by_minus_five(q, k, v, layout):
    def attend(q, k, v, hidden):
        return (q @ k.mT / math.sqrt(q.shape[-1]) - 5.0 * hidden).softmax(-1) @ v

    return block_by_block(attend)(q, k, v, layout)


@unknown(SPARSE)
def values_of_the_first_block(q, k, v, layout):
    return block_by_block(lambda q, k, v, hidden: masked(q, k, v, hidden).flip(1))(q, k, v, layout) + 1.0


@unknown(SPARSE)
def mean_of_what_is_seen(q, k, v, layout):
    return block_by_block(lambda q, k, v, hidden: masked(0 * q, k, v, hidden))(q, k, v, layout)


# ------------------------------------------------------------------------------------------------- bipartite_matching

MATCHING = "efficient_attention.bipartite_matching"


def one_by_one(alike=F.cosine_similarity, chosen=None, order=None, split=None, protect=True, b_first=False):
    """Lists and loops for every image."""

    def match(metric, r, num_prefix_tokens=0):
        places = []
        for tokens in metric:
            n, prefix = len(tokens), num_prefix_tokens if protect else 0
            patches = list(range(prefix, n))
            a, b = ([i for i in patches if i % 2 == odd] for odd in (0, 1)) if split is None else split(patches)
            table = {i: [alike(tokens[i], tokens[j], dim=0).item() for j in b] for i in a}
            ranked = sorted(a, key=lambda i: -max(table[i]))
            gone = ranked[:r] if chosen is None else chosen(ranked, a, r)
            stay = [i for i in a if i not in gone]
            stay = stay if order is None else sorted(stay, key=lambda i: order(max(table[i])))
            place = {i: i for i in range(prefix)}
            for new, i in enumerate(b + stay if b_first else stay + b):
                place[i] = prefix + new
            for i in gone:
                place[i] = place[b[int(np.argmax(table[i]))]]
            places.append([place[i] for i in range(n)])
        return torch.tensor(places)

    return match


def product(x, y, dim):
    return (x * y).sum(dim)


right(MATCHING)(one_by_one())


@right(MATCHING)
def as_in_the_authors_code(metric, r, num_prefix_tokens=0):
    """Sorted indices of who goes and who stays, the prefix kept from merging by a likeness of −∞."""
    p, n = num_prefix_tokens, metric.shape[1]
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, : (p + 1) // 2] = -math.inf
    scores[:, :, : p // 2] = -math.inf
    value, partner = scores.max(dim=-1)
    edge = value.argsort(dim=-1, descending=True)
    stay, gone = edge[:, r:].sort(dim=1).values, edge[:, :r]
    stay = stay[:, (p + 1) // 2 :]
    place = torch.zeros(len(metric), n, dtype=torch.long)
    place[:, :p] = torch.arange(p)
    place.scatter_(1, 2 * stay, torch.arange(p, p + stay.shape[1]).expand_as(stay))
    start = p + stay.shape[1]
    b = torch.arange(p // 2, n // 2)
    place[:, 2 * b + 1] = start + torch.arange(len(b))
    place.scatter_(1, 2 * gone, start - p // 2 + partner.gather(1, gone))
    return place


for key, change in {
    "not-normalised": {"alike": product},
    "least-alike": {"chosen": lambda ranked, a, r: ranked[::-1][:r]},
    "first-come": {"chosen": lambda ranked, a, r: a[:r]},
    "b-before-a": {"b_first": True},
    "in-order-of-likeness": {"order": lambda likeness: -likeness},
    "halves": {"split": lambda patches: (patches[: (len(patches) + 1) // 2], patches[(len(patches) + 1) // 2 :])},
    "counted-among-patches": {"split": lambda patches: (patches[::2], patches[1::2])},
    "prefix-merged": {"protect": False},
}.items():
    variant(MATCHING, key)(one_by_one(**change))

for change in (
    {"alike": lambda x, y, dim: -(x - y).abs().sum(dim)},
    {"chosen": lambda ranked, a, r: a[-r:]},
    {"split": lambda patches: (patches[1::2], patches[::2])},
    {"order": lambda likeness: likeness},
    {"b_first": True, "alike": product},
):
    unknown(MATCHING)(one_by_one(**change))


@unknown(MATCHING)
def nobody_moves(metric, r, num_prefix_tokens=0):
    return torch.arange(metric.shape[1]).repeat(len(metric), 1)


@unknown(MATCHING)
def which_ones_go(metric, r, num_prefix_tokens=0):
    return as_in_the_authors_code(metric, r, num_prefix_tokens)[:, :r]


# -------------------------------------------------------------------------------------------------------------- merge

MERGE = "efficient_attention.merge"


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


right(MERGE)(group_by_group(weighted))


@right(MERGE)
def scattered(x, size, place, count):
    index = place.unsqueeze(-1).expand_as(x)
    total = x.new_zeros(len(x), count, x.shape[-1]).scatter_add(1, index, x * size.unsqueeze(-1))
    sizes = size.new_zeros(len(x), count).scatter_add(1, place, size)
    return total / sizes.unsqueeze(-1), sizes


@right(MERGE)
def shares_without_gradient(x, size, place, count):
    """The share that each token has in its group is a number, which nothing is to be learnt through."""
    with torch.no_grad():
        sizes = size.new_zeros(len(x), count).scatter_add(1, place, size)
        onto = F.one_hot(place, count).to(x) * (size / sizes.gather(1, place)).unsqueeze(-1)
    return torch.einsum("bnc,bnd->bcd", onto, x), sizes


variant(MERGE, "unweighted")(group_by_group(lambda x, sizes: x.mean(0)))
variant(MERGE, "not-divided")(group_by_group(lambda x, sizes: sizes @ x))
variant(MERGE, "divided-by-the-tokens")(group_by_group(lambda x, sizes: sizes @ x / len(x)))
variant(MERGE, "tokens-counted")(group_by_group(weighted, lambda sizes: torch.ones_like(sizes).sum()))
variant(MERGE, "size-averaged")(group_by_group(weighted, lambda sizes: sizes.mean()))
variant(MERGE, "places-of-the-first")(group_by_group(weighted, places=lambda place, b: place[0]))


@unknown(MERGE)
def last_one_wins(x, size, place, count):
    out = x.new_zeros(len(x), count, x.shape[-1])
    for b in range(len(x)):
        for n in range(x.shape[1]):
            out[b, place[b, n]] = x[b, n]
    return out, scattered(x, size, place, count)[1]


@unknown(MERGE)
def tokens_only(x, size, place, count):
    return scattered(x, size, place, count)[0]


@unknown(MERGE)
def inverse_sizes(x, size, place, count):
    return scattered(x, 1 / size, place, count)


@unknown(MERGE)
def largest(x, size, place, count):
    return group_by_group(lambda x, sizes: x.amax(0))(x, size, place, count)


@unknown(MERGE)
def in_place(x, size, place, count):
    out = scattered(x, size, place, count)
    size.fill_(1.0)
    return out


# -------------------------------------------------------------------------------------------- proportional_attention

PROPORTIONAL = "efficient_attention.proportional_attention"


def with_bias(bias, scale=None):
    return lambda q, k, v, size: F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias(size)[:, None, None].expand(-1, -1, q.shape[2], -1), scale=scale
    )


right(PROPORTIONAL)(with_bias(torch.log))


@right(PROPORTIONAL)
def weighted_exponentials(q, k, v, size):
    weights = torch.exp(q @ k.mT / math.sqrt(q.shape[-1])) * size.reshape(len(size), 1, 1, -1)
    return weights @ v / weights.sum(-1, keepdim=True)


@right(PROPORTIONAL)
def repeated(q, k, v, size):
    """To the letter: as many equal keys as a size says, image by image."""
    outs = []
    for b in range(len(q)):
        several = [x[b].repeat_interleave(size[b].long(), dim=1) for x in (k, v)]
        outs.append(F.scaled_dot_product_attention(q[b], *several))
    return torch.stack(outs)


@right(PROPORTIONAL)
def bias_without_gradient(q, k, v, size):
    with torch.no_grad():
        bias = size.log()
    return with_bias(lambda _: bias)(q, k, v, size)


variant(PROPORTIONAL, "size-without-log")(with_bias(lambda size: size))
variant(PROPORTIONAL, "no-effect")(with_bias(torch.zeros_like))
variant(PROPORTIONAL, "scaled-with-the-scores")(
    lambda q, k, v, size: with_bias(lambda size: size.log() / math.sqrt(q.shape[-1]))(q, k, v, size)
)
variant(PROPORTIONAL, "no-scale")(with_bias(torch.log, scale=1.0))
variant(PROPORTIONAL, "large-tokens-avoided")(with_bias(lambda size: (1 / size).log()))


@variant(PROPORTIONAL, "no-effect")
def added_along_the_queries(q, k, v, size):
    rows = torch.linspace(0, 1, q.shape[2], dtype=q.dtype)[:, None] * size.mean()
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + rows, -1) @ v


@variant(PROPORTIONAL, "after-softmax")
def values_multiplied(q, k, v, size):
    return F.scaled_dot_product_attention(q, k, v * size[:, None, :, None])


unknown(PROPORTIONAL)(with_bias(torch.sqrt))
unknown(PROPORTIONAL)(with_bias(torch.log2))
unknown(PROPORTIONAL)(with_bias(lambda size: (size / size.sum(-1, keepdim=True) + 1).log()))


@unknown(PROPORTIONAL)
def keys_multiplied(q, k, v, size):
    return F.scaled_dot_product_attention(q, k * size[:, None, :, None], v)
