"""Answers to `video.shift_mask_3d`."""

import itertools
import math

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("video.shift_mask_3d")


def padded(size, window):
    return [math.ceil(n / p) * p for n, p in zip(size, window, strict=True)]


def around(place, length, shift):
    """Whether a place of a rolled axis came around its end."""
    return place + shift >= length


def by_pairs(size, window, shift, strangers):
    """Window by window, token by token: `strangers(a, b, lengths)` of two places on the rolled map."""
    lengths = padded(size, window)
    masks = []
    for corner in itertools.product(*(range(0, n, p) for n, p in zip(lengths, window, strict=True))):
        inside = itertools.product(*(range(c, c + p) for c, p in zip(corner, window, strict=True)))
        tokens = list(inside)
        masks.append([[strangers(a, b, lengths) for b in tokens] for a in tokens])
    return torch.tensor(masks)


def apart(a, b, lengths, shift):
    """Along which axes two tokens are strangers."""
    return [around(x, n, s) != around(y, n, s) for x, y, n, s in zip(a, b, lengths, shift, strict=True)]


def mask(size, window, shift, decide=any):
    return by_pairs(size, window, shift, lambda a, b, lengths: bool(decide(apart(a, b, lengths, shift))))


@variant("inverted")
def may_see(size, window_size, shift):
    return torch.logical_not(mask(size, window_size, shift))


@variant("nobody-masked")
def nothing(size, window_size, shift):
    return mask(size, window_size, shift, lambda axes: False)


@variant("additive")
def to_be_added(size, window_size, shift):
    return mask(size, window_size, shift).float() * -100


@variant("space-only")
def two_axes(size, window_size, shift):
    return mask(size, window_size, shift, lambda axes: any(axes[1:]))


@variant("time-only")
def first_axis(size, window_size, shift):
    return mask(size, window_size, shift, lambda axes: axes[0])


@variant("rows-forgotten")
def without_rows(size, window_size, shift):
    return mask(size, window_size, shift, lambda axes: axes[0] or axes[2])


@variant("columns-forgotten")
def without_columns(size, window_size, shift):
    return mask(size, window_size, shift, lambda axes: any(axes[:2]))


@variant("all-axes")
def every_axis(size, window_size, shift):
    return mask(size, window_size, shift, all)


@variant("two-kinds")
def came_around_or_not(size, window_size, shift):
    def strangers(a, b, lengths):
        first, second = (
            any(around(x, n, s) for x, n, s in zip(token, lengths, shift, strict=True)) for token in (a, b)
        )
        return first != second

    return by_pairs(size, window_size, shift, strangers)


@variant("before-the-roll")
def unrolled(size, window_size, shift):
    def strangers(a, b, lengths):
        return any((x < s) != (y < s) for x, y, s in zip(a, b, shift, strict=True))

    return by_pairs(size, window_size, shift, strangers)


@variant("other-direction")
def rolled_forward(size, window_size, shift):
    other = [(p - s) % p for p, s in zip(window_size, shift, strict=True)]
    return mask(size, window_size, other)


@variant("plain-reshape")
def stretches(size, window_size, shift):
    axes = [
        torch.tensor([around(i, n, s) for i in range(n)]) for n, s in zip(padded(size, window_size), shift, strict=True)
    ]
    kinds = torch.cartesian_prod(*axes).reshape(-1, math.prod(window_size), 3)
    return (kinds[:, :, None] != kinds[:, None]).any(-1)


@variant("padding-masked")
def padding_apart(size, window_size, shift):
    def kind(x, n, real, s):
        return "padding" if (x + s) % n >= real else around(x, n, s)

    def strangers(a, b, lengths):
        axes = zip(a, b, lengths, size, shift, strict=True)
        return any(kind(x, n, real, s) != kind(y, n, real, s) for x, y, n, real, s in axes)

    return by_pairs(size, window_size, shift, strangers)


@variant("unpadded-end")
def real_end(size, window_size, shift):
    def strangers(a, b, _):
        return any(apart(a, b, size, shift))

    return by_pairs(size, window_size, shift, strangers)


@variant("windows-before")
def unshifted_windows(size, window_size, shift):
    def strangers(a, b, lengths):
        axes = zip(a, b, lengths, window_size, shift, strict=True)
        return any((x + s) % n // p != (y + s) % n // p for x, y, n, p, s in axes)

    return by_pairs(size, window_size, shift, strangers)


@variant("rolled-twice")
def once_more(size, window_size, shift):
    def strangers(a, b, lengths):
        first, second = (
            [around((x + s) % n, n, s) for x, n, s in zip(token, lengths, shift, strict=True)] for token in (a, b)
        )
        return first != second

    return by_pairs(size, window_size, shift, strangers)


@unknown
def odd_number(size, window_size, shift):
    """Strangers along two axes are friends again."""
    return mask(size, window_size, shift, lambda axes: sum(axes) % 2 == 1)


@unknown
def one_further(size, window_size, shift):
    return mask(size, window_size, [s + 1 if s else 0 for s in shift])


@unknown
def queries_alone(size, window_size, shift):
    """Only tokens that came around are kept from the others, and not the other way."""

    def strangers(a, b, lengths):
        return any(around(x, n, s) and not around(y, n, s) for x, y, n, s in zip(a, b, lengths, shift, strict=True))

    return by_pairs(size, window_size, shift, strangers)


@unknown
def columns_first(size, window_size, shift):
    t, h, w = window_size
    found = mask(size, window_size, shift)
    order = torch.arange(t * h * w).reshape(t, h, w).transpose(1, 2).flatten()
    return found[:, order][:, :, order]


@right
def pair_by_pair(size, window_size, shift):
    return mask(size, window_size, shift)


@right
def by_slices(size, window_size, shift):
    """As in torchvision: three stretches of each axis, numbered."""
    lengths = padded(size, window_size)
    regions = torch.zeros(lengths)
    stretches = [
        [slice(0, -p), slice(-p, -s), slice(-s, None)] if s else [slice(None)]
        for p, s in zip(window_size, shift, strict=True)
    ]
    for number, cut in enumerate(itertools.product(*stretches)):
        regions[cut] = number
    p, q, r = window_size
    t, h, w = lengths
    regions = regions.reshape(t // p, p, h // q, q, w // r, r).permute(0, 2, 4, 1, 3, 5).reshape(-1, p * q * r)
    return regions.unsqueeze(1) - regions.unsqueeze(2) != 0


@right
def by_origin(size, window_size, shift):
    """Where each token was before the roll, and which of the displaced windows that is in."""
    p, q, r = window_size
    axes = []
    for n, window, by in zip(padded(size, window_size), window_size, shift, strict=True):
        origin = torch.arange(n).roll(-by)
        axes.append((origin - by) // window if by else origin // window)
    t, h, w = (axis.float() for axis in axes)
    number = 1e4 * t[:, None, None] + 1e2 * h[:, None] + w
    windows = number.unfold(0, p, p).unfold(1, q, q).unfold(2, r, r).reshape(-1, p * q * r)
    return windows[..., None].ne(windows[:, None, :])


@right
def by_products(size, window_size, shift):
    """Friends along each axis; the three tables multiplied."""
    friends = torch.ones(1, 1, 1, dtype=torch.float64)
    for n, window, by in zip(padded(size, window_size), window_size, shift, strict=True):
        wrapped = F.one_hot((torch.arange(n) >= n - by).long(), 2).double().reshape(-1, window, 2)
        table = wrapped @ wrapped.mT  # (windows along the axis, window, window)
        friends = torch.einsum("wij,vkl->wvikjl", friends, table).reshape(
            len(friends) * len(table), friends.shape[1] * window, -1
        )
    return friends == 0


@right
def by_distance(size, window_size, shift):
    """Who sits in one window of the rolled map, and was a window or more away before the roll."""
    lengths = padded(size, window_size)
    before = torch.stack(torch.meshgrid(*map(torch.arange, lengths), indexing="ij"))
    before = before.roll([-s for s in shift], (1, 2, 3))
    for axis, p in enumerate(window_size, 1):
        before = before.unfold(axis, p, p)
    before = before.flatten(4).flatten(1, 3)  # (3, windows, tokens)
    distance = (before[:, :, :, None] - before[:, :, None]).abs()
    return (distance >= torch.tensor(window_size)[:, None, None, None]).any(0)
