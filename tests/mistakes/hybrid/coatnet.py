"""Answers to `hybrid.CoAtNet`."""

import torch
import torch.nn.functional as F
from torch import nn

from mistakes import collect
from vitcourse.hybrid import MBConv, RelativeBlock

from ._shared import averages

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hybrid.CoAtNet")


def assembled(stages, tail=lambda self, x: self.head(self.pre_logits(self.norm(averages(x))))):
    """The lesson's class, with the learner's way of making stages and end of ``forward``."""

    class Assembled(nn.Module):
        def __init__(
            self, img_size, in_chans, num_classes, stem_dim, embed_dim, depths, layout, stem_stride, strides, head_dim,
            downsample="expand",
        ):  # fmt: skip
            super().__init__()
            self.stem = nn.Sequential(
                nn.Conv2d(in_chans, stem_dim, 3, stem_stride, 1, bias=False),
                nn.BatchNorm2d(stem_dim),
                nn.GELU(),
                nn.Conv2d(stem_dim, stem_dim, 3, 1, 1, bias=False),
            )
            plan = list(zip(layout, [stem_dim, *embed_dim[:-1]], embed_dim, depths, strides, strict=True))
            self.stages = nn.ModuleList(stages(plan, img_size // stem_stride, head_dim, downsample))
            self.norm = nn.LayerNorm(embed_dim[-1], eps=1e-6)
            self.pre_logits = nn.Sequential(nn.Linear(embed_dim[-1], embed_dim[-1]), nn.Tanh())
            self.head = nn.Linear(embed_dim[-1], num_classes)

        def forward(self, x):
            x = self.stem(x)
            for i in range(len(self.stages)):
                x = self.stages[i](x)
            return tail(self, x)

    return Assembled


def planned(
    convolution="C",
    stride_of=lambda i, depth, stride: stride if i == 0 else 1,
    side_of=lambda before, after: after,
    depth_of=lambda depth: depth,
    heads_of=lambda dim, head_dim: dim // head_dim,
    passes_downsample=True,
):
    """Stages as a list, with a decision of the learner's for each argument."""

    def stages(plan, side, head_dim, downsample):
        for letter, width, dim, depth, stride in plan:
            before, side = side, side // stride
            blocks = []
            for i in range(depth_of(depth)):
                enters, step = dim if i else width, stride_of(i, depth, stride)
                if letter == convolution:
                    options = {"downsample": downsample} if passes_downsample else {}
                    blocks.append(MBConv(enters, dim, step, **options))
                else:
                    grid = (side_of(before, side),) * 2
                    blocks.append(RelativeBlock(enters, dim, heads_of(dim, head_dim), grid_size=grid, stride=step))
            yield nn.Sequential(*blocks)

    return stages


for key, change in {
    "letters-exchanged": {"convolution": "T"},
    "shrinks-in-every-block": {"stride_of": lambda i, depth, stride: stride},
    "shrinks-last": {"stride_of": lambda i, depth, stride: stride if i == depth - 1 else 1},
    "grid-of-the-input": {"side_of": max},
    "one-block-a-stage": {"depth_of": lambda depth: 1},
    "heads-for-their-width": {"heads_of": lambda dim, head_dim: head_dim},
    "default-downsample": {"passes_downsample": False},
}.items():
    variant(key)(assembled(planned(**change)))


def normed(self, x):
    return F.layer_norm(x, x.shape[-1:], self.norm.weight, self.norm.bias, 1e-6)


for key, tail in {
    "norm-before-the-mean": lambda self, x: self.head(self.pre_logits(normed(self, x.flatten(2).mT).mean(1))),
    "no-final-norm": lambda self, x: self.head(self.pre_logits(x.flatten(2).mean(2))),
    "max-over-places": lambda self, x: self.head(self.pre_logits(normed(self, F.adaptive_max_pool2d(x, 1).flatten(1)))),
    "no-hidden-layer": lambda self, x: self.head(normed(self, averages(x))),
}.items():
    variant(key)(assembled(planned(), tail))

for stages, tail in (
    (planned(), lambda self, x: self.head(torch.relu(self.pre_logits[0](normed(self, averages(x)))))),
    (planned(), lambda self, x: self.head(self.pre_logits(normed(self, x.flatten(2)[..., 0])))),
    (planned(), lambda self, x: self.head(self.pre_logits(normed(self, averages(x)))).softmax(-1)),
    (planned(), lambda self, x: self.head(self.pre_logits(normed(self, averages(x)))).mul(0.5)),
    (planned(side_of=lambda before, after: after + 1), lambda self, x: self.head(normed(self, averages(x)))),
    (planned(depth_of=lambda depth: depth + 1), lambda self, x: self.head(normed(self, averages(x)))),
):
    unknown(assembled(stages, tail))

right(assembled(planned()))


@right
@assembled
def with_pointers(plan, side, head_dim, downsample):
    stages = []
    for letter, width, dim, depth, stride in plan:
        side //= stride
        kind = {
            "C": lambda a, b, s: MBConv(a, b, s, downsample),
            "T": lambda a, b, s, side=side: RelativeBlock(a, b, b // head_dim, (side, side), s),
        }[letter]
        stages.append(nn.Sequential(kind(width, dim, stride)))
        stages[-1].extend(kind(dim, dim, 1) for _ in range(1, depth))
    return stages


@unknown
@assembled
def one_block_for_the_rest(plan, side, head_dim, downsample):
    for letter, in_dim, dim, depth, stride in plan:
        side //= stride

        def block(width, step, letter=letter, dim=dim, side=side):
            if letter == "C":
                return MBConv(width, dim, step, downsample)
            return RelativeBlock(width, dim, dim // head_dim, (side, side), step)

        yield nn.Sequential(block(in_dim, stride), *[block(dim, 1)] * (depth - 1))
