"""The check of `hierarchical.WindowAttention`."""

from einops import rearrange

from vitcourse import hierarchical
from vitcourse.course.checks import build, check

from ._shared import mask_of


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
    yield build(8, 2, window_size=2, shift_size=0).call(rng.normal(3, 32, 8), (8, 4, 0)).on("regular windows")
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
        return mask_of((h, w), self.window_size, self.shift_size).repeat(batch, 1, 1)

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
        return mask_of((h, w), self.window_size, self.shift_size).repeat_interleave(batch, 0)


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
