"""FlashAttention without a GPU: run by Triton's interpreter, compiled ahead of time, refused where it cannot run.

Both the interpreter and the compiler claim a process for themselves: TRITON_INTERPRET counts when Triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import attention, common
from vitcourse.hardware.flash import plans

TESTS = Path(__file__).parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), kept.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], env=kept | environment, capture_output=True, text=True)


def test_the_fuzz_under_the_interpreter():
    pytest.importorskip("triton")
    ran = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "flash_fuzz.py"), TRITON_INTERPRET="1")
    assert ran.returncode == 0, ran.stdout[-5000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout


def test_without_the_interpreter_a_cpu_is_refused():
    pytest.importorskip("triton")
    program = """
import torch
from vitcourse.hardware import flash_attention
q = torch.zeros(1, 1, 4, 16)
try:
    flash_attention(q, q, q)
except RuntimeError as error:
    print(error)
"""
    said = run("-c", program).stdout
    assert "needs CUDA, and the tensors are on cpu; use backend='sdpa', or set TRITON_INTERPRET=1" in said


# -------------------------------------------------------------------------------------------------------------- plans


def test_pieces_cover_the_keys_and_only_the_last_is_not_full():
    for n_k in range(1, plans.SHORT + 17):
        pieces = plans.pieces(n_k)
        assert [first for first, _ in pieces] == [sum(size for _, size in pieces[:i]) for i in range(len(pieces))]
        first, size = pieces[-1]
        assert first < n_k <= first + size
        assert all(size & (size - 1) == 0 and size >= 16 for _, size in pieces)
    assert plans.pieces(257) == ((0, 128), (128, 64), (192, 64), (256, 16))


def test_tails_hold_what_the_full_tiles_leave():
    assert [plans.tail(n, 64) for n in (64, 65, 80, 81, 127, 640)] == [0, 16, 16, 32, 64, 0]


@pytest.mark.parametrize("head_dim", [1, 16, 20, 64, 72, 80, 128])
def test_head_dimensions_are_padded_to_powers_of_two(head_dim):
    width = plans.padded(head_dim)
    assert width & (width - 1) == 0
    assert max(16, head_dim) <= width < max(17, 2 * head_dim)


def test_operators_know_their_shapes_without_a_device():
    """What a compiler is told, of tensors that exist nowhere."""
    from vitcourse.hardware import flash_attention, flash_attention_qkvpacked

    q, k, v = (torch.empty(2, 3, n, 16, device="meta", requires_grad=True) for n in (5, 7, 7))
    out = flash_attention(q, k, v)
    assert (out.shape, out.stride()) == ((2, 3, 5, 16), (240, 16, 48, 1))
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    qkv = torch.empty(2, 5, 3, 3, 16, device="meta", requires_grad=True)
    (gradient,) = torch.autograd.grad(flash_attention_qkvpacked(qkv).sum(), qkv)
    assert gradient.shape == qkv.shape
    assert gradient.is_contiguous()


# ------------------------------------------------------------------------------------------------------------ compiler


@pytest.mark.parametrize(("capability", "lengths"), [(80, [16]), (90, [257, 577])])
def test_kernels_compile_to_tensor_core_instructions(capability, lengths):
    """One shape of each kernel; ``python -m benchmarks.aot`` compiles all that ship, for all chips."""
    pytest.importorskip("triton")
    program = f"""
from benchmarks.aot import flash_cases, flash_row
for case in flash_cases({capability}):
    if case.n_k in {lengths} and (case.head_dim, case.dtype, case.biased) == (64, "bf16", False):
        row = flash_row(case)
        print(row["kernel"], row["passed"], row["spills"])
"""
    ran = run("-c", program)
    assert ran.returncode == 0, ran.stderr[-3000:]
    kernels = {
        80: ["backward_short", "forward_short"],
        90: ["backward_dkdv", "backward_dq", "forward_long", "forward_short"],
    }[capability]
    assert sorted(ran.stdout.splitlines()) == [f"{kernel} True 0" for kernel in kernels]


# ----------------------------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_needs_cuda(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        attention.main([])
    assert "needs a CUDA device of compute capability 8.0, and this would run on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("n", "backward", "megabytes", "gigaflop"), [(197, False, 309.9, 30.52), (197, True, 929.6, 106.8)]
)
def test_floors(n, backward, megabytes, gigaflop):
    """256 images, 12 heads of 64: (q, k, v, out) once, and what the backward pass reads and writes."""
    case = attention.Case(n, 64, packed=False, backward=backward, batch=attention.full_batch(n))
    assert (case.batch, case.heads) == (256, 12)
    assert attention.traffic(case) / 1e6 == pytest.approx(megabytes, rel=1e-3)
    assert attention.operations(case) / 1e9 == pytest.approx(gigaflop, rel=1e-3)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_a_row_is_measured(monkeypatch, packed, backward, biased):
    """On a CPU, where PyTorch's attention plays all parts but one, which it refuses."""
    plain = F.scaled_dot_product_attention

    def refuse_cudnn(backend, q, k, v, bias):
        if backend == attention.PEERS["cudnn"]:
            raise RuntimeError("No available kernel. Aborting execution.")
        return plain(q, k, v, attn_mask=bias)

    def twice_the_work(q, k, v, bias=None):
        return plain(q, k, v, attn_mask=bias) + 0 * plain(q, k, v, attn_mask=bias)

    def packed_too(qkv, bias=None):
        return twice_the_work(*qkv.permute(2, 0, 3, 1, 4), bias)

    monkeypatch.setattr(attention, "sdpa", refuse_cudnn)
    monkeypatch.setattr(attention, "flash_attention", twice_the_work)
    monkeypatch.setattr(attention, "flash_attention_qkvpacked", packed_too)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda q, k, v, bias: plain(q, k, v, bias))
    monkeypatch.setattr(common, "seconds", lambda step, device, number: (step(), 1e-6)[1])
    case = attention.Case(10, 64, packed, backward, biased, batch=5, dtype=torch.float32)
    steps, failed = attention.prepared(case, "cpu", lambda work: (work(), work)[1])
    assert set(steps) == {"ours", *["ours, views"] * packed, "flash", "efficient", "math", "flex"}
    assert failed == {"cudnn": "RuntimeError: No available kernel. Aborting execution."}
    outcome = steps["ours"]()
    shapes = [t.shape for t in outcome] if backward else [outcome.shape]
    leaf = (5, 10, 3, 12, 64) if packed else (5, 12, 10, 64)
    gradients = [leaf] * (1 if packed else 3) + [(1, 12, 10, 10)] * biased
    assert shapes == (gradients if backward else [(5, 10, 768) if packed else leaf])
    row = attention.measure(case, steps, (1e12, 1e13), "cpu", rounds=3)
    assert (row["speedup"], row["views_speedup"]) == pytest.approx((1, 1))
    assert row["passed"] is False, "the target for short sequences is 1.3"
    assert row["floor us"] == pytest.approx(1e6 * attention.traffic(case) / 1e12)


def test_ranges_that_auto_should_take():
    """Of lengths that are neighbours, from the number of sequences on from which all rows were won."""
    speedups = {  # of one image, and of eight: two rows
        50: (1.2, 1.4, 1.1),
        197: (1.0, 1.5, 1.01),
        257: (0.9, 1.2, 1.1),
        577: (0.9, 1.1, 1.1),
        785: (1.5, 2.0, 0.5),
        1025: (0.9, 1.1, 1.1),
    }
    rows = [
        {"dtype": "bfloat16", "n": n, "head_dim": 64, "backward": False, "bias": False, "heads": 12}
        | {"batch": batch, "views_speedup": speedup}
        for n, found in speedups.items()
        for batch, speedup in zip((1, 8, 8), found, strict=True)
    ]
    expected = (50, 197, 12), (257, 577, 96), (1025, 1025, 96)
    assert attention.faster(rows) == {("bfloat16", 64, False, False): expected}
