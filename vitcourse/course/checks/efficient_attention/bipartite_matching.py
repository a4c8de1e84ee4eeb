"""The check of `efficient_attention.bipartite_matching`."""

import torch

from vitcourse.course.checks import call, check


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
    yield call(rng.normal(2, 1 + 8, 3), 0, 1).on("nothing to merge")


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
