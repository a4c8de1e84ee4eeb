"""What an operator is given may come from anywhere, and a kernel reads wherever it is told to: so all is looked at."""

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)
GROUP_SIZES = (32, 64, 128, 256)  # of 4-bit weights


def _check(name: str, tensor: Tensor, types: tuple[torch.dtype, ...], shape: tuple, x: Tensor, remedy: str) -> None:
    if tensor.shape != shape or tensor.dtype not in types or tensor.device != x.device:
        wanted = " or ".join(map(str, types))
        raise ValueError(
            f"{name} must be {wanted} of shape {tuple(shape)} on {x.device}, as x is, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; {remedy}"
        )


def check_x(x: Tensor, types: tuple[torch.dtype, ...] = FLOATS) -> None:
    if x.dim() != 2 or x.dtype not in types:
        raise ValueError(
            f"x must be {' or '.join(map(str, types))} of shape (M, K), got {x.dtype} of shape {tuple(x.shape)}; "
            "flatten its leading dimensions, and cast or quantize it"
        )


def _check_bias(bias: Tensor | None, weight: Tensor, x: Tensor) -> None:
    if bias is not None:
        _check("bias", bias, FLOATS, weight.shape[:1], x, "it has a number for every row of the weight")


def check_per_tensor(x: Tensor, scale: Tensor) -> None:
    check_x(x)
    _check("scale", scale, (torch.float32,), (1, 1), x, "pass that of an observer; without one, quantize_per_token")


def check_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    types: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    check_x(x, types)
    _check("weight", weight, (torch.int8,), (*weight.shape[:1], x.shape[1]), x, "pass the integers of quantize(weight)")
    _check(
        "weight_scale", weight_scale, (torch.float32,), (weight.shape[0], 1), x, "pass the scale of quantize(weight)"
    )
    _check_bias(bias, weight, x)


def check_w8a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    check_w8a16(x, weight, weight_scale, bias, (torch.int8,))
    count = x_scale.numel()
    tokens = 1 if isinstance(count, int) and count == 1 else x.shape[0]  # an unknown number of tokens is not asked
    _check("x_scale", x_scale, (torch.float32,), (tokens, 1), x, "pass the scale of quantize(x), or (1, 1) for all")
    if dtype not in FLOATS:
        raise ValueError(f"dtype {dtype} must be {' or '.join(map(str, FLOATS))}")


def check_w4a16(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int) -> None:
    check_x(x)
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size {group_size} must be 32, 64, 128 or 256")
    groups = -(-x.shape[1] // group_size)
    rows = packed.shape[:1]
    remedy = "pack the integers of quantize(weight, 4, group_size) with pack_int4, group by group"
    _check("packed", packed, (torch.uint8,), (*rows, groups * group_size // 2), x, remedy)
    remedy = "pass the scale of quantize(weight, 4, group_size)"
    _check("weight_scale", weight_scale, (torch.float32,), (*rows, groups), x, remedy)
    _check_bias(bias, packed, x)
