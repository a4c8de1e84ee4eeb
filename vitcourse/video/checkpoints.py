"""Checkpoints of Video Swin and of Swin for images, in the names and windows of our Video Swin."""

import re
from collections.abc import Callable, Collection, Mapping
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitcourse.hierarchical import resize_bias_table
from vitcourse.hierarchical.checkpoints import DERIVED, checkpoint_names
from vitcourse.video.tubelets import inflate_weight
from vitcourse.video.windows import Triple

_TABLE = ".relative_position_bias_table"
_PATCHES = "patch_embed.proj.weight"


def swin_names(names: Collection[str]) -> Callable[[str], str]:
    """How to call what a checkpoint with these names has: torchvision's and the authors' names, of clips or images."""
    if "features.0.0.attn.qkv.weight" in names:
        return _from_torchvision
    of_images = checkpoint_names(names)
    return lambda name: of_images(name.replace("cls_head.fc_cls.", "head."))


def _from_torchvision(name: str) -> str:
    """``features`` holds stages and mergings in turn; that of the image model begins with the patch embedding."""
    name = name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.").replace(".mlp.1.", ".mlp.act.")
    name = name.replace("head.", "head.fc.")
    part = re.match(r"features\.(\d+)\.", name)
    if part is None:
        return name
    number, rest = int(part[1]), name[part.end() :]
    return f"layers.{(number + 1) // 2}.{'downsample' if number % 2 else 'blocks'}.{rest}"


def adapt_swin(
    state: Mapping[str, Tensor], model: nn.Module, facts: Mapping[str, Any]
) -> tuple[dict[str, Tensor], bool]:
    """Rename, fit position biases to the windows, inflate filters; and whether it was an image model's checkpoint.

    Args:
        state: the checkpoint's tensors by name.
        model: whose names, windows and tubelets are wanted.
        facts: what else is known of it, by this model's names: each attention's ``window_size``.
    """
    rename = swin_names(state)
    state = {rename(name): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith(DERIVED)}
    of_images = _PATCHES in state and state[_PATCHES].ndim == 4
    if of_images:
        state[_PATCHES] = inflate_weight(state[_PATCHES], model.tubelet_size, model.inflation)
    for name, module in model.named_modules():
        table = state.get(name + _TABLE)
        if table is not None and hasattr(module, "window_size"):
            theirs = facts.get(f"{name}.window_size")
            if of_images:
                state[name + _TABLE] = inflate_bias_table(table, module.window_size, theirs)
            else:
                state[name + _TABLE] = resize_bias_table_3d(table, module.window_size, theirs)
    return state, of_images


def inflate_bias_table(table: Tensor, window_size: Triple, theirs: tuple[int, int] | None = None) -> Tensor:
    """Biases of an image model's windows for windows in time, alike for all distances along it (sec. 3.3).

    Args:
        table: ((2q − 1) · (2r − 1), H).
        window_size: (frames, height, width) wanted.
        theirs: (height, width) of the image model's windows; square where None.

    Returns:
        ((2p − 1) · (2q − 1) · (2r − 1), H).

    >>> inflate_bias_table(torch.tensor([[1.0], [2.0], [3.0]]), (2, 1, 2), (1, 2)).flatten().tolist()
    [1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0]
    """
    offsets = None if theirs is None else _offsets(theirs)
    return resize_bias_table(table, window_size[1:], offsets).repeat(2 * window_size[0] - 1, 1)


def resize_bias_table_3d(table: Tensor, window_size: Triple, theirs: Triple | None = None) -> Tensor:
    """A table of relative position biases for windows of another size.

    A shorter axis keeps the distances that still occur along it; a longer one is stretched, bicubically in space as by
    :func:`vitcourse.hierarchical.resize_bias_table`, and linearly in time.

    Args:
        table: ((2p − 1) · (2q − 1) · (2r − 1), H).
        window_size: (frames, height, width) wanted.
        theirs: that of the table's windows; where None, they have the same frames or the same height and width.

    Returns:
        the table for ``window_size``; the table itself where it has this size, or fits no reading of ``theirs``.

    >>> resize_bias_table_3d(torch.zeros(15 * 13 * 13, 2), (4, 5, 5), (8, 7, 7)).shape
    torch.Size([567, 2])
    """
    theirs = theirs or _window_of(len(table), window_size)
    if theirs is None or tuple(theirs) == tuple(window_size):
        return table
    old, new = 2 * theirs[0] - 1, 2 * window_size[0] - 1
    if len(table) % old:
        return table
    planes = [resize_bias_table(plane, window_size[1:], _offsets(theirs[1:])) for plane in table.chunk(old)]
    table = torch.stack(planes)  # (2p − 1, (2q − 1) · (2r − 1), H)
    if new > old:
        line = rearrange(table, "t n h -> 1 (n h) t").float()
        stretched = F.interpolate(line, new, mode="linear").to(table.dtype)
        return rearrange(stretched, "1 (n h) t -> (t n) h", h=table.shape[2])
    first = (old - new) // 2
    return table[first : first + new].flatten(0, 1)


def _offsets(window: tuple[int, int]) -> tuple[int, int]:
    """Distances along each axis of a window."""
    return 2 * window[0] - 1, 2 * window[1] - 1


def _window_of(count: int, own: Triple) -> Triple | None:
    """The window of a table with so many rows: of our frames and square, or of our height and width; None if neither.

    >>> _window_of(15 * 13 * 13, (8, 5, 5)), _window_of(15 * 13 * 13, (4, 7, 7)), _window_of(7, (2, 7, 7))
    ((8, 7, 7), (8, 7, 7), None)
    """
    in_space = (2 * own[1] - 1) * (2 * own[2] - 1)
    if count % in_space == 0 and count // in_space % 2:
        return ((count // in_space + 1) // 2, *own[1:])
    side = isqrt(count // (2 * own[0] - 1))
    if side * side * (2 * own[0] - 1) == count and side % 2:
        return (own[0], (side + 1) // 2, (side + 1) // 2)
    return None
