"""Answers to `video.tube_mask`."""

import torch
from einops import repeat

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("video.tube_mask")


def hidden(noise, visible, largest=False):
    """(B, N) bool: all but the `visible` places with the least, or most, noise."""
    chosen = noise.topk(visible, dim=1, largest=largest).indices
    return torch.ones(noise.shape, dtype=torch.bool).scatter(1, chosen, False)


def tubes(places, moments):
    return repeat(places, "b n -> b (t n)", t=moments)


@variant("inverted")
def seen(noise, visible, moments):
    return ~tubes(hidden(noise, visible), moments)


@variant("most-noise")
def loudest_seen(noise, visible, moments):
    return tubes(hidden(noise, visible, largest=True), moments)


@variant("place-by-place")
def columns(noise, visible, moments):
    return repeat(hidden(noise, visible), "b n -> b (n t)", t=moments)


@variant("not-inverted")
def order_for_rank(noise, visible, moments):
    return torch.cat([noise.sort(dim=1).indices >= visible] * moments, dim=1)


@variant("visible-hidden")
def other_count(noise, visible, moments):
    return tubes(hidden(noise, noise.shape[1] - visible), moments)


@variant("one-for-all")
def first_clip(noise, visible, moments):
    return tubes(hidden(noise[:1].expand_as(noise), visible), moments)


@variant("one-moment")
def a_frame(noise, visible, moments):
    return hidden(noise, visible)


@variant("not-flat")
def with_an_axis(noise, visible, moments):
    return repeat(hidden(noise, visible), "b n -> b t n", t=moments)


@variant("other-places")
def moving_holes(noise, visible, moments):
    places = hidden(noise, visible)
    return torch.cat([torch.roll(places, k, dims=1) for k in range(moments)], dim=1)


@unknown
def first_places(noise, visible, moments):
    return tubes((torch.arange(noise.shape[1]) >= visible).expand_as(noise), moments)


@unknown
def by_threshold(noise, visible, moments):
    return tubes(noise > noise.mean(1, keepdim=True), moments)


@unknown
def one_more(noise, visible, moments):
    return tubes(hidden(noise, min(visible + 1, noise.shape[1])), moments)


@right
def by_topk(noise, visible, moments):
    return tubes(hidden(noise, visible), moments)


@right
def by_counting(noise, visible, moments):
    """How many have less noise?"""
    less = (noise[:, None] < noise[:, :, None]).sum(-1)
    return (less >= visible).tile(1, moments)


@right
def by_the_last_seen(noise, visible, moments):
    last = noise.kthvalue(visible, dim=1, keepdim=True).values
    return torch.cat([noise > last for _ in range(moments)], dim=1)


@right
def clip_by_clip(noise, visible, moments):
    rows = []
    for row in noise:
        seen = set(row.argsort()[:visible].tolist())
        rows.append([place not in seen for _ in range(moments) for place in range(len(row))])
    return torch.tensor(rows)
