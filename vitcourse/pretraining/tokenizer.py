"""The visual tokenizer's training: a task of the engine, and BEiT's first stage."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse.layers import widened
from vitcourse.registry import build_model
from vitcourse.train.classification import check_image
from vitcourse.train.config import TrainConfig
from vitcourse.train.engine import fit
from vitcourse.train.task import Part, check_not_empty
from vitcourse.vit.patches import check_divisible
from vitcourse.weights import unwrap

from .diagnostics import code_use
from .distributed import gathered, world_size
from .objective import PreTraining
from .options import BeitOptions, TokenizerOptions
from .vq import VQTokenizer


class Tokenization(PreTraining):
    """The task of a :class:`VQTokenizer`: squared error of the pixels, and commitment of the vectors to their codes.

    The codebook moves after each step, by what all micro-batches and processes have assigned to it.
    """

    name = "tokenizer"
    metrics = ("val_loss", "chance", "code_use", "code_perplexity", "revived")
    augments = ("crop_padding", "hflip", "randaugment")

    def __init__(self, options: TokenizerOptions | None = None) -> None:
        super().__init__(options or TokenizerOptions())

    def settings(self) -> dict[str, Any]:
        mine = {f.name for f in fields(TokenizerOptions)}
        return {"objective_args": {k: v for k, v in super().settings()["objective_args"].items() if k in mine}}

    def product(self, model: nn.Module) -> nn.Module:
        return model

    def check_data(self, model, train_set, val_set, config) -> None:
        for dataset, name in ((train_set, "train_set"), (val_set, "val_set")):
            if dataset is not None:
                check_not_empty(dataset, name)
                check_image(dataset[0][0], unwrap(model), name)
                check_divisible(dataset[0][0].shape[-2:], unwrap(model).patch_size)

    def setup(self, model, train_set, config, device) -> None:
        self.prepare_images(model, train_set, config, device)
        codes = model.codebook.codes
        self.counts, self.sums = torch.zeros_like(codes[:, 0]), torch.zeros_like(codes)
        self.vectors: list[Tensor] = []
        self.revived, self.steps_per_epoch = 0, max(1, len(train_set) // config.batch_size)
        # Whoever paints every image as the mean of all pixels.
        self.chance_level = self.probe.views[0].var().item()

    def state_dict(self) -> dict[str, Any]:
        return {"revived": self.revived}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.revived = state["revived"]

    def inputs(self, images: Tensor, part: Part) -> Tensor:
        return self.cropped(images, part)

    def loss(self, model: nn.Module, images: Tensor) -> tuple[Tensor, int]:
        painted, z, ids = model(images)
        tokenizer = unwrap(model)
        if model.training:
            self._assign(widened(z.detach().flatten(0, 2)), ids.flatten())
        error = (widened(painted) - images).square().mean(dim=(1, 2, 3))
        away = (widened(z) - tokenizer.codebook.codes[ids]).square().mean(dim=(1, 2, 3))
        return (error + self.options.commitment * away).sum(), len(images)

    def _assign(self, vectors: Tensor, ids: Tensor) -> None:
        self.counts += torch.bincount(ids, minlength=len(self.counts))
        self.sums.index_add_(0, ids, vectors)
        self.vectors.append(vectors)

    def after_step(self, model: nn.Module, step: int, total: int) -> None:
        vectors = torch.cat(self.vectors)
        if world_size() > 1:
            dist.all_reduce(self.counts)
            dist.all_reduce(self.sums)
            vectors = gathered(vectors)
        generator = self.generator(Part(0, step, 0, 0, torch.empty(0)), torch.device("cpu"))
        self.revived += model.codebook.update(self.counts, self.sums, vectors, generator)
        self.counts.zero_(), self.sums.zero_(), self.vectors.clear()

    def chance(self) -> float:
        return self.chance_level

    def after_epoch(self, model: nn.Module) -> dict[str, float]:
        """Codes that were used in the last epoch, as how many they count, and how many were revived in it."""
        book, revived = model.codebook, self.revived
        self.revived = 0
        used = (book.idle < self.steps_per_epoch).float().mean().item()
        shares = {**code_use(book.counts), "code_use": used}
        return {"chance": self.chance(), **shares, "revived": revived}


def tokenizer_for(encoder: nn.Module, options: TokenizerOptions) -> VQTokenizer:
    """A tokenizer, untrained, with the patches and channels of an encoder."""
    sizes = {name: getattr(options, name) for name in ("vocab_size", "code_dim", "decay", "revive_after")}
    tokenizer = build_model(
        "vq_tokenizer",
        {
            "patch_size": encoder.patch_size,
            "in_chans": encoder.in_chans,
            "embed_dim": options.tokenizer_dim,
            "depth": options.tokenizer_depth,
            **sizes,
        },
    )
    tokenizer.preprocess = getattr(encoder, "preprocess", None)  # it is to see the same pixels
    return tokenizer


def load_tokenizer(path: str | Path, encoder: nn.Module) -> VQTokenizer:
    """The tokenizer of a file, if it fits an encoder.

    Raises:
        ValueError: the file holds something else, or a tokenizer of other patches or channels.
    """
    from vitcourse import create_model

    tokenizer = create_model(path)
    if not isinstance(tokenizer, VQTokenizer):
        raise ValueError(f"tokenizer {path} holds a {type(tokenizer).__name__}; give one that BEiT's training has left")
    for name in ("patch_size", "in_chans"):
        if getattr(tokenizer, name) != getattr(encoder, name):
            raise ValueError(
                f"tokenizer {path} has {name} {getattr(tokenizer, name)}, and the encoder {getattr(encoder, name)}; "
                "they must agree"
            )
    return tokenizer


def provide_tokenizer(
    model: nn.Module,
    options: BeitOptions,
    train_set: Dataset,
    config: TrainConfig,
    folder: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
) -> None:
    """Give BEiT's ``model`` the tokenizer of ``options.tokenizer``, or train one on ``train_set``.

    A run that is continued takes up, or finds finished, the tokenizer in its ``folder``.
    """
    if options.tokenizer:
        model.adopt_tokenizer(load_tokenizer(options.tokenizer, model.encoder))
        return
    tokenizer = tokenizer_for(model.encoder, options)
    again = resume and folder is not None and (Path(folder) / "last.pt").exists()
    plan = replace(config, epochs=options.tokenizer_epochs, ema=0.0, clip_grad=1.0)
    fit(tokenizer, train_set, None, plan, task=Tokenization(options), out_dir=folder, resume=again, progress=not quiet)
    model.adopt_tokenizer(tokenizer)
