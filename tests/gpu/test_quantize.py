"""Quantization on CUDA: the compiled kernels against exact sums, and whole models against the same on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitcourse import create_model
from vitcourse.hardware.quantize import SCHEMES, Int4Linear, Int8Linear, quantize, quantize_model

from .parity import relative_error

pytestmark = pytest.mark.gpu

operators = torch.ops.vitcourse
SHAPES = [
    (1, 768, 768),
    (1, 768, 3072),
    (8, 1100, 1030),
    (16, 64, 100),
    (33, 130, 40),
    (197, 768, 3072),
    (197, 3072, 768),
    (1576, 768, 2304),
    (12_608, 1024, 4096),
    (77, 1, 3),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_integer_products_are_exact(shape):
    M, K, N = shape
    x, w = (torch.randint(-128, 128, (rows, K), dtype=torch.int8, device="cuda") for rows in (M, N))
    one = torch.ones(max(M, N), 1, device="cuda")
    sums = operators.w8a8_linear(x, one[:M], w, one[:N], None, torch.float32)
    exact = x.double() @ w.double().t()
    assert torch.equal(sums.double(), exact.float().double())  # rounded once, to the type of the result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_scales_and_bias_err_no_more_than_the_type_of_the_result(shape, dtype):
    M, K, N = shape
    linear = nn.Linear(K, N, device="cuda")
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    tolerance = max(4 * torch.finfo(dtype).eps, 4e-6)

    int8 = Int8Linear(linear)
    q, scale = operators.quantize_per_token(x)
    expected_q, expected_scale = quantize(x.cpu())  # on CUDA, PyTorch divides by a number by multiplying
    assert torch.equal(q.cpu(), expected_q) and torch.equal(scale.cpu(), expected_scale)
    exact = (q.double() * scale) @ int8.dequantize().double().t() + linear.bias
    got = operators.w8a8_linear(q, scale, int8.weight_int8, int8.weight_scale, linear.bias, dtype)
    assert relative_error(got, exact) <= tolerance

    exact = F.linear(x.double(), int8.dequantize().double(), linear.bias.double())
    got = operators.w8a16_linear(x, int8.weight_int8, int8.weight_scale, linear.bias)
    assert relative_error(got, exact) <= tolerance
    for group_size in (32, 64, 128, 256):
        int4 = Int4Linear(linear, group_size=group_size)
        exact = F.linear(x.double(), int4.dequantize().double(), linear.bias.double())
        got = operators.w4a16_linear(x, int4.weight_packed, int4.weight_scale, linear.bias, group_size)
        assert relative_error(got, exact) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fixed_scale_rounds_as_on_the_cpu_and_loses_no_nan(dtype):
    x, scale = torch.randn(33, 1000).to(dtype), torch.full((1, 1), 0.01)
    x[1, 3], x[2, 999], x[3, 0] = torch.nan, -torch.inf, 1e30
    (q, rows), (expected_q, expected_rows) = (
        operators.quantize_per_tensor(*(tensor.to(device) for tensor in (x, scale))) for device in ("cuda", "cpu")
    )
    whole = expected_rows.isfinite().flatten()
    assert whole.sum() == 31
    assert torch.equal(q.cpu()[whole], expected_q[whole]) and torch.equal(rows.cpu()[whole], expected_rows[whole])
    assert rows.cpu()[~whole].isnan().all()


def test_weights_that_are_not_contiguous_are_read_as_they_are():
    x, (weight, scale) = torch.randn(33, 64, device="cuda").bfloat16(), quantize(torch.randn(40, 64, device="cuda"))
    strided = weight.t().contiguous().t()
    assert torch.equal(operators.w8a16_linear(x, strided, scale, None), operators.w8a16_linear(x, weight, scale, None))


def test_operators_are_registered_as_pytorch_wants_them():
    x, bias = torch.randn(5, 64, device="cuda", requires_grad=True), torch.randn(7, device="cuda", requires_grad=True)
    linear = nn.Linear(64, 7, device="cuda")
    int8, int4 = Int8Linear(linear), Int4Linear(linear, group_size=32)
    q, scale = quantize(x.detach())
    torch.library.opcheck(operators.quantize_per_token.default, (x.detach(),))
    torch.library.opcheck(operators.quantize_per_tensor.default, (x.detach(), torch.ones(1, 1, device="cuda")))
    torch.library.opcheck(
        operators.w8a8_linear.default, (q, scale, int8.weight_int8, int8.weight_scale, int8.bias, torch.bfloat16)
    )
    torch.library.opcheck(operators.w8a16_linear.default, (x, int8.weight_int8, int8.weight_scale, bias))
    torch.library.opcheck(operators.w4a16_linear.default, (x, int4.weight_packed, int4.weight_scale, None, 32))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_computes_as_on_the_cpu_and_compiles(scheme):
    model = create_model("vit_tiny", img_size=32, patch_size=8, num_classes=10, depth=2).eval()
    images = torch.randn(8, 3, 32, 32)
    small = quantize_model(model, scheme, batches=[images] if scheme == "w8a8_static" else None)
    with torch.inference_mode():
        expected = small(images)
        small, images = small.cuda(), images.cuda()
        # activations near a tie may round the other way
        tolerance = 0.01 if scheme.startswith("w8a8") else 1e-5
        assert relative_error(small(images).cpu(), expected) <= tolerance
        compiled = torch.compile(small, fullgraph=True)
        assert relative_error(compiled(images).cpu(), expected) <= tolerance
        with torch.autocast("cuda", torch.bfloat16):
            assert relative_error(small(images).float().cpu(), expected) <= 0.05
    exported = torch.export.export(small, (images,))
    with torch.inference_mode():
        assert relative_error(exported.module()(images).cpu(), expected) <= tolerance


def test_models_are_quantized_where_they_are():
    model = create_model("vit_tiny", img_size=32, patch_size=8, num_classes=10, depth=1).eval().cuda()
    images = torch.randn(4, 3, 32, 32)
    for scheme in SCHEMES:
        small = quantize_model(model, scheme, batches=[images] if scheme == "w8a8_static" else None)
        assert all(tensor.is_cuda for tensor in small.state_dict().values())
