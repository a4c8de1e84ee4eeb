"""Weights: from timm, torchvision, transformers or a file into a model, and from a model into a file.

Read in this order: ``sources`` (what a checkpoint holds, and what else is known of it), ``huggingface`` (the same
of transformers, with ``huggingface_names`` and ``huggingface_dense``), ``fitting`` (how it is brought into a model's
shape, or refused), ``files`` (what is saved, and that it can be rebuilt), ``wrappers``.
"""

from .files import HEADER_KEYS, check_saveable, save_weights, tensors_to_save
from .fitting import load_weights
from .sources import read_metadata
from .wrappers import unwrap

__all__ = [
    "HEADER_KEYS",
    "check_saveable",
    "load_weights",
    "read_metadata",
    "save_weights",
    "tensors_to_save",
    "unwrap",
]
