"""The products that quantized layers are made of, one function each, on every device.

On CUDA they are operators ``torch.ops.vitcourse.*`` with fake kernels, which torch.compile and torch.export take: the
Triton kernels, or what other devices do: before compute capability 8.0, whose tensor cores Triton leaves unused, and
where weights meet inputs in float32 or float64, whose products cuBLAS makes faster.
Everywhere else, and in an ONNX file, they are PyTorch's own operators, which the compiler fuses and an exported program
carries without this library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .integers import dequantize, quantize, round_to

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)
GROUP_SIZES = (32, 64, 128, 256)  # of 4-bit weights

# Whether this CPU has instructions that multiply 8-bit integers and let no sum saturate (x86's VNNI).
HAS_FAST_INT8 = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
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
    if _to_onnx():  # where signed bytes cannot be shifted, and those without a sign become signed on the way
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
    without rounding are multiplied in float32. In an ONNX file it becomes MatMulInteger.
    """
    if torch.compiler.is_exporting() and _to_onnx():
        shape = x.shape[0], weight.shape[0]
        return torch.onnx.ops.symbolic("MatMulInteger", (x, weight.t()), dtype=torch.int32, shape=shape)
    fast = x.device.type == "cpu" and HAS_FAST_INT8 and x.shape[1] > 1  # of one term PyTorch 2.11 makes nonsense
    if fast and not _to_onnx():
        return torch._int_mm(x, weight.t())
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    with torch.autocast(x.device.type, enabled=False):  # it would round the sums
        for a, b in zip(x.split(EXACT_TERMS, dim=1), weight.split(EXACT_TERMS, dim=1), strict=True):
            total += F.linear(a.float(), b.float()).int()
    return total


# ------------------------------------------------------------------------------------------------------------- tilings


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work."""

    block_m: int
    block_n: int
    block_k: int  # inputs of a step; with tl.dot, no more than a group
    num_warps: int
    num_stages: int

    def programs(self, tokens: int, features: int) -> int:
        return -(-tokens // self.block_m) * -(-features // self.block_n)

    def constants(self, in_features: int, group_size: int | None = None) -> dict[str, int]:
        """The kernel's, for a layer of this width."""
        step = min(self.block_k, group_size) if group_size and self.block_m > 1 else self.block_k
        whole = in_features % max(step, group_size or step) == 0
        sizes = {"WHOLE": whole, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": step}
        return sizes | ({"GROUP": group_size} if group_size else {})

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told besides."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# It takes up to 147 KB of shared memory, and consumer chips have 99; Blackwell would spill when it stores the result.
BIG = Tiling(block_m=128, block_n=256, block_k=128, num_warps=8, num_stages=3)
FIT_FOR_BIG = ((8, 0), (9, 0))
# From those in which what is read is used most often to those that make the most programs.
TILINGS = (
    Tiling(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    Tiling(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
    Tiling(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=3),
    Tiling(block_m=64, block_n=32, block_k=128, num_warps=4, num_stages=4),
)
FOUR_BIT_TILINGS = (  # two sums per element: more of them, or longer steps, would not fit into registers
    Tiling(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
    Tiling(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
    Tiling(block_m=64, block_n=32, block_k=64, num_warps=4, num_stages=4),
)
SOME_TOKENS = Tiling(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=4)
FEW_TOKENS = 8
FEW_TOKENS_TILINGS = (
    Tiling(block_m=1, block_n=8, block_k=512, num_warps=4, num_stages=3),
    Tiling(block_m=1, block_n=4, block_k=1024, num_warps=4, num_stages=3),
)
ENOUGH_PROGRAMS = 128  # about as many as a data-centre GPU has multiprocessors


def tilings(kernel: str, tokens: int, capability: tuple[int, int]) -> tuple[Tiling, ...]:
    """Those among which :func:`tiling` chooses."""
    if tokens <= FEW_TOKENS and kernel != "w8a8":
        return FEW_TOKENS_TILINGS
    if tokens <= 32:
        return (SOME_TOKENS,)
    if kernel == "w4a16":
        return FOUR_BIT_TILINGS
    return (BIG, *TILINGS) if kernel == "w8a8" and capability in FIT_FOR_BIG else TILINGS


def kernel_for(name: str, tile: Tiling) -> Any:
    """The Triton kernel that makes such tiles."""
    from . import kernels

    return getattr(kernels, f"{name}_few" if tile.block_m == 1 else name)


def tiling(kernel: str, tokens: int, features: int, capability: tuple[int, int]) -> Tiling:
    """The first that keeps the whole chip busy, for a result (tokens, features)."""
    choices = tilings(kernel, tokens, capability)
    busy = (tile for tile in choices if tile.programs(tokens, features) >= ENOUGH_PROGRAMS)
    return next(busy, choices[-1])


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) for what is not made by NVIDIA."""
    return (0, 0) if device.type == "cpu" or torch.version.hip else torch.cuda.get_device_capability(device)


# -------------------------------------------------------------------------------------------------------------- checks

# What an operator is given may come from anywhere, and a kernel reads wherever it is told to.


def _check(name: str, tensor: Tensor, types: tuple[torch.dtype, ...], shape: tuple, x: Tensor, remedy: str) -> None:
    if tensor.shape != shape or tensor.dtype not in types or tensor.device != x.device:
        wanted = " or ".join(map(str, types))
        raise ValueError(
            f"{name} must be {wanted} of shape {tuple(shape)} on {x.device}, as x is, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; {remedy}"
        )


def _check_x(x: Tensor, types: tuple[torch.dtype, ...] = FLOATS) -> None:
    if x.dim() != 2 or x.dtype not in types:
        raise ValueError(
            f"x must be {' or '.join(map(str, types))} of shape (M, K), got {x.dtype} of shape {tuple(x.shape)}; "
            "flatten its leading dimensions, and cast or quantize it"
        )


def _check_bias(bias: Tensor | None, weight: Tensor, x: Tensor) -> None:
    if bias is not None:
        _check("bias", bias, FLOATS, weight.shape[:1], x, "it has a number for every row of the weight")


def _check_per_tensor(x: Tensor, scale: Tensor) -> None:
    _check_x(x)
    _check("scale", scale, (torch.float32,), (1, 1), x, "pass that of an observer; without one, quantize_per_token")


def _check_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    types: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    _check_x(x, types)
    _check("weight", weight, (torch.int8,), (*weight.shape[:1], x.shape[1]), x, "pass the integers of quantize(weight)")
    _check(
        "weight_scale", weight_scale, (torch.float32,), (weight.shape[0], 1), x, "pass the scale of quantize(weight)"
    )
    _check_bias(bias, weight, x)


def _check_w8a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    _check_w8a16(x, weight, weight_scale, bias, (torch.int8,))
    count = x_scale.numel()
    tokens = 1 if isinstance(count, int) and count == 1 else x.shape[0]  # an unknown number of tokens is not asked
    _check("x_scale", x_scale, (torch.float32,), (tokens, 1), x, "pass the scale of quantize(x), or (1, 1) for all")
    if dtype not in FLOATS:
        raise ValueError(f"dtype {dtype} must be {' or '.join(map(str, FLOATS))}")


def _check_w4a16(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int) -> None:
    _check_x(x)
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size {group_size} must be 32, 64, 128 or 256")
    groups = -(-x.shape[1] // group_size)
    rows = packed.shape[:1]
    remedy = "pack the integers of quantize(weight, 4, group_size) with pack_int4, group by group"
    _check("packed", packed, (torch.uint8,), (*rows, groups * group_size // 2), x, remedy)
    remedy = "pass the scale of quantize(weight, 4, group_size)"
    _check("weight_scale", weight_scale, (torch.float32,), (*rows, groups), x, remedy)
    _check_bias(bias, packed, x)


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
def _has_kernels(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    return torch.version.hip is not None or _capability(device) >= (8, 0)


_register(
    "quantize_per_token(Tensor x) -> (Tensor, Tensor)",
    _check_x,
    quantize,
    launch_quantize_per_token,
    _fake_quantize,
    FLOATS,
)
_register(
    "quantize_per_tensor(Tensor x, Tensor scale) -> (Tensor, Tensor)",
    _check_per_tensor,
    _per_tensor_plain,
    launch_quantize_per_tensor,
    _fake_quantize,
    FLOATS,
)
_register(
    "w8a8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype)"
    " -> Tensor",
    _check_w8a8,
    _w8a8_plain,
    launch_w8a8,
    _fake_w8a8,
    (torch.int8,),
)
_register(
    "w8a16_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    _check_w8a16,
    _w8a16_plain,
    launch_w8a16,
    _fake_weight_only,
)
_register(
    "w4a16_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int group_size) -> Tensor",
    _check_w4a16,
    _w4a16_plain,
    launch_w4a16,
    _fake_weight_only,
)
for _name in ("w8a16_linear", "w4a16_linear"):
    torch.library.register_autograd(f"vitcourse::{_name}", _gradient, setup_context=_keep_weight)
