"""The check of `vit.Block`."""

from vitcourse import vit
from vitcourse.course.checks import build, check


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
    yield build(12, 3, mlp_ratio=2.0).call(rng.normal(1, 4, 12)).on("a batch of one")


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
