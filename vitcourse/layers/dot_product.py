"""One door to attention: the equation, PyTorch's fused kernels and ours behind one function."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcourse.notices import say_once


def math_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention as the equation has it: the (N_q, N_k) matrix is made, and can be looked at."""
    return attention_weights(q, k, scale=scale, bias=bias, mask=mask) @ v


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """PyTorch's fused kernels, which never store the (N_q, N_k) matrix."""
    bias = _masked_bias(bias, mask, q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if bias is not None and torch.compiler.is_exporting():
        # What the graph is translated to may lay the output out otherwise than the kernel that it was traced with, so
        # that a view of it becomes impossible.
        return out.clone(memory_format=torch.contiguous_format)
    return out


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Our own Triton kernels (`vitcourse.hardware.flash`); PyTorch's where they cannot run, and a line says so."""
    if not _runs_flash(q.device, asked_for=True):
        return sdpa_attention(q, k, v, scale=scale, bias=bias, mask=mask)
    from vitcourse.hardware import flash

    return flash.flash_attention(q, k, v, scale=scale, bias=_masked_bias(bias, mask, q.dtype))


# `auto` is what `attention` picks when nothing is asked for.
ATTENTION_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "math": math_attention,
    "sdpa": sdpa_attention,
    "flash": flash_attention,
}


def attention_weights(
    q: Tensor, k: Tensor, *, scale: float | None = None, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Attention probabilities softmax(q kᵀ · scale + bias) over the keys.

    Args:
        q: queries (B, H, N_q, D).
        k: keys (B, H, N_k, D).
        scale: factor on the dot products; 1/√D where None.
        bias: added to the scores, broadcastable to (B, H, N_q, N_k); −inf hides a key.
        mask: boolean, broadcastable to the same; True where a query may attend to a key.

    Returns:
        (B, H, N_q, N_k); each row sums to 1, but for one that ``mask`` hides all keys from, which is 0.
    """
    scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)
    scores = scores if bias is None else scores + bias
    if mask is None:
        return scores.softmax(dim=-1)
    # A row of −inf would make NaN of the gradient, too. What is finite and hidden becomes 0 afterwards.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(~mask, 0.0)


def _masked_bias(bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Bias and mask as one bias, −inf where a key is hidden; the fused kernels make 0 of a row that is all hidden."""
    if mask is None:
        return bias
    if bias is None:
        bias = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, bias, float("-inf"))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1): the one door that every model goes through.

    Args:
        q: queries (B, H, N_q, D).
        k: keys (B, H, N_k, D).
        v: values (B, H, N_k, D_v).
        scale: factor on the dot products; 1/√D where None.
        bias: added to the scores before the softmax, broadcastable to (B, H, N_q, N_k). −inf hides a key.
        mask: boolean, broadcastable to (B, H, N_q, N_k); True where a query may attend to a key. A query that may
            attend to none gets 0.
        backend: ``"math"`` (the plain equation), ``"sdpa"`` (PyTorch's fused kernels), ``"flash"`` (ours, on NVIDIA
            GPUs of compute capability ≥ 8.0 with Triton, on CPUs under ``TRITON_INTERPRET=1``; elsewhere sdpa, and a
            line on stderr says so once) or ``"auto"``, the fastest at hand: flash only where it has been measured to
            be.

    Returns:
        (B, H, N_q, D_v).

    Raises:
        ValueError: an unknown backend; shapes that do not fit together, or not into the backend asked for.
        TypeError: a boolean ``bias``, which backends would read differently; a ``mask`` that is not boolean.

    >>> q = k = v = torch.randn(2, 3, 5, 8)
    >>> attention(q, k, v).shape
    torch.Size([2, 3, 5, 8])
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v must be (B, H, N, D), got {_shapes(q, k, v)}")
    if q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"q, k and v do not fit together: {_shapes(q, k, v)}; "
            "batch and heads must agree, q and k in D, k and v in their length"
        )
    if bias is not None and bias.dtype == torch.bool:
        raise TypeError("bias is boolean; pass it as mask, with True where a query may attend to a key")
    check_mask(mask, (*q.shape[:3], k.shape[2]))
    if backend == "auto":
        backend = _fastest(q, k, v, bias if mask is None else mask)
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; use 'auto' or one of {sorted(ATTENTION_BACKENDS)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    masked = {} if mask is None else {"mask": mask}  # a backend of somebody's own need not know masks
    return ATTENTION_BACKENDS[backend](q, k, v, scale=scale, bias=bias, **masked)


def check_mask(mask: Tensor | None, shape: Sequence[int]) -> None:
    """What is asked of a mask for scores of this shape (B, H, N_q, N_k).

    Raises:
        TypeError: not boolean; other libraries read 0 and 1, or −inf, the other way round.
        ValueError: it cannot be broadcast to the shape.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; it must be boolean, with True where a query may attend to a key")
    sizes = (1,) * (len(shape) - mask.ndim) + tuple(mask.shape)
    if len(sizes) != len(shape) or any(m not in (1, n) for m, n in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"mask {tuple(mask.shape)} cannot be broadcast to (B, H, N_q, N_k) = {tuple(shape)}; "
            "for a mask of keys (B, N), pass mask[:, None, None]"
        )


def attention_qkvpacked(
    qkv: Tensor, *, scale: float | None = None, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`attention` on one packed projection (B, N, 3, H, D), whose gradient our kernels write packed as well.

    Returns:
        (B, H, N, D).

    Raises:
        ValueError: as `attention`.

    >>> attention_qkvpacked(torch.randn(2, 5, 3, 4, 8)).shape
    torch.Size([2, 4, 5, 8])
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    check_mask(mask, (*q.shape[:3], k.shape[2]))
    if backend == "auto":
        backend = _fastest(q, k, v, mask)
    if backend == "flash" and _runs_flash(qkv.device, asked_for=True):
        from vitcourse.hardware import flash

        return flash.flash_attention_qkvpacked(qkv, scale=scale, bias=_masked_bias(None, mask, qkv.dtype))
    return attention(q, k, v, scale=scale, mask=mask, backend=backend)


def _fastest(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str:
    """On a CPU, fused kernels are slower than the plain equation where there is a bias, 1.2 to 1.6 times for windows.

    Not so in a compiled graph, where the bias is made ready on the way, nor for long sequences, whose whole matrix the
    equation needs. An exported graph shall run where our kernels are not installed.
    """
    if q.is_cuda:
        return "flash" if not torch.compiler.is_exporting() and _flash_is_faster(q, k, v, bias) else "sdpa"
    plain = bias is not None and not torch.compiler.is_compiling()
    return "math" if plain and q.device.type == "cpu" and q.dtype == torch.float32 and k.shape[2] <= 1024 else "sdpa"


def _flash_is_faster(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether a committed measurement says so, for this chip, type and shape."""
    if not _runs_flash(q.device, asked_for=False) or k.shape != v.shape:
        return False
    from vitcourse.hardware.flash import plans

    b, h, _, d = q.shape
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    return plans.is_faster(
        _capability(q.device), q.dtype, d, backward=trained, biased=bias is not None, n_k=k.shape[2], sequences=b * h
    )


def _runs_flash(device: torch.device, asked_for: bool) -> bool:
    """Whether a device runs our kernels; who asked for them by name is told why not."""
    obstacle = _flash_obstacle(device)
    if obstacle and asked_for:
        say_once(f"attention backend 'flash' {obstacle}; using 'sdpa' instead")
    return obstacle is None


# A compiled graph takes the answer as a constant, and the line is written while it is traced. The decorator
# torch.compiler.assume_constant_result says the same, but imports the whole compiler, also where nobody compiles.
_runs_flash._dynamo_marked_constant = True


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _flash_obstacle(device: torch.device) -> str | None:
    if device.type == "cpu" and find_spec("triton"):
        from vitcourse.hardware.flash import ops

        if ops.is_interpreted():
            return None
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, and the tensors are on {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    return None if find_spec("triton") else "needs Triton, which is not installed"


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)
