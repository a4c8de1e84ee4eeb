"""Attention that scales: linear (kernel features, random features), sparse (local, random, BigBird), and token merging.

Read :mod:`~vitcourse.efficient_attention.linear`, :mod:`~vitcourse.efficient_attention.layouts`,
:mod:`~vitcourse.efficient_attention.sparse`, then :mod:`~vitcourse.efficient_attention.merging`. The attentions are
token mixers, ``VisionTransformer(attn_layer=LinearAttention)``; merging wraps a model, ``merge_tokens(model, r=8)``.
"""

from vitcourse.efficient_attention.layouts import (
    Layout,
    block_layout,
    layout_mask,
    local_layout,
    neighbourhood_mask,
)
from vitcourse.efficient_attention.linear import (
    LinearAttention,
    RandomFeatureAttention,
    TwoSoftmaxAttention,
    elu_features,
    linear_attention,
    log_positive_features,
    orthogonal_projection,
    random_feature_attention,
    redraw_features,
    two_softmax_attention,
)
from vitcourse.efficient_attention.merging import (
    MergingBlock,
    TokenMerging,
    bipartite_matching,
    merge,
    merge_tokens,
    proportional_attention,
    unmerge,
)
from vitcourse.efficient_attention.sparse import (
    BigBirdAttention,
    LocalAttention,
    RandomBlockAttention,
    SparseAttention,
    sparse_attention,
)

__all__ = [
    "BigBirdAttention",
    "TwoSoftmaxAttention",
    "Layout",
    "LinearAttention",
    "LocalAttention",
    "MergingBlock",
    "RandomBlockAttention",
    "RandomFeatureAttention",
    "SparseAttention",
    "TokenMerging",
    "bipartite_matching",
    "block_layout",
    "two_softmax_attention",
    "elu_features",
    "layout_mask",
    "linear_attention",
    "local_layout",
    "log_positive_features",
    "merge",
    "merge_tokens",
    "neighbourhood_mask",
    "orthogonal_projection",
    "proportional_attention",
    "random_feature_attention",
    "redraw_features",
    "sparse_attention",
    "unmerge",
]
