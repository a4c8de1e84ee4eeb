"""Answers to `pretraining.Decoder`."""

import torch
from torch import nn

from mistakes import collect
from vitcourse.vit import Block, sincos_2d

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("pretraining.Decoder")


def given(forward):
    """What the lesson gives, with this way through it."""

    class Answer(nn.Module):
        def __init__(self, in_dim, out_dim, grid_size, num_prefix_tokens=1, embed_dim=512, depth=8, num_heads=16):
            super().__init__()
            self.num_prefix_tokens = num_prefix_tokens
            self.embed = nn.Linear(in_dim, embed_dim)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            positions = torch.cat([torch.zeros(num_prefix_tokens, embed_dim), sincos_2d(*grid_size, embed_dim)])
            self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
            self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
            self.head = nn.Linear(embed_dim, out_dim)

    Answer.forward = forward
    Answer.__name__ = forward.__name__
    return Answer


def on_a_canvas(self, x, restore, filled=True, positions="all", inverse=False):
    """A canvas of mask tokens, on which those that were seen are written at their places."""
    x, p = self.embed(x), self.num_prefix_tokens
    b, n, seen = len(x), restore.shape[1], x.shape[1] - p
    canvas = self.mask_token.repeat(b, n, 1) if filled else torch.zeros(b, n, x.shape[2], dtype=x.dtype)
    where = (restore if inverse else restore.argsort(1))[:, :seen]
    canvas = canvas.scatter(1, where[..., None].expand(-1, -1, x.shape[2]), x[:, p:])
    x = torch.cat([x[:, :p], canvas], 1)
    if positions == "all":
        return x + self.pos_embed
    if positions == "seen":
        shown = torch.ones(b, p + n, 1, dtype=x.dtype)
        shown[:, p:] = (restore < seen)[..., None]
        return x + self.pos_embed * shown
    return x


def painted(self, x, blocks=None, norm=True, prefix=False):
    for block in self.blocks if blocks is None else blocks:
        x = block(x)
    x = self.head(self.norm(x) if norm else x)
    return x if prefix else x[:, self.num_prefix_tokens :]


@right
@given
def canvas(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore))


@right
@given
def as_in_the_authors_code(self, x, restore):
    x, p = self.embed(x), self.num_prefix_tokens
    mask_tokens = self.mask_token.repeat(x.shape[0], restore.shape[1] + p - x.shape[1], 1)
    patches = torch.cat([x[:, p:, :], mask_tokens], dim=1)
    patches = torch.gather(patches, dim=1, index=restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    return painted(self, torch.cat([x[:, :p, :], patches], dim=1) + self.pos_embed)


@right
@given
def image_by_image(self, x, restore):
    found = []
    for tokens, places in zip(self.embed(x), restore, strict=True):
        p = self.num_prefix_tokens
        seen = tokens[p:]
        rows = [seen[i] if i < len(seen) else self.mask_token[0, 0] for i in places.tolist()]
        found.append(torch.stack([*tokens[:p], *rows]) + self.pos_embed[0])
    return painted(self, torch.stack(found))


@variant("not-restored")
@given
def as_they_come(self, x, restore):
    x = self.embed(x)
    missing = restore.shape[1] + self.num_prefix_tokens - x.shape[1]
    return painted(self, torch.cat([x, self.mask_token.repeat(len(x), missing, 1)], 1) + self.pos_embed)


@variant("restored-backwards")
@given
def shuffled_again(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore, inverse=True))


@variant("positions-too-early")
@given
def added_then_sorted(self, x, restore):
    x, p = self.embed(x), self.num_prefix_tokens
    missing = restore.shape[1] + p - x.shape[1]
    x = torch.cat([x, self.mask_token.repeat(len(x), missing, 1)], 1) + self.pos_embed
    rows = torch.arange(len(x))[:, None]
    return painted(self, torch.cat([x[:, :p], x[:, p:][rows, restore]], 1))


@variant("no-positions")
@given
def nowhere(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore, positions="none"))


@variant("seen-only-positions")
@given
def hidden_nowhere(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore, positions="seen"))


@variant("zeros")
@given
def black_canvas(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore, filled=False))


@variant("no-norm")
@given
def straight_to_the_head(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore), norm=False)


@variant("one-block")
@given
def first_block_again_and_again(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore), blocks=[self.blocks[0]] * len(self.blocks))


@variant("no-blocks")
@given
def linear_painter(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore), blocks=[])


@variant("prefix-painted")
@given
def all_that_comes_out(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore), prefix=True)


@unknown
@given
def blocks_backwards(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore), blocks=list(reversed(self.blocks)))


@unknown
@given
def last_block_left_out(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore), blocks=self.blocks[:-1])


@unknown
@given
def positions_twice(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore) + self.pos_embed)


@unknown
@given
def zeros_and_no_positions(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore, filled=False, positions="none"))


@unknown
@given
def norm_before_the_blocks(self, x, restore):
    return painted(self, self.norm(on_a_canvas(self, x, restore)), norm=False)


@unknown
@given
def only_the_hidden(self, x, restore):
    return painted(self, on_a_canvas(self, x, restore))[:, : restore.shape[1] - x.shape[1] + self.num_prefix_tokens]
