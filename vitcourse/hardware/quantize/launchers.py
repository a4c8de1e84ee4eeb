"""Launching the Triton kernels: shapes, tiles and the memory for what comes back. CUDA, or Triton's interpreter.

Each function is called like the operator that it is one way to compute, see :mod:`.ops`.
"""

from functools import cache

import torch
from torch import Tensor

from .tilings import kernel_for, tiling


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the kernel of :func:`.ops.quantize_per_token`."""
    return _launch_quantize(x, None)


def quantize_per_tensor(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Run the kernel of :func:`.ops.quantize_per_tensor`."""
    return _launch_quantize(x, scale)


def _launch_quantize(x: Tensor, fixed: Tensor | None) -> tuple[Tensor, Tensor]:
    import triton

    from .kernels import quantize_rows

    q, scale = empty_integers(x)
    if x.numel():
        block = triton.next_power_of_2(x.shape[1])
        launch = quantize_rows[(x.shape[0],)]
        with torch.cuda.device_of(x):
            launch(x.contiguous(), fixed, q, scale, x.shape[1], BLOCK_K=block, num_warps=4 if block <= 4096 else 8)
    return q, scale


def w8a8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Run the kernel of :func:`.ops.w8a8_linear`."""
    arguments = (x, x_scale, weight, weight_scale, bias)
    return _launch("w8a8", arguments, x, weight, dtype, PER_TOKEN=int(x_scale.numel() > 1))


def w8a16_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Run the kernel of :func:`.ops.w8a16_linear`."""
    return _launch("w8a16", (x, weight, weight_scale, bias), x, weight, x.dtype)


def w4a16_linear(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """Run the kernel of :func:`.ops.w4a16_linear`."""
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
        tile = tiling(name, M, N, capability(x.device))
        constants |= tile.constants(K, group_size)
        arguments = tuple(argument if argument is None else argument.contiguous() for argument in arguments)
        launch = kernel_for(name, tile)[(tile.programs(M, N),)]
        with torch.cuda.device_of(x):
            launch(*arguments, out, M, N, K, **constants, **tile.options)
    return out


def empty_integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for x (M, K) as int8, and for a scale (M, 1) of each row in float32."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) for what is not made by NVIDIA."""
    return (0, 0) if device.type != "cuda" or torch.version.hip else torch.cuda.get_device_capability(device)
