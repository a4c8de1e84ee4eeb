"""Triton kernels: integers are multiplied as integers, or made real on the chip, and no real weight is ever in memory.

All matrices are row-major and contiguous: x (M, K), weights (N, K) as in ``nn.Linear``, result (M, N). One program
makes one (BLOCK_M, BLOCK_N) tile of the result. Rows beyond an edge read the last row, and their result is not stored.
"""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: a float32 added to it keeps no fraction, rounded half to even
TINY = tl.constexpr(2.0**-126)  # the smallest normal float32
STRIPE = tl.constexpr(8)  # rows of tiles


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of this program's tile of the result.

    STRIPE rows of tiles are made column by column: programs that run at the same time share both x and weights, and the
    second finds in the cache what the first has read.
    """
    programs_m, programs_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // (STRIPE * programs_n) * STRIPE
    height = tl.minimum(programs_m - first, STRIPE)
    within = tl.program_id(0) % (STRIPE * programs_n)
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, columns


@triton.jit
def _row_pointers(pointer, rows, count, width):
    """Where each of the rows begins, as a column; rows may lie more than 2³¹ elements away."""
    return pointer + (tl.minimum(rows, count - 1).to(tl.int64) * width)[:, None]


@triton.jit
def _load_k(pointers, k, K, WHOLE: tl.constexpr):
    """Columns k of some rows, zero from K on. WHOLE says that there is no such column, which saves the test."""
    if WHOLE:
        return tl.load(pointers + k)
    return tl.load(pointers + k, mask=k < K, other=0)


@triton.jit
def _store(out_ptr, out, bias_ptr, rows, columns, M, N):
    """Add the bias in float32, round to the type of the result, store."""
    if bias_ptr is not None:
        out += tl.load(bias_ptr + columns, mask=columns < N, other=0).to(tl.float32)[None, :]
    pointers = _row_pointers(out_ptr, rows, M, N) + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def quantize_rows(x_ptr, fixed_ptr, q_ptr, scale_ptr, K, BLOCK_K: tl.constexpr):
    """One program quantizes one row to int8 and stores its scale: the fixed one, or, if that is None, the row's own."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row.to(tl.int64) * K + k, mask=k < K, other=0).to(tl.float32)
    lost = x != x  # int8 has no NaN: the scale shall have it
    if fixed_ptr is not None:
        scale = tl.load(fixed_ptr)
        lost = lost | (tl.abs(x) == float("inf"))
    else:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), axis=0), 127.5), TINY)
    scale = tl.where(tl.sum(lost.to(tl.int32), axis=0) > 0, float("nan"), scale)
    q = (tl.div_rn(x, scale) + ROUND) - ROUND
    q = tl.minimum(tl.maximum(q, -127.0), 127.0)
    tl.store(q_ptr + row.to(tl.int64) * K + k, q.to(tl.int8), mask=k < K)
    tl.store(scale_ptr + row, scale)


@triton.jit
def w8a8(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr, M, N, K,
    PER_TOKEN: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int8 × int8, summed in int32: exact. Scales and bias are applied to the sums in registers."""
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N)
    x_rows, weight_rows = _row_pointers(x_ptr, rows, M, K), _row_pointers(weight_ptr, columns, N, K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        x = _load_k(x_rows, k, K, WHOLE)
        weight = _load_k(weight_rows, k, K, WHOLE)
        total = tl.dot(x, tl.trans(weight), total, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + tl.minimum(rows, M - 1) * PER_TOKEN)[:, None]
    weight_scale = tl.load(weight_scale_ptr + columns, mask=columns < N, other=0)
    _store(out_ptr, total.to(tl.float32) * x_scale * weight_scale[None, :], bias_ptr, rows, columns, M, N)


@triton.jit
def w8a16(
    x_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr, M, N, K,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int8 weights, exact in the type of x, float16 or bfloat16, times x. The channel's scale is applied to the sum."""
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N)
    x_rows, weight_rows = _row_pointers(x_ptr, rows, M, K), _row_pointers(weight_ptr, columns, N, K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        x = _load_k(x_rows, k, K, WHOLE)
        weight = _load_k(weight_rows, k, K, WHOLE).to(x.dtype)
        total = tl.dot(x, tl.trans(weight), total)
    weight_scale = tl.load(weight_scale_ptr + columns, mask=columns < N, other=0)
    _store(out_ptr, total * weight_scale[None, :], bias_ptr, rows, columns, M, N)


@triton.jit
def w4a16(
    x_ptr, packed_ptr, weight_scale_ptr, bias_ptr, out_ptr, M, N, K,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """4-bit weights times x. A group's first half lies in the low nibbles of its bytes, its second in the high.

    A step takes BLOCK_K inputs of one group, half of them from either end, for a whole group of 256 would not fit into
    shared memory. The integers are exact in the type of x, and the group's scale is applied to their sum, in float32.
    """
    HALF: tl.constexpr = GROUP // 2
    BYTES: tl.constexpr = BLOCK_K // 2
    STEPS: tl.constexpr = GROUP // BLOCK_K
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N)
    groups = tl.cdiv(K, GROUP)
    x_rows = _row_pointers(x_ptr, rows, M, K)
    packed_rows = _row_pointers(packed_ptr, columns, N, groups * HALF)
    scale_row = weight_scale_ptr + tl.minimum(columns, N - 1).to(tl.int64) * groups
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, groups * STEPS):
        byte = tl.arange(0, BYTES)[None, :]
        packed = tl.load(packed_rows + step * BYTES + byte)
        k = step // STEPS * GROUP + step % STEPS * BYTES + byte
        x_low = _load_k(x_rows, k, K, WHOLE)
        x_high = _load_k(x_rows, k + HALF, K, WHOLE)
        low, high = ((packed << 4) >> 4).to(x_low.dtype), (packed >> 4).to(x_low.dtype)
        part = tl.dot(x_low, tl.trans(low))
        part = tl.dot(x_high, tl.trans(high), part)
        total += part * tl.load(scale_row + step // STEPS)[None, :]
    _store(out_ptr, total, bias_ptr, rows, columns, M, N)


# For few tokens, tensor cores would multiply padding, and large tiles would make few programs, that is, few readers of
# the weights; and reading them is all that takes time. So a program makes BLOCK_N outputs of one token, without tl.dot,
# and fetches the weights of the next steps while it computes. All tokens but the first find them in the cache.


@triton.jit
def w8a16_few(
    x_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr, M, N, K,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As :func:`w8a16`, for BLOCK_M = 1."""
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N)
    x_row, weight_rows = _row_pointers(x_ptr, rows, M, K), _row_pointers(weight_ptr, columns, N, K)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=3):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        x, weight = _load_k(x_row, k, K, WHOLE), _load_k(weight_rows, k, K, WHOLE)
        total += weight.to(tl.float32) * x.to(tl.float32)
    weight_scale = tl.load(weight_scale_ptr + columns, mask=columns < N, other=0)
    _store(out_ptr, (tl.sum(total, axis=1) * weight_scale)[None, :], bias_ptr, rows, columns, M, N)


@triton.jit
def w4a16_few(
    x_ptr, packed_ptr, weight_scale_ptr, bias_ptr, out_ptr, M, N, K,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As :func:`w4a16`, for BLOCK_M = 1, and several groups a step: a dimension of their own has one scale each."""
    HALF: tl.constexpr = GROUP // 2
    COUNT: tl.constexpr = BLOCK_K // GROUP
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N)
    groups = tl.cdiv(K, GROUP)
    x_row = _row_pointers(x_ptr, rows, M, K)[:, :, None]
    packed_rows = _row_pointers(packed_ptr, columns, N, groups * HALF)[:, :, None]
    scale_rows = _row_pointers(weight_scale_ptr, columns, N, groups)
    total = tl.zeros((BLOCK_N, COUNT), tl.float32)
    for first in tl.range(0, groups, COUNT, num_stages=3):
        group = first + tl.arange(0, COUNT)[None, :]
        byte = tl.arange(0, HALF)[None, None, :]
        k = group[:, :, None] * GROUP + byte
        x_low, x_high = _load_k(x_row, k, K, WHOLE), _load_k(x_row, k + HALF, K, WHOLE)
        packed = _load_k(packed_rows, group[:, :, None] * HALF + byte, groups * HALF, WHOLE)
        low, high = ((packed << 4) >> 4).to(tl.float32), (packed >> 4).to(tl.float32)
        part = tl.sum(low * x_low.to(tl.float32) + high * x_high.to(tl.float32), axis=2)
        total += part * _load_k(scale_rows, group, groups, WHOLE)
    _store(out_ptr, tl.sum(total, axis=1)[None, :], bias_ptr, rows, columns, M, N)
