"""Answers to `hybrid.ConvStem`."""

import math

from torch import nn

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hybrid.ConvStem")


def stem(make):
    """The lesson's class, with the learner's ``make(self, patch_size, in_chans, embed_dim)`` for its layers."""

    class Stem(nn.Module):
        def __init__(self, patch_size=16, in_chans=3, embed_dim=768):
            super().__init__()
            make(self, patch_size, in_chans, embed_dim)

        def forward(self, x):
            return self.proj(self.convs(x))

    Stem.__name__ = make.__name__
    return Stem


def chain(patch, dim_in, dim, widths=None, strides=None, norm=True, act="relu", order="cna", **options):
    """The layers of a stem in one list; ``order`` says where convolution, norm and activation stand."""
    count = int(math.log2(patch))
    widths = widths or [dim >> (count - 1 - i) for i in range(count)]
    options = {"kernel_size": 3, "padding": 1, "bias": False, **options}
    layers = []
    for i in range(count):
        conv = nn.Conv2d(dim_in, widths[i], stride=strides[i] if strides else 2, **options)
        parts = {
            "c": conv,
            "n": nn.BatchNorm2d(widths[i]),
            "a": {"relu": nn.ReLU, "gelu": nn.GELU}.get(act, nn.Identity)(),
        }
        layers += [parts[letter] for letter in order if norm or letter != "n"]
        dim_in = widths[i]
    return nn.Sequential(*layers)


def simple(key, decorate, last=None, **options):
    def make(self, patch_size, in_chans, embed_dim):
        given = {name: value(patch_size, embed_dim) if callable(value) else value for name, value in options.items()}
        self.convs = chain(patch_size, in_chans, embed_dim, **given)
        self.proj = last(embed_dim) if last else nn.Conv2d(embed_dim, embed_dim, kernel_size=(1, 1))

    make.__name__ = f"{key}_stem".replace("-", "_")
    return decorate(stem(make))


def halvings(patch):
    return len(bin(patch)) - 3


class Clipped(nn.Conv2d):
    def __init__(self, dim):
        super().__init__(dim, dim, 1)

    def forward(self, x):
        return super().forward(x).clamp(min=0)


for key, change in {
    "same-width": {"widths": lambda p, d: [d for _ in range(halvings(p))]},
    "with-bias": {"bias": True},
    "no-norm": {"norm": False},
    "norm-after-relu": {"order": "can"},
    "no-activation": {"act": "none"},
    "gelu": {"act": "gelu"},
    "no-padding": {"padding": "valid"},
    "one-big-step": {"strides": lambda p, d: [p, *[1 for _ in range(halvings(p) - 1)]]},
    "no-projection": {"last": lambda dim: nn.Sequential()},
    "relu-last": {"last": Clipped},
}.items():
    simple(key, variant(key), **change)


for key, change in {
    "mirrored-border": {"padding_mode": "circular"},
    "leaky": {"last": lambda dim: nn.Sequential(nn.Conv2d(dim, dim, 1), nn.Tanh())},
    "widest-first": {"widths": lambda p, d: [d >> i for i in range(halvings(p))]},
    "projection-without-bias": {"last": lambda dim: nn.Conv2d(dim, dim, 1, bias=False)},
}.items():
    simple(key, unknown, **change)


@unknown
class SquaredInTheEnd(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.convs, self.proj = chain(patch_size, in_chans, embed_dim), nn.Conv2d(embed_dim, embed_dim, 1)

    def forward(self, x):
        return self.proj(self.convs(x) ** 2)


simple("plain", right)


@right
@stem
def appended_one_by_one(self, patch_size, in_chans, embed_dim):
    self.convs, width = nn.Sequential(), in_chans
    while patch_size > 1:
        patch_size //= 2
        wider = embed_dim // patch_size
        for layer in (nn.Conv2d(width, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU(inplace=True)):
            self.convs.append(layer)
        width = wider
    self.proj = nn.Conv2d(width, embed_dim, 1)


@unknown
@stem
def a_slow_average(self, patch_size, in_chans, embed_dim):
    self.convs = chain(patch_size, in_chans, embed_dim)
    for layer in self.convs:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.01
    self.proj = nn.Conv2d(embed_dim, embed_dim, 1)
