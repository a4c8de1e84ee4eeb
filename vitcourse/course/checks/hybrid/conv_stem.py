"""The check of `hybrid.ConvStem`."""

from torch import nn

from vitcourse.course.checks import build, check


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
    exempt={
        "odd": "patch sizes are powers of two here",
    },
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
