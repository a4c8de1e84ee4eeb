"""The check of `dense_prediction.query_mask`, and its reference: the library's is part of a model."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcourse.course.checks import call, check


def query_mask(masks: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """Who may attend to whom, (B, 1, N, N), N = Q + prefix + h · w: queries to their mask's patches, the rest to all.

    Args:
        masks: logits (B, Q, H, W), finer than the grid.
        grid: (h, w), rows and columns of patches.
        prefix: tokens between queries and patches, [CLS] and registers.

    >>> query_mask(torch.tensor([[[[1.0, -1.0]]]]), (1, 2), prefix=0)[0, 0].int().tolist()
    [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    """
    covered = F.interpolate(masks, grid, mode="bilinear").flatten(2) > 0
    return F.pad(covered, (masks.shape[1] + prefix, 0, 0, prefix + covered.shape[2]), value=True)[:, None]


@check(
    "dense_prediction.query_mask",
    reference="vitcourse.course.checks.dense_prediction.query_mask.query_mask",
    level=3,
    minutes=20,
    why="It turns a plain ViT into a segmenter, and one wrong row of it lets the softmax run over nothing: NaN.",
    hints=[
        "How large is the result? Queries, the prefix and patches, in this order, along both axes.",
        "Begin with True everywhere. Which rows and which columns change? One block of the square.",
        "masks are logits: which values mean that a pixel is covered? They are finer than the grid: F.interpolate.",
    ],
    gradients=False,
    exempt={"tiny": "only the signs of the masks count"},
)
def query_mask_cases(rng):
    yield call(rng.normal(2, 3, 8, 12), (4, 6), 1)
    yield call(rng.normal(1, 5, 10, 6), (5, 3), 0).on("a ViT without [CLS]")
    yield call(rng.normal(3, 2, 12, 20), (3, 5), 5).on("[CLS] and four registers")
    yield call(rng.normal(2, 4, 7, 9), (3, 4), 2).on("masks whose sides the grid does not divide")
    yield call(-rng.uniform(1, 3, 4, 8, low=0.1), (2, 4), 1).on("masks that cover nothing")
    yield call(rng.normal(1, 1, 6, 4), (3, 2), 1).on("one query")
    # Four equal pixels to a patch: bilinear or not, a patch has exactly their value.
    flat = rng.integers(-1, 2, (2, 3, 3, 4)).to(torch.float64)
    flat[0, 0, 0, 0] = 0
    yield call(flat.repeat_interleave(2, 2).repeat_interleave(2, 3), (3, 4), 1).on("pixels of exactly 0")


def _placed(covered, prefix, *, seen=True):
    """True but for the block of queries' rows and patches' columns."""
    batch, queries, patches = covered.shape
    length = queries + prefix + patches
    mask = torch.full((batch, length, length), seen)
    mask[:, :queries, queries + prefix :] = covered
    return mask[:, None]


def _covered(masks, grid):
    return F.interpolate(masks, grid, mode="bilinear").flatten(2) > 0


query_mask_cases.mistake(
    "probability-above-zero",
    "every query sees every patch: the probability of a pixel is compared with 0, and it is always above",
    lambda masks, grid, prefix: _placed(_covered(masks.sigmoid(), grid), prefix),
)
query_mask_cases.mistake(
    "inverted",
    "the queries see what their mask does *not* cover",
    lambda masks, grid, prefix: _placed(~_covered(masks, grid), prefix),
)
query_mask_cases.mistake(
    "patches-masked",
    "here patches are kept from seeing queries, and queries see all; it should be the other way round",
    lambda masks, grid, prefix: _placed(_covered(masks, grid), prefix).transpose(2, 3),
)
query_mask_cases.mistake(
    "both-ways",
    "patches, too, see only some of the queries; only what queries see should be limited",
    lambda masks, grid, prefix: _both(masks, grid, prefix),
)
query_mask_cases.mistake(
    "alone",
    "queries see their patches and nothing else: a query whose mask is empty sees nothing at all, and its softmax is NaN",
    lambda masks, grid, prefix: _alone(masks, grid, prefix),
)
query_mask_cases.mistake(
    "nearest",
    "masks are thinned out instead of interpolated: a patch goes by a single one of its pixels",
    lambda masks, grid, prefix: _placed(F.interpolate(masks, grid).flatten(2) > 0, prefix),
)
query_mask_cases.mistake(
    "zero-counts",
    "a patch whose logit is exactly 0 is seen; it must be positive",
    lambda masks, grid, prefix: _placed(~_covered(-masks, grid), prefix),
)
query_mask_cases.mistake(
    "threshold-first",
    "masks are cut to yes and no before they are brought to the grid: one covered pixel then opens a whole patch",
    lambda masks, grid, prefix: _placed(_covered((masks > 0).to(masks), grid), prefix),
)
query_mask_cases.mistake(
    "logits-above-half",
    "logits are compared with 0.5, as if they were probabilities",
    lambda masks, grid, prefix: _placed(_covered(masks - 0.5, grid), prefix),
)
query_mask_cases.mistake(
    "prefix-masked",
    "the mask lies on the tokens right behind the queries; there are others between them and the patches",
    lambda masks, grid, prefix: _shifted(masks, grid, prefix),
)


def _both(masks, grid, prefix):
    mask = _placed(_covered(masks, grid), prefix)
    return mask & mask.transpose(2, 3)


def _alone(masks, grid, prefix):
    mask = _placed(_covered(masks, grid), prefix)
    mask[..., : masks.shape[1], : masks.shape[1] + prefix] = False
    return mask


def _shifted(masks, grid, prefix):
    queries = masks.shape[1]
    mask = _placed(_covered(masks, grid), prefix)
    mask[..., :queries, queries:] = mask[..., :queries, queries:].roll(-prefix, -1)
    return mask
