"""Pruning: a smaller model (:mod:`~vitcourse.hardware.prune.structured`), or zeros in the old one (``sparsity``)."""

from vitcourse.registry import register_form

from .sparsity import accelerate_2_4, magnitude_prune, make_permanent
from .structured import (
    count_macs,
    keep_units,
    prune_like,
    prune_model,
    structure,
    taylor_importance,
    taylor_score,
)

__all__ = [
    "accelerate_2_4",
    "count_macs",
    "keep_units",
    "magnitude_prune",
    "make_permanent",
    "prune_like",
    "prune_model",
    "structure",
    "taylor_importance",
    "taylor_score",
]

register_form("structure", lambda model: model.structure, prune_like)
