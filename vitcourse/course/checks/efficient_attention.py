"""Checks of lesson 05: linear attention, random features, sparse patterns, token merging."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitcourse import efficient_attention
from vitcourse.course.checks import call, check, holds
from vitcourse.layers import attention


class _Work(TorchDispatchMode):
    """Sums up the values that operations compute. Views compute none, and changes in place none that are new."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self.values += sum(t.numel() for t in _tensors(result) if t.untyped_storage().data_ptr() not in known)
        return result


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _grows_linearly(once, twice):
    """Does ``answer`` compute fewer than three times as many values for twice the tokens? Of N², it would be four."""

    def predicate(answer):
        work = []
        for args in (once, twice):
            with torch.no_grad(), _Work() as mode:
                answer(*args)
            work.append(mode.values)
        return work[1] < 3 * work[0]

    return predicate


QUADRATIC = "right, but its work grows with the square of the number of tokens"


# ------------------------------------------------------------------------------------------------------------- linear


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
    yield holds(QUADRATIC, _grows_linearly(once, twice), points_to="quadratic")


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
)
def random_feature_attention(rng):
    yield call(rng.normal(2, 3, 7, 5), rng.normal(2, 3, 7, 5), rng.normal(2, 3, 7, 4), rng.normal(6, 5))
    yield call(rng.normal(1, 2, 6, 4), rng.normal(1, 2, 9, 4), rng.normal(1, 2, 9, 5), rng.normal(8, 4)).on(
        "more keys than queries"
    )
    large = 30 * rng.normal(1, 1, 4, 4), 30 * rng.normal(1, 1, 5, 4), rng.normal(1, 1, 5, 3), rng.normal(7, 4)
    yield call(*large).on("long queries and keys")
    once, twice = ((*(rng.normal(1, 1, n, 3) for _ in range(3)), rng.normal(4, 3)) for n in (128, 256))
    yield holds(QUADRATIC, _grows_linearly(once, twice), points_to="quadratic")


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


# ------------------------------------------------------------------------------------------------------------- sparse


@check(
    "efficient_attention.neighbourhood_mask",
    reference="vitcourse.efficient_attention.neighbourhood_mask",
    level=2,
    minutes=15,
    why="On an image, near means near in two directions; and somebody has to carry news across.",
    hints=[
        "First, for every patch, its row and its column. Prefix tokens have neither.",
        "Two patches are near when they are near along the rows and near along the columns.",
        "How far may a patch look, if the square around it is window_size wide and it sits in the middle?",
    ],
)
def neighbourhood_mask(rng):
    yield call((4, 6, 1), 3)
    yield call((3, 7, 2), 5).on("two prefix tokens")
    yield call((5, 2, 0), 3).on("no prefix token")


def _near(grid, window_size, metric=lambda down, across: torch.maximum(down, across), reach=None, width=None):
    h, w, _ = grid
    number = torch.arange(h * w)
    down, across = (
        (t[:, None] - t).abs() for t in (number.div(width or w, rounding_mode="floor"), number.remainder(width or w))
    )
    return metric(down, across) <= (window_size // 2 if reach is None else reach)


def _with_prefix(near, prefix, sees=True, seen=True):
    n = len(near) + prefix
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[:prefix, :prefix] = True
    mask[:prefix, prefix:] = sees
    mask[prefix:, :prefix] = seen
    mask[prefix:, prefix:] = near
    return mask


neighbourhood_mask.mistake(
    "inverted",
    "true and false are exchanged: here true marks what may be seen",
    lambda grid, window_size: ~_with_prefix(_near(grid, window_size), grid[2]),
)
neighbourhood_mask.mistake(
    "along-the-sequence",
    "near in the sequence is not near in the image: the patch below is a whole row further on",
    lambda grid, window_size: _with_prefix(_near(grid, window_size, width=grid[0] * grid[1]), grid[2]),
)
neighbourhood_mask.mistake(
    "diamond",
    "the neighbourhood is a diamond: the distances along rows and columns are added, though a square has corners",
    lambda grid, window_size: _with_prefix(_near(grid, window_size, torch.add), grid[2]),
)
neighbourhood_mask.mistake(
    "whole-window-each-way",
    "the square is twice as wide as asked for: window_size is its side, with the patch in the middle",
    lambda grid, window_size: _with_prefix(_near(grid, window_size, reach=window_size), grid[2]),
)
neighbourhood_mask.mistake(
    "height-for-width",
    "rows and columns are worked out with the height of the grid, which square grids hide",
    lambda grid, window_size: _with_prefix(_near(grid, window_size, width=grid[0]), grid[2]),
)
neighbourhood_mask.mistake(
    "prefix-not-seen",
    "prefix tokens see all patches, but no patch sees them: what they gather is passed on to nobody",
    lambda grid, window_size: _with_prefix(_near(grid, window_size), grid[2], seen=False),
)
neighbourhood_mask.mistake(
    "prefix-blind",
    "all patches see the prefix tokens, but these see no patch: [CLS] has nothing to tell",
    lambda grid, window_size: _with_prefix(_near(grid, window_size), grid[2], sees=False),
)


@check(
    "efficient_attention.sparse_attention",
    reference="vitcourse.efficient_attention.sparse_attention",
    level=4,
    minutes=30,
    why="A mask on a dense matrix saves nothing. Gathering the few keys that are seen makes the cost itself sparse.",
    hints=[
        "x[:, :, layout.keys] picks tokens for all blocks at once: (B, H, blocks, K, D).",
        "Now each block is a small attention of its own: scores (B, H, blocks, Q, K). layout.hidden fits on its last axes.",
        "The outputs lie block after block. Join blocks and queries into one axis and pick layout.home from it. The "
        "prefix tokens, first in q, attend to everything, by plain attention; put them in front.",
    ],
)
def sparse_attention(rng):
    def qkv(batch, heads, tokens, width):
        return tuple(rng.normal(batch, heads, tokens, width) for _ in range(3))

    yield call(*qkv(2, 3, 1 + 5 * 4, 4), efficient_attention.local_layout((5, 4, 1), 3, 2))
    yield call(*qkv(1, 2, 4 * 6, 3), efficient_attention.block_layout((4, 6, 0), 2, 0, 2, 0)).on("random blocks")
    yield call(*qkv(2, 1, 2 + 3 * 7, 5), efficient_attention.block_layout((3, 7, 2), 2, 1, 1, 0)).on(
        "blocks that reach over the edge"
    )
    once, twice = (
        (*qkv(1, 1, 20 * w, 2), efficient_attention.local_layout((20, w, 0), window_size=3, block_size=4))
        for w in (20, 40)
    )
    yield holds(QUADRATIC, _grows_linearly(once, twice), points_to="dense")


def _sparsely(scaled=True, hide="before", home=True, prefix_sees="all"):
    """Sparse attention in its steps, each of which a mistake may replace."""

    def attend(q, k, v, layout):
        prefix = q.shape[2] - len(layout.home)
        queries, keys, values = q[:, :, layout.queries], k[:, :, layout.keys], v[:, :, layout.keys]
        scores = queries @ keys.mT * (q.shape[-1] ** -0.5 if scaled else 1.0)
        if hide == "before":
            scores = scores.masked_fill(layout.hidden, float("-inf"))
        weights = scores.softmax(-1)
        if hide == "after":
            weights = weights.masked_fill(layout.hidden, 0.0)
        out = (weights @ values).flatten(2, 3)
        out = out[:, :, layout.home] if home else out[:, :, : len(layout.home)]
        seen = k.shape[2] if prefix_sees == "all" else prefix
        scale = None if scaled else 1.0
        first = attention(q[:, :, :prefix], k[:, :, :seen], v[:, :, :seen], scale=scale) if prefix else out[:, :, :0]
        return torch.cat([first, out], dim=2)

    return attend


sparse_attention.mistake(
    "nothing-hidden",
    "every key that was gathered is attended to; some of them are fillers, or lie outside a query's neighbourhood",
    _sparsely(hide="never"),
)
sparse_attention.mistake(
    "hidden-after-softmax",
    "hidden keys are removed after the softmax, so what is left no longer sums to one",
    _sparsely(hide="after"),
)
sparse_attention.mistake(
    "not-put-home",
    "the outputs are left in the order of the blocks, so that patches get what others have asked for",
    _sparsely(home=False),
)
sparse_attention.mistake(
    "prefix-among-themselves",
    "the prefix tokens see only each other; they are the global ones, and should see everything",
    _sparsely(prefix_sees="prefix"),
)
sparse_attention.mistake(
    "no-scale", "the scores are not scaled: they grow with the width of a head", _sparsely(scaled=False)
)


@sparse_attention.mistake(
    "dense", "the values are right, but all pairs were computed: a mask on a full matrix saves nothing"
)
def _(q, k, v, layout):
    seen = efficient_attention.layout_mask(layout)
    return attention(q, k, v, bias=torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, float("-inf")))


@sparse_attention.mistake(
    "scattered",
    "a patch that is repeated at the edge is written twice, and its gradient counted twice: pick each patch once, "
    "from `home`",
)
def _(q, k, v, layout):
    prefix = q.shape[2] - len(layout.home)
    scores = q[:, :, layout.queries] @ k[:, :, layout.keys].mT * q.shape[-1] ** -0.5
    out = scores.masked_fill(layout.hidden, float("-inf")).softmax(-1) @ v[:, :, layout.keys]
    everywhere = torch.zeros_like(v)
    everywhere[:, :, layout.queries.flatten()] = out.flatten(2, 3)
    first = attention(q[:, :, :prefix], k, v) if prefix else out[:, :, :0, 0]
    return torch.cat([first, everywhere[:, :, prefix:]], dim=2)


# ------------------------------------------------------------------------------------------------------ token merging


@check(
    "efficient_attention.bipartite_matching",
    reference="vitcourse.efficient_attention.bipartite_matching",
    level=5,
    minutes=40,
    why="It finds the pairs to merge in one matrix product, with no clustering and no loop.",
    hints=[
        "Cosines: normalise first. Then one product of A with B has all likenesses; a maximum over B gives each token of A "
        "its partner.",
        "The r tokens of A with the largest maximum go. A mask over A says so; cumsum of its opposite, minus one, numbers "
        "those that stay.",
        "A token that goes gets its partner's place, which is behind the prefix and behind all of A that stay. Write the "
        "places of A and B back with the same slices that took them out.",
    ],
)
def bipartite_matching(rng):
    yield call(rng.normal(3, 1 + 12, 4), 4, 1)
    yield call(rng.normal(2, 11, 3), 3, 0).on("no prefix token, and an odd number of patches")
    yield call(rng.normal(1, 2 + 10, 5), 5, 2).on("as many as can go")


def _match(metric, r, prefix, normalise=True, order="closest", numbering="a b", split="alternate", sort=True):
    """Bipartite matching in its steps, each of which a mistake may replace."""
    metric = torch.nn.functional.normalize(metric, dim=-1) if normalise else metric
    n = metric.shape[1]
    numbers = torch.arange(prefix, n)
    if split != "halves":
        start = prefix if split == "from the first patch" else 0
        a, b = (numbers[(numbers - start) % 2 == odd] for odd in (0, 1))
    else:
        a, b = numbers[: (n - prefix + 1) // 2], numbers[(n - prefix + 1) // 2 :]
    value, partner = (metric[:, a] @ metric[:, b].mT).max(-1)
    order = (
        value.argsort(-1, descending=order == "closest") if order != "first" else torch.arange(len(a)).expand_as(value)
    )
    goes = torch.zeros_like(value, dtype=torch.bool).scatter(1, order[:, :r], True)
    rank = (~goes).cumsum(-1) - 1
    if not sort:
        rank = order.argsort(-1) - r
    before_b, before_a = (len(a) - r, 0) if numbering == "a b" else (0, len(b))
    place = torch.arange(n).repeat(len(metric), 1)
    place[:, a] = prefix + torch.where(goes, before_b + partner, before_a + rank)
    place[:, b] = prefix + before_b + torch.arange(len(b))
    return place


def _catalogue_matching(key, message, **change):
    bipartite_matching.mistake(
        key, message, lambda metric, r, num_prefix_tokens=0: _match(metric, r, num_prefix_tokens, **change)
    )


_catalogue_matching(
    "not-normalised",
    "likeness is the plain product, which long vectors win: it should depend on the direction alone",
    normalise=False,
)
_catalogue_matching(
    "least-alike", "the pairs that are least alike are merged, those that lose the most by it", order="farthest"
)
_catalogue_matching(
    "first-come", "the first tokens of A are merged, however much or little they are like anybody", order="first"
)
_catalogue_matching(
    "b-before-a",
    "the tokens of B are numbered before those of A that stay; it should be the other way round",
    numbering="b a",
)
_catalogue_matching(
    "in-order-of-likeness",
    "the tokens of A that stay are numbered by their likeness; they should keep the order of the image",
    sort=False,
)
_catalogue_matching(
    "halves",
    "A and B are two halves of the image, so that neighbours can hardly ever merge; they should take turns",
    split="halves",
)
_catalogue_matching(
    "counted-among-patches",
    "even and odd are counted from the first patch on; places count the prefix tokens, too",
    split="from the first patch",
)
bipartite_matching.mistake(
    "prefix-merged",
    "prefix tokens are merged like patches: [CLS] is lost among them",
    lambda metric, r, num_prefix_tokens=0: _match(metric, r, 0),
)


@check(
    "efficient_attention.merge",
    reference="vitcourse.efficient_attention.merge",
    level=3,
    minutes=15,
    gradients=("x",),
    why="A token may stand for many patches; an average that forgets this lets a single patch outvote them.",
    hints=[
        "Two sums for each place: of size · token, and of size.",
        "scatter_add, or index_add over batch and places in one axis, adds up all that goes to one place.",
        "Places count from 0 in each image: image b begins at b · count.",
    ],
)
def merge(rng):
    def sizes(*shape):
        return rng.integers(1, 6, shape).double()

    places = torch.stack([torch.randperm(7, generator=rng.generator) % 5 for _ in range(3)])
    yield call(rng.normal(3, 7, 4), sizes(3, 7), places, 5)
    yield call(rng.normal(1, 6, 3), sizes(1, 6), torch.tensor([[0, 1, 1, 2, 1, 0]]), 3).on("three tokens for one place")
    yield call(rng.normal(2, 4, 2), sizes(2, 4), torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]]), 4).on("nothing to merge")


def _onto(place, count):
    """(B, count, N), one where a token goes to a place."""
    return torch.nn.functional.one_hot(place, count).mT.double()


def _catalogue_merge(key, message, tokens, sizes=lambda onto, size: (onto @ size[..., None])[..., 0]):
    def faulty(x, size, place, count):
        onto = _onto(place, count)
        return tokens(onto, x, size), sizes(onto, size)

    merge.mistake(key, message, faulty)


def _mean(onto, x, size):
    weights = onto * size[:, None]
    return weights @ x / weights.sum(-1, keepdim=True)


_catalogue_merge(
    "unweighted",
    "every token counts the same, however many patches it stands for",
    lambda onto, x, size: onto @ x / onto.sum(-1, keepdim=True),
)
_catalogue_merge(
    "not-divided",
    "the tokens are added up, not averaged: they grow with every merge",
    lambda onto, x, size: onto @ (x * size[..., None]),
)
_catalogue_merge(
    "divided-by-the-tokens",
    "the sum is weighted with sizes, but divided by the number of tokens",
    lambda onto, x, size: onto @ (x * size[..., None]) / onto.sum(-1, keepdim=True),
)
_catalogue_merge(
    "tokens-counted",
    "the new size is the number of tokens that were merged; each of them may stand for several patches",
    _mean,
    lambda onto, size: onto.sum(-1),
)
_catalogue_merge(
    "size-averaged",
    "the sizes are averaged like the tokens, so patches get lost; together they must stay as many as they were",
    _mean,
    lambda onto, size: (onto @ size[..., None])[..., 0] / onto.sum(-1),
)


@merge.mistake("places-of-the-first", "all images are merged like the first one; each has places of its own")
def _(x, size, place, count):
    onto = _onto(place[:1], count).expand(len(x), -1, -1)
    return _mean(onto, x, size), (onto @ size[..., None])[..., 0]


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
