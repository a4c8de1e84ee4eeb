"""Checks of lesson 00: from pixels to a trained Vision Transformer."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange

from vitcourse import vit
from vitcourse.course.checks import build, call, check
from vitcourse.train import TrainConfig

# ---------------------------------------------------------------------------------------------------------- patches


@check(
    "vit.image_to_patch",
    reference="vitcourse.vit.image_to_patch",
    level=1,
    minutes=10,
    why="A transformer reads sequences, so an image has to become one, without losing where each pixel was.",
    hints=[
        "The height splits in two: which row of patches, and which row of pixels inside a patch. So does the width.",
        "Read the wanted order off the shape: (rows of patches · columns of patches), then (row in the patch · column in "
        "the patch · channel).",
        "In einops an axis is split with brackets on the left, (h p1), and joined with brackets on the right.",
    ],
)
def image_to_patch(rng):
    yield call(rng.normal(2, 3, 8, 12), 4)
    yield call(rng.normal(1, 2, 6, 3), 3).on("a batch of one")
    yield call(rng.normal(3, 1, 4, 10), 2).on("a grey image")
    yield call(rng.strided(2, 3, 4, 6), 2).on("a non-contiguous image")


def _patches(pattern):
    return lambda x, patch_size: rearrange(x, pattern, p1=patch_size, p2=patch_size)


image_to_patch.mistake(
    "column-major",
    "the patches follow each other down the columns; they should be read like a page, row by row",
    _patches("b c (h p1) (w p2) -> b (w h) (p1 p2 c)"),
)
image_to_patch.mistake(
    "channels-first",
    "inside a patch all of one channel comes before the next; the channels of one pixel should stay side by side",
    _patches("b c (h p1) (w p2) -> b (h w) (c p1 p2)"),
)
image_to_patch.mistake(
    "transposed-patch",
    "each patch is mirrored at its diagonal: its pixels are read column by column",
    _patches("b c (h p1) (w p2) -> b (h w) (p2 p1 c)"),
)
image_to_patch.mistake(
    "strided-pixels",
    "a token gathers pixels from all over the image: the two halves of a split axis are in the wrong order",
    _patches("b c (p1 h) (p2 w) -> b (h w) (p1 p2 c)"),
)


@image_to_patch.mistake(
    "plain-reshape",
    "a reshape alone cuts the image's memory into equal stretches, not into squares",
)
def _(x, patch_size):
    batch, channels, height, width = x.shape
    return x.reshape(batch, (height // patch_size) * (width // patch_size), patch_size * patch_size * channels)


@image_to_patch.mistake(
    "channels-last-reshape",
    "with the channels last, a reshape still cuts the rows of pixels into equal stretches; a square is parts of several rows",
)
def _(x, patch_size):
    return rearrange(x, "b c h w -> b (h w c)").unflatten(1, (-1, patch_size**2 * x.shape[1]))


# --------------------------------------------------------------------------------------------------------- positions


@check(
    "vit.sincos_2d",
    reference="vitcourse.vit.sincos_2d",
    level=3,
    minutes=20,
    why="Attention does not see order. A position code gives each token its place, and near places similar codes.",
    hints=[
        "Half of the channels say the column, half the row; each half is sines, then cosines. How many frequencies is that?",
        "The frequencies fall from 1 towards 1/10 000: 10000 ** (-i / n) for i = 0 … n − 1, with n frequencies.",
        "torch.meshgrid(..., indexing='ij') gives the row and the column of each patch; an outer product with the "
        "frequencies gives the angles.",
    ],
    tolerance=1e-4,
)
def sincos_2d(rng):
    yield call(3, 5, 16)
    yield call(4, 1, 8).on("a single column")
    yield call(2, 7, 24).on("a wide grid")


def _sincos(h, w, dim, *, frequencies=None, temperature=10000.0, layout="xy wave n", order="xxyy"):
    n = dim // 4
    omega = temperature ** -(torch.arange(n) / (frequencies or n))
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    x, y = columns.reshape(-1, 1) * omega, rows.reshape(-1, 1) * omega
    if order == "yyxx":
        x, y = y, x
    parts = torch.stack([x.sin(), x.cos(), y.sin(), y.cos()]).unflatten(0, (2, 2))
    return rearrange(parts, f"xy wave place n -> place ({layout})")


sincos_2d.mistake(
    "rows-first",
    "rows and columns are exchanged: the first half of the channels should tell the column",
    lambda h, w, dim: _sincos(h, w, dim, order="yyxx"),
)
sincos_2d.mistake(
    "wrong-exponent",
    "the frequencies fall too slowly: the exponent is divided by the number of all channels, and never comes near 1",
    lambda h, w, dim: _sincos(h, w, dim, frequencies=dim),
)
sincos_2d.mistake(
    "one-dimensional-exponent",
    "the exponent is the one for text, which has one axis; here two axes share the channels, so each has fewer frequencies",
    lambda h, w, dim: _sincos(h, w, dim, frequencies=dim // 2),
)
sincos_2d.mistake(
    "interleaved",
    "the values are right, but the four kinds of channel take turns: each kind should stand in one stretch",
    lambda h, w, dim: _sincos(h, w, dim, layout="n xy wave"),
)
sincos_2d.mistake(
    "alternating",
    "the sines and cosines of an axis take turns, as in many codes for text; here they stand in two stretches",
    lambda h, w, dim: _sincos(h, w, dim, layout="xy n wave"),
)
sincos_2d.mistake(
    "same-frequency",
    "all channels have one frequency, so patches a period apart get almost the same code: where is the geometric series?",
    lambda h, w, dim: _sincos(h, w, dim, temperature=1.0),
)


@sincos_2d.mistake(
    "running-number",
    "this is the one-dimensional code of the running number of a patch: it does not know what lies above and below",
)
def _(h, w, dim):
    omega = 10000.0 ** -(torch.arange(dim // 2) / (dim // 2))
    angle = torch.arange(h * w)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


@sincos_2d.mistake(
    "column-major",
    "the codes follow each other down the columns; tokens are read row by row (is it indexing='xy'?)",
)
def _(h, w, dim):
    return rearrange(_sincos(h, w, dim), "(h w) d -> (w h) d", h=h)


# --------------------------------------------------------------------------------------------------------- attention


@check(
    "vit.attention_weights",
    reference="vitcourse.layers.attention_weights",
    level=2,
    minutes=10,
    why="This is the one operation in which tokens exchange information.",
    hints=[
        "Every query meets every key in a dot product: one matrix product, with one of the two transposed.",
        "The variance of a dot product grows with its length D. Divide by its standard deviation.",
        "The weights of one query, over all keys, sum to one: over which axis does the softmax run?",
    ],
)
def attention_weights(rng):
    yield call(rng.normal(2, 3, 5, 16), rng.normal(2, 3, 7, 16))
    yield call(rng.normal(1, 2, 6, 8), rng.normal(1, 2, 4, 8)).on("a batch of one")
    yield call(rng.strided(2, 2, 3, 4), rng.strided(2, 2, 5, 4)).on("non-contiguous inputs")


def _scores(q, k):
    return q @ k.transpose(-2, -1)


attention_weights.mistake(
    "no-scale",
    "the scores are not scaled: they grow with the width D, and the softmax saturates",
    lambda q, k: _scores(q, k).softmax(-1),
)
attention_weights.mistake(
    "scale-by-width",
    "the scores are divided by D itself: the variance of a dot product grows like D, its spread more slowly",
    lambda q, k: (_scores(q, k) / q.shape[-1]).softmax(-1),
)
attention_weights.mistake(
    "multiplied",
    "the scale works in the wrong direction: it makes the scores of wide heads, large as they are, larger still",
    lambda q, k: (_scores(q, k) * q.shape[-1] ** 0.5).softmax(-1),
)
attention_weights.mistake(
    "over-queries",
    "the softmax runs over the queries: here all queries compete for a key; each query should spread one unit over the keys",
    lambda q, k: (_scores(q, k) * q.shape[-1] ** -0.5).softmax(-2),
)
attention_weights.mistake(
    "over-heads",
    "the softmax runs over the heads, which then compete with each other; heads are independent",
    lambda q, k: (_scores(q, k) * q.shape[-1] ** -0.5).softmax(1),
)
attention_weights.mistake(
    "scale-after",
    "the scale is applied after the softmax: the rows no longer sum to one",
    lambda q, k: _scores(q, k).softmax(-1) * q.shape[-1] ** -0.5,
)
attention_weights.mistake(
    "no-softmax",
    "these are the scores: nothing turns them into weights that are positive and sum to one yet",
    lambda q, k: _scores(q, k) * q.shape[-1] ** -0.5,
)


@check(
    "vit.Attention",
    reference="vitcourse.vit.Attention",
    level=3,
    minutes=20,
    why="Several heads look for several things at once; splitting and joining them is where most bugs live.",
    hints=[
        "self.qkv gives 3 · D numbers a token: first all of q, then all of k, then all of v; inside each, head after head.",
        "rearrange with 'b n (three h d) -> three b h n d' hands you q, k and v, ready to unpack.",
        "After the weighted sum of the values, put the heads of one token side by side again, then project.",
    ],
)
def attention(rng):
    yield build(dim=12, num_heads=3).call(rng.normal(2, 5, 12))
    yield build(8, 2).call(rng.normal(1, 3, 8)).on("a batch of one")
    yield build(6, 1).call(rng.normal(3, 4, 6)).on("a single head")


class _WrongAttention(vit.Attention):
    """Multi-head attention with a hook at each place where it goes wrong."""

    split_pattern = "b n (three h d) -> three b h n d"
    scale_power, softmax_axis, projects = -0.5, -1, True

    def split(self, x):
        return rearrange(self.qkv(x), self.split_pattern, three=3, h=self.num_heads)

    def join(self, x):
        return rearrange(x, "b h n d -> b n (h d)")

    def forward(self, x, grid=None):
        q, k, v = self.split(x)
        out = self.join((_scores(q, k) * q.shape[-1] ** self.scale_power).softmax(self.softmax_axis) @ v)
        return self.proj(out) if self.projects else out


@attention.mistake(
    "no-scale", "the scores are not scaled: they grow with the width of a head, and the softmax saturates"
)
class _(_WrongAttention):
    scale_power = 0.0


@attention.mistake(
    "scale-by-dim",
    "the scale is that of the whole width D; each head's dot product is only as long as the head is wide",
)
class _(_WrongAttention):
    def forward(self, x, grid=None):
        q, k, v = self.split(x)
        return self.proj(self.join((_scores(q, k) * x.shape[-1] ** -0.5).softmax(-1) @ v))


@attention.mistake(
    "heads-outermost",
    "the projection is cut into heads first and into q, k, v inside each: q, k and v each should come whole, then head by head",
)
class _(_WrongAttention):
    split_pattern = "b n (h three d) -> three b h n d"


@attention.mistake(
    "heads-interleaved",
    "neighbouring channels go to different heads; a head should be one stretch of channels",
)
class _(_WrongAttention):
    split_pattern = "b n (three d h) -> three b h n d"


@attention.mistake(
    "careless-join",
    "the heads are reshaped together without bringing the tokens forward first, which mixes channels of different tokens",
)
class _(_WrongAttention):
    def join(self, x):
        return x.reshape(x.shape[0], x.shape[2], -1)


@attention.mistake(
    "join-interleaved",
    "the joined heads alternate channel by channel: the channels of one head should stay side by side",
)
class _(_WrongAttention):
    def join(self, x):
        return rearrange(x, "b h n d -> b n (d h)")


@attention.mistake(
    "keys-asked", "queries and keys are exchanged: the first third of the projection asks, the second answers"
)
class _(_WrongAttention):
    def split(self, x):
        q, k, v = super().split(x)
        return k, q, v


@attention.mistake("no-projection", "the last projection is missing: without it the heads never mix")
class _(_WrongAttention):
    projects = False


@attention.mistake("over-queries", "the softmax runs over the queries; each query should spread one unit over the keys")
class _(_WrongAttention):
    softmax_axis = -2


# ------------------------------------------------------------------------------------------------- block and model


@check(
    "vit.Block",
    reference="vitcourse.vit.Block",
    level=2,
    minutes=10,
    why="The residual path is what lets gradients reach the first layer of a deep stack.",
    hints=[
        "There are two steps, and each adds something to x: x = x + …",
        "What goes into the attention, and into the MLP, is normalised; x itself never is.",
    ],
)
def block(rng):
    yield build(dim=8, num_heads=2).call(rng.normal(2, 5, 8))
    yield build(12, 3).call(rng.normal(1, 4, 12)).on("a batch of one")


@block.mistake(
    "post-norm", "the norm is applied after the sum, on the residual path itself; that path should stay free"
)
class _(vit.Block):
    def forward(self, x, grid=None):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


@block.mistake("no-residual", "nothing is added to x: each branch replaces it, and what it does not pass on is lost")
class _(vit.Block):
    def forward(self, x, grid=None):
        return self.mlp(self.norm2(self.attn(self.norm1(x))))


@block.mistake(
    "normed-residual", "the branch is added to the normalised tokens; it should be added to the tokens as they came"
)
class _(vit.Block):
    def forward(self, x, grid=None):
        x = self.norm1(x)
        x = self.norm2(x + self.attn(x))
        return x + self.mlp(x)


@block.mistake("one-norm", "both branches share the first norm; each has its own")
class _(vit.Block):
    def forward(self, x, grid=None):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm1(x))


@block.mistake("parallel", "the MLP reads the block's input; it should read what the attention step has left")
class _(vit.Block):
    def forward(self, x, grid=None):
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


@block.mistake("first-step-lost", "the second step adds to the block's input, so what attention has added is dropped")
class _(vit.Block):
    def forward(self, x, grid=None):
        return x + self.mlp(self.norm2(x + self.attn(self.norm1(x))))


@block.mistake("mlp-unnormed", "the MLP gets tokens that are not normalised")
class _(vit.Block):
    def forward(self, x, grid=None):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(x)


@check(
    "vit.VisionTransformer",
    reference="vitcourse.vit.VisionTransformer",
    level=4,
    minutes=25,
    why="This is the model. Its parts are small; their order is the architecture.",
    hints=[
        "patch_embed gives (B, D, h, w). Tokens are (B, h·w, D): flatten the grid and bring the channels last.",
        "[CLS] is one learnt vector for the whole data set: expand it to the batch and put it in front.",
        "pos_embed has a place for [CLS] too, so it is added after [CLS] is there. Then the blocks, the norm, the head.",
    ],
)
def vision_transformer(rng):
    sizes = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    yield build(img_size=12, in_chans=2, num_classes=5, **sizes).call(rng.normal(3, 2, 12, 12))
    yield build(img_size=8, in_chans=1, num_classes=3, **sizes).call(rng.normal(1, 1, 8, 8)).on("a batch of one")


class _WrongTransformer(vit.VisionTransformer):
    """The model in its steps, each of which a mistake may replace."""

    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (h w) d")
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed

    def pool(self, x):
        return self.norm(x)[:, 0]

    def encode(self, x):
        for step in self.blocks:
            x = step(x)
        return x

    def forward(self, x):
        return self.head(self.pool(self.encode(self.tokens(x))))


@vision_transformer.mistake(
    "positions-before-cls",
    "the positions are added to the patches only, before [CLS] is prepended: [CLS] is left without its own",
)
class _(_WrongTransformer):
    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (h w) d") + self.pos_embed[:, 1:]
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)


@vision_transformer.mistake("cls-last", "[CLS] stands at the end, where it takes the position of the last patch")
class _(_WrongTransformer):
    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (h w) d")
        return torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], dim=1) + self.pos_embed

    def pool(self, x):
        return self.norm(x)[:, -1]


@vision_transformer.mistake("first-patch", "the head reads the first patch: [CLS] was put at the other end")
class _(_WrongTransformer):
    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (h w) d")
        return torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], dim=1) + self.pos_embed


@vision_transformer.mistake("mean-with-cls", "the head reads the mean of all tokens, with [CLS] averaged in")
class _(_WrongTransformer):
    def pool(self, x):
        return self.norm(x).mean(dim=1)


@vision_transformer.mistake("mean-of-patches", "the head reads the mean of the patches; this model is read at [CLS]")
class _(_WrongTransformer):
    def pool(self, x):
        return self.norm(x)[:, 1:].mean(dim=1)


@vision_transformer.mistake(
    "no-norm", "the final norm is missing: with pre-norm blocks nothing else tames the residual sum"
)
class _(_WrongTransformer):
    def pool(self, x):
        return x[:, 0]


@vision_transformer.mistake("no-positions", "the positions are never added: the model cannot tell where a patch was")
class _(_WrongTransformer):
    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (h w) d")
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)


@vision_transformer.mistake("columns-first", "the patches are read column by column, but the positions row by row")
class _(_WrongTransformer):
    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (w h) d")
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed


@vision_transformer.mistake(
    "plain-reshape",
    "(B, D, h, w) is reshaped to (B, h·w, D) as it lies in memory, so a token gets values of many patches; move D last first",
)
class _(_WrongTransformer):
    def tokens(self, x):
        x = self.patch_embed(x).flatten(1).unflatten(1, (-1, self.pos_embed.shape[-1]))
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed


@vision_transformer.mistake(
    "probabilities", "these are probabilities; the loss applies the softmax itself and wants logits"
)
class _(_WrongTransformer):
    def forward(self, x):
        return super().forward(x).softmax(dim=-1)


# ------------------------------------------------------------------------------------------------------------ recipe


@check(
    "vit.learning_rate",
    reference="vitcourse.train.learning_rate",
    level=2,
    minutes=15,
    why="Transformers are touchy in their first steps. The warm-up gets them through, the cosine lets them settle.",
    hints=[
        "Two regimes: step < warmup_steps, and the rest.",
        "Warm-up: the steps 0 … warmup_steps − 1 climb evenly, and step 0 is already above zero: (step + 1) / "
        "(warmup_steps + 1).",
        "Cosine: let t run from 0 at the end of the warm-up to 1 at the last step, total_steps − 1. Half a cosine, "
        "(1 + cos πt) / 2, falls from 1 to 0; stretch it between lr and min_lr.",
    ],
)
def learning_rate(rng):
    config = TrainConfig(lr=0.8, min_lr=0.1, warmup=0.2)
    total = 10 * rng.integer(3, 7) + 4  # a fifth of it ends in .8, of three steps more in .4: rounded up, and down
    warm = round(0.2 * total)
    yield call(0, total, config).on("the first step")
    yield call(warm - 1, total, config).on("the end of the warm-up")
    yield call(warm, total, config).on("the first step after the warm-up")
    yield call(warm + rng.integer(2, total - warm - 4), total, config).on("the cosine")
    yield call(total - 1, total, config).on("the last step")
    yield call(1, total + 3, config).on("a run of another length")
    yield call(0, total, TrainConfig(lr=0.8, min_lr=0.1, warmup=0.0)).on("a run without warm-up")


def _rate(step, total, config, *, start=1, peak=None, warm=None, until=None, low=None, shift=True, half=1.0):
    warm = round(config.warmup * total) if warm is None else warm
    low = config.min_lr if low is None else low
    if step < warm:
        return config.lr * (step + start) / (warm + (start if peak is None else peak))
    t = (step - warm) / ((until or total - 1) - warm) if shift else step / (total - 1)
    return low + (config.lr - low) * (1 + math.cos(half * math.pi * t)) / 2


learning_rate.mistake(
    "zero-first-step",
    "the first step has a rate of zero, so one batch is wasted",
    lambda step, total_steps, config: _rate(step, total_steps, config, start=0),
)
learning_rate.mistake(
    "peak-too-early",
    "the warm-up arrives one step early: its last step already has the full rate, which belongs to the step after it",
    lambda step, total_steps, config: _rate(step, total_steps, config, peak=0),
)
learning_rate.mistake(
    "no-warm-up",
    "there is no warm-up: the rate starts at its peak",
    lambda step, total_steps, config: _rate(step, total_steps, config, warm=0),
)
learning_rate.mistake(
    "cosine-from-zero",
    "the cosine does not start where the warm-up ends: it has been falling since step 0, so the rate jumps",
    lambda step, total_steps, config: _rate(step, total_steps, config, shift=False),
)
learning_rate.mistake(
    "no-floor",
    "the rate falls to zero; min_lr is forgotten",
    lambda step, total_steps, config: _rate(step, total_steps, config, low=0.0),
)
learning_rate.mistake(
    "full-period",
    "the cosine runs through a whole period and climbs again",
    lambda step, total_steps, config: _rate(step, total_steps, config, half=2.0),
)
learning_rate.mistake(
    "never-arrives",
    "the last step is not at the floor: steps are counted from 0, so the last one is total_steps − 1",
    lambda step, total_steps, config: _rate(step, total_steps, config, until=total_steps),
)


# ----------------------------------------------------------------------------------------------------- other sizes


@check(
    "vit.resize_pos_embed",
    reference="vitcourse.vit.resize_pos_embed",
    level=3,
    minutes=20,
    why="Position tables are learnt for one grid. Another resolution, or a photo that is not square, needs another.",
    hints=[
        "Set the prefix positions aside first: [CLS] has no place on the image.",
        "F.interpolate wants an image: (1, D, rows, columns). Sizes are given as (rows, columns).",
        "F.interpolate(..., mode='bicubic', antialias=True), back to a sequence, and the prefix in front again.",
    ],
)
def resize_pos_embed(rng):
    yield call(rng.normal(1, 1 + 4 * 4, 6), (4, 4), (6, 5), 1)
    yield call(rng.normal(1, 3 * 5, 4), (3, 5), (7, 4), 0).on("positions without a prefix")
    yield call(rng.normal(1, 2 + 8 * 6, 3), (8, 6), (3, 4), 2).on("a smaller grid and two prefix tokens")


def _resized(pos_embed, old_grid, new_grid, prefix, pattern="1 (h w) d -> 1 d h w", mode="bicubic", **options):
    options = {"antialias": mode == "bicubic", **options}
    grid = rearrange(pos_embed[:, prefix:], pattern, h=old_grid[0])
    grid = F.interpolate(grid, size=tuple(new_grid), mode=mode, **options)
    return torch.cat([pos_embed[:, :prefix], rearrange(grid, "1 d h w -> 1 (h w) d")], dim=1)


def _catalogue_resizing(key, message, **options):
    resize_pos_embed.mistake(key, message, lambda pos, old, new, prefix=0: _resized(pos, old, new, prefix, **options))


_catalogue_resizing("bilinear", "this is bilinear; pretrained models expect bicubic", mode="bilinear", antialias=True)
_catalogue_resizing("nearest", "each new place copies its nearest old one, so neighbours become equal", mode="nearest")
_catalogue_resizing(
    "align-corners",
    "the corners are aligned, without antialiasing: that pins the centres of the outer patches, and shifts all others",
    align_corners=True,
    antialias=False,
)
_catalogue_resizing(
    "align-corners-antialiased",
    "the corners are aligned: that treats a patch as a point, not as an area, and its code moves away from its place",
    align_corners=True,
)
_catalogue_resizing(
    "no-antialias",
    "this is bicubic without antialiasing, which production models have: on a smaller grid positions are skipped",
    antialias=False,
)


@resize_pos_embed.mistake("transposed", "rows and columns are exchanged on the way, which square grids would hide")
def _(pos, old, new, prefix=0):
    grid = rearrange(pos[:, prefix:], "1 (w h) d -> 1 d h w", h=old[0])
    grid = F.interpolate(grid, size=tuple(new), mode="bicubic", antialias=True)
    return torch.cat([pos[:, :prefix], rearrange(grid, "1 d h w -> 1 (w h) d")], dim=1)


@resize_pos_embed.mistake(
    "one-dimensional", "the sequence is stretched as if it were a line: a patch's upper and lower neighbours are lost"
)
def _(pos, old, new, prefix=0):
    line = F.interpolate(pos[:, prefix:].transpose(1, 2), size=new[0] * new[1], mode="linear")
    return torch.cat([pos[:, :prefix], line.transpose(1, 2)], dim=1)


@resize_pos_embed.mistake("prefix-last", "the prefix ends up behind the patches")
def _(pos, old, new, prefix=0):
    out = _resized(pos, old, new, prefix)
    return torch.cat([out[:, prefix:], out[:, :prefix]], dim=1)


@resize_pos_embed.mistake("prefix-lost", "the positions of the prefix tokens are gone")
def _(pos, old, new, prefix=0):
    return _resized(pos, old, new, prefix)[:, prefix:]
