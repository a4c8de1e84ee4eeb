"""Answers to `vit.VisionTransformer`."""

import torch
import torch.nn.functional as F
from torch import nn

from mistakes import collect
from vitcourse import vit

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("vit.VisionTransformer")


def model(forward):
    """The lesson's class, with the learner's ``forward``."""

    class VisionTransformer(nn.Module):
        def __init__(
            self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12
        ):
            super().__init__()
            num_patches = (img_size // patch_size) ** 2
            self.patch_embed = vit.PatchEmbed(patch_size, in_chans, embed_dim)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + num_patches, embed_dim))
            self.blocks = nn.ModuleList(vit.Block(embed_dim, num_heads) for _ in range(depth))
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
            self.head = nn.Linear(embed_dim, num_classes)

    VisionTransformer.forward, VisionTransformer.__name__ = forward, forward.__name__
    return VisionTransformer


def patches_of(self, x):
    """(B, h w, D), in reading order."""
    return self.patch_embed(x).flatten(2).transpose(1, 2)


def cls_of(self, x):
    return self.cls_token.repeat(len(x), 1, 1)


def tokens_of(self, x):
    return torch.cat((cls_of(self, x), patches_of(self, x)), dim=1) + self.pos_embed


def through(self, tokens):
    return nn.Sequential(*self.blocks)(tokens)


@variant("positions-before-cls")
@model
def cls_without_a_position(self, x):
    _, positions = self.pos_embed.split([1, self.pos_embed.shape[1] - 1], dim=1)
    tokens = torch.cat((cls_of(self, x), patches_of(self, x) + positions), dim=1)
    return self.head(self.norm(through(self, tokens))[:, 0])


@variant("cls-last")
@model
def cls_appended(self, x):
    patches = patches_of(self, x)
    tokens = F.pad(patches, (0, 0, 0, 1))
    tokens[:, -1] = self.cls_token[0, 0]
    return self.head(self.norm(through(self, tokens + self.pos_embed)[:, -1]))


@variant("first-patch")
@model
def arguments_of_cat_exchanged(self, x):
    tokens = torch.cat((patches_of(self, x), cls_of(self, x)), dim=1)
    tokens = tokens + self.pos_embed
    for i in range(len(self.blocks)):
        tokens = self.blocks[i](tokens)
    return self.head(self.norm(tokens[:, 0]))


@variant("mean-with-cls")
@model
def head_on_every_token_then_mean(self, x):
    return self.head(self.norm(through(self, tokens_of(self, x)))).mean(1)


@variant("mean-of-patches")
@model
def average_pooling(self, x):
    _, *patches = self.norm(through(self, tokens_of(self, x))).unbind(1)
    return self.head(sum(patches) / len(patches))


@variant("no-norm")
@model
def head_on_the_raw_stream(self, x):
    return F.linear(through(self, tokens_of(self, x)).select(1, 0), self.head.weight, self.head.bias)


@variant("no-positions")
@model
def positions_computed_and_forgotten(self, x):
    tokens = torch.cat((cls_of(self, x), patches_of(self, x)), dim=1)
    tokens.add(self.pos_embed)
    return self.head(self.norm(through(self, tokens))[:, 0])


@variant("columns-first")
@model
def map_transposed_before_flattening(self, x):
    patches = self.patch_embed(x).permute(0, 3, 2, 1).flatten(1, 2)
    tokens = torch.cat((cls_of(self, x), patches), dim=1) + self.pos_embed
    return self.head(self.norm(through(self, tokens))[:, 0])


@variant("probabilities")
@model
def softmax_by_hand(self, x):
    odds = self.head(self.norm(through(self, tokens_of(self, x)))[:, 0]).exp()
    return odds / odds.sum(1, keepdim=True)


@variant("plain-reshape")
@model
def channels_reshaped_into_tokens(self, x):
    patches = self.patch_embed(x)
    patches = patches.reshape(x.shape[0], -1, patches.shape[1])
    tokens = torch.cat((cls_of(self, x), patches), dim=1) + self.pos_embed
    return self.head(self.norm(through(self, tokens))[:, 0])


@unknown
@model
def positions_one_too_early(self, x):
    tokens = torch.cat((cls_of(self, x), patches_of(self, x) + self.pos_embed[:, :-1]), dim=1)
    return self.head(self.norm(through(self, tokens))[:, 0])


@unknown
@model
def first_block_only(self, x):
    return self.head(self.norm(self.blocks[0](tokens_of(self, x)))[:, 0])


@unknown
@model
def blocks_in_reverse(self, x):
    tokens = tokens_of(self, x)
    for step in reversed(self.blocks):
        tokens = step(tokens)
    return self.head(self.norm(tokens)[:, 0])


@unknown
@model
def norm_after_the_mean(self, x):
    return self.head(self.norm(through(self, tokens_of(self, x)).mean(1)))


@unknown
@model
def log_probabilities(self, x):
    return F.log_softmax(self.head(self.norm(through(self, tokens_of(self, x)))[:, 0]), dim=1)


@unknown
@model
def norm_before_the_blocks(self, x):
    return self.head(through(self, self.norm(tokens_of(self, x)))[:, 0])


@unknown
@model
def cls_without_parameters(self, x):
    patches = patches_of(self, x)
    tokens = torch.cat((torch.zeros_like(patches[:, :1]), patches), dim=1) + self.pos_embed
    return self.head(self.norm(through(self, tokens))[:, 0])


@unknown
@model
def unnormed_probabilities(self, x):
    return self.head(through(self, tokens_of(self, x))[:, 0]).softmax(-1)


@unknown
@model
def embedding_frozen(self, x):
    with torch.no_grad():
        patches = patches_of(self, x)
    tokens = torch.cat((cls_of(self, x), patches), dim=1) + self.pos_embed
    return self.head(self.norm(through(self, tokens))[:, 0])


@right
@model
def cls_written_into_a_buffer(self, x):
    tokens = x.new_empty(x.shape[0], self.pos_embed.shape[1], self.pos_embed.shape[2])
    tokens[:, :1] = self.cls_token
    tokens[:, 1:] = torch.einsum("bdhw->bhwd", self.patch_embed(x)).flatten(1, 2)
    return self.head(self.norm(through(self, tokens + self.pos_embed)[:, 0]))


@right
@model
def embedding_as_a_linear_layer(self, x):
    kernel = self.patch_embed.proj.weight
    pixels = F.unfold(x, kernel.shape[-1], stride=kernel.shape[-1]).mT
    patches = F.linear(pixels, kernel.flatten(1), self.patch_embed.proj.bias) + self.pos_embed[:, 1:]
    tokens = torch.cat((cls_of(self, x) + self.pos_embed[:, :1], patches), dim=1)
    for step in self.blocks:
        tokens = step(tokens)
    cls, _ = self.norm(tokens).split([1, tokens.shape[1] - 1], dim=1)
    return self.head(cls).squeeze(1)


@right
class OneImageAtATime(nn.Module):
    """The blocks in a Sequential, whose parameters have the same names."""

    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12, num_heads=12
    ):
        super().__init__()
        side = img_size // patch_size
        self.patch_embed = vit.PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, embed_dim))
        self.blocks = nn.Sequential(*(vit.Block(embed_dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x):
        logits = []
        for image in x:
            feature_map = self.patch_embed(image[None])[0]  # (D, h, w)
            places = [feature_map[:, i, j] for i in range(feature_map.shape[1]) for j in range(feature_map.shape[2])]
            tokens = torch.stack([self.cls_token[0, 0], *places]) + self.pos_embed[0]
            logits.append(self.head(self.norm(self.blocks(tokens[None])[0, 0])))
        return torch.stack(logits)


@unknown
class FirstAndLastBlock(vit.VisionTransformer):
    def forward(self, x):
        self.blocks = nn.Sequential(self.blocks[0], self.blocks[-1])
        return super().forward(x)


@unknown
class ClsOfTheFirstBatch(vit.VisionTransformer):
    def forward(self, x):
        if not hasattr(self, "cls"):
            self.cls = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([self.cls, patches_of(self, x)], 1) + self.pos_embed
        for step in self.blocks:
            x = step(x)
        return self.head(self.norm(x)[:, 0])


@unknown
class DropoutBeforeTheHead(vit.VisionTransformer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, drop_rate=0.1, **kwargs)
