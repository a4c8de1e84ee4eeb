"""What can be chosen for each objective: plain data, shared by command line, recipes and weights files.

The defaults are the papers', for pictures of 224 pixels; the recipes of this package have those for small ones.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from vitcourse.train.config import check_choice


def _opt(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Options:
    """What the options of all objectives have: each value lies in a range, or the error says which.

    >>> MaeOptions(mask_ratio=1.0)
    Traceback (most recent call last):
    ...
    ValueError: mask_ratio must be above 0 and below 1, got 1.0; at 1 no patch would be left to see, MAE has 0.75
    """

    def __post_init__(self) -> None:
        for names, low, high in _RANGES:
            for name in names.split():
                value = getattr(self, name, low)
                if not low <= value <= high:
                    raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value}")
        for name in ("mask_ratio", "temperature"):
            value = getattr(self, name, 0.5)
            if not 0 < value < (1 if name == "mask_ratio" else float("inf")):
                raise ValueError(f"{name} must be above 0{_REMEDY[name].format(value)}")


_REMEDY = {
    "mask_ratio": " and below 1, got {}; at 1 no patch would be left to see, MAE has 0.75",
    "temperature": ", got {}; MoCo v3 has 0.2",
}
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("min_crop", 0.01, 1),
    ("jitter grayscale blur solarize key_momentum decay commitment", 0, 1),
    ("sigreg", 0, 1),
    ("decoder_dim decoder_depth decoder_heads hidden_dim out_dim vocab_size code_dim tokenizer_dim", 1, float("inf")),
    ("min_block global_views directions tokenizer_epochs", 1, float("inf")),
    ("revive_after local_views local_size tokenizer_depth", 0, float("inf")),
)


@dataclass(frozen=True)
class MaeOptions(Options):
    """Masked autoencoders (He et al. 2022, section 4 and table 8)."""

    mask_ratio: float = _opt(0.75, "share of the patches that the encoder does not see")
    norm_pix: bool = _opt(True, "predict pixels normalised within each patch")
    min_crop: float = _opt(0.2, "smallest share of the image that a random crop keeps; 1 for no crops")
    decoder_dim: int = _opt(512, "width of the decoder")
    decoder_depth: int = _opt(8, "blocks of the decoder")
    decoder_heads: int = _opt(16, "heads of the decoder's attention")


@dataclass(frozen=True)
class ViewOptions(Options):
    """How two views of an image are made (MoCo v3, section 5 and BYOL's augmentation)."""

    min_crop: float = _opt(0.08, "smallest share of the image that a view keeps")
    jitter: float = _opt(0.4, "strength of the random brightness and contrast; saturation has half of it, hue a fourth")
    grayscale: float = _opt(0.2, "share of the views without colour")
    blur: float = _opt(1.0, "share of the first views that are blurred; of the second a tenth of that")
    solarize: float = _opt(0.2, "share of the second views whose light pixels are inverted; of the first none")


@dataclass(frozen=True)
class MocoOptions(ViewOptions):
    """MoCo v3 (Chen et al. 2021, section 5)."""

    temperature: float = _opt(0.2, "temperature of the contrast")
    key_momentum: float = _opt(0.99, "of the momentum encoder at the start; it rises to 1 as half a cosine")
    hidden_dim: int = _opt(4096, "hidden width of projector and predictor")
    out_dim: int = _opt(256, "width of what is compared")
    predictor: bool = _opt(True, "whether there is a predictor")
    freeze_patches: bool = _opt(True, "keep the random patch projection as it is, for stability")


@dataclass(frozen=True)
class LejepaOptions(ViewOptions):
    """LeJEPA (Balestriero and LeCun 2025)."""

    min_crop: float = _opt(0.3, "smallest share of the image that a large view keeps, and largest of a small one")
    sigreg: float = _opt(0.05, "weight of SIGReg; that of the agreement of the views is what is missing to 1")
    global_views: int = _opt(2, "large views of each image, whose mean all views are to predict")
    local_views: int = _opt(0, "small views of each image, of at most min_crop of it")
    local_size: int = _opt(0, "side of the small views in pixels; 0 for that of the image")
    directions: int = _opt(1024, "random directions along which SIGReg looks in a step")
    hidden_dim: int = _opt(2048, "hidden width of the projector")
    out_dim: int = _opt(64, "width of the embedding that is to be Gaussian")


@dataclass(frozen=True)
class TokenizerOptions(Options):
    """The visual tokenizer of BEiT: a VQ-VAE (van den Oord et al. 2017)."""

    min_crop: float = _opt(0.2, "smallest share of the image that a random crop keeps; 1 for no crops")
    vocab_size: int = _opt(8192, "codes in the codebook")
    code_dim: int = _opt(32, "width of a code")
    tokenizer_dim: int = _opt(256, "width of the tokenizer's layers")
    tokenizer_depth: int = _opt(2, "residual blocks of its encoder, and of its decoder")
    commitment: float = _opt(0.25, "weight of the commitment loss")
    decay: float = _opt(0.99, "memory of the running means that codes are")
    revive_after: int = _opt(100, "steps after which a code that nobody uses is put where something is; 0 for never")


@dataclass(frozen=True)
class BeitOptions(TokenizerOptions):
    """BEiT (Bao et al. 2021, section 2 and appendix)."""

    mask_ratio: float = _opt(0.4, "share of the patches that are masked; in blocks, so it may be a little less")
    min_block: int = _opt(16, "patches in the smallest block")
    tokenizer: str = _opt("", "file of a trained tokenizer; without one, it is trained first, on the same images")
    tokenizer_epochs: int = _opt(10, "passes over the images in which the tokenizer is trained first")


# By the name that --objective takes and that stands in the weights file.
OBJECTIVES: dict[str, type[Options]] = {
    "moco": MocoOptions,
    "beit": BeitOptions,
    "mae": MaeOptions,
    "lejepa": LejepaOptions,
}


def option_fields(objective: str) -> tuple[Field, ...]:
    """The options of an objective, each with ``metadata["help"]``; none for ``"supervised"``."""
    return fields(OBJECTIVES[objective]) if objective in OBJECTIVES else ()


def make_options(objective: str, given: Mapping[str, Any]) -> Options:
    """The options of an objective, from those that were given.

    Raises:
        ValueError: an unknown objective or option, with the nearest; a value out of range.

    >>> make_options("mae", {"mask_ratio": 0.5}).mask_ratio
    0.5
    """
    check_choice("objective", objective, OBJECTIVES)
    for name in given:
        check_choice(f"option of objective {objective}:", name, [f.name for f in option_fields(objective)])
    return OBJECTIVES[objective](**given)
