# %% [markdown]
# # 03 · Pre-training: learning without labels
#
# *Hide a part of the picture, or show it twice. What a model must know to answer is worth keeping.*
#
# **You will build** the core of four ways to train a ViT on pictures that nobody has labelled: MAE's masking, targets and decoder,
# MoCo v3's contrast and its momentum encoder, LeJEPA's test for a Gaussian, BEiT's discrete words. And the numbers that tell
# learning from collapse while it happens. Each runs in this notebook, for a few steps, on your own parts.
#
# **Why anybody needs it.** Pictures cost nothing, labels cost a person's time. A ViT that is trained from the start needs very many of
# them (lesson 00), and most problems have few. So nearly every ViT in use was trained on something else first. What that should be,
# and what it is worth on *your* pictures, is what this lesson measures.
#
# Exercises work as in lesson 00: replace `raise TODO`, run the cell. What you leave blank, the course fills in.

# %%
import copy
import json
import math
import random
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

import vitcourse
from vitcourse import course, paths, plot, pretraining
from vitcourse.course import TODO, exercise, expect, hint, last_attempt
from vitcourse.data import open_dataset, photo, subset
from vitcourse.pretraining import MaeOptions, MocoOptions, View, extract_features, knn_accuracy
from vitcourse.pretraining.lejepa import GaussianEmbedding, gaussian_level, quadrature, random_directions
from vitcourse.pretraining.mae import MaskedAutoencoding, Shuffle, masked_error, take
from vitcourse.pretraining.moco import view_pair
from vitcourse.train import TrainConfig, fit
from vitcourse.vit import Block, image_to_patch, sincos_2d

session = course.setup()
device = session.device

# %% [markdown]
# ## 0 What labels cost
#
# The same small ViT (half a million parameters, 49 patches of 4 pixels) from the start, twice, with the same number of steps on
# pictures of clothing. Once it is given ten labelled pictures of each class, which it sees again and again, once two hundred.

# %%
# NBVAL_IGNORE_OUTPUT
ENCODER = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 96, "depth": 4, "num_heads": 4}
ENCODER |= {"pos_embed": "sincos", "class_token": False, "global_pool": "avg"}
STARTS = ("random", "supervised", "moco", "beit", "mae", "lejepa")
clothing, unseen = (open_dataset("fashion_mnist_subset", split) for split in ("train", "test"))
judges = subset(unseen, 500)


def fresh_encoder(seed=0, **changes):
    torch.manual_seed(seed)
    return vitcourse.create_model("vit_tiny", **{**ENCODER, "num_classes": 0, **changes}).to(device)


few_labels = {}
for count in (100, 2000):
    recipe = TrainConfig(
        epochs=100, max_steps=100, batch_size=50, lr=1e-3, warmup=0.1, hflip=True, label_smoothing=0.0, eval_every=100
    )
    history = fit(fresh_encoder(num_classes=10), subset(clothing, count), judges, recipe, progress=False)
    few_labels[count] = history[-1]["val_accuracy"]
    print(f"{count:5d} labels: {100 * few_labels[count]:.1f} % of unseen pictures")

# %%
expect("points that more labels bring", 100 * (few_labels[2000] - few_labels[100]), at_least=5.0)

# %% [markdown]
# That is the price in one seed and a hundred steps. `benchmarks/lesson_pretraining.py` has trained longer, with three seeds, from a
# hundred labels to ten thousand, each time at the rate that did best on held-out pictures:

# %%
# alt: Accuracy on unseen pictures against the number of labels, from 100 to 10 000 on a logarithmic axis, with the range over three
# seeds: a curve that rises all the way, and is steepest where labels are fewest.
results = json.loads((paths.results_dir() / "lesson_pretraining.json").read_text(encoding="utf-8"))
print(f"measured on {results['device']}, {results['date']}, torch {results['versions']['torch']}")


def runs(key="accuracy", **where):
    """One number a seed, times 100: shares in per cent."""
    return [100 * row[key] for row in results["rows"] if where.items() <= row.items()]


LABELS = (100, 300, 1000, 3000, 10000)
fig, (ax,) = plot.panels(1, 1, width=5.6, height=3.2)
plot.spread(ax, LABELS, [runs(part="labels", images=n) for n in LABELS])
ax.set(xscale="log", xlabel="labelled pictures", ylabel="accuracy, %", title="from scratch, three seeds")
ax.set_xticks(LABELS, [f"{n:,d}" for n in LABELS])
ax.minorticks_off()
plt.show()

# %%
means = [np.mean(runs(part="labels", images=n)) for n in LABELS]
expect("points from 100 to 10 000 labels", means[-1] - means[0], at_least=10.0)

# %% [markdown]
# Everything below tries to start further up on that curve, at its left end. A **pretext task** makes its own answers: the pixels that
# were hidden, or which two crops were cut from one picture. Nobody wants the answers. What is kept is the **encoder** that had to
# give them.
#
# There are two families, and a question that decides between them: *is it enough to predict, or must one also prevent the model from
# cheating?* Masked models (MAE, BEiT) predict something fixed, and cannot cheat by saying the same of all pictures. Joint-embedding
# models (MoCo, LeJEPA) compare two outputs of their own, and can: if all embeddings are equal, they agree perfectly.
#
# ## 1 MAE: hide three quarters, paint them
#
# Cut the picture into patches, throw most of them away, and let the **encoder** see the rest only. A small **decoder** gets the
# encoder's tokens, and a learnt *mask token* at each place that was hidden, and paints the pixels (He et al. 2022). Two decisions make
# it work:
#
# * **Hide a lot**, 75 %.<!--~ paper --> Language is dense: hide one word of seven, and guessing it is hard. Pictures are redundant: of one hidden
#   patch its neighbours tell nearly all. Only where few are left does one need to know what the thing is.
# * **Do not even feed the encoder what is hidden.** BERT puts a mask token there. MAE leaves it out, so that the sequence is a quarter
#   as long, and the large part of the model is paid for the visible patches only.
#
# How does one keep a random quarter, in one operation for a whole batch, and find the way back? Draw a number for each patch and *sort*.
# The first $V$ of the order stay. The place of each patch in that order is the way back: the inverse of a permutation is the
# permutation that sorts it.
#
# ### Exercise 1 · `random_masking`
# *Difficulty 2 of 5, about 10 minutes.* Three lines; every masked model that drops tokens has them.
#
# Return three tensors: `keep` (B, V), the numbers of the patches with the least noise, in ascending order of their noise; `restore` (B, N),
# the place of each patch in that order; `mask` (B, N), True where a patch is hidden.


# %%
@exercise("pretraining.random_masking")
def random_masking(noise, visible):
    """(B, N), a number -> keep (B, visible), restore (B, N), mask (B, N)."""
    # <solution>
    order = noise.argsort(dim=1, stable=True)
    restore = order.argsort(dim=1)
    return Shuffle(order[:, :visible], restore, restore >= visible)
    # </solution>


# %%
# alt: A pullover, and the same with a quarter, a half, three quarters and nine tenths of its 49 patches hidden in grey. At three quarters
# the outline can still be guessed, at nine tenths hardly.
torch.manual_seed(0)
pullover = next(image for image, label in unseen if label == 2).float() / 255
noise = torch.rand(1, 49)
fig, axes = plot.panels(1, 5, width=1.9, height=2.2)
plot.show_image(axes[0], pullover, "49 patches")
plot.draw_grid(axes[0], (28, 28), 4)
for ax, ratio in zip(axes[1:], (0.25, 0.5, 0.75, 0.9), strict=True):
    keep, _, mask = random_masking(noise, int(49 * (1 - ratio)))
    hidden = repeat(mask.view(7, 7), "h w -> (h p) (w q)", p=4, q=4)
    plot.show_image(ax, torch.where(hidden, 0.5, pullover[0]), f"{keep.shape[1]} are seen", vmin=0, vmax=1)
plt.show()

# %% [markdown]
# ### What is to be painted?
#
# The pixels, by their squared error. Which patches count? Only the hidden ones: those that are seen need no model. But a bright patch
# differs from a dark one mostly by its mean, which its neighbours give away, and a flat patch has hardly any error. So MAE predicts
# each patch *normalised by itself*: minus its mean, over its standard deviation. What is left is its structure.
#
# $$ t = \frac{x - \mu_\text{patch}}{\sqrt{\sigma^2_\text{patch} + 10^{-6}}} $$
#
# ### Exercise 2 · `patch_targets`
# *Difficulty 2 of 5, about 5 minutes.* The sum decides what the encoder learns. With it the authors' ViT-L is better, with and without
# fine-tuning.<!--~ paper -->
#
# `image_to_patch` is yours from lesson 00. The variance is the unbiased one, PyTorch's default, as in the authors' code.


# %%
@exercise("pretraining.patch_targets")
def patch_targets(images, patch_size, norm_pix=True):
    """(B, C, H, W) -> (B, N, p * p * C), each patch with mean 0 and variance 1 if `norm_pix`."""
    # <solution>
    target = image_to_patch(images, patch_size)
    if not norm_pix:
        return target
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    return (target - mean) / (var + 1e-6).sqrt()
    # </solution>


# %% [markdown]
# What would somebody pay who has learnt nothing? Who always says the mean, 0, has the variance left: about 1 for normalised patches. That
# is the **chance level**. Keep one for each loss that you read: "my loss is 0.9, is that good?" has no answer without it. But look at
# *your* pictures first:

# %%
pictures = torch.stack([image for image, _ in judges]).float() / 255
normal, plain = patch_targets(pictures, 4), patch_targets(pictures, 4, norm_pix=False)
flat = (plain.var(-1) < 1e-6).float().mean().item()
print(f"patches of one colour: {100 * flat:.1f} %")
print(f"chance level: {normal.square().mean():.3f} normalised, {(plain - plain.mean()).square().mean():.3f} plain")

# %% [markdown]
# A good part of these patches is black background, whose normalised target is 0, and on its border the normalisation makes faint noise as
# large as a sleeve. The recipe for clothing therefore takes plain pixels. What was chosen for photographs is no law (section 9 measures
# it).
#
# ### Exercise 3 · `Decoder`
# *Difficulty 3 of 5, about 15 minutes.* The way back: each token to its place again, a mask token where nothing was seen.
#
# Everything is made already. In order: `embed` the tokens; set the prefix tokens ([CLS], if there is one) aside; append as many mask tokens
# as there are hidden patches; un-shuffle with `restore` (`take(tokens, index)` is a `gather`); put the prefix in front again; add
# the positions; the blocks; `norm` and `head`, of the patches only.
#
# The positions come *after* the un-shuffling, and the mask tokens get them, too. Without them all mask tokens are the same vector,
# and attention cannot tell one hidden place from another.


# %%
@exercise("pretraining.Decoder")
class Decoder(nn.Module):
    """Tokens of what was seen (B, prefix + V, D) and `restore` (B, N) -> predictions for all patches (B, N, out_dim)."""

    def __init__(self, in_dim, out_dim, grid_size, num_prefix_tokens=1, embed_dim=512, depth=8, num_heads=16):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = torch.cat([torch.zeros(num_prefix_tokens, embed_dim), sincos_2d(*grid_size, embed_dim)])
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, out_dim)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x, restore):
        # <solution>
        x = self.embed(x)
        prefix, seen = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        hidden = self.mask_token.expand(len(x), restore.shape[1] - seen.shape[1], -1)
        patches = take(torch.cat([seen, hidden], dim=1), restore)
        x = torch.cat([prefix, patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, self.num_prefix_tokens :])
        # </solution>


# %% [markdown]
# ### Assembled
#
# The three make an MAE. What is left is short enough to read: patches and positions first, **then** leave out what is hidden, so that each
# token that stays still knows where it was.


# %%
class MAE(pretraining.MaskedAutoencoder):
    """The library's, with your masking, your targets and your decoder."""

    def __init__(self, encoder, mask_ratio=0.75, norm_pix=False, decoder_dim=64):
        super().__init__(encoder, mask_ratio, norm_pix, decoder_dim, decoder_depth=1, decoder_heads=4)
        pixels = encoder.patch_size[0] * encoder.patch_size[1] * encoder.in_chans
        self.decoder = Decoder(
            encoder.embed_dim, pixels, encoder.grid_size, encoder.num_prefix_tokens, decoder_dim, depth=1, num_heads=4
        )

    def forward(self, images, noise):
        keep, restore, mask = random_masking(noise, self.visible)
        tokens, _ = self.encoder.embed(images)  # (B, N, D), with positions
        tokens = self.encoder.forward_tokens(take(tokens, keep), None)  # (B, V, D): no other enters a block
        return self.decoder(self.encoder.fc_norm(tokens), restore), mask

    def targets(self, images):
        return patch_targets(images, self.encoder.patch_size, self.norm_pix)


mine = MAE(fresh_encoder()).to(device).eval()
theirs = pretraining.MaskedAutoencoder(fresh_encoder(1), 0.75, False, 64, 1, 4).to(device).eval()
for parameter in theirs.parameters():  # all of them random, or whole heads are zero and hide mistakes
    nn.init.normal_(parameter, std=0.2) if parameter.requires_grad else None
print(mine.load_state_dict(theirs.state_dict()))
x, noise = pictures[:8].to(device), torch.rand(8, 49, device=device)
with torch.no_grad():
    (ours, mask), (expected, _) = mine(x, noise), theirs(x, noise)
expect("spread of the predictions", expected.std(), at_least=0.05)
expect("relative difference from the library's", (ours - expected).abs().max() / expected.abs().max(), at_most=1e-4)

# %% [markdown]
# The library's own predictions and loss equal those of `transformers`' `ViTMAEForPreTraining`, given the same noise; a test holds
# that. (If you port weights: LayerNorm's epsilon is $10^{-12}$ there, and its ViT has [CLS].)
#
# **Is the encoder really shorter?** Multiply–adds can be counted, time is measured, both for encoder and decoder:

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Bars of the milliseconds of one step of training, for mask ratios 0, 0.5, 0.75 and 0.9, encoder and decoder one upon the other. The
# encoder's part shrinks with what is seen; the decoder's stays.
from torch.utils.flop_counter import FlopCounterMode


def milliseconds(work, repeats=7):
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    return sorted(taken)[repeats // 2]


encoder, decoder = mine.encoder.train(), mine.decoder.train()
tokens, _ = encoder.embed(pictures[:64].to(device))
tokens = tokens.detach()
print("seen   encoder MMACs   encoder ms   decoder ms")
cost = {}
for seen in (49, 24, 12, 4):
    shuffle = random_masking(torch.rand(64, 49, device=device), seen)
    part = take(tokens, shuffle.keep)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        encoder.forward_tokens(part[:1], None)
    out = encoder.forward_tokens(part, None).detach()
    cost[seen] = (
        flops.get_total_flops() / 2e6,
        milliseconds(lambda part=part: encoder.forward_tokens(part, None).sum().backward()),
        milliseconds(lambda out=out, back=shuffle.restore: decoder(out, back).sum().backward()),
    )
    print(f"{seen:4d} {cost[seen][0]:15.2f} {cost[seen][1]:12.1f} {cost[seen][2]:12.1f}")
fig, (ax,) = plot.panels(1, 1, width=5.6, height=2.6)
names = [f"{seen} of 49 seen" for seen in cost]
ax.barh(names, [c[1] for c in cost.values()], color=plot.COLOURS[0], label="encoder")
ax.barh(
    names, [c[2] for c in cost.values()], left=[c[1] for c in cost.values()], color=plot.COLOURS[1], label="decoder"
)
ax.invert_yaxis()
ax.set(xlabel="milliseconds for 64 pictures, forward and backward")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
expect("multiply–adds of the encoder, 12 of 49 seen over all", cost[12][0] / cost[49][0], at_most=0.26)

# %% [markdown]
# ### Watch it paint
#
# Now train yours, in the course's `fit`: a `Task` says what the inputs and the loss are (`vitcourse/pretraining/mae.py`, sixty lines), and
# the loop is the one that trained the classifiers. The same picture, with the same patches hidden, is looked at on the way.

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Four pieces of clothing in four rows: the picture, what is seen of it, and what the model paints before training, after one, three
# and six passes. Grey mush at first, then a blurred shape of the right kind, then edges.
study = subset(clothing, 2000 if session.quick else 10000)
samples = torch.stack([next(image for image, label in unseen if label == kind) for kind in (0, 3, 7, 9)])
mean, std = study.dataset.mean[0], study.dataset.std[0]
samples = ((samples.float() / 255 - mean) / std).to(device)
fixed_noise = torch.rand(4, 49, generator=torch.Generator().manual_seed(3)).to(device)
mae, task = MAE(fresh_encoder()).to(device), MaskedAutoencoding(MaeOptions(norm_pix=False, min_crop=1.0))
painted = {0: mae.reconstruct(samples, fixed_noise)[0]}


def look(row):
    if row["epoch"] in (1, 3, 6):
        painted[row["epoch"]] = mae.reconstruct(samples, fixed_noise)[0]


recipe = TrainConfig(epochs=6, batch_size=50, lr=2e-3, warmup=0.1, beta2=0.95, hflip=True)
history = fit(mae, study, None, recipe, task=task, on_epoch_end=look, progress=False)
hidden = mae.reconstruct(samples, fixed_noise)[1]
fig, axes = plot.panels(4, 2 + len(painted), width=1.5, height=1.6)
for i, row in enumerate(axes.reshape(4, -1)):
    shown = {"picture": samples[i], "seen": torch.where(hidden[i], 0.0, samples[i])}
    shown |= {f"{epoch} passes": image[i] for epoch, image in painted.items()}
    for ax, (title, image) in zip(row, shown.items(), strict=True):
        plot.show_image(ax, image.cpu(), title if i == 0 else "", vmin=-mean / std, vmax=(1 - mean) / std)
plt.show()
for row in history:
    print(f"pass {row['epoch']}: loss {row['train_loss']:.3f}, chance {row['chance']:.3f}")

# %%
expect("loss after six passes over chance", history[-1]["train_loss"] / history[-1]["chance"], at_most=0.75)

# %% [markdown]
# It paints the shape of a shoe long before its laces: squared error punishes a detail in the wrong place twice, so what is uncertain is painted
# as its mean, a blur. **A blurred picture is no fault of the encoder.** What it has to know is *that this is a shoe, and where it is*.
#
# ## 2 MoCo v3: which two are one?
#
# Take two random **views** of each picture: crops, mirrored or not, darker or lighter. Two views of one picture should have similar
# embeddings, and views of different pictures should not. In a batch of $N$ pictures the first view $q_i$ has $N$ candidates $k_j$, and
# the right one is $k_i$: a classification with $N$ classes, whose labels nobody had to write (**InfoNCE**).
#
# $$ \ell_i = -2\tau \log \frac{\exp(q_i \cdot k_i / \tau)}{\sum_j \exp(q_i \cdot k_j / \tau)}, \qquad q, k \text{ of length } 1. $$

# %%
# alt: Two rows of eight pictures, the first and the second view of the same eight pieces of clothing: cut closer, mirrored, darker or lighter.
options = MocoOptions(min_crop=0.3, blur=0.0, solarize=0.0, hidden_dim=256, out_dim=64)
first, second = view_pair(options, hflip=True)
raw = torch.stack([judges[i][0] for i in range(8)])
where = {"seed": 0, "epoch": 0, "index": torch.arange(8)}
views = [view(raw, None, **where, view=number) for number, view in enumerate((first, second))]
fig, axes = plot.panels(2, 8, width=1.2, height=1.2)
for row, images in zip(axes.reshape(2, 8), views, strict=True):
    for ax, image in zip(row, images, strict=True):
        plot.show_image(ax, image, vmin=0, vmax=1)
plt.show()
again = [view(raw, None, **where, view=number) for number, view in enumerate((first, second))]
print("the same seed, epoch, picture and view, the same pixels:", all(map(torch.equal, views, again)))

# %% [markdown]
# The views *are* the task. A model that must ignore brightness and position cannot afterwards tell a dark shirt from a light one. Choose
# them by what your labels will not depend on.
#
# The temperature $\tau$ makes cosines, which lie in $[-1, 1]$, into logits: at 0.2 they lie in $[-5, 5]$. The factor $2\tau$ keeps the
# gradient about as large whatever $\tau$ is. Chance is $2\tau \log N$ for each of the two directions: the answer to "is 1.9 right?"
#
# ### Exercise 4 · `info_nce`
# *Difficulty 2 of 5, about 10 minutes.* The loss of MoCo, SimCLR and CLIP. Return one number for each query; the mean comes later.


# %%
@exercise("pretraining.info_nce")
def info_nce(queries, keys, temperature):
    """Queries (B, D), and keys (N, D) whose first B are theirs -> losses (B,)."""
    # <solution>
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    own = torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(logits, own, reduction="none") * (2 * temperature)
    # </solution>


# %%
# alt: Three matrices of cosines between eight queries and eight keys, with a colour bar from minus one to one. Of equal embeddings all are one;
# of random ones all are near 0; of a trained model the diagonal is bright. Above each, its loss.
torch.manual_seed(0)
q = torch.randn(8, 64)
pairs = {
    "all the same": (torch.ones(8, 64), torch.ones(8, 64)),
    "random": (q, torch.randn(8, 64)),
    "as wanted": (q, q + 0.5 * torch.randn(8, 64)),
}
fig, axes = plot.panels(1, 3, width=2.7, height=2.8)
for ax, (name, (a, b)) in zip(axes, pairs.items(), strict=True):
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    loss = info_nce(a, b, 0.2).mean()
    picture = ax.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set(title=f"{name}\nloss {loss:.2f}", xticks=[], yticks=[])
axes[0].set(xlabel="keys", ylabel="queries")
fig.colorbar(picture, ax=list(axes), label="cosine", shrink=0.7)
plt.show()
print(f"chance for 8 pictures: {0.4 * math.log(8):.2f}")
print(f"a batch of one: {info_nce(q[:1], torch.randn(1, 64), 0.2).item():.2f}, whatever the model does")

# %% [markdown]
# Two things to keep: embeddings that are all the same have *exactly* the chance level, and a batch of one has a loss of 0, silently. (The
# library refuses it.) The more pictures in a batch, the harder the question, which is why these methods use thousands, and gather the
# keys of all GPUs.
#
# ### The keys come from a slower copy
#
# If both views went through the network that is being trained, the target would move with every step. MoCo makes the keys with a
# **momentum encoder**: a copy that follows, $\theta_k \leftarrow m\,\theta_k + (1 - m)\,\theta_q$, and gets no gradient. In MoCo v3 the
# momentum $m$ itself rises from 0.99 to 1, half a cosine, so that the keys stand still at the end:
#
# $$ m(s) = 1 - (1 - m_0) \cdot \tfrac12 \left(1 + \cos \pi \tfrac{s}{S}\right). $$
#
# ### Exercise 5 · `momentum_at`
# *Difficulty 1 of 5, about 5 minutes.* One line, and an easy one to turn upside down.


# %%
@exercise("pretraining.momentum_at")
def momentum_at(step, total, start):
    """The momentum at `step` of `total`: `start` at first, 1 in the end."""
    # <solution>
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / total))
    # </solution>


# %% [markdown]
# Two small networks stand on the encoder and are thrown away afterwards: a **projector** (the encoder may keep what the contrast must
# forget) and, for the queries only, a **predictor**. And the patch projection of the ViT stays **random and frozen**: the authors saw
# training fall back again and again, traced it to spikes in the gradient of that first layer, and left it untrained.<!--~ paper -->
#
# This is the whole method, with your two functions in it:


# %%
class Contrast(pretraining.MomentumContrast):
    """The library's task, with your loss and your schedule."""

    def loss(self, model, views):
        queries = model(*views)
        with torch.no_grad():
            keys = [self.keys(view) for view in views]  # encoder and projector, the slower copies
        tau = self.options.temperature
        total = info_nce(queries[0], keys[1], tau) + info_nce(queries[1], keys[0], tau)  # symmetrised
        return total.sum(), len(queries[0])

    def after_step(self, model, step, total):
        self.move_keys(model, momentum_at(step + 1, total, self.options.key_momentum))
        self.probe.watch(model, step + 1)


short = TrainConfig(epochs=4, batch_size=100, lr=1e-3, warmup=0.1, hflip=True)
