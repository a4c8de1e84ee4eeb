"""The kernels as operators of PyTorch: ``torch.ops.vitcourse.flash_*``.

Registered with ``torch.library``, they compile and export as one node of a graph each. A fake kernel tells the
compiler what comes back, strides included, and autograd knows each operator's gradient.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from vitcourse.hardware.flash import plans
from vitcourse.hardware.flash.plans import Plan

LIBRARY = torch.library.Library("vitcourse", "FRAGMENT")
DEVICES = ("CUDA", "CPU")  # on a CPU through Triton's interpreter


def heads_last(like: Tensor) -> Tensor:
    """An empty (B, H, N, D) in the memory order (B, N, H, D): merging the heads afterwards costs no copy."""
    b, h, n, d = like.shape
    return like.new_empty(b, n, h, d).transpose(1, 2)


def readable(x: Tensor) -> Tensor:
    """``x`` as the kernels can read it: copied only if a row's elements are not side by side, or rows 2²² apart."""
    return x if x.stride(3) == 1 and x.stride(2) < 2**22 else x.contiguous()


def _strided(x: Tensor) -> tuple:
    return (x, *x.stride()[:3])


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _launch(plan: Plan, device: torch.device, programs: int, *arguments: Any) -> None:
    """Run a kernel. FP fusion, which makes a product and a sum one instruction, is not the default in every Triton."""
    import triton

    from vitcourse.hardware.flash import kernels

    kernel = getattr(kernels, plan.kernel)
    if device.type != "cuda":
        if isinstance(kernel, triton.JITFunction):
            raise RuntimeError(
                f"flash attention needs CUDA, and the tensors are on {device}; use backend='sdpa', "
                "or set TRITON_INTERPRET=1 before Triton is imported, to run the kernels slowly on a CPU"
            )
        kernel[(programs,)](*arguments, **plan.constants)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](
            *arguments,
            **plan.constants,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
            enable_fp_fusion=True,
        )


def _biased(bias: Tensor | None, q: Tensor, k: Tensor) -> tuple | None:
    """The bias as the kernels take it; what is broadcast has stride 0."""
    if bias is None:
        return None
    full = bias.expand(*q.shape[:3], k.shape[2])
    return (full, *full.stride())


# ------------------------------------------------------------------------------------------------------------ forward


def run_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output (B, H, N_q, D), and lse (B, H, N_q)."""
    q, k, v = map(readable, (q, k, v))
    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    out, lse = heads_last(q), q.new_empty(b, h, n_q, dtype=torch.float32)
    if n_k == 0:
        return out.zero_(), lse.fill_(torch.inf)
    if out.numel() == 0:
        return out, lse
    plan = plans.forward(n_k, d, q.element_size(), _capability(q.device))
    programs = -(-n_q // plan.constants["BLOCK_Q"])
    if plan.kernel == "forward_short" and b * h >= 2 * _multiprocessors(q.device):
        programs = 1
    tensors = _strided(q), _strided(k), _strided(v), _biased(bias, q, k), _strided(out), lse
    _launch(plan, q.device, b * h * programs, *tensors, h, n_q, n_k, programs, scale)
    return out, lse


# ----------------------------------------------------------------------------------------------------------- backward


def run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill the gradients of q, k and v."""
    if q.numel() == 0 or k.numel() == 0:  # no query looks at anything, or there is nothing to look at
        for gradient in gradients:
            gradient.zero_()
        return
    dout, q, k, v, out = map(readable, (dout, q, k, v, out))
    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    q_, k_, v_, out_, dout_, dq, dk, dv = map(_strided, (q, k, v, out, dout, *gradients))
    bias_ = _biased(bias, q, k)
    first, *second = plans.backward(n_k, d, q.element_size(), _capability(q.device))
    if first.kernel == "backward_short":
        tensors = q_, k_, v_, bias_, out_, lse, dout_, dq, dk, dv
        _launch(first, q.device, b * h, *tensors, h, n_q, n_k, scale)
        return
    delta = torch.empty_like(lse)
    programs = -(-n_q // first.constants["BLOCK_Q"])
    tensors = q_, k_, v_, bias_, out_, lse, dout_, dq, delta
    _launch(first, q.device, b * h * programs, *tensors, h, n_q, n_k, programs, scale)
    programs = -(-n_k // second[0].constants["BLOCK_K"])
    tensors = q_, k_, v_, bias_, lse, delta, dout_, dk, dv
    _launch(second[0], q.device, b * h * programs, *tensors, h, n_q, n_k, programs, scale)


def run_backward_bias(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """The gradient of the bias, in its shape and type."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(bias)
    dout, q, k, v, out = map(readable, (dout, q, k, v, out))
    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    plan = plans.backward_bias(n_k, d, q.element_size(), _capability(q.device))
    tiles = h * -(-n_q // plan.constants["BLOCK_Q"]) * -(-n_k // plan.constants["BLOCK_K"])
    # Entries of their own: one part each. Shared entries: parts enough for any chip, and the same on every chip.
    each = 1 if bias.shape[0] == b else -(-b // max(1, 1024 // tiles))
    parts = q.new_empty(-(-b // each), h, n_q, n_k, dtype=torch.float32)
    tensors = _strided(q), _strided(k), _strided(v), _biased(bias, q, k), _strided(out), lse, _strided(dout), parts
    _launch(plan, q.device, parts.shape[0] * tiles, *tensors, b, h, n_q, n_k, each, scale)
    return parts.sum_to_size(bias.shape).to(bias.dtype)
