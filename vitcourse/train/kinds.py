"""What ``vitcourse train --task`` can be: plain data, so that a help needs no PyTorch."""

from dataclasses import dataclass, field
from typing import Any


def _opt(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DenseOptions:
    """How training images are varied together with their boxes and masks; ``--hflip`` mirrors half of them.

    Raises:
        ValueError: no range of factors.

    >>> DenseOptions(min_scale=3.0)
    Traceback (most recent call last):
    ...
    ValueError: min_scale 3.0 and max_scale 2.0 are no range of factors; use 0 < min_scale <= max_scale
    """

    min_scale: float = _opt(0.5, "smallest factor by which images are resized at random; 1 just fits them in")
    max_scale: float = _opt(2.0, "largest one; what then reaches out is cut off, what is missing is filled up")

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError(
                f"min_scale {self.min_scale} and max_scale {self.max_scale} are no range of factors; use "
                "0 < min_scale <= max_scale"
            )


@dataclass(frozen=True)
class Kind:
    """A task of the command line.

    Attributes:
        program: the module with what it needs beside the engine: ``model_args``, ``data_args``, ``make_model``,
            ``prepare`` and ``make_task``.
        summary: what is learned.
        options: flags of its own.
        defaults: of TrainConfig, where they are others than for classification.
        unheeded: fields of TrainConfig that mean nothing to it, and are refused.
    """

    program: str
    summary: str
    options: type | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    unheeded: tuple[str, ...] = ()


CLASSIFY = "classify"
_DENSE = {"batch_size": 16, "eval_batch_size": 16, "lr": 2e-4, "min_lr": 2e-6, "hflip": True, "label_smoothing": 0.0}
_OF_IMAGES = ("label_smoothing", "crop_scale")
TASKS = {
    CLASSIFY: Kind("vitcourse.train.program", "the class of an image, or what --objective says"),
    "detect": Kind(
        "vitcourse.dense_prediction.program", "objects, by their boxes or masks", DenseOptions, _DENSE, _OF_IMAGES
    ),
    "segment": Kind("vitcourse.dense_prediction.program", "a class for every pixel", DenseOptions, _DENSE, _OF_IMAGES),
    "video": Kind("vitcourse.video.program", "the class of a clip", None, {"batch_size": 32, "eval_batch_size": 32}),
}
