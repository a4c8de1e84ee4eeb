"""The kernels. A program works on one (batch, head) pair, called a sequence, or on a block of its rows.

Vocabulary: queries q (N_q, D), keys k and values v (N_k, D). A *score* is log₂e · scale · q kᵀ, since the GPU has an
instruction for 2ˣ and none for eˣ. ``lse`` is log₂ Σ 2^score over the keys: the one number per query that lets the
backward pass make the probabilities again, 2^(score − lse), instead of reading them. ``delta`` is δ, one number per
query, too (see ``_delta``). A name with d in front is a gradient. What was loaded of them is in the plural: queries,
lses, deltas.

With a bias a score is scale · q kᵀ + bias, and its difference from the largest is what log₂e multiplies: log₂e · bias
would overflow for the lowest numbers, which people write to hide a key. Beside such a number the logarithm of a sum is
lost, too, so ``lse`` is two rows here: the largest score, and log₂ Σ e^(score − largest).

Tensors (B, H, N, D) come as (pointer, stride of B, of H, of N); D has stride 1. Strides are counted in UNITs: of an
integer the compiler finds out whether 16 divides it, but not whether 8 does, and would load the rows of 72 elements
two bytes at a time. The bias (B, H, N_q, N_k) has one stride more, in elements, and may be None. What lies beyond an
edge is never read: it counts as zero, or as −∞ where it is a score.

Offsets of a block inside a big tensor are 64-bit. Those inside a block are 32-bit, which is faster. Not so for a bias:
its 32-bit offsets the compiler works out before a loop, and keeps in registers that are needed in it.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _matrix(tensor, sequence, heads, length, UNIT: tl.constexpr):
    """One sequence of a tensor, (length, D): a pointer to its first row, the stride of its rows, and their number."""
    batch, head = (sequence // heads).to(tl.int64), (sequence % heads).to(tl.int64)
    return tensor[0] + batch * (tensor[1] * UNIT) + head * (tensor[2] * UNIT), tensor[3] * UNIT, length


@triton.jit
def _pointers(matrix, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to ROWS rows from ``first`` on."""
    pointer = matrix[0] + tl.cast(first, tl.int64) * matrix[1]
    return pointer + tl.arange(0, ROWS)[:, None] * matrix[1] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _inside(matrix, first, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a tile of ROWS rows lie inside the matrix."""
    rows = (first + tl.arange(0, ROWS) < matrix[2])[:, None]
    return rows if BLOCK_D == HEAD_DIM else rows & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]


@triton.jit
def _load(
    matrix, first, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr = True
):  # fmt: skip
    """(ROWS, BLOCK_D) from row ``first`` on, zero beyond the edges. Without EDGE no row lies beyond."""
    pointers = _pointers(matrix, first, ROWS, BLOCK_D)
    if EDGE or BLOCK_D != HEAD_DIM:
        tile = tl.load(pointers, mask=_inside(matrix, first, ROWS, HEAD_DIM, BLOCK_D), other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store(matrix, first, tile, HEAD_DIM: tl.constexpr):
    """The reverse of ``_load``, rounding to the type of the matrix."""
    inside = _inside(matrix, first, tile.shape[0], HEAD_DIM, tile.shape[1])
    pointers = _pointers(matrix, first, tile.shape[0], tile.shape[1])
    tl.store(pointers, tile.to(matrix[0].dtype.element_ty), mask=inside)


@triton.jit
def _load_bias(bias, sequence, heads, rows, cols, n_q, n_k):
    """The bias of some queries and keys: −∞ beyond the edges, where nobody shall look."""
    pointer = bias[0] + (sequence // heads).to(tl.int64) * bias[1] + (sequence % heads).to(tl.int64) * bias[2]
    offsets = rows.to(tl.int64) * bias[3] + cols.to(tl.int64) * bias[4]
    inside = (rows < n_q) & (cols < n_k)
    tile = tl.load(pointer + offsets, mask=inside, other=float("-inf"))
    if tile.dtype == tl.float64:  # what is finite stays so
        tile = tl.where(tile == float("-inf"), tile, tl.maximum(tile, -3.4028234e38))
    return tile.to(tl.float32)


@triton.jit
def _lse_of(lse, sequence, n_q, bias):
    """Where a sequence's lse begins: n_q numbers, twice as many where there is a bias."""
    rows: tl.constexpr = 1 if bias is None else 2
    return lse + sequence.to(tl.int64) * n_q * rows


@triton.jit
def _dot(a, b, acc=None):
    """a b, in float32, where float32 is not cut to the 10 bits of TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


# ------------------------------------------------------------------------------------------------------------ forward


@triton.jit
def _attend(queries, keys, values, bias, hidden, scale, peak, total, out):
    """Online softmax (Milakov and Gimelshein 2018): let one more tile of keys take part.

    ``out`` and ``total`` are relative to 2^peak, the largest score so far; a larger one shrinks what is there already.
    ``bias`` and ``hidden``, where a key lies beyond the edge, may be None.
    """
    scores = _dot(queries, tl.trans(keys))
    if bias is None and hidden is None:
        # Every score is finite. The scale can wait for the subtraction, and the two become one instruction.
        new_peak = tl.maximum(peak, tl.max(scores, 1) * (scale * LOG2E))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores * (scale * LOG2E) - new_peak[:, None])
    else:
        unit: tl.constexpr = 1.0 if bias is None else LOG2E
        scores = tl.where(hidden, float("-inf"), scores * (scale * LOG2E)) if bias is None else scores * scale + bias
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # While all keys are hidden the peak is −∞, and −∞ − (−∞) would be NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2((peak - shift) * unit)
        weights = tl.exp2((scores - shift[:, None]) * unit)
    total = total * shrink + tl.sum(weights, 1)
    out = _dot(weights.to(values.dtype), values, out * shrink[:, None])
    return new_peak, total, out


@triton.jit
def _finish(out, lse, first, peak, total, tile, bias, HEAD_DIM: tl.constexpr):
    """Divide by the sum of the weights, and store. A query whose keys are all hidden gets 0, as in PyTorch's kernels.

    Its lse, or its peak, is +∞: the backward pass makes probabilities of 2^−∞ = 0 from it, and gradients of 0.
    """
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    _store(out, first, tile / total[:, None], HEAD_DIM)
    rows = first + tl.arange(0, tile.shape[0])
    if bias is None:
        tl.store(lse + rows, tl.where(blind, float("inf"), peak + tl.log2(total)), mask=rows < out[2])
    else:
        tl.store(lse + rows, tl.where(blind, float("inf"), peak), mask=rows < out[2])
        tl.store(lse + out[2] + rows, tl.log2(total), mask=rows < out[2])


@triton.jit(do_not_specialize=["programs"])
def forward_short(
    q, k, v, bias, out, lse, heads, n_q, n_k, programs, scale,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Few keys: read all of them once, keep them on the chip, and let block after block of queries pass by.

    A tile's sides are powers of two, and 197 keys would become 256; as PIECES of 128 + 64 + 16 they are 208. Each is
    (first key, size), and only the last is not full and needs a mask. ``programs`` share the queries of a sequence:
    one does it all, and reads the keys only once, where there are sequences enough to fill the chip.
    """
    sequence, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    q, k = _matrix(q, sequence, heads, n_q, UNIT), _matrix(k, sequence, heads, n_k, UNIT)
    out, v = _matrix(out, sequence, heads, n_q, UNIT), _matrix(v, sequence, heads, n_k, UNIT)
    lse = _lse_of(lse, sequence, n_q, bias)
    keys = ()
    values = ()
    for i in tl.static_range(len(PIECES)):
        keys = keys + (_load(k, PIECES[i][0], PIECES[i][1], HEAD_DIM, BLOCK_D),)
        values = values + (_load(v, PIECES[i][0], PIECES[i][1], HEAD_DIM, BLOCK_D),)

    for first_q in range(program * BLOCK_Q, n_q, programs * BLOCK_Q):
        queries = _load(q, first_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
        peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        tile = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        rows = (first_q + tl.arange(0, BLOCK_Q))[:, None]
        for i in tl.static_range(len(PIECES)):
            cols = (PIECES[i][0] + tl.arange(0, PIECES[i][1]))[None, :]
            biases = None if bias is None else _load_bias(bias, sequence, heads, rows, cols, n_q, n_k)
            hidden = cols >= n_k if i == len(PIECES) - 1 else None
            peak, total, tile = _attend(queries, keys[i], values[i], biases, hidden, scale, peak, total, tile)
        _finish(out, lse, first_q, peak, total, tile, bias, HEAD_DIM)


@triton.jit(do_not_specialize=["programs"])
def forward_long(
    q, k, v, bias, out, lse, heads, n_q, n_k, programs, scale,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Many keys: a program per block of queries goes through them, while the next tiles are on their way.

    Lengths are often 64 n + 1. The loop takes full tiles, without masks; a tile of TAIL keys ends it, if one is left.
    That tile is a loop of its own: otherwise every matrix product of the kernel would wait for the one before.
    """
    sequence, first_q = tl.program_id(0) // programs, tl.program_id(0) % programs * BLOCK_Q
    q, k = _matrix(q, sequence, heads, n_q, UNIT), _matrix(k, sequence, heads, n_k, UNIT)
    out, v = _matrix(out, sequence, heads, n_q, UNIT), _matrix(v, sequence, heads, n_k, UNIT)
    lse = _lse_of(lse, sequence, n_q, bias)
    queries = _load(q, first_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    tile = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    rows = (first_q + tl.arange(0, BLOCK_Q))[:, None]
    full = n_k // BLOCK_K * BLOCK_K
    for first_k in range(0, full, BLOCK_K):
        keys = _load(k, first_k, BLOCK_K, HEAD_DIM, BLOCK_D, EDGE=False)
        values = _load(v, first_k, BLOCK_K, HEAD_DIM, BLOCK_D, EDGE=False)
        cols = (first_k + tl.arange(0, BLOCK_K))[None, :]
        biases = None if bias is None else _load_bias(bias, sequence, heads, rows, cols, n_q, n_k)
        peak, total, tile = _attend(queries, keys, values, biases, None, scale, peak, total, tile)
    if TAIL:
        for first_k in tl.range(full, n_k, BLOCK_K, num_stages=1):  # once
            keys = _load(k, first_k, TAIL, HEAD_DIM, BLOCK_D)
            values = _load(v, first_k, TAIL, HEAD_DIM, BLOCK_D)
            cols = (first_k + tl.arange(0, TAIL))[None, :]
            biases = None if bias is None else _load_bias(bias, sequence, heads, rows, cols, n_q, n_k)
            peak, total, tile = _attend(queries, keys, values, biases, cols >= n_k, scale, peak, total, tile)
    _finish(out, lse, first_q, peak, total, tile, bias, HEAD_DIM)


# ----------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _load_vector(pointer, first, length, BLOCK: tl.constexpr, other):
    """One number per query."""
    rows = first + tl.arange(0, BLOCK)
    return tl.load(pointer + rows, mask=rows < length, other=other)


@triton.jit
def _load_lse(lse, first, n_q, BLOCK: tl.constexpr, bias):
    """The lse of a block of queries: one row of it, or two. Beyond the edge P is 0 by them."""
    found = (_load_vector(lse, first, n_q, BLOCK, float("inf")),)
    return found if bias is None else found + (_load_vector(lse + n_q, first, n_q, BLOCK, 0.0),)


@triton.jit
def _delta(out, dout):
    """δ = Σ O ∘ dO for each query: what the softmax's normalisation takes from the gradient of its every score."""
    return tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)


@triton.jit
def _differentiate(scores, dweights, lse, delta, bias, hidden, scale, AXIS: tl.constexpr):
    """Probabilities P once more, and the gradient of the scores, P ∘ (dP − δ) (Dao et al. 2022, appendix B.2).

    ``scores`` are q kᵀ and ``dweights`` are dO vᵀ, keys along ``AXIS``. ``lse`` is that of ``_load_lse``: where it
    is +∞ P is 0, in blind queries, and beyond the edge. ``bias`` and ``hidden``, where a key lies beyond the edge,
    may be None.
    """
    peak, log_sum = tl.expand_dims(lse[0], AXIS), tl.expand_dims(lse[-1], AXIS)  # the same, without a bias
    delta = tl.expand_dims(delta, AXIS)
    if bias is None:
        weights = tl.exp2(scores * (scale * LOG2E) - peak)
    else:
        weights = tl.exp2((scores * scale + bias - peak) * LOG2E - log_sum)
    if hidden is not None:  # the score 0 of no key can be far above lse: ∞, and ∞ times 0 is NaN
        weights = tl.where(hidden, 0.0, weights)
    return weights, weights * (dweights - delta)


@triton.jit
def backward_short(
    q, k, v, bias, out, lse, dout, dq, dk, dv, heads, n_q, n_k, scale,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Few keys: one program has all of them, so it alone makes dQ, dK and dV, and each is written once.

    Tiles are transposed, keys × queries. Like the rows of dK and dV, which stay in registers to the end, the keys are
    spread over all warps, while short blocks of queries pass by.
    """
    sequence = tl.program_id(0)
    q, dq = _matrix(q, sequence, heads, n_q, UNIT), _matrix(dq, sequence, heads, n_q, UNIT)
    k, dk = _matrix(k, sequence, heads, n_k, UNIT), _matrix(dk, sequence, heads, n_k, UNIT)
    v, dv = _matrix(v, sequence, heads, n_k, UNIT), _matrix(dv, sequence, heads, n_k, UNIT)
    out, dout = _matrix(out, sequence, heads, n_q, UNIT), _matrix(dout, sequence, heads, n_q, UNIT)
    lse = _lse_of(lse, sequence, n_q, bias)
    keys = _load(k, 0, BLOCK_K, HEAD_DIM, BLOCK_D)
    values = _load(v, 0, BLOCK_K, HEAD_DIM, BLOCK_D)
    dkeys = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dvalues = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    cols = tl.arange(0, BLOCK_K)[:, None]
    for first_q in range(0, n_q, BLOCK_Q):
        queries = _load(q, first_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
        dtile = _load(dout, first_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
        deltas = _delta(_load(out, first_q, BLOCK_Q, HEAD_DIM, BLOCK_D), dtile)
        lses = _load_lse(lse, first_q, n_q, BLOCK_Q, bias)
        rows = (first_q + tl.arange(0, BLOCK_Q))[None, :]
        biases = None if bias is None else _load_bias(bias, sequence, heads, rows, cols, n_q, n_k)
        scores, dweights = _dot(keys, tl.trans(queries)), _dot(values, tl.trans(dtile))
        weights, dscores = _differentiate(scores, dweights, lses, deltas, biases, cols >= n_k, scale, AXIS=0)
        dvalues = _dot(weights.to(dtile.dtype), dtile, dvalues)
        dscores = dscores.to(queries.dtype)
        dkeys = _dot(dscores, queries, dkeys)
        _store(dq, first_q, _dot(tl.trans(dscores), keys) * scale, HEAD_DIM)
    _store(dk, 0, dkeys * scale, HEAD_DIM)
    _store(dv, 0, dvalues, HEAD_DIM)


@triton.jit(do_not_specialize=["programs"])
def backward_dq(
    q, k, v, bias, out, lse, dout, dq, delta, heads, n_q, n_k, programs, scale,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Many keys, first half: dQ, by blocks of queries, and δ for the second half.

    In one kernel for all three gradients many programs would add to the same dQ, in an order of chance. Two kernels
    compute the scores twice, and give the same bits every time.
    """
    sequence, first_q = tl.program_id(0) // programs, tl.program_id(0) % programs * BLOCK_Q
    q, k = _matrix(q, sequence, heads, n_q, UNIT), _matrix(k, sequence, heads, n_k, UNIT)
    dq, v = _matrix(dq, sequence, heads, n_q, UNIT), _matrix(v, sequence, heads, n_k, UNIT)
    out, dout = _matrix(out, sequence, heads, n_q, UNIT), _matrix(dout, sequence, heads, n_q, UNIT)
    queries = _load(q, first_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
    dtile = _load(dout, first_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
    deltas = _delta(_load(out, first_q, BLOCK_Q, HEAD_DIM, BLOCK_D), dtile)
    rows = first_q + tl.arange(0, BLOCK_Q)
    tl.store(delta + sequence.to(tl.int64) * n_q + rows, deltas, mask=rows < n_q)
    rows = rows[:, None]
    lses = _load_lse(_lse_of(lse, sequence, n_q, bias), first_q, n_q, BLOCK_Q, bias)
    dqueries = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    full = n_k // BLOCK_K * BLOCK_K
    for first_k in range(0, full, BLOCK_K):
        keys = _load(k, first_k, BLOCK_K, HEAD_DIM, BLOCK_D, EDGE=False)
        values = _load(v, first_k, BLOCK_K, HEAD_DIM, BLOCK_D, EDGE=False)
        cols = (first_k + tl.arange(0, BLOCK_K))[None, :]
        biases = None if bias is None else _load_bias(bias, sequence, heads, rows, cols, n_q, n_k)
        scores, dweights = _dot(queries, tl.trans(keys)), _dot(dtile, tl.trans(values))
        _, dscores = _differentiate(scores, dweights, lses, deltas, biases, None, scale, AXIS=1)
        dqueries = _dot(dscores.to(keys.dtype), keys, dqueries)
    if TAIL:
        for first_k in tl.range(full, n_k, BLOCK_K, num_stages=1):  # once, see ``forward_long``
            keys = _load(k, first_k, TAIL, HEAD_DIM, BLOCK_D)
            values = _load(v, first_k, TAIL, HEAD_DIM, BLOCK_D)
            cols = (first_k + tl.arange(0, TAIL))[None, :]
            biases = None if bias is None else _load_bias(bias, sequence, heads, rows, cols, n_q, n_k)
            scores, dweights = _dot(queries, tl.trans(keys)), _dot(dtile, tl.trans(values))
            _, dscores = _differentiate(scores, dweights, lses, deltas, biases, cols >= n_k, scale, AXIS=1)
            dqueries = _dot(dscores.to(keys.dtype), keys, dqueries)
    _store(dq, first_q, dqueries * scale, HEAD_DIM)


@triton.jit(do_not_specialize=["programs"])
def backward_dkdv(
    q, k, v, bias, lse, delta, dout, dk, dv, heads, n_q, n_k, programs, scale,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Many keys, second half: dK and dV, by blocks of keys. Tiles are transposed, as in ``backward_short``.

    Keys beyond the edge need no mask: each spoils only its own row of dK and dV, which is not stored.
    """
    sequence, first_k = tl.program_id(0) // programs, tl.program_id(0) % programs * BLOCK_K
    q, dout = _matrix(q, sequence, heads, n_q, UNIT), _matrix(dout, sequence, heads, n_q, UNIT)
    k, dk = _matrix(k, sequence, heads, n_k, UNIT), _matrix(dk, sequence, heads, n_k, UNIT)
    v, dv = _matrix(v, sequence, heads, n_k, UNIT), _matrix(dv, sequence, heads, n_k, UNIT)
    lse = _lse_of(lse, sequence, n_q, bias)
    delta += sequence.to(tl.int64) * n_q
    keys = _load(k, first_k, BLOCK_K, HEAD_DIM, BLOCK_D)
    values = _load(v, first_k, BLOCK_K, HEAD_DIM, BLOCK_D)
    dkeys = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dvalues = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    cols = (first_k + tl.arange(0, BLOCK_K))[:, None]
    for first_q in range(0, n_q, BLOCK_Q):
        queries = _load(q, first_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
        dtile = _load(dout, first_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
        lses = _load_lse(lse, first_q, n_q, BLOCK_Q, bias)
        deltas = _load_vector(delta, first_q, n_q, BLOCK_Q, 0.0)
        rows = (first_q + tl.arange(0, BLOCK_Q))[None, :]
        biases = None if bias is None else _load_bias(bias, sequence, heads, rows, cols, n_q, n_k)
        scores, dweights = _dot(keys, tl.trans(queries)), _dot(values, tl.trans(dtile))
        weights, dscores = _differentiate(scores, dweights, lses, deltas, biases, None, scale, AXIS=0)
        dvalues = _dot(weights.to(dtile.dtype), dtile, dvalues)
        dkeys = _dot(dscores.to(queries.dtype), queries, dkeys)
    _store(dk, first_k, dkeys * scale, HEAD_DIM)
    _store(dv, first_k, dvalues, HEAD_DIM)


@triton.jit
def backward_dbias(
    q, k, v, bias, out, lse, dout, dbias, batch, heads, n_q, n_k, batch_per_program, scale,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the bias is that of the scores, summed over the batch entries that share it.

    A program has one tile of one head, and adds up ``batch_per_program`` entries, one after the other: always in the
    same order. What the programs found is (parts, H, N_q, N_k) float32, for the caller to add up.
    """
    tiles_q, tiles_k = tl.cdiv(n_q, BLOCK_Q), tl.cdiv(n_k, BLOCK_K)
    part_and_head, place = tl.program_id(0) // (tiles_q * tiles_k), tl.program_id(0) % (tiles_q * tiles_k)
    part, head = part_and_head // heads, part_and_head % heads
    first_q, first_k = place // tiles_k * BLOCK_Q, place % tiles_k * BLOCK_K
    rows, cols = (first_q + tl.arange(0, BLOCK_Q))[:, None], (first_k + tl.arange(0, BLOCK_K))[None, :]
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    first = part * batch_per_program
    for entry in range(first, tl.minimum(first + batch_per_program, batch)):
        sequence = entry * heads + head
        queries = _load(_matrix(q, sequence, heads, n_q, UNIT), first_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
        keys = _load(_matrix(k, sequence, heads, n_k, UNIT), first_k, BLOCK_K, HEAD_DIM, BLOCK_D)
        values = _load(_matrix(v, sequence, heads, n_k, UNIT), first_k, BLOCK_K, HEAD_DIM, BLOCK_D)
        dtile = _load(_matrix(dout, sequence, heads, n_q, UNIT), first_q, BLOCK_Q, HEAD_DIM, BLOCK_D)
        deltas = _delta(_load(_matrix(out, sequence, heads, n_q, UNIT), first_q, BLOCK_Q, HEAD_DIM, BLOCK_D), dtile)
        lses = _load_lse(_lse_of(lse, sequence, n_q, bias), first_q, n_q, BLOCK_Q, bias)
        biases = _load_bias(bias, sequence, heads, rows, cols, n_q, n_k)
        scores, dweights = _dot(queries, tl.trans(keys)), _dot(dtile, tl.trans(values))
        _, dscores = _differentiate(scores, dweights, lses, deltas, biases, None, scale, AXIS=1)
        total += dscores
    dbias += part_and_head.to(tl.int64) * n_q * n_k
    tl.store(dbias + rows.to(tl.int64) * n_k + cols, total, mask=(rows < n_q) & (cols < n_k))
