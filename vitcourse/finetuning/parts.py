"""The parts of a model from shallow to deep, and how they are named: what is frozen, thawed and slowed down by name."""

import fnmatch
import re
from collections.abc import Collection, Iterable

from torch import nn

from vitcourse.inference import is_frozen_norm
from vitcourse.registry import in_head, is_within, nearest

STEMS = {"patch_embed", "stem", "cls_token", "reg_token", "pos_embed", "norm_pre", "time_embed", "time_cls_token"}
_RANGE = re.compile(r"(.*\.)(\d+)-(\d+)(\..*)?")

Parts = dict[str, list[str]]


def parts_of(model: nn.Module) -> Parts:
    """The model's parts from shallow to deep, each with the names of its parameters.

    The stem, with the tokens and positions that are added to it, is ``"patch_embed"`` (CoAtNet's: ``"stem"``); then
    come the blocks under their own names (Swin's ``"layers.1.blocks.0"``, the ``"layers.1.downsample"`` before it
    included), the final ``"norm"``, and ``"head"``. Models of ours and of timm's have such names.

    >>> from vitcourse import create_model
    >>> parts = parts_of(create_model("vit_tiny", img_size=32, patch_size=16, depth=2, num_classes=5))
    >>> list(parts)
    ['patch_embed', 'blocks.0', 'blocks.1', 'norm', 'head']
    >>> parts["patch_embed"]
    ['cls_token', 'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias']
    """
    stem = "stem" if hasattr(model, "stem") else "patch_embed"
    parts: Parts = {stem: [], "prompts": []}
    head: list[str] = []
    for name, _ in model.named_parameters():
        if in_head(model, name):
            head.append(name)
        else:
            first = name.partition(".")[0]
            parts.setdefault(stem if first in STEMS else _block_of(model, name), []).append(name)
    return {part: names for part, names in {**parts, "head": head}.items() if names}


def _block_of(model: nn.Module, name: str) -> str:
    """``layers.1.blocks.0`` of ``layers.1.blocks.0.mlp.fc1.weight``: numbers are followed for as long as they come.

    A numbered module that has numbered ``blocks`` itself is a stage, whose other children are parts of their own.
    """
    path, end = name.split("."), 1
    while end < len(path) and path[end].isdecimal():
        end += 1
        if end + 1 < len(path) and hasattr(model.get_submodule(".".join(path[:end])), "blocks"):
            end += 1
    return ".".join(path[:end])


def select(model: nn.Module, patterns: Iterable[str], what: str = "train") -> set[str]:
    """Names of the parameters that the patterns mean.

    Args:
        model: has the parameters.
        patterns: names of parts (:func:`parts_of`), of modules or of parameters; ``"blocks.6-11"`` for several that
            are numbered; ``*`` as in a shell, over dots too: ``"blocks.*.norm?"``; ``"*"`` for all.
        what: the argument that an error names.

    Raises:
        ValueError: a pattern, or a number of a range, that names nothing, with the nearest parts.

    >>> from vitcourse import create_model
    >>> model = create_model("vit_tiny", img_size=32, patch_size=16, depth=3, num_classes=5)
    >>> sorted(select(model, ["head", "blocks.1-2"]))[:2], len(select(model, ["*.bias"]))
    (['blocks.1.attn.proj.bias', 'blocks.1.attn.proj.weight'], 21)
    """
    if isinstance(patterns, str):
        raise ValueError(f"{what}={patterns!r} must be a list of patterns; write [{patterns!r}]")
    parts, names = parts_of(model), [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        for one in _spread(pattern):
            chosen = set(parts.get(one, ())) or {n for n in names if is_within(n, one) or fnmatch.fnmatchcase(n, one)}
            if not chosen:
                told = f"{pattern!r}" + (f" ({one!r})" if one != pattern else "")
                raise ValueError(
                    f"{what}: {told} names nothing in {type(model).__name__}{nearest(one, parts)}; it has "
                    f"{', '.join(_short(list(parts)))}"
                )
            found |= chosen
    return found


def _spread(pattern: str) -> list[str]:
    """``blocks.6-8`` as ``blocks.6``, ``blocks.7``, ``blocks.8``."""
    whole = _RANGE.fullmatch(pattern)
    if whole is None:
        return [pattern]
    prefix, first, last, suffix = whole[1], int(whole[2]), int(whole[3]), whole[4] or ""
    if last < first:
        raise ValueError(f"pattern {pattern!r} counts down; write {prefix}{last}-{first}{suffix}")
    return [f"{prefix}{i}{suffix}" for i in range(first, last + 1)]


def _short(parts: list[str]) -> list[str]:
    return parts if len(parts) <= 8 else [*parts[:4], "…", *parts[-3:]]


def free_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def hold(model: nn.Module, trained: Collection[str], by: str, body_too: bool = False) -> None:
    """Freeze all but what is ``trained``, until :func:`release`; what was frozen before stays so.

    Batch norms without a parameter that moves are put in evaluation mode, and by ``body_too`` all modules without one.
    """
    frozen, silent = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in trained:
            parameter.requires_grad_(False)
            frozen.append(name)
    for name, module in model.named_modules():
        moves = any(parameter.requires_grad for parameter in module.parameters())
        if module.training and (is_frozen_norm(module) or (body_too and not moves)):
            module.training = False
            silent.append(name)
    model.held = {**getattr(model, "held", {}), by: {"parameters": frozen, "modules": silent}}


def release(model: nn.Module, by: str) -> None:
    """Undo :func:`hold`: what it has frozen is free again, and what it has silenced trains where the model does."""
    held = getattr(model, "held", {}).pop(by, {"parameters": (), "modules": ()})
    for name, parameter in model.named_parameters():
        if name in held["parameters"]:
            parameter.requires_grad_(True)
    for name, module in model.named_modules():
        if name in held["modules"]:
            module.training = model.training


def layers_of(model: nn.Module) -> dict[str, int]:
    """Number of the layer that each parameter belongs to, from 0 at the stem to the head: what learning-rate decay goes
    by. A block is a layer; what shrinks the map goes with the block after it, the final norm with the last block, and
    what comes after pooling with the head, as in timm (``group_matcher``).

    >>> from vitcourse import create_model
    >>> layers = layers_of(create_model("vit_tiny", img_size=32, patch_size=16, depth=2, num_classes=5))
    >>> [layers[name] for name in ("pos_embed", "blocks.0.norm1.bias", "blocks.1.norm1.bias", "norm.bias", "head.bias")]
    [0, 1, 2, 2, 3]
    """
    numbers: dict[str, int] = {}
    number, joined = -1, False
    for part, names in parts_of(model).items():
        after_pooling = part in ("fc_norm", "pre_logits")
        if not (joined or part in ("norm", "time_norm", "prompts") or (after_pooling and "head" in parts_of(model))):
            number += 1
        joined = part.endswith("downsample")
        numbers |= dict.fromkeys(names, number + after_pooling)
    return numbers
