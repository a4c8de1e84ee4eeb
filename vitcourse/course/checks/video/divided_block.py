"""The check of `video.DividedBlock`."""

from dataclasses import replace

import torch
from einops import rearrange, repeat

from vitcourse import video
from vitcourse.course.checks import build, check


@check(
    "video.DividedBlock",
    reference="vitcourse.video.DividedBlock",
    level=4,
    minutes=30,
    why="Frames and places lie behind one another in one axis. Cut it in the wrong order, and the model still runs, "
    "still trains, and looks at tokens that have nothing to do with each other.",
    hints=[
        "Set [CLS] aside. The other tokens are (b, t · n, d), frame by frame; along time each of b · n places is a "
        "sequence of t tokens.",
        "rearrange(patches, 'b (t n) d -> (b n) t d', t=t), then temporal_norm1, temporal_attn, temporal_fc, and back; "
        "what comes out is added to the patches.",
        "In space each of b · t frames is a sequence: a copy of [CLS], then its n patches. Norm, attention with the grid "
        "(h, w, 1).",
        "Of the copies take the mean over the frames. It is added to [CLS] as it came, the rest to the patches that "
        "attention along time has left. The MLP is that of any block.",
    ],
    exempt={
        "larger": "the grid of a clip has four numbers, which the number of tokens must fit; other grids are declared",
        "smaller": "the grid of a clip has four numbers, which the number of tokens must fit; other grids are declared",
    },
)
def divided_block(rng):
    first = build(dim=8, num_heads=2).call(rng.normal(2, 1 + 3 * 4 * 5, 8), (3, 4, 5, 1))
    yield first
    yield build(12, 3).call(rng.normal(1, 1 + 5 * 2 * 3, 12), (5, 2, 3, 1)).on("a batch of one")
    yield build(6, 1).call(rng.normal(3, 1 + 1 * 7 * 2, 6), (1, 7, 2, 1)).on("a clip of one frame")
    yield build(4, 2).call(rng.normal(2, 1 + 7 * 1 * 1, 4), (7, 1, 1, 1)).on("frames of one patch")
    other = build(dim=8, num_heads=2).call(rng.normal(1, 1 + 4 * 5 * 3, 8), (4, 5, 3, 1))
    yield replace(other, earlier=(first,)).on("a second clip, of another grid")


class _Wrong(video.DividedBlock):
    """The block in its steps, each of which a mistake may replace."""

    def columns(self, patches, t):
        return rearrange(patches, "b (t n) d -> (b n) t d", t=t)

    def rows(self, columns, b):
        return rearrange(columns, "(b n) t d -> b (t n) d", b=b)

    def mix(self, columns):
        return self.temporal_fc(self.temporal_attn(self.temporal_norm1(columns)))

    def along_time(self, patches, t):
        return patches + self.rows(self.mix(self.columns(patches, t)), len(patches))

    def frames(self, patches, t):
        return rearrange(patches, "b (t n) d -> (b t) n d", t=t)

    def cls_of(self, frames):
        return frames[:, :, 0].mean(1, keepdim=True)

    def look(self, x, grid):
        return self.attn(self.norm1(x), grid)

    def in_space(self, cls, patches, grid):
        t, *rest = grid
        x = torch.cat([repeat(cls, "b 1 d -> (b t) 1 d", t=t), self.frames(patches, t)], dim=1)
        x = rearrange(self.look(x, tuple(rest)), "(b t) n d -> b t n d", t=t)
        return torch.cat([self.cls_of(x), x[:, :, 1:].flatten(1, 2)], dim=1)

    def forward(self, x, grid):
        cls, patches = x[:, :1], self.along_time(x[:, 1:], grid[0])
        x = torch.cat([cls, patches], dim=1) + self.in_space(cls, patches, grid)
        return x + self.mlp(self.norm2(x))


@divided_block.mistake(
    "frames-mixed",
    "the tokens are cut into stretches of t that follow each other in a frame, not into the t frames of a place; along "
    "time a patch then looks at other places",
)
class _(_Wrong):
    def columns(self, patches, t):
        return patches.reshape(-1, t, patches.shape[-1])

    def rows(self, columns, b):
        return columns.reshape(b, -1, columns.shape[-1])


@divided_block.mistake(
    "way-back-mixed",
    "attention along time is right, but on the way back a reshape puts what a patch has found to another place and frame",
)
class _(_Wrong):
    def rows(self, columns, b):
        return columns.reshape(b, -1, columns.shape[-1])


@divided_block.mistake(
    "cls-of-the-first", "of [CLS] the copy in the first frame is kept; the others have seen their frames for nothing"
)
class _(_Wrong):
    def cls_of(self, frames):
        return frames[:, 0, :1]


@divided_block.mistake(
    "cls-summed", "the copies of [CLS] are summed, so its step grows with the number of frames; their mean does not"
)
class _(_Wrong):
    def cls_of(self, frames):
        return frames[:, :, 0].sum(1, keepdim=True)


@divided_block.mistake("cls-unmoved", "what the copies of [CLS] have found is thrown away; [CLS] leaves as it came")
class _(_Wrong):
    def cls_of(self, frames):
        return torch.zeros_like(frames[:, 0, :1])


@divided_block.mistake(
    "cls-replaced", "what the copies of [CLS] have found takes the place of [CLS]; it should be added to it"
)
class _(_Wrong):
    def forward(self, x, grid):
        cls, patches = x[:, :1], self.along_time(x[:, 1:], grid[0])
        x = torch.cat([torch.zeros_like(cls), patches], dim=1) + self.in_space(cls, patches, grid)
        return x + self.mlp(self.norm2(x))


@divided_block.mistake(
    "attentions-exchanged",
    "`attn` looks along time here, and `temporal_attn` in space; their weights are made for the other",
)
class _(_Wrong):
    def mix(self, columns):
        return self.temporal_fc(self.attn(self.temporal_norm1(columns)))

    def look(self, x, grid):
        return self.temporal_attn(self.norm1(x), grid)


@divided_block.mistake("no-space-norm", "attention in space reads tokens that are not normalised")
class _(_Wrong):
    def look(self, x, grid):
        return self.attn(x, grid)


@divided_block.mistake(
    "no-fc", "`temporal_fc` is left out: it starts at zero, so that a new model begins as the model of images"
)
class _(_Wrong):
    def mix(self, columns):
        return self.temporal_attn(self.temporal_norm1(columns))


@divided_block.mistake("no-temporal-norm", "attention along time reads tokens that are not normalised")
class _(_Wrong):
    def mix(self, columns):
        return self.temporal_fc(self.temporal_attn(columns))


@divided_block.mistake(
    "norm-of-space", "attention along time reads tokens through the norm of attention in space; it has its own"
)
class _(_Wrong):
    def mix(self, columns):
        return self.temporal_fc(self.temporal_attn(self.norm1(columns)))


@divided_block.mistake(
    "time-replaces", "what attention along time finds takes the place of the patches; it should be added to them"
)
class _(_Wrong):
    def along_time(self, patches, t):
        return self.rows(self.mix(self.columns(patches, t)), len(patches))


@divided_block.mistake(
    "time-dropped",
    "attention in space has read what attention along time left, but is added to the patches as they came: the step in "
    "time is lost on the way",
)
class _(_Wrong):
    def forward(self, x, grid):
        x = x + self.in_space(x[:, :1], self.along_time(x[:, 1:], grid[0]), grid)
        return x + self.mlp(self.norm2(x))


@divided_block.mistake(
    "side-by-side",
    "attention in space reads the patches as they came; it should read what attention along time has left",
)
class _(_Wrong):
    def forward(self, x, grid):
        cls, patches = x[:, :1], self.along_time(x[:, 1:], grid[0])
        x = torch.cat([cls, patches], dim=1) + self.in_space(cls, x[:, 1:], grid)
        return x + self.mlp(self.norm2(x))


@divided_block.mistake("space-first", "attention in space comes first; in this block time comes first")
class _(_Wrong):
    def forward(self, x, grid):
        x = x + self.in_space(x[:, :1], x[:, 1:], grid)
        x = torch.cat([x[:, :1], self.along_time(x[:, 1:], grid[0])], dim=1)
        return x + self.mlp(self.norm2(x))


@divided_block.mistake(
    "space-replaces", "what attention in space finds takes the place of the tokens; it should be added to them"
)
class _(_Wrong):
    def forward(self, x, grid):
        x = self.in_space(x[:, :1], self.along_time(x[:, 1:], grid[0]), grid)
        return x + self.mlp(self.norm2(x))


@divided_block.mistake(
    "joint-space", "all frames are seen together where each should be seen by itself: that is joint attention"
)
class _(_Wrong):
    def in_space(self, cls, patches, grid):
        return self.attn(self.norm1(torch.cat([cls, patches], dim=1)))


@divided_block.mistake("no-mlp", "the MLP and its norm are missing")
class _(_Wrong):
    def forward(self, x, grid):
        cls, patches = x[:, :1], self.along_time(x[:, 1:], grid[0])
        return torch.cat([cls, patches], dim=1) + self.in_space(cls, patches, grid)
