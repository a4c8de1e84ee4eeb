"""The check of `vit.Attention`."""

from einops import rearrange

from vitcourse import vit
from vitcourse.course.checks import build, check

from ._shared import scores


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
        out = self.join((scores(q, k) * q.shape[-1] ** self.scale_power).softmax(self.softmax_axis) @ v)
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
        return self.proj(self.join((scores(q, k) * x.shape[-1] ** -0.5).softmax(-1) @ v))


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
