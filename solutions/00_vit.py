# %% [markdown]
# # 00 · The Vision Transformer
#
# *From pixels to a model that you wrote, and that you train in this notebook.*
#
# **You will build** every part of a Vision Transformer (ViT): patches, position codes, attention, the encoder block, the
# model, the learning-rate schedule. Then you train it on Fashion-MNIST, and load production weights into it to see that
# it computes what the well-known libraries compute.
#
# **Why anybody needs it.** A convolution sees a small window, and needs many layers until one corner of an image can
# influence the other. Attention connects any two places in a single layer, and the same block reads text, sound and
# video. Since 2021 most large vision models are built from it. Everything else in this course changes one part of what
# you build here.
#
# **How the exercises work.** Replace `raise TODO` by your code and run the cell. A `✓` means that your code agrees with the
# library's on fresh random inputs, gradients included. A `✗` says what differs. `hint()` shows the next hint,
# `last_attempt()` what your code did. If you leave a blank, the course uses its own part and goes on, so you can read
# everything first and write later. (Lessons 03, 04 and 07 to 12, to which the text sometimes points, are still to come.)

# %%
import json
import time
from dataclasses import asdict

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import vitcourse
from vitcourse import course, paths, plot
from vitcourse.course import TODO, exercise, expect, hint, last_attempt
from vitcourse.data import open_dataset, photo, subset
from vitcourse.layers import Mlp
from vitcourse.vit import LinearPatchEmbed, PatchEmbed, patch_to_image, record_attention

session = course.setup()
device = session.device

# %% [markdown]
# ## 0 What does it cost to look at everything?
#
# Attention compares each of $N$ tokens with every other: $N^2$ numbers. The obvious choice, one token for each pixel,
# fails on arithmetic alone. For a 224-pixel image, one attention map of one head in float32 takes:

# %%
for name, tokens in [("one token a pixel", 224 * 224), ("one token a 16×16 patch", (224 // 16) ** 2)]:
    print(f"{name:24s} N = {tokens:6,d}   N² = {tokens**2:13,d}   {tokens**2 * 4 / 1e6:9,.1f} MB")

# %% [markdown]
# Ten gigabytes for one map of one head of one layer, against 0.2 MB. The time grows at least as fast. Here is plain softmax
# attention, timed on the machine you are sitting at. (Between two lengths it may rise more steeply than the dashed line: there
# the $N^2$ numbers, which are written and read again several times, no longer fit the processor's caches.)

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Time of one attention call against the number of tokens, both axes logarithmic. From about two hundred tokens on the
# curve rises at least as steeply as a dashed line that grows with the square of the number of tokens.
lengths, seconds = [16, 49, 196, 784, 1568], []
for n in lengths:
    x = torch.randn(2, 4, n, 32, device=device)
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        vitcourse.layers.attention(x, x, x, backend="math").sum().item()
        runs.append(time.perf_counter() - start)
    seconds.append(min(runs))

fig, (ax,) = plot.panels(1, 1, width=5.5, height=3.4)
ax.loglog(lengths, [1e3 * s for s in seconds], "o-", label="measured here")
ax.loglog(lengths, [1e3 * seconds[-1] * (n / lengths[-1]) ** 2 for n in lengths], "--", color="grey", label="∝ N²")
ax.set(xlabel="number of tokens N", ylabel="milliseconds", title="Attention grows at least as N²")
ax.legend()
plt.show()

# %% [markdown]
# So the first idea of ViT is a way to have few tokens: **one for each patch**, not one for each pixel.
#
# ## 1 An image becomes a sequence
#
# Cut the image into squares of $p \times p$ pixels, read the squares like the words of a page, and flatten each into a
# vector of $p \cdot p \cdot C$ numbers. Nothing is lost and nothing is learnt yet: it is a permutation of the pixels.

# %%
# alt: A photo of a cat; the same with a grid that cuts it into eight rows of eight patches; the 64 patches laid out side by
# side with gaps, in reading order.
cat = photo("cat")  # (3, 256, 256), uint8
fig, (left, middle, right) = plot.panels(1, 3, width=3.1, height=3.2)
plot.show_image(left, cat, "an image")
plot.show_image(middle, cat, "cut into 8 × 8 patches")
plot.draw_grid(middle, (256, 256), 32)
apart = torch.full((3, 8 * 38, 8 * 38), 255, dtype=torch.uint8)
for row in range(8):
    for column in range(8):
        patch = cat[:, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
        apart[:, row * 38 + 3 : row * 38 + 35, column * 38 + 3 : column * 38 + 35] = patch
plot.show_image(right, apart, "64 tokens, read row by row")
plt.show()

# %% [markdown]
# ### Exercise 1 · `image_to_patch`
# *Difficulty 1 of 5, about 10 minutes.* A transformer reads sequences, so an image has to become one, without losing
# where each pixel was.
#
# In [einops](https://einops.rocks) the pattern is the documentation: name the axes on the left, say on the right how they
# are joined. `rearrange(x, "b c h w -> b (h w) c")`, for example, makes every pixel a token. Here $H$ splits into
# `(h p1)`: which row of patches, and which row of pixels inside the patch.


# %%
@exercise("vit.image_to_patch")
def image_to_patch(x, patch_size):
    """(B, C, H, W) -> (B, H/p · W/p, p · p · C): patches in reading order, the channels of a pixel side by side."""
    # <solution>
    return rearrange(x, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=patch_size, p2=patch_size)
    # </solution>


# %% [markdown]
# Since nothing is lost, the way back exists. And since a sequence is all that the model gets, it has no idea which
# patch was next to which. Shuffle the tokens, and the picture shows what is left:

# %%
# alt: The cat put together again from its patches, unharmed; beside it the same patches in random order, in which the cat
# can no longer be made out.
tokens = image_to_patch(cat[None], 32)
print("tokens", tuple(tokens.shape))
back = patch_to_image(tokens, 32, (8, 8))
expect("image → patches → image: pixels changed", int((back != cat).sum()), equals=0)

order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
fig, (left, right) = plot.panels(1, 2, width=3.1, height=3.2)
plot.show_image(left, back[0], "the tokens in order")
plot.show_image(right, patch_to_image(tokens[:, order], 32, (8, 8))[0], "the same tokens, shuffled")
plt.show()

# %% [markdown]
# **A question that comes up again and again:** *my images have 32 pixels, and ViT-B/16 does not learn.* Count the tokens. A
# patch size is not good or bad in itself; it decides how many places the model can tell apart.

# %%
for size, patch in [(224, 16), (32, 16), (32, 4), (28, 7), (28, 4)]:
    n = (size // patch) ** 2
    print(f"{size:3d}-pixel image, patch {patch:2d}: {n:3d} tokens of {patch * patch * 3:3d} numbers")
try:
    vitcourse.create_model("vit_tiny_patch16_224", img_size=225)
except ValueError as error:
    print(error)

# %% [markdown]
# ## 2 Tokens: embedding, [CLS], positions
#
# A learnt linear map takes each flattened patch to a vector of $D$ numbers, the *embedding*:
#
# $$ z_i = E\, x_i + b, \qquad x_i \in \mathbb{R}^{p^2 C},\; E \in \mathbb{R}^{D \times p^2 C}. $$
#
# Libraries write it as a convolution whose stride is its kernel size. It is the same map with the weights laid out
# differently, as you can see by converting one into the other:

# %%
conv = PatchEmbed(patch_size=16, in_chans=3, embed_dim=64)
linear = LinearPatchEmbed.from_conv(conv)
x = torch.rand(2, 3, 64, 64)
print("convolution", tuple(conv.proj.weight.shape), "→ linear layer", tuple(linear.proj.weight.shape))
expect("largest difference of the two embeddings", (conv(x) - linear(x)).abs().max(), at_most=1e-5)

# %% [markdown]
# In front of the patches stands one more token, **[CLS]**. It has no pixels: it starts as one learnt vector, the same for
# all images, collects what it needs through attention, and is what the classifier reads in the end.
#
# ### Where is a patch?
#
# You saw the shuffled cat. Attention treats its input as a *set*: permute the tokens and the outputs are permuted in the
# same way, nothing else. So the place has to be written into the token. ViT adds a vector $e_i$ to each $z_i$. It can be
# learnt, or fixed. A good fixed code has three properties: every place has its own code, near places have similar
# codes, and the similarity of two places depends on the offset between them, not on where they lie. Sines and cosines of
# several wavelengths have all three, because $\sin a \sin b + \cos a \cos b = \cos(a - b)$: the dot product of two codes
# depends on the offset alone.
#
# ### Exercise 2 · `sincos_2d`
# *Difficulty 3 of 5, about 20 minutes.* Attention does not see order. A position code gives each token its place.
#
# The $D$ channels are four stretches of $n = D/4$: $\sin(x\,\omega_i)$, $\cos(x\,\omega_i)$, $\sin(y\,\omega_i)$,
# $\cos(y\,\omega_i)$, where $x$ is the column, $y$ the row, and $\omega_i = 10000^{-i/n}$ for $i = 0 \dots n-1$.


# %%
@exercise("vit.sincos_2d")
def sincos_2d(h, w, dim):
    """Codes for a grid of h × w patches, in reading order: (h · w, dim), float32."""
    # <solution>
    omega = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))  # (n,)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    x, y = columns.reshape(-1, 1) * omega, rows.reshape(-1, 1) * omega  # (h w, n)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
    # </solution>


# %% [markdown]
# What do *learnt* positions look like? The course ships a small ViT with a convolutional stem (lesson 02), trained on the
# complete Fashion-MNIST (60 000 images, 7 × 7 patches of 4 pixels; how, and how well, stands in `data/README.md`). The maps
# below show how similar the code of one place, marked, is to the codes of all others.

# %%
# alt: Two rows of five similarity maps on a 7 by 7 grid. Upper row, fixed sine-cosine codes: a bright spot around the marked
# place that fades with distance. Lower row, learnt codes: far less regular. Brighter than the rest are the places straight
# above and below, and often the one that mirrors the marked place on the other side.
shipped = vitcourse.create_model(paths.data_dir() / "weights" / "fashion_mnist_vit.safetensors").eval().to(device)
fixed, learnt = sincos_2d(7, 7, shipped.embed_dim), shipped.pos_embed[0, 1:].detach().cpu()
places = [(0, 0), (1, 5), (3, 3), (5, 1), (6, 6)]
fig, axes = plot.panels(2, 5, width=1.75, height=1.9)
for axes_row, code, name in [(axes[:5], fixed, "fixed"), (axes[5:], learnt - learnt.mean(0), "learnt")]:
    for ax, (row, column) in zip(axes_row, places, strict=True):
        similarity = F.cosine_similarity(code[row * 7 + column], code, dim=1).reshape(7, 7)
        plot.show_image(ax, similarity, f"{name}: row {row}, col {column}", vmin=-0.3, vmax=1)
        ax.title.set_fontsize(9)
        ax.plot(column, row, "x", color=plot.RED, markersize=9, markeredgewidth=2)
plt.show()
code = F.normalize(learnt - learnt.mean(0), dim=1).reshape(7, 7, -1)
above, beside = (code[1:] * code[:-1]).sum(-1), (code[:, 1:] * code[:, :-1]).sum(-1)
mirrored = (code * code.flip(1)).sum(-1)[:, [0, 1, 2, 4, 5, 6]]  # the middle column mirrors itself
expect("learnt: mean cosine of places one above the other", above.mean(), close_to=0.45, tol=0.01)
expect("of places side by side", beside.mean(), close_to=0.13, tol=0.01)
expect("of places that mirror each other left and right", mirrored.mean(), close_to=0.32, tol=0.01)

# %% [markdown]
# The learnt table has found something of the grid. Places one above the other have similar codes, those side by side far
# less. So have places that mirror each other left and right, since training flipped the images.
# Rows and columns as a whole show little. And even that takes data; with fixed codes the grid is there from the first step.
#
# ## 3 Attention
#
# Each token asks a question, the *query* $q_i$. Each token offers a *key* $k_j$, which says what it is about, and a
# *value* $v_j$, which is what it has to tell. The match of question and key decides how much of the value is heard:
#
# $$ A_{ij} = \operatorname{softmax}_j\!\left(\frac{q_i \cdot k_j}{\sqrt{d}}\right), \qquad o_i = \sum_j A_{ij}\, v_j. $$
#
# Each row of $A$ sums to one: a token has one unit of attention to spend.
#
# ### Exercise 3 · `attention_weights`
# *Difficulty 2 of 5, about 10 minutes.* This is the one operation in which tokens exchange information.
#
# In the shapes below $H$ counts heads, explained after it; here it is one more batch axis.


# %%
@exercise("vit.attention_weights")
def attention_weights(q, k):
    """q (B, H, N_q, d), k (B, H, N_k, d) -> weights (B, H, N_q, N_k)."""
    # <solution>
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1)
    # </solution>


# %% [markdown]
# **Why divide by $\sqrt d$?** The dot product of two random vectors of length $d$ (entries of mean 0 and variance 1) has
# variance $d$. Without the division the scores spread more the wider the head, until the softmax picks a single winner. And
# where one weight is 1 and all others are 0, the gradient of the softmax, $A_{ij}\,(r_j - \sum_k A_{ik} r_k)$ for a loss with
# gradient $r$ at the weights, is zero: queries and keys cannot learn any more (the values still do).

# %%
# alt: Two panels against the width d of a head. Left: the largest of 64 attention weights stays near 0.1 with the division by
# the square root of d, and rises to 0.95 without. Right: the gradient that reaches the scores of a typical query is constant
# with the division, and falls by three orders of magnitude without.
widths = [4, 16, 64, 256, 1024]
largest, gradient = {"with 1/√d": [], "without": []}, {"with 1/√d": [], "without": []}
generator = torch.Generator().manual_seed(0)
for d in widths:
    q, k = (torch.randn(1, 1, n, d, generator=generator) for n in (256, 64))
    r = torch.randn(1, 1, 256, 64, generator=generator)
    for name, factor in [("with 1/√d", 1.0), ("without", d**0.5)]:  # a factor √d undoes the scale
        weights = attention_weights(q * factor, k)
        at_scores = weights * (r - (weights * r).sum(-1, keepdim=True))
        largest[name].append(weights.amax(-1).mean().item())
        gradient[name].append(at_scores.norm(dim=-1).median().item())

fig, (left, right) = plot.panels(1, 2, width=4.2, height=3.3)
for name in largest:
    left.semilogx(widths, largest[name], "o-", label=name)
    right.loglog(widths, gradient[name], "o-", label=name)
left.set(
    xlabel="width d of a head", ylabel="largest weight, mean", ylim=(0, 1), title="64 keys: who gets the attention?"
)
right.set(xlabel="width d of a head", ylabel="gradient norm, median", title="What reaches the scores?")
left.legend()
plt.show()
expect("largest of 64 weights at d = 1024 without the division", largest["without"][-1], at_least=0.9)
expect("gradient at d = 1024: without over with", gradient["without"][-1] / gradient["with 1/√d"][-1], at_most=0.05)

# %% [markdown]
# ### Several heads
#
# One softmax can follow one kind of relation. So the $D$ channels are split into $H$ *heads* of $d = D/H$ channels, each
# attends on its own, and a last linear layer mixes what they found. That costs nothing extra: the matrices have the same
# sizes, only the softmax is computed $H$ times.
#
# ### Exercise 4 · `Attention`
# *Difficulty 3 of 5, about 20 minutes.* Splitting and joining heads is where most bugs live: a wrong reshape still runs,
# still trains, and is quietly worse.
#
# `self.qkv` makes queries, keys and values of all heads in one matrix product. Its $3D$ outputs are, in this order: all of
# $q$, all of $k$, all of $v$; inside each, head after head. Use your `attention_weights`. (`grid` says where the tokens lie;
# this lesson does not need it, lessons 01, 02 and 05 do.)


# %%
@exercise("vit.Attention")
class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads=8):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, grid=None):
        # <solution>
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        out = attention_weights(q, k) @ v  # (B, H, N, d)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))
        # </solution>


# %% [markdown]
# What does a trained model look at? In production the weights $A$ are never stored: *fused* kernels compute $A V$ piece by
# piece and forget $A$, which is why `scaled_dot_product_attention` **returns no weights**, another question that forums see
# every week. If you want to look, you have to ask for the plain equation; `record_attention` does that for any model of
# the library.

# %%
# alt: Three rows, each an item of clothing from the test set followed by the attention of the [CLS] token in the last
# block: one map for each of the four heads, brighter where the head looks. Heads differ from each other and mostly read a
# few patches: at an edge of the item, inside it, and some of them on the empty background.
test_set = open_dataset("fashion_mnist_subset", "test")
mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (shipped.preprocess.mean, shipped.preprocess.std))
items = torch.stack([test_set[i][0].float() / 255 for i in (1, 4, 9)]).to(device)
with torch.no_grad(), record_attention(shipped) as recorded:
    shipped((items - mean) / std)
heads = recorded[-1][:, :, 0, 1:].reshape(len(items), -1, 7, 7).cpu()  # what [CLS] attends to in the last block
fig, axes = plot.panels(3, 1 + heads.shape[1], width=1.8, height=1.8)
for axes_row, item, maps in zip(axes.reshape(3, -1), items.cpu(), heads, strict=True):
    plot.show_image(axes_row[0], item)
    for ax, attended in zip(axes_row[1:], maps, strict=True):
        plot.show_attention(ax, item, attended)
for ax, title in zip(axes, ["item", *(f"head {i + 1}" for i in range(heads.shape[1]))], strict=False):
    ax.set_title(title)
plt.show()

# %% [markdown]
# Each head reads a few patches of its own, and some of these lie on the empty background. The likely reason: in the last block
# a token no longer stands for its pixels alone, and a patch with nothing to tell is free to hold something about the whole.
# Darcet et al. 2024 found just that in large models, and gave them *registers* to write on instead. So a bright patch says
# where the head reads, and not which pixels decided; lesson 09 is about the difference.
#
# **NaN in half precision.** float16 ends at 65 504. A dot product over 64 channels of size 50 is 160 000, so the score is
# `inf`, and `inf − inf` in the softmax is NaN. The order of operations decides: scale the queries *before* the product,
# and the same numbers fit. (bfloat16 has float32's range, at the cost of three bits of precision; that is why everybody
# trains with it.)

# %%
q = k = torch.full((1, 1, 2, 64), 50.0, dtype=torch.float16)
late = (q @ k.transpose(-2, -1)) * 64**-0.5
early = (q * 64**-0.5) @ k.transpose(-2, -1)
print("scaled after the product: ", late[0, 0, 0].tolist(), "→ softmax", late.softmax(-1)[0, 0, 0].tolist())
print("scaled before the product:", early[0, 0, 0].tolist(), "→ softmax", early.softmax(-1)[0, 0, 0].tolist())

# %% [markdown]
# ## 4 The block
#
# Attention moves information between tokens. An MLP then works on each token alone. Both *add* to the token rather than
# replace it, so a clean path, the *residual stream*, runs from the input to the head:
#
# $$ x \leftarrow x + \operatorname{Attention}(\operatorname{LN}(x)), \qquad x \leftarrow x + \operatorname{MLP}(\operatorname{LN}(x)). $$
#
# The layer norm sits on the branch (*pre-norm*), not on the stream as in the first transformers (*post-norm*), which needed a
# long and careful warm-up to train at all (Xiong et al. 2020).
#
# ### Exercise 5 · `Block`
# *Difficulty 2 of 5, about 10 minutes.* The residual path is what keeps the tokens of a deep stack apart.


# %%
@exercise("vit.Block")
class Block(nn.Module):
    """A pre-norm encoder block, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, grid=None):
        # <solution>
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
        # </solution>


# %% [markdown]
# What does the sum do? Attention *averages*. Average again and again, and all tokens of an image become the same. Here are 24
# fresh blocks, once as you wrote them, once with the same parts but nothing added to $x$:


# %%
# alt: How much the tokens of one image differ after each of 24 blocks, logarithmic. With the residual path the difference stays
# near one. Without it, it falls by orders of magnitude to nothing.
def without_residual(block, x):
    return block.mlp(block.norm2(block.attn(block.norm1(x))))


torch.manual_seed(0)
fig, (ax,) = plot.panels(1, 1, width=5.5, height=3.4)
spreads = {}
for name, step in [("with the residual path", lambda block, x: block(x)), ("without", without_residual)]:
    x, spreads[name] = torch.randn(8, 16, 64), []
    with torch.no_grad():
        for _ in range(24):
            x = step(Block(64, 4), x)
            spreads[name].append((x.std(dim=1).mean() / x.std()).item())
    ax.semilogy(range(1, 25), spreads[name], "o-", label=name)
ax.set(
    xlabel="block", ylabel="spread over tokens / spread of all", title="Are the 16 tokens of an image still different?"
)
ax.legend()
plt.show()
expect("spread of the tokens after 24 blocks", spreads["with the residual path"][-1], at_least=0.3)
expect("the same without the residual path", spreads["without"][-1], at_most=0.01)

# %% [markdown]
# Without the path one block after the other pulls the tokens together, until there is one token in sixteen copies. (For
# attention alone, with neither residual paths nor MLPs, Dong et al. 2021 prove it: doubly exponentially in depth.) The path
# also carries gradients back to the first block, as in a ResNet.
#
# ## 5 The model
#
# Now put it together: patches → embedding → [CLS] in front → plus positions → blocks → norm → head on [CLS].
#
# ### Exercise 6 · `VisionTransformer`
# *Difficulty 4 of 5, about 25 minutes.* Its parts are small; their order is the architecture.
#
# `patch_embed` returns a map (B, D, h, w). `pos_embed` has a place for [CLS], too.


# %%
@exercise("vit.VisionTransformer")
class VisionTransformer(nn.Module):
    """Images (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12
    ):
        super().__init__()
        num_patches = (img_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + num_patches, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x):
        # <solution>
        x = rearrange(self.patch_embed(x), "b d h w -> b (h w) d")
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
        # </solution>


# %% [markdown]
# Is it *the* ViT? The strongest test is a production library. `timm` uses the same parameter names, so its state dict
# must load into your model without a single name left over, and give the same logits. (Every parameter is made random
# first: a fresh model has many zeros, which hide mistakes.)

# %%
import timm

theirs = timm.create_model("vit_tiny_patch16_224").eval()
torch.manual_seed(0)
for parameter in theirs.parameters():
    nn.init.normal_(parameter, std=0.05)
mine = VisionTransformer(embed_dim=192, num_heads=3).eval()
print(mine.load_state_dict(theirs.state_dict(), strict=True))
x = torch.randn(2, 3, 224, 224)
with torch.no_grad():
    expected, got = theirs(x), mine(x)
expect("relative difference from timm's logits", (got - expected).abs().max() / expected.abs().max(), at_most=1e-5)
expect("spread of the logits, so that equality means something", expected.std(), at_least=0.01)

# %% [markdown]
# The same class, in the sizes of the papers. GMACs are billions of multiply–adds for one 224-pixel image; most sit in the
# linear layers, whose cost grows with $N D^2$, and only 4 (base) to 14 (tiny) per cent in $A V$ and $Q K^T$, which grow with
# $N^2 D$.

# %%
from torch.utils.flop_counter import FlopCounterMode

print("model          parameters    GMACs   in attention itself")
for name in ("tiny", "small", "base"):
    with torch.device("meta"):
        model = vitcourse.create_model(f"vit_{name}_patch16_224")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    heads, depth, width = model.blocks[0].attn.num_heads, len(model.blocks), model.embed_dim
    gmacs, quadratic = counter.get_total_flops() / 2e9, depth * 2 * 197 * 197 * width / 1e9
    print(
        f"ViT-{name:6s} {sum(p.numel() for p in model.parameters()) / 1e6:10.1f} M {gmacs:8.2f} {quadratic / gmacs:12.1%}"
    )

# %% [markdown]
# **Mean pooling that swallows [CLS].** The head can also read the mean of the tokens. Then [CLS], and the *registers* of newer
# models (extra tokens without pixels, Darcet et al. 2024), must stay out of the mean, or they add a constant to every
# image. Change the prefix tokens of the library's model, and nothing may happen:

# %%
pooled = vitcourse.create_model("vit_tiny", img_size=32, patch_size=8, global_pool="avg", reg_tokens=4, num_classes=10)
tokens = pooled.forward_features(torch.rand(2, 3, 32, 32))
spoiled = tokens.clone()
spoiled[:, : pooled.num_prefix_tokens] += 100.0
print(pooled.num_prefix_tokens, "prefix tokens,", tokens.shape[1] - pooled.num_prefix_tokens, "patches")
unchanged = torch.equal(pooled.forward_head(tokens), pooled.forward_head(spoiled))
expect("logits unchanged when the prefix tokens are spoiled", unchanged, equals=True)

# %% [markdown]
# ## 6 Training it
#
# The usual recipe for a ViT has four parts. (Section 7 tries what three of them do for a model as small as yours.)
#
# * **AdamW.** Gradients differ much in size from part to part; Adam gives each parameter a step of its own. Plain SGD with momentum
#   gets about as far here, once its rate has been searched for as well; with large ViTs it is reported to fall behind. Weight decay
#   is *decoupled* (the W): it shrinks the matrices beside the step, and no gradient knows of it. Norms, biases and positions have
#   none, since for them zero is no better than one.
# * **Warm-up.** Adam's estimates are poor in the first steps, and a large early step can push the softmax where its
#   gradient is zero. So the rate climbs linearly at first.
# * **Cosine decay.** Then it falls, slowly, so that the weights settle.
# * **Augmentation**, in long runs: a ViT knows nothing about images, not even that a mirrored shoe is a shoe. Once it has seen
#   each picture often enough to know it by heart, it has to be shown new ones.
#
# ### Exercise 7 · `learning_rate`
# *Difficulty 2 of 5, about 15 minutes.* Deep transformers are touchy in their first steps. The warm-up gets them through.
#
# With `warmup_steps = round(config.warmup * total_steps)`: in the warm-up, step $s$ (from 0) has
# $\text{lr} \cdot (s+1)/(\text{warmup\_steps}+1)$; after it, half a cosine falls from `config.lr` to `config.min_lr`, which the
# last step, `total_steps - 1`, reaches exactly.

# %%
import math


@exercise("vit.learning_rate")
def learning_rate(step, total_steps, config):
    """The rate of step 0 … total_steps − 1, from config.lr, config.min_lr and config.warmup (a share of the steps)."""
    # <solution>
    warmup_steps = round(config.warmup * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    t = (step - warmup_steps) / (total_steps - 1 - warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * t)) / 2
    # </solution>


# %% [markdown]
# Now train **your** model: 28-pixel grey images, 16 patches of 7 × 7 pixels, 64 channels, 4 blocks. In the quick profile
# that is 10 000 images and about half a minute on one CPU core; `VITCOURSE_PROFILE=full` takes CIFAR-10 and a GPU.

# %%
# NBVAL_IGNORE_OUTPUT
from vitcourse.train import TrainConfig, fit

if session.quick:
    train_set = open_dataset("fashion_mnist_subset")
    size = {
        "img_size": 28,
        "patch_size": 7,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
    }
    recipe = TrainConfig(epochs=5, batch_size=100, lr=3e-3, warmup=0.1, label_smoothing=0.0)
else:
    train_set, test_set = (open_dataset("cifar10", split, download=True) for split in ("train", "test"))
    size = {
        "img_size": 32,
        "patch_size": 4,
        "in_chans": 3,
        "num_classes": 10,
        "embed_dim": 192,
        "depth": 9,
        "num_heads": 3,
    }
    recipe = TrainConfig(epochs=30, batch_size=256, lr=1e-3, warmup=0.1, hflip=True, crop_padding=4, ema=0.999)

torch.manual_seed(0)
vit = VisionTransformer(**size).to(device)
vit_history = fit(vit, train_set, test_set, recipe)
print(
    f"{sum(p.numel() for p in vit.parameters()):,} parameters, {vit_history[-1]['val_accuracy']:.1%} on unseen images"
)

# %%
expect("accuracy of your ViT on unseen images", vit_history[-1]["val_accuracy"], at_least=0.78)

# %% [markdown]
# Is that good? A number means something beside a **baseline**, and the hardest test for a ViT is *few images*. So here are two
# more runs of about equal time on only 500 of the images: your ViT, and a plain convolutional network with half as many
# parameters.

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Left: accuracy on unseen images over the steps of three runs: the ViT on all images, the ViT on 500 images, and the
# convolutional network on 500 images, which ends well above the ViT on 500. Right: the learning rate over the steps, a short
# linear rise and a long cosine fall.
from vitcourse.course.baselines import small_cnn

few = subset(train_set, 500)
torch.manual_seed(0)
contrast = {}
for name, model, epochs in [("ViT", VisionTransformer(**size), 36), ("CNN", small_cnn(size["in_chans"]), 22)]:
    options = {**asdict(recipe), "epochs": epochs, "batch_size": 100, "eval_every": 9}
    contrast[name] = fit(model.to(device), few, test_set, TrainConfig(**options))

fig, (left, right) = plot.panels(1, 2, width=4.6, height=3.4)
runs_shown = {"your ViT, all images": vit_history, **{f"{name}, 500 images": h for name, h in contrast.items()}}
plot.curves(left, runs_shown, "val_accuracy", "accuracy on unseen images", x="step")
steps = vit_history[-1]["step"]
right.plot([learning_rate(step, steps, recipe) for step in range(steps)], color=plot.GREEN)
right.set(xlabel="step", ylabel="learning rate", title="your schedule")
plt.show()

# %%
lead = contrast["CNN"][-1]["val_accuracy"] - contrast["ViT"][-1]["val_accuracy"]
expect("the CNN's lead over the ViT on 500 images", lead, at_least=0.02)

# %% [markdown]
# With few images the convolutional network wins, and not by luck. It was *built* to know that neighbouring pixels belong together
# and that a pattern means the same wherever it is. Your ViT has to learn both from pictures. What does the one that saw all
# images still get wrong?

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Left: the confusion matrix of the ten kinds of clothing; most mass is on the diagonal, and shirts are confused with
# T-shirts, pullovers and coats. Right: eight misclassified items, each with its true and its predicted class.
images = torch.stack([image.float() / 255 for image, _ in test_set]).to(device)
labels = torch.tensor(test_set.targets)
mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (test_set.mean, test_set.std))
with torch.no_grad():
    guesses = torch.cat([vit((x - mean) / std) for x in images.split(500)]).argmax(1).cpu()
confusion = torch.zeros(10, 10).index_put_((labels, guesses), torch.ones(len(labels)), accumulate=True)

fig = plt.figure(figsize=(10.5, 4.6))
left, right = fig.subfigures(1, 2, width_ratios=(1.1, 1))
ax = left.subplots()
ax.imshow(confusion / confusion.sum(1, keepdim=True), vmin=0, vmax=1)
ax.set_xticks(range(10), test_set.classes, rotation=60, ha="right", fontsize=9)
ax.set_yticks(range(10), test_set.classes, fontsize=9)
ax.set(xlabel="predicted", ylabel="true", title="Who is taken for whom")
ax.grid(False)
for ax, i in zip(right.subplots(2, 4).ravel(), (guesses != labels).nonzero()[:8, 0].tolist(), strict=True):
    plot.show_image(ax, images[i].cpu())
    ax.set_title(f"{test_set.classes[labels[i]]},\nnot {test_set.classes[guesses[i]]}", fontsize=8)
plt.show()

# %% [markdown]
# ## 7 What matters? The sweeps
#
# One run is an anecdote. The comparisons below were made beforehand by `benchmarks/lesson_vit.py`: the same small ViT, 500 steps
# of 100 images each, **three seeds** a point. Lines and bars are means, bands and dots show the seeds. A comparison is worth no
# more than the settings of its loser, so `benchmarks/lesson_tuning.py` searched for the best rate and decay of some that lost. Where
# the text names no search, all share AdamW's rate of 0.003 and decay of 0.05.

# %%
results = json.loads((paths.results_dir() / "lesson_vit.json").read_text(encoding="utf-8"))
print(f"measured on {results['device']}, {results['date'][:10]}, torch {results['versions']['torch']}")


def runs(name, key="accuracy"):
    """One number a seed, in per cent if it is an accuracy."""
    factor = 100 if key == "accuracy" else 1
    return [factor * row[key] for row in results["rows"] if row["name"] == name]


# %% [markdown]
# **Patch size.** Smaller patches mean more tokens: finer detail, and a longer sequence to pay for. Which is best?

# %%
# alt: Three panels over the patch sizes 14, 7 and 4 pixels: the sequence length grows from 5 to 17 to 50 tokens, the time of a
# training step grows with it, and the accuracy on unseen images falls by three points from 14 to 7
# pixels;<!--? 2.5 < percent(lesson_vit, name="patch 14") - percent(lesson_vit, name="base") < 3.5 --> 7 and 4 are level within their
# seeds.<!--? abs(percent(lesson_vit, name="base") - percent(lesson_vit, name="patch 4")) < 1.3 -->
patches = {14: "patch 14", 7: "base", 4: "patch 4"}
step_ms = next(row for row in results["rows"] if row["name"] == "step seconds")
step_ms = [1e3 * step_ms[key] for key in ("vit, patch 14", "vit", "vit, patch 4")]
fig, (left, middle, right) = plot.panels(1, 3, width=3.2, height=3.0)
names = [f"{p} px" for p in patches]
left.bar(names, [runs(name, "tokens")[0] for name in patches.values()], color=plot.SKY)
left.set(title="tokens, with [CLS]", xlabel="patch size")
middle.bar(names, step_ms, color=plot.ORANGE)
middle.set(title="ms a step of 100 images", xlabel="patch size")
plot.spread(right, range(3), [runs(name) for name in patches.values()], color=plot.BLUE)
right.set_xticks(range(3), names)
right.set(title="accuracy, %", xlabel="patch size")
plt.show()

# %% [markdown]
# In a run this short the *largest* patches win, in a fraction of the time (at one rate for all, 0.003, which was chosen for 7
# pixels). A guess at the reason: with 4 patches there is little to find out about who should look at whom, and most of the work
# is done by the embedding, almost an ordinary network; with 49 the same 500 steps have to teach attention as well. The shipped
# model has 4-pixel patches and is far better than any run shown here. But it also has a convolutional stem,
# 6<!--= 60_000 / mean(lesson_vit, "images", name="base") --> times the images, CutMix and 32 passes; which of these did it, the comparison cannot say.
#
# **Optimizer.** SGD with momentum, the standard for convolutional networks, against AdamW. Every optimizer looks bad at the wrong
# settings. So each got its own: three learning rates times four decays, and one more rate where the best lay at an end; each
# combination was trained once, on 8 000 of the images, and judged by the other 2 000. The best of each then met the test images,
# by which nothing had been chosen. (Decay is decoupled in both: each step takes rate · decay of a weight away.)

# %%
# alt: Left and middle: accuracy on held-out images against the learning rate, one line for each decay. For AdamW, from 0.001 to
# 0.01, the lines lie between 78 and 82 per
# cent<!--? all(0.775 < row["accuracy"] < 0.825 for row in lesson_tuning["rows"]
#     if (row["name"], row["stage"]) == ("AdamW", "tune") and 1e-3 <= row["lr"] <= 1e-2) --> and most are
# highest at 0.001 or 0.003. For SGD they are level at 80 to 81 per cent from 0.03 to
# 0.3<!--? all(0.795 < row["accuracy"] < 0.815 for row in lesson_tuning["rows"]
#     if (row["name"], row["stage"]) == ("SGD", "tune") and 0.03 <= row["lr"] <= 0.3) --> and fall steeply at 1. Right: accuracy on test images, both at their best, a dot for each of three seeds: the means
# are half a point
# apart,<!--? 0.3 < percent(lesson_tuning, name="AdamW", stage="test") - percent(lesson_tuning, name="SGD", stage="test") < 0.7 --> and
# the dots overlap.
tuning = json.loads((paths.results_dir() / "lesson_tuning.json").read_text(encoding="utf-8"))
print(f"measured on {tuning['device']}, {tuning['date']}, torch {tuning['versions']['torch']}")


def tried(name, stage):
    return [row for row in tuning["rows"] if (row["name"], row["stage"]) == (name, stage)]


fig, axes = plot.panels(1, 3, width=3.5, height=3.1)
for ax, name in zip(axes, ("AdamW", "SGD"), strict=False):
    for decay in sorted({row["weight_decay"] for row in tried(name, "tune")}):
        line = sorted((row["lr"], 100 * row["accuracy"]) for row in tried(name, "tune") if row["weight_decay"] == decay)
        ax.plot(*zip(*line, strict=True), "o-", label=f"decay {decay:g}")
    ax.set(xscale="log", xlabel="learning rate", title=f"{name}, one seed")
    rates = sorted({row["lr"] for row in tried(name, "tune")})
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    ax.legend(loc="lower left", fontsize=9)
axes[0].set_ylabel("accuracy, %, images held out")
tested = {name: [100 * row["accuracy"] for row in tried(name, "test")] for name in ("AdamW", "SGD")}
for i, values in enumerate(tested.values()):
    axes[2].plot([i] * len(values), values, "o", color=plot.BLUE)
    axes[2].annotate(f"mean {sum(values) / 3:.1f}", (i, min(values)), (0, -18), textcoords="offset points", ha="center")
axes[2].set_xticks(range(2), tested)
axes[2].set(xlim=(-0.7, 1.7), ylabel="accuracy, %, test images", title="each at its best, three seeds")
for ax in axes:
    ax.set_ylim(62, 84)
plt.show()
lead = sum(tested["AdamW"]) / 3 - sum(tested["SGD"]) / 3
expect("AdamW's lead over SGD, each at its own best rate and decay, in points", lead, close_to=0.0, tol=2.0)

# %% [markdown]
# **Nobody wins by a margin.** Each with its own best rate and decay, AdamW has
# 80.9<!--= percent(lesson_tuning, name="AdamW", stage="test") --> % and SGD
# 80.3<!--= percent(lesson_tuning, name="SGD", stage="test") --> %, and AdamW's seeds alone lie
# 1.3<!--= 100 * (max(values(lesson_tuning, name="AdamW", stage="test")) - min(values(lesson_tuning, name="AdamW", stage="test"))) -->
# points apart. What differs is the numbers: SGD's best rate is some thirty times
# AdamW's.<!--? 25 < mean(lesson_tuning, "lr", name="SGD", stage="test") / mean(lesson_tuning, "lr", name="AdamW", stage="test") < 40 --> (At a good rate the decay hardly
# matters in so short a run, unless it is far too strong.) Whoever changes the optimizer and keeps the rate has compared nothing.
#
# That is 500 steps of four blocks, with clipped gradients: an easy case. On ImageNet, Xiao et al. 2021 report that a plain ViT
# loses much with SGD, and hardly anything behind a convolutional stem (lesson 02). And the recipes that you will start from are
# written for AdamW.
#
# **Warm-up**, at the best rate and at one that is too high:

# %%
# alt: Bars of AdamW's accuracy with three seeds each: at the rate 0.003 with and without warm-up the same,
# 81<!--= percent(lesson_vit, name="base") --><!--? round(percent(lesson_vit, name="adamw lr 0.003, no warm-up")) == 81 --> per cent;
# at 0.01 it is lower, 79<!--= percent(lesson_vit, name="adamw lr 0.01") --> per cent with the warm-up and
# 78<!--= percent(lesson_vit, name="adamw lr 0.01, no warm-up") --> without.
fig, (ax,) = plot.panels(1, 1, width=6.2, height=2.4)
started = {
    "lr 0.003, warm-up": "base",
    "lr 0.003, none": "adamw lr 0.003, no warm-up",
    "lr 0.01, warm-up": "adamw lr 0.01",
    "lr 0.01, none": "adamw lr 0.01, no warm-up",
}
plot.bars(ax, {label: runs(name) for label, name in started.items()})
ax.set(xlabel="accuracy, %", title="AdamW, three seeds", xlim=(0, 100))
plt.show()
lost = [cold - warm for cold, warm in zip(runs(started["lr 0.01, none"]), runs("adamw lr 0.01"), strict=True)]
expect("points that the warm-up is worth at the high rate, least of the seeds", -max(lost), at_least=0.5)

# %% [markdown]
# The warm-up makes no measurable difference at the best rate: four pre-norm blocks are easy to start. At a rate that is too high it
# is worth between one and two points, on every
# seed.<!--? all(0.95 < 100 * (warm - cold) < 2.05 for warm, cold in zip(
#     values(lesson_vit, name="adamw lr 0.01"), values(lesson_vit, name="adamw lr 0.01, no warm-up"))) --> It makes the choice of the rate less delicate; in deep models and at large
# batches, where the edge is nearer, it becomes indispensable.
#
# **Batch size.** Somebody has a larger GPU, raises the batch and leaves the rest as it is. The same number of images then makes
# fewer steps, and each step should be longer. For Adam the square root of the factor is the usual guess.

# %%
# alt: Bars of accuracy: batches of 100 in 500 steps are best, batches of 500 in 100 steps at the same learning rate are far
# behind, and raising the rate by the square root of five wins back a part of the loss.
fig, (ax,) = plot.panels(1, 1, width=6.2, height=2.2)
batches = {
    "100 images, lr 0.003": "base",
    "500 images, lr 0.003": "batch 500",
    "500 images, lr 0.007": "batch 500, lr 0.007",
}
plot.bars(ax, {label: runs(name) for label, name in batches.items()})
ax.set(xlabel="accuracy, %", title="50 000 images in batches of …")
plt.show()

# %% [markdown]
# **Augmentation, and data.** Left: does augmentation help? 500 steps are five passes over 10 000 images, but 25 over 2 000.
# Right: ViT against the convolutional network at **equal training time**, with fewer and with more images.

# %%
# alt: Left: bars of accuracy with 10 000 and with 2 000 training images, without augmentation, with flips and crops, and, for
# 2 000, with strong augmentation: each time the bar without augmentation is the longest. Right: accuracy against the number of
# training images, 500, 2 000 and 10 000: the convolutional network lies above the ViT everywhere.
fig, (left, right) = plot.panels(1, 2, width=5.0, height=3.8)
augmented = {
    "10 000 images": "base",
    "… flips and crops": "10000 images, flips and crops",
    "2 000 images": "2000 images",
    "… flips, crops": "2000 images, flips and crops",
    "… strong": "2000 images, strong augmentation",
}
plot.bars(left, {label: runs(name) for label, name in augmented.items()})
left.set(xlabel="accuracy, %", title="augmentation")
sizes = [500, 2000, 10000]
plot.spread(right, sizes, [runs(f"cnn, {n} images, equal time") for n in sizes], label="CNN", color=plot.ORANGE)
plot.spread(right, sizes, [runs("500 images"), runs("2000 images"), runs("base")], label="ViT", color=plot.BLUE)
right.set_xscale("log")
right.set_xticks(sizes, [f"{n:,d}" for n in sizes])
right.minorticks_off()
right.set(xlabel="training images", ylabel="accuracy, %", title="equal training time")
right.legend()
plt.show()
lead = {
    n: sum(runs(f"cnn, {n} images, equal time")) / 3 - sum(runs(vit)) / 3
    for n, vit in [(500, "500 images"), (10000, "base")]
}
expect("the CNN's lead with 500 images, in points", lead[500], at_least=3.0)
expect("how much larger it is than with 10 000 images, in points", lead[500] - lead[10000], at_least=2.0)

# %% [markdown]
# Augmentation *costs* accuracy here. With 10 000 images the model never gets to know its pictures by heart, so there is nothing to
# mend. With 2 000 it does: the training loss of the plain runs ends at
# 0.02<!--= mean(lesson_vit, "train_loss", name="2000 images") -->. But with flips and crops it still stands at
# 0.6<!--= mean(lesson_vit, "train_loss", name="2000 images, flips and crops") -->, so
# those runs are far from finished: a harder task takes more steps. Do not copy a recipe for 300 epochs into a run of five.
#
# And a ViT pays for its freedom with data: the fewer images, the larger the lead of the convolutional network. (This is not a
# matter of the rate. With 500 images, the best one for the ViT is
# 0.001<!--= mean(lesson_tuning, "lr", name="500 images", stage="test") -->, for the CNN
# 0.01<!--= mean(lesson_tuning, "lr", name="cnn, 500 images, equal time", stage="test") -->, and they reach
# 69.0<!--= percent(lesson_tuning, name="500 images", stage="test") --> % and
# 76.8<!--= percent(lesson_tuning, name="cnn, 500 images, equal time", stage="test") --> %, where the plot, at 0.003, has
# 69.1<!--= percent(lesson_vit, name="500 images") --> and
# 76.4<!--= percent(lesson_vit, name="cnn, 500 images, equal time") -->.) There are three ways out, and each is a part of this
# course: give the structure back (01 hierarchical, 02 hybrid), or let it learn structure from images without labels (03
# pre-training), or start from a model that somebody else trained (04 fine-tuning).
#
# ## 8 Another resolution
#
# The learnt position table fits one grid. Fine-tuning at a higher resolution, or a photo that is not square, needs another:
# the table is treated as a small image with $D$ channels and resized. Three mistakes are made all the time: stretching the
# *sequence* instead of the *grid*, aligning corners, and resizing [CLS] along.
#
# ### Exercise 8 · `resize_pos_embed`
# *Difficulty 3 of 5, about 20 minutes.* Use `F.interpolate(..., mode="bicubic", antialias=True)`, which is what production
# models are used with.


# %%
@exercise("vit.resize_pos_embed")
def resize_pos_embed(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    """(1, prefix + h · w, D) -> (1, prefix + h' · w', D), for old_grid = (h, w) and new_grid = (h', w')."""
    # <solution>
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    image = rearrange(patches, "1 (h w) d -> 1 d h w", h=old_grid[0])
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return torch.cat([prefix, rearrange(image, "1 d h w -> 1 (h w) d")], dim=1)
    # </solution>


# %% [markdown]
# How much does it matter? The shipped model was trained on 28 × 28 pixels, 7 × 7 patches. Below it reads the same clothes
# enlarged to 40 × 40, with no further training, and with the positions brought to 10 × 10 in four ways. Beside it, the other
# classic: pretrained weights fed with images that were **normalised differently** from those they were trained on.


# %%
def table(grid, mode):
    """The shipped model's positions for a larger grid, rightly and wrongly."""
    pos, new = shipped.pos_embed.detach(), (grid, grid)
    if mode == "bicubic":
        return resize_pos_embed(pos, (7, 7), new, 1)
    if mode == "sequence":
        stretched = F.interpolate(pos[:, 1:].transpose(1, 2), size=grid * grid, mode="linear").transpose(1, 2)
    else:
        image = rearrange(pos[:, 1:], "1 (h w) d -> 1 d h w", h=7)
        options = {"mode": "bicubic", "align_corners": True} if mode == "align_corners" else {"mode": "nearest"}
        stretched = rearrange(F.interpolate(image, size=new, **options), "1 d h w -> 1 (h w) d")
    return torch.cat([pos[:, :1], stretched], dim=1)


@torch.no_grad()
def accuracy(model, images, labels):
    return (torch.cat([model(x) for x in images.split(250)]).argmax(1).cpu() == labels).float().mean().item()


few = subset(open_dataset("fashion_mnist_subset", "test"), 500)
pixels = torch.stack([image.float() / 255 for image, _ in few]).to(device)
truth = torch.tensor(few.targets)
mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (shipped.preprocess.mean, shipped.preprocess.std))
normal = (pixels - mean) / std
native = accuracy(shipped, normal, truth)

large = F.interpolate(normal, size=(40, 40), mode="bilinear", antialias=True)
resized = {}
for mode in ("bicubic", "align_corners", "nearest", "sequence"):
    model = vitcourse.create_model(shipped.name, **{**shipped.model_args, "img_size": 40}).eval().to(device)
    model.load_state_dict({**shipped.state_dict(), "pos_embed": table(10, mode)})
    resized[mode] = accuracy(model, large, truth)
fed = {
    "as in training": native,
    "never normalised (0 … 1)": accuracy(shipped, pixels, truth),
    "ImageNet's mean and std": accuracy(shipped, (pixels - 0.449) / 0.226, truth),
    "left at 0 … 255": accuracy(shipped, 255 * pixels, truth),
}

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Left: accuracy of the shipped model at its own size, and on enlarged images by the way its positions were resized: at its
# own size it is best; bicubic on the grid, corners aligned or not, follows, then nearest, and stretching the sequence is far
# below. Right: accuracy on images of the native size, normalised in four ways: as in
# training is best, and 0 to 255 is worst.
fig, (left, right) = plot.panels(1, 2, width=4.9, height=2.8)
plot.bars(left, {"native, 28 × 28": [100 * native], **{name: [100 * v] for name, v in resized.items()}})
left.set(xlabel="accuracy, %", title="40 × 40 pixels, positions resized by …", xlim=(0, 110))
plot.bars(right, {k: [100 * v] for k, v in fed.items()})
right.set(xlabel="accuracy, %", title="28 × 28 pixels, normalised …", xlim=(0, 110))
plt.show()

# %%
expect("accuracy of the shipped model at its own size", native, at_least=0.91)
expect("bicubic's lead over stretching the sequence", resized["bicubic"] - resized["sequence"], at_least=0.05)
expect("bicubic's lead over nearest", resized["bicubic"] - resized["nearest"], at_least=0.01)
expect("what aligning the corners changes", resized["align_corners"] - resized["bicubic"], close_to=0.0, tol=0.03)
expect("loss of the right way against its own size", native - resized["bicubic"], at_least=0.02)
expect("loss of accuracy when images are left at 0 … 255", native - fed["left at 0 … 255"], at_least=0.1)

# %% [markdown]
# Stretching the sequence is a disaster, and nearest costs more than bicubic. Aligning the corners makes no measurable difference
# here. And even the right way loses accuracy: the model has never seen clothes of this size.
#
# None of these mistakes raises an error. That is why, in this library, mean, std and size travel with the weights as
# `model.preprocess`, and why positions are resized inside the model.
#
# ## 9 When would you choose it?
#
# | | a plain ViT | a convolutional network |
# | --- | --- | --- |
# | few images, no pre-trained weights | needs strong augmentation and patience | **better** (section 7) |
# | a good pre-trained checkpoint exists | **at least as good**, and it transfers to nearly anything | good |
# | large images | $N^2$: needs lessons 01 or 05 | **cost grows with the area** |
# | dense outputs (masks, boxes) | one resolution only; see lessons 01 and 07 | **a pyramid comes for free** |
# | several kinds of input (text, sound) | **the same block reads them all** (lesson 12) | images only |
# | masked pre-training | **tokens can simply be left out** (lesson 03) | awkward |
# | looking inside | attention maps, as above (lesson 09) | gradients |
#
# ## Stretch problems
#
# 1. Replace the learnt positions of your model by your `sincos_2d`. Is it better after one epoch? After five?
# 2. Read the classifier from the mean of the patches instead of [CLS]. Which one wins in 500 steps, and is the difference
#    larger than that between two seeds?
# 3. Train without any positions. How much accuracy does a bag of patches keep, and on which classes does it lose most?
# 4. Write `Attention` with a query for [CLS] only, as the last block needs no other. What do you save?
# 5. Patches of 14 pixels win after 500 steps. After how many do those of 7 overtake them, if they do?
# 6. Train with `torch.optim.SGD(…, lr=0.1, momentum=0.9, weight_decay=0.05)` in a loop of your own, and with
#    `TrainConfig(optimizer="sgd", lr=0.1, weight_decay=0.05)`. Why is the first so much worse? Which decay makes them alike?
# 7. `VITCOURSE_PROFILE=full`: train on CIFAR-10. Then run the recipe in `vitcourse/recipes/` made for it, and find out which
#    of its parts matters most.
#
# ## Papers
#
# * Vaswani et al. 2017, [Attention Is All You Need](https://arxiv.org/abs/1706.03762): attention, heads, why √d.
# * Dosovitskiy et al. 2021, [An Image is Worth 16x16 Words](https://arxiv.org/abs/2010.11929): ViT.
# * Touvron et al. 2021, [Training data-efficient image transformers](https://arxiv.org/abs/2012.12877): DeiT, the recipe.
# * Dong et al. 2021, [Attention is not all you need](https://arxiv.org/abs/2103.03404): without residual paths, rank collapses.
# * Xiong et al. 2020, [On Layer Normalization in the Transformer Architecture](https://arxiv.org/abs/2002.04745): pre- or post-norm.
# * Steiner et al. 2022, [How to train your ViT?](https://arxiv.org/abs/2106.10270): data, augmentation, regularisation.
# * Loshchilov and Hutter 2019, [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101): AdamW, and SGD's twin.
# * Xiao et al. 2021, [Early Convolutions Help Transformers See Better](https://arxiv.org/abs/2106.14881): what the stem does for SGD.
# * Beyer et al. 2022, [Better plain ViT baselines for ImageNet-1k](https://arxiv.org/abs/2205.01580): mean pooling, fixed positions.
# * Darcet et al. 2024, [Vision Transformers Need Registers](https://arxiv.org/abs/2309.16588): the extra tokens.
