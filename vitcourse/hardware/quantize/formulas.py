"""The products that quantized layers are made of, in PyTorch's own operators, on every device and in every type.

The compiler fuses them, an exported program carries them without this library, and :mod:`.kernels` are held against
them. A quantized layer calls :mod:`.ops`, which knows when a kernel is faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import onnx_export
from .integers import dequantize, round_to


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


def quantize_per_tensor(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) and a scale (1, 1) that is known before, to (M, K) int8 and (M, 1) float32; see :mod:`.ops`."""
    real = x.float()
    largest = real.abs().amax(dim=1, keepdim=True)
    return round_to(real, scale), torch.where(largest < torch.inf, scale, torch.nan)


def w8a8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x · x_scale) (weight · weight_scale)ᵀ + bias: (M, K) int8 and (N, K) int8 to (M, N)."""
    out = int8_matmul(x, weight).float().mul_(x_scale).mul_(weight_scale.t())
    return (out if bias is None else out.add_(bias)).to(dtype)


def w8a16_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (weight · weight_scale)ᵀ + bias: (M, K) floating point and (N, K) int8 to (M, N)."""
    if x.dtype == torch.float16:  # the largest number of which is soon reached by products without their scale
        return _real_linear(x, dequantize(weight, weight_scale), bias)
    sums = F.linear(x, weight.to(x.dtype))  # integers of 8 bits are exact, and one pass over the weights is saved
    out = (sums.float() if sums.dtype == torch.bfloat16 else sums).mul_(weight_scale.t())
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def w4a16_linear(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """x Wᵀ + bias for 4-bit W: (M, K) floating point and (N, G · group_size / 2) uint8 to (M, N)."""
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
    if torch.compiler.is_exporting() and onnx_export.to_onnx():
        return onnx_export.matmul_integer(x, weight)
    fast = x.device.type == "cpu" and HAS_FAST_INT8 and x.shape[1] > 1  # of one term PyTorch 2.11 makes nonsense
    if fast and not onnx_export.to_onnx():
        return torch._int_mm(x.contiguous(), weight.contiguous().t())  # it misreads rows that are one, expanded
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    with torch.autocast(x.device.type, enabled=False):  # it would round the sums
        for a, b in zip(x.split(EXACT_TERMS, dim=1), weight.split(EXACT_TERMS, dim=1), strict=True):
            total += F.linear(a.float(), b.float()).int()
    return total


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
    if torch.jit.is_tracing() or onnx_export.to_onnx():
        return onnx_export.nibbles(packed)
    signed = packed.view(torch.int8)
    return (signed << 4) >> 4, signed >> 4
