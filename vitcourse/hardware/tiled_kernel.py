"""The shortest FlashAttention kernel that is right: :mod:`~vitcourse.hardware.tiled`, in Triton."""

import triton
import triton.language as tl


@triton.jit
def flash_kernel(q, k, v, out, stride_head, stride_token, n, scale, BLOCK: tl.constexpr, D: tl.constexpr):
    """One program: a block of queries of one head, against all keys, tile by tile (Dao et al. 2022, alg. 1).

    q, k, v and out are (heads, n, D), and have the same strides; D has stride 1, and is a power of two, at least 16.
    The grid is (number of blocks, heads).
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.program_id(1) * stride_head + tl.arange(0, D)[None, :]
    queries = tl.load(q + start + rows[:, None] * stride_token, mask=rows[:, None] < n, other=0.0)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, D], tl.float32)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        keys = tl.load(k + start + cols[:, None] * stride_token, mask=cols[:, None] < n, other=0.0)
        values = tl.load(v + start + cols[:, None] * stride_token, mask=cols[:, None] < n, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(cols[None, :] < n, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp(peak - new_peak)
        weights = tl.exp(scores - new_peak[:, None])
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        peak = new_peak
    result = (result / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + start + rows[:, None] * stride_token, result, mask=rows[:, None] < n)
