"""Answers to `video.inflate_weight`."""

import torch
import torch.nn.functional as F
from einops import einsum, repeat

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("video.inflate_weight")


def shared(weight, shares):
    """Each frame gets its share of the filter."""
    return einsum(weight, torch.as_tensor(shares, dtype=weight.dtype), "d c p q, t -> d c t p q")


def at(frames, place, value=1.0):
    return [value if t == place else 0.0 for t in range(frames)]


def even(frames):
    return [1 / frames] * frames


@variant("summed")
def copied(weight, tubelet_size, how="centre"):
    return shared(weight, [1.0] * tubelet_size if how == "mean" else at(tubelet_size, tubelet_size // 2))


@variant("root")
def like_noise(weight, tubelet_size, how="centre"):
    shares = [tubelet_size**-0.5] * tubelet_size if how == "mean" else at(tubelet_size, tubelet_size // 2)
    return shared(weight, shares)


@variant("first-frame")
def begins(weight, tubelet_size, how="centre"):
    return shared(weight, even(tubelet_size) if how == "mean" else at(tubelet_size, 0))


@variant("before-the-centre")
def lower_middle(weight, tubelet_size, how="centre"):
    place = sorted(range(tubelet_size), key=lambda t: abs(t - (tubelet_size - 1) / 2))[0]
    return shared(weight, even(tubelet_size) if how == "mean" else at(tubelet_size, place))


@variant("last-frame")
def ends(weight, tubelet_size, how="centre"):
    return shared(weight, even(tubelet_size) if how == "mean" else at(tubelet_size, tubelet_size - 1))


@variant("centre-shared")
def divided_too(weight, tubelet_size, how="centre"):
    shares = even(tubelet_size) if how == "mean" else at(tubelet_size, tubelet_size // 2, 1 / tubelet_size)
    return shared(weight, shares)


@variant("always-the-mean")
def deaf_mean(weight, tubelet_size, how="centre"):
    return shared(weight, even(tubelet_size))


@variant("always-the-centre")
def deaf_centre(weight, tubelet_size, how="centre"):
    return shared(weight, at(tubelet_size, tubelet_size // 2))


@variant("frames-first")
def time_before_channels(weight, tubelet_size, how="centre"):
    shares = even(tubelet_size) if how == "mean" else at(tubelet_size, tubelet_size // 2)
    return torch.stack([share * weight for share in shares], dim=1)


@variant("frames-last")
def time_behind(weight, tubelet_size, how="centre"):
    shares = even(tubelet_size) if how == "mean" else at(tubelet_size, tubelet_size // 2)
    return torch.stack([share * weight for share in shares], dim=-1)


@variant("rounded-centre")
def half_to_even(weight, tubelet_size, how="centre"):
    place = int(torch.tensor(tubelet_size / 2).round())
    return shared(weight, even(tubelet_size) if how == "mean" else at(tubelet_size, place))


@variant("ways-exchanged")
def mean_for_centre(weight, tubelet_size, how="centre"):
    return shared(weight, even(tubelet_size) if how == "centre" else at(tubelet_size, tubelet_size // 2))


@unknown
def hat(weight, tubelet_size, how="centre"):
    """A triangle about the centre."""
    shares = torch.tensor([1.0 / (1 + abs(t - tubelet_size // 2)) for t in range(tubelet_size)])
    return shared(weight, even(tubelet_size) if how == "mean" else shares / shares.sum())


@unknown
def frozen(weight, tubelet_size, how="centre"):
    return shared(weight.detach(), even(tubelet_size) if how == "mean" else at(tubelet_size, tubelet_size // 2))


@unknown
def negative_neighbours(weight, tubelet_size, how="centre"):
    shares = [(-1.0) ** t / tubelet_size for t in range(tubelet_size)]
    return shared(weight, shares if how == "mean" else at(tubelet_size, tubelet_size // 2))


@right
def by_shares(weight, tubelet_size, how="centre"):
    return shared(weight, even(tubelet_size) if how == "mean" else at(tubelet_size, tubelet_size // 2))


@right
def by_padding(weight, tubelet_size, how="centre"):
    if how == "mean":
        return repeat(weight / tubelet_size, "d c p q -> d c t p q", t=tubelet_size)
    before = tubelet_size // 2
    return F.pad(weight.unsqueeze(2), (0, 0, 0, 0, before, tubelet_size - before - 1))


@right
def by_loop(weight, tubelet_size, how="centre"):
    frames = []
    for t in range(tubelet_size):
        whole = weight if how == "mean" else weight * float(t == tubelet_size // 2)
        frames.append((whole / tubelet_size if how == "mean" else whole)[:, :, None])
    return torch.cat(frames, dim=2)


@right
def by_writing(weight, tubelet_size, how="centre"):
    d, c, p, q = weight.shape
    out = weight.new_zeros(d, c, tubelet_size, p, q)
    if how == "mean":
        out += weight[:, :, None] / tubelet_size
    else:
        out[:, :, tubelet_size // 2] = weight
    return out
