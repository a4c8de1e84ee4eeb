"""The check of `vit.VisionTransformer`."""

import torch
from einops import rearrange

from vitcourse import vit
from vitcourse.course.checks import build, check


@check(
    "vit.VisionTransformer",
    reference="vitcourse.vit.VisionTransformer",
    level=4,
    minutes=25,
    why="This is the model. Its parts are small; their order is the architecture.",
    hints=[
        "patch_embed gives (B, D, h, w). Tokens are (B, h·w, D): flatten the grid and bring the channels last.",
        "[CLS] is one learnt vector for the whole data set: expand it to the batch and put it in front.",
        "pos_embed has a place for [CLS] too, so it is added after [CLS] is there. Then the blocks, the norm, the head.",
    ],
    exempt={
        "square": "the exercise's model is for square images",
        "distinct": "the exercise's model is for square images",
        "larger": "the exercise's model has positions for images of one size",
        "smaller": "the exercise's model has positions for images of one size",
    },
)
def vision_transformer(rng):
    yield build(img_size=15, patch_size=5, in_chans=2, num_classes=5, embed_dim=6, depth=3, num_heads=3).call(
        rng.normal(4, 2, 15, 15)
    )
    yield (
        build(img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=8, depth=2, num_heads=2)
        .call(rng.normal(1, 1, 8, 8))
        .on("a batch of one")
    )


class _WrongTransformer(vit.VisionTransformer):
    """The model in its steps, each of which a mistake may replace."""

    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (h w) d")
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed

    def pool(self, x):
        return self.norm(x)[:, 0]

    def encode(self, x):
        for step in self.blocks:
            x = step(x)
        return x

    def forward(self, x):
        return self.head(self.pool(self.encode(self.tokens(x))))


@vision_transformer.mistake(
    "positions-before-cls",
    "the positions are added to the patches only, before [CLS] is prepended: [CLS] is left without its own",
)
class _(_WrongTransformer):
    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (h w) d") + self.pos_embed[:, 1:]
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)


@vision_transformer.mistake("cls-last", "[CLS] stands at the end, where it takes the position of the last patch")
class _(_WrongTransformer):
    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (h w) d")
        return torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], dim=1) + self.pos_embed

    def pool(self, x):
        return self.norm(x)[:, -1]


@vision_transformer.mistake("first-patch", "the head reads the first patch: [CLS] was put at the other end")
class _(_WrongTransformer):
    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (h w) d")
        return torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], dim=1) + self.pos_embed


@vision_transformer.mistake("mean-with-cls", "the head reads the mean of all tokens, with [CLS] averaged in")
class _(_WrongTransformer):
    def pool(self, x):
        return self.norm(x).mean(dim=1)


@vision_transformer.mistake("mean-of-patches", "the head reads the mean of the patches; this model is read at [CLS]")
class _(_WrongTransformer):
    def pool(self, x):
        return self.norm(x)[:, 1:].mean(dim=1)


@vision_transformer.mistake(
    "no-norm", "the final norm is missing: with pre-norm blocks nothing else tames the residual sum"
)
class _(_WrongTransformer):
    def pool(self, x):
        return x[:, 0]


@vision_transformer.mistake("no-positions", "the positions are never added: the model cannot tell where a patch was")
class _(_WrongTransformer):
    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (h w) d")
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)


@vision_transformer.mistake("columns-first", "the patches are read column by column, but the positions row by row")
class _(_WrongTransformer):
    def tokens(self, x):
        x = rearrange(self.patch_embed(x), "b d h w -> b (w h) d")
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed


@vision_transformer.mistake(
    "plain-reshape",
    "(B, D, h, w) is reshaped to (B, h·w, D) as it lies in memory, so a token gets values of many patches; move D last first",
)
class _(_WrongTransformer):
    def tokens(self, x):
        x = self.patch_embed(x).flatten(1).unflatten(1, (-1, self.pos_embed.shape[-1]))
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed


@vision_transformer.mistake(
    "probabilities", "these are probabilities; the loss applies the softmax itself and wants logits"
)
class _(_WrongTransformer):
    def forward(self, x):
        return super().forward(x).softmax(dim=-1)
