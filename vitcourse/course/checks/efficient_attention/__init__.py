"""Checks of lesson 05: linear attention, random features, sparse patterns, token merging."""

EXERCISES = (
    "linear_attention",
    "random_feature_attention",
    "neighbourhood_mask",
    "sparse_attention",
    "bipartite_matching",
    "merge",
    "proportional_attention",
)
