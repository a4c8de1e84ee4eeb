"""FlashAttention (Dao et al. 2022; Dao 2023) in Triton, for the lengths that Vision Transformers have.

softmax(q kᵀ · scale + bias) v without the (N_q, N_k) matrix in memory, exact, with gradients, and with the same bits
every time. `kernels` is what the GPU runs, `plans` says with which tiles, and `ops` makes PyTorch know it.
"""

import torch
from torch import Tensor

from vitcourse.hardware.flash import ops

__all__ = ["flash_attention", "flash_attention_qkvpacked"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 128


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention by our own kernels, on CUDA from compute capability 8.0 on.

    Views are read as they are, those of one packed projection for instance; only where the last dimension is not
    contiguous a copy is made. Under autocast, inputs are cast as by ``scaled_dot_product_attention``.

    Args:
        q: queries (B, H, N_q, D), D ≤ 128, in float16, bfloat16 or float32.
        k: keys (B, H, N_k, D).
        v: values (B, H, N_k, D).
        scale: factor on the dot products; 1/√D where None.
        bias: added to the scores, broadcastable to (B, H, N_q, N_k), of any floating-point type; has a gradient,
            cheap where the batch shares the bias, and otherwise made of B · H · N_q · N_k float32 in memory. −∞ hides a
            key. A query from which all keys are hidden gets 0, as from PyTorch's fused kernels.

    Returns:
        (B, H, N_q, D), lying in memory as (B, N_q, H, D): ``transpose(1, 2).flatten(2)`` copies nothing.

    Raises:
        ValueError: shapes or devices that do not fit together; D > 128.
        TypeError: types that differ, or that are not supported.
        RuntimeError: tensors on a CPU, unless Triton's interpreter runs (``TRITON_INTERPRET=1``).

    >>> q = k = v = torch.empty(2, 12, 197, 64, device="meta")
    >>> flash_attention(q, k, v).transpose(1, 2).flatten(2).shape
    torch.Size([2, 197, 768])
    """
    q, k, v = _autocast(q, k, v)
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale < 0:  # the largest score is then that of the smallest product; the kernels look for the largest
        q, scale = -q, -scale
    bias = _check_bias(bias, (*q.shape[:3], k.shape[2]), q.device)
    return ops.operators.flash_forward(q, k, v, bias, scale)[0]


def flash_attention_qkvpacked(qkv: Tensor, *, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Self-attention on one packed projection, whose gradient is written packed as well: nothing has to be stacked.

    Args:
        qkv: queries, keys and values (B, N, 3, H, D), as ``projection(x).unflatten(-1, (3, H, D))`` gives them.
        scale: as in `flash_attention`.
        bias: as in `flash_attention`.

    Returns:
        (B, H, N, D), lying in memory as (B, N, H, D).

    Raises:
        ValueError, TypeError, RuntimeError: as `flash_attention`.

    >>> qkv = torch.empty(2, 197, 3, 12, 64, device="meta")
    >>> flash_attention_qkvpacked(qkv).shape
    torch.Size([2, 12, 197, 64])
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, D), got {tuple(qkv.shape)}")
    (qkv,) = _autocast(qkv)
    b, n, _, h, d = qkv.shape
    _check_kind(qkv.dtype, d)
    scale = d**-0.5 if scale is None else float(scale)
    if scale < 0:
        return flash_attention(*ops.unpack(qkv), scale=scale, bias=bias)
    bias = _check_bias(bias, (b, h, n, n), qkv.device)
    return ops.operators.flash_forward_qkvpacked(qkv, bias, scale)[0]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Autocast changes what these kernels take, and nothing else: float64 stays float64."""
    device = tensors[0].device.type
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in DTYPES else t for t in tensors)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v must be (B, H, N, D), got {_shapes(q, k, v)}")
    if q.shape[:2] != k.shape[:2] or k.shape != v.shape or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v do not fit together: {_shapes(q, k, v)}; only N_q may differ; or backend='sdpa'")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v differ in type: {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    _check_kind(q.dtype, q.shape[3])
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v lie on different devices: {q.device}, {k.device}, {v.device}")


def _check_kind(dtype: torch.dtype, head_dim: int) -> None:
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head dimension {head_dim} is not within 1 … {MAX_HEAD_DIM}; use backend='sdpa'")
    if dtype not in DTYPES:
        raise TypeError(f"q, k and v are {dtype}; use float16, bfloat16 or float32, or backend='sdpa'")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def _check_bias(bias: Tensor | None, full: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
    """The bias with four dimensions, those of the scores, or 1."""
    if bias is None:
        return None
    if not bias.is_floating_point():
        raise TypeError(f"bias is {bias.dtype}; use a floating-point type, and -torch.inf where a key is to be hidden")
    if bias.device != device:
        raise ValueError(f"bias lies on {bias.device}, and q on {device}")
    shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if len(shape) != 4 or any(size not in (1, wanted) for size, wanted in zip(shape, full, strict=True)):
        raise ValueError(f"bias {tuple(bias.shape)} cannot be broadcast to (B, H, N_q, N_k) = {full}")
    return bias.reshape(shape)
