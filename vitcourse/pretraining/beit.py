"""BEiT (Bao et al. 2021): predict the visual words of masked blocks of an image, as BERT does those of a sentence."""

import math
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse.inference import find_mean_std
from vitcourse.layers import init_linear, widened
from vitcourse.train.augment import hash_keys
from vitcourse.train.task import Part
from vitcourse.vit import VisionTransformer
from vitcourse.vit.positions import full_precision

from .diagnostics import code_use
from .objective import Pretrainer, PreTraining, check_plain_vit, patch_tokens
from .options import BeitOptions
from .vq import VQTokenizer

MIN_ASPECT = 0.3  # of a block, and its inverse (algorithm 1)
_MASKS = 102  # the "view" that masks are drawn as; no view of an image has this number


def block_mask(height: int, width: int, count: int, min_block: int, draw: random.Random) -> np.ndarray:
    """A mask (height, width) of rectangular blocks, True where a patch is masked: ``count`` of them, seldom fewer.

    Algorithm 1 of the paper, in the order of the authors' code: an area between ``min_block`` and what is missing, a
    shape between 0.3 and 1/0.3, a place; ten attempts at a block that fits and masks something new, but not too much.

    >>> block_mask(14, 14, 75, 16, random.Random(0)).sum()
    np.int64(75)
    """
    mask = np.zeros((height, width), dtype=bool)
    while (missing := count - int(mask.sum())) > 0:
        for _ in range(10):
            area = draw.uniform(min_block, missing)
            aspect = math.exp(draw.uniform(math.log(MIN_ASPECT), math.log(1 / MIN_ASPECT)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, left = draw.randint(0, height - h), draw.randint(0, width - w)
            block = mask[top : top + h, left : left + w]
            if 0 < h * w - block.sum() <= missing:
                block[:] = True
                break
        else:
            break
    return mask


class MaskedImageModel(Pretrainer):
    """A ViT that sees a learnt token in place of masked patches, and says which codes they have.

    Args:
        encoder: a :class:`vitcourse.VisionTransformer` without a head, such as :class:`vitcourse.pretraining.Beit`.
        vocab_size: codes of the tokenizer.

    Raises:
        ValueError: an encoder that is no plain ViT.

    >>> encoder = VisionTransformer(img_size=28, patch_size=7, in_chans=1, num_classes=0, embed_dim=64, num_heads=4)
    >>> mask = torch.zeros(2, 16, dtype=torch.bool)
    >>> mask[:, :5] = True
    >>> MaskedImageModel(encoder, vocab_size=32)(torch.zeros(2, 1, 28, 28), mask).shape
    torch.Size([10, 32])
    """

    def __init__(self, encoder: VisionTransformer, vocab_size: int = 8192) -> None:
        super().__init__(encoder)
        check_plain_vit(encoder, "masked image modelling")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.head = nn.Linear(encoder.embed_dim, vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head.apply(init_linear)
        self._tokenizer: list[VQTokenizer] = []  # in a list: not a part of what is trained

    @property
    def tokenizer(self) -> VQTokenizer | None:
        return self._tokenizer[0] if self._tokenizer else None

    def adopt_tokenizer(self, tokenizer: VQTokenizer) -> None:
        """Take the codes of ``tokenizer``, which is trained already, as the words to predict.

        Raises:
            ValueError: another number of codes.
        """
        if tokenizer.vocab_size != self.head.out_features:
            raise ValueError(
                f"vocab_size is {self.head.out_features}, and the tokenizer has {tokenizer.vocab_size} codes; make "
                "them agree"
            )
        self._tokenizer[:] = [tokenizer.eval().requires_grad_(False)]

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Logits (M, vocab_size) of the masked patches of images (B, C, H, W), mask (B, N), in reading order."""
        encoder = self.encoder
        tokens = encoder.forward_tokens(*encoder.embed(images, mask, self.mask_token))
        return self.head(patch_tokens(encoder, tokens)[:, encoder.num_prefix_tokens :][mask])


class MaskedImageModelling(PreTraining):
    """The task of a :class:`MaskedImageModel`: cross-entropy of the codes of masked patches, a mean over these.

    Its chance level is log(vocab_size), and the logarithm of ``code_perplexity`` for who knows how frequent codes are.
    """

    name = "beit"
    metrics = ("val_loss", "chance", "code_use", "code_perplexity", "effective_rank", "alignment", "uniformity")
    counts_samples = False
    augments = ("crop_padding", "hflip", "randaugment")

    def __init__(self, options: BeitOptions | None = None) -> None:
        super().__init__(options or BeitOptions())

    def settings(self) -> dict[str, Any]:
        chosen = super().settings()["objective_args"]
        return {"objective_args": {k: v for k, v in chosen.items() if k != "tokenizer"}}

    def setup(self, model, train_set, config, device) -> None:
        if model.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, whose codes are what is predicted; train one with "
                "vitcourse.pretraining.provide_tokenizer, or give model.adopt_tokenizer one"
            )
        self.grid = model.encoder.grid_size
        n = self.grid[0] * self.grid[1]
        self.masked, self.per_sample = int(n * self.options.mask_ratio), n * self.options.mask_ratio
        if self.masked < self.options.min_block:
            raise ValueError(
                f"mask_ratio {self.options.mask_ratio} masks {self.masked} of {n} patches, fewer than min_block "
                f"{self.options.min_block}; use a smaller min_block"
            )
        if min(self.grid) < 2:
            raise ValueError(
                f"the patches lie on a grid of {self.grid}, and no block is smaller than that both ways, so nothing "
                "would be masked; use a smaller patch_size, or the objective mae"
            )
        super().setup(model, train_set, config, device)
        self.tokenizer = model.tokenizer.to(device)
        self._check_same_pixels(train_set, device)
        ids = torch.cat([self.tokenizer.tokenize(view) for view in self.probe.views])
        self.codes = code_use(torch.bincount(ids.flatten(), minlength=self.tokenizer.vocab_size))

    def _check_same_pixels(self, train_set: Dataset, device: torch.device) -> None:
        """Raise ValueError where the tokenizer has learnt from pixels of another mean and std than it is to read."""
        if torch.as_tensor(train_set[0][0]).is_floating_point():
            return
        own, other = self.mean_std, find_mean_std(self.tokenizer, train_set, device)
        if not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(own, other, strict=True)):
            raise ValueError(
                f"the tokenizer was trained on images of mean {other[0].flatten().tolist()}, and the encoder's have "
                f"{own[0].flatten().tolist()} (or another std), so its codes would be wrong; use encoder.preprocess = "
                "tokenizer.preprocess, or train a tokenizer for this encoder"
            )

    def inputs(self, images: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        seeds = hash_keys(self.config.seed, part.epoch, part.index, _MASKS).tolist()
        masks = [
            block_mask(*self.grid, self.masked, self.options.min_block, random.Random(seed)).reshape(-1)
            for seed in seeds
        ]
        return self.cropped(images, part), torch.from_numpy(np.stack(masks)).to(images.device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, mask = batch
        with full_precision(images.device.type):  # rounded pixels would have other words
            words = self.tokenizer.tokenize(images)[mask]
        logits = model(images, mask)
        return F.cross_entropy(widened(logits), words, reduction="sum"), mask.sum()

    def chance(self) -> float:
        return math.log(self.tokenizer.vocab_size)

    def after_epoch(self, model: nn.Module) -> dict[str, float]:
        return {**super().after_epoch(model), **self.codes}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tokenizer": self.tokenizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.tokenizer.load_state_dict(state["tokenizer"])


def make(encoder: VisionTransformer, options: BeitOptions) -> tuple[MaskedImageModel, MaskedImageModelling]:
    return MaskedImageModel(encoder, options.vocab_size), MaskedImageModelling(options)
