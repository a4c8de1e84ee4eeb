"""The check of `hybrid.SqueezeExcite`."""

from einops import rearrange

from vitcourse import hybrid
from vitcourse.course.checks import build, check


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
