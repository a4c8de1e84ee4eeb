"""The check of `hardware.flash_kernel`, which needs Triton and is graded in a process of its own."""

import inspect
import linecache

import torch
import triton
import triton.language as tl

from vitcourse.course import kernels
from vitcourse.course.checks import call, check, holds
from vitcourse.course.limits import TimeLimit
from vitcourse.hardware.tiled_kernel import flash_kernel as _reference

BLOCK = 16  # the smallest that tl.dot takes; the lesson launches larger ones
SECONDS = 30.0  # time limit of one call


def launch(kernel, q, k, v, scale):
    """q, k, v (heads, n, D) -> (heads, n, D)."""
    out = kernels.empty_like(q)
    heads, n, d = q.shape
    grid = (triton.cdiv(n, BLOCK), heads)
    kernel[grid](q, k, v, out, out.stride(0), out.stride(1), n, scale, BLOCK=BLOCK, D=d)
    return out


RUNNER = kernels.KernelRunner(launch)


def multiplies_one_type(kernel, *inputs):
    """False where `tl.dot` refuses two sides of different types; other errors are told with the calls that follow."""
    error = RUNNER(kernel, call(*inputs), {}, None, gradients=False, seconds=SECONDS, seed=0).error
    if isinstance(error, TimeLimit):  # once is enough
        raise error
    return "same dtype" not in str(error)


@check(
    "hardware.flash_kernel",
    reference="vitcourse.hardware.tiled_kernel.flash_kernel",
    level=5,
    minutes=45,
    why="It is the idea behind the attention kernels of nearly all large transformers, in twenty lines that you can change.",
    hints=[
        "It is your attend_tile: a new peak, a factor for the old sums, new weights. `tl.max(scores, 1)` and "
        "`tl.sum(weights, 1)` reduce along the keys.",
        "The loop's last tile may reach beyond the last key. Loads need `mask=…, other=0.0`, but a key of zeros has the "
        "score 0, not −∞: hide it with `tl.where`.",
        "Write back only rows that exist, and only after the division by the total.",
    ],
    gradients=False,
    seconds=SECONDS,
    runner=RUNNER,
    exempt={
        "batch": "its cases have one head, and two",
        "larger": "its cases say what matters: whole blocks, a rest, less than one block",
        "smaller": "its cases say what matters: whole blocks, a rest, less than one block",
        "large": "scores in float32 are rounded at this size; large ones are declared",
        "tiny": "nothing in it depends on the size of small numbers",
    },
)
def flash_kernel(rng):
    def inputs(heads, n, d, size=1.0, dtype=torch.float32):
        return [rng.normal(heads, n, d, dtype=dtype) * s for s in (size, size, 1.0)]

    # First of all, since whoever mixes types may make another mistake, too: each is then named in its turn.
    half = inputs(1, 16, 16, dtype=torch.float16)
    yield holds(
        "the inputs are float16, and a `tl.dot` stops: its two sides are of different types",
        lambda kernel: multiplies_one_type(kernel, *half, 0.25),
        points_to="types-mixed",
    )
    yield call(*inputs(1, 32, 16), 0.25).on("32 tokens, whole blocks")
    yield call(*inputs(2, 21, 16), 0.3).on("21 tokens, no multiple of the block")
    yield call(*inputs(1, 5, 32), 0.2).on("5 tokens, less than a block")
    yield call(*inputs(1, 33, 16, size=6.0), 1.0).on("33 tokens with large scores")
    q, k, v = inputs(1, 21, 16)
    yield call(q + 6, k - 6, v, 0.25).on("21 tokens with scores far below zero")
    yield call(*inputs(1, 37, 16, dtype=torch.float16), 0.25).on("37 tokens in float16")


def _altered(*exchanged):
    """The reference with pieces of its text exchanged, wherever they stand: old, new, and perhaps more such pairs."""
    text = inspect.getsource(_reference.fn)
    for old, new in zip(exchanged[::2], exchanged[1::2], strict=True):
        if old not in text:
            raise ValueError(f"flash_kernel has no {old!r}")
        text = text.replace(old, new)
    file = f"<flash_kernel {hash(text)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope = {"__name__": __name__, "triton": triton, "tl": tl}
    exec(compile(text, file, "exec"), scope)
    return scope["flash_kernel"]


flash_kernel.mistake(
    "beyond-the-last-key",
    "right only where N is a multiple of the block: keys beyond the last one are loaded as zeros, and a score of 0 is a "
    "weight like any other",
    _altered('        scores = tl.where(cols[None, :] < n, scores, float("-inf"))\n', ""),
)
flash_kernel.mistake(
    "weights-hidden-not-scores",
    "hiding the weights comes too late for the peak: where all scores are far below zero, the 0 of a key that does not "
    "exist is the largest, and all weights that count vanish beside it",
    _altered(
        """        scores = tl.where(cols[None, :] < n, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp(peak - new_peak)
        weights = tl.exp(scores - new_peak[:, None])
""",
        """        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp(peak - new_peak)
        weights = tl.where(cols[None, :] < n, tl.exp(scores - new_peak[:, None]), 0.0)
""",
    ),
)
flash_kernel.mistake(
    "unmasked-loads",
    "keys or values beyond the last one are read from memory that is not theirs: whatever lies there comes in, and even a "
    "weight of 0 times NaN is NaN",
    _altered(", mask=cols[:, None] < n, other=0.0", ""),
)
flash_kernel.mistake(
    "rest-undefined",
    "what a mask leaves out is not 0 but anything, NaN perhaps, unless `other` says what: a weight of 0 does not help, and "
    "a large negative number added does not either",
    _altered(", other=0.0)\n        scores", ")\n        scores"),
)
flash_kernel.mistake(
    "infinite-keys",
    "a key of −∞ does not hide itself: its products with a query are ∞ and −∞, and their sum is NaN",
    _altered(
        "other=0.0)\n        values",
        'other=float("-inf"))\n        values',
        '        scores = tl.where(cols[None, :] < n, scores, float("-inf"))\n',
        "",
    ),
)
flash_kernel.mistake(
    "infinite-values",
    "values beyond the last one have the weight 0, and yet must be numbers: 0 · ∞ is NaN",
    _altered("other=0.0)\n        scores", 'other=float("-inf"))\n        scores'),
)
flash_kernel.mistake(
    "never-stored",
    "nothing reaches `out`: a kernel returns nothing, its caller gets what was stored there",
    _altered("    tl.store(out + start + rows[:, None] * stride_token, result, mask=rows[:, None] < n)\n", ""),
)
flash_kernel.mistake(
    "stored-each-tile",
    "the store stands in the loop: after every tile all of `out` is written again, and slow memory is what this kernel is "
    "meant to spare",
    _altered(
        "    result = (result / total[:, None]).to(out.dtype.element_ty)\n",
        "",
        "    tl.store(out + start + rows[:, None] * stride_token, result, mask=rows[:, None] < n)\n",
        "",
        "        peak = new_peak\n",
        "        peak = new_peak\n"
        "        so_far = (result / total[:, None]).to(out.dtype.element_ty)\n"
        "        tl.store(out + start + rows[:, None] * stride_token, so_far, mask=rows[:, None] < n)\n",
    ),  # fmt: skip
)
flash_kernel.mistake(
    "unmasked-store",
    "the last block writes rows that do not exist: into the next head's, or into somebody else's memory",
    _altered(", result, mask=rows[:, None] < n)", ", result)"),
)
flash_kernel.mistake(
    "rest-forgotten",
    "the loop stops before the last, incomplete tile: right only where N is a multiple of the block",
    _altered("range(0, n, BLOCK)", "range(0, n // BLOCK * BLOCK, BLOCK)"),
)
flash_kernel.mistake(
    "one-tile", "only the first tile of keys is looked at", _altered("range(0, n, BLOCK)", "range(0, BLOCK, BLOCK)")
)
flash_kernel.mistake(
    "accumulator-not-shrunk",
    "the accumulator is not rescaled when the peak rises: what was added before is relative to an older, smaller peak",
    _altered("result * shrink[:, None] + ", "result + "),
)
flash_kernel.mistake(
    "total-not-shrunk",
    "the total is not rescaled when the peak rises, so the weights no longer sum to one",
    _altered("total * shrink + ", "total + "),
)
flash_kernel.mistake(
    "nothing-shrunk",
    "neither sum is rescaled when the peak rises: early tiles count too much",
    _altered("shrink = tl.exp(peak - new_peak)", "shrink = tl.where(peak == peak, 1.0, 1.0)"),
)
flash_kernel.mistake(
    "peak-forgotten",
    "the new peak is not kept for the next tile, which then shrinks the sums as if nothing had been seen yet",
    _altered("        peak = new_peak\n", ""),
)
flash_kernel.mistake(
    "peak-of-the-tile",
    "the peak is that of the tile alone, and may fall: right for small scores, but the factor for the old sums can overflow",
    _altered("tl.maximum(peak, tl.max(scores, 1))", "tl.max(scores, 1)"),
)
flash_kernel.mistake(
    "peak-over-queries",
    "the peak is taken over the queries, one for each key; every query needs its own, over the keys",
    _altered("tl.max(scores, 1)", "tl.max(scores, 0)"),
)
flash_kernel.mistake(
    "total-over-queries",
    "the weights are summed over the queries, one sum for each key; every query needs its own, over the keys",
    _altered("tl.sum(weights, 1)", "tl.sum(weights, 0)"),
)
flash_kernel.mistake(
    "both-over-queries",
    "both the peak and the total are taken over the queries; every query needs its own, over the keys",
    _altered("tl.sum(weights, 1)", "tl.sum(weights, 0)", "tl.max(scores, 1)", "tl.max(scores, 0)"),
)
flash_kernel.mistake(
    "nan-from-the-start",
    "all is NaN from the first tile on: one of −∞ − (−∞), 0 · ∞, ∞ / ∞ and 0 / 0 is computed, and the peak is −∞ before "
    "the first tile",
    _altered("scores - new_peak[:, None]", "scores - peak[:, None]"),
)
flash_kernel.mistake(
    "divided-each-tile",
    "the result is divided by the total after every tile; then the next tile adds to a mean, not to a sum",
    _altered(
        "        peak = new_peak\n",
        "        peak = new_peak\n        result = result / total[:, None]\n",
        "(result / total[:, None])",
        "result",
    ),
)
flash_kernel.mistake(
    "keys-not-transposed",
    "a query meets its keys along the channels: as they are loaded, those are the columns of both",
    _altered("tl.trans(keys)", "keys"),
)
flash_kernel.mistake(
    "one-peak",
    "all queries of the block share one peak: where a query's own scores lie far below it, all its weights become 0",
    _altered("tl.max(scores, 1)", "tl.max(tl.max(scores, 1), 0)"),
)
flash_kernel.mistake("no-scale", "the scores are not scaled", _altered(" * scale\n", "\n"))
flash_kernel.mistake(
    "never-divided",
    "the weighted values are added up, but not divided by the sum of the weights",
    _altered("(result / total[:, None])", "result"),
)
flash_kernel.mistake(
    "first-head",
    "every program works on the first head: the second number of the grid says which head is meant",
    _altered("tl.program_id(1) * stride_head", "0 * stride_head"),
)
flash_kernel.mistake(
    "types-mixed",
    "not all that you multiply was loaded: what is computed in float32 stays float32, whatever the inputs are",
    _altered("weights.to(values.dtype)", "weights"),
)
flash_kernel.mistake(
    "sums-rounded",
    "what is added up is rounded to the type of the inputs at every tile: a small error in three tiles, a large one in a "
    "hundred",
    _altered(
        "        peak = new_peak\n",
        "        peak = new_peak\n        result = result.to(values.dtype).to(tl.float32)\n",
    ),
)
flash_kernel.mistake(
    "products-rounded",
    "on a GPU float32 does not stay float32 in `tl.dot`, if nothing is said: exact on the interpreter, wrong in the fourth "
    "digit there",
    _altered(', input_precision="ieee"', ""),
)
