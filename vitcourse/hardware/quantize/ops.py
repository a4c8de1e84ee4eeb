"""The products that quantized layers are made of, one function each, on every device.

On CUDA they are operators ``torch.ops.vitcourse.*`` with fake kernels, which torch.compile and torch.export take: the
Triton kernels, or what other devices do: before compute capability 8.0, whose tensor cores Triton leaves unused, and
where weights meet inputs in float32 or float64, whose products cuBLAS makes faster.
Everywhere else, and in an ONNX file, they are PyTorch's own operators, which the compiler fuses and an exported program
carries without this library.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .checks import FLOATS, HALVES, check_per_tensor, check_w4a16, check_w8a8, check_w8a16, check_x
from .integers import dequantize, quantize, round_to
from .tilings import kernel_for, tiling


def _has_fast_int8() -> bool:
    """Whether this CPU has instructions that multiply 8-bit integers and let no sum saturate (VNNI), and they are used.

    oneDNN takes others where it is told to (``ONEDNN_MAX_CPU_ISA``), and only its product shows it.
    """
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return False
    with _disable_current_modes():  # who imports this while building on the meta device or of fakes asks about the CPU
        largest = torch.full((8, 8), 127, dtype=torch.int8, device="cpu")
        return torch._int_mm(largest, largest).eq(8 * 127**2).all().item()


HAS_FAST_INT8 = _has_fast_int8()
EXACT_TERMS = 1024  # products of two int8, each at most 2¹⁴, that float32 sums without rounding: 2²⁴ / 2¹⁴


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
    return torch.ops.vitcourse.quantize_per_tensor(x, scale) if _has_operators(x) else _per_tensor_plain(x, scale)


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
    return _w8a8_plain(x, x_scale, weight, weight_scale, bias, dtype)


def w8a16_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (weight · weight_scale)ᵀ + bias: x (M, K) floating point, weight (N, K) int8, its scale (N, 1) float32.

    On CUDA, float16 and bfloat16 take a Triton kernel, float32 and float64 the product of PyTorch.
    """
    if _has_operators(x):
        return torch.ops.vitcourse.w8a16_linear(x, weight, weight_scale, bias)
    return _w8a16_plain(x, weight, weight_scale, bias)


def w4a16_linear(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """x Wᵀ + bias for 4-bit W: x (M, K) floating point, packed (N, G · group_size / 2) uint8, its scale (N, G).

    On CUDA, float16 and bfloat16 take a Triton kernel, float32 and float64 the product of PyTorch.
    """
    if _has_operators(x):
        return torch.ops.vitcourse.w4a16_linear(x, packed, weight_scale, bias, group_size)
    return _w4a16_plain(x, packed, weight_scale, bias, group_size)


def dequantize_int4(packed: Tensor, weight_scale: Tensor, group_size: int, in_features: int) -> Tensor:
    """(N, G · group_size / 2) uint8, packed group by group, to the (N, in_features) float32 that it stands for."""
    low, high = _nibbles(packed.unflatten(1, (-1, group_size // 2)))
    if torch.compiler.is_compiling():  # which needs no copies, and would keep those that it is told to make
        return dequantize(torch.cat([low, high], dim=-1).flatten(1), weight_scale, group_size)[:, :in_features]
    real = weight_scale.new_empty(*low.shape[:2], 2, group_size // 2)
    real[:, :, 0], real[:, :, 1] = low, high  # every other copy of real numbers takes more time than the bytes do
    return real.mul_(weight_scale[:, :, None, None]).flatten(1)[:, :in_features]


def _nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """What the low and the high four bits stand for."""
    if torch.jit.is_tracing() or _to_onnx():  # neither shifts signed bytes
        raised = packed.int() ^ 0x88  # with its top bit flipped, each nibble is 8 more than what it stands for
        return (raised & 15) - 8, (raised >> 4) - 8
    signed = packed.view(torch.int8)
    return (signed << 4) >> 4, signed >> 4


# --------------------------------------------------------------------------------------------- PyTorch's own operators


def _per_tensor_plain(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    real = x.float()
    largest = real.abs().amax(dim=1, keepdim=True)
    return round_to(real, scale), torch.where(largest < torch.inf, scale, torch.nan)


def _w8a8_plain(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = int8_matmul(x, weight).float().mul_(x_scale).mul_(weight_scale.t())
    return (out if bias is None else out.add_(bias)).to(dtype)


def _w8a16_plain(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float16:  # the largest number of which is soon reached by products without their scale
        return _real_linear(x, dequantize(weight, weight_scale), bias)
    sums = F.linear(x, weight.to(x.dtype))  # integers of 8 bits are exact, and one pass over the weights is saved
    out = (sums.float() if sums.dtype == torch.bfloat16 else sums).mul_(weight_scale.t())
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def _w4a16_plain(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    return _real_linear(x, dequantize_int4(packed, weight_scale, group_size, x.shape[1]), bias)


def _real_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the type of x, whatever that of the bias, as the kernels do."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """(M, K) int8 times (N, K) int8 transposed, to (M, N) int32, exactly.

    A CPU with VNNI has instructions for it: 3 to 4 times as fast as float32. Without them, oneDNN may let 16-bit sums
    saturate, and other devices have no such product at all: there, stretches of K so short that float32 sums them
    without rounding are multiplied in float32. In an ONNX file it becomes MatMulInteger, for which
    ONNX Runtime, too, may let sums saturate on an x86 without VNNI.
    """
    if torch.compiler.is_exporting() and _to_onnx():
        shape = x.shape[0], weight.shape[0]
        return torch.onnx.ops.symbolic("MatMulInteger", (x, weight.t()), dtype=torch.int32, shape=shape)
    fast = x.device.type == "cpu" and HAS_FAST_INT8 and x.shape[1] > 1  # of one term PyTorch 2.11 makes nonsense
    if fast and not _to_onnx():
        return torch._int_mm(x.contiguous(), weight.contiguous().t())  # it misreads rows that are one, expanded
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    with torch.autocast(x.device.type, enabled=False):  # it would round the sums
        for a, b in zip(x.split(EXACT_TERMS, dim=1), weight.split(EXACT_TERMS, dim=1), strict=True):
            total += F.linear(a.float(), b.float()).int()
    return total


# ----------------------------------------------------------------------------------------------------------- operators


def launch_quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel of :func:`quantize_per_token`."""
    return _launch_quantize(x, None)


def launch_quantize_per_tensor(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel of :func:`quantize_per_tensor`."""
    return _launch_quantize(x, scale)


def _launch_quantize(x: Tensor, fixed: Tensor | None) -> tuple[Tensor, Tensor]:
    import triton

    from .kernels import quantize_rows

    q, scale = _fake_quantize(x)
    if x.numel():
        block = triton.next_power_of_2(x.shape[1])
        launch = quantize_rows[(x.shape[0],)]
        with torch.cuda.device_of(x):
            launch(x.contiguous(), fixed, q, scale, x.shape[1], BLOCK_K=block, num_warps=4 if block <= 4096 else 8)
    return q, scale


def launch_w8a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Run the Triton kernel of :func:`w8a8_linear`."""
    arguments = (x, x_scale, weight, weight_scale, bias)
    return _launch("w8a8", arguments, x, weight, dtype, PER_TOKEN=int(x_scale.numel() > 1))


def launch_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Run the Triton kernel of :func:`w8a16_linear`."""
    return _launch("w8a16", (x, weight, weight_scale, bias), x, weight, x.dtype)


def launch_w4a16(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """Run the Triton kernel of :func:`w4a16_linear`."""
    arguments = (x, packed.view(torch.int8), weight_scale, bias)
    return _launch("w4a16", arguments, x, packed, x.dtype, group_size)


def _launch(
    name: str,
    arguments: tuple[Tensor | None, ...],
    x: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    group_size: int | None = None,
    **constants: int,
) -> Tensor:
    (M, K), N = x.shape, weight.shape[0]
    out = x.new_empty(M, N, dtype=dtype)
    if out.numel():
        tile = tiling(name, M, N, _capability(x.device))
        constants |= tile.constants(K, group_size)
        arguments = tuple(argument if argument is None else argument.contiguous() for argument in arguments)
        launch = kernel_for(name, tile)[(tile.programs(M, N),)]
        with torch.cuda.device_of(x):
            launch(*arguments, out, M, N, K, **constants, **tile.options)
    return out


def _fake_quantize(x: Tensor, *fixed: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


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
    real = dequantize_int4(weight, scale, *ctx.group_size, ctx.in_features) if ctx.group_size else weight * scale
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
    return x.is_cuda and not _to_onnx()


def _to_onnx() -> bool:
    """Whether an ONNX file is being made. The last function alone is slow, and would be asked at every call."""
    return (torch.compiler.is_exporting() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) for what is not made by NVIDIA."""
    return (0, 0) if device.type != "cuda" or torch.version.hip else torch.cuda.get_device_capability(device)


@cache
def _has_kernels(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    return torch.version.hip is not None or _capability(device) >= (8, 0)


_register(
    "quantize_per_token(Tensor x) -> (Tensor, Tensor)",
    check_x,
    quantize,
    launch_quantize_per_token,
    _fake_quantize,
    FLOATS,
)
_register(
    "quantize_per_tensor(Tensor x, Tensor scale) -> (Tensor, Tensor)",
    check_per_tensor,
    _per_tensor_plain,
    launch_quantize_per_tensor,
    _fake_quantize,
    FLOATS,
)
_register(
    "w8a8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype)"
    " -> Tensor",
    check_w8a8,
    _w8a8_plain,
    launch_w8a8,
    _fake_w8a8,
    (torch.int8,),
)
_register(
    "w8a16_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    check_w8a16,
    _w8a16_plain,
    launch_w8a16,
    _fake_weight_only,
)
_register(
    "w4a16_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int group_size) -> Tensor",
    check_w4a16,
    _w4a16_plain,
    launch_w4a16,
    _fake_weight_only,
)
for _name in ("w8a16_linear", "w4a16_linear"):
    torch.library.register_autograd(f"vitcourse::{_name}", _gradient, setup_context=_keep_weight)
