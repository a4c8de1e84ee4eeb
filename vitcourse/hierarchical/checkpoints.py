"""Checkpoints of other libraries, in the names and windows of ours. timm's have the names already."""

import re
from collections.abc import Callable, Collection, Mapping
from math import isqrt
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitcourse.hierarchical.windows import Pair
from vitcourse.vit.positions import grid_of_checkpoint

_TABLE = ".relative_position_bias_table"
_OFFSETS = ".relative_coords_table"
DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")  # made from sizes, not learnt


def checkpoint_names(names: Collection[str]) -> Callable[[str], str]:
    """How to call what a checkpoint with these names has: torchvision's and the authors' names become timm's."""
    if "features.0.0.weight" in names:
        return _from_torchvision
    return _from_authors if "layers.0.downsample.reduction.weight" in names else str


def facts_in(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Pair]:
    """What tensors tell that are not learnt: each attention's ``pretrained_window_size``, which its offsets are of.

    Args:
        state: a checkpoint's tensors by name.
        model: the facts are by its names.
    """
    rename = checkpoint_names(state)
    offsets = {rename(name): tensor for name, tensor in state.items() if name.endswith(_OFFSETS)}
    mixers = [name for name, module in model.named_modules() if hasattr(module, "pretrained_window_size")]
    return {
        f"{name}.pretrained_window_size": _pretrained_window(offsets[name + _OFFSETS])
        for name in mixers
        if name + _OFFSETS in offsets
    }


def adapt_checkpoint(
    state: Mapping[str, Tensor], model: nn.Module, facts: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Rename what others call otherwise, and fit position biases to the windows.

    Args:
        state: the checkpoint's tensors by name.
        model: whose names and windows are wanted.
        facts: what else is known of it, by this model's names: each attention's ``window_size``.

    Raises:
        ValueError: a table could be that of several windows.
    """
    facts = {} if facts is None else facts
    rename = checkpoint_names(state)
    state = {rename(name): tensor for name, tensor in state.items()}
    for name, module in model.named_modules():
        table = state.get(name + _TABLE)
        if table is not None and hasattr(module, "window_size"):
            own, theirs = (_offsets(w) for w in (module.window_size, facts.get(f"{name}.window_size")))
            if theirs is None:
                theirs = grid_of_checkpoint(len(table), own, None, name + _TABLE)
            if theirs is not None:
                state[name + _TABLE] = resize_bias_table(table, module.window_size, theirs)
    state = {name: tensor for name, tensor in state.items() if not name.endswith(DERIVED)}
    return _split_biases(state, model) if rename is _from_torchvision else state


def pretrained_window(facts: Mapping[str, Any], name: str) -> Pair | None:
    """The window that an attention of Swin V2 counted offsets in when it was trained, if that is known."""
    told = facts.get(f"{name}.pretrained_window_size")
    return told if told and all(told) else facts.get(f"{name}.window_size")


def _pretrained_window(offsets: Tensor) -> Pair:
    """Read off a table (1, 2w − 1, 2w' − 1, 2), whose last offset is log₈(1 + 8 (w − 1) / (p − 1)) (Liu et al., eq. 4).

    >>> from vitcourse.hierarchical.swin_v2 import log_spaced_offsets
    >>> _pretrained_window(log_spaced_offsets((4, 6), (12, 8)).view(1, 7, 11, 2))
    (12, 8)
    """
    farthest = (8 ** offsets[0, -1, -1].cpu().double() - 1) / 8  # not every device has float64
    spans = [(n + 1) // 2 - 1 for n in offsets.shape[1:3]]
    return tuple(round(span / far) + 1 if far > 0 else 1 for span, far in zip(spans, farthest.tolist(), strict=True))


def _offsets(window: Pair | None) -> Pair | None:
    """Distances along each axis of a window."""
    return None if window is None else (2 * window[0] - 1, 2 * window[1] - 1)


def resize_bias_table(table: Tensor, window_size: Pair, offsets: Pair | None = None) -> Tensor:
    """A table of relative position biases for windows of another size.

    A smaller window keeps the distances that still occur in it. For a larger one the table is stretched by bicubic
    interpolation, as the authors do for higher resolutions.

    Args:
        table: ((2w − 1) · (2v − 1), H).
        window_size: (height, width) wanted.
        offsets: (2w − 1, 2v − 1); where None, the window was square.

    Returns:
        ((2p − 1) · (2q − 1), H); the table itself where it has this size already.

    Raises:
        ValueError: the table has another length than ``offsets`` say, or that of no square window.
    """
    rows, columns = _offsets(window_size)
    high, wide = offsets or (isqrt(len(table)),) * 2
    if high * wide != len(table):
        told = f"offsets {tuple(offsets)} make {high * wide}" if offsets else "that is no square; say its offsets"
        raise ValueError(f"table has {len(table)} rows, but {told}")
    if (high, wide) == (rows, columns):
        return table
    grid = rearrange(table, "(y x) h -> 1 h y x", y=high)
    stretched = (max(rows, high), max(columns, wide))
    if stretched != (high, wide):
        grid = F.interpolate(grid.float(), stretched, mode="bicubic").to(table.dtype)
    top, left = (stretched[0] - rows) // 2, (stretched[1] - columns) // 2
    return rearrange(grid[..., top : top + rows, left : left + columns], "1 h y x -> (y x) h")


def _from_torchvision(name: str) -> str:
    """``features`` holds the patch embedding, then stages and mergings in turn."""
    name = name.replace("features.0.0.", "patch_embed.proj.").replace("features.0.2.", "patch_embed.norm.")
    name = name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
    name = name.replace(".mlp.1.", ".mlp.act.").replace("head.", "head.fc.")
    part = re.match(r"features\.(\d+)\.", name)
    if part is None:
        return name
    number, rest = int(part[1]), name[part.end() :]
    return f"layers.{number // 2}.blocks.{rest}" if number % 2 else f"layers.{number // 2}.downsample.{rest}"


def _from_authors(name: str) -> str:
    """The authors merge patches at the end of a stage; here the next one begins with it."""
    name = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
    return name.replace("head.", "head.fc.")


def _split_biases(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """torchvision's Swin V2 keeps one bias for queries, keys and values, and sets that of the keys to zero."""
    own = {name for name, _ in model.named_parameters()}
    for name in [name for name in state if name.endswith(".attn.qkv.bias") and name not in own]:
        query, _, value = state.pop(name).chunk(3)
        state[name.replace("qkv.bias", "q_bias")], state[name.replace("qkv.bias", "v_bias")] = query, value
    return state
