"""What do our Triton kernels become on each generation of chips? No GPU is needed to ask.

    python -m benchmarks.aot

Every kernel is compiled ahead of time, in each configuration that ships, and the machine code is read: tensor-core
instructions, registers and spills of a thread, shared memory of a block. Results: ``aot.json``.
"""

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
    spills: int  # 32-bit words of a thread that did not fit into registers, and went to slow memory
    shared: int  # bytes of a block
    threads: int  # of a block
    matrix: tuple[str, ...]  # kinds of tensor-core instructions in its PTX
    ptx: str


def compile_for(
    kernel: Any, signature: dict[str, Any], constants: dict[str, Any], capability: int, **options: Any
) -> Compiled:
    """Compile a ``@triton.jit`` function for a chip that need not be there.

    Args:
        kernel: the function, in a process that was started without TRITON_INTERPRET.
        signature: the type of each run-time argument, a tuple of types for a tuple: ``"*bf16:16"``, ``"i32"``,
            ``"i32:16"``, ``"fp32"``. ``:16`` promises divisibility by 16, as Triton finds it at run time.
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
    attrs = {
        path: [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        for path, text in _leaves((i,), signature.get(name, ""))
        if text.endswith(":16")
    }
    source = ASTSource(kernel, types, constants, attrs)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    usage = _resource_usage(built.asm["cubin"])
    return Compiled(
        registers=usage["REG"],
        spills=usage["STACK"] // 4,
        shared=built.metadata.shared,
        threads=32 * int(re.search(r"\.reqntid (\d+)|\.maxntid (\d+)", built.asm["ptx"]).group(1)) // 32,
        matrix=tuple(name for name in MATRIX_INSTRUCTIONS if name in built.asm["ptx"]),
        ptx=built.asm["ptx"],
    )


def _types(text: str | tuple) -> str | tuple:
    return tuple(map(_types, text)) if isinstance(text, tuple) else text.removesuffix(":16")


def _leaves(path: tuple[int, ...], text: str | tuple) -> list[tuple[tuple[int, ...], str]]:
    """Every type with the path that leads to it."""
    if isinstance(text, str):
        return [(path, text)]
    return [leaf for i, part in enumerate(text) for leaf in _leaves((*path, i), part)]


@cache
def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers (REG), bytes of stack (STACK) and more, of a thread, as NVIDIA's disassembler reports them."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [_cuobjdump(), "--dump-resource-usage", path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text.splitlines()[-1])}
