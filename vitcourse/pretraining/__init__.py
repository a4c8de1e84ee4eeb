"""Learning without labels: MoCo v3, BEiT, MAE, LeJEPA, each a task of the engine around any ViT; and what it is worth.

>>> from vitcourse import create_model
>>> encoder = create_model("vit_tiny", img_size=28, patch_size=7, in_chans=1, num_classes=0, depth=2)
>>> model, task = make_objective("mae", encoder, decoder_dim=64, decoder_depth=1, decoder_heads=4)
>>> task.name, model.encoder is encoder
('mae', True)

``fit(model, images, config=TrainConfig(…), task=task)`` then trains it. Read in this order: ``options`` (what can be
chosen), ``objective`` (what they share), ``mae``, ``views``, ``moco``, ``lejepa``, ``vq``, ``tokenizer``, ``models``,
``beit``, ``distributed`` (batches that processes share), ``diagnostics`` (has it collapsed?), ``transfer`` (what has it
learnt?).
"""

from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .options import OBJECTIVES, BeitOptions, LejepaOptions, MaeOptions, MocoOptions, make_options

if TYPE_CHECKING:
    from torch import nn

    from vitcourse.train import Task

_MODULES = {
    "beit": ("MaskedImageModel", "MaskedImageModelling", "block_mask"),
    "diagnostics": ("alignment", "code_use", "effective_rank", "uniformity"),
    "lejepa": ("GaussianEmbedding", "LeJEPA", "sigreg"),
    "mae": ("MaskedAutoencoder", "MaskedAutoencoding", "patch_targets", "random_masking"),
    "models": ("Beit", "BeitAttention"),
    "moco": ("MoCo", "MomentumContrast", "info_nce"),
    "tokenizer": ("Tokenization", "load_tokenizer", "provide_tokenizer", "tokenizer_for"),
    "transfer": (
        *("Features", "extract_features", "features_by_depth", "few_shot", "few_shot_split", "fine_tune"),
        *("knn_accuracy", "linear_probe", "ridge_probe", "split_classes"),
    ),
    "views": ("View",),
    "vq": ("Codebook", "VQTokenizer", "nearest_code", "straight_through"),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["OBJECTIVES", "BeitOptions", "LejepaOptions", "MaeOptions", "MocoOptions", "make_objective", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_objective(name: str, encoder: "nn.Module", **options: Any) -> tuple["nn.Module", "Task"]:
    """What :func:`vitcourse.train.fit` trains, and the task that it gives it.

    Args:
        name: ``"moco"``, ``"beit"``, ``"mae"`` or ``"lejepa"``.
        encoder: a model without a head (``num_classes=0``); trained in place.
        options: fields of :class:`MocoOptions`, :class:`BeitOptions`, :class:`MaeOptions` or :class:`LejepaOptions`.

    Returns:
        ``fit`` trains the model and writes its encoder. ``save_weights(model, path)`` keeps all of it, decoder or
        projector included, for ``create_model(path)``.

    Raises:
        ValueError: an unknown objective or option, or a value out of range; an encoder that has a head, or that the
            objective cannot train.
    """
    chosen = make_options(name, options)
    model, task = import_module(f"{__name__}.{name}").make(encoder, chosen)
    if hasattr(encoder, "model_args"):  # then a file can say how all of it is built
        of_encoder = {"encoder": encoder.name, "encoder_args": {**encoder.model_args, "num_classes": 0}}
        model.name, model.model_args = f"{name}_pretrainer", {**of_encoder, **asdict(chosen)}
        model.model_args.pop("tokenizer", None)  # a path on this machine, and no part of the model
    return model, task
