"""Pruning: a smaller model, or zeros in the old one.

* :mod:`.units`: the heads and channels that a model has, and what they cost; :mod:`.importance`: what they are worth.
* :mod:`.surgery`: taking some of them out; :mod:`.structured`: ``prune_model``, all of it together.
* :mod:`.sparsity`: zeros among the weights, one by one or two of every four.
"""

from vitcourse.registry import register_form

from .importance import taylor_importance, taylor_score
from .sparsity import accelerate_2_4, magnitude_prune, make_permanent
from .structured import prune_model
from .surgery import keep_units, prune_like
from .units import count_macs, structure

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
