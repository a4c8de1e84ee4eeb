"""Answers to `video.DividedBlock`."""

import torch
from torch import nn

from mistakes import collect
from vitcourse.layers import Mlp
from vitcourse.vit import Attention

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("video.DividedBlock")


class Parts(nn.Module):
    """The parts, and helpers that know tokens by frame and place: patches (B, t, n, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2, self.temporal_norm1 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn, self.temporal_attn = Attention(dim, num_heads), Attention(dim, num_heads)
        self.mlp, self.temporal_fc = Mlp(dim, 4 * dim), nn.Linear(dim, dim)

    def unfold(self, x, grid):
        return x[:, :1], x[:, 1:].unflatten(1, (grid[0], grid[1] * grid[2]))

    def fold(self, cls, patches):
        return torch.cat([cls, patches.flatten(1, 2)], dim=1)

    def timed(self, patches, norm=None, fc=None):
        """What attention along time finds, place by place."""
        norm, fc = norm or self.temporal_norm1, fc or self.temporal_fc
        return torch.stack([fc(self.temporal_attn(norm(patches[:, :, i]))) for i in range(patches.shape[2])], dim=2)

    def spaced(self, cls, patches, grid):
        """What attention in space finds, frame by frame: of [CLS] (B, t, 1, D), of the patches (B, t, n, D)."""
        found = []
        for t in range(grid[0]):
            tokens = torch.cat([cls, patches[:, t]], dim=1)
            found.append(self.attn(self.norm1(tokens), tuple(grid[1:])))
        found = torch.stack(found, dim=1)
        return found[:, :, :1], found[:, :, 1:]

    def finish(self, x):
        return x + self.mlp(self.norm2(x))

    def forward(self, x, grid):
        cls, patches = self.unfold(x, grid)
        patches = patches + self.timed(patches)
        more, found = self.spaced(cls, patches, grid)
        return self.finish(self.fold(cls + more.mean(1), patches + found))


right(Parts)


@variant("frames-mixed")
class Reshaped(Parts):
    def timed(self, patches):
        b, t, n, d = patches.shape
        rows = patches.reshape(b * n, t, d)
        return self.temporal_fc(self.temporal_attn(self.temporal_norm1(rows))).reshape(b, t, n, d)


@variant("way-back-mixed")
class ViewBack(Parts):
    def timed(self, patches):
        b, t, n, d = patches.shape
        columns = patches.transpose(1, 2).reshape(b * n, t, d)
        found = self.temporal_fc(self.temporal_attn(self.temporal_norm1(columns)))
        return found.reshape(b, t, n, d)


@variant("cls-of-the-first")
class FirstCopy(Parts):
    def spaced(self, cls, patches, grid):
        more, found = super().spaced(cls, patches, grid)
        return more[:, :1], found


@variant("cls-summed")
class Summed(Parts):
    def spaced(self, cls, patches, grid):
        more, found = super().spaced(cls, patches, grid)
        return more * grid[0], found


@variant("no-fc")
class WithoutLinear(Parts):
    def timed(self, patches):
        return super().timed(patches, fc=nn.Identity())


@variant("no-temporal-norm")
class RawTime(Parts):
    def timed(self, patches):
        return super().timed(patches, norm=nn.Identity())


@variant("norm-of-space")
class OneNorm(Parts):
    def timed(self, patches):
        return super().timed(patches, norm=self.norm1)


@variant("time-replaces")
class NoShortcutInTime(Parts):
    def timed(self, patches):
        return super().timed(patches) - patches


@variant("time-dropped")
class OldPatches(Parts):
    def forward(self, x, grid):
        cls, patches = self.unfold(x, grid)
        more, found = self.spaced(cls, patches + self.timed(patches), grid)
        return self.finish(self.fold(cls + more.mean(1), patches + found))


@variant("side-by-side")
class Parallel(Parts):
    def forward(self, x, grid):
        cls, patches = self.unfold(x, grid)
        more, found = self.spaced(cls, patches, grid)
        return self.finish(self.fold(cls + more.mean(1), patches + self.timed(patches) + found))


@variant("space-first")
class SpaceThenTime(Parts):
    def forward(self, x, grid):
        cls, patches = self.unfold(x, grid)
        more, found = self.spaced(cls, patches, grid)
        patches = patches + found
        return self.finish(self.fold(cls + more.mean(1), patches + self.timed(patches)))


@variant("space-replaces")
class NoShortcutInSpace(Parts):
    def forward(self, x, grid):
        cls, patches = self.unfold(x, grid)
        more, found = self.spaced(cls, patches + self.timed(patches), grid)
        return self.finish(self.fold(more.mean(1), found))


@variant("joint-space")
class AllFramesAtOnce(Parts):
    def forward(self, x, grid):
        cls, patches = self.unfold(x, grid)
        x = self.fold(cls, patches + self.timed(patches))
        return self.finish(x + self.attn(self.norm1(x)))


@variant("no-mlp")
class Unfinished(Parts):
    def finish(self, x):
        return x


@variant("cls-unmoved")
class ClsAsItCame(Parts):
    def spaced(self, cls, patches, grid):
        more, found = super().spaced(cls, patches, grid)
        return more - more, found


@variant("cls-replaced")
class ClsOfTheCopies(Parts):
    def spaced(self, cls, patches, grid):
        more, found = super().spaced(cls, patches, grid)
        return more - cls[:, None], found


@variant("attentions-exchanged")
class Exchanged(Parts):
    def forward(self, x, grid):
        space, time = self.attn, self.temporal_attn
        self.attn, self.temporal_attn = time, space
        try:
            return super().forward(x, grid)
        finally:
            self.attn, self.temporal_attn = space, time


@variant("no-space-norm")
class RawSpace(Parts):
    def spaced(self, cls, patches, grid):
        frames = torch.cat([cls[:, None].expand(-1, grid[0], -1, -1), patches], dim=2)
        found = torch.stack([self.attn(frame, tuple(grid[1:])) for frame in frames.unbind(1)], dim=1)
        return found[:, :, :1], found[:, :, 1:]


@unknown
class ClsOfTheLast(Parts):
    def spaced(self, cls, patches, grid):
        more, found = super().spaced(cls, patches, grid)
        return more[:, -1:], found


@unknown
class ClsInTime(Parts):
    """[CLS] stands in front of each place's column, and is thrown away again."""

    def timed(self, patches):
        cls = self.cls[:, :, None].expand(-1, -1, patches.shape[2], -1)
        return super().timed(torch.cat([cls, patches], dim=1))[:, 1:]

    def forward(self, x, grid):
        self.cls = x[:, :1]
        return super().forward(x, grid)


@unknown
class ClsBlind(Parts):
    """[CLS] is left out of the frames."""

    def spaced(self, cls, patches, grid):
        found = [self.attn(self.norm1(patches[:, t])) for t in range(grid[0])]
        return torch.zeros_like(cls)[:, None], torch.stack(found, dim=1)


@unknown
class TimeTwice(Parts):
    def forward(self, x, grid):
        cls, patches = self.unfold(x, grid)
        patches = patches + self.timed(patches)
        return super().forward(self.fold(cls, patches), grid)


@unknown
class MlpBetween(Parts):
    def forward(self, x, grid):
        cls, patches = self.unfold(x, grid)
        x = self.finish(self.fold(cls, patches + self.timed(patches)))
        cls, patches = self.unfold(x, grid)
        more, found = self.spaced(cls, patches, grid)
        return self.fold(cls + more.mean(1), patches + found)


@unknown
class MaximumOfCopies(Parts):
    def spaced(self, cls, patches, grid):
        more, found = super().spaced(cls, patches, grid)
        return more.amax(1, keepdim=True), found


@right
class ByPermute(Parts):
    """Everything with permute and reshape, all places and frames at once."""

    def forward(self, x, grid):
        b, _, d = x.shape
        t, n = grid[0], grid[1] * grid[2]
        patches = x[:, 1:].reshape(b, t, n, d)
        columns = patches.permute(0, 2, 1, 3).reshape(b * n, t, d)
        found = self.temporal_fc(self.temporal_attn(self.temporal_norm1(columns)))
        patches = patches + found.reshape(b, n, t, d).permute(0, 2, 1, 3)
        cls = x[:, None, :1].expand(b, t, 1, d)
        frames = torch.cat((cls, patches), 2).flatten(0, 1)
        frames = frames + self.attn(self.norm1(frames), (grid[1], grid[2], 1))
        frames = frames.reshape(b, t, n + 1, d)
        x = torch.cat((frames[:, :, 0].mean(1)[:, None], frames[:, :, 1:].reshape(b, t * n, d)), 1)
        return self.mlp(self.norm2(x)) + x


@right
class ClipByClip(Parts):
    """One clip of the batch after the other; the mean over the copies is a sum over t."""

    def forward(self, x, grid):
        t = grid[0]
        clips = []
        for clip in x:
            cls, patches = clip[:1], clip[1:].reshape(t, -1, clip.shape[-1])
            columns = patches.transpose(0, 1)
            patches = patches + self.temporal_fc(self.temporal_attn(self.temporal_norm1(columns))).transpose(0, 1)
            frames = torch.cat([cls.repeat(t, 1, 1), patches], dim=1)
            found = self.attn(self.norm1(frames), grid[1:])
            clip = torch.cat([cls + sum(found[:, :1]) / t, (patches + found[:, 1:]).reshape(-1, clip.shape[-1])])
            clips.append(clip + self.mlp(self.norm2(clip)))
        return torch.stack(clips)
