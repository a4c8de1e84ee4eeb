"""The check of `pretraining.Decoder`."""

import torch

from vitcourse.course.checks import build, check
from vitcourse.pretraining import mae
from vitcourse.pretraining.mae import take


@check(
    "pretraining.Decoder",
    reference="vitcourse.pretraining.mae.Decoder",
    level=3,
    minutes=15,
    why="The way back: each token to its place again, a mask token where nothing was seen.",
    hints=[
        "How many patches are there in all, and how many came? The rest are mask tokens, behind those that came.",
        "In that order, seen first, the patches lie as `restore` counts: take(patches, restore) puts each in its place.",
        "Positions belong to places of the image, so they come after that, for prefix and patches together; and what leaves "
        "are the patches alone.",
    ],
    exempt={
        "larger": "the positions are those of one grid",
        "smaller": "the positions are those of one grid",
    },
)
def decoder(rng):
    small = build(5, 7, (2, 3), num_prefix_tokens=1, embed_dim=8, depth=3, num_heads=2)
    yield small.call(rng.normal(2, 1 + 3, 5), rng.normal(2, 6).argsort(dim=1))
    yield small.call(rng.normal(4, 1 + 2, 5), rng.normal(4, 6).argsort(dim=1)).on("more images than patches seen")
    bare = build(in_dim=6, out_dim=3, grid_size=(3, 5), num_prefix_tokens=0, embed_dim=12, depth=1, num_heads=3)
    yield bare.call(rng.normal(1, 4, 6), rng.normal(1, 15).argsort(dim=1)).on("no prefix token, and one image")
    many = build(4, 2, (4, 2), num_prefix_tokens=2, embed_dim=4, depth=2, num_heads=1)
    wide = build(3, 2, (4, 6), num_prefix_tokens=1, embed_dim=4, depth=1, num_heads=1)
    yield wide.call(rng.normal(2, 1 + 2, 3), rng.normal(2, 24).argsort(dim=1)).on("two of 24 patches seen")
    yield many.call(rng.normal(3, 2 + 7, 4), rng.normal(3, 8).argsort(dim=1)).on("two prefix tokens, one hidden patch")


class _WrongDecoder(mae.Decoder):
    """The decoder in its steps, each of which a mistake may replace."""

    def tokens_of_hidden(self, b, count, like):
        return self.mask_token.to(like).expand(b, count, -1)

    def placed(self, patches, restore):
        return take(patches, restore)

    def positioned(self, prefix, patches, restore):
        return torch.cat([prefix, self.placed(patches, restore)], dim=1) + self.pos_embed

    def run(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def finish(self, x):
        return self.head(self.norm(x))

    def forward(self, x, restore):
        x = self.embed(x)
        prefix, seen = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        hidden = self.tokens_of_hidden(len(x), restore.shape[1] - seen.shape[1], x)
        x = self.positioned(prefix, torch.cat([seen, hidden], dim=1), restore)
        return self.finish(self.run(x))[:, self.num_prefix_tokens :]


@decoder.mistake("not-restored", "the patches stay in the shuffled order: none of them is in its place")
class _(_WrongDecoder):
    def placed(self, patches, restore):
        return patches


@decoder.mistake("restored-backwards", "the patches are shuffled once more, not put back: `restore` is inverted")
class _(_WrongDecoder):
    def placed(self, patches, restore):
        return take(patches, restore.argsort(1))


@decoder.mistake(
    "positions-too-early", "the positions are added in the shuffled order, so patches carry those of other places"
)
class _(_WrongDecoder):
    def positioned(self, prefix, patches, restore):
        x = torch.cat([prefix, patches], dim=1) + self.pos_embed
        n = self.num_prefix_tokens
        return torch.cat([x[:, :n], take(x[:, n:], restore)], dim=1)


@decoder.mistake("no-positions", "there are no positions, so all mask tokens are the same, wherever they stand")
class _(_WrongDecoder):
    def positioned(self, prefix, patches, restore):
        return torch.cat([prefix, self.placed(patches, restore)], dim=1)


@decoder.mistake("seen-only-positions", "the positions of hidden places are missing: mask tokens have none")
class _(_WrongDecoder):
    def positioned(self, prefix, patches, restore):
        positions, n = self.pos_embed.to(patches).expand(len(patches), -1, -1), self.num_prefix_tokens
        own = take(positions[:, n:], restore.argsort(1))
        own = own * (patches != self.mask_token.to(patches)).any(2, keepdim=True)
        return torch.cat([prefix + positions[:, :n], take(patches + own, restore)], dim=1)


@decoder.mistake("zeros", "hidden patches are zeros; the learnt mask token should stand there")
class _(_WrongDecoder):
    def tokens_of_hidden(self, b, count, like):
        return like.new_zeros(b, count, like.shape[2])


@decoder.mistake("no-norm", "the last norm is missing before the head")
class _(_WrongDecoder):
    def finish(self, x):
        return self.head(x)


@decoder.mistake("one-block", "one of the blocks does all the work; each has weights of its own")
class _(_WrongDecoder):
    def run(self, x):
        for _ in self.blocks:
            x = self.blocks[0](x)
        return x


@decoder.mistake("no-blocks", "the blocks are never called: each place is painted from its own token alone")
class _(_WrongDecoder):
    def run(self, x):
        return x


@decoder.mistake("prefix-painted", "the prefix tokens are painted, too; only patches have pixels")
class _(_WrongDecoder):
    def forward(self, x, restore):
        x, n = self.embed(x), self.num_prefix_tokens
        hidden = self.tokens_of_hidden(len(x), restore.shape[1] - x.shape[1] + n, x)
        return self.finish(self.run(self.positioned(x[:, :n], torch.cat([x[:, n:], hidden], dim=1), restore)))
