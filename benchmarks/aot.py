"""What do our Triton kernels become on each generation of chips? No GPU is needed to ask.

    python -m benchmarks.aot                          half an hour, for all chips
    python -m benchmarks.aot --capabilities 80 90     for some; the other rows of the file are kept

Every kernel is compiled ahead of time, in each configuration that ships, and the machine code is read: tensor-core
instructions, registers and local memory of a thread, shared memory of a block, and on Hopper how often a matrix product
is waited for. Results: ``aot.json``. Fails where a kernel in half precision has no tensor-core instructions, waits for
each of them before it starts the next, or wants more shared memory than the chip has.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.common import read_results, write_results
from vitcourse.hardware.flash import plans

SHARED_LIMIT = {
    80: 163,
    86: 99,
    89: 99,
    90: 227,
    100: 227,
    120: 99,
}  # KiB that one block may have, by compute capability
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel, by its costs."""

    registers: int  # of a thread; 255 are the most
    spills: int  # 32-bit words of a thread in local memory: what did not fit into registers, above all
    shared: int  # bytes of a block
    matrix: tuple[str, ...]  # kinds of tensor-core instructions in its PTX
    products: int  # instructions in the machine code that start a matrix product on Hopper, and go on at once
    waits: int  # and those that wait for some of them
    ptx: str


def compile_for(
    kernel: Any, signature: dict[str, Any], constants: dict[str, Any], capability: int, **options: Any
) -> Compiled:
    """Compile a ``@triton.jit`` function for a chip that need not be there.

    Args:
        kernel: the function, in a process that was started without TRITON_INTERPRET.
        signature: the type of each run-time argument, a tuple of types for a tuple: ``"*bf16:16"``, ``"i32"``,
            ``"i32:16"``, ``"fp32"``. ``:16`` promises divisibility by 16, and the integer 1 stands for itself, as
            Triton finds them at run time.
        constants: the value of each constexpr argument, and of those that are None.
        capability: 80, 86, 89, 90, 100 or 120.
        options: ``num_warps``, ``num_stages`` and the like, as at a launch.

    Raises:
        TypeError: the kernel is interpreted.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.runtime.JITFunction):
        raise TypeError(f"{kernel} cannot be compiled; start a process without TRITON_INTERPRET")
    types = {name: _types(signature[name]) if name in signature else "constexpr" for name in kernel.arg_names}
    leaves = [leaf for i, name in enumerate(kernel.arg_names) for leaf in _leaves((i,), signature.get(name, ""))]
    attrs = {path: [["tt.divisibility", 16]] for path, kind in leaves if str(kind).endswith(":16")}
    source = ASTSource(kernel, types, constants | {path: kind for path, kind in leaves if kind == 1}, attrs)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    usage, code = _read(built.asm["cubin"])
    return Compiled(
        registers=usage["REG"],
        spills=usage["STACK"] // 4,
        shared=built.metadata.shared,
        matrix=tuple(name for name in MATRIX_INSTRUCTIONS if name in built.asm["ptx"]),
        products=code.count("HGMMA"),
        waits=code.count("WARPGROUP.DEPBAR"),
        ptx=built.asm["ptx"],
    )


def _types(kind: str | int | tuple) -> str | tuple:
    if isinstance(kind, tuple):
        return tuple(map(_types, kind))
    return "constexpr" if kind == 1 else kind.removesuffix(":16")


def _leaves(path: tuple[int, ...], kind: str | int | tuple) -> list[tuple[tuple[int, ...], str | int]]:
    """Every type with the path that leads to it."""
    if not isinstance(kind, tuple):
        return [(path, kind)]
    return [leaf for i, part in enumerate(kind) for leaf in _leaves((*path, i), part)]


@cache
def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _read(cubin: bytes) -> tuple[dict[str, int], str]:
    """What NVIDIA's disassembler says: registers (REG), bytes of stack (STACK) and more of a thread; and the code."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([_cuobjdump(), option, path], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage.splitlines()[-1])}, code


# ------------------------------------------------------------------------------------------------------ FlashAttention


@dataclass(frozen=True)
class FlashCase:
    """One kernel, for one class of shapes on one chip."""

    plan: plans.Plan
    capability: int
    dtype: str
    head_dim: int
    n_k: int
    biased: bool


# Lengths for each D, type and bias: one for every choice that `plans` makes, of tiles, pieces and what is left over.
SHAPES: dict[tuple[int, str, bool], tuple[int, ...]] = {
    (64, "bf16", False): (16, 50, 80, 128, 144, 192, 197, 256, 257, 576, 577, 600, 630),
    (16, "bf16", False): (197, 577),
    (32, "bf16", False): (50, 128, 197, 577),
    (40, "bf16", False): (197, 577),
    (48, "bf16", False): (197, 577),
    (72, "bf16", False): (577, 630),
    (80, "bf16", False): (577, 630),
    (96, "bf16", False): (577,),
    (128, "bf16", False): (576, 577, 600, 630),
    (32, "bf16", True): (49, 128, 196, 577),
    (64, "bf16", True): (49, 128, 577, 630),
    (128, "bf16", True): (577, 630),
    (64, "fp16", False): (50, 128, 197, 257, 577),
    (64, "fp32", False): (50, 577, 630),
    (128, "fp32", False): (50, 577),
}


def flash_cases(capability: int) -> Iterator[FlashCase]:
    """Every kernel with every tiling that `plans` may choose on a chip, once."""
    chip, seen = divmod(capability, 10), []
    for (dim, dtype, biased), lengths in SHAPES.items():
        shape = dim, torch.float32 if dtype == "fp32" else torch.bfloat16, chip
        for n_k in lengths:
            chosen = [plans.forward(n_k, *shape, biased), *plans.backward(n_k, *shape, biased)]
            for plan in chosen + [plans.dbias(*shape)] * biased:
                if (plan, dtype, biased) not in seen:
                    seen.append((plan, dtype, biased))
                    yield FlashCase(plan, capability, dtype, dim, n_k, biased)


def compile_flash(case: FlashCase) -> Compiled:
    """With addresses and strides as models have them, divisible by 16 or 8; lengths, and a bias's strides, are not."""
    from vitcourse.hardware.flash import kernels

    kernel = getattr(kernels, case.plan.kernel)
    eights = case.head_dim % 16 == 8
    tensor = (f"*{case.dtype}:16", *["i32" if eights else "i32:16"] * 3)
    types = {"bias": ("*fp32:16", "i32", "i32", "i32", 1), "scale": "fp32"}
    types |= dict.fromkeys(("lse", "delta", "dbias"), "*fp32:16")
    types |= dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), tensor)
    constants = case.plan.constants | {"UNIT": 8 if eights else 1} | ({} if case.biased else {"bias": None})
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name, "i32") for name in names}
    launch = {"num_warps": case.plan.warps, "num_stages": case.plan.stages}
    return compile_for(kernel, signature, constants, case.capability, **launch)


def wanted_instructions(capability: int) -> str:
    """The tensor-core instructions of a chip's own generation."""
    return {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync")


def flash_row(case: FlashCase) -> dict[str, Any]:
    found = compile_flash(case)
    sizes = {name: size for name, size in case.plan.constants.items() if name not in ("HEAD_DIM", "BLOCK_D")}
    return {
        "kernel": case.plan.kernel,
        "capability": case.capability,
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "n_k": case.n_k,
        "bias": case.biased,
        "tile": " ".join(f"{name}={size}" for name, size in sizes.items()),
        "warps": case.plan.warps,
        "registers": found.registers,
        "spills": found.spills,
        "shared_kib": found.shared / 1024,
        "matrix": list(found.matrix),
        "products": found.products,
        "waits": found.waits,
        "passed": found.shared <= 1024 * SHARED_LIMIT[case.capability]
        and (case.dtype == "fp32" or wanted_instructions(case.capability) in found.matrix)
        and (found.waits < found.products or found.products < 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    chosen = parser.parse_args(argv).capabilities
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set; unset it, for an interpreted kernel cannot be compiled")
    for capability in chosen:  # what is known of the other chips is kept
        earlier = (read_results("aot") or {"rows": []})["rows"]
        rows = [row for row in earlier if row["capability"] != capability]
        for case in flash_cases(capability):
            rows.append(flash_row(case))
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        write_results("aot", sorted(rows, key=lambda row: row["capability"]))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
