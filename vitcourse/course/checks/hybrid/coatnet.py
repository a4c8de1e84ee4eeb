"""The check of `hybrid.CoAtNet`."""

from torch import nn

from vitcourse import hybrid
from vitcourse.course.checks import build, check


@check(
    "hybrid.CoAtNet",
    reference="vitcourse.hybrid.CoAtNet",
    level=4,
    minutes=25,
    blanks=2,
    why="One string decides what kind of network this is, from a pure convolutional one to a transformer with a pyramid.",
    hints=[
        "A stage is nn.Sequential(first, *rest). Only the first block shrinks the map and widens the channels.",
        "A transformer block needs to know its map: that of the stage's output. Divide before you build.",
        "Channels of the next stage's input are those of this stage's output. After the last: mean over the places, norm, "
        "pre_logits, head.",
    ],
    exempt={
        "odd": "its strides halve the map",
    },
)
def coatnet(rng):
    yield build(
        img_size=16, in_chans=2, num_classes=5, stem_dim=4, embed_dim=(6, 8), depths=(3, 1), layout="CT",
        stem_stride=1, strides=(2, 2), head_dim=2,
    ).call(rng.normal(3, 2, 16, 16))  # fmt: skip
    yield (
        build(
            img_size=8, in_chans=1, num_classes=3, stem_dim=2, embed_dim=(6, 4, 12), depths=(2, 1, 3), layout="TCT",
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
