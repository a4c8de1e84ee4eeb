"""The check of `hybrid.MBConv`."""

from vitcourse import hybrid
from vitcourse.course.checks import build, check


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
    yield build(4, 7, stride=2).call(rng.normal(3, 4, 6, 8)).on("a block that shrinks the map")
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
