"""What PyTorch reads from the environment once, when it is imported: set here, by whoever imports `vitcourse` first."""

import os
import sys

MPS_FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"
SPIN_COUNT = "GOMP_SPINCOUNT"
WAITING = (SPIN_COUNT, "OMP_WAIT_POLICY")  # two words of OpenMP on how its threads wait: who says one, means it


def before_torch() -> None:
    """Set the defaults of the course, unless PyTorch is there already, or the user has said otherwise.

    * On a Mac, what an Apple GPU lacks is computed on the CPU; PyTorch says so, once an operation.
    * PyTorch's OpenMP threads wait for each other in an empty loop, for so long that two programs on two cores keep
      each other from working. A thousand rounds are what libgomp itself takes where there are more threads than cores:
      two programs at once take less than half the time, and one alone, of steps as short as 10 ms, up to a fifth more
      (``benchmarks/spinning.py``; not to spin at all would double that). Intel's and LLVM's OpenMP (macOS, Windows)
      do not read it.

    Every entry begins with it, since importing anything of `vitcourse` runs it: the first cell of a lesson, the
    commands, the tests, the builder; kernels and workers inherit it.
    """
    if "torch" in sys.modules:
        return
    if sys.platform == "darwin":
        os.environ.setdefault(MPS_FALLBACK, "1")
    if not any(name in os.environ for name in WAITING):
        os.environ[SPIN_COUNT] = "1000"
