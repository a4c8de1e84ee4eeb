"""The kernels as operators of PyTorch: ``torch.ops.vitcourse.flash_*``.

Registered with ``torch.library``, they compile and export as one node of a graph each. A fake kernel tells the
compiler what comes back, strides included, and autograd knows each operator's gradient. What that way through PyTorch
costs the processor is measured by ``benchmarks/dispatch.py``; a compiled model or a CUDA graph does not pay it.
"""

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vitcourse.hardware.flash import plans
from vitcourse.hardware.flash.plans import Plan

operators = torch.ops.vitcourse
LIBRARY = torch.library.Library("vitcourse", "FRAGMENT")
DEVICES = ("CUDA", "CPU")  # on a CPU through Triton's interpreter
ROWS_APART = 2**22  # elements between two rows: 128 of them must stay below 2³¹


def heads_last(like: Tensor) -> Tensor:
    """An empty (B, H, N, D) in the memory order (B, N, H, D): merging the heads afterwards costs no copy."""
    b, h, n, d = like.shape
    return like.new_empty_strided((b, h, n, d), (n * h * d, d, h * d, 1))


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """A tensor as the kernels take it: copied only if a row's elements are not side by side, or rows too far apart."""
    b, h, n, d = x.stride()
    if d == 1 and n < ROWS_APART:
        return x, b, h, n
    x = x.contiguous()
    return (x, *x.stride()[:3])


def _bring_back(tensors: tuple[Tensor, ...], written: tuple[tuple, ...]) -> None:
    """Where `_strided` made a copy, that is what a kernel has written to."""
    for tensor, (buffer, *_) in zip(tensors, written, strict=True):
        if buffer is not tensor:
            tensor.copy_(buffer)


def _in_units(arguments: tuple, head_dim: int) -> tuple[tuple, int]:
    """Strides in elements, or in eights where heads of 72 or 88, for instance, make that news to the compiler."""
    if head_dim % 16 != 8 or any(stride % 8 for a in arguments if _is_matrix(a) for stride in a[1:]):
        return arguments, 1
    return tuple((a[0], *(stride // 8 for stride in a[1:])) if _is_matrix(a) else a for a in arguments), 8


def _is_matrix(argument: Any) -> bool:
    """Whether it is what `_strided` makes; a bias has one stride more."""
    return isinstance(argument, tuple) and len(argument) == 4


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def is_interpreted() -> bool:
    """Whether the kernels run on a CPU: Triton decides by TRITON_INTERPRET, once, when they are imported."""
    import triton

    from vitcourse.hardware.flash import kernels

    return not isinstance(kernels.forward_long, triton.JITFunction)


@cache
def _kernel(name: str, device: torch.device) -> Any:
    """A kernel that can run on this device."""
    from vitcourse.hardware.flash import kernels

    kernel = getattr(kernels, name)
    if device.type == "cpu" and not is_interpreted():
        raise RuntimeError(
            f"flash attention needs CUDA, and the tensors are on {device}; use backend='sdpa', "
            "or set TRITON_INTERPRET=1 before Triton is imported, to run the kernels slowly on a CPU"
        )
    return kernel


def _launch(plan: Plan, device: torch.device, programs: int, *arguments: Any) -> None:
    """Run a kernel. FP fusion, which makes a product and a sum one instruction, is not the default in every Triton."""
    kernel = _kernel(plan.kernel, device)
    arguments, unit = _in_units(arguments, plan.constants["HEAD_DIM"])
    if device.type == "cpu":
        if arguments[0][0].dtype == torch.bfloat16:
            raise TypeError("q, k and v are bfloat16, of which Triton's interpreter makes nonsense; use float16")
        kernel[(programs,)](*arguments, UNIT=unit, **plan.constants)
        return
    with nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device):
        kernel[(programs,)](
            *arguments,
            UNIT=unit,
            **plan.constants,
            num_warps=plan.warps,
            num_stages=plan.stages,
            enable_fp_fusion=True,
        )


def _biased(bias: Tensor | None, q: Tensor, k: Tensor) -> tuple | None:
    """The bias as the kernels take it; what is broadcast has stride 0."""
    if bias is None:
        return None
    full = bias.expand(*q.shape[:3], k.shape[2])
    return (full, *full.stride())


# ------------------------------------------------------------------------------------------------------------ forward


def launch_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output (B, H, N_q, D), and lse (B, H, N_q), with a bias (B, H, 2, N_q): see :mod:`.kernels`."""
    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    out, lse = _fake_forward(q, k, v, bias, scale)
    if n_k == 0:
        return out.zero_(), lse.fill_(torch.inf)
    if out.numel() == 0:
        return out, lse
    device = q.device
    plan = plans.forward(n_k, d, q.dtype, _capability(device), bias is not None)
    programs = -(-n_q // plan.constants["BLOCK_Q"])
    if plan.kernel == "forward_short" and b * h >= 2 * _multiprocessors(device):
        programs = 1
    tensors = _strided(q), _strided(k), _strided(v), _biased(bias, q, k), _strided(out), lse
    _launch(plan, device, b * h * programs, *tensors, h, n_q, n_k, programs, scale)
    _bring_back((out,), (tensors[4],))
    return out, lse


# ----------------------------------------------------------------------------------------------------------- backward


def launch_backward(
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
    b, h, n_q, d = q.shape
    n_k, device = k.shape[2], q.device
    q_, k_, v_, out_, dout_, dq, dk, dv = map(_strided, (q, k, v, out, dout, *gradients))
    bias_ = _biased(bias, q, k)
    first, *second = plans.backward(n_k, d, q.dtype, _capability(device), bias is not None)
    if first.kernel == "backward_short":
        tensors = q_, k_, v_, bias_, out_, lse, dout_, dq, dk, dv
        _launch(first, device, b * h, *tensors, h, n_q, n_k, scale)
        _bring_back(gradients, (dq, dk, dv))
        return
    delta = lse.new_empty(b, h, n_q)
    programs = -(-n_q // first.constants["BLOCK_Q"])
    tensors = q_, k_, v_, bias_, out_, lse, dout_, dq, delta
    _launch(first, device, b * h * programs, *tensors, h, n_q, n_k, programs, scale)
    programs = -(-n_k // second[0].constants["BLOCK_K"])
    tensors = q_, k_, v_, bias_, lse, delta, dout_, dk, dv
    _launch(second[0], device, b * h * programs, *tensors, h, n_q, n_k, programs, scale)
    _bring_back(gradients, (dq, dk, dv))


def flash_dbias(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """The gradient of the bias, in its shape and type."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(bias)
    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    plan = plans.dbias(d, q.dtype, _capability(q.device))
    tiles = h * -(-n_q // plan.constants["BLOCK_Q"]) * -(-n_k // plan.constants["BLOCK_K"])
    each = 1 if bias.shape[0] == b else -(-b // max(1, plans.BIAS_PROGRAMS // tiles))
    parts = q.new_empty(-(-b // each), h, n_q, n_k, dtype=torch.float32)
    tensors = _strided(q), _strided(k), _strided(v), _biased(bias, q, k), _strided(out), lse, _strided(dout), parts
    _launch(plan, q.device, parts.shape[0] * tiles, *tensors, b, h, n_q, n_k, each, scale)
    return parts.sum_to_size(bias.shape).to(bias.dtype)


# ------------------------------------------------------------------------------------------------- the five operators


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, H, N, D) as views of (B, N, 3, H, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = heads_last(q), heads_last(k), heads_last(v)
    launch_backward(dout, q, k, v, bias, out, lse, scale, gradients)
    return gradients


def flash_forward_qkvpacked(qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return launch_forward(*unpack(qkv), bias, scale)


def flash_backward_qkvpacked(
    dout: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """The three gradients, written where they belong in one: nothing is left to stack."""
    gradient = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    launch_backward(dout, *unpack(qkv), bias, out, lse, scale, unpack(gradient))
    return gradient


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    b, h, n_q, _ = q.shape
    return heads_last(q), q.new_empty((b, h, n_q) if bias is None else (b, h, 2, n_q), dtype=torch.float32)


OPERATORS = {
    "flash_forward": (
        "(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale) -> (Tensor, Tensor)",
        launch_forward,
        _fake_forward,
    ),
    "flash_backward": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, float scale)"
        " -> (Tensor, Tensor, Tensor)",
        flash_backward,
        lambda dout, q, k, v, bias, out, lse, scale: (heads_last(q), heads_last(k), heads_last(v)),
    ),
    "flash_dbias": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor out, Tensor lse, float scale) -> Tensor",
        flash_dbias,
        lambda dout, q, k, v, bias, out, lse, scale: torch.empty_like(bias, memory_format=torch.contiguous_format),
    ),
    "flash_forward_qkvpacked": (
        "(Tensor qkv, Tensor? bias, float scale) -> (Tensor, Tensor)",
        flash_forward_qkvpacked,
        lambda qkv, bias, scale: _fake_forward(*unpack(qkv), bias, scale),
    ),
    "flash_backward_qkvpacked": (
        "(Tensor dout, Tensor qkv, Tensor? bias, Tensor out, Tensor lse, float scale) -> Tensor",
        flash_backward_qkvpacked,
        lambda dout, qkv, bias, out, lse, scale: torch.empty_like(qkv, memory_format=torch.contiguous_format),
    ),
}
for _name, (_schema, _run, _fake) in OPERATORS.items():
    torch.library.define(f"vitcourse::{_name}", _schema, lib=LIBRARY, tags=torch.Tag.pt2_compliant_tag)
    for _device in DEVICES:
        LIBRARY.impl(_name, _run, _device)
    torch.library.register_fake(f"vitcourse::{_name}", _fake, lib=LIBRARY)


# ----------------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    arguments = dout, *ctx.saved_tensors, ctx.scale
    dbias = operators.flash_dbias(*arguments) if ctx.needs_input_grad[3] else None
    return *operators.flash_backward(*arguments), dbias, None


def _differentiate_qkvpacked(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 3
    qkv, *others = ctx.saved_tensors
    dbias = operators.flash_dbias(dout, *unpack(qkv), *others, ctx.scale) if ctx.needs_input_grad[1] else None
    return operators.flash_backward_qkvpacked(dout, qkv, *others, ctx.scale), dbias, None


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise RuntimeError("flash attention has no second derivative; use backend='math'")


for _name, _keep, _gradient in (
    ("flash_forward", _save, _differentiate),
    ("flash_forward_qkvpacked", _save, _differentiate_qkvpacked),
    ("flash_backward", None, _no_second_derivative),
    ("flash_dbias", None, _no_second_derivative),
    ("flash_backward_qkvpacked", None, _no_second_derivative),
):
    torch.library.register_autograd(f"vitcourse::{_name}", _gradient, setup_context=_keep, lib=LIBRARY)
