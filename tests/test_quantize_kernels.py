"""Quantization's products: operators, Triton kernels on the interpreter and compiled, and their benchmark."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import quantization as benchmark
from vitcourse.hardware.quantize import SCHEMES, Int4Linear, Int8Linear, quantize


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------------------- operators


def test_operators_are_registered_as_pytorch_wants_them():
    x, bias = torch.randn(5, 64, requires_grad=True), torch.randn(7, requires_grad=True)
    int8, int4 = Int8Linear(nn.Linear(64, 7)), Int4Linear(nn.Linear(64, 7), group_size=32)
    q, scale = quantize(x.detach())
    calls = {
        "quantize_per_token": (x.detach(),),
        "w8a8_linear": (q, scale, int8.weight, int8.weight_scale, int8.bias, torch.bfloat16),
        "w8a16_linear": (x, int8.weight, int8.weight_scale, bias),
        "w4a16_linear": (x, int4.weight_packed, int4.weight_scale, None, 32),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.vitcourse, name).default, arguments)


def test_gradients_of_the_operators_are_those_of_the_linear_layer():
    for layer in (Int8Linear(nn.Linear(64, 7)), Int4Linear(nn.Linear(64, 7))):
        x, bias = torch.randn(5, 64, requires_grad=True), torch.randn(7, requires_grad=True)
        if isinstance(layer, Int8Linear):
            out = torch.ops.vitcourse.w8a16_linear(x, layer.weight, layer.weight_scale, bias)
        else:
            out = torch.ops.vitcourse.w4a16_linear(x, layer.weight_packed, layer.weight_scale, bias, 64)
        weight = torch.randn_like(out)
        got = torch.autograd.grad((out * weight).sum(), (x, bias))
        expected = torch.autograd.grad((F.linear(x, layer.dequantize(), bias) * weight).sum(), (x, bias))
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


INTERPRETED = """
import itertools, json, torch
from torch import nn
from vitcourse.hardware.quantize import Int4Linear, dequantize, ops, quantize

torch.manual_seed(0)
failures, count = [], 0

def check(what, passed):
    global count
    count += 1
    if not passed:
        failures.append(what)

def close(got, exact, tolerance):
    return ((got - exact).abs().max() <= tolerance * exact.abs().max()).item()

SHAPES = [(1, 1, 1), (3, 5, 33), (17, 64, 7), (70, 200, 65)]
for M, K, N in SHAPES:
    x8, w8 = (torch.randint(-128, 128, (rows, K), dtype=torch.int8) for rows in (M, N))
    exact = x8.long() @ w8.long().t()
    one = torch.ones(max(M, N), 1)
    sums = ops.launch_w8a8(x8, one[:M], w8, one[:N], None, torch.float32)
    check(("w8a8 sums", M, K, N), torch.equal(sums.long(), exact))
    x_scale, w_scale, bias = torch.rand(M, 1), torch.rand(N, 1), torch.randn(N)
    for scale in (x_scale, x_scale[:1]):
        real = exact.double() * scale * w_scale.t() + bias
        check(("w8a8", M, K, N), close(ops.launch_w8a8(x8, scale, w8, w_scale, bias, torch.float32), real, 1e-6))
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
        x = torch.randn(K, M).t().to(dtype)  # columns lie next to each other
        real = x.double() @ dequantize(w8, w_scale).double().t() + bias
        got = ops.launch_w8a16(x, w8, w_scale, bias)
        check(("w8a16", M, K, N, str(dtype)), got.dtype == dtype and close(got, real, tolerance))
        for group in (32, 128):
            layer = Int4Linear(nn.Linear(K, N), group_size=group)
            real = x.double() @ layer.dequantize().double().t()
            got = ops.launch_w4a16(x, layer.weight_packed, layer.weight_scale, None, group)
            check(("w4a16", M, K, N, group, str(dtype)), got.dtype == dtype and close(got, real, tolerance))
    x = torch.randn(M, K) * torch.logspace(-30, 30, M)[:, None]
    x[0] = 0
    for got, expected in zip(ops.launch_quantize_per_token(x), quantize(x), strict=True):
        check(("quantize", M, K, N), torch.equal(got, expected))

x = torch.randn(4, 40)
x[1, 3], x[2, 3] = torch.nan, torch.inf
got, expected = ops.launch_quantize_per_token(x), quantize(x)
check("NaN", got[1][1].isnan().item() and expected[1][1].isnan().item())
check("infinity", got[1][2].isinf().item() and expected[1][2].isinf().item())
check("the rest", all(torch.equal(a[[0, 3]], b[[0, 3]]) for a, b in zip(got, expected, strict=True)))
check("no tokens", ops.launch_w8a16(x[:0], torch.ones(3, 40, dtype=torch.int8), one[:3], None).shape == (0, 3))
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
    assert failures == [] and count == 48


COMPILED = """
import json, re
from benchmarks.aot import SHARED_LIMIT, compile_for
from benchmarks.quantization import kernel_variants
found = []
for capability in {capabilities}:
    for name, kernel, signature, constants, options in kernel_variants([197], only={only}):
        built = compile_for(kernel, signature, constants, capability, **options)
        kinds = sorted(set(re.findall(r"(?:wgmma.mma_async|mma.sync|tcgen05.mma)[^ ;]*", built.ptx)))
        found.append([capability, name, kinds, built.spills, built.shared <= 1024 * SHARED_LIMIT[capability]])
print(json.dumps(found))
"""


def assert_on_tensor_cores(found: list) -> None:
    for capability, name, kinds, spills, fits in found:
        wanted = r"s8\.s8|kind::i8" if name.startswith("w8a8") else r"bf16\.bf16|kind::f16"
        assert kinds and all(re.search(wanted, kind) for kind in kinds), (capability, name, kinds)
        assert (spills, fits) == (0, True), (capability, name)


def test_kernels_use_the_tensor_cores_of_hopper():
    found = run_python(COMPILED.format(capabilities=[90], only=("w8a8", "w4a16")))
    assert_on_tensor_cores(found)
    assert [name for _, name, *_ in found] == ["w8a8 64x64", "w4a16 64x64"]
    assert all("wgmma" in kind for _, _, kinds, _, _ in found for kind in kinds)


@pytest.mark.slow
def test_integer_products_use_the_tensor_cores_of_other_generations():
    """All kernels on all chips: ``python -m benchmarks.quantization --parts kernels``."""
    found = run_python(COMPILED.format(capabilities=[80, 100, 120], only=("w8a8",)))
    assert_on_tensor_cores(found)
    assert len(found) == 3


# ----------------------------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_compares_every_scheme_with_the_real_layer(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "torchao_peers", lambda device: {})
    rows = []
    benchmark.compare(nn.Sequential(nn.Linear(64, 32)), torch.randn(8, 64), 3, {"part": "layers"}, rows.extend)
    assert [(row["scheme"], row["peer"]) for row in rows] == [(scheme, "real") for scheme in SCHEMES]
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)


def test_the_benchmark_rounds_weights_as_the_layers_do():
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    for real, layer in ((benchmark.rounded(model, 8, None), Int8Linear), (benchmark.rounded(model, 4, 64), Int4Linear)):
        for rounded, linear in zip(real[::2], model[::2], strict=True):
            assert torch.equal(rounded.weight, layer(linear).dequantize())


def test_the_benchmark_replaces_rows_that_were_measured_anew(monkeypatch):
    earlier = {"device": benchmark.device_name("cpu"), "versions": benchmark.versions()}
    monkeypatch.setattr(benchmark, "read_results", lambda name: earlier)
    row, other = {"part": "layers", "scheme": "int8", "ratio": 1.0}, {"part": "accuracy", "scheme": "int8", "loss": 2.0}
    earlier["rows"] = [other, row]
    assert benchmark.merged("q", [{**row, "ratio": 3.0}], "cpu") == [{**row, "ratio": 3.0}, other]
    earlier["device"] = "another"
    assert benchmark.merged("q", [row], "cpu") == [row]
