"""Visual prompt tuning (Jia et al. 2022): a frozen ViT is given a few learnt tokens to look at."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcourse.layers import to_pair


def prompt_bound(patch_size: int | tuple[int, int], dim: int, in_chans: int = 3) -> float:
    """Prompts start uniform in ± this, as the authors' code has it: Xavier's bound of a patch embedding, √(6 / (C p² +
    D)) (Glorot and Bengio 2010, eq. 16).

    >>> round(prompt_bound(16, 768), 4)
    0.0625
    """
    p, q = to_pair(patch_size, "patch_size")
    return math.sqrt(6 / (in_chans * p * q + dim))


class Prompts(nn.Module):
    """Learnt tokens among those of a ViT: between [CLS] and the patches, without positions (sec. 3.2).

    Shallow prompts enter before the first block and pass through all of them. Deep ones are new in every block, and
    what the block has made of them is left out. None of them reaches the final norm.

    The model's own ``forward`` stays what it is: :meth:`attach` hooks into its ``blocks`` and its ``norm``, in ViTs of
    ours and of timm's alike. Masks and grids that a block is given are widened with it.

    Args:
        depth: 1 for shallow prompts, otherwise the number of blocks.
        count: prompts p.
        dim: width D of a token.
        prefix: tokens before the prompts ([CLS], registers).
        bound: they start uniform in ± this; see :func:`prompt_bound`.
        dropout: of entries of the prompts in training.

    >>> prompts = Prompts(depth=1, count=2, dim=4, prefix=1, bound=0.1)
    >>> x = torch.arange(3.0).view(1, 3, 1).expand(1, 3, 4)  # [CLS] and two patches
    >>> with_prompts = prompts.insert(x, prompts.tokens[0])
    >>> with_prompts[0, [0, 3, 4], 0].tolist(), torch.equal(prompts.remove(with_prompts), x)
    ([0.0, 1.0, 2.0], True)
    """

    def __init__(self, depth: int, count: int, dim: int, prefix: int, bound: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.prefix = prefix
        self.tokens = nn.Parameter(torch.empty(depth, count, dim).uniform_(-bound, bound))
        self.dropout = dropout

    @property
    def count(self) -> int:
        return self.tokens.shape[1]

    def insert(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, prefix + N, D), (p, D) -> (B, prefix + p + N, D)"""
        tokens = F.dropout(tokens, self.dropout, self.training).to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, : self.prefix], tokens, x[:, self.prefix :]], dim=1)

    def remove(self, x: Tensor) -> Tensor:
        """(B, prefix + p + N, D) -> (B, prefix + N, D)"""
        return torch.cat([x[:, : self.prefix], x[:, self.prefix + self.count :]], dim=1)

    # ------------------------------------------------------------------------------------------- hooks on the model

    def attach(self, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        """Take part in a model's forward; a copy of the model has hooks that lead to its own copy of the prompts."""
        for i, block in enumerate(blocks):
            hook = _BeforeBlock(self, i)
            block.register_forward_pre_hook(hook, with_kwargs=True)
        norm.register_forward_pre_hook(_BeforeNorm(self))


class _BeforeBlock:
    """Called with what a block is called with, which it changes: tokens, grid, mask."""

    def __init__(self, prompts: Prompts, index: int) -> None:
        self.prompts, self.index = prompts, index

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        prompts = self.prompts
        if kwargs.get("merging") is not None:
            raise ValueError("prompts are no patches, so tokens cannot merge beside them; take prompts or merging")
        x, *others = args
        if self.index == 0:
            x = prompts.insert(x, prompts.tokens[0])
        elif self.index < len(prompts.tokens):
            x = prompts.insert(prompts.remove(x), prompts.tokens[self.index])
        others = [self._widened(other, x.shape[1]) for other in others]
        return (x, *others), {name: self._widened(value, x.shape[1]) for name, value in kwargs.items()}

    def _widened(self, value: Any, length: int) -> Any:
        """A grid has more tokens before its patches, a mask lets everybody see the prompts; all else stays."""
        prefix, count = self.prompts.prefix, self.prompts.count
        if isinstance(value, tuple) and len(value) == 3:
            return (*value[:2], value[2] + count)
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            for axis in (-1, -2):
                if value.ndim >= -axis and value.shape[axis] == length - count:
                    seen = value.new_ones(()).expand(
                        *(count if i == value.ndim + axis else n for i, n in enumerate(value.shape))
                    )
                    before, after = value.split([prefix, length - count - prefix], dim=axis)
                    value = torch.cat([before, seen, after], dim=axis)
        return value


class _BeforeNorm:
    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts

    def __call__(self, norm: nn.Module, args: tuple) -> tuple:
        return (self.prompts.remove(args[0]), *args[1:])


def add_prompts(model: nn.Module, count: int = 10, deep: bool = False, dropout: float = 0.0) -> nn.Module:
    """Give a ViT prompts, in place, as its part ``prompts``; returns ``model``.

    Nothing is frozen by it; :func:`vitcourse.finetuning.finetune` does that.

    Args:
        model: a ViT of this library or of timm.
        count: prompts, the authors tried 1 to 200.
        deep: new prompts for each block (VPT-deep), or one set that passes through all (VPT-shallow).
        dropout: of entries of the prompts in training.

    Raises:
        ValueError: a model with no such blocks, or with prompts already; a count below 1; a dropout beyond 0 to 1.

    >>> from vitcourse import create_model
    >>> model = add_prompts(create_model("vit_tiny", img_size=32, patch_size=16, depth=2, num_classes=5), 4, deep=True)
    >>> model.prompts.tokens.shape, model(torch.zeros(1, 3, 32, 32)).shape
    (torch.Size([2, 4, 192]), torch.Size([1, 5]))
    """
    if not (isinstance(count, int) and count >= 1):
        raise ValueError(f"tokens must be a whole number of at least 1, got {count!r}; the authors take 5 to 100")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    _check_vit(model)
    patch = getattr(model, "patch_size", None) or model.patch_embed.patch_size
    like = next(model.blocks.parameters())
    dim, prefix = model.embed_dim, model.num_prefix_tokens
    channels = getattr(model, "in_chans", None) or getattr(model, "in_channels", 3)
    bound = prompt_bound(patch, dim, channels)
    prompts = Prompts(len(model.blocks) if deep else 1, count, dim, prefix, bound, dropout)
    model.prompts = prompts.to(device=like.device, dtype=like.dtype)
    model.prompts.attach(model.blocks, model.norm)
    return model


def _check_vit(model: nn.Module) -> None:
    if isinstance(getattr(model, "prompts", None), Prompts):
        raise ValueError(f"{type(model).__name__} has prompts already; take a fresh model")
    needs = ("blocks", "norm", "patch_embed", "embed_dim", "num_prefix_tokens")
    missing = [name for name in needs if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"prompts need tokens that pass through blocks, and {type(model).__name__} has no {', '.join(missing)}: "
            "take a ViT of this library or of timm, or another method: lora, bitfit, linear"
        )
    theirs = [f"{kind.__module__}.{kind.__name__}" for kind in type(model).__mro__]
    if theirs[0].startswith("timm.") and "timm.models.vision_transformer.VisionTransformer" not in theirs:
        raise ValueError(
            f"prompts have no place among the patches of timm's {type(model).__name__}, whose attention counts them: "
            "take a plain ViT of timm's, this library's beit, or another method: lora, bitfit, linear"
        )
