# %% [markdown]
# # 06 · Hardware: kernels, few-bit integers, smaller models
#
# *The same function, with less traffic, fewer bits, and fewer parts.*
#
# **You will build** the core of FlashAttention, first in PyTorch, then as a Triton kernel of your own; 8-bit and 4-bit
# quantization with the cure for outliers; and the score that says which heads a model can do without. At the end your parts
# run inside a trained ViT, and its logits are compared with the library's and with PyTorch's own attention.
#
# **Why anybody needs it.** A model is deployed more often than it is trained. Two programs that do the same arithmetic can
# differ several times in time, because arithmetic is not what the chip waits for. This lesson is about what it does wait for.
#
# No GPU is needed: Triton's *interpreter* runs your kernel in plain Python, slowly and exactly. (Triton comes with PyTorch on
# Linux and on Colab; on macOS and Windows, take one of these.) **No number from a GPU is shown in this lesson unless your
# machine has one**: what stands here was measured on CPUs, or counted.

# %%
import copy
import json
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitcourse
from vitcourse import course, hardware, paths, plot
from vitcourse.course import TODO, exercise, expect, hint, last_attempt
from vitcourse.data import open_dataset, subset
from vitcourse.hardware import prune
from vitcourse.hardware import quantize as quantization
from vitcourse.layers import attention, attention_weights
from vitcourse.train import TrainConfig, evaluate, fit

session = course.setup()
device = session.device
WEIGHTS = paths.data_dir() / "weights" / "fashion_mnist_vit.safetensors"


def trained():
    """The ViT that comes with the course: 4 blocks, 4 heads of 24 channels, trained on Fashion-MNIST."""
    return vitcourse.create_model(WEIGHTS).eval().to(device)


def results(name):
    """What a script in benchmarks/ has measured, or None."""
    file = paths.results_dir() / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


# %% [markdown]
# ## 0 What a processor waits for
#
# A chip has arithmetic units, and a large memory beside them. Every operation of PyTorch reads its inputs from that memory and
# writes its result back. For attention between $N$ tokens the results in between are the problem: the scores are an
# $N \times N$ matrix, which is written, read by the softmax, written again, and read again.
#
# Count it. PyTorch lets us watch every operation that really runs; views move nothing, and the rest reads its inputs once and
# writes its output once, at best. The tensors live on the `meta` device, which has shapes but no numbers:


# %%
class Traffic(TorchDispatchMode):
    """Bytes that each operation inside the ``with`` has to read and to write."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if not operator.is_view and "view" not in str(operator):
            read = sum(t.numel() * t.element_size() for t in args if isinstance(t, torch.Tensor))
            self.steps.append((operator.name().removeprefix("aten::"), read, out.numel() * out.element_size()))
        return out


q, k, v = torch.empty(3, 1, 1, 197, 64, dtype=torch.bfloat16, device="meta")
with Traffic() as traffic:
    attention(q, k, v, backend="math")
print("one head, N = 197, D = 64, bfloat16      read     write")
for name, read, write in traffic.steps:
    print(f"  {name:30s} {read:12,d} {write:9,d}")

print("\n   N    plain, bytes   q, k, v in and result out   times more")
as_counted = True
for n in (50, 197, 577, 1025, 4096):
    q, k, v = torch.empty(3, 1, 1, n, 64, dtype=torch.bfloat16, device="meta")
    with Traffic() as traffic:
        attention(q, k, v, backend="math")
    plain, least = sum(read + write for _, read, write in traffic.steps), 4 * n * 64 * 2
    as_counted &= plain == (4 * n * n + 6 * n * 64) * 2
    print(f"{n:5d} {plain:14,d} {least:18,d} {plain / least:22.1f}")
expect("all counts are 4 N² + 6 N D numbers", as_counted, equals=True)

# %% [markdown]
# A fused kernel that keeps the scores on the chip would move 4 ND numbers:
# 17.5<!--= (4 * 1025**2 + 6 * 1025 * 64) / (4 * 1025 * 64) --> times less at 1025 tokens. Does that matter? That
# depends on what the chip is short of. The **roofline** (Williams et al. 2009) says it in one picture. With $I$ operations for
# each byte that is moved,
#
# $$ \text{operations per second} \le \min(\text{peak},\; I \times \text{bandwidth}). $$
#
# Left of the bend the memory decides, and the arithmetic is free; right of it the reverse. The lines of the GPUs are from their
# data sheets, that of your machine is measured now: its fastest matrix product, and its fastest copy.

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Roofline diagram, both axes logarithmic: arithmetic intensity against attainable operations per second. Slanted lines that
# bend into flat ones for an H100, an A100, a T4 and this machine. Vertical lines mark operations: layer norm and a linear layer
# for one token far left of all bends, plain attention left of those of the GPUs, fused attention and a linear layer for many
# tokens on the right.


def fastest(step, repeats=5):
    step()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


side = 8192 if device.type == "cuda" else 1024
dtype = torch.float16 if device.type == "cuda" else torch.float32
a = torch.randn(side, side, device=device, dtype=dtype)
long = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
target = torch.empty_like(long)
peak = 2 * side**3 / fastest(lambda: a @ a)
bandwidth = 2 * long.numel() * 4 / fastest(lambda: target.copy_(long))
del a, long, target

ROOFS = {  # operations per second in 16 bits with tensor cores, bytes per second; data sheets of NVIDIA
    "H100 SXM": (989e12, 3.35e12),
    "A100 80 GB": (312e12, 2.04e12),
    "T4": (65e12, 0.32e12),
    "this machine": (peak, bandwidth),
}


def attention_intensity(n, d=64, fused=False):
    return 4 * n * n * d / ((4 * n * d if fused else 4 * n * n + 6 * n * d) * 2)


def linear_intensity(tokens, d=768):
    return 2 * tokens * d * 4 * d / ((4 * d * d + tokens * 5 * d) * 2)


marks = {
    "a layer norm": 8 / 4,
    "linear, 1 token": linear_intensity(1),
    "attention, plain": attention_intensity(1025),
    "attention, fused": attention_intensity(1025, fused=True),
    "linear, 50 432 tokens": linear_intensity(256 * 197),
}
fig, (ax,) = plot.panels(1, 1, width=8.5, height=4.2)
intensity = np.logspace(-0.5, 4, 200)
for name, (top, slope) in ROOFS.items():
    ax.loglog(intensity, np.minimum(top, intensity * slope), label=name)
for name, x in marks.items():
    ax.axvline(x, color=plot.BLACK, linewidth=1, linestyle=":")
    below = name == "linear, 50 432 tokens"
    ax.annotate(name, (x, 2e7), rotation=90, fontsize=9, ha="left" if below else "right", va="bottom")
ax.set(
    xlabel="operations per byte moved",
    ylabel="operations per second",
    ylim=(1e7, 2e15),
    title="Rooflines (GPUs in 16 bits)",
)
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
print(f"this machine, in {str(dtype)[6:]}: {peak / 1e9:,.0f} G operations and {bandwidth / 1e9:.1f} GB a second")

# %% [markdown]
# Read off what follows, for it is the plan of this lesson:
#
# * **Plain attention** sits left of the GPUs' bends: it waits for memory, whatever its arithmetic costs. *Fusing* moves it to the
#   right without saving a single multiplication. Sections 1 to 3.
# * A **linear layer for one token** (a batch of one) reads each weight for two operations. Smaller weights are all that helps:
#   *fewer bits*. Sections 4 to 6. With many tokens it is on the right: there, fewer bits help only if the chip multiplies small
#   integers faster.
# * What is on the right needs *fewer operations*: section 7.
#
# ## 1 A softmax that never sees all its scores
#
# Why is the matrix there at all? Each weight is $e^{s_j} / \sum_i e^{s_i}$: nothing can be divided before all the scores are
# known. And in practice $e^{s_j - m}$ with $m = \max_i s_i$ is taken, which needs all of them even earlier. That is not
# pedantry. In half precision, which ends at 65 504, without it:

# %%
scores = torch.tensor([2.0, 11.0, 12.0], dtype=torch.float16)
naive = scores.exp() / scores.exp().sum()
shifted = (scores - scores.max()).exp()
for what, numbers in [
    ("e to the scores", scores.exp()),
    ("weights, without the maximum", naive),
    ("weights, with it", shifted / shifted.sum()),
    ("softmax of four hidden keys", torch.full((4,), -torch.inf).softmax(0)),
]:
    print(f"{what:30s}", *(f"{number:8.2g}" for number in numbers.tolist()))
expect("weights that are NaN, without the maximum", int(naive.isnan().sum()), equals=1)

# %% [markdown]
# Here are two of the usual causes of **NaN**: an overflow, $\infty/\infty$, which half precision is quick to reach, and a row that is
# masked altogether, $-\infty - (-\infty)$, in any precision. Remember both for the exercise.
#
# Now the trick (Milakov and Gimelshein 2018). Take the keys a tile at a time and carry three things along for each query: the
# **peak** $m$, the largest score so far, the **total** $\ell = \sum e^{s_j - m}$, and the **output** $o = \sum e^{s_j - m} v_j$.
# When a tile brings a larger peak $m'$, everything summed so far is relative to the wrong one. But
#
# $$ e^{s_j - m'} = e^{s_j - m} \cdot e^{m - m'}, $$
#
# so one multiplication brings *all* the old terms in line, without looking at them again. After the last tile, $o/\ell$ is the
# attention.
#
# ### Exercise 1 · `attend_tile`
# *Difficulty 3 of 5, about 20 minutes.* A softmax that never sees all its scores at once is what makes FlashAttention possible.
#
# While all keys so far are hidden, the peak is $-\infty$: subtract 0 instead of it.


# %%
@exercise("hardware.attend_tile")
def attend_tile(peak, total, out, scores, values):
    """peak, total (…, N_q), out (…, N_q, D); a tile's scores (…, N_q, T), values (…, T, D) -> new peak, total, out."""
    # <solution>
    new_peak = torch.maximum(peak, scores.amax(-1))
    shift = torch.where(new_peak == -torch.inf, 0.0, new_peak)
    shrink = torch.exp(peak - shift)
    weights = torch.exp(scores - shift[..., None])
    total = total * shrink + weights.sum(-1)
    out = out * shrink[..., None] + weights @ values
    return new_peak, total, out
    # </solution>


# %% [markdown]
# Follow one query through 8 tiles of 16 keys. The dashed line is what you get if the old sums are *not* shrunk.

# %%
# alt: Three panels over 128 keys in 8 tiles. First: scores as dots, and the running peak, a staircase that rises. Second: the
# carried total agrees with the sum over all keys so far; it drops where the peak rises. Without shrinking it only grows. Third:
# the error of the output against a softmax over the keys seen so far, logarithmic: at rounding with shrinking, about as
# large as the output without.
generator = torch.Generator().manual_seed(4)
scores = 2 * torch.randn(1, 128, generator=generator, dtype=torch.float64) + torch.linspace(-2, 2, 128)
values = torch.randn(128, 8, generator=generator, dtype=torch.float64)

nothing = torch.zeros(1).double(), torch.zeros(1, 8).double()
state, careless = (torch.tensor([-torch.inf]).double(), *nothing), nothing
track = []
for stop in range(16, 129, 16):
    tile = scores[:, stop - 16 : stop], values[stop - 16 : stop]
    state = attend_tile(*state, *tile)
    _, total, out = attend_tile(state[0], *nothing, *tile)  # this tile by itself, relative to the new peak
    careless = careless[0] + total, careless[1] + out
    right = scores[:, :stop].softmax(-1) @ values[:stop]
    errors = [((out / total[:, None] - right).norm() / right.norm()).item() for total, out in (state[1:], careless)]
    exact = (scores[:, :stop] - state[0]).exp().sum().item()
    track.append((state[0].item(), state[1].item(), exact, careless[0].item(), *errors))
peaks, totals, exact, careless_totals, errors, careless_errors = zip(*track, strict=True)

tiles = np.arange(1, 9)
fig, axes = plot.panels(1, 3, width=3.6, height=3.1)
axes[0].plot(np.arange(128) / 16 + 0.5, scores[0], ".", markersize=3, color=plot.SKY)
axes[0].step(tiles, peaks, where="mid", color=plot.BLUE)
axes[0].set(xlabel="tile", ylabel="score", title="scores, and the peak so far")
axes[1].plot(tiles, totals, "o-", label="yours")
axes[1].plot(tiles, careless_totals, "--", color=plot.RED, label="never shrunk")
axes[1].plot(tiles, exact, ".", color=plot.BLACK, label="all keys so far", markersize=5)
axes[1].set(xlabel="tile", title="total")
axes[1].legend()
axes[2].semilogy(tiles, np.maximum(errors, 1e-17), "o-", label="yours")
axes[2].semilogy(tiles, np.maximum(careless_errors, 1e-17), "--", color=plot.RED, label="never shrunk")
axes[2].set(xlabel="tiles seen", title="relative error of the output")
axes[2].legend(loc="center right")
plt.show()
expect("largest relative error after any tile", max(errors), at_most=1e-12)
expect("the same, if the old sums are never shrunk", max(careless_errors), at_least=0.05)

# %% [markdown]
# ## 2 Attention, tile by tile
#
# ### Exercise 2 · `tiled_attention`
# *Difficulty 2 of 5, about 15 minutes.* It gives exactly what softmax attention gives, and the matrix of all scores never exists.
#
# Write $\operatorname{softmax}(QK^\top/\sqrt D)\,V$ as a loop over tiles of keys. `k.split(block, dim=-2)` gives them; the last
# may be smaller.


# %%
@exercise("hardware.tiled_attention")
def tiled_attention(q, k, v, block=64):
    """q (…, N_q, D), k (…, N_k, D), v (…, N_k, D_v) -> (…, N_q, D_v), with no more than N_q · block scores at a time."""
    # <solution>
    q = q * q.shape[-1] ** -0.5
    peak, total = q.new_full(q.shape[:-1], -torch.inf), q.new_zeros(q.shape[:-1])
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for keys, values in zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True):
        peak, total, out = attend_tile(peak, total, out, q @ keys.mT, values)
    return out / total[..., None]
    # </solution>


# %% [markdown]
# The production peer is `F.scaled_dot_product_attention`, whose fused kernels do this inside. Against float64, who is closer? And
# how much memory does each need at once?


# %%
class Largest(TorchDispatchMode):
    """The largest tensor that is made inside the ``with``, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


generator = torch.Generator().manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 785, 64, generator=generator)
truth = attention(q.double(), k.double(), v.double(), backend="math")
ways = {
    "plain": lambda: attention(q, k, v, backend="math"),
    "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
    "yours": lambda: tiled_attention(q, k, v, 64),
}
errors, largest = {}, {}
for name, way in ways.items():
    with Largest() as mode:
        out = way()
    errors[name], largest[name] = (out - truth).abs().max().item(), mode.bytes
expect("your error over that of plain attention, both against float64", errors["yours"] / errors["plain"], at_most=3)
expect("your error over sdpa's", errors["yours"] / errors["sdpa"], at_most=3)
print(f"largest tensor: plain {largest['plain'] / 1e6:.1f} MB, yours {largest['yours'] / 1e6:.1f} MB")

# %% [markdown]
# **"Where are my attention weights?"** is asked in every forum: `scaled_dot_product_attention` returns none, and hooks on a fused
# layer find nothing, since *they never existed*. There are two honest ways out. The library's `record_attention` runs the plain
# equation while you look (and you pay for it). Or keep one number a query, $L = m + \log \ell$, the *log-sum-exp*. With it, any
# row of weights can be had later, $p_{ij} = e^{s_{ij} - L_i}$, without a softmax. The backward pass of FlashAttention does just that: it
# recomputes the weights tile by tile, because that is cheaper than to have stored them.

# %%
with torch.no_grad():
    query, keys = q[0, :1, 17:18] / 8, k[0, :1]
    peak, total, _ = attend_tile(
        torch.full((1, 1), -torch.inf), torch.zeros(1, 1), torch.zeros(1, 1, 64), query @ keys.mT, v[0, :1]
    )
    row = torch.exp(query @ keys.mT - (peak + total.log())[..., None])
    expected = attention_weights(q, k)[0, :1, 17:18]
expect("largest difference of a row of weights, from one number", (row - expected).abs().max(), at_most=1e-6)

# %% [markdown]
# ## 3 The kernel
#
# In PyTorch each line of your loop still reads and writes memory. To keep the tile *on the chip* all of the loop must be one
# program: a **kernel**. In Triton you write what one *program* does; many run at once, and each asks which one it is.
#
# Ours are laid out on a grid: `program_id(0)` is a block of queries, `program_id(1)` a head. A program loads its block of queries
# once, and then walks over all tiles of keys with what you have just written. What is new is **addresses**: a tensor is a pointer
# to its first number and a stride for each axis. `tl.arange(0, BLOCK)` has a fixed length, so the last block reaches beyond the end.
# There is no error then: **without a mask you read and write whatever lies there**.

# %%
# alt: The 50 by 50 matrix of scores of one head, cut into tiles of 16 by 16, four rows by four columns; the last tiles reach
# beyond the edge, drawn hatched. One row of tiles is coloured: program 1, and an arrow shows that it goes from left to right.
# On the right, for blocks of 16, 32, 64 and 128, how many times as much is computed as is needed, at all lengths from 40 to 1100:
# saws that jump at each multiple of the block and fall until the next, with dots at the lengths of ViTs. The shorter the sequence
# and the larger the block, the more is wasted, at 50 tokens up to
# 6.6<!--= (128 / 50) ** 2 --> times.
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1, 1.5))
for i in range(4):
    for j in range(4):
        colour = plot.ORANGE if i == 1 else "#eeeeee"
        left.add_patch(plt.Rectangle((16 * j, 16 * i), 16, 16, facecolor=colour, edgecolor=plot.BLACK))
for x, y, w, h in ((50, 0, 14, 64), (0, 50, 50, 14)):
    left.add_patch(plt.Rectangle((x, y), w, h, facecolor="none", hatch="////", edgecolor=plot.RED, linewidth=0))
left.annotate("", (60, 24), (3, 24), arrowprops={"arrowstyle": "->", "linewidth": 2})
left.text(4, 21, "program 1", fontsize=10)
left.set(xlim=(-1, 65), ylim=(65, -1), xlabel="keys", ylabel="queries", title="50 tokens, BLOCK = 16", aspect="equal")
left.grid(False)
lengths, every = np.array([50, 197, 257, 577, 785, 1025]), np.arange(40, 1101)
for block, colour in zip((16, 32, 64, 128), plot.COLOURS, strict=False):
    right.semilogx(every, (np.ceil(every / block) * block / every) ** 2, color=colour, linewidth=0.6)
    right.plot(lengths, (np.ceil(lengths / block) * block / lengths) ** 2, "o", color=colour, label=f"BLOCK = {block}")
right.set_xticks(lengths, lengths)
right.xaxis.set_minor_locator(plt.NullLocator())
right.set(xlabel="tokens", ylabel="work done / work needed", title="what beyond-the-edge costs", ylim=(0.8, 7))
right.legend()
plt.show()

# %% [markdown]
# ViT lengths are awkward: 197 is 3 · 64 + 5. The library's `flash_attention` therefore cuts keys into pieces of 128 + 64 + 16. Ours
# has one size of block.
#
# ### Exercise 3 · `flash_kernel`
# *Difficulty 5 of 5, about 45 minutes.* It is the idea behind the attention kernels of nearly all large transformers, in twenty
# lines that you can change.
#
# The queries are loaded for you, and the peak, total and result are set to their start. Write the loop and the store.
#
# * `tl.load(pointers, mask=…, other=0.0)` and `tl.store(pointers, what, mask=…)`; a mask is broadcast like everything else.
# * `tl.dot(a, b)`, `tl.trans(a)`, `tl.max(a, 1)`, `tl.sum(a, 1)`, `tl.maximum`, `tl.exp`, `tl.where`.
# * On a GPU `tl.dot` rounds float32 to ten bits unless it is told `input_precision="ieee"`.
# * `tl.dot` wants both sides in one type, and the inputs may be float16. `a.to(b.dtype)` turns one into the other's type. Peak, total
#   and result stay float32.
#
# Your kernel is checked on the interpreter, in a process of its own that looks at every address. What reads or writes where it should
# not is found, even where no result shows it.


# %%
@exercise("hardware.flash_kernel")
@triton.jit
def flash_kernel(q, k, v, out, stride_head, stride_token, n, scale, BLOCK: tl.constexpr, D: tl.constexpr):
    """One block of queries of one head against all keys. q, k, v, out: (heads, n, D), all with these strides."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.program_id(1) * stride_head + tl.arange(0, D)[None, :]
    queries = tl.load(q + start + rows[:, None] * stride_token, mask=rows[:, None] < n, other=0.0)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, D], tl.float32)
    # <solution>
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
    # </solution>


# %% [markdown]
# A launcher makes it a function of PyTorch tensors. The kernel wants a width that is a power of two, at least 16: zeros fill up
# the heads (they add nothing to a dot product) and are cut off again.


# %%
def flash(q, k, v, *, scale, bias=None, block=64):
    """(B, H, N, D) each -> (B, H, N, D), as a backend of `vitcourse.layers.attention`."""
    if bias is not None or q.shape != k.shape:
        raise ValueError("this kernel knows no bias, and only self-attention")
    b, h, n, d = q.shape
    width = max(16, 2 ** (d - 1).bit_length())
    q, k, v = (F.pad(t, (0, width - d)).reshape(b * h, n, width).contiguous() for t in (q, k, v))
    out = torch.empty_like(q)
    grid = (math.ceil(n / block), b * h)
    flash_kernel[grid](q, k, v, out, out.stride(0), out.stride(1), n, scale, BLOCK=block, D=width)
    return out[..., :d].reshape(b, h, n, d)


generator = torch.Generator().manual_seed(0)
for n, d, block in [(50, 24, 64), (65, 32, 32), (197, 64, 64)]:
    qkv = torch.randn(3, 1, 1, n, d, generator=generator)
    truth = attention(*qkv.double(), backend="math")  # on the CPU: not every device has float64
    q, k, v = qkv.to(device)
    out = flash(q, k, v, scale=d**-0.5, block=block)
    error = (out.cpu() - truth).abs().max()
    peer = (F.scaled_dot_product_attention(q, k, v).cpu() - truth).abs().max()
    expect(
        f"N = {n}, D = {d}, BLOCK = {block}: your error over sdpa's, or over 1e-6", error / max(peer, 1e-6), at_most=2
    )
inputs = (
    t if t.is_cuda else t.cpu() for t in (q, k, v)
)  # compiled for CUDA, interpreted on a CPU: there is no third way
library = hardware.flash_attention(*inputs).to(device)
expect("your kernel against the library's, largest difference", (out - library).abs().max(), at_most=1e-5)

# %% [markdown]
# **In a trained model.** `attention` of the library is one door with several backends behind it, so your kernel can be hung in as one
# more. The ViT below was trained long before your kernel existed.

# %%
from vitcourse.layers import ATTENTION_BACKENDS
from vitcourse.vit import Attention


def with_backend(model, backend):
    """The same model, with all its attention done by this backend."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend
    return model


ATTENTION_BACKENDS["yours, PyTorch"] = lambda q, k, v, *, scale, bias=None: tiled_attention(q, k, v, 16)
ATTENTION_BACKENDS["yours, Triton"] = flash
vit = trained()
if session.quick:
    test_set = subset(open_dataset("fashion_mnist_subset", "test"), 500)
else:
    test_set = open_dataset("fashion_mnist", "test", download=True)
mean, std = vit.preprocess.mean[0], vit.preprocess.std[0]
few = torch.stack([(test_set[i][0].float() / 255 - mean) / std for i in range(16)]).to(device)
with torch.no_grad():
    expected = with_backend(vit, "sdpa")(few)
    for backend in ("yours, PyTorch", "yours, Triton"):
        difference = (with_backend(vit, backend)(few) - expected).abs().max() / expected.abs().max()
        expect(f"logits with attention by {backend}, relative difference from sdpa's", difference, at_most=1e-3)

# %% [markdown]
# Is it fast? On the interpreter: no, it is Python. On a GPU your twenty lines are a few steps away from the library's
# `flash_attention`: pieces that fit the length, strided q, k, v without the copies of our launcher, and a backward pass. If this
# machine has a GPU, here is the clock. If not, here is what the **compiler** says of the library's kernels, for it can compile for a chip
# that is not there (`benchmarks/aot.py`; nothing in that figure was timed). The more **registers** and **shared memory** a program takes, the
# fewer of them fit on one processor at a time, and one program's waiting is covered by another's work. Beyond a dashed line, half of
# what a processor of that chip has, a program is alone. A100 and L4 get nearly the same programs, but an L4 has less shared memory, so
# more of them are alone there.
#
# The machine code has more to tell. The library's kernel for long sequences treats the last, incomplete tile after its loop over the
# whole ones. Compiled for an H100, for 577 tokens and $D = 64$, each of its matrix products once waited for the one
# before, though an H100 can have several under way. With the last tile in a loop of its own, of one turn,
# 13<!--= mean(aot, "products", kernel="forward_long", capability=90, dtype="bf16", head_dim=64, n_k=577) --> products have
# 4<!--= mean(aot, "waits", kernel="forward_long", capability=90, dtype="bf16", head_dim=64, n_k=577) --> waits. That
# much can be counted without a GPU. What it is worth, only a clock on one can say.

# %%
# NBVAL_IGNORE_OUTPUT
# alt: With a GPU: bars of milliseconds for plain attention, sdpa, the library's kernel and yours at 197 tokens. Without one: for
# the library's forward and backward kernels, compiled ahead of time, three panels, A100, L4 and H100: dots of registers against
# shared memory of a program, with dashed lines at half of what a processor has. The dots of A100 and L4 hardly differ, but the L4's
# line lies further to the left, and more dots right of it; those for the H100 take more shared memory.
compiled = results("aot")
if device.type == "cuda":
    q, k, v = torch.randn(3, 64, 12, 197, 64, device=device, dtype=torch.float16)
    contestants = {
        "plain": lambda: attention(q, k, v, backend="math"),
        "sdpa": lambda: attention(q, k, v, backend="sdpa"),
        "the library's": lambda: attention(q, k, v, backend="flash"),
        "yours": lambda: flash(q, k, v, scale=1 / 8),
    }
    fig, (ax,) = plot.panels(1, 1, width=8, height=3.4)
    plot.bars(ax, {name: [1e3 * fastest(step, 20)] for name, step in contestants.items()}, digits=2)
    ax.set(xlabel="milliseconds", title=f"64 images, 12 heads, N = 197, fp16, {torch.cuda.get_device_name()}")
elif compiled:
    fig, axes = plot.panels(1, 3, width=3.5, height=3.4)
    fig.suptitle("compiled, not timed")
    chips = [(80, "A100", 164), (89, "L4", 100), (90, "H100", 228)]  # KiB of shared memory of a processor

    def case(row):
        return tuple(row[key] for key in ("kernel", "dtype", "head_dim", "n_k", "bias"))

    compared = set.intersection(
        *({case(row) for row in compiled["rows"] if row["capability"] == chip} for chip, *_ in chips)
    )
    for ax, (capability, chip, kib) in zip(axes, chips, strict=True):
        for way, marker in (("forward", "o"), ("backward", "^")):
            dots = [
                (row["shared_kib"], row["registers"] * 32 * row["warps"] / 1024)
                for row in compiled["rows"]
                if row["capability"] == capability and row["kernel"].startswith(way)
                if row["dtype"] != "fp32" and case(row) in compared
            ]
            ax.plot(*zip(*dots, strict=True), marker, alpha=0.7, label=way)
        ax.axvline(kib / 2, color=plot.BLACK, linestyle="--", linewidth=1)
        ax.axhline(32, color=plot.BLACK, linestyle="--", linewidth=1)  # each has 64 × 1024 registers
        ax.set(
            xlabel="shared memory of a program, KiB",
            title=f"{chip}: {kib} KiB a processor",
            xlim=(0, 135),
            ylim=(0, 70),
        )
    axes[0].set_ylabel("registers of a program, × 1024")
    axes[2].legend(loc="center left", bbox_to_anchor=(1, 0.5))
else:
    print("no GPU here, and no results of benchmarks/aot.py")
plt.show()

# %% [markdown]
# ## 4 What a number is made of
#
# A floating-point number is a sign, an exponent (which octave) and a mantissa (where in the octave). An integer has no exponent:
# its steps are the same everywhere, and a **scale**, kept beside many integers, says how wide they are.

# %%
# alt: Left: eight number formats as rows of boxes, coloured by sign, exponent and mantissa: float32 has 1, 8 and 23 bits, bfloat16
# 1, 8 and 7, float16 1, 5 and 10, two kinds of float8, int8, int4. Right: the distance to the next number relative to the number,
# both axes logarithmic. For floating point it is a flat saw over many octaves, lower for more mantissa bits; for int8 and int4 it
# is a line that falls towards the largest number and is bad for small ones.
FORMATS = {  # sign, exponent, mantissa
    "float32": (1, 8, 23),
    "TF32": (1, 8, 10),
    "bfloat16": (1, 8, 7),
    "float16": (1, 5, 10),
    "float8 e5m2": (1, 5, 2),
    "float8 e4m3": (1, 4, 3),
    "int8": (1, 0, 7),
    "int4": (1, 0, 3),
}
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6), width_ratios=(1.2, 1))
for row, parts in enumerate(FORMATS.values()):
    start = 0
    for bits, colour in zip(parts, (plot.RED, plot.ORANGE, plot.SKY), strict=True):
        for bit in range(bits):
            left.add_patch(plt.Rectangle((start + bit, row), 0.9, 0.8, facecolor=colour))
        start += bits
    left.text(start + 0.4, row + 0.4, f"{sum(parts)} bits", va="center", fontsize=9)
left.set_yticks([row + 0.4 for row in range(len(FORMATS))], list(FORMATS))
left.set(xlim=(0, 36), ylim=(len(FORMATS), 0), xticks=[], title="sign · exponent · mantissa")
left.grid(False)
x = np.logspace(-6, 0, 2000)
for name, smallest in {"float16": -14, "bfloat16": -126, "float8 e5m2": -14, "float8 e4m3": -6}.items():
    octave = np.maximum(np.floor(np.log2(x)), smallest)
    right.loglog(x, 2.0 ** (octave - FORMATS[name][2]) / x, linewidth=1.2, label=name)
for bits, colour in ((8, plot.PURPLE), (4, plot.BLACK)):
    step = 1 / (2 ** (bits - 1) - 0.5)
    right.loglog(x, np.minimum(step / x, 1e3), color=colour, linestyle="--", label=f"int{bits}, largest is 1")
right.set(xlabel="a number", ylabel="next step / number", ylim=(1e-4, 1e3), title="how finely it can be written")
right.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# float16 and bfloat16 have equally many bits. float16 is finer, and ends at 65 504: that was the NaN above. bfloat16 goes as far
# as float32, with three bits of mantissa fewer than float16: it rounds, but does not overflow. Integers do best where the largest number
# is *not much larger than the usual ones*. With the weights of a channel it is not: they lie in a bell around zero, as you will see, but
# without outliers. Keep that in mind for section 6.
#
# ## 5 Eight bits, four bits
#
# Take a row of weights, one output channel, and lay $2^b - 1$ values over it, symmetric around 0 and equally far apart: that distance is
# a *step*, and the scale is its length. The outermost values lie half a step *inside* the largest magnitude:
#
# $$ \text{scale} = \frac{\max |x|}{2^{b-1} - \tfrac12}, \qquad q = \operatorname{clamp}\!\left(\operatorname{round}\!\left(\frac{x}{\text{scale}}\right),\; \pm (2^{b-1} - 1)\right), $$
#
# so no number, not even the largest, is further than **half a step** from the value of its code. That bound is known before anything
# runs. (A row of nothing but zeros would give 0/0. No trained channel is one; the library's `quantize` looks out for it, yours need not.)
#
# ### Exercise 4 · `quantize`
# *Difficulty 2 of 5, about 15 minutes.* A quarter of the memory of float32 for one number a row, with an error that is known
# beforehand.


# %%
@exercise("hardware.quantize")
def quantize(x, bits=8):
    """(…, K) floats -> (…, K) int8 codes, and (…, 1) scales: x ≈ codes · scale."""
    # <solution>
    scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    outermost = 2 ** (bits - 1) - 1
    return (x / scale).round().clamp(-outermost, outermost).to(torch.int8), scale
    # </solution>


# %%
# alt: Left: a histogram of the weights of one output channel, with the fifteen values of four bits as lines. Middle: a histogram of
# the rounding errors of all weights in this layer, in steps: a box from minus a half to a half. Right: the largest weight of each
# of the 384 channels, sorted: they differ more than twofold, and a dashed line marks that of the whole layer.
weight = vit.blocks[1].mlp.fc1.weight.detach().cpu()  # (384, 96)
codes, scale = quantize(weight, 4)
widest = int(scale.argmax())
error = ((codes * scale - weight) / scale).flatten()
fig, axes = plot.panels(1, 3, width=3.6, height=3.0)
axes[0].hist(weight[widest].numpy(), bins=40, color=plot.SKY)
for code in range(-7, 8):
    axes[0].axvline(code * scale[widest].item(), color=plot.RED, linewidth=0.8)
axes[0].set(xlabel="weight", title="one channel, the values of int4")
axes[1].hist(error.numpy(), bins=60, color=plot.GREEN)
axes[1].set(xlabel="error, in steps", title="errors, all channels", yticks=[])
axes[2].plot(weight.abs().amax(1).sort(descending=True).values.numpy())
axes[2].axhline(weight.abs().max(), color=plot.RED, linestyle="--", label="of the whole layer")
axes[2].set(xlabel="channel, sorted", title="largest weight", ylim=(0, None))
axes[2].legend()
plt.show()
expect("largest error, in steps", error.abs().max(), at_most=0.5001)
expect("mean squared error · 12, in steps (a uniform error has 1)", 12 * error.square().mean(), close_to=1.0, tol=0.1)
largest = weight.abs().amax(1, keepdim=True)
small = (weight.abs() < largest / 3).float().mean()
expect("share of the weights below a third of their channel's largest", small, close_to=0.64, tol=0.01)
outlying = (largest[:, 0] / weight.square().mean(1).sqrt()).max()
expect("largest weight over the root mean square of its channel, at worst", outlying, at_most=5.0)

# %% [markdown]
# (The bars at both edges are the largest number of each channel: it lies half a step beyond the last code.) A uniform
# error has the variance $\text{scale}^2/12$: each bit less doubles the step, and quadruples that. How many bits does *this model*
# need? All its linear weights, rounded to $b$ bits and turned back to floats (so the time is the same, only the
# accuracy is tried), with a scale for each channel, and with one for the whole layer.


# %%
def rounded(model, bits, per_channel=True):
    """The model with the weights of its linear layers rounded to so many bits."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.data if per_channel else module.weight.data.reshape(1, -1)
            codes, scale = quantize(weight, bits)
            module.weight.data = (codes * scale).reshape(module.weight.shape)
    return model


def accuracy(model):
    return 100 * evaluate(model, test_set)["val_accuracy"]


whole = accuracy(vit)
bits = [8, 6, 5, 4, 3, 2]
by_bits = {
    "a scale a channel": [accuracy(rounded(vit, b)) for b in bits],
    "one a layer": [accuracy(rounded(vit, b, per_channel=False)) for b in bits],
}

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Accuracy against bits per weight. It stays level with the float32 model's down to three bits either way; at two bits it
# loses a little with a scale a channel, and more with one a layer.
fig, (ax,) = plot.panels(1, 1, width=6, height=3.2)
for name, values in by_bits.items():
    ax.plot(bits, values, "o-", label=name)
ax.axhline(whole, color=plot.BLACK, linestyle=":", label="float32")
ax.set(xlabel="bits a weight", ylabel="accuracy, %", title="this ViT, weights rounded", xlim=(8.3, 1.7))
ax.legend(loc="lower left")
plt.show()

# %%
expect("accuracy lost with 8 bits, in points", whole - by_bits["a scale a channel"][0], at_most=0.8)
expect("accuracy lost with 4 bits a channel, in points", whole - by_bits["a scale a channel"][3], at_most=2.0)
gain = by_bits["a scale a channel"][5] - by_bits["one a layer"][5]
expect("what scales per channel bring at 2 bits, in points", gain, at_least=1.5)

# %% [markdown]
# (This figure and all that is tried live in this lesson count 500 images: a point up or down is chance. No rounding improves a model.)
#
# This ViT is an easy patient: half a million<!--? round(mean(pruning, "parameters", question="whole"), -5) == 500_000 --> weights for ten
# kinds of clothing, and a margin to spare. With two bits a weight is its channel's scale, or minus that, or zero, and little is lost. (We
# had expected it to break at three.) Do not expect that of a large
# model: there four bits are hard, and one reason is not in the weights at all. See section 6.
#
# ### Exercise 5 · `pack_int4`
# *Difficulty 2 of 5, about 10 minutes.* No computer has a type of four bits: two numbers have to share a byte, or nothing is saved.
#
# The first half of the last axis goes to the lower four bits, the second half to the upper. (A kernel that unpacks a tile then has
# two tiles at once, and nothing to interleave.)


# %%
@exercise("hardware.pack_int4")
def pack_int4(q):
    """(…, 2n) int8 from −8 to 7 -> (…, n) uint8."""
    # <solution>
    low, high = q.chunk(2, dim=-1)
    return ((low & 15) | (high << 4)).view(torch.uint8)
    # </solution>


# %%
packed = pack_int4(torch.tensor([1, 2, -1, 7], dtype=torch.int8))
print("1, 2, −1, 7 as two bytes:", " ".join(f"{byte:08b}" for byte in packed.tolist()))
expect("codes that come back changed", int((quantization.unpack_int4(pack_int4(codes)) != codes).sum()), equals=0)
sizes = {"float32": quantization.model_bytes(vit)}
for scheme in ("int8", "int4"):
    sizes[scheme] = quantization.model_bytes(quantization.quantize_model(vit, scheme))
for name, size in sizes.items():
    print(f"{name:8s} {size:9,d} bytes")

# %% [markdown]
# Not quite a fourth and an eighth: norms and biases stay float32, convolutions take 8 bits with either scheme, positions and scales 16,
# and in int4 every 32 of a layer's 96 inputs have a scale of their own. The smaller the model, the more all this weighs.
#
# ## 6 Outliers
#
# To multiply *integers*, which is where a chip has its fastest units, the activations must be rounded too. Weights have no outliers.
# Activations may: in large transformers a few channels carry values twenty to a hundred times those of the others
# (Dettmers et al. 2022, Xiao et al. 2023).<!--~ paper --> One scale must cover them, and to all the rest there are a few steps left.
#
# Our little ViT has no such channels. But there is a model with *exactly its function* that has: multiply three channels of each
# norm's output by a factor, say 100, and divide the columns of the weights that read them by it.


# %%
def channel_peaks(model, images):
    """For each block's two norms: the largest magnitude of every channel. A list of (D,)."""
    peaks, hooks = [], []
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            hooks.append(
                norm.register_forward_hook(lambda module, args, out: peaks.append(out.abs().flatten(0, -2).amax(0)))
            )
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return peaks


def rescale(model, factors):
    """Divide each norm's outputs by its factors, and multiply the weights that read them: the same function."""
    model, factors = copy.deepcopy(model), iter(factors)
    for block in model.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            s = next(factors)
            norm.weight.data /= s
            norm.bias.data /= s
            linear.weight.data *= s
    return model


def with_outliers(factor):
    generator, shrink = torch.Generator().manual_seed(0), []
    for _ in range(2 * len(vit.blocks)):
        s = torch.ones(96)
        s[torch.randperm(96, generator=generator)[:3]] = 1 / factor
        shrink.append(s.to(device))
    return rescale(vit, shrink)


calibration = subset(open_dataset("fashion_mnist_subset"), 200)
images = torch.stack([(image.float() / 255 - mean) / std for image, _ in calibration]).to(device)
labels = torch.tensor([label for _, label in calibration], device=device)
with torch.no_grad():
    change = (with_outliers(100)(images) - vit(images)).abs().max() / vit(images).abs().max()
expect("relative change of the logits, in float32", change, at_most=1e-4)

# %% [markdown]
# The cure runs the same identity backwards. **SmoothQuant** (Xiao et al. 2023) shares the difficulty between activations and weights:
# with $\max |X_j|$ from a few images,
#
# $$ s_j = \frac{\max |X_j|^{\alpha}}{\max |W_j|^{1 - \alpha}}, \qquad X_j \to X_j / s_j, \quad W_j \to W_j \, s_j, $$
#
# where $\alpha$, between 0 and 1, is the share of the difficulty that leaves the activations; ½ is usual. And since the division is
# folded into the norm, it costs nothing when the model runs.
#
# ### Exercise 6 · `smoothing_factors`
# *Difficulty 2 of 5, about 10 minutes.* A few channels with huge activations spoil the steps of all others; one multiplication,
# made beforehand, helps.
#
# The weight is (out, in); a channel that is always zero, or that nobody reads, keeps the factor 1.


# %%
@exercise("hardware.smoothing_factors")
def smoothing_factors(largest, weight, alpha):
    """max|X| (in,), weight (out, in), α -> s (in,)."""
    # <solution>
    columns = weight.abs().amax(0)
    s = largest**alpha / columns ** (1 - alpha)
    return torch.where((largest > 0) & (columns > 0), s, 1.0)
    # </solution>


# %%
def smoothed(model):
    """The same function, with the outliers shared between activations and weights."""
    readers = [linear for block in model.blocks for linear in (block.attn.qkv, block.mlp.fc1)]
    peaks = channel_peaks(model, images)
    pairs = zip(peaks, readers, strict=True)
    return rescale(model, [smoothing_factors(largest, linear.weight.data, 0.5) for largest, linear in pairs])


factors = [1, 30, 100, 1000]
in_int8 = {name: [] for name in ("one scale a layer", "a scale a token", "smoothed, one scale a layer")}
for factor in factors:
    spiky = with_outliers(factor)
    for name, model in zip(in_int8, (spiky, spiky, smoothed(spiky)), strict=True):
        scheme = {"batches": [images], "scheme": "w8a8_static"} if "layer" in name else {"scheme": "w8a8"}
        in_int8[name].append(accuracy(quantization.quantize_model(model, **scheme)))

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Three charts of dots on one logarithmic scale, the largest activation of each of 96 channels after one norm: about equal in the
# trained model; three of them far above the rest in the model with outliers; about equal again after smoothing. On the right
# the accuracy with 8-bit
# weights and activations against the size of the outliers: with one scale a layer much is lost at a factor of 100, and with either it
# collapses at 1000; the smoothed model stays where it was.
fig, axes = plot.panels(1, 4, width=3.2, height=3.0)
spiky = with_outliers(100)
for ax, (name, model) in zip(
    axes, {"as trained": vit, "outliers, factor 100": spiky, "smoothed": smoothed(spiky)}.items(), strict=False
):
    ax.semilogy(range(96), channel_peaks(model, images)[4].cpu(), ".", color=plot.BLUE)  # norm1 of the third block
    ax.set(xlabel="channel", title=name, ylim=(0.1, 2000))
axes[0].set_ylabel("largest activation")
for name, values in in_int8.items():
    axes[3].semilogx(factors, values, "o-", label=name)
axes[3].set(
    xlabel="factor of the outliers", ylabel="accuracy in 8 bits, %", ylim=(0, 100), title="weights and activations"
)
axes[3].legend(fontsize=8, loc="lower left")
plt.show()

# %%
layer, token, smooth = in_int8.values()
expect("accuracy lost in 8 bits without outliers, in points", whole - layer[0], at_most=1.5)
expect("lost to outliers of factor 100, one scale a layer, in points", whole - layer[2], at_least=5.0)
expect("lost to outliers of factor 1000, a scale a token, in points", whole - token[3], at_least=5.0)
expect("most that is lost after smoothing, in points", whole - min(smooth), at_most=1.5)


def nearly_lost(model, images):
    """Of the numbers in all but the three largest channels: the share whose code, with a scale a token, is −1, 0 or 1."""
    outputs, hooks = [], []
    for norm in (norm for block in model.blocks for norm in (block.norm1, block.norm2)):
        hooks.append(norm.register_forward_hook(lambda module, args, out: outputs.append(out.flatten(0, -2))))
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    others = [out.abs().amax(0).argsort()[:-3] for out in outputs]
    codes = [quantize(out)[0][:, rest] for out, rest in zip(outputs, others, strict=True)]
    return torch.cat([(c.abs() <= 1).flatten() for c in codes]).float().mean()


expect("numbers that a factor of 100 rounds to −1, 0 or 1, as a share", nearly_lost(spiky, images), at_least=0.7)
theirs = quantization.smooth(spiky, [images], 0.5)
gap = max(
    (ours.norm1.weight / other.norm1.weight - 1).abs().max()
    for ours, other in zip(smoothed(spiky).blocks, theirs.blocks, strict=True)
)
expect("your smoothed norms against the library's, relative difference", gap, at_most=1e-4)

# %% [markdown]
# Again the patient is tougher than we thought: with a scale for each token, outliers of a factor of 100 round most numbers in the other
# channels to −1, 0 or 1, and it still knows its clothing. But the cliff is there, and where it lies nobody tells you beforehand.
#
# **Why is int8 not always faster?** A quantized layer does more work, not less. It wins where what it saves is what the chip waits for,
# *and* somebody wrote the kernel for it:
#
# * `w8a8` multiplies integers. That is faster on processors with units for it (VNNI or AMX on CPUs, tensor cores on GPUs), once the
#   rounding of each token is a small part. Without such units it is slower.
# * `int8` and `int4` weights with float activations save memory traffic, *if* they are turned into floats on the chip, inside the
#   product. The library has Triton kernels for that. On a CPU, PyTorch has to write the float weights to memory first: the layer is
#   smaller, and not faster.
#
# Here is your machine, and one linear layer of a ViT-B; beside it the layers of a ViT-B from `benchmarks/quantization.py`, measured in
# turns on one CPU with such units, against float32 and against the production peer, torchao. All of them run eagerly. torchao is written
# for `torch.compile`, so its dots show what it does without, and not the best that it can:

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Left: bars of the time of a linear layer, 768 to 3072, on this machine, relative to float32's, on a logarithmic axis with a dotted
# line at 1: three groups, for 1, 16 and 197 tokens, each with a bar for int8 weights, for int8 weights and activations, and for int4
# weights. Right: a row for each scheme and peer, with four dots for the four linear layers of a ViT-B at 197 tokens on the committed
# machine: the scheme's time as a part of the peer's, and a dotted line at 1. Integers times integers lie far left of it against
# float32; weights alone do not.
torch.manual_seed(0)
linear = nn.Linear(768, 3072).to(device)
layers = {"int8": quantization.Int8Linear, "w8a8": quantization.W8A8Linear, "int4": quantization.Int4Linear}
layers = {name: build(linear) for name, build in layers.items()}
counts = [1, 16, 197]
fig, (ax, swept_ax) = plt.subplots(1, 2, figsize=(11, 3.2))
with torch.inference_mode():
    for i, tokens in enumerate(counts):
        x = torch.randn(tokens, 768, device=device)
        base = fastest(lambda x=x: linear(x), 7)
        for j, (layer, colour) in enumerate(zip(layers.values(), plot.COLOURS, strict=False)):
            taken = fastest(lambda x=x, layer=layer: layer(x), 7)
            ax.bar(i + 0.25 * (j - 1), taken / base, 0.22, color=colour)
ax.axhline(1, color=plot.BLACK, linestyle=":")
ax.set_xticks(range(3), [f"{n} token{'s' * (n > 1)}" for n in counts])
ax.set(ylabel="time / float32's", yscale="log", title="one layer, 768 → 3072, on this machine")
ax.legend(["float32", *layers], loc="upper right", fontsize=9)
swept = results("quantization_cpu")
if swept:
    rows = [row for row in swept["rows"] if row.get("part") == "layers" and row["tokens"] == 197]
    rows = [row for row in rows if row["model"] == "vit_base"]
    pairs = list(dict.fromkeys((row["scheme"], row["peer"]) for row in rows))
    names = [f"{scheme} / {'float32' if peer == 'real' else peer}" for scheme, peer in pairs]
    for i, pair in enumerate(pairs):
        ratios = [row["ratio"] for row in rows if (row["scheme"], row["peer"]) == pair]
        swept_ax.plot(ratios, [i] * len(ratios), "o", color=plot.ORANGE if "torchao" in pair[1] else plot.BLUE)
    swept_ax.axvline(1, color=plot.BLACK, linestyle=":")
    swept_ax.set_yticks(range(len(pairs)), names, fontsize=9)
    swept_ax.set(xlabel="ratio of times, 197 tokens", xlim=(0, None), title="four layers of a ViT-B")
    swept_ax.invert_yaxis()
    print(f"right: {swept['device']}, {swept['date']}, torch {swept['versions']['torch']}")
plt.show()

# %% [markdown]
# ## 7 Heads that can go, and heads that cannot
#
# The last way is to do less. Which of the heads are needed? Taking each away and measuring costs a run for each. A **gate** costs
# one backward pass for all: put a factor $\xi_h = 1$ behind head $h$. To first order, closing it changes the loss by
# $-\partial L / \partial \xi_h$, and the chain rule says what that is: with $a$ the head's outputs over all tokens,
#
# $$ I_h = \operatorname{mean}_{\text{images}} \left| \sum_{n, d} a_{n d} \, \frac{\partial L}{\partial a_{n d}} \right| $$
#
# (Michel et al. 2019 for heads, Molchanov et al. 2019 for channels). The gate multiplies *all* of the head's numbers in an image,
# so the products are summed with their signs. One image's effect must not cancel another's: hence the magnitude for each image.
#
# ### Exercise 7 · `taylor_score`
# *Difficulty 3 of 5, about 15 minutes.* One backward pass says for all heads and channels at once what the loss would be without
# them.


# %%
@exercise("hardware.taylor_score")
def taylor_score(x, gradient, units):
    """x and ∂L/∂x (B, N, units · width), a unit's channels side by side -> (units,)."""
    # <solution>
    effect = (x * gradient).unflatten(-1, (units, -1))  # (B, N, units, width)
    return effect.sum((1, 3)).abs().mean(0)
    # </solution>


# %%
def importance(model):
    """Your score for all heads and hidden channels of the model, by the name of their layer."""
    seen, hooks = {}, []
    for name in prune.structure(model):
        layer = model.get_submodule(name)
        outlet = layer.proj if name.endswith("attn") else layer.fc2
        hooks.append(outlet.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]})))
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    gradients = torch.autograd.grad(loss, list(seen.values()))
    for hook in hooks:
        hook.remove()
    return {
        name: taylor_score(x.detach(), gradient, prune.structure(model)[name]).cpu()
        for (name, x), gradient in zip(seen.items(), gradients, strict=True)
    }


@torch.no_grad()
def losses(model):
    return F.cross_entropy(model(images), labels, reduction="none")


scores, before, measured = importance(vit), losses(vit), {}
for name in scores:
    if name.endswith("attn"):
        for head in range(4):
            keep = {name: [h for h in range(4) if h != head]}
            without = losses(prune.keep_units(copy.deepcopy(vit), keep))
            measured[name, head] = (without - before).abs().mean().item()
predicted = {key: scores[key[0]][key[1]].item() for key in measured}

# %% [markdown]
# `prune.keep_units` has really removed the head: its rows of `qkv` and its columns of `proj` are gone. On the left, what the gradient
# predicted against what happened. In the middle and on the right what 2 000 unseen images say: accuracy without one head, and with
# *only* one head left in its layer, from `benchmarks/pruning.py`.

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Left: sixteen dots, predicted against measured change of the loss, both logarithmic, rising together, with heads of the first
# block at the top. Middle and right: tables of four layers by four heads: the points of accuracy lost without this head, mostly
# small, and with only this head left in the layer, largest in the first layers.
swept = results("pruning")
fig, axes = plot.panels(1, 3, width=3.6, height=3.2)
for block, colour in enumerate(plot.COLOURS[:4]):
    keys = [key for key in measured if key[0] == f"blocks.{block}.attn"]
    axes[0].loglog(
        [predicted[k] for k in keys], [measured[k] for k in keys], "o", color=colour, label=f"block {block + 1}"
    )
axes[0].set(xlabel="predicted by the gradient", ylabel="measured", title="loss without a head: change")
axes[0].set_xticks([0.01, 0.03, 0.1], ["0.01", "0.03", "0.1"])
axes[0].set_yticks([0.01, 0.02, 0.04, 0.08], ["0.01", "0.02", "0.04", "0.08"])
axes[0].minorticks_off()
axes[0].legend(fontsize=9)
if swept:
    rows = swept["rows"]
    base = next(row["accuracy"] for row in rows if row["question"] == "whole")
    for ax, left_alone, title in ((axes[1], False, "without it"), (axes[2], True, "with it alone")):
        lost = np.zeros((4, 4))
        for row in rows:
            if row["question"] == "alone" and row["left"] == left_alone:
                lost[int(row["layer"].split(".")[1]), row["head"]] = 100 * (base - row["accuracy"])
        ax.imshow(lost, cmap="Reds", vmin=0, vmax=max(5, lost.max()))
        for (i, j), value in np.ndenumerate(lost):
            ax.text(
                j,
                i,
                f"{value:.1f}",
                ha="center",
                va="center",
                color="white" if value > 0.6 * lost.max() > 2 else "black",
            )
        ax.set(xlabel="head", ylabel="block", title=f"points lost {title}")
        ax.set_xticks(range(4), range(1, 5))
        ax.set_yticks(range(4), range(1, 5))
        ax.grid(False)
plt.show()


# %%
def ranks(values):
    return torch.tensor(values).argsort().argsort().double()


pair = torch.stack([ranks(list(predicted.values())), ranks(list(measured.values()))])
expect("rank correlation of predicted and measured, 16 heads", torch.corrcoef(pair)[0, 1], at_least=0.6)

# %% [markdown]
# ### Take them out
#
# `prune_model` ranks heads and MLP channels of all layers together, each score divided by the multiply–adds that the unit costs, and
# removes from the bottom. What is left is an ordinary, smaller `VisionTransformer`, whose blocks differ in width. The live contrast:
# 40 % fewer multiply–adds, by your score and by chance, nothing trained afterwards.<!--~ setting -->


# %%
def by_chance(seed):
    """Random scores, in proportion to the weights of a unit: else heads, which cost more, would be the first to go."""
    generator, scores = torch.Generator().manual_seed(seed), {}
    for name, n in prune.structure(vit).items():
        weights = sum(p.numel() for p in vit.get_submodule(name).parameters())
        scores[name] = torch.rand(n, generator=generator) * weights / n
    return lambda model: scores


batches = [(images, labels)]
smaller = prune.prune_model(vit, batches, macs=0.6, rounds=1, importance=importance)
random = [prune.prune_model(vit, batches, macs=0.6, rounds=1, importance=by_chance(seed)) for seed in range(3)]
share = prune.count_macs(smaller, images[:1]) / prune.count_macs(vit, images[:1])
expect("multiply–adds that are left", share, at_most=0.6)
gap = accuracy(smaller) - np.mean([accuracy(model) for model in random])
expect("accuracy by your score over the mean of three draws by chance, in points", gap, at_least=2.0)

# %% [markdown]
# And further down, where it does hurt, **training repairs**: a third of the multiply–adds, before and after 100 steps.

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Bars of heads and of MLP channels left in each of four blocks, where 60 and where 33 per cent of the multiply–adds are
# left.<!--~ setting --> With more of them the first block keeps everything; with fewer each block has one head left, and the first most
# of its MLP channels.
tiny = prune.prune_model(vit, batches, macs=0.33, rounds=2, importance=importance)
before_training = accuracy(tiny)
train_set = open_dataset("fashion_mnist_subset")
recipe = TrainConfig(max_steps=100 if session.quick else 1500, batch_size=64, lr=5e-4, warmup=0.1, hflip=True)
fit(tiny, train_set, config=recipe, progress=False)
after_training = accuracy(tiny)
print(
    f"float32, whole: {whole:.1f} %. A third, before and after training: {before_training:.1f} % and {after_training:.1f} %"
)
fig, axes = plot.panels(1, 2, width=4.4, height=2.8)
for model, name, shift, colour in ((smaller, "60 %", -0.2, plot.BLUE), (tiny, "33 %", 0.2, plot.ORANGE)):
    left = prune.structure(model)
    for ax, part in zip(axes, ("attn", "mlp"), strict=True):
        ax.bar(np.arange(4) + 1 + shift, [left[f"blocks.{b}.{part}"] for b in range(4)], 0.36, color=colour, label=name)
axes[0].set(xlabel="block", title="heads left, of 4", xticks=range(1, 5))
axes[1].set(xlabel="block", title="MLP channels left, of 384", xticks=range(1, 5))
axes[1].legend(title="of the MACs")
plt.show()

# %%
expect("what 100 steps bring back, in points", after_training - before_training, at_least=1.0)

# %% [markdown]
# One run is an anecdote; here is the sweep, on all 2 000 test images: three seeds for what has chance in it, each with its own thousand
# calibration images. What is fine-tuned was ranked by all 10 000.

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Left: accuracy against the multiply–adds left, without training: by the Taylor score it stays near the whole model's down to
# 70 per cent,<!--? percent(pruning, question="whole") - percent(pruning, question="ranking", how="taylor", target=0.7) < 0.5 --> by
# chance it falls earlier, by the sum of the squared weights earliest; by the product of the sizes on both sides it falls like chance down
# to 60 per cent and stays at 80 per cent from there, above all others at
# 40;<!--? all(80 < percent(pruning, question="ranking", how="product", target=t) < 82.5 for t in (0.6, 0.5, 0.4)) and
#     all(lead(pruning, question="ranking", target=0.4, seed=0, how=("product", how)) > 0 for how in ("taylor", "magnitude", "random"))
#     --> stars at 60 per cent mark what fine-tuning reaches.<!--~ setting -->
# Right: how many times as fast the pruned model is, measured in turns on one CPU thread, for batches of 1, 16 and 128; dotted: what
# the multiply–adds promise.
if swept:
    fig, axes = plot.panels(1, 2, width=5.0, height=3.4)
    scored = {
        "taylor": "Taylor score",
        "magnitude": "size, summed",
        "product": "size in × size out",
        "random": "chance",
    }
    for how, label in scored.items():
        targets = sorted({row["target"] for row in rows if row["question"] == "ranking"})
        runs = [
            [100 * r["accuracy"] for r in rows if r["question"] == "ranking" and (r["how"], r["target"]) == (how, t)]
            for t in targets
        ]
        plot.spread(axes[0], targets, runs, label)
    tuned = [row for row in rows if row["question"] == "finetuned"]
    axes[0].plot(
        [r["macs"] for r in tuned],
        [100 * r["accuracy"] for r in tuned],
        "*",
        color=plot.RED,
        label="fine-tuned",
        markersize=10,
    )
    axes[0].axhline(100 * base, color=plot.BLACK, linestyle=":")
    axes[0].set(
        xlabel="multiply–adds left", ylabel="accuracy, %", title="nothing trained, and fine-tuned", xlim=(0.9, 0.35)
    )
    axes[0].legend(loc="lower left")
    for batch in (1, 16, 128):
        speeds = sorted((r["macs"], r["ratio"]) for r in rows if r["question"] == "speed" and r["batch"] == batch)
        axes[1].plot(*zip(*speeds, strict=True), "o-", label=f"batch {batch}")
    promised = np.linspace(0.35, 0.85, 20)
    axes[1].plot(promised, 1 / promised, ":", color=plot.BLACK, label="promised")
    axes[1].set(xlabel="multiply–adds left", title="times as fast, one CPU thread", xlim=(0.9, 0.35), ylim=(0.9, 3))
    axes[1].legend()
    plt.show()
    print(f"measured on {swept['device']}, {swept['date']}, torch {swept['versions']['torch']}")

# %% [markdown]
# Three things to see. **The score is worth having**: untrained, it keeps the accuracy down to 70 %, and leads down to
# 60 %.<!--? percent(pruning, question="whole") - percent(pruning, question="ranking", how="taylor", target=0.7) < 0.5 and
#     all(mean(pruning, question="ranking", how="taylor", target=t) > mean(pruning, question="ranking", how=how, target=t)
#     for t in (0.85, 0.7, 0.6) for how in ("magnitude", "product", "random")) --> It is not the last word. How large are the weights of a
# unit? Summed, squared, over all that lead in and out, which looks so reasonable, they are a worse guide than chance down to one
# half.<!--? all(mean(pruning, question="ranking", how="magnitude", target=t) < mean(pruning, question="ranking", how="random", target=t)
#     for t in (0.85, 0.7, 0.6, 0.5)) --> But the *product* of the size on the one side and on the other, relative to the layer's mean,
# is about level with chance down to
# 60 %,<!--? all(abs(percent(pruning, question="ranking", how="product", target=t)
#     - percent(pruning, question="ranking", how="random", target=t)) < 1.6 for t in (0.85, 0.7, 0.6)) --> and with 40 % of the
# multiply–adds still has 80.5<!--= percent(pruning, question="ranking", how="product", target=0.4) --> % where the Taylor
# score has 65.2<!--= percent(pruning, question="ranking", how="taylor", target=0.4) -->. A baseline deserves some care before it is called
# bad. Two epochs with the whole model as teacher (the stars, three seeds) bring 60 % to within a point of
# it;<!--? 0 < percent(pruning, question="whole") - percent(pruning, question="finetuned") < 1 --> the whole model itself, trained alike,
# loses a quarter of a point,<!--? 0.2 < percent(pruning, question="whole") - percent(pruning, question="control") < 0.3 --> but as its own
# teacher it had nothing to gain. **The clock nearly keeps the promise for large
# batches.**<!--? all(row["ratio"] * row["macs"] > 0.94 for row in pruning["rows"] if row.get("batch") == 128) --> For a single image it
# keeps only part of it: norms, softmax and the calls themselves do not shrink, and there they are about half of the
# time.<!--? all(0.45 < (1 - 1 / row["ratio"]) / (1 - row["macs"]) < 0.55 for row in pruning["rows"] if row.get("batch") == 1) --> And what
# is *not* removed is as telling: at 60 % the first block keeps all it
# has.<!--? all((row["structure"]["blocks.0.attn"], row["structure"]["blocks.0.mlp"]) == (4, 384)
#     for row in pruning["rows"] if (row.get("how"), row.get("target")) == ("taylor", 0.6)) -->
#
# **And zeros?** One can also set single weights to zero, the smallest ones, wherever they are (Han et al. 2015). A model tolerates
# that better, since nothing has to fit a pattern. But a zero in a matrix of the old size is multiplied like any number:

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Left: accuracy against the part of the weights that is zero: unstructured zeros are tolerated up to about 60 per cent, then it
# falls;<!--? percent(pruning, question="whole") - percent(pruning, question="zeros", sparsity=0.6) < 1
#     < 2 < percent(pruning, question="whole") - percent(pruning, question="zeros", sparsity=0.7) --> a star marks the 2:4 pattern at one
# half. Right: bars of the time of a forward pass on this machine, relative to the whole model: about one with half of the weights zero,
# clearly less with 40 per cent of the multiply–adds removed.<!--~ setting -->
sparse = prune.make_permanent(prune.magnitude_prune(copy.deepcopy(vit), 0.5))
x = images.repeat(20 if device.type == "cuda" else 1, 1, 1, 1)[: None if device.type == "cuda" else 64]
with torch.inference_mode():
    taken = {name: [] for name in ("whole", "half of it zeros", "40 % removed")}
    for _ in range(7):
        for name, model in zip(taken, (vit, sparse, smaller), strict=True):
            taken[name].append(fastest(lambda model=model: model(x), 1))
fig, axes = plot.panels(1, 2, width=4.6, height=2.8)
if swept:
    zeros = [row for row in rows if row["question"] == "zeros"]
    line = [row for row in zeros if row["pattern"] == "unstructured"]
    axes[0].plot(
        [0, *(r["sparsity"] for r in line)], [100 * base, *(100 * r["accuracy"] for r in line)], "o-", label="anywhere"
    )
    star = next(row for row in zeros if row["pattern"] == "2:4")
    axes[0].plot(0.5, 100 * star["accuracy"], "*", color=plot.RED, markersize=12, label="2 of every 4")
    axes[0].set(xlabel="part of the weights that is zero", ylabel="accuracy, %", title="nothing trained afterwards")
    axes[0].legend()
reference = min(taken["whole"])
plot.bars(axes[1], {name: [min(values) / reference] for name, values in taken.items()}, digits=2)
axes[1].set(xlabel="time / whole model's", title="64 images, this machine", xlim=(0, 1.4))
plt.show()

# %% [markdown]
# The exception is a pattern that hardware knows: in **2:4 sparsity** two of every four neighbours are zero, and the tensor cores of
# NVIDIA GPUs from Ampere on skip them (Mishra et al. 2021). `magnitude_prune(model, pattern="2:4")` makes the zeros, and holds them
# during training; `accelerate_2_4(model)` stores the weights compressed where the GPU can, and says so where it cannot.
#
# ## 8 All of it together
#
# Your parts in one model. Its heads and channels were removed by your score and repaired by training; its attention runs on your
# Triton kernel; its linear layers keep your integers. Beside it the same model made of the library's parts, with PyTorch's own
# attention: the production peer. (The library rounds each scale to the digits of float16, so that it takes two bytes in a file, and
# would round the first convolution, too. So a weight that lies between two codes may take the one beside: the integers are compared.)


# %%
class Int8Linear(nn.Module):
    """A linear layer that keeps your codes and scales."""

    def __init__(self, linear):
        super().__init__()
        codes, scale = quantize(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.codes.to(x.dtype)) * self.scale[:, 0] + self.bias  # the scale leaves the sum


def quantized(module):
    """The same module with your layers in the place of its linear ones."""
    for name, child in module.named_children():
        setattr(module, name, Int8Linear(child) if type(child) is nn.Linear else quantized(child))
    return module


yours = with_backend(quantized(copy.deepcopy(tiny)), "yours, Triton")
theirs = with_backend(quantization.quantize_model(tiny, "int8", skip="patch_embed"), "sdpa")
with torch.no_grad():
    logits = theirs(few)
    apart = ((yours(few) - logits).norm() / logits.norm()).item()
codes = [module.codes for module in yours.modules() if isinstance(module, Int8Linear)]
library = [module.weight_int8 for module in theirs.modules() if isinstance(module, quantization.Int8Linear)]
beside = [(a.int() - b.int()).abs() for a, b in zip(codes, library, strict=True)]
expect("your integers against the library's, largest difference", max(int(d.max()) for d in beside), at_most=1)
same = 1 - sum(int(d.sum()) for d in beside) / sum(d.numel() for d in beside)
expect("share of your integers that are the library's", same, at_least=0.98)
expect("your model's logits against the library's with sdpa, relative difference", apart, at_most=1e-2)

# %%
# NBVAL_IGNORE_OUTPUT
print("model                           MMACs       MB   accuracy, %")
for name, model in {
    "as trained, float32": vit,
    "a third, fine-tuned, float32": tiny,
    "the same in int8": theirs,
    "the same in int4": quantization.quantize_model(tiny, "int4"),
}.items():
    macs = prune.count_macs(tiny if name.startswith("the same") else model, images[:1]) / 1e6
    print(f"{name:30s} {macs:6.1f} {quantization.model_bytes(model) / 1e6:8.2f} {accuracy(model):10.1f}")

# %% [markdown]
# The order matters: *prune, train, then quantize*. Rounded weights cannot be trained further in the plain way, and what is left after
# pruning is what is worth rounding well.
#
# ## 9 When would you choose what?
#
# | | saves | costs | choose it when |
# | --- | --- | --- | --- |
# | fused attention (`sdpa`, `flash_attention`) | traffic; memory in $N$ instead of $N^2$ | the weights cannot be looked at | **always**, except while you look |
# | int8 weights | 4<!--= 32 / 8 --> × memory against float32 | a multiplication by the scale | memory or the download is short; on a GPU also small batches |
# | int8 weights and activations | and multiplications, where the chip has int8 units | rounding each token; outliers | many tokens, large layers, hardware for it |
# | int4 weights | nearly 8<!--= 32 / 4 --> × memory | unpacking; accuracy, group by group | large models and small batches, on a GPU |
# | heads and channels removed | operations, memory and traffic, on any hardware | fine-tuning, and labels for it | the model is too large for the task |
# | zeros anywhere | the size of a compressed file | no time is saved | research |
# | 2:4 zeros | up to half of the products on NVIDIA's tensor cores | fine-tuning; float16 | large layers on such a GPU |
#
# And the questions that come back in every forum, in one line each. *NaN in half precision?* An overflow in the scores, or a row that is
# hidden altogether: subtract the peak, accumulate in float32, or take bfloat16 (section 1). *My fused attention returns no weights?* There
# were none (section 2). *Right on my test, wrong in production?* Try an N that is no multiple of the block (section 3). *int8 is slower?*
# Find out what the chip waits for (sections 0 and 6). *Pruned, but not faster?* Zeros do not count, unless they are gone (section 7).
#
# **What is missing here**, and why: times of GPU kernels. Nobody had a GPU at hand when this lesson was written. On a machine
# that has one, section 3 shows the clock, and `benchmarks/` has scripts that hold the library's kernels against PyTorch's.
#
# ## Stretch problems
#
# 1. Give your kernel a mask that hides later keys (causal attention). Which tiles need not be visited at all?
# 2. Let your kernel also store $L = m + \log \ell$, and write a second one that computes $dV = P^\top dO$ from it, tile by tile.
# 3. Give `quantize` a zero point for activations after GELU, which are hardly ever negative. How much finer do the steps become?
# 4. Choose the scale that minimises the squared error of a row instead of covering its largest weight. What is gained at 3 bits? At 8?
# 5. `macs` counts products. Measure the time of single heads and channels on your machine, and rank by importance per microsecond.
# 6. Prune with the labels shuffled. Does the order of the heads change? What does that say about calibration data?
#
# ## Papers
#
# * Williams et al. 2009, [Roofline: an insightful visual performance model](https://doi.org/10.1145/1498765.1498785).
# * Milakov and Gimelshein 2018, [Online normalizer calculation for softmax](https://arxiv.org/abs/1805.02867).
# * Dao et al. 2022, [FlashAttention](https://arxiv.org/abs/2205.14135); Dao 2023, [FlashAttention-2](https://arxiv.org/abs/2307.08691).
# * Tillet et al. 2019, [Triton: an intermediate language and compiler for tiled neural network computations](https://doi.org/10.1145/3315508.3329973).
# * Jacob et al. 2018, [Quantization and training for integer-arithmetic-only inference](https://arxiv.org/abs/1712.05877).
# * Dettmers et al. 2022, [LLM.int8()](https://arxiv.org/abs/2208.07339): outliers.
# * Xiao et al. 2023, [SmoothQuant](https://arxiv.org/abs/2211.10438); Frantar et al. 2023, [GPTQ](https://arxiv.org/abs/2210.17323).
# * Michel et al. 2019, [Are sixteen heads really better than one?](https://arxiv.org/abs/1905.10650)
# * Molchanov et al. 2019, [Importance estimation for neural network pruning](https://arxiv.org/abs/1906.10771).
# * Han et al. 2015, [Learning both weights and connections](https://arxiv.org/abs/1506.02626); Mishra et al. 2021,
#   [Accelerating sparse deep neural networks](https://arxiv.org/abs/2104.08378).
