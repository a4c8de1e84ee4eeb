"""The check of `hybrid.RelativeAttention`."""

from einops import rearrange

from vitcourse import hybrid
from vitcourse.course.checks import build, check
from vitcourse.hierarchical import relative_position_index

from .resize_bias_table import resize_bias_table


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
