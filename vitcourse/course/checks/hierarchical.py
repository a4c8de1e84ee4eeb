"""Checks of lesson 01: windows, their shift and its mask, and the Swin Transformer made of them."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vitcourse import hierarchical
from vitcourse.course.checks import build, call, check
from vitcourse.vit import PatchEmbed

# ---------------------------------------------------------------------------------------------------------- windows


@check(
    "hierarchical.window_partition",
    reference="vitcourse.hierarchical.window_partition",
    level=1,
    minutes=10,
    why="Attention inside windows starts with cutting the map, and every later step relies on the order of the pieces.",
    hints=[
        "Each side of the map splits in two: which window, and which place inside the window.",
        "Windows join the batch: all windows of the first image come first, then those of the second.",
        "Read the wanted order off the shape: (image · row of windows · column of windows), then (row in the window · "
        "column in the window), then the channels.",
    ],
)
def window_partition(rng):
    yield call(rng.normal(2, 6, 9, 4), 3)
    yield call(rng.normal(1, 4, 2, 3), 2).on("a batch of one")
    yield call(rng.strided(3, 4, 8, 5), 4).on("a non-contiguous map")


def _cut(pattern):
    return lambda x, window_size: rearrange(x, pattern, p=window_size, q=window_size)


window_partition.mistake(
    "column-major",
    "the windows follow each other down the columns; they should be read like a page, row by row",
    _cut("b (i p) (j q) c -> (b j i) (p q) c"),
)
window_partition.mistake(
    "transposed-window",
    "inside a window the tokens are read column by column",
    _cut("b (i p) (j q) c -> (b i j) (q p) c"),
)
window_partition.mistake(
    "scattered",
    "a window gathers tokens from all over the map: the two halves of a split side are in the wrong order",
    _cut("b (p i) (q j) c -> (b i j) (p q) c"),
)
window_partition.mistake(
    "batch-inside",
    "the windows of different images take turns; an image should be finished before the next one begins",
    _cut("b (i p) (j q) c -> (i j b) (p q) c"),
)
window_partition.mistake(
    "window-not-flat",
    "each window still is a small map; attention wants its tokens in one sequence",
    _cut("b (i p) (j q) c -> (b i j) p q c"),
)
window_partition.mistake(
    "plain-reshape",
    "a reshape alone cuts the map's memory into equal stretches, not into squares",
    lambda x, window_size: x.reshape(-1, window_size**2, x.shape[-1]),
)


@check(
    "hierarchical.window_reverse",
    reference="vitcourse.hierarchical.window_reverse",
    level=2,
    minutes=10,
    why="What attention has changed must return to the very place it came from.",
    hints=[
        "It is the pattern of window_partition, read from right to left.",
        "einops cannot guess how many windows lie side by side: work it out from the size of the map.",
        "How many images there are need not be told: it is what is left of the first axis.",
    ],
)
def window_reverse(rng):
    yield call(rng.normal(2 * 2 * 3, 9, 4), 3, (6, 9))
    yield call(rng.normal(2, 4, 3), 2, (4, 2)).on("a batch of one")
    yield call(rng.strided(3 * 2, 16, 5), 4, (4, 8)).on("non-contiguous windows")


def _put_back(pattern):
    def put_back(windows, window_size, size):
        sides = {"i": size[0] // window_size, "j": size[1] // window_size, "p": window_size, "q": window_size}
        return rearrange(windows, pattern, **sides)

    return put_back


window_reverse.mistake(
    "column-major",
    "the windows are laid down column by column; they come row by row",
    _put_back("(b j i) (p q) c -> b (i p) (j q) c"),
)
window_reverse.mistake(
    "transposed-window",
    "each window is mirrored at its diagonal: its tokens come row by row",
    _put_back("(b i j) (q p) c -> b (i p) (j q) c"),
)
window_reverse.mistake(
    "scattered",
    "the tokens of a window are spread over the whole map: a side is joined in the wrong order",
    _put_back("(b i j) (p q) c -> b (p i) (q j) c"),
)
window_reverse.mistake(
    "batch-inside",
    "windows of one image end up in another: images are the slowest part of the first axis",
    _put_back("(i j b) (p q) c -> b (i p) (j q) c"),
)
window_reverse.mistake(
    "size-exchanged",
    "rows and columns of the map are exchanged, which square maps would hide",
    lambda windows, window_size, size: _put_back("(b i j) (p q) c -> b (i p) (j q) c")(
        windows, window_size, size[::-1]
    ),
)
window_reverse.mistake(
    "plain-reshape",
    "a reshape alone lays the windows down like text, one after the other, not as squares",
    lambda windows, window_size, size: windows.reshape(-1, *size, windows.shape[-1]),
)


# ------------------------------------------------------------------------------------------------------ shifted windows


@check(
    "hierarchical.shift_mask",
    reference="vitcourse.hierarchical.shift_mask",
    level=4,
    minutes=25,
    why="After the roll, tokens from opposite borders share a window. Without the mask they would take each other for "
    "neighbours.",
    hints=[
        "Look at the rolled map along one axis: its last tokens, as many as the shift, were rolled there from the other "
        "end. Which two tokens of a window are strangers?",
        "A token has two answers: did it go around the edge along the rows, and along the columns? Strangers differ in "
        "at least one of them.",
        "Number the four kinds of token on the rolled map, cut that map of numbers into windows, and compare every "
        "number of a window with every other.",
    ],
)
def shift_mask(rng):
    yield call((6, 9), (3, 3), (1, 1))
    yield call((4, 8), (4, 4), (3, 3)).on("a single row of windows")
    yield call((4, 6), (2, 3), (1, 2)).on("windows that are not square")
    yield call((8, 4), (4, 4), (0, 1)).on("a shift along one axis only")


def _differ(region, window_size):
    """(H, W) numbers of a kind to (windows, N, N): who is not of one kind."""
    region = rearrange(region, "(i p) (j q) -> (i j) (p q)", p=window_size[0], q=window_size[1])
    return region[:, :, None] != region[:, None]


def _wrapped(size, shift):
    """For each row, and for each column, of the rolled map: did it go around the edge?"""
    return (torch.arange(n) >= n - s for n, s in zip(size, shift, strict=True))


def _mask(size, window_size, shift):
    down, across = _wrapped(size, shift)
    return _differ(2 * down[:, None] + across, window_size)


shift_mask.mistake(
    "inverted",
    "true and false are exchanged: here true marks who must not be seen",
    lambda size, window_size, shift: ~_mask(size, window_size, shift),
)
shift_mask.mistake(
    "nobody-masked",
    "no pair at all is kept apart, so the opposite borders of the image still see each other",
    lambda size, window_size, shift: torch.zeros_like(_mask(size, window_size, shift)),
)
shift_mask.mistake(
    "additive",
    "these are numbers to add to the scores; what is wanted is the mask itself, true or false",
    lambda size, window_size, shift: _mask(size, window_size, shift) * -100.0,
)
shift_mask.mistake(
    "other-direction",
    "the cut through the last windows is where a roll in the other direction would put it",
    lambda size, window_size, shift: _mask(
        size, window_size, [(w - s) % w for w, s in zip(window_size, shift, strict=True)]
    ),
)


@shift_mask.mistake(
    "before-the-roll", "this is the mask of the map before it was rolled: the strangers sit elsewhere by then"
)
def _(size, window_size, shift):
    down, across = (torch.arange(n) < s for n, s in zip(size, shift, strict=True))
    return _differ(2 * down[:, None] + across, window_size)


@shift_mask.mistake("rows-only", "only strangers along the rows are kept apart; the roll goes along both axes")
def _(size, window_size, shift):
    down, across = _wrapped(size, shift)
    return _differ(down[:, None] | torch.zeros_like(across), window_size)


@shift_mask.mistake("columns-only", "only strangers along the columns are kept apart; the roll goes along both axes")
def _(size, window_size, shift):
    down, across = _wrapped(size, shift)
    return _differ(torch.zeros_like(down)[:, None] | across, window_size)


@shift_mask.mistake(
    "two-kinds",
    "in the corner four kinds of token meet, from the four corners of the image; here some of them are still mixed up",
)
def _(size, window_size, shift):
    down, across = _wrapped(size, shift)
    return _differ(down[:, None] | across, window_size)


@shift_mask.mistake(
    "plain-reshape", "the kinds are right, but cut into equal stretches of memory; windows are squares of the map"
)
def _(size, window_size, shift):
    down, across = _wrapped(size, shift)
    region = (2 * down[:, None] + across).reshape(-1, window_size[0] * window_size[1])
    return region[:, :, None] != region[:, None]


# ----------------------------------------------------------------------------------------------------------- positions


@check(
    "hierarchical.relative_position_index",
    reference="vitcourse.hierarchical.relative_position_index",
    level=3,
    minutes=20,
    why="Swin has no other positions: what a token knows of its neighbours' places, it knows from this table.",
    hints=[
        "For each pair of tokens you need two numbers: how many rows lie between them, and how many columns. Query minus "
        "key.",
        "Distances may be negative, row numbers of a table may not: let each axis start at 0.",
        "It is the numbering of a grid: the table's grid is (2p − 1) high, and how wide?",
    ],
)
def relative_position_index(rng):
    yield call((2, 3))
    yield call((3, 3)).on("a square window")
    yield call((1, 4)).on("a single row")
    yield call((4, 2)).on("a tall window")


def _distances(window_size):
    """Rows and columns between query and key, each (N, N)."""
    rows, columns = torch.meshgrid(*map(torch.arange, window_size), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    return rows[:, None] - rows, columns[:, None] - columns


def _catalogue_index(key, message, number):
    def faulty(window_size):
        return number(*_distances(window_size), *window_size)

    relative_position_index.mistake(key, message, faulty)


_catalogue_index(
    "key-minus-query",
    "left and right are exchanged, and so are above and below: each pair looks up the opposite distance",
    lambda down, across, p, q: (p - 1 - down) * (2 * q - 1) + q - 1 - across,
)
_catalogue_index(
    "from-below-zero",
    "some numbers are negative, which wraps around to the table's other end without an error",
    lambda down, across, p, q: down * (2 * q - 1) + across,
)
_catalogue_index(
    "sum-of-axes",
    "the distances along both axes are added, so that one down and one right count the same as two down",
    lambda down, across, p, q: down + p - 1 + across + q - 1,
)
_catalogue_index(
    "as-wide-as-the-window",
    "distances overlap: there are more of them along an axis than there are tokens",
    lambda down, across, p, q: (down + p - 1) * q + across + q - 1,
)
_catalogue_index(
    "height-for-width",
    "height and width of the window are mixed up, which square windows hide",
    lambda down, across, p, q: (down + p - 1) * (2 * p - 1) + across + q - 1,
)
_catalogue_index(
    "columns-first",
    "the table is numbered column by column; the pretrained tables are numbered row by row",
    lambda down, across, p, q: (across + q - 1) * (2 * p - 1) + down + p - 1,
)
_catalogue_index(
    "without-sign",
    "only how far counts here, not in which direction: left and right share an entry",
    lambda down, across, p, q: down.abs() * (2 * q - 1) + across.abs(),
)
_catalogue_index(
    "pairs-not-numbers",
    "these are the two distances of each pair; they still have to become one number",
    lambda down, across, p, q: torch.stack([down + p - 1, across + q - 1], dim=-1),
)


# ----------------------------------------------------------------------------------------------------------- attention


@check(
    "hierarchical.WindowAttention",
    reference="vitcourse.hierarchical.WindowAttention",
    level=4,
    minutes=30,
    why="This is Swin: attention at a cost that grows with the area of the image, and windows that talk to each other.",
    hints=[
        "Seven steps: map, roll, windows, attention with bias, map, roll back, sequence. The first three undo the last "
        "three.",
        "The bias is (heads, N, N) for all windows alike. The mask is (windows, N, N) for all heads alike. An axis of "
        "size 1 in the right place lets them meet.",
        "Scores of −inf have a weight of zero after the softmax. The windows of all images are one batch, image after "
        "image, so biases and masks repeat once for every image.",
    ],
)
def window_attention(rng):
    yield build(12, 3, window_size=3, shift_size=1).call(rng.normal(2, 54, 12), (6, 9, 0))
    yield build(8, 2, window_size=2, shift_size=0).call(rng.normal(3, 8, 8), (4, 2, 0)).on("regular windows")
    yield build(6, 1, window_size=4, shift_size=3).call(rng.normal(1, 32, 6), (4, 8, 0)).on("a batch of one")


class _WrongWindows(hierarchical.WindowAttention):
    """Window attention in its steps, each of which a mistake may replace."""

    split_pattern = "b n (three h d) -> three b h n d"
    scaled = projects = True
    there, back = -1, 1  # direction of the rolls

    def bias(self):
        index = hierarchical.relative_position_index(self.window_size)
        return rearrange(self.relative_position_bias_table[index], "n m h -> 1 h n m")

    def mask(self, h, w, batch):
        return _mask((h, w), self.window_size, self.shift_size).repeat(batch, 1, 1)

    def weights(self, scores, mask):
        return scores.masked_fill(mask[:, None], float("-inf")).softmax(-1)

    def forward(self, x, grid):
        (h, w, _), p, s = grid, self.window_size[0], self.shift_size[0]
        x = rearrange(x, "b (h w) d -> b h w d", h=h).roll((self.there * s, self.there * s), (1, 2))
        windows = hierarchical.window_partition(x, p)
        q, k, v = rearrange(self.qkv(windows), self.split_pattern, three=3, h=self.num_heads)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scaled else 1.0) + self.bias()
        out = rearrange(self.weights(scores, self.mask(h, w, len(x))) @ v, "b h n d -> b n (h d)")
        out = self.proj(out) if self.projects else out
        out = hierarchical.window_reverse(out, p, (h, w)).roll((self.back * s, self.back * s), (1, 2))
        return out.flatten(1, 2)


@window_attention.mistake(
    "no-mask", "tokens from opposite borders of the image attend to each other: nothing keeps the strangers apart"
)
class _(_WrongWindows):
    def weights(self, scores, mask):
        return scores.softmax(-1)


@window_attention.mistake("no-bias", "the position bias is never added: inside a window the tokens have no order")
class _(_WrongWindows):
    def bias(self):
        return 0.0


@window_attention.mistake("not-rolled-back", "the output lies on the rolled map: every token is in a neighbour's place")
class _(_WrongWindows):
    back = 0


@window_attention.mistake(
    "rolled-the-wrong-way", "the map is rolled in one direction, and the mask is made for the other"
)
class _(_WrongWindows):
    there, back = 1, -1


@window_attention.mistake(
    "not-rolled", "the windows are never displaced, though the mask believes so: they stay islands"
)
class _(_WrongWindows):
    there = back = 0


@window_attention.mistake(
    "masked-after-softmax",
    "the weights of strangers are removed after the softmax, so what is left no longer sums to one",
)
class _(_WrongWindows):
    def weights(self, scores, mask):
        return scores.softmax(-1).masked_fill(mask[:, None], 0.0)


@window_attention.mistake(
    "masks-in-the-wrong-order",
    "windows get the masks of other windows: the batch runs through all windows of an image before the next image",
)
class _(_WrongWindows):
    def mask(self, h, w, batch):
        return _mask((h, w), self.window_size, self.shift_size).repeat_interleave(batch, 0)


@window_attention.mistake(
    "bias-transposed", "query and key are exchanged in the bias: a token looks up the distance in the other direction"
)
class _(_WrongWindows):
    def bias(self):
        return super().bias().mT


@window_attention.mistake("no-scale", "the scores are not scaled: they grow with the width of a head")
class _(_WrongWindows):
    scaled = False


@window_attention.mistake(
    "heads-outermost",
    "the projection is cut into heads first and into q, k, v inside each: q, k and v each should come whole, then head by head",
)
class _(_WrongWindows):
    split_pattern = "b n (h three d) -> three b h n d"


@window_attention.mistake("no-projection", "the last projection is missing: without it the heads never mix")
class _(_WrongWindows):
    projects = False


# ----------------------------------------------------------------------------------------------------- between stages


@check(
    "hierarchical.PatchMerging",
    reference="vitcourse.hierarchical.PatchMerging",
    level=2,
    minutes=15,
    why="This makes the pyramid: half the side, twice the channels, and the next windows see four times the area.",
    hints=[
        "Two sides split in two once more; this time the inner halves join the channels.",
        "The order of the four neighbours: top left, bottom left, top right, bottom right. Pretrained weights rely on it.",
        "F.pad counts from the last axis: (0, 0) for the channels, then (left, right), then (top, bottom).",
    ],
)
def patch_merging(rng):
    yield build(3).call(rng.normal(2, 4, 6, 3))
    yield build(4).call(rng.normal(1, 5, 3, 4)).on("odd sides")
    yield build(2).call(rng.strided(3, 2, 7, 2)).on("one odd side")


def _even(x):
    return F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))


class _WrongMerging(hierarchical.PatchMerging):
    """Patch merging with another way of gathering the neighbours."""

    pattern = "b (h p) (w q) c -> b h w (q p c)"

    def gather(self, x):
        return rearrange(_even(x), self.pattern, p=2, q=2)


@patch_merging.mistake(
    "reading-order", "the four neighbours are taken row by row; the pretrained weights expect them column by column"
)
class _(_WrongMerging):
    pattern = "b (h p) (w q) c -> b h w (p q c)"


@patch_merging.mistake(
    "channels-outermost",
    "the same channel of the four neighbours lies side by side; a neighbour should stay in one piece",
)
class _(_WrongMerging):
    pattern = "b (h p) (w q) c -> b h w (c q p)"


@patch_merging.mistake(
    "distant-tokens", "the four tokens that are merged are no neighbours: they come from the four quarters of the map"
)
class _(_WrongMerging):
    pattern = "b (p h) (q w) c -> b h w (q p c)"


@patch_merging.mistake("odd-cropped", "the last row or column of a map with an odd side is lost")
class _(_WrongMerging):
    def gather(self, x):
        return super().gather(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])


@patch_merging.mistake(
    "padded-in-front", "the zeros stand above and on the left, which moves the whole map; they belong behind"
)
class _(_WrongMerging):
    def gather(self, x):
        return super().gather(F.pad(x, (0, 0, x.shape[2] % 2, 0, x.shape[1] % 2, 0)))


@patch_merging.mistake("no-norm", "the gathered neighbours are projected without being normalised first")
class _(_WrongMerging):
    def forward(self, x):
        return self.reduction(self.gather(x))


@patch_merging.mistake(
    "norm-of-the-result",
    "the norm sits behind the projection, as in Swin V2; here it comes before, where the token is 4C wide",
)
class _(_WrongMerging):
    def __init__(self, dim):
        super().__init__(dim)
        self.norm = nn.LayerNorm(2 * dim)


@patch_merging.mistake("with-bias", "the projection has a bias, which no pretrained checkpoint has a value for")
class _(_WrongMerging):
    def __init__(self, dim):
        super().__init__(dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim)


# --------------------------------------------------------------------------------------------------------------- model


@check(
    "hierarchical.SwinTransformer",
    reference="vitcourse.hierarchical.SwinTransformer",
    level=4,
    minutes=25,
    why="The parts are simple; what makes Swin is which block gets which windows.",
    hints=[
        "Blocks come in pairs: regular windows first, then displaced by half a window, rounded down.",
        "A map that fits into one window needs no displacement, and no larger window than itself.",
        "forward: embed; in each stage merge first, flatten the map, run the blocks with their grid (h, w, 0), and make it "
        "a map again; norm; mean over the map; head.",
    ],
)
def swin_transformer(rng):
    sizes = {"patch_size": 2, "embed_dim": 4, "num_heads": (1, 2)}
    yield build(img_size=16, in_chans=2, num_classes=5, depths=(3, 2), window_size=4, **sizes).call(
        rng.normal(3, 2, 16, 16)
    )
    yield (
        build(img_size=12, in_chans=1, num_classes=3, depths=(2, 2), window_size=6, **sizes)
        .call(rng.normal(1, 1, 12, 12))
        .on("maps no larger than a window")
    )


class _WrongSwin(hierarchical.SwinTransformer):
    """The model in its steps, each of which a mistake may replace."""

    def pool(self, x):
        return self.norm(x).mean(dim=(1, 2))

    def forward(self, x):
        x = self.embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.head(self.pool(x))


def _displace(model, rule):
    """Give each block the shift ``rule(number of the block in its stage, its window, its shift)``."""
    for stage in model.layers:
        for i, step in enumerate(stage.blocks):
            step.attn.shift_size = (rule(i, step.attn.window_size[0], step.attn.shift_size[0]),) * 2


@swin_transformer.mistake("never-shifted", "no block displaces its windows: they stay islands until patches are merged")
class _(_WrongSwin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _displace(self, lambda i, window, shift: 0)


class _Shifting(_WrongSwin):
    """Shifts that follow ``rule`` where a stage has more than one window."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        size, most = kwargs["img_size"] // kwargs["patch_size"], kwargs["window_size"]
        for stage in self.layers:
            for i, step in enumerate(stage.blocks):
                shift = self.rule(i, step.attn.window_size[0]) if size > most or self.everywhere else 0
                step.attn.shift_size = (shift, shift)
            size = -(-size // 2)

    everywhere = False


@swin_transformer.mistake(
    "shifted-first",
    "the first block of a pair has displaced windows and the second regular ones; it should be the reverse",
)
class _(_Shifting):
    def rule(self, i, window):
        return 0 if i % 2 else window // 2


@swin_transformer.mistake(
    "always-shifted", "all blocks displace their windows alike, so again the same borders separate the same tokens"
)
class _(_Shifting):
    def rule(self, i, window):
        return window // 2


@swin_transformer.mistake(
    "shifted-single-window",
    "where one window holds the whole map it is displaced too: the mask then cuts into pieces what could be seen at once",
)
class _(_Shifting):
    everywhere = True

    def rule(self, i, window):
        return window // 2 if i % 2 else 0


@swin_transformer.mistake(
    "window-not-shrunk",
    "windows may become larger than the map: the table of positions is then larger than any distance",
)
class _(_WrongSwin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for stage in self.layers:
            for step in stage.blocks:
                mixer = step.attn
                step.attn = hierarchical.WindowAttention(
                    mixer.qkv.in_features,
                    mixer.num_heads,
                    window_size=kwargs["window_size"],
                    shift_size=mixer.shift_size,
                )


@swin_transformer.mistake("no-final-norm", "the final norm is missing: nothing else tames the residual sum")
class _(_WrongSwin):
    def pool(self, x):
        return x.mean(dim=(1, 2))


@swin_transformer.mistake("norm-after-the-mean", "the mean is normalised; here each token is, before they are averaged")
class _(_WrongSwin):
    def pool(self, x):
        return self.norm(x.mean(dim=(1, 2)))


@swin_transformer.mistake(
    "first-token", "the head reads the first token; there is no [CLS] here, all tokens are averaged"
)
class _(_WrongSwin):
    def pool(self, x):
        return self.norm(x)[:, 0, 0]


@swin_transformer.mistake(
    "patches-unnormed", "the patch embedding has no norm of its own, which Swin's has: two parameters are missing"
)
class _(_WrongSwin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.patch_embed = PatchEmbed(self.patch_size, self.in_chans, self.embed_dim)


@swin_transformer.mistake(
    "merged-last", "a stage ends with patch merging; in the names of the checkpoints the next stage begins with it"
)
class _(_WrongSwin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for stage, after in zip(self.layers[:-1], self.layers[1:], strict=True):
            stage.downsample, after.downsample = after.downsample, nn.Identity()
