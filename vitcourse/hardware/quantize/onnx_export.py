"""What the products are in an ONNX file, which knows neither our operators nor shifts of signed bytes."""

import torch
from torch import Tensor


def to_onnx() -> bool:
    """Whether an ONNX file is being made. The last function alone is slow, and would be asked at every call."""
    return (torch.compiler.is_exporting() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


def matmul_integer(x: Tensor, weight: Tensor) -> Tensor:
    """(M, K) int8 times (N, K) int8 transposed as MatMulInteger, (M, N) int32.

    ONNX Runtime, too, may let its sums saturate on an x86 without VNNI.
    """
    shape = x.shape[0], weight.shape[0]
    return torch.onnx.ops.symbolic("MatMulInteger", (x, weight.t()), dtype=torch.int32, shape=shape)


def nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """What the low and the high four bits of uint8 stand for, in operators that tracers and ONNX have."""
    raised = packed.int() ^ 0x88  # with its top bit flipped, each nibble is 8 more than what it stands for
    return (raised & 15) - 8, (raised >> 4) - 8
