"""Quantization's products: operators, Triton kernels on the interpreter and compiled, and their benchmark."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common
from benchmarks import quantization as benchmark
from vitcourse.hardware.quantize import (
    SCHEMES,
    Int4Linear,
    Int8Linear,
    dequantize,
    formulas,
    onnx_export,
    ops,
    pack_int4,
    quantize,
    tilings,
    unpack_int4,
)
from vitcourse.hardware.quantize.checks import FLOATS, GROUP_SIZES


def four_bit(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(N, K) as the operator takes it: packed (N, G · group_size / 2), and its scale (N, G)."""
    q, scale = quantize(weight, 4, group_size)
    groups = F.pad(q, (0, -q.shape[1] % group_size)).unflatten(1, (-1, group_size))
    return pack_int4(groups).flatten(1), scale


# ----------------------------------------------------------------------------------------------------------- operators

operators = torch.ops.vitcourse


def test_operators_are_registered_as_pytorch_wants_them():
    x, bias = torch.randn(5, 64, requires_grad=True), torch.randn(7, requires_grad=True)
    weight = torch.randn(7, 64)
    int8, (q, scale) = quantize(weight), quantize(x.detach())
    calls = {
        "quantize_per_token": (x.detach(),),
        "quantize_per_tensor": (x.detach(), torch.full((1, 1), 0.01)),
        "w8a8_linear": (q, scale, *int8, bias.detach(), torch.bfloat16),
        "w8a16_linear": (x, *int8, bias),
        "w4a16_linear": (x, *four_bit(weight, 32), None, 32),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(operators, name).default, arguments)


def test_gradients_of_the_operators_are_those_of_the_linear_layer():
    weight = torch.randn(7, 64)
    (int8, scale), (packed, scales) = quantize(weight), four_bit(weight, 32)
    x, bias = torch.randn(5, 64, requires_grad=True), torch.randn(7, requires_grad=True)
    for out, real in (
        (operators.w8a16_linear(x, int8, scale, bias), dequantize(int8, scale)),
        (operators.w4a16_linear(x, packed, scales, bias, 32), formulas.dequantize_int4(packed, scales, 32, 64)),
    ):
        weight = torch.randn_like(out)
        got = torch.autograd.grad((out * weight).sum(), (x, bias))
        expected = torch.autograd.grad((F.linear(x, real, bias) * weight).sum(), (x, bias))
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


WRONG = {  # operator, what is changed, what the error begins with and the remedy that it names
    "x of three dimensions": ("w8a16_linear", {"x": torch.zeros(1, 5, 64)}, r"x must .* \(M, K\).*; flatten"),
    "x of integers": ("w8a16_linear", {"x": torch.zeros(5, 64, dtype=torch.int8)}, "x must be .*; .*cast"),
    "x of another width": ("w8a16_linear", {"x": torch.zeros(5, 128)}, r"weight must .* \(7, 128\).* got .* \(7, 64\)"),
    "real weight": ("w8a8_linear", {"weight": torch.zeros(7, 64)}, "weight must be torch.int8 .* quantize"),
    "scale of other rows": ("w8a8_linear", {"weight_scale": torch.ones(2, 1)}, r"weight_scale must .* \(7, 1\)"),
    "flat scale": ("w8a16_linear", {"weight_scale": torch.ones(7)}, r"weight_scale must .* \(7, 1\)"),
    "half scale": ("w8a16_linear", {"weight_scale": torch.ones(7, 1).half()}, "weight_scale must be torch.float32"),
    "scale of other tokens": ("w8a8_linear", {"x_scale": torch.ones(3, 1)}, r"x_scale must .* \(5, 1\)"),
    "bias of other rows": ("w8a16_linear", {"bias": torch.ones(8)}, r"bias must .* \(7,\)"),
    "bias elsewhere": ("w4a16_linear", {"bias": torch.ones(7, device="meta")}, "bias must .* on cpu"),
    "integer result": ("w8a8_linear", {"dtype": torch.int32}, "dtype torch.int32 must be"),
    "group size": ("w4a16_linear", {"group_size": 48}, "group_size 48 must be 32, 64, 128 or 256"),
    "other group size": ("w4a16_linear", {"group_size": 64}, r"weight_scale must .* \(7, 1\).* got .* \(7, 2\)"),
    "signed bytes": ("w4a16_linear", {"packed": torch.zeros(7, 32, dtype=torch.int8)}, "packed must be torch.uint8"),
    "packed of another width": ("w4a16_linear", {"x": torch.zeros(5, 65)}, r"packed must .* \(7, 48\)"),
    "scale per token": ("quantize_per_tensor", {"scale": torch.ones(5, 1)}, r"scale must .* \(1, 1\).*per_token"),
    "integers to quantize": ("quantize_per_token", {"x": torch.zeros(5, 64).int()}, "x must be torch.float16 or"),
}


def right_arguments(name: str) -> dict:
    """Of an operator, by name."""
    (x8, x_scale), (w8, scale), (packed, scales) = (
        quantize(torch.randn(5, 64)),
        quantize(torch.randn(7, 64)),
        four_bit(torch.randn(7, 64), 32),
    )
    real, eight = {"x": torch.randn(5, 64)}, {"weight": w8, "weight_scale": scale, "bias": None}
    return {
        "quantize_per_token": real,
        "quantize_per_tensor": real | {"scale": torch.ones(1, 1)},
        "w8a8_linear": {"x": x8, "x_scale": x_scale, **eight, "dtype": torch.float32},
        "w8a16_linear": real | eight,
        "w4a16_linear": {**real, "packed": packed, "weight_scale": scales, "bias": None, "group_size": 32},
    }[name]


@pytest.mark.parametrize("case", WRONG)
def test_operators_refuse_what_their_kernels_would_misread(case):
    name, change, message = WRONG[case]
    arguments = right_arguments(name)
    operator = getattr(operators, name)
    operator(**arguments)
    with pytest.raises(ValueError, match=message):
        operator(**(arguments | change))
    with FakeTensorMode() as fakes:
        fake = {
            key: fakes.from_tensor(value) if isinstance(value, Tensor) else value for key, value in arguments.items()
        }
        operator(**fake)
        wrong = {key: fakes.from_tensor(value) if isinstance(value, Tensor) else value for key, value in change.items()}
        with pytest.raises(ValueError, match=message):
            operator(**(fake | wrong))


@pytest.mark.parametrize("scale", ["per token", "static"])
def test_checks_ask_nothing_of_the_number_of_tokens(scale):
    """Not even where it follows from the data, and nobody knows it."""

    class Model(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
            q, x_scale = operators.quantize_per_token(x[x[:, 0] > 0])
            x_scale = x_scale if scale == "per token" else torch.ones(1, 1)
            return operators.w8a8_linear(q, x_scale, weight, weight_scale, None, torch.float32)

    inputs = torch.randn(9, 64), *quantize(torch.randn(7, 64))
    exported = torch.export.export(Model(), inputs).module()
    assert torch.equal(exported(*inputs), Model()(*inputs))


@pytest.mark.parametrize("dtype", FLOATS)
def test_only_halves_take_the_kernels_that_multiply_real_numbers(dtype, monkeypatch):
    """Elsewhere, Triton spills, wants too much shared memory, or has no product at all."""
    taken = []
    monkeypatch.setattr(ops, "_has_kernels", lambda device: True)
    on_cuda = ops.dispatcher(lambda x: taken.append("plain"), lambda x: taken.append("kernel"))
    on_cuda(torch.zeros(1, dtype=dtype))
    assert taken == ["kernel" if dtype in (torch.float16, torch.bfloat16) else "plain"]


# --------------------------------------------------------------------------------------------- PyTorch's own operators


class Sizes(TorchDispatchMode):
    """How many numbers the result of each operator has, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.found.setdefault(func._schema.name, []).append(out.numel())
        return out


def exact_error(x: Tensor, weight: Tensor, bias: Tensor, got: Tensor) -> float:
    exact = F.linear(x.double(), weight.double(), bias.double())
    return ((got - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_scale_is_applied_to_the_sums_and_not_to_the_weights(dtype):
    (weight, scale), x = quantize(torch.randn(64, 96)), torch.randn(5, 96).to(dtype)
    bias = torch.randn(64, dtype=dtype)
    with torch.no_grad(), Sizes() as sizes:
        got = ops.w8a16_linear(x, weight, scale, bias)
    multiplied = sizes.found.get("aten::mul", []) + sizes.found.get("aten::mul_", [])
    assert multiplied == [weight.numel() if dtype == torch.float16 else got.numel()]
    error = exact_error(x, dequantize(weight, scale), bias, got)
    assert got.dtype == dtype and error <= max(torch.finfo(dtype).eps, 1e-6)
    assert torch.equal(ops.w8a16_linear(x, weight, scale, bias), got)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_without_integers_get_a_scale_that_says_so(dtype):
    x, fixed = torch.randn(4, 64).to(dtype), torch.full((1, 1), 0.01)
    x[1, 3], x[2, 5], x[3, 0] = torch.nan, -torch.inf, 1e4
    for per_tensor in (ops.quantize_per_tensor, operators.quantize_per_tensor):
        q, scale = per_tensor(x, fixed)
        assert torch.equal(q[0], (x[0].float() / fixed[0]).round().clamp(-127, 127).to(torch.int8)) and q[3, 0] == 127
        assert scale.isnan().flatten().tolist() == [False, True, True, False] and (scale[[0, 3]] == fixed).all()
    out = ops.w8a8_linear(q, scale, *quantize(torch.randn(7, 64)), None, dtype)
    assert out[1:3].isnan().all() and out[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bias_may_be_of_another_type(dtype):
    x, bias, (weight, scale) = torch.randn(5, 64).to(dtype), torch.randn(7), quantize(torch.randn(7, 64))
    packed, scales = four_bit(torch.randn(7, 64), 32)
    for got, real in (
        (operators.w8a16_linear(x, weight, scale, bias), dequantize(weight, scale)),
        (operators.w4a16_linear(x, packed, scales, bias, 32), formulas.dequantize_int4(packed, scales, 32, 64)),
    ):
        assert got.dtype == dtype and exact_error(x, real, bias, got) <= max(2 * torch.finfo(dtype).eps, 1e-6)


def test_sums_stay_within_float16():
    weight, scale = quantize(torch.ones(3, 64))
    out = ops.w8a16_linear(torch.full((2, 64), 100.0).half(), weight, scale, None)
    assert torch.allclose(out, torch.tensor(6375.0).half(), rtol=0.005)


@pytest.mark.parametrize("inputs", [128, 100])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_four_bits_are_made_real_with_one_copy_in_real_numbers(group_size, inputs):
    packed, scale = four_bit(torch.randn(24, inputs), group_size)
    with Sizes() as sizes:
        got = formulas.dequantize_int4(packed, scale, group_size, inputs)
    assert not {"aten::cat", "aten::mul", "aten::_to_copy"} & set(sizes.found)
    assert torch.equal(got, dequantize(unpack(packed, group_size), scale, group_size)[:, :inputs])


class Products(nn.Module):
    """One of each, with what they are given besides x."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        for name, tensor in zip(("weight", "scale"), quantize(torch.randn(24, inputs)), strict=True):
            self.register_buffer(name, tensor)
        for name, tensor in zip(("packed", "scales"), four_bit(torch.randn(24, inputs), 32), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, x_scale = ops.quantize_per_token(x)
        return (
            ops.w8a8_linear(q, x_scale, self.weight, self.scale, None, x.dtype),
            ops.w8a16_linear(x, self.weight, self.scale, None),
            ops.w4a16_linear(x, self.packed, self.scales, None, 32),
        )


def test_products_become_those_of_onnx(tmp_path):
    """Of weights so large that the exporter does not compute with them itself."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if not formulas.HAS_FAST_INT8:
        pytest.skip("ONNX Runtime may let sums of this CPU saturate")
    inputs = 1500
    model, path = Products(inputs).eval(), tmp_path / "products.onnx"
    shapes = ({0: torch.export.Dim("tokens")},)
    torch.onnx.export(model, (torch.randn(5, inputs),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert [node.op_type for node in onnx.load(path).graph.node].count("MatMulInteger") == 1
    x = torch.randn(7, inputs)
    found = runtime.InferenceSession(path).run(None, {"x": x.numpy()})
    for got, expected in zip(found, model(x), strict=True):
        assert torch.allclose(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-4)


def test_onnx_gets_no_operator_that_only_cuda_has(monkeypatch):
    model, x = Products(64), torch.randn(5, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_cuda = model.to("cuda")
        assert ops._has_operators(x.to("cuda"))
        monkeypatch.setattr(onnx_export, "to_onnx", lambda: True)
        with Sizes() as sizes:
            on_cuda(x.to("cuda"))
    assert sizes.found and not any(name.startswith("vitcourse") for name in sizes.found)


def unpack(packed: Tensor, group_size: int) -> Tensor:
    return unpack_int4(packed.unflatten(1, (-1, group_size // 2))).flatten(1)


# ------------------------------------------------------------------------------------------------------------- kernels

INTERPRETED = """
import json, torch
import torch.nn.functional as F
from tests.test_quantize_kernels import four_bit
from vitcourse.hardware.quantize import dequantize, formulas, launchers, ops, quantize, tilings

torch.manual_seed(0)
failures, count = [], 0

def check(what, passed):
    global count
    count += 1
    if not passed:
        failures.append(what)

def close(got, exact, tolerance):
    return ((got - exact).abs().max() <= tolerance * exact.abs().max()).item()

HALF = torch.finfo(torch.float16).eps
SHAPES = [(9, 1, 1), (3, 5, 33), (70, 300, 33)]
for M, K, N in SHAPES:
    x8, w8 = (torch.randint(-128, 128, (rows, K), dtype=torch.int8) for rows in (M, N))
    exact = x8.long() @ w8.long().t()
    one = torch.ones(max(M, N), 1)
    sums = launchers.w8a8_linear(x8, one[:M], w8, one[:N], None, torch.float32)
    check(("w8a8 sums", M, K, N), torch.equal(sums.long(), exact))
    x_scale, w_scale, bias = torch.rand(M, 1), torch.rand(N, 1), torch.randn(N)
    for scale in (x_scale, x_scale[:1]):
        real = exact.double() * scale * w_scale.t() + bias
        check(("w8a8", M, K, N), close(launchers.w8a8_linear(x8, scale, w8, w_scale, bias, torch.float32), real, 1e-6))
    x = torch.randn(K, M).t().half()  # columns lie next to each other
    real = x.double() @ dequantize(w8, w_scale).double().t() + bias
    check(("w8a16", M, K, N), close(launchers.w8a16_linear(x, w8, w_scale, bias), real, HALF))
    for group in (32, 64, 128, 256):
        packed, scales = four_bit(torch.randn(N, K), group)
        real = x.double() @ formulas.dequantize_int4(packed, scales, group, K).double().t()
        check(("w4a16", M, K, N, group), close(launchers.w4a16_linear(x, packed, scales, None, group), real, HALF))
    x = torch.randn(M, K) * torch.logspace(-30, 30, M)[:, None]
    x[0] = 0
    for got, expected in zip(launchers.quantize_per_token(x), quantize(x), strict=True):
        check(("quantize", M, K, N), torch.equal(got, expected))

# Without tl.dot, float32 and bfloat16 are interpreted too.
enough = tilings.ENOUGH_PROGRAMS
for M, K, N, dtype in ((1, 1, 1, torch.float32), (4, 1100, 9, torch.bfloat16), (2, 600, 17, torch.float32)):
    tilings.ENOUGH_PROGRAMS = enough if M > 2 else 1  # with 4, with 8 rows of weights a program
    x, bias, tolerance = torch.randn(M, K).to(dtype), torch.randn(N), max(torch.finfo(dtype).eps, 2e-6)
    w8, w_scale = quantize(torch.randn(N, K))
    real = F.linear(x.double(), dequantize(w8, w_scale).double(), bias.double())
    check(("few w8a16", M, K, N, str(dtype)), close(launchers.w8a16_linear(x, w8, w_scale, bias), real, tolerance))
    for group in (32, 256):
        packed, scales = four_bit(torch.randn(N, K), group)
        real = F.linear(x.double(), formulas.dequantize_int4(packed, scales, group, K).double(), bias.double())
        got = launchers.w4a16_linear(x, packed, scales, bias, group)
        check(("few w4a16", M, K, N, group, str(dtype)), close(got, real, tolerance))
        check("the same again", torch.equal(got, launchers.w4a16_linear(x, packed, scales, bias, group)))

tilings.ENOUGH_PROGRAMS = enough
# more tiles along M than one stripe has
x8, w8 = (torch.randint(-128, 128, (rows, 16), dtype=torch.int8) for rows in (64 * 9 + 1, 70))
sums = launchers.w8a8_linear(x8, torch.ones(1, 1), w8, torch.ones(70, 1), None, torch.float32)
check("stripes", torch.equal(sums.long(), x8.long() @ w8.long().t()))

x, weight = torch.randn(9, 64).half(), torch.randn(7, 64)
strided = [tensor.t().contiguous().t() for tensor in quantize(weight)]
same = torch.equal(launchers.w8a16_linear(x, *strided, None), launchers.w8a16_linear(x, *quantize(weight), None))
check("strided weight", same)
packed, scales = four_bit(weight, 32)
strided = [tensor.t().contiguous().t() for tensor in (packed, scales)]
same = torch.equal(launchers.w4a16_linear(x, *strided, None, 32), launchers.w4a16_linear(x, packed, scales, None, 32))
check("strided 4-bit weight", same)

x = torch.randn(4, 40)
x[1, 3], x[2, 3] = torch.nan, torch.inf
got, expected = launchers.quantize_per_token(x), quantize(x)
check("NaN", got[1][1].isnan().item() and expected[1][1].isnan().item())
check("infinity", got[1][2].isinf().item() and expected[1][2].isinf().item())
check("the rest", all(torch.equal(a[[0, 3]], b[[0, 3]]) for a, b in zip(got, expected, strict=True)))
fixed = torch.full((1, 1), 0.01)
x[3, 0] = 1e30
(q, scale), (expected_q, expected_scale) = launchers.quantize_per_tensor(x, fixed), ops.quantize_per_tensor(x, fixed)
check("fixed scale", torch.equal(q[[0, 3]], expected_q[[0, 3]]) and torch.equal(scale.isnan(), expected_scale.isnan()))
check("rows without integers", scale[1:3].isnan().all().item() and (scale[[0, 3]] == fixed).all().item())
check("no tokens", launchers.w8a16_linear(x[:0], torch.ones(3, 40, dtype=torch.int8), one[:3], None).shape == (0, 3))
print(json.dumps([count, failures]))
"""


def run_python(code: str, **environment: str) -> list:
    """The last line that ``code`` prints in a process of its own, as JSON."""
    pytest.importorskip("triton")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_kernels_compute_what_they_should_on_the_interpreter():
    count, failures = run_python(INTERPRETED, TRITON_INTERPRET="1")
    assert failures == [] and count == 54


COMPILED = """
import json
from benchmarks.quantization import kernel_rows
print(json.dumps([row for chosen in {chosen} for row in kernel_rows(**chosen)]))
"""


def assert_sound(rows: list[dict]) -> None:
    """On tensor cores, within registers and shared memory."""
    assert rows
    for row in rows:
        wanted = r"s8\.s8|kind::i8" if row["kernel"] == "w8a8" else r"bf16\.bf16|f16\.f16|kind::f16"
        assert bool(row["instructions"]) != row["kernel"].endswith("_few"), row
        assert all(re.search(wanted, kind) for kind in row["instructions"]), row
        assert row["spills"] == 0 and row["shared"] <= row["shared_limit"], row


def test_a_tile_is_as_large_as_the_chip_and_its_work_allow():
    def size(tokens: int, features: int, *capability: int) -> tuple[int, int]:
        tile = tilings.tiling("w8a8", tokens, features, capability)
        return tile.block_m, tile.block_n

    assert size(12_608, 3072, 9, 0) == size(12_608, 3072, 8, 0) == (128, 256)
    assert size(12_608, 3072, 8, 9) == size(12_608, 3072, 10, 0) == size(12_608, 3072, 0, 0) == (128, 128)
    assert size(197, 3072, 9, 0) == (64, 64) and size(16, 3072, 9, 0) == (16, 32)


def test_few_tokens_make_enough_programs_and_need_no_tensor_cores():
    for kernel in ("w8a16", "w4a16"):
        for features, rows in ((768, 4), (1024, 8), (3072, 8)):
            tile = tilings.tiling(kernel, 1, features, (9, 0))
            assert (tile.block_m, tile.block_n) == (1, rows)
            assert tile.programs(1, features) >= tilings.ENOUGH_PROGRAMS
        assert (
            tilings.tiling(kernel, 8, 768, (9, 0)).block_m == 1 and tilings.tiling(kernel, 9, 768, (9, 0)).block_m == 16
        )
    assert tilings.tiling("w8a8", 1, 768, (9, 0)).block_m == 16


def test_kernels_fit_hopper_and_use_its_tensor_cores():
    """The largest tile, the largest group, and those without tl.dot."""
    chosen = [
        {"kernel": "w8a8", "tile": "128x256x128"},
        {"kernel": "w8a16_few", "tile": "1x4x1024"},
        {"kernel": "w4a16", "tile": "128x64x64", "group_size": 256},
        {"kernel": "w4a16_few", "tile": "1x8x512", "group_size": 32},
    ]
    rows = run_python(COMPILED.format(chosen=[{"capability": 90, "dtype": "bf16", **kind} for kind in chosen]))
    assert_sound(rows)
    assert len(rows) == 4 and all("wgmma" in kind for row in rows for kind in row["instructions"])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [89, 90])
def test_every_kernel_fits_the_chip(capability):
    """One with the least shared memory, and Hopper; all: ``python -m benchmarks.quantization --parts kernels``."""
    assert_sound(run_python(COMPILED.format(chosen=[{"capability": capability}])))


# ----------------------------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_compares_every_scheme_with_the_real_layer(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "torchao_peers", lambda device: {})
    monkeypatch.setattr(common, "seconds", lambda step, device, number: (step(), 1e-6)[1])
    rows = []
    benchmark.compare(nn.Sequential(nn.Linear(64, 32)), torch.randn(8, 64), 3, {"part": "layers"}, rows.extend)
    assert [(row["scheme"], row["peer"]) for row in rows] == [(scheme, "real") for scheme in SCHEMES]
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)


def test_the_benchmark_runs_as_many_weights_as_it_is_told(monkeypatch):
    """Captured one by one: what a GPU needs, in which weights would otherwise stay in the cache."""
    monkeypatch.setattr(benchmark, "torchao_peers", lambda device: {})
    weights, work = [], []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: weights.append(self.weight.data_ptr()) or x)
    steps = benchmark.candidates(nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 64), 3, lambda w: work.append(w) or w)
    assert list(steps) == ["real", *SCHEMES] and list(steps.values()) == work
    weights.clear()
    steps["real"]()
    assert len(weights) == len(set(weights)) == 3


def test_the_benchmark_fills_the_cache_of_a_gpu_and_leaves_a_cpu_alone(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    model = nn.Linear(768, 768, bias=False)
    copies = benchmark.copies_beyond_cache(model, torch.device("cuda"))
    stored = 768 * 768 / 2 + 2 * 768 * 768 / 64  # two to a byte, and scales of float16
    assert copies == math.ceil(100 * 2**20 / stored)
    assert benchmark.copies_beyond_cache(model, torch.device("cpu")) == 1


def test_the_benchmark_rounds_weights_as_the_layers_do():
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    for real, layer in ((benchmark.rounded(model, 8, None), Int8Linear), (benchmark.rounded(model, 4, 64), Int4Linear)):
        for rounded, linear in zip(real[::2], model[::2], strict=True):
            assert torch.equal(rounded.weight, layer(linear).dequantize())


def test_the_benchmark_replaces_rows_that_were_measured_anew(monkeypatch):
    earlier = {"device": common.device_name("cpu"), "versions": common.versions()}
    monkeypatch.setattr(common, "read_results", lambda name: earlier)
    row, other = {"part": "layers", "scheme": "int8", "ratio": 1.0}, {"part": "accuracy", "scheme": "int8", "loss": 2.0}
    earlier["rows"] = [other, row]
    assert benchmark.merged("q", [{**row, "ratio": 3.0}], "cpu") == [{**row, "ratio": 3.0}, other]
    earlier["device"] = "another"
    assert benchmark.merged("q", [row], "cpu") == [row]
