"""Answers to `video.resize_time_embed`."""

import torch
import torch.nn.functional as F
from einops import rearrange

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("video.resize_time_embed")


def places_of(old, new):
    """Where the centre of each new frame lies, in old frames."""
    return ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(0, old - 1)


def looked_up(rest, places):
    """Linear between the two positions around each place."""
    low = places.floor().long()
    high = (low + 1).clamp(max=rest.shape[1] - 1)
    share = (places - low).to(rest.dtype)[:, None]
    return (1 - share) * rest[:, low] + share * rest[:, high]


def with_prefix(time_embed, prefix, change):
    first, rest = time_embed.tensor_split([prefix], dim=1)
    return torch.cat([first, change(rest)], dim=1)


@variant("nearest")
def left_neighbour(time_embed, frames, num_prefix_tokens=0):
    old = time_embed.shape[1] - num_prefix_tokens
    index = torch.tensor([k * old // frames for k in range(frames)])
    return with_prefix(time_embed, num_prefix_tokens, lambda rest: rest[:, index])


@variant("nearest-exact")
def owner(time_embed, frames, num_prefix_tokens=0):
    old = time_embed.shape[1] - num_prefix_tokens
    index = torch.tensor([(2 * k + 1) * old // (2 * frames) for k in range(frames)])
    return with_prefix(time_embed, num_prefix_tokens, lambda rest: rest[:, index])


@variant("align-corners")
def pinned(time_embed, frames, num_prefix_tokens=0):
    old = time_embed.shape[1] - num_prefix_tokens
    places = torch.linspace(0, old - 1, frames, dtype=torch.float64)
    return with_prefix(time_embed, num_prefix_tokens, lambda rest: looked_up(rest, places))


@variant("cut-or-repeated")
def tiled(time_embed, frames, num_prefix_tokens=0):
    def again(rest):
        return rest.repeat(1, -(-frames // rest.shape[1]), 1)[:, :frames]

    return with_prefix(time_embed, num_prefix_tokens, again)


@variant("padded")
def last_again(time_embed, frames, num_prefix_tokens=0):
    def longer(rest):
        missing = max(frames - rest.shape[1], 0)
        return torch.cat([rest, rest[:, -1:].expand(-1, missing, -1)], dim=1)[:, :frames]

    return with_prefix(time_embed, num_prefix_tokens, longer)


@variant("averaged")
def means(time_embed, frames, num_prefix_tokens=0):
    def pooled(rest):
        old = rest.shape[1]
        cuts = [(k * old // frames, -(-(k + 1) * old // frames)) for k in range(frames)]
        return torch.stack([rest[:, a:b].mean(1) for a, b in cuts], dim=1)

    return with_prefix(time_embed, num_prefix_tokens, pooled)


@variant("prefix-stretched")
def everything(time_embed, frames, num_prefix_tokens=0):
    return looked_up(time_embed, places_of(time_embed.shape[1], num_prefix_tokens + frames))


@variant("prefix-last")
def behind(time_embed, frames, num_prefix_tokens=0):
    first, rest = time_embed[:, :num_prefix_tokens], time_embed[:, num_prefix_tokens:]
    return torch.cat([looked_up(rest, places_of(rest.shape[1], frames)), first], dim=1)


@variant("prefix-lost")
def forgotten(time_embed, frames, num_prefix_tokens=0):
    rest = time_embed[:, num_prefix_tokens:]
    return looked_up(rest, places_of(rest.shape[1], frames))


@variant("whole-length")
def table_of_so_many(time_embed, frames, num_prefix_tokens=0):
    wanted = max(frames - num_prefix_tokens, 1)
    old = time_embed.shape[1] - num_prefix_tokens
    return with_prefix(time_embed, num_prefix_tokens, lambda rest: looked_up(rest, places_of(old, wanted)))


@variant("beginnings")
def from_the_left(time_embed, frames, num_prefix_tokens=0):
    old = time_embed.shape[1] - num_prefix_tokens
    places = torch.tensor([min(k * old / frames, old - 1) for k in range(frames)], dtype=torch.float64)
    return with_prefix(time_embed, num_prefix_tokens, lambda rest: looked_up(rest, places))


@variant("reshaped")
def viewed(time_embed, frames, num_prefix_tokens=0):
    def stretched(rest):
        _, old, width = rest.shape
        table = rest.flatten().unflatten(0, (1, width, old))
        return looked_up(table.mT, places_of(old, frames)).mT.flatten().unflatten(0, (1, frames, width))

    return with_prefix(time_embed, num_prefix_tokens, stretched)


@unknown
def reversed_in_time(time_embed, frames, num_prefix_tokens=0):
    old = time_embed.shape[1] - num_prefix_tokens
    return with_prefix(time_embed, num_prefix_tokens, lambda rest: looked_up(rest, places_of(old, frames)).flip(1))


@unknown
def along_the_width(time_embed, frames, num_prefix_tokens=0):
    """Stretches the wrong axis, and back."""

    def stretched(rest):
        wide = F.interpolate(rest, 2 * rest.shape[2], mode="linear")[:, :, ::2]
        return F.interpolate(wide.transpose(1, 2), frames, mode="linear").transpose(1, 2)

    return with_prefix(time_embed, num_prefix_tokens, stretched)


@unknown
def one_prefix_always(time_embed, frames, num_prefix_tokens=0):
    rest = time_embed[:, 1:] if time_embed.shape[1] > 1 else time_embed
    return torch.cat([time_embed[:, :1], looked_up(rest, places_of(rest.shape[1], frames))], dim=1)


@right
def by_places(time_embed, frames, num_prefix_tokens=0):
    old = time_embed.shape[1] - num_prefix_tokens
    return with_prefix(time_embed, num_prefix_tokens, lambda rest: looked_up(rest, places_of(old, frames)))


@right
def as_an_image(time_embed, frames, num_prefix_tokens=0):
    def stretched(rest):
        image = rearrange(rest, "1 t d -> 1 d t 1")
        image = F.interpolate(image, (frames, 1), mode="bilinear", align_corners=False)
        return rearrange(image, "1 d t 1 -> 1 t d")

    return with_prefix(time_embed, num_prefix_tokens, stretched)


@right
def by_a_matrix(time_embed, frames, num_prefix_tokens=0):
    old = time_embed.shape[1] - num_prefix_tokens
    hat = 1 - (places_of(old, frames)[:, None] - torch.arange(old)).abs()
    matrix = hat.clamp(min=0).to(time_embed.dtype)
    out = time_embed.new_zeros(1, num_prefix_tokens + frames, time_embed.shape[2])
    out[:, :num_prefix_tokens] = time_embed[:, :num_prefix_tokens]
    out[:, num_prefix_tokens:] = torch.einsum("nt,btd->bnd", matrix, time_embed[:, num_prefix_tokens:])
    return out


@right
def untouched_where_equal(time_embed, frames, num_prefix_tokens=0):
    if time_embed.shape[1] == num_prefix_tokens + frames:
        return time_embed
    prefix, rest = time_embed.split([num_prefix_tokens, time_embed.shape[1] - num_prefix_tokens], dim=1)
    rest = F.interpolate(rest.permute(0, 2, 1), size=frames, mode="linear", align_corners=False)
    return torch.cat((prefix, rest.permute(0, 2, 1)), dim=1)
