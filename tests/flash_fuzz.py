"""FlashAttention against float64, on whatever runs the kernels: Triton's interpreter, or a GPU.

``test_flash.py`` runs this file in a process with TRITON_INTERPRET=1, and ``gpu/test_flash.py`` takes its tests over.
Every launch is guarded: each tensor is moved into a buffer of its own that is full of NaN, so that whatever is read
from outside of the tensor spoils the result, and whatever is written outside is seen.
"""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from benchmarks import tiles
from vitcourse import layers
from vitcourse.hardware import flash_attention, flash_attention_qkvpacked
from vitcourse.hardware.flash import ops, plans
from vitcourse.layers import dot_product
from vitcourse.vit import Attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # the interpreter knows no bfloat16 products
MARGIN = 512


def guarded(tensor: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """A copy of a tensor, with its strides, in a buffer of NaN; and a look at the buffer outside of it."""
    sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, tensor.stride(), strict=True))
    buffer = torch.full((span + 2 * MARGIN,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    buffer.as_strided(sizes, tensor.stride(), MARGIN).copy_(tensor[tuple(slice(size) for size in sizes)])
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided(sizes, tensor.stride(), MARGIN).zero_()
    return buffer.as_strided(tensor.shape, tensor.stride(), MARGIN), lambda: buffer[outside]


@pytest.fixture(autouse=True)
def guard(monkeypatch):
    launch = ops._launch

    def guarded_launch(plan, device, programs, *arguments):
        pairs = []

        def move(argument):
            if isinstance(argument, tuple):
                return tuple(map(move, argument))
            if not isinstance(argument, Tensor):
                return argument
            copy, outside = guarded(argument)
            pairs.append((argument, copy, outside))
            return copy

        launch(plan, device, programs, *map(move, arguments))
        for original, copy, outside in pairs:
            assert outside().isnan().all(), f"{plan.kernel} wrote outside of a tensor"
            if 0 not in original.stride():
                original.data.copy_(copy)

    monkeypatch.setattr(ops, "_launch", guarded_launch)


def inputs(n_q, n_k, dim, dtype, batch=1, heads=2, magnitude=1.0, seed=0, step=1 / 16):
    """q, k, v as views of one packed projection where they can be, and a gradient for the output.

    All are multiples of ``step``: their products are sums without rounding in float32, in whatever order a processor's
    matrix product adds. So what is compared is the arithmetic of the kernels.
    """
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, max(n_q, n_k), 3, heads, dim, generator=generator).div(step).round() * step * magnitude
    q, k, v = packed.to(DEVICE, dtype).permute(2, 0, 3, 1, 4)
    dout = torch.randn(batch, heads, n_q, dim, generator=generator).div(step).round().mul(step).to(DEVICE, dtype)
    return q[:, :, :n_q], k[:, :, :n_k], v[:, :, :n_k] / magnitude, dout


def plain_scores(q, k, bias=None, scale=None):
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores if bias is None else scores + bias


def plain(q, k, v, bias=None, *, scale=None):
    return plain_scores(q, k, bias, scale).softmax(dim=-1) @ v


def results(function, tensors, dout, dtype):
    """Output and gradients of all the tensors, in float64."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [t.detach().double() for t in (out, *torch.autograd.grad(out, leaves, dout.to(out.dtype)))]


def assert_as_exact_as_pytorch(q, k, v, dout, bias=None, scale=None):
    """At most twice the error of the plain equation in the same precision, of the output and of every gradient.

    Allowed besides is one rounding of the largest exponent: the backward pass subtracts lse, a float32, from scores. It
    is relative to the result, and for the bias to the sizes of the gradients of scores that are summed: those of a bias
    that all keys share cancel, since no softmax sees it.
    """
    tensors = (q, k, v) if bias is None else (q, k, v, bias)

    def ours(q, k, v, bias=None):
        return flash_attention(q, k, v, bias=bias, scale=scale)

    def theirs(q, k, v, bias=None):
        return plain(q, k, v, bias, scale=scale)

    exact = results(theirs, tensors, dout, torch.float64)
    baseline = results(theirs, tensors, dout, q.dtype)
    found = results(ours, tensors, dout, q.dtype)
    sizes = [true.abs().max().item() for true in exact]
    if bias is not None:
        whole = bias.expand(*q.shape[:3], k.shape[2])
        of_scores = results(theirs, (q, k, v, whole), dout, torch.float64)[4]
        sizes[4] = of_scores.abs().sum_to_size(bias.shape).max().item()
    exponent = 1.4427 * plain_scores(q, k, scale=scale).abs().max().item()
    names = ("out", "dq", "dk", "dv", "dbias")
    for name, got, base, true, size in zip(names, found, baseline, exact, sizes, strict=False):
        floor = 2**-24 * max(8, exponent) * max(1, size)
        error, allowed = (got - true).abs().max().item(), 2 * (base - true).abs().max().item() + floor
        assert error <= allowed, f"{name}: {error:.2e}, allowed are {allowed:.2e}"


def use_tiles(kind, monkeypatch):
    monkeypatch.setattr(plans, "_kind", lambda dtype, capability: kind)
    forget_plans()


def forget_plans():
    for choose in (plans.forward, plans.backward, plans.dbias):
        choose.cache_clear()


@pytest.fixture(autouse=True)
def tiles_of_half_precision(monkeypatch):
    """For float32 too, on the interpreter: the same kernels, where a mistake cannot hide behind rounding."""
    if INTERPRETED:
        use_tiles("shared", monkeypatch)
    yield
    forget_plans()


# ---------------------------------------------------------------------------------------------------------- exactness

LENGTHS = [
    *[(1, 1, 16), (15, 17, 20), (50, 50, 32), (64, 16, 64), (65, 130, 16), (16, 197, 64), (33, 257, 32)],  # few keys
    *[
        (20, 50, 40),
        (9, 65, 80),
        (9, 300, 72),
        (17, 300, 20),
        (130, 577, 16),
        (3, 64, 128),
        (70, 280, 32),
    ],  # many keys, or a large D
]


@pytest.mark.parametrize(("n_q", "n_k", "dim"), LENGTHS)
def test_float32(n_q, n_k, dim):
    assert_as_exact_as_pytorch(*inputs(n_q, n_k, dim, torch.float32, heads=1 if n_q > 100 else 2))


@pytest.mark.parametrize(("n_q", "n_k"), [(20, 50), (20, 290)])
def test_float32_is_multiplied_in_float32(n_q, n_k):
    """Not in TensorFloat-32, whose eleven bits would be off by 1e-3: these inputs have all twenty-four."""
    q, k, v, dout = inputs(n_q, n_k, 16, torch.float32, step=2**-22)
    found = results(flash_attention, (q, k, v), dout, torch.float32)
    for got, true in zip(found, results(plain, (q, k, v), dout, torch.float64), strict=True):
        torch.testing.assert_close(got, true, atol=1e-5, rtol=1e-5)


def test_tiles_of_float32(monkeypatch):
    use_tiles("float32", monkeypatch)
    assert_as_exact_as_pytorch(*inputs(20, 50, 16, torch.float32), bias=bias_like((20, 50)))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("n_q", "n_k", "dim"), [(50, 50, 64), (197, 197, 32), (5, 128, 128), (20, 290, 80)])
def test_half_precision(n_q, n_k, dim, dtype):
    assert_as_exact_as_pytorch(*inputs(n_q, n_k, dim, dtype, heads=1))


@pytest.mark.parametrize("n_k", [20, 290])
@pytest.mark.parametrize("magnitude", [2**-10, 8, 32])
def test_small_and_large_logits(n_k, magnitude):
    """Scores of up to several thousand: only relative to their maximum can they be exponentiated."""
    assert_as_exact_as_pytorch(*inputs(20, n_k, 32, torch.float32, heads=1, magnitude=magnitude))


@pytest.mark.parametrize("scale", [0.0, 1.7, -0.3])
@pytest.mark.parametrize("n_k", [20, 290])
def test_scales(scale, n_k):
    assert_as_exact_as_pytorch(*inputs(20, n_k, 16, torch.float32, heads=1), scale=scale)


@pytest.mark.skipif(not INTERPRETED, reason="takes the compiler minutes, and benchmarks/tiles.py does it anyway")
@pytest.mark.parametrize(("step", "biased"), [("forward", False), ("backward", False), ("dbias", True)])
def test_all_tiles_give_the_same(step, biased, monkeypatch, capsys):
    """Those that ``benchmarks/tiles.py`` tries, which would not time one that differs."""
    monkeypatch.setattr(tiles, "in_turns", lambda steps, *_: {name: [1.0, 1.0] for name in steps})
    monkeypatch.setattr(tiles, "DTYPE", torch.float16)
    monkeypatch.setattr(tiles, "HEADS", {16: 1})
    shape = tiles.Shape(20, 16, 1, biased)
    rows = tiles.measure(step, shape, DEVICE, (9, 0), lambda work: work, rounds=2)
    assert capsys.readouterr().err == ""
    assert len(rows) == len(list(tiles.candidates(step, shape, (9, 0)))) > 20
    assert [row["speedup"] for row in rows if row["ships"]] == [1]


def test_a_tiling_that_differs_is_not_timed():
    right = torch.ones(3), torch.full((2,), 4.0)
    assert tiles.agree(right, (right[0], right[1] + 1e-3))
    assert not tiles.agree(right, (right[0], right[1] + 1))
    assert not tiles.agree((right[0] * torch.nan, right[1]), right)


# --------------------------------------------------------------------------------------------------------------- bias


def bias_like(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)


@pytest.mark.parametrize("shape", [(1, 2, 20, 30), (3, 1, 1, 30), (20, 30), (3, 2, 20, 1)])
def test_bias_and_its_gradient(shape):
    assert_as_exact_as_pytorch(*inputs(20, 30, 16, torch.float32, batch=3), bias=bias_like(shape))


def test_bias_over_several_tiles():
    assert_as_exact_as_pytorch(*inputs(70, 70, 16, torch.float32), bias=bias_like((1, 70, 70)))


def test_bias_of_windows_in_half_precision():
    """Of seven times seven patches, as in Swin: the kernels for few keys, and a bias in float32 beside them."""
    q, k, v, dout = inputs(49, 49, 32, torch.float16, batch=2)
    bias = bias_like((1, 2, 49, 49))
    exact = results(plain, (q, k, v, bias), dout, torch.float64)
    baseline = results(plain, (q, k, v, bias), dout, torch.float16)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, bias)]
    out = flash_attention(*leaves[:3], bias=leaves[3])
    gradients = torch.autograd.grad(out, leaves, dout)
    assert [g.dtype for g in gradients] == [torch.float16] * 3 + [torch.float32]
    for got, base, true in zip((out.detach(), *gradients), baseline, exact, strict=True):
        assert (got.double() - true).abs().max() <= 2 * (base - true).abs().max()


def test_the_gradient_of_a_shared_bias_is_added_up_in_parts(monkeypatch):
    monkeypatch.setattr(plans, "BIAS_PROGRAMS", 4)  # two heads: two parts of three batch entries, or of two
    assert_as_exact_as_pytorch(*inputs(5, 6, 16, torch.float32, batch=5), bias=bias_like((1, 2, 5, 6)))


@pytest.mark.parametrize("n_k", [20, 290])
def test_minus_infinity_hides_keys(n_k):
    q, k, v, dout = inputs(7, n_k, 16, torch.float32)
    bias = bias_like((1, 1, 7, n_k))
    bias[..., 3, : n_k - 1] = -torch.inf
    bias[..., 5, n_k // 2 :] = -torch.inf
    assert_as_exact_as_pytorch(q, k, v, dout, bias=bias)


@pytest.mark.parametrize("n_k", [20, 290])
def test_a_query_that_sees_no_key_gets_zero(n_k):
    q, k, v, dout = (t.requires_grad_() for t in inputs(7, n_k, 16, torch.float32))
    bias = torch.zeros(1, 1, 7, n_k, device=DEVICE)
    bias[..., 3, :] = -torch.inf
    bias.requires_grad_()
    found = flash_attention(q, k, v, bias=bias)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert not found[:, :, 3].any()
    torch.testing.assert_close(found, expected)
    seen = [i for i in range(7) if i != 3]
    gradients = torch.autograd.grad(found, (q, k, v, bias), dout)
    without = F.scaled_dot_product_attention(q[:, :, seen], k, v, attn_mask=bias[:, :, seen])
    expected = torch.autograd.grad(without, (q, k, v, bias), dout[:, :, seen])
    for got, true in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, true, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # kernels for many keys, and for few
def test_the_lowest_number_there_is_hides_no_key(dtype, bias_dtype):
    """Who sees nothing else weighs all such keys alike, as in the plain equation, and so do the gradients.

    Times log₂e the number would be −∞; and in a float32 that is as low, the logarithm of a sum is lost.
    """
    q, k, v, dout = inputs(9, 21, 16, dtype)
    low, bias = torch.finfo(bias_dtype).min, bias_like((1, 2, 9, 21), bias_dtype)
    bias[..., 4:7] = low
    bias[..., 0, :] = low
    bias[..., 1, :] = max(low, -1e30)
    bias[..., 2, :] = low
    bias[..., 2, 3] = max(low, -3e38) / 2  # far above the others
    bias[..., 3, :9], bias[..., 3, 9:] = -torch.inf, low
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v, bias)]
    out = flash_attention(*leaves[:3], bias=leaves[3])
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    true = [tensor.detach().double().requires_grad_() for tensor in (q, k, v, bias)]
    expected = plain(*true)
    expected = [expected, *torch.autograd.grad(expected, true, dout.double())]
    for got, exact in zip(found, expected, strict=True):
        step = max(torch.finfo(t).eps for t in (dtype, got.dtype))
        if bias_dtype == torch.float16:
            step = 2**-24 * 65504  # beside which float32 rounds a score to this
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=8 * step * max(1, exact.abs().max().item()))


# ------------------------------------------------------------------------------------------------------------ layouts


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "cut from a larger tensor": lambda x: F.pad(x, (3, 2, 1, 4), value=torch.nan)[:, :, 1:-4, 3:-2],
    "sequence first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "head dimension first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other element": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "one batch entry for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    """The same bits as from contiguous tensors."""
    q, k, v, dout = inputs(19, 35, 24, torch.float16, batch=2)
    views = [LAYOUTS[layout](t) for t in (q, k, v, dout)]
    found, expected = [
        results(flash_attention_of_any_layout, tensors, tensors[3], torch.float16)
        for tensors in (views, [t.clone(memory_format=torch.contiguous_format) for t in views])
    ]
    for got, true in zip(found, expected, strict=True):
        assert torch.equal(got, true)


def test_rows_too_far_apart(monkeypatch):
    """Inputs are copied, outputs and gradients brought back from copies."""
    cases = [inputs(9, n_k, 16, torch.float16) for n_k in (20, 280)]
    expected = [results(flash_attention, (q, k, v), dout, torch.float16) for q, k, v, dout in cases]
    monkeypatch.setattr(ops, "ROWS_APART", 17)
    for (q, k, v, dout), near in zip(cases, expected, strict=True):
        found = results(flash_attention, (q, k, v), dout, torch.float16)
        assert all(torch.equal(got, true) for got, true in zip(found, near, strict=True))


def flash_attention_of_any_layout(q, k, v, dout):
    return flash_attention(q, k, v) + 0 * dout


def test_merging_the_heads_costs_no_copy():
    q, k, v, _ = inputs(5, 6, 16, torch.float32)
    out = flash_attention(q, k, v)
    assert out.shape == (1, 2, 5, 16)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("biased", [False, True])
def test_packed_is_the_same_and_so_is_its_gradient(biased):
    n, bias = 21, bias_like((1, 2, 21, 21)) if biased else None
    qkv = torch.randn(1, n, 3, 2, 16, device=DEVICE, dtype=torch.float16, requires_grad=True)
    dout = torch.randn(1, 2, n, 16, device=DEVICE, dtype=torch.float16)
    leaves = [qkv] if bias is None else [qkv, bias.requires_grad_()]
    for scale in (None, -0.4):
        packed = flash_attention_qkvpacked(qkv, scale=scale, bias=bias)
        apart = flash_attention(*qkv.permute(2, 0, 3, 1, 4), scale=scale, bias=bias)
        assert torch.equal(packed, apart)
        gradients = [torch.autograd.grad(o, leaves, dout) for o in (packed, apart)]
        assert gradients[0][0].is_contiguous() or scale
        for got, true in zip(*gradients, strict=True):
            assert torch.equal(got, true)


@pytest.mark.parametrize("strides", [(2**31 + 8, 0, 16, 1), (0, 0, 2**22 - 8, 1)], ids=["batch", "rows"])
def test_offsets_beyond_2_to_the_31(strides, monkeypatch):
    """Of a batch entry, and of a row among 520: more than 32 bits hold."""
    monkeypatch.undo()  # guards would fill gigabytes
    q, k, v, _ = inputs(3, 520, 16, torch.float16, batch=2 if strides[0] else 1, heads=1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(k.shape, strides, strict=True))
    far = torch.empty(span, dtype=k.dtype, device=DEVICE).as_strided(k.shape, strides)
    assert span > 2**31
    assert torch.equal(flash_attention(q, far.copy_(k), v), flash_attention(q, k, v))


# -------------------------------------------------------------------------------------------------- corners, bad input


def test_the_same_bits_every_time():
    for n_k in (50, 290):
        q, k, v, dout = inputs(20, n_k, 16, torch.float16, batch=1 if INTERPRETED else 64)
        bias = bias_like((1, 2, 20, n_k), torch.float16)
        first, second = [results(flash_attention_with_bias, (q, k, v, bias), dout, torch.float16) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def flash_attention_with_bias(q, k, v, bias):
    return flash_attention(q, k, v, bias=bias)


@pytest.mark.parametrize("shape", [(0, 2, 5, 6), (2, 0, 5, 6), (2, 2, 0, 6), (2, 2, 5, 0), (2, 2, 0, 0)])
def test_nothing_to_do(shape):
    """The value that scaled_dot_product_attention gives (but for PyTorch 2.11's, which divides by no heads): zeros."""
    b, h, n_q, n_k = shape
    q = torch.randn(b, h, n_q, 16, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(b, h, n_k, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    bias = torch.zeros(1, 1, n_q, n_k, device=DEVICE, requires_grad=True)
    out = flash_attention(q, k, v, bias=bias)
    assert torch.equal(out, torch.zeros_like(q))
    for leaf, gradient in zip((q, k, v, bias), torch.autograd.grad(out.sum(), (q, k, v, bias)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("n_k", [20, 290])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_go_where_pytorch_lets_them_go(n_k, value):
    for spoilt in range(3):
        tensors = [t.clone() for t in inputs(7, n_k, 16, torch.float32)[:3]]
        tensors[spoilt][0, 1, 2, 3] = value
        with sdpa_kernel(SDPBackend.MATH):  # a fused one may make three products of one, and ∞ − ∞ of ∞
            expected = F.scaled_dot_product_attention(*tensors)
        found = flash_attention(*tensors)
        torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_autocast():
    q, k, v, _ = inputs(9, 9, 16, torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        out = flash_attention(q, k.half(), v)
        packed = flash_attention_qkvpacked(torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2))
    assert torch.equal(out, flash_attention(q.half(), k.half(), v.half()))
    assert torch.equal(out, packed)


def test_what_does_not_fit_is_refused():
    q, k, v, _ = inputs(5, 6, 16, torch.float32)
    for wrong in ((q[0], k, v), (q, k, v[..., None])):
        with pytest.raises(ValueError, match=r"must be \(B, H, N, D\), got"):
            flash_attention(*wrong)
    for wrong in ((q[:, :1], k, v), (q, k[:, :, :5], v), (q, k, v[..., :8]), (q[..., :8], k, v)):
        with pytest.raises(ValueError, match=r"do not fit together: \(1, .*backend='sdpa'"):
            flash_attention(*wrong)
    with pytest.raises(ValueError, match=r"head dimension 129 is not within 1 … 128; use backend='sdpa'"):
        flash_attention(*[F.pad(t, (0, 113)) for t in (q, k, v)])
    with pytest.raises(TypeError, match=r"differ in type: torch.float32, torch.float16, torch.float32; cast"):
        flash_attention(q, k.half(), v)
    for dtype in (torch.int64, torch.float64):
        with pytest.raises(TypeError, match=rf"q, k and v are {dtype}; use float16, bfloat16 or float32"):
            flash_attention(*[t.to(dtype) for t in (q, k, v)])
    with pytest.raises(ValueError, match="different devices: .*, meta, "):
        flash_attention(q, k.to("meta"), v)
    with pytest.raises(ValueError, match=r"qkv must be \(B, N, 3, H, D\), got \(1, 2, 5, 16\)"):
        flash_attention_qkvpacked(q)


def test_a_bias_that_does_not_fit_is_refused():
    q, k, v, _ = inputs(5, 6, 16, torch.float32)
    for shape in ((5, 5), (3, 5, 6), (1, 1, 2, 5, 6), (2, 1, 5, 6)):
        with pytest.raises(ValueError, match=r"cannot be broadcast to \(B, H, N_q, N_k\) = \(1, 2, 5, 6\)"):
            flash_attention(q, k, v, bias=torch.zeros(shape, device=DEVICE))
    with pytest.raises(TypeError, match=r"bias is torch.bool; use a floating-point type, and -torch.inf"):
        flash_attention(q, k, v, bias=torch.ones(5, 6, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match="bias lies on meta, and q on"):
        flash_attention(q, k, v, bias=torch.zeros(5, 6, device="meta"))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU multiplies bfloat16")
def test_the_interpreter_makes_nonsense_of_bfloat16_and_is_not_asked():
    q, k, v, _ = inputs(5, 6, 16, torch.bfloat16)
    with pytest.raises(TypeError, match="bfloat16, of which Triton's interpreter makes nonsense; use float16"):
        flash_attention(q, k, v)


def test_there_is_no_second_derivative():
    qkv, _ = packed_inputs()
    leaves = qkv.requires_grad_(), bias_like((2, 21, 21)).requires_grad_()
    for function in (unpacked, packed):
        for leaf in leaves:
            (gradient,) = torch.autograd.grad(function(*leaves).sum(), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative; use backend='math'"):
                gradient.sum().backward()


# ---------------------------------------------------------------------------------------------- through the dispatcher


class Watch(TorchDispatchMode):
    """Notes the names of our operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "vitcourse":
            self.seen.append(function._opname)
        return function(*arguments, **(keywords or {}))


def unpacked(qkv, bias):
    return flash_attention(*ops.unpack(qkv), bias=bias)


def packed(qkv, bias):
    return flash_attention_qkvpacked(qkv, bias=bias)


def negative(qkv, bias):
    return flash_attention_qkvpacked(qkv, bias=bias, scale=-0.3)


def packed_inputs(n=21, dtype=torch.float16):
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(2, n, 3, 2, 16, generator=generator).to(DEVICE, dtype)
    return qkv, torch.randn(2, 2, n, 16, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("function", [unpacked, packed, negative])
def test_each_pass_is_its_operators(function, biased):
    qkv, dout = packed_inputs()
    leaves = [qkv.requires_grad_(), bias_like((1, 2, 21, 21)).requires_grad_()][: 1 + biased]
    with Watch() as watch:
        out = function(*leaves, *[None][biased:])
        torch.autograd.grad(out, leaves, dout)
    suffix = "_qkvpacked" if function is packed else ""
    assert watch.seen == [f"flash_forward{suffix}", *["flash_dbias"] * biased, f"flash_backward{suffix}"]


def test_without_gradients_there_is_no_node_in_the_graph():
    qkv, _ = packed_inputs()
    expected = packed(qkv, None)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            found = packed(qkv.requires_grad_(), None)
        assert found.grad_fn is None
        assert torch.equal(found, expected)


class Tagged(Tensor):
    """A subclass that looks at calls of functions, and leaves them as they are."""


def negated(tensor):
    """A view whose minus sign is left for the dispatcher to write."""
    return torch._neg_view(-tensor)


def test_views_and_subclasses_are_resolved_first():
    q, k, v, _ = (t.requires_grad_() for t in inputs(5, 6, 16, torch.float32))
    expected = flash_attention(q, k, v)
    assert negated(v).is_neg()
    for views in ((negated(q), k, v), (q, k, negated(v)), (q.as_subclass(Tagged), k, v), (nn.Parameter(q), k, v)):
        assert torch.equal(flash_attention(*views).as_subclass(Tensor), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_traced_as_one_operator():
    qkv, _ = packed_inputs()
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(unpacked, tracing_mode=mode)(qkv, None).graph
        assert torch.ops.vitcourse.flash_forward.default in [node.target for node in graph.nodes]
    graph = torch.jit.trace(lambda qkv: unpacked(qkv, None), (qkv,)).graph
    assert "vitcourse::flash_forward" in str(graph)


def test_mapped_over_a_dimension():
    q, k, v, _ = inputs(5, 6, 16, torch.float32)
    both = torch.stack([q, q / 2])
    found = torch.vmap(lambda one: flash_attention(one, k, v))(both)
    assert torch.equal(found, torch.stack([flash_attention(one, k, v) for one in both]))


def test_no_gradient_comes_from_no_gradient():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, _):
            return None

    qkv, _ = packed_inputs()
    for function in (unpacked, packed):
        out = Stop.apply(function(qkv.requires_grad_(), None))
        assert torch.autograd.grad(out.sum(), qkv, allow_unused=True) == (None,)


def test_a_tensor_that_was_overwritten_has_no_gradient():
    q, k, v, dout = inputs(5, 6, 16, torch.float32)
    q = q.clone().requires_grad_()
    out = flash_attention(q, k, v)
    with torch.no_grad():
        q.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


def test_what_is_saved_goes_through_hooks():
    """As in ``save_on_cpu``, and in checkpointing."""
    qkv, dout = packed_inputs()
    bias, kept = bias_like((2, 21, 21)), []
    leaves = qkv.requires_grad_(), bias.requires_grad_()

    def put_away(tensor):
        kept.append(tensor.clone())
        return len(kept) - 1

    expected = torch.autograd.grad(packed(*leaves), leaves, dout)
    with torch.autograd.graph.saved_tensors_hooks(put_away, kept.__getitem__):
        found = torch.autograd.grad(packed(*leaves), leaves, dout)
    again = torch.autograd.grad(checkpoint(packed, *leaves, use_reentrant=False), leaves, dout)
    assert len(kept) == 4  # qkv, bias, out and lse
    for first, second, true in zip(found, again, expected, strict=True):
        assert torch.equal(first, true)
        assert torch.equal(second, true)


def test_a_checkpoint_can_keep_what_attention_gave(monkeypatch):
    """Selective checkpointing finds the operator by its name, and does not run it again."""
    qkv, dout = packed_inputs()
    runs, forward = [], ops.launch_forward
    monkeypatch.setattr(ops, "launch_forward", lambda *arguments: (runs.append(arguments), forward(*arguments))[1])
    expected = torch.autograd.grad(packed(qkv.requires_grad_(), None), qkv, dout)
    for kept, wanted in (([], 2), ([torch.ops.vitcourse.flash_forward_qkvpacked.default], 1)):
        runs.clear()
        contexts = partial(create_selective_checkpoint_contexts, kept)
        out = checkpoint(packed, qkv, None, use_reentrant=False, context_fn=contexts)
        assert torch.equal(torch.autograd.grad(out, qkv, dout)[0], expected[0])
        assert len(runs) == wanted


# ------------------------------------------------------------------------------------------------- as parts of PyTorch


def operator_inputs(name):
    qkv = torch.randn(1, 5, 3, 2, 16, device=DEVICE)
    bias = bias_like((1, 1, 5, 5))
    out, lse = torch.ops.vitcourse.flash_forward(*ops.unpack(qkv), bias, 0.25)
    dout = torch.randn(1, 5, 2, 16, device=DEVICE).transpose(1, 2)
    return {
        "flash_forward": (*(t.requires_grad_() for t in ops.unpack(qkv.clone())), bias.requires_grad_(), 0.25),
        "flash_forward_qkvpacked": (qkv.clone().requires_grad_(), bias.requires_grad_(), 0.25),
        "flash_backward": (dout, *ops.unpack(qkv), bias.detach(), out, lse, 0.25),
        "flash_backward_qkvpacked": (dout, qkv, bias.detach(), out, lse, 0.25),
        "flash_dbias": (dout, *ops.unpack(qkv), bias.detach(), out, lse, 0.25),
    }[name]


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_operators_are_registered_as_pytorch_wants_them(name):
    checks = opcheck(getattr(torch.ops.vitcourse, name).default, operator_inputs(name))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph(dynamic):
    q, k, v, dout = inputs(9, 9, 16, torch.float32)
    bias = bias_like((1, 2, 9, 9))
    compiled = torch.compile(flash_attention_with_bias, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found = results(compiled, (q, k, v, bias), dout, torch.float32)
    for got, true in zip(found, results(flash_attention_with_bias, (q, k, v, bias), dout, torch.float32), strict=True):
        assert torch.equal(got, true)


class OneLayer(nn.Module):
    """The way a Vision Transformer uses attention."""

    def __init__(self, backend="flash"):
        super().__init__()
        self.qkv, self.backend = nn.Linear(32, 96), backend

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return layers.attention(q, k, v, backend=self.backend).transpose(1, 2).flatten(2)


def allow_this_device(monkeypatch):
    """Let the door look up measurements of this device, be it a CPU with the interpreter."""
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_the_door_opens_wherever_the_kernels_run(capsys):
    q, k, v, _ = inputs(5, 6, 16, torch.float32)
    assert torch.equal(layers.attention(q, k, v, backend="flash"), flash_attention(q, k, v))
    packed = torch.stack([q, q, q]).permute(1, 3, 0, 2, 4)
    assert torch.equal(layers.attention_qkvpacked(packed, backend="flash"), flash_attention(q, q, q))
    assert capsys.readouterr().err == ""


def test_export_and_the_door(monkeypatch):
    allow_this_device(monkeypatch)
    layer, x = OneLayer().to(DEVICE), torch.randn(2, 9, 32, device=DEVICE)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: tokens},))
    assert [n.target for n in program.graph.nodes].count(torch.ops.vitcourse.flash_forward.default) == 1
    x = torch.randn(2, 21, 32, device=DEVICE)
    assert torch.equal(program.module()(x), layer(x))
    layer.backend = "math"
    torch.testing.assert_close(program.module()(x), layer(x), atol=1e-5, rtol=1e-5)


def test_a_model_gets_its_gradient_packed(monkeypatch):
    """Nothing is left to stack, nor to copy into the order of the projection."""
    allow_this_device(monkeypatch)
    layer, x = Attention(32, 2).to(DEVICE), torch.randn(2, 9, 32, device=DEVICE)
    gradients = []
    for layer.backend in ("flash", "math"):
        out = layer(x)
        gradients.append(torch.autograd.grad(out.square().sum(), list(layer.parameters())))
    for got, true in zip(*gradients, strict=True):
        torch.testing.assert_close(got, true, atol=1e-4, rtol=1e-4)
    layer.backend = "flash"
    node = layer(x).grad_fn
    while "flash" not in node.name():
        node = next(parent for parent, _ in node.next_functions if parent and "Accumulate" not in parent.name())
    assert "flash_forward_qkvpacked" in node.name()


def test_auto_takes_the_kernels_only_where_they_were_measured_to_be_faster(monkeypatch):
    allow_this_device(monkeypatch)
    q, k, v, _ = inputs(5, 6, 16, torch.float32)
    capability = torch.cuda.get_device_capability(DEVICE)
    assert not dot_product._flash_is_faster(q, k, v, None)
    ranges = (1, 4, 1), (6, 8, 2)
    monkeypatch.setattr(plans, "FASTER", {(capability, torch.float32, 16, False, False): ranges})
    assert dot_product._flash_is_faster(q, k, v, None)
    assert not dot_product._flash_is_faster(q[:, :1], k[:, :1], v[:, :1], None), "one sequence, of two at least"
    assert not dot_product._flash_is_faster(q, k[:, :, :5], v[:, :, :5], None)
    assert not dot_product._flash_is_faster(q.half(), k.half(), v.half(), None)
    assert not dot_product._flash_is_faster(q, k, v[..., :8], None)
    assert not dot_product._flash_is_faster(q.clone().requires_grad_(), k, v, None)
    with torch.no_grad():
        assert dot_product._flash_is_faster(q.clone().requires_grad_(), k, v, None)
    bias = torch.zeros(5, 6, device=DEVICE)
    assert not dot_product._flash_is_faster(q, k, v, bias)
    monkeypatch.setattr(plans, "FASTER", {(capability, torch.float32, 16, False, True): ranges})
    assert dot_product._flash_is_faster(q, k, v, bias)
    assert not dot_product._flash_is_faster(q, k, v, bias.requires_grad_())
