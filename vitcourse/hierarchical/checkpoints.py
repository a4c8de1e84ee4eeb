"""Checkpoints of other libraries, in the names and windows of ours. timm's have the names already."""

import re
from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_TABLE = ".relative_position_bias_table"
_DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")  # made from sizes, not learnt


def adapt_checkpoint(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename what torchvision and the authors' own code call otherwise, and fit position biases to the windows."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(_DERIVED)}
    if "features.0.0.weight" in state:
        state = _split_biases(_rename(state, _from_torchvision), model)
    elif "layers.0.downsample.reduction.weight" in state:
        state = _rename(state, _from_authors)
    for name, module in model.named_modules():
        table = state.get(name + _TABLE)
        if table is not None and hasattr(module, "window_size"):
            state[name + _TABLE] = resize_bias_table(table, module.window_size)
    return state


def resize_bias_table(table: Tensor, window_size: tuple[int, int]) -> Tensor:
    """A table of relative position biases for windows of another size.

    A smaller window keeps the distances that still occur in it. For a larger one the table is stretched by bicubic
    interpolation, as the authors do for higher resolutions.

    Args:
        table: ((2w − 1)², H), of a square window.
        window_size: (height, width) wanted.

    Returns:
        ((2p − 1) · (2q − 1), H); the table itself where it has this size already or is not of a square window.
    """
    rows, columns = (2 * n - 1 for n in window_size)
    side = int(len(table) ** 0.5)
    if len(table) == rows * columns or side * side != len(table):
        return table
    grid = rearrange(table, "(y x) h -> 1 h y x", y=side)
    stretched = (max(rows, side), max(columns, side))
    if stretched != (side, side):
        grid = F.interpolate(grid.float(), stretched, mode="bicubic").to(table.dtype)
    top, left = (stretched[0] - rows) // 2, (stretched[1] - columns) // 2
    return rearrange(grid[..., top : top + rows, left : left + columns], "1 h y x -> (y x) h")


def _rename(state: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(name): tensor for name, tensor in state.items()}


def _from_torchvision(name: str) -> str:
    """``features`` holds the patch embedding, then stages and mergings in turn."""
    name = name.replace("features.0.0.", "patch_embed.proj.").replace("features.0.2.", "patch_embed.norm.")
    name = name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.").replace("head.", "head.fc.")
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
