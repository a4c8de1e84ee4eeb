"""Grade Triton kernels out of harm's way: in a process of their own, on buffers that are guarded by NaN.

A kernel can do what no Python function can: read its neighbour's memory without an error, write over it, end its
process, or never return. So each launch of an answer is sent, as source and buffers, to a worker that lives for many
launches and is replaced when one kills it (`worker`). Inputs on a CPU, which all of a check's own are, are worked on by
Triton's interpreter, with or without a GPU, and watched (`interpreter`): that worker needs no PyTorch, and starts in a
quarter of a second. Inputs on a GPU go to a second worker, which compiles.

This is how a check gets such a runner::

    def launch(kernel, x, scale):
        out = kernels.empty_like(x)  # NaN until it is written, guarded like the inputs
        kernel[(triton.cdiv(x.shape[-2], 16),)](x, out, *x.stride(), *x.shape, scale, BLOCK=16)
        return out


    @check("hardware.scale_rows", reference="…", runner=KernelRunner(launch), …)
    def scale_rows(rng):
        yield call(rng.normal(3, 20, 8, dtype=torch.float32), 0.5).on("20 rows, which is no multiple of the block")

Every tensor that `launch` is given lies in a larger buffer of NaN, with NaN between its rows of rows too: what is read
beyond the end of one head is not the next head's first row. The interpreter refuses to read or write there, or anywhere
but in what `launch` is given and what `empty_like` makes. It also refuses what would go unnoticed on a CPU, and not on
a GPU:

* what a mask leaves out of a load without `other`, if it reaches the result: it is NaN here, and anything there;
* a result that is not stored exactly once (unless ``KernelRunner(launch, stored_once=False)`` says otherwise);
* sums in half precision: of `tl.sum` and `tl.dot`, and of what a loop adds up from tile to tile;
* a variable whose type or shape a loop changes, which does not compile;
* float32 products that are rounded to ten bits (TF32), which is `tl.dot`'s default.

The reference has to keep these rules as well. An error names the line of the kernel, and its text.
"""

from importlib import import_module
from typing import Any

__all__ = ["KernelRunner", "empty_like"]


def __getattr__(name: str) -> Any:
    """Import the runner, and PyTorch with it, on first use: a worker does without."""
    if name in __all__:
        return getattr(import_module(f"{__name__}.runner"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
