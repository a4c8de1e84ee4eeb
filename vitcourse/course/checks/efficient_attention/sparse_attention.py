"""The check of `efficient_attention.sparse_attention`."""

import torch

from vitcourse import efficient_attention
from vitcourse.course.checks import call, check, holds
from vitcourse.layers import attention

from ._shared import QUADRATIC, grows_linearly


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
    def qkv(batch, heads, tokens, width, values=None):
        return tuple(rng.normal(batch, heads, tokens, n) for n in (width, width, values or width))

    yield call(*qkv(2, 3, 1 + 5 * 4, 4), efficient_attention.local_layout((5, 4, 1), 3, 2))
    yield call(*qkv(1, 2, 4 * 6, 3), efficient_attention.block_layout((4, 6, 0), 2, 0, 2, 0)).on("random blocks")
    yield call(*qkv(2, 1, 2 + 3 * 7, 5, 3), efficient_attention.block_layout((3, 7, 2), 2, 1, 1, 0)).on(
        "blocks that reach over the edge"
    )
    once, twice = (
        (*qkv(1, 1, 20 * w, 2), efficient_attention.local_layout((20, w, 0), window_size=3, block_size=4))
        for w in (20, 40)
    )
    yield holds(QUADRATIC, grows_linearly(once, twice), points_to="dense")


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
