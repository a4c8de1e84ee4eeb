"""What all objectives share: an encoder with what is trained beside it, and a task of the engine around the two."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from vitcourse.inference import MeanStd, evaluating, find_mean_std
from vitcourse.train.augment import augment, seed_of
from vitcourse.train.batches import Share, eval_batches
from vitcourse.train.classification import check_image
from vitcourse.train.config import TrainConfig
from vitcourse.train.task import Part, Reduce, Task, check_not_empty
from vitcourse.vit import VisionTransformer
from vitcourse.weights import unwrap

from .diagnostics import Probe, probe_of
from .options import Options
from .views import View

EVALUATION = -1  # the epoch of views and masks that are drawn for an evaluation: the same in every one
WATCHED = ("first", "last", "falls", "told")  # what a probe remembers
LOOKS_PER_EPOCH = 10  # at the encoder's features, for signs of a collapse …
FEWEST_STEPS = 10  # … but not more often than this: batch norms must have learnt their statistics


class Pretrainer(nn.Module):
    """An encoder and the parts that are trained with it and thrown away afterwards: a decoder, a projector, a head.

    Args:
        encoder: a model without a head, images (B, C, H, W) to features (B, D).

    Raises:
        ValueError: the encoder has a head, which no objective would train.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        if getattr(encoder, "num_classes", 0):
            raise ValueError(
                f"encoder has a head of {encoder.num_classes} classes, which pre-training does not train; build it "
                "with num_classes=0, or call encoder.reset_classifier(0)"
            )
        self.encoder = encoder

    @property
    def preprocess(self) -> Any:
        """How the encoder's images are prepared."""
        return getattr(self.encoder, "preprocess", None)

    @preprocess.setter
    def preprocess(self, value: Any) -> None:
        self.encoder.preprocess = value

    def watched(self, images: Tensor) -> dict[str, Tensor]:
        """What may collapse, (B, D) each, of images (B, C, H, W); see :class:`.diagnostics.Probe`."""
        return {"features": self.encoder(images).flatten(1)}

    def healthy_spread(self, name: str) -> float | None:
        """How far from their mean what is watched by this name should lie; None: as far as before the training."""
        return None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if not hasattr(self.encoder, "set_grad_checkpointing"):
            raise ValueError(
                f"{type(self.encoder).__name__} has no set_grad_checkpointing; leave out grad_checkpointing"
            )
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        named = self.encoder.no_weight_decay() if hasattr(self.encoder, "no_weight_decay") else ()
        return {"mask_token", *named}


def check_plain_vit(encoder: nn.Module, what: str) -> None:
    """Raise ValueError unless ``encoder`` is a ViT each of whose tokens has seen one patch of the image only."""
    if not isinstance(encoder, VisionTransformer):
        raise ValueError(
            f"encoder is a {type(encoder).__name__}, and {what} hides patches, which only a plain ViT leaves out; use "
            "a VisionTransformer, such as vit_tiny, or the objectives moco and lejepa, which take any model"
        )
    if any(side % p for side, p in zip(encoder.img_size, encoder.patch_size, strict=True)):
        raise ValueError(
            f"img_size {encoder.img_size[0]} is not divisible by patch_size {encoder.patch_size[0]}, and {what} has no "
            "patches that are half outside of the image; build the encoder for images that its patches divide"
        )
    if next(encoder.parameters()).is_meta:
        return
    side = [2 * p for p in encoder.patch_size]
    with torch.no_grad(), evaluating(encoder):
        black = torch.zeros(1, encoder.in_chans, *side).to(next(encoder.parameters()))
        other = black.clone()
        other[..., : encoder.patch_size[0], : encoder.patch_size[1]] = 1
        changed = (encoder.patch_embed(other) - encoder.patch_embed(black)).abs().amax(1).flatten()
    if changed[1:].any():
        raise ValueError(
            f"encoder's {type(encoder.patch_embed).__name__} lets patches see their neighbours, so the pixels that "
            f"{what} hides would show; use embed_layer=vitcourse.vit.PatchEmbed"
        )


def patch_tokens(encoder: VisionTransformer, tokens: Tensor) -> Tensor:
    """The norm that a ViT with mean pooling keeps for the pooled vector, on tokens (B, N, D): all of it is trained."""
    return encoder.fc_norm(tokens)


def dim_of(encoder: nn.Module) -> int:
    """The width D of an encoder's features (B, D).

    Raises:
        ValueError: the encoder does not tell.
    """
    if isinstance(encoder, VisionTransformer):
        return encoder.embed_dim
    info = getattr(encoder, "feature_info", None)
    if not info:
        raise ValueError(
            f"encoder is a {type(encoder).__name__}, which does not tell how wide its features are; use a model of "
            "vitcourse.list_models(), or give it feature_info = [{'num_chs': width, 'reduction': stride}]"
        )
    return info[-1]["num_chs"]


class PreTraining(Task):
    """A task without labels around a :class:`Pretrainer`: derive from it, and say what the loss is.

    Each evaluation, and each ``LOOKS_PER_EPOCH``-th of an epoch, looks at the encoder's features of some training
    images: their effective rank, alignment and uniformity join the epoch's row, and a collapse is named on stderr.

    Args:
        options: those of the objective.
    """

    takes_pairs = True
    counts_samples = True
    metrics: tuple[str, ...] = ("val_loss", "chance", "effective_rank", "alignment", "uniformity")
    smallest_batch: ClassVar[int] = 1

    mean_std: MeanStd | None = None
    config: TrainConfig
    probe: Probe

    def __init__(self, options: Options) -> None:
        self.options = options

    def settings(self) -> dict[str, Any]:
        return {"objective_args": asdict(self.options)}

    def product(self, model: nn.Module) -> nn.Module:
        return unwrap(model).encoder

    def check_data(self, model: nn.Module, train_set: Dataset, val_set: Dataset | None, config: TrainConfig) -> None:
        pretrainer = unwrap(model)
        if not isinstance(pretrainer, Pretrainer):
            raise ValueError(
                f"task {self.name!r} trains a Pretrainer, and model is a {type(pretrainer).__name__}; make both by "
                f"vitcourse.pretraining.make_objective({self.name!r}, encoder)"
            )
        for dataset, name in ((train_set, "train_set"), (val_set, "val_set")):
            if dataset is not None:
                check_not_empty(dataset, name)
                check_image(dataset[0][0], pretrainer.encoder, name)
        sizes = (config.batch_size, *(() if config.drop_last else (len(train_set) % config.batch_size,)))
        small = [size for size in sizes if 0 < size < self.smallest_batch]
        if small:
            raise ValueError(
                f"a batch of {small[0]} has nothing to compare with, and task {self.name!r} needs {self.smallest_batch}"
                " at least (the loss would be 0, or no number, whatever the model does); use a larger --batch-size, "
                "and --drop-last"
            )

    def setup(self, model: nn.Module, train_set: Dataset, config: TrainConfig, device: torch.device) -> None:
        self.prepare_images(model, train_set, config, device)
        self.probe.watch(model, 0)
        self.looks_every = max(FEWEST_STEPS, len(train_set) // config.batch_size // LOOKS_PER_EPOCH)

    def prepare_images(self, model: nn.Module, train_set: Dataset, config: TrainConfig, device: torch.device) -> None:
        self.config, self.mean_std = config, find_mean_std(model, train_set, device)
        self.probe = probe_of(train_set, self.mean_std, config.seed, device)

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(getattr(self.probe, name)) for name in WATCHED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in WATCHED:
            setattr(self.probe, name, state[name])

    # -------------------------------------------------------------------------------------------------- in each step

    def prepare(self, batch: tuple[Tensor, Tensor], part: Part | None) -> Any:
        part = part or Part(EVALUATION, 0, 0, len(batch[0]), torch.arange(len(batch[0])))
        return self.inputs(batch[0], part)

    def inputs(self, images: Tensor, part: Part) -> Any:
        """What ``loss`` takes, of images (B, C, H, W) as the data set has them."""
        raise NotImplementedError

    def cropped(self, images: Tensor, part: Part) -> Tensor:
        """One view (B, C, H, W), normalised: the config's crops and flips, and the objective's random crop."""
        is_training = part.epoch != EVALUATION
        if is_training:
            images = augment(images, part.index, part.epoch, self.config)
        view = View(min_crop=self.options.min_crop) if is_training else View()
        return self.laid_out(
            view(images, self.mean_std, seed=self.config.seed, epoch=part.epoch, index=part.index, view=0)
        )

    def laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def generator(self, part: Part, device: torch.device) -> torch.Generator:
        """For what is drawn once for a whole step, alike in all processes."""
        return torch.Generator(device).manual_seed(seed_of(self.config.seed, part.epoch, part.step))

    def after_step(self, model: nn.Module, step: int, total: int) -> None:
        if (step + 1) % self.looks_every == 0:
            self.probe.watch(model, step + 1)

    # ------------------------------------------------------------------------------------------------ after an epoch

    def chance(self) -> float | None:
        """The loss of who has learnt nothing, by the objective's own formula."""
        return None

    def after_epoch(self, model: nn.Module) -> dict[str, float]:
        return {"chance": self.chance(), **self.probe.measure(model.encoder)}

    def evaluate(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: TrainConfig | None = None,
        *,
        share: Share | None = None,
        reduce: Reduce = lambda total: total,
    ) -> dict[str, float | None]:
        """``val_loss``, of views and masks that are the same in every evaluation, and for any number of processes.

        Where samples of a batch are compared, batches are of the training's size, and a smaller last one is left out;
        ``val_loss`` is None where no batch is left.
        """
        with evaluating(self.own_modules()):
            return super().evaluate(model, dataset, config or self.config, share=share, reduce=reduce)

    def own_modules(self) -> nn.Module:
        """The task's own modules, to be put in evaluation mode with the model."""
        return nn.ModuleList()

    def batches(self, dataset: Dataset, share: Share, config: TrainConfig, device: torch.device) -> Iterator[Any]:
        size = min(config.batch_size if self.couples_batch else config.eval_batch_size, len(dataset))
        chunks = [c for c in torch.arange(len(dataset)).split(size) if len(c) == size or not self.couples_batch]
        mine = [c for c in chunks if len(c) >= self.smallest_batch][share.rank :: share.world]
        if not mine:
            return
        part = Subset(dataset, torch.cat(mine).tolist())
        held = eval_batches(part, Share(), replace(config, eval_batch_size=size), device, self)
        for number, (index, (images, _)) in enumerate(zip(mine, held, strict=True)):
            step = share.rank + number * share.world
            yield self.inputs(images, Part(EVALUATION, step, 0, size, index))
