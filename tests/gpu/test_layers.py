"""Attention on CUDA: every backend against float64, at the lengths that Vision Transformers have."""

import pytest
import torch
import torch.nn.functional as F

from vitcourse.layers import ATTENTION_BACKENDS, DropPath, attention

from .parity import relative_error

pytestmark = pytest.mark.gpu

LENGTHS = [50, 197, 577]


def inputs(tokens: int, biased: bool) -> list[torch.Tensor]:
    """q, k, v (2, 3, N, 64) and, where ``biased``, a bias (1, 3, N, N), in float64."""
    shapes = [(2, 3, tokens, 64)] * 3 + [(1, 3, tokens, tokens)] * biased
    return [torch.randn(shape, dtype=torch.float64, device="cuda") for shape in shapes]


def plain(q, k, v, bias=None):
    """The equation, rounded after every step: the baseline in half precision."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


def errors(function, tensors, exact_tensors) -> list[float]:
    """Relative errors of the output and of the gradients of all inputs."""
    found = []
    for run, given in ((plain, exact_tensors), (function, tensors)):
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        output = run(*leaves)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        found.append([output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)])
    return [relative_error(got, exact) for exact, got in zip(*found, strict=True)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("backend", ["auto", *ATTENTION_BACKENDS])
def test_float32_is_float64_but_for_rounding(backend, tokens, biased):
    exact = [t.float().double() for t in inputs(tokens, biased)]

    def ours(q, k, v, bias=None):
        return attention(q, k, v, bias=bias, backend=backend)

    output, *gradients = errors(ours, [t.float() for t in exact], exact)
    assert output <= 1e-5
    assert max(gradients) <= 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("backend", ["auto", *ATTENTION_BACKENDS])
def test_half_precision_errs_at_most_twice_as_much_as_the_equation(backend, tokens, biased, dtype):
    half = [t.to(dtype) for t in inputs(tokens, biased)]
    exact = [t.double() for t in half]

    def ours(q, k, v, bias=None):
        return attention(q, k, v, bias=bias, backend=backend)

    for own, baseline in zip(errors(ours, half, exact), errors(plain, half, exact), strict=True):
        assert 0 < own <= 2 * baseline


@pytest.mark.parametrize("backend", ["auto", *ATTENTION_BACKENDS])
def test_minus_infinity_hides_a_key(backend):
    q, k, v = (t.float() for t in inputs(50, biased=False))
    bias = torch.zeros(1, 1, 1, 50, device="cuda")
    bias[..., 20:] = -torch.inf
    hidden = attention(q, k, v, bias=bias, backend=backend)
    assert relative_error(hidden, attention(q, k[:, :, :20], v[:, :, :20], backend="math")) <= 1e-5


def test_auto_never_fails_where_sdpa_works():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        q, k, v, bias = (t.to(dtype) for t in inputs(197, biased=True))
        for given in (None, bias):
            got, expected = attention(q, k, v, bias=given), F.scaled_dot_product_attention(q, k, v, given)
            assert (got.dtype, got.device) == (expected.dtype, expected.device)
            assert relative_error(got, expected) <= 8 * torch.finfo(dtype).eps


def test_stochastic_depth_draws_on_the_device():
    x = torch.ones(4096, 2, 3, device="cuda")
    y = DropPath(0.25).train()(x)
    assert y.is_cuda
    assert torch.equal(y, y[:, :1, :1].expand_as(y)), "a sample is dropped as a whole"
    kept = y[:, 0, 0] > 0
    assert y[kept].unique().item() == pytest.approx(4 / 3)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.04)  # six standard deviations
