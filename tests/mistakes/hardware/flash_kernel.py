"""Answers to `hardware.flash_kernel`."""

import inspect
import linecache

import pytest

from mistakes import collect

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hardware.flash_kernel")


@triton.jit
def flash_kernel(q, k, v, out, stride_head, stride_token, n, scale, BLOCK: tl.constexpr, D: tl.constexpr):
    """With pointers that move on, powers of two, and a hidden score far below all others."""
    block = tl.program_id(axis=0)
    head = tl.program_id(axis=1)
    offset = head * stride_head
    tokens = tl.arange(0, BLOCK)
    channels = tl.arange(0, D)
    mine = block * BLOCK + tokens
    place = offset + mine[:, None] * stride_token + channels[None, :]
    there = (mine < n)[:, None]
    a = tl.load(q + place, mask=there, other=0.0) * (scale * 1.4426950408889634)
    k_pointers = k + offset + tokens[:, None] * stride_token + channels[None, :]
    v_pointers = v + offset + tokens[:, None] * stride_token + channels[None, :]
    m = tl.zeros([BLOCK], tl.float32) - 1.0e30
    s = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    last = n
    for i in range(0, last, BLOCK):
        valid = i + tokens < n
        kt = tl.load(k_pointers, mask=valid[:, None], other=0.0)
        vt = tl.load(v_pointers, mask=valid[:, None], other=0.0)
        logits = tl.dot(a, tl.trans(kt), input_precision="ieee")
        logits += tl.where(valid, 0.0, -1.0e30)[None, :]
        top = tl.max(logits, axis=1)
        m_new = tl.where(top > m, top, m)
        p = tl.exp2(logits - m_new[:, None])
        c = tl.exp2(m - m_new)
        s = s * c
        s += tl.sum(p, axis=1)
        acc = acc * c[:, None]
        acc += tl.dot(p.to(vt.dtype), vt, input_precision="ieee")
        m = m_new
        k_pointers += BLOCK * stride_token
        v_pointers += BLOCK * stride_token
    tl.store(out + place, acc / s[:, None], mask=there)


def changed(*pairs):
    """The kernel above with pieces of its text exchanged."""
    text = inspect.getsource(flash_kernel.fn)
    for old, new in pairs:
        if old not in text:
            raise ValueError(f"no {old!r} in the kernel")
        text = text.replace(old, new)
    file = f"<variant {hash(text)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope = {"__name__": __name__, "triton": triton, "tl": tl}
    exec(compile(text, file, "exec"), scope)
    return scope["flash_kernel"]


right(flash_kernel)
for key, pairs in {
    "beyond-the-last-key": [("        logits += tl.where(valid, 0.0, -1.0e30)[None, :]\n", "")],
    "weights-hidden-not-scores": [
        ("        logits += tl.where(valid, 0.0, -1.0e30)[None, :]\n", ""),
        ("p = tl.exp2(logits - m_new[:, None])", "p = tl.exp2(logits - m_new[:, None]) * tl.where(valid, 1.0, 0.0)"),
    ],
    "unmasked-loads": [(", mask=valid[:, None], other=0.0", "")],
    "rest-undefined": [
        ("vt = tl.load(v_pointers, mask=valid[:, None], other=0.0)", "vt = tl.load(v_pointers, valid[:, None])")
    ],
    "stored-each-tile": [
        ("    tl.store(out + place, acc / s[:, None], mask=there)\n", ""),
        ("        m = m_new\n", "        m = m_new\n        tl.store(out + place, acc / s[:, None], mask=there)\n"),
    ],
    "sums-rounded": [("acc += tl.dot(", "acc = acc.to(q.dtype.element_ty) + tl.dot(")],
    "products-rounded": [('input_precision="ieee"', "allow_tf32=True")],
    "infinite-keys": [
        ("kt = tl.load(k_pointers, mask=valid[:, None], other=0.0)", "kt = tl.load(k_pointers, valid[:, None], LOW)"),
        ("        logits += tl.where(valid, 0.0, -1.0e30)[None, :]\n", ""),
        ("last = n\n", 'last = n\n    LOW = -float("inf")\n'),
    ],
    "infinite-values": [
        ("vt = tl.load(v_pointers, mask=valid[:, None], other=0.0)", "vt = tl.load(v_pointers, valid[:, None], HIGH)"),
        ("last = n\n", 'last = n\n    HIGH = float("inf")\n'),
    ],
    "never-stored": [("tl.store(out + place, acc / s[:, None], mask=there)", "return acc / s[:, None]")],
    "unmasked-store": [("acc / s[:, None], mask=there", "acc / s[:, None]")],
    "rest-forgotten": [("last = n\n", "last = n - n % BLOCK\n")],
    "one-tile": [("last = n\n", "last = BLOCK\n")],
    "accumulator-not-shrunk": [("acc = acc * c[:, None]", "acc = acc * 1.0")],
    "total-not-shrunk": [("s = s * c\n", "s = s * 1.0\n")],
    "nothing-shrunk": [("c = tl.exp2(m - m_new)", "c = tl.exp2(m - m)")],
    "peak-forgotten": [("m = m_new\n", "m = m\n"), ("- 1.0e30\n", '+ float("-inf")\n')],
    "peak-of-the-tile": [("m_new = tl.where(top > m, top, m)", "m_new = top")],
    "peak-over-queries": [("top = tl.max(logits, axis=1)", "top = tl.max(tl.trans(logits), axis=1)")],
    "total-over-queries": [("tl.sum(p, axis=1)", "tl.sum(p, axis=0)")],
    "both-over-queries": [("logits, axis=1)", "logits, axis=0)"), ("p, axis=1)", "p, axis=0)")],
    "nan-from-the-start": [("c = tl.exp2(m - m_new)", "c = tl.exp2(m_new - m)")],
    "divided-each-tile": [("m = m_new\n", "m = m_new\n        acc /= s[:, None]\n"), ("acc / s[:, None], ", "acc, ")],
    "keys-not-transposed": [("tl.trans(kt)", "kt")],
    "one-peak": [("tl.max(logits, axis=1)", "tl.max(tl.max(logits, axis=0), axis=0)")],
    "no-scale": [("(scale * 1.4426950408889634)", "1.4426950408889634")],
    "never-divided": [("acc / s[:, None]", "acc")],
    "first-head": [("offset = head * stride_head", "offset = head * 0")],
    "types-mixed": [("p.to(vt.dtype)", "p")],
}.items():
    variant(key)(changed(*pairs))
for load in ("k_pointers", "v_pointers"):  # one of the two is enough, even where no result changes
    variant("unmasked-loads")(changed((f"{load}, mask=valid[:, None], other=0.0", load)))
variant("rest-undefined")(changed(("k_pointers, mask=valid[:, None], other=0.0", "k_pointers, mask=valid[:, None]")))
variant("sums-rounded")(changed(("m = m_new\n", "m = m_new\n        acc = acc.to(vt.dtype)\n")))
variant("sums-rounded")(changed(("s = s * c\n", "s = (s * c).to(vt.dtype).to(tl.float32)\n")))
variant("products-rounded")(changed((', input_precision="ieee")\n        logits', ")\n        logits")))
variant("products-rounded")(changed(('vt, input_precision="ieee"', 'vt, input_precision="tf32"')))
variant("nan-from-the-start")(changed(("tl.exp2(logits - m_new[:, None])", "tl.exp2(logits - m[:, None])")))
variant("types-mixed")(changed(("mask=there, other=0.0)", "mask=there, other=0.0).to(tl.float32)")))

right(changed(("other=0.0)", "other=0.0).to(tl.float32)")))
right(  # what is not there is NaN, and does not count
    changed(
        ("k_pointers, mask=valid[:, None], other=0.0", "k_pointers, mask=valid[:, None]"),
        ("logits += tl.where(valid, 0.0, -1.0e30)[None, :]", "logits = tl.where(valid[None, :], logits, -1.0e30)"),
        ("v_pointers, mask=valid[:, None], other=0.0)", "v_pointers, mask=valid[:, None])"),
        ("        m_new = ", "        vt = tl.where(valid[:, None], vt, 0.0)\n        m_new = "),
    )
)
right(changed(("acc += tl.dot(p.to(vt.dtype), vt, ", "acc = tl.dot(p.to(vt.dtype), vt, acc, ")))
right(
    changed(
        ("last = n\n", "last = n\n    none = tl.zeros([BLOCK], tl.float16)\n"), ("s = s * c\n", "s = s * c + none\n")
    )
)
right(changed(('input_precision="ieee"', "allow_tf32=False")))
right(changed(('input_precision="ieee"', 'input_precision="tf32x3"')))

unknown(changed(("acc / s[:, None]", "acc / n")))
unknown(changed(("place = offset + mine", "place = offset + tokens")))
unknown(changed(("tl.exp2(logits - m_new[:, None])", "tl.exp(logits - m_new[:, None])")))
unknown(changed(("v_pointers += BLOCK * stride_token", "v_pointers += 0")))
unknown(changed(("p.to(vt.dtype)", "p.to(tl.float16)")))
unknown(changed(("m = m_new\n", "m = m_new\n        acc = acc.to(tl.float16).to(tl.float32)\n")))
unknown(
    changed(
        ("k_pointers = k + offset + tokens[:, None] * stride_token", "k_pointers = k + offset + tokens[:, None] * D")
    )
)

# The numbers are right, or nearly so: these are found because the interpreter watches.
unknown(
    changed(("acc += tl.dot(p.to(vt.dtype), vt,", "acc += tl.dot(p.to(q.dtype.element_ty), vt, out_dtype=tl.float16,"))
)
unknown(changed(("s += tl.sum(p, axis=1)", "s += tl.sum(p.to(vt.dtype), axis=1)")))
unknown(changed(("s = tl.zeros([BLOCK], tl.float32)", "s = 0.0")))
unknown(changed(("s = tl.zeros([BLOCK], tl.float32)", "s = tl.zeros([BLOCK], tl.int32)")))
unknown(  # rows that are not there write the last one again, and what they write is right
    changed(
        ("mine = block * BLOCK + tokens\n", "mine = tl.minimum(block * BLOCK + tokens, n - 1)\n"),
        ("acc / s[:, None], mask=there", "acc / s[:, None]"),
    )
)
