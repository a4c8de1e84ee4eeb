"""The products that quantized layers are made of, one function each, on every device.

On CUDA they are operators ``torch.ops.vitcourse.*`` with fake kernels, which torch.compile and torch.export take: the
Triton kernels, or what other devices do: before compute capability 8.0, whose tensor cores Triton leaves unused, and
where weights meet inputs in float32 or float64, whose products cuBLAS makes faster.
Everywhere else, and in an ONNX file, they are :mod:`.formulas`, in PyTorch's own operators.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import formulas, launchers, onnx_export
from .checks import FLOATS, HALVES, check_per_tensor, check_w4a16, check_w8a8, check_w8a16, check_x
from .integers import quantize


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize` to int8 with a scale per row: (M, K) to (M, K) int8 and (M, 1) float32."""
    return torch.ops.vitcourse.quantize_per_token(x) if _has_operators(x) else quantize(x)


def quantize_per_tensor(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round to steps of a scale that is known before, to int8; what lies beyond the outermost is clipped to it.

    Args:
        x: (M, K), floating point.
        scale: (1, 1) float32.

    Returns:
        q: (M, K) int8.
        scale: (M, 1) float32, what was given; NaN for rows that hold NaN or infinity, so that they come out as NaN.
    """
    if _has_operators(x):
        return torch.ops.vitcourse.quantize_per_tensor(x, scale)
    return formulas.quantize_per_tensor(x, scale)


def w8a8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x · x_scale) (weight · weight_scale)ᵀ + bias, multiplied as integers: the sums are exact.

    Args:
        x: (M, K) int8.
        x_scale: (M, 1) float32, or (1, 1) for all tokens.
        weight: (N, K) int8.
        weight_scale: (N, 1) float32.
        bias: (N,), or None.
        dtype: of the result.

    Returns:
        (M, N).
    """
    if _has_operators(x):
        return torch.ops.vitcourse.w8a8_linear(x, x_scale, weight, weight_scale, bias, dtype)
    return formulas.w8a8_linear(x, x_scale, weight, weight_scale, bias, dtype)


def w8a16_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (weight · weight_scale)ᵀ + bias: x (M, K) floating point, weight (N, K) int8, its scale (N, 1) float32.

    On CUDA, float16 and bfloat16 take a Triton kernel, float32 and float64 the product of PyTorch.
    """
    if _has_operators(x):
        return torch.ops.vitcourse.w8a16_linear(x, weight, weight_scale, bias)
    return formulas.w8a16_linear(x, weight, weight_scale, bias)


def w4a16_linear(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """x Wᵀ + bias for 4-bit W: x (M, K) floating point, packed (N, G · group_size / 2) uint8, its scale (N, G).

    On CUDA, float16 and bfloat16 take a Triton kernel, float32 and float64 the product of PyTorch.
    """
    if _has_operators(x):
        return torch.ops.vitcourse.w4a16_linear(x, packed, weight_scale, bias, group_size)
    return formulas.w4a16_linear(x, packed, weight_scale, bias, group_size)


# ----------------------------------------------------------------------------------------------------------- operators


def _fake_quantize(x: Tensor, *scale: Tensor) -> tuple[Tensor, Tensor]:
    return launchers.empty_integers(x)


def _fake_w8a8(x, x_scale, weight, weight_scale, bias, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def _fake_weight_only(x, weight, weight_scale, bias, *group_size):
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep_weight(ctx, inputs, output) -> None:
    x, weight, weight_scale, bias, *group_size = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.in_features, ctx.group_size = x.shape[1], group_size


def _gradient(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """That of a linear layer with the dequantized weight; the integers and their scale have none."""
    weight, scale = ctx.saved_tensors
    if ctx.group_size:
        real = formulas.dequantize_int4(weight, scale, *ctx.group_size, ctx.in_features)
    else:
        real = weight * scale
    bias = gradient.sum(dim=0) if ctx.needs_input_grad[3] else None
    return gradient @ real.to(gradient.dtype), None, None, bias, *[None for _ in ctx.group_size]


def _register(
    schema: str,
    check: Callable,
    plain: Callable,
    launch: Callable,
    fake: Callable,
    types: tuple[torch.dtype, ...] = HALVES,
) -> None:
    """Define an operator, whose arguments are checked wherever it runs; for CUDA see :func:`dispatcher`."""

    def checked(function: Callable) -> Callable:
        def run(*arguments: Any) -> Any:
            check(*arguments)
            return function(*arguments)

        return run

    name = "vitcourse::" + schema.partition("(")[0]
    torch.library.define(name, schema.removeprefix(schema.partition("(")[0]))
    torch.library.impl(name, "CPU")(checked(plain))
    torch.library.impl(name, "CUDA")(checked(dispatcher(plain, launch, types)))
    torch.library.register_fake(name)(checked(fake))


def dispatcher(plain: Callable, launch: Callable, types: tuple[torch.dtype, ...] = HALVES) -> Callable:
    """What an operator does on CUDA: ``launch`` for an x of these types, where the chip has the instructions."""

    def on_cuda(x: Tensor, *rest: Any) -> Any:
        return (launch if x.dtype in types and _has_kernels(x.device) else plain)(x, *rest)

    return on_cuda


def _has_operators(x: Tensor) -> bool:
    return x.is_cuda and not onnx_export.to_onnx()


@cache
def _has_kernels(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    return torch.version.hip is not None or launchers.capability(device) >= (8, 0)


_register(
    "quantize_per_token(Tensor x) -> (Tensor, Tensor)",
    check_x,
    quantize,
    launchers.quantize_per_token,
    _fake_quantize,
    FLOATS,
)
_register(
    "quantize_per_tensor(Tensor x, Tensor scale) -> (Tensor, Tensor)",
    check_per_tensor,
    formulas.quantize_per_tensor,
    launchers.quantize_per_tensor,
    _fake_quantize,
    FLOATS,
)
_register(
    "w8a8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype)"
    " -> Tensor",
    check_w8a8,
    formulas.w8a8_linear,
    launchers.w8a8_linear,
    _fake_w8a8,
    (torch.int8,),
)
_register(
    "w8a16_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    check_w8a16,
    formulas.w8a16_linear,
    launchers.w8a16_linear,
    _fake_weight_only,
)
_register(
    "w4a16_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int group_size) -> Tensor",
    check_w4a16,
    formulas.w4a16_linear,
    launchers.w4a16_linear,
    _fake_weight_only,
)
for _name in ("w8a16_linear", "w4a16_linear"):
    torch.library.register_autograd(f"vitcourse::{_name}", _gradient, setup_context=_keep_weight)
