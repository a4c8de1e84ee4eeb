"""Checks of lesson 02: the convolutional stem, MBConv, relative attention, and CoAtNet, which is made of them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitcourse import hybrid
from vitcourse.course.checks import build, call, check
from vitcourse.hierarchical import relative_position_index
from vitcourse.vit import resize_pos_embed

# ------------------------------------------------------------------------------------- what only the lesson has use for


def resize_bias_table(table: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """A table of offsets for maps of another size, by bicubic interpolation with antialiasing.

    Args:
        table: ((2h − 1) · (2w − 1), heads), made for maps of ``old_size``.
        old_size: (h, w).
        new_size: (h', w').

    Returns:
        ((2h' − 1) · (2w' − 1), heads).

    >>> resize_bias_table(torch.zeros(13 * 13, 4), (7, 7), (14, 10)).shape
    torch.Size([513, 4])
    """
    offsets = [(2 * h - 1, 2 * w - 1) for h, w in (old_size, new_size)]
    return resize_pos_embed(table[None], *offsets)[0]


@torch.no_grad()
def shift_consistency(model: Callable[[Tensor], Tensor], images: Tensor, pixels: int) -> float:
    """The share of predictions that stay what they are when the images move; the mean over four directions.

    Args:
        model: images (B, C, H, W) to logits (B, classes).
        images: (B, C, H, W). What comes in at the border is zero.
        pixels: by how much they move up, down, left and right.

    >>> shift_consistency(lambda x: x.mean(dim=(2, 3)), torch.rand(4, 3, 8, 8).cumsum(1), 2)  # colours, not places
    1.0
    """
    still = model(images).argmax(1)
    moved = (F.pad(images, border) for border in _borders(pixels))
    return torch.stack([model(one).argmax(1) == still for one in moved]).float().mean().item()


def _borders(pixels: int) -> list[tuple[int, int, int, int]]:
    """What ``F.pad`` adds on the left, right, top and bottom to move an image down, up, right and left."""
    return [(0, 0, pixels, -pixels), (0, 0, -pixels, pixels), (pixels, -pixels, 0, 0), (-pixels, pixels, 0, 0)]


# ---------------------------------------------------------------------------------------------------------------- stem


@check(
    "hybrid.ConvStem",
    reference="vitcourse.hybrid.ConvStem",
    level=2,
    minutes=15,
    why="Five lines in place of one convolution, and a ViT learns sooner, whatever the learning rate.",
    hints=[
        "How many times can the patch size be halved? That many 3×3 convolutions, each of stride 2.",
        "Work the widths out from the end: the last 3×3 has embed_dim channels, the one before it half as many.",
        "Each convolution is followed by batch norm, then ReLU. Batch norm has a shift of its own, so what would the bias "
        "of the convolution add? After all of them comes one 1×1 convolution.",
    ],
)
def conv_stem(rng):
    yield build(patch_size=4, in_chans=2, embed_dim=6).call(rng.normal(2, 2, 8, 12))
    yield build(patch_size=8, in_chans=1, embed_dim=12).train().call(rng.normal(3, 1, 16, 8)).on("a batch in training")
    yield build(patch_size=2, in_chans=3, embed_dim=5).call(rng.normal(1, 3, 4, 6)).on("a stem of one step")


class _WrongStem(nn.Module):
    """The stem in its parts, each of which a mistake may replace."""

    bias, padding, act, last = False, 1, nn.ReLU, nn.Identity
    steps_of = staticmethod(lambda stages: [2] * stages)
    widths_of = staticmethod(lambda stages, dim: [dim // 2**i for i in reversed(range(stages))])

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        stages = patch_size.bit_length() - 1
        widths, layers = [in_chans, *self.widths_of(stages, embed_dim)], []
        for i, stride in enumerate(self.steps_of(stages)):
            layers += self.step(nn.Conv2d(widths[i], widths[i + 1], 3, stride, self.padding, bias=self.bias))
        self.convs, self.proj = nn.Sequential(*layers), self.end(embed_dim)

    def step(self, conv):
        return [conv, nn.BatchNorm2d(conv.out_channels), self.act()]

    def end(self, dim):
        return nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        return self.proj(self.convs(x))


@conv_stem.mistake("same-width", "all convolutions are equally wide; that makes the fine maps the dear ones")
class _(_WrongStem):
    widths_of = staticmethod(lambda stages, dim: [dim] * stages)


@conv_stem.mistake("with-bias", "the 3×3 convolutions have biases, which the norm behind them takes away again")
class _(_WrongStem):
    bias = True


@conv_stem.mistake(
    "no-norm", "there is no norm behind the convolutions, so the signal may grow or fade from one to the next"
)
class _(_WrongStem):
    def step(self, conv):
        return [conv, self.act()]


@conv_stem.mistake("norm-after-relu", "the norm comes after ReLU; it belongs between the convolution and ReLU")
class _(_WrongStem):
    def step(self, conv):
        return [conv, self.act(), nn.BatchNorm2d(conv.out_channels)]


@conv_stem.mistake(
    "no-activation", "nothing between the convolutions is non-linear: together they are no more than one convolution"
)
class _(_WrongStem):
    act = nn.Identity


@conv_stem.mistake("gelu", "the non-linearity is GELU; this stem is of the plainest kind there is")
class _(_WrongStem):
    act = nn.GELU


@conv_stem.mistake("no-padding", "without padding each convolution loses the border, and the map comes out too small")
class _(_WrongStem):
    padding = 0


@conv_stem.mistake(
    "one-big-step", "the first convolution makes the whole step at once, and with 3×3 skips most of the pixels"
)
class _(_WrongStem):
    steps_of = staticmethod(lambda stages: [2**stages] + [1] * (stages - 1))


@conv_stem.mistake(
    "no-projection", "the 1×1 convolution at the end is missing: ReLU would keep half of each token at zero"
)
class _(_WrongStem):
    def end(self, dim):
        return nn.Identity()


@conv_stem.mistake(
    "relu-last", "tokens pass through a non-linearity after the last convolution, so none is ever negative"
)
class _(_WrongStem):
    def forward(self, x):
        return super().forward(x).relu()


# ----------------------------------------------------------------------------------------------------- squeeze-excitation


@check(
    "hybrid.SqueezeExcite",
    reference="vitcourse.hybrid.SqueezeExcite",
    level=2,
    minutes=10,
    why="A 3×3 convolution knows its neighbourhood; this is how it hears of the whole image, for almost no cost.",
    hints=[
        "Three steps: one number a channel; a gate between 0 and 1 for each; multiply.",
        "What does the mean run over: the channels, or the places?",
        "The gate is (B, C), the map (B, C, H, W). Two axes of size 1 let them meet.",
    ],
)
def squeeze_excite(rng):
    yield build(dim=6, hidden_dim=2).call(rng.normal(2, 6, 3, 5))
    yield build(dim=4, hidden_dim=3).call(rng.normal(1, 4, 4, 4)).on("a batch of one, and as many channels as rows")


class _WrongGate(hybrid.SqueezeExcite):
    """Squeeze, excite, scale: each step may be replaced."""

    def squeeze(self, x):
        return x.mean(dim=(2, 3))

    def excite(self, z):
        return self.fc2(self.act(self.fc1(z))).sigmoid()

    def scale(self, x, gate):
        return x * gate[:, :, None, None]

    def forward(self, x):
        return self.scale(x, self.excite(self.squeeze(x)))


@squeeze_excite.mistake("max", "the channels are summed up by their largest value, which a single pixel decides")
class _(_WrongGate):
    def squeeze(self, x):
        return x.amax(dim=(2, 3))


@squeeze_excite.mistake("sum", "the channels are summed, not averaged: the gate then depends on the size of the image")
class _(_WrongGate):
    def squeeze(self, x):
        return x.sum(dim=(2, 3))


@squeeze_excite.mistake("no-gate", "the weights are not squashed: they can be negative, or as large as they like")
class _(_WrongGate):
    def excite(self, z):
        return self.fc2(self.act(self.fc1(z)))


@squeeze_excite.mistake(
    "softmax", "the channels compete, since their weights sum to one; each should open and close on its own"
)
class _(_WrongGate):
    def excite(self, z):
        return self.fc2(self.act(self.fc1(z))).softmax(dim=1)


@squeeze_excite.mistake("linear-bottleneck", "nothing non-linear stands between the two linear layers")
class _(_WrongGate):
    def excite(self, z):
        return self.fc2(self.fc1(z)).sigmoid()


@squeeze_excite.mistake("added", "the gate is added to the map; it should weigh it")
class _(_WrongGate):
    def scale(self, x, gate):
        return x + gate[:, :, None, None]


@squeeze_excite.mistake("residual", "the map is added once more behind the gate, so no channel can ever be closed")
class _(_WrongGate):
    def scale(self, x, gate):
        return x + x * gate[:, :, None, None]


@squeeze_excite.mistake("gate-alone", "this is the gate; the map that it should weigh is missing")
class _(_WrongGate):
    def scale(self, x, gate):
        return gate[:, :, None, None].expand_as(x).clone()


@squeeze_excite.mistake(
    "place-by-place", "each place is weighed by its own channels; the map as a whole is never looked at"
)
class _(_WrongGate):
    def forward(self, x):
        gate = self.excite(rearrange(x, "b c h w -> b h w c"))
        return x * rearrange(gate, "b h w c -> b c h w")


# -------------------------------------------------------------------------------------------------------------- MBConv


@check(
    "hybrid.MBConv",
    reference="vitcourse.hybrid.MBConv",
    level=3,
    minutes=20,
    why="Half of CoAtNet's stages are this block, and so are EfficientNet and MobileNet.",
    hints=[
        "One line for each convolution: what comes before it, what comes after it? The docstring lists all of them in order.",
        "The shortcut sees the input as it came in, before any norm.",
        "There are two non-linearities, each behind the norm of a convolution. The last convolution has neither: what it "
        "adds to the sum may have any sign.",
    ],
)
def mbconv(rng):
    yield build(5, 5).call(rng.normal(2, 5, 4, 3))
    yield build(4, 6, stride=2).call(rng.normal(2, 4, 6, 4)).on("a block that shrinks the map")
    yield build(4, 4, stride=2, downsample="depthwise").call(rng.normal(1, 4, 4, 6)).on("the stride in the depthwise")
    yield build(3, 8).train().call(rng.normal(3, 3, 4, 5)).on("a batch in training")


class _WrongMBConv(hybrid.MBConv):
    """The block in its steps, each of which a mistake may replace."""

    def enter(self, x):
        return self.pre_norm(x)

    def widen(self, x):
        return self.act(self.norm1(self.expand(x)))

    def mix(self, x):
        return self.act(self.norm2(self.depthwise(x)))

    def leave(self, x):
        return self.project(self.se(x))

    def forward(self, x):
        return self.shortcut(x) + self.leave(self.mix(self.widen(self.enter(x))))


@mbconv.mistake("no-shortcut", "there is no way past the block: deep stacks of it will not train")
class _(_WrongMBConv):
    def forward(self, x):
        return self.leave(self.mix(self.widen(self.enter(x))))


@mbconv.mistake(
    "shortcut-of-the-normed", "the shortcut starts behind the norm: the signal is rescaled in every block it passes"
)
class _(_WrongMBConv):
    def forward(self, x):
        x = self.enter(x)
        return self.shortcut(x) + self.leave(self.mix(self.widen(x)))


@mbconv.mistake("no-pre-norm", "the branch takes its input as it is; a pre-activation block normalises first")
class _(_WrongMBConv):
    def enter(self, x):
        return x


@mbconv.mistake(
    "activated-entry", "the input passes a non-linearity before the first convolution: what was negative never gets in"
)
class _(_WrongMBConv):
    def enter(self, x):
        return self.act(self.pre_norm(x))


@mbconv.mistake("no-squeeze-excite", "squeeze-and-excitation is left out: no place ever hears of the whole map")
class _(_WrongMBConv):
    def leave(self, x):
        return self.project(x)


@mbconv.mistake(
    "squeeze-excite-early", "squeeze-and-excitation weighs the channels before their neighbourhoods were mixed"
)
class _(_WrongMBConv):
    def mix(self, x):
        return super().mix(self.se(x))

    def leave(self, x):
        return self.project(x)


@mbconv.mistake("no-depthwise", "the 3×3 convolution is missing: what is left never looks beyond its own place")
class _(_WrongMBConv):
    def mix(self, x):
        return self.act(self.norm2(x))


@mbconv.mistake("norms-exchanged", "the two norms of the wide layers are exchanged, which only trained weights show")
class _(_WrongMBConv):
    def widen(self, x):
        return self.act(self.norm2(self.expand(x)))

    def mix(self, x):
        return self.act(self.norm1(self.depthwise(x)))


@mbconv.mistake("norm-after-activation", "the non-linearities come before their norms")
class _(_WrongMBConv):
    def widen(self, x):
        return self.norm1(self.act(self.expand(x)))

    def mix(self, x):
        return self.norm2(self.act(self.depthwise(x)))


@mbconv.mistake("linear-depthwise", "the 3×3 convolution is normalised, but no non-linearity follows")
class _(_WrongMBConv):
    def mix(self, x):
        return self.norm2(self.depthwise(x))


@mbconv.mistake("linear-expansion", "the first convolution is normalised, but no non-linearity follows")
class _(_WrongMBConv):
    def widen(self, x):
        return self.norm1(self.expand(x))


@mbconv.mistake(
    "activated-exit", "the branch ends in a non-linearity: it can then hardly take anything away from the shortcut"
)
class _(_WrongMBConv):
    def leave(self, x):
        return self.act(super().leave(x))


# ---------------------------------------------------------------------------------------------------- table of offsets


@check(
    "hybrid.resize_bias_table",
    reference="vitcourse.course.checks.hybrid.resize_bias_table",
    level=3,
    minutes=15,
    why="Without it a model can only see images of the size that it was trained on.",
    hints=[
        "The table is a map of offsets, one channel for each head. How many rows and columns has it?",
        "F.interpolate wants (batch, channels, rows, columns), and the heads come last here: moving an axis and "
        "reshaping are not the same.",
        'F.interpolate(…, mode="bicubic", antialias=True); then the way back, heads last.',
    ],
)
def resize_table_cases(rng):
    yield call(rng.normal(5 * 7, 2), (3, 4), (6, 5))
    yield call(rng.normal(9 * 5, 3), (5, 3), (2, 4)).on("a map that is lower and wider")
    yield call(rng.normal(5 * 5, 1), (3, 3), (3, 3)).on("a map of the same size")


def _resized(pattern_in, pattern_out, side=lambda n: 2 * n - 1, exchange=False, **options):
    options = {"mode": "bicubic", "antialias": True, **options}

    def faulty(table, old_size, new_size):
        h, w = (2 * n - 1 for n in (reversed(old_size) if exchange else old_size))
        y, x = (side(n) for n in (reversed(new_size) if exchange else new_size))
        grid = rearrange(table, pattern_in, h=h, w=w) if "->" in pattern_in else table.reshape(1, -1, h, w)
        return rearrange(F.interpolate(grid, (y, x), **options), pattern_out)

    return faulty


_IN, _OUT = "(h w) heads -> 1 heads h w", "1 heads h w -> (h w) heads"
resize_table_cases.mistake(
    "heads-mixed",
    "the heads are mixed up: in memory they lie innermost, and a reshape alone does not move them",
    _resized("as it lies", _OUT),
)
resize_table_cases.mistake(
    "left-as-a-map", "this still is a map of offsets, heads first; the table has one row for each offset",
    _resized(_IN, "1 heads h w -> heads h w"),
)  # fmt: skip
resize_table_cases.mistake(
    "height-for-width",
    "height and width of the map are exchanged, which square maps hide",
    _resized(_IN, _OUT, exchange=True),
)
resize_table_cases.mistake(
    "columns-first", "the new table is numbered column by column; it should be read like the old one",
    _resized(_IN, "1 heads h w -> (w h) heads"),
)  # fmt: skip
resize_table_cases.mistake(
    "one-too-many",
    "the new table has an even number of rows: there are as many offsets to the left as to the right, and one of zero",
    _resized(_IN, _OUT, side=lambda n: 2 * n),
)
resize_table_cases.mistake(
    "positions-not-offsets",
    "the new table has a row for each position of the map; it needs one for each offset between two of them",
    _resized(_IN, _OUT, side=lambda n: n),
)
resize_table_cases.mistake(
    "corners-aligned",
    "the outermost offsets are held in place and all others stretched between them; the pixels' edges should align",
    _resized(_IN, _OUT, align_corners=True),
)
resize_table_cases.mistake(
    "no-antialias",
    "no antialiasing: where the table shrinks, offsets between the samples are skipped",
    _resized(_IN, _OUT, antialias=False),
)
resize_table_cases.mistake(
    "bilinear",
    "the interpolation is bilinear: smooth hills of the table get corners",
    _resized(_IN, _OUT, mode="bilinear"),
)
resize_table_cases.mistake(
    "nearest",
    "each new offset takes the nearest old one: neighbours that should differ become equal",
    _resized(_IN, _OUT, mode="nearest", antialias=False),
)


# ---------------------------------------------------------------------------------------------------------- attention


@check(
    "hybrid.RelativeAttention",
    reference="vitcourse.hybrid.RelativeAttention",
    level=4,
    minutes=25,
    why="One number for each offset, and attention gains what makes a convolution learn from few images.",
    hints=[
        "Queries, keys and values as in lesson 00. New is only the bias, one (N, N) matrix for each head.",
        "The table has a row for each offset and a column for each head; the index says which row each pair looks up.",
        "The grid of the input may differ from the one the table is made for: resize the table first, and number the "
        "pairs of the grid at hand. attention() takes the bias.",
    ],
)
def relative_attention(rng):
    yield build(dim=8, num_heads=2, grid_size=(3, 4)).call(rng.normal(2, 12, 8), (3, 4, 0))
    yield (
        build(dim=6, num_heads=3, grid_size=(2, 2), in_dim=4).call(rng.normal(3, 4, 4), (2, 2, 0)).on("a wider output")
    )
    yield build(dim=4, num_heads=1, grid_size=(2, 3)).call(rng.normal(1, 20, 4), (4, 5, 0)).on("a larger map")


class _WrongRelative(hybrid.RelativeAttention):
    """Relative attention in its steps, each of which a mistake may replace."""

    split_pattern = "b n (three h d) -> three b h n d"
    width, projects, over = None, True, -1

    def bias(self, size):
        table = resize_bias_table(self.relative_position_bias_table, self.grid_size, size)
        return rearrange(table[relative_position_index(size)], "n m h -> 1 h n m")

    def weights(self, scores, bias, scale):
        return (scores * scale + bias).softmax(self.over)

    def forward(self, x, grid):
        q, k, v = rearrange(self.qkv(x), self.split_pattern, three=3, h=self.num_heads)
        scale = (self.width or (lambda d, heads: d))(q.shape[-1], self.num_heads) ** -0.5
        out = self.weights(q @ k.mT, self.bias(grid[:2]), scale) @ v
        out = rearrange(out, "b h n d -> b n (h d)")
        return self.proj(out) if self.projects else out


@relative_attention.mistake("no-bias", "the bias is never added: the tokens have no order")
class _(_WrongRelative):
    def bias(self, size):
        return 0.0


@relative_attention.mistake(
    "bias-after-softmax", "the bias is added to the weights, behind the softmax: they no longer sum to one"
)
class _(_WrongRelative):
    def weights(self, scores, bias, scale):
        return (scores * scale).softmax(-1) + bias


@relative_attention.mistake(
    "bias-scaled", "the bias is scaled along with q·k; it is learnt, and joins the sum as it is"
)
class _(_WrongRelative):
    def weights(self, scores, bias, scale):
        return ((scores + bias) * scale).softmax(-1)


@relative_attention.mistake(
    "bias-transposed", "query and key are exchanged in the bias: each pair looks up the opposite offset"
)
class _(_WrongRelative):
    def bias(self, size):
        return super().bias(size).mT


@relative_attention.mistake(
    "bias-multiplied", "the bias multiplies the scores, as a gate would; it is a preference of its own, and is added"
)
class _(_WrongRelative):
    def weights(self, scores, bias, scale):
        return (scores * scale * bias).softmax(-1)


@relative_attention.mistake(
    "softmax-over-queries", "the softmax runs over the queries; each query divides its attention"
)
class _(_WrongRelative):
    over = -2


@relative_attention.mistake("no-scale", "the scores are not scaled: they grow with the width of a head")
class _(_WrongRelative):
    width = staticmethod(lambda d, heads: 1)


@relative_attention.mistake(
    "scale-of-all-heads", "the scale is that of all heads together; a score is a product over the width of one head"
)
class _(_WrongRelative):
    width = staticmethod(lambda d, heads: d * heads)


@relative_attention.mistake(
    "heads-outermost",
    "the projection is cut into heads first and into q, k, v inside each: q, k and v each should come whole, then head by head",
)
class _(_WrongRelative):
    split_pattern = "b n (h three d) -> three b h n d"


@relative_attention.mistake("no-projection", "the last projection is missing: without it the heads never mix")
class _(_WrongRelative):
    projects = False


# --------------------------------------------------------------------------------------------------------------- model


@check(
    "hybrid.CoAtNet",
    reference="vitcourse.hybrid.CoAtNet",
    level=4,
    minutes=25,
    why="One string decides what kind of network this is, from a pure convolutional one to a transformer with a pyramid.",
    hints=[
        "A stage is nn.Sequential(first, *rest). Only the first block shrinks the map and widens the channels.",
        "A transformer block needs to know its map: that of the stage's output. Divide before you build.",
        "Channels of the next stage's input are those of this stage's output. After the last: mean over the places, norm, "
        "pre_logits, head.",
    ],
)
def coatnet(rng):
    yield build(
        img_size=16, in_chans=2, num_classes=5, stem_dim=4, embed_dim=(6, 8), depths=(2, 1), layout="CT",
        stem_stride=1, strides=(2, 2), head_dim=2,
    ).call(rng.normal(3, 2, 16, 16))  # fmt: skip
    yield (
        build(
            img_size=8, in_chans=1, num_classes=3, stem_dim=2, embed_dim=(6, 4, 12), depths=(2, 1, 2), layout="TCT",
            stem_stride=2, strides=(1, 2, 1), head_dim=3, downsample="depthwise",
        )
        .call(rng.normal(2, 1, 8, 8))
        .on("T-C-T")
    )  # fmt: skip
    yield (
        build(
            img_size=8, in_chans=3, num_classes=4, stem_dim=4, embed_dim=(4, 8), depths=(1, 2), layout="CC",
            stem_stride=1, strides=(1, 2), head_dim=4,
        )
        .call(rng.normal(1, 3, 8, 12))
        .on("an image that is not square")
    )  # fmt: skip


class _WrongCoAtNet(hybrid.CoAtNet):
    """Stages and head in steps, each of which a mistake may replace."""

    def __init__(
        self, img_size, in_chans, num_classes, stem_dim, embed_dim, depths, layout, stem_stride, strides, head_dim,
        downsample="expand",
    ):  # fmt: skip
        super().__init__(
            img_size,
            in_chans,
            num_classes,
            stem_dim,
            embed_dim,
            depths,
            layout,
            stem_stride,
            strides,
            head_dim,
            downsample,
        )
        self.stages, self.downsample = nn.ModuleList(), downsample
        side, width = img_size // stem_stride, stem_dim
        for letter, dim, depth, stride in zip(layout, embed_dim, depths, strides, strict=True):
            steps = self.steps_of(depth, stride)
            blocks = [
                self.block(letter, width if i == 0 else dim, dim, step, self.grid(side, stride))
                for i, step in enumerate(steps)
            ]
            self.stages.append(nn.Sequential(*blocks))
            side, width = side // stride, dim

    def steps_of(self, depth, stride):
        return [stride] + [1] * (depth - 1)

    def grid(self, side, stride):
        return side // stride, side // stride

    def heads(self, dim):
        return dim // self.head_dim

    def block(self, letter, in_dim, dim, stride, grid):
        if letter == "C":
            return hybrid.MBConv(in_dim, dim, stride, self.downsample)
        return hybrid.RelativeBlock(in_dim, dim, self.heads(dim), grid, stride)

    def pool(self, x):
        return self.norm(x.mean(dim=(2, 3)))

    def hidden(self, x):
        return self.pre_logits(x)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.hidden(self.pool(x)))


@coatnet.mistake("letters-exchanged", "C and T are exchanged: C stands for convolution")
class _(_WrongCoAtNet):
    def block(self, letter, *args):
        return super().block("TC"["CT".index(letter)], *args)


@coatnet.mistake(
    "shrinks-in-every-block", "every block of a stage shrinks the map; only the first one does, the others keep it"
)
class _(_WrongCoAtNet):
    def steps_of(self, depth, stride):
        return [stride] * depth


@coatnet.mistake("shrinks-last", "the last block of a stage shrinks the map, so the others work on the larger one")
class _(_WrongCoAtNet):
    def steps_of(self, depth, stride):
        return [1] * (depth - 1) + [stride]


@coatnet.mistake(
    "grid-of-the-input", "the tables of offsets are made for the map that enters the stage, not for the one attended to"
)
class _(_WrongCoAtNet):
    def grid(self, side, stride):
        return side, side


@coatnet.mistake("one-block-a-stage", "each stage has a single block, whatever its depth says")
class _(_WrongCoAtNet):
    def steps_of(self, depth, stride):
        return [stride]


@coatnet.mistake(
    "heads-for-their-width", "head_dim is how wide a head is; here it is taken for how many there are",
)  # fmt: skip
class _(_WrongCoAtNet):
    def heads(self, dim):
        return self.head_dim


@coatnet.mistake(
    "default-downsample",
    "the choice of where an MBConv block has its stride is not passed on: the default is always used",
)
class _(_WrongCoAtNet):
    def block(self, letter, in_dim, dim, stride, grid):
        if letter == "C":
            return hybrid.MBConv(in_dim, dim, stride)
        return super().block(letter, in_dim, dim, stride, grid)


@coatnet.mistake(
    "norm-before-the-mean", "every place is normalised before they are averaged; here the mean itself is normalised"
)
class _(_WrongCoAtNet):
    def pool(self, x):
        return self.norm(x.movedim(1, -1)).mean(dim=(1, 2))


@coatnet.mistake("no-final-norm", "the norm before the head is missing")
class _(_WrongCoAtNet):
    def pool(self, x):
        return x.mean(dim=(2, 3))


@coatnet.mistake("max-over-places", "the head sees the largest value of each channel; it is their mean that counts")
class _(_WrongCoAtNet):
    def pool(self, x):
        return self.norm(x.amax(dim=(2, 3)))


@coatnet.mistake("no-hidden-layer", "the hidden layer between the mean and the head is skipped")
class _(_WrongCoAtNet):
    def hidden(self, x):
        return x


# ------------------------------------------------------------------------------------------------------------- moving


@check(
    "hybrid.shift_consistency",
    reference="vitcourse.course.checks.hybrid.shift_consistency",
    level=2,
    minutes=15,
    why="Accuracy on centred pictures cannot tell whether a model minds where things are. This can, without any label.",
    hints=[
        "Compare predictions with predictions: what the model says now, and what it says when the picture has moved.",
        "F.pad takes negative numbers, too: they crop. Two pixels more on the left and two fewer on the right move the "
        "picture to the right.",
        "Four directions, and the mean over all pictures and all directions, as a Python float: .item().",
    ],
)
def shift_consistency_cases(rng):
    for pixels, label in ((2, "two pixels"), (1, "one pixel")):
        images, weights = rng.normal(150, 2, 6, 5), rng.normal(60, 4)
        yield call(lambda x, w=weights: x.flatten(1) @ w.to(x), images, pixels).on(label)
    images, weights = rng.uniform(90, 1, 5, 7), rng.normal(7, 3)
    yield call(lambda x, w=weights: x.mean(dim=(1, 2)) @ w.to(x), images, 3).on("a model that hardly looks at rows")


def _share(moves, judge=lambda still, moved: (moved.argmax(-1) == still.argmax(-1)).double().mean()):
    """A faulty consistency: other moves, or another comparison of logits (4, B, classes) with those of still pictures."""

    def faulty(model, images, pixels):
        return float(judge(model(images), torch.stack([model(one) for one in moves(images, pixels)])))

    return faulty


def _four(images, pixels):
    return [F.pad(images, border) for border in _borders(pixels)]


shift_consistency_cases.mistake(
    "rolled",
    "what leaves the picture on one side comes back on the other; it should be lost, and zeros come in",
    _share(lambda x, p: [x.roll(by, axis) for by in (p, -p) for axis in (2, 3)]),
)
shift_consistency_cases.mistake(
    "border-repeated",
    "the border is repeated where the picture has moved away; zeros should come in",
    _share(
        lambda x, p: [
            F.pad(x, [max(b, 0) for b in border], mode="replicate")[..., max(-border[2], 0) :, max(-border[0], 0) :][
                ..., : x.shape[2], : x.shape[3]
            ]
            for border in _borders(p)
        ]
    ),
)
shift_consistency_cases.mistake(
    "diagonal",
    "the pictures move along the diagonals: rows and columns at once",
    _share(lambda x, p: [F.pad(x, (a, -a, d, -d)) for a in (p, -p) for d in (p, -p)]),
)
shift_consistency_cases.mistake(
    "one-pixel", "the pictures move by one pixel, whatever was asked for", _share(lambda x, p: _four(x, 1))
)
shift_consistency_cases.mistake(
    "right-and-down-only",
    "the pictures only move right and down; a model may well take the other two directions differently",
    _share(lambda x, p: _four(x, p)[::2]),
)
shift_consistency_cases.mistake(
    "all-four-at-once",
    "a prediction counts only if it withstands all four moves; the mean over the moves was asked for",
    _share(_four, lambda still, moved: (moved.argmax(-1) == still.argmax(-1)).all(0).double().mean()),
)
shift_consistency_cases.mistake(
    "changed-not-kept",
    "this is the share of predictions that change",
    _share(_four, lambda still, moved: (moved.argmax(-1) != still.argmax(-1)).double().mean()),
)
shift_consistency_cases.mistake(
    "logits-compared",
    "the logits themselves are compared; they change with every move, even where the answer stays",
    _share(_four, lambda still, moved: (moved == still).double().mean()),
)
