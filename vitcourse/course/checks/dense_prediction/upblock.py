"""The check of `dense_prediction.UpBlock`."""

import torch
import torch.nn.functional as F

from vitcourse.course.checks import build, check
from vitcourse.dense_prediction.unet import UpBlock


@check(
    "dense_prediction.UpBlock",
    reference="vitcourse.dense_prediction.unet.UpBlock",
    level=2,
    minutes=15,
    why="What a thing is, the coarse map knows; where exactly it ends, only the fine one has seen. Here they meet.",
    hints=[
        "Three steps: fewer channels, as many rows and columns as the finer map, the convolutions.",
        "The size comes from the finer map, also where it takes no part: F.interpolate takes a size.",
        "Both maps side by side along the channels, the one from below first; `self.skips` says whether.",
    ],
)
def up_block(rng):
    yield build(6, 4, 3).call(rng.normal(2, 6, 5, 7), rng.normal(2, 3, 10, 14))
    yield build(5, 2, 1).call(rng.normal(1, 5, 4, 3), rng.normal(1, 1, 7, 5)).on("maps of odd sizes")
    yield build(3, 8, 0).call(rng.normal(2, 3, 3, 4), rng.normal(2, 6, 6, 8)).on("a block without a skip connection")
    yield build(4, 16, 16).call(rng.normal(3, 4, 2, 3), rng.normal(3, 16, 8, 12)).on("a step of four")
    yield build(7, 3, 2).train().call(rng.normal(2, 7, 3, 5), rng.normal(2, 2, 6, 10)).on("training")


class _Wrong(UpBlock):
    """How the coarse map is enlarged, and how the two are joined, each of which a mistake may replace."""

    def enlarge(self, x, size):
        return F.interpolate(x, size, mode="bilinear")

    def join(self, x, skip):
        return torch.cat([x, skip], 1)

    def forward(self, x, skip):
        x = self.enlarge(self.reduce(x), skip.shape[-2:])
        return self.block(self.join(x, skip) if self.skips else x)


@up_block.mistake("nearest", "the coarse map is enlarged by repeating its pixels; it should be interpolated bilinearly")
class _(_Wrong):
    def enlarge(self, x, size):
        return F.interpolate(x, size)


@up_block.mistake(
    "align-corners",
    "corners of the maps are laid upon each other, not corners of their pixels: the coarse map is moved a little "
    "everywhere but in the middle",
)
class _(_Wrong):
    def enlarge(self, x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=True)


@up_block.mistake("skip-first", "the two maps are in the wrong order: the one from below comes first")
class _(_Wrong):
    def join(self, x, skip):
        return torch.cat([skip, x], 1)


@up_block.mistake(
    "skip-blank", "the skip connection has no effect: whatever the finer map shows, the result is the same"
)
class _(_Wrong):
    def join(self, x, skip):
        return torch.cat([x, 0 * skip.detach()], 1)


@up_block.mistake("below-blank", "the coarse map has no effect: the result is made of the finer map alone")
class _(_Wrong):
    def join(self, x, skip):
        return torch.cat([0 * x.detach(), skip], 1)


@up_block.mistake("detached", "no gradient goes back through the skip connection: the way down would not learn from it")
class _(_Wrong):
    def join(self, x, skip):
        return torch.cat([x, skip.detach()], 1)


@up_block.mistake("too-small", "the finer map is shrunk to the size of the coarse one; the way up ends where it began")
class _(UpBlock):
    def forward(self, x, skip):
        x = self.reduce(x)
        skip = F.interpolate(skip, x.shape[-2:], mode="bilinear")
        return self.block(torch.cat([x, skip], 1) if self.skips else x)
