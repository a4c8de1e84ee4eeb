"""Answers to `hierarchical.SwinTransformer`."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mistakes import collect
from vitcourse.hierarchical import SwinBlock, SwinTransformer, WindowAttention
from vitcourse.hierarchical.swin import NormPatchEmbed

from .patch_merging import as_the_authors_write_it

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hierarchical.SwinTransformer")


def plan(side, window_size, block):
    """Window and shift of a block."""
    if side <= window_size:
        return side, 0
    return window_size, window_size // 2 * (block % 2)


def tail(self, x):
    return self.head["fc"](self.norm(x).flatten(1, 2).mean(1))


def model(plan=plan, tail=tail, embed=NormPatchEmbed, merge_first=True):
    """The lesson's class, with the learner's plan of windows and end of ``forward``."""

    class Model(nn.Module):
        def __init__(self, img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size):
            super().__init__()
            self.patch_embed = embed(patch_size, in_chans, embed_dim)
            self.layers = nn.ModuleList()
            side, stages = img_size // patch_size, len(depths)
            for i in range(stages):
                dim = embed_dim * 2**i
                blocks = nn.ModuleList()
                for j in range(depths[i]):
                    window, shift = plan(side, window_size, j)
                    block = SwinBlock(dim, num_heads[i])
                    block.attn = WindowAttention(dim, num_heads[i], window_size=window, shift_size=shift)
                    blocks.append(block)
                stage = nn.ModuleDict({"blocks": blocks})
                if i > 0 and merge_first:
                    stage["downsample"] = Merge(dim // 2)
                if i < stages - 1 and not merge_first:
                    stage["downsample"] = Merge(dim)
                self.layers.append(stage)
                side = math.ceil(side / 2)
            self.norm = nn.LayerNorm(dim)
            self.head = nn.ModuleDict({"fc": nn.Linear(dim, num_classes)})

        def forward(self, x):
            x = self.patch_embed(x)
            for stage in self.layers:
                if "downsample" in stage and merge_first:
                    x = stage["downsample"](x)
                b, h, w, c = x.shape
                x = x.reshape(b, h * w, c)
                for block in stage["blocks"]:
                    x = block(x, (h, w, 0))
                x = x.reshape(b, h, w, c)
                if "downsample" in stage and not merge_first:
                    x = stage["downsample"](x)
            return tail(self, x)

    return Model


Merge = as_the_authors_write_it


class BareEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).movedim(1, -1)


for key, change in {
    "never-shifted": {"plan": lambda side, p, i: (min(side, p), 0)},
    "shifted-first": {"plan": lambda side, p, i: (min(side, p), p // 2 if side > p and not i % 2 else 0)},
    "always-shifted": {"plan": lambda side, p, i: (min(side, p), p // 2 if side > p else 0)},
    "shifted-single-window": {"plan": lambda side, p, i: (min(side, p), min(side, p) // 2 if i % 2 else 0)},
    "window-not-shrunk": {"plan": lambda side, p, i: (p, p // 2 if side > p and i % 2 else 0)},
    "no-final-norm": {"tail": lambda self, x: self.head["fc"](torch.einsum("bhwc->bc", x) / x[0, ..., 0].numel())},
    "norm-after-the-mean": {"tail": lambda self, x: self.head["fc"](self.norm(x.mean(2).mean(1)))},
    "first-token": {"tail": lambda self, x: self.head["fc"](self.norm(x.flatten(1, 2)))[:, 0]},
    "patches-unnormed": {"embed": BareEmbed},
    "merged-last": {"merge_first": False},
}.items():
    variant(key)(model(**change))

for change in (
    {"plan": lambda side, p, i: (min(side, p), 1 if side > p and i % 2 else 0)},
    {"tail": lambda self, x: self.head["fc"](self.norm(x).amax((1, 2)))},
    {"tail": lambda self, x: self.head["fc"](self.norm(x).sum((1, 2)))},
    {"tail": lambda self, x: tail(self, x).softmax(-1)},
    {"tail": lambda self, x: self.head["fc"](self.norm(x))},
    {"plan": lambda side, p, i: (min(side, p), 0), "tail": lambda self, x: self.head["fc"](x.mean((1, 2)))},
):
    unknown(model(**change))

right(model())


@right
class FromTheLibrarysStages(nn.Module):
    """The library's own stages, run backwards through indices, with an average pool at the end."""

    def __init__(self, img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size):
        super().__init__()
        inner = SwinTransformer(
            img_size, patch_size, in_chans, num_classes, "avg", embed_dim, depths, num_heads, window_size
        )
        self.patch_embed, self.layers, self.norm, self.head = inner.patch_embed, inner.layers, inner.norm, inner.head

    def forward(self, x):
        x = self.patch_embed(x)
        for i in range(len(self.layers)):
            x = self.layers[i](x)
        return self.head(F.adaptive_avg_pool2d(self.norm(x).movedim(-1, 1), 1).flatten(1))


def only_the_second_block_shifts(side, window_size, block):
    window, shift = plan(side, window_size, block)
    return window, shift if block == 1 else 0


UNKNOWN += [("hierarchical.SwinTransformer", model(only_the_second_block_shifts))]


@unknown
class OneBlockForThePairs(SwinTransformer):
    """Distinct blocks, of which only the first two are called."""

    def forward(self, x):
        for stage in self.layers:
            blocks = list(stage.blocks)
            stage.blocks = nn.ModuleList(blocks[i % 2] for i in range(len(blocks)))
        return super().forward(x)
