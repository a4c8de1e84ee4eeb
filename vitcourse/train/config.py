"""What a training run is made of: one dataclass that ``fit``, the command line and the recipes share."""

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
RECIPE_KEYS = (
    *("task", "objective", "model", "data", "val", "val_share"),
    *("model_args", "data_args", "task_args", "objective_args", "method", "method_args", "train"),
)

# What may differ between the two halves of an interrupted run. None of these changes what is learned; `accum`, the
# remedy for a full memory, changes the rounding and what dropout draws.
HARMLESS = {
    "num_workers",
    "threads",
    "device",
    "loader",
    "accum",
    "eval_every",
    "eval_batch_size",
    "checkpoint_every",
    "tensorboard",
    "save_dtype",
}


class TrainingError(RuntimeError):
    """A run that cannot go on: the loss is not finite, memory is full, a checkpoint cannot be continued."""


def _opt(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Every choice of a training run. Each field is also a flag: ``batch_size`` is ``--batch-size``.

    The defaults are DeiT's (Touvron et al. 2021, table 9) where nothing else is said: AdamW, weight decay 0.05,
    cosine to 1e-5. The learning rate is DeiT's 5e-4 per 512 images, doubled for a warmed-up, clipped short run.
    Augmentation is off by default, since the right amount depends on the data.

    Raises:
        ValueError: a value out of range or an unknown name, with the nearest known ones.

    >>> TrainConfig(epochs=3, batch_size=128).lr
    0.001
    >>> TrainConfig(optimizer="adam")
    Traceback (most recent call last):
    ...
    ValueError: optimizer 'adam' is unknown; did you mean 'adamw'? Known: adamw, sgd
    """

    epochs: int = _opt(10, "passes over the training images")
    max_steps: int | None = _opt(None, "stop after this many optimizer steps instead; the schedule ends there too")
    batch_size: int = _opt(256, "images per optimizer step, over all processes and micro-batches together")
    accum: int = _opt(1, "micro-batches that each process cuts its share of a batch into: less memory, same gradient")
    drop_last: bool = _opt(True, "leave out an epoch's last, smaller batch (as timm and DeiT do)")

    optimizer: str = _opt("adamw", "rule of the update: AdamW, or SGD with momentum", ("adamw", "sgd"))
    lr: float = _opt(1e-3, "learning rate after the warm-up")
    min_lr: float = _opt(1e-5, "floor that the cosine ends at")
    warmup: float = _opt(0.05, "share of the steps in which the rate rises linearly from 0 (DeiT: 5 of 300 epochs)")
    weight_decay: float = _opt(
        0.05,
        "decoupled decay of the weight matrices: a step takes lr * weight_decay of their size away, in AdamW as in "
        "SGD, whose larger rates ask for smaller decays; norms, biases, positions have none",
    )
    beta2: float = _opt(0.999, "AdamW's memory of squared gradients")
    momentum: float = _opt(0.9, "SGD's momentum, AdamW's beta1")
    clip_grad: float = _opt(1.0, "largest norm of the whole gradient (Dosovitskiy et al. 2021); 0 for no limit")

    crop_padding: int = _opt(0, "pixels of zeros around the image before a random crop of the old size")
    crop_scale: float = _opt(1.0, "smallest share of a larger picture that a random crop keeps (Inception: 0.08)")
    hflip: bool = _opt(False, "mirror half of the images")
    randaugment: int = _opt(0, "random operations per image (Cubuk et al. 2020); 0 for none, their choice is 2")
    randaugment_magnitude: int = _opt(9, "strength of the operations, 0 to 30")
    mixup: float = _opt(0.0, "alpha of MixUp's Beta distribution (Zhang et al. 2018); 0 for none, DeiT has 0.8")
    cutmix: float = _opt(0.0, "alpha of CutMix's Beta distribution (Yun et al. 2019); 0 for none, DeiT has 1.0")
    mix_prob: float = _opt(1.0, "share of the image pairs that are mixed")
    label_smoothing: float = _opt(0.1, "mass that is spread over all classes (Szegedy et al. 2016)")

    ema: float = _opt(0.0, "decay of a running mean of the weights, which is then evaluated and kept; 0 for none")
    precision: str = _opt(
        "auto",
        "bf16 where a GPU has it natively, fp16 with loss scaling on an older one, fp32 on a CPU",
        ("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = _opt(False, "run the model through torch.compile")
    grad_checkpointing: bool = _opt(False, "recompute activations in the backward pass: less memory, more time")
    channels_last: bool = _opt(False, "images and convolutions in channels-last memory")
    deterministic: bool = _opt(False, "only deterministic kernels on CUDA, so that a run can be repeated bit by bit")
    seed: int = _opt(0, "seed of shuffling, augmentation, mixing and dropout")

    device: str = _opt(
        "auto", "cuda, mps, cpu; auto: where the model was put, VITCOURSE_DEVICE, or what this machine has"
    )
    threads: int = _opt(0, "CPU threads; 0 leaves PyTorch's choice")
    loader: str = _opt(
        "auto",
        "hold uint8 images on the device, or read them one by one in workers; auto: memory where the data set has them",
        ("auto", "memory", "workers"),
    )
    num_workers: int = _opt(0, "processes that read and decode images")
    eval_every: int = _opt(1, "epochs between two evaluations")
    eval_batch_size: int = _opt(512, "images per step of an evaluation and process")
    checkpoint_every: int = _opt(0, "steps between two checkpoints; 0 for one after each epoch")
    tensorboard: bool = _opt(False, "also write the metrics for TensorBoard")
    save_dtype: str = _opt("fp32", "precision of the final weights file", ("fp32", "fp16"))

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.metadata["choices"]:
                check_choice(f.name, getattr(self, f.name), f.metadata["choices"])
        for names, low, high in _RANGES:
            for name in names.split():
                _check_range(name, getattr(self, name), low, high)
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}; lower min_lr")

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Where an earlier run's config says something else that changes the weights, as lines for a reader."""
        return [
            f"{f.name}: {other.get(f.name)!r} then, {getattr(self, f.name)!r} now"
            for f in fields(self)
            if f.name not in HARMLESS and other.get(f.name) != getattr(self, f.name)
        ]


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("epochs max_steps batch_size accum eval_every eval_batch_size", 1, float("inf")),
    ("crop_padding randaugment num_workers threads checkpoint_every seed", 0, float("inf")),
    ("lr min_lr weight_decay mixup cutmix clip_grad", 0, float("inf")),
    ("crop_scale warmup mix_prob label_smoothing ema momentum beta2", 0, 1),
    ("randaugment_magnitude", 0, 30),
)


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        between = f"between {low:g} and {high:g}" if high < float("inf") else f"at least {low:g}"
        raise ValueError(f"{name} must be {between}, got {value}")


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError that suggests the nearest names unless ``value`` is one of ``known``."""
    known = list(known)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise ValueError(f"{what} {value!r} is unknown{hint} Known: {', '.join(known)}")


def config_fields() -> tuple[Field, ...]:
    """The fields of TrainConfig, each with ``metadata["help"]`` and ``metadata["choices"]``."""
    return fields(TrainConfig)


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name: str | Path) -> dict[str, Any]:
    """A recipe by name or ``.toml`` file, a dict of :data:`RECIPE_KEYS`, each optional.

    Raises:
        ValueError: an unknown recipe, a file that is not TOML, or keys that mean nothing.
        FileNotFoundError: no such file.
    """
    path = Path(name)
    if path.suffix != ".toml":
        check_choice("recipe", str(name), list_recipes())
        path = RECIPES / f"{name}.toml"
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist; packaged recipes: {', '.join(list_recipes())}")
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe {path} is not valid TOML: {error}") from None
    for key in recipe:
        check_choice(f"key in recipe {path.name}:", key, RECIPE_KEYS)
    for key in recipe.get("train", {}):
        check_choice(f"option in recipe {path.name}:", key, [f.name for f in config_fields()])
    return recipe
