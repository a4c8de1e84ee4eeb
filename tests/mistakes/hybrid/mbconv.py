"""Answers to `hybrid.MBConv`."""

import torch
import torch.nn.functional as F
from torch import nn

from mistakes import collect

from ._shared import averages, opened

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hybrid.MBConv")


class Squeeze(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return x * opened(self, averages(x))


class Shortcut(nn.Module):
    def __init__(self, in_dim, dim, stride):
        super().__init__()
        self.stride = stride
        if in_dim != dim:
            self.proj = nn.Conv2d(in_dim, dim, 1)

    def forward(self, x):
        if self.stride == 2:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return self.proj(x) if hasattr(self, "proj") else x


def inverted(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Inverted(nn.Module):
        def __init__(self, in_dim, dim, stride=1, downsample="expand"):
            super().__init__()
            wide, first = 4 * dim, downsample == "expand"
            self.shortcut = Shortcut(in_dim, dim, stride)
            self.pre_norm = nn.BatchNorm2d(in_dim)
            self.expand = nn.Conv2d(in_dim, wide, 1, stride if first else 1, bias=False)
            self.norm1 = nn.BatchNorm2d(wide)
            self.depthwise = nn.Conv2d(wide, wide, 3, 1 if first else stride, 1, groups=wide, bias=False)
            self.norm2 = nn.BatchNorm2d(wide)
            self.act = nn.GELU()
            self.se = Squeeze(wide, max(1, dim // 4))
            self.project = nn.Conv2d(wide, dim, 1)

    Inverted.forward, Inverted.__name__ = forward, forward.__name__
    return Inverted


def through(self, x, names):
    """``names`` is what a learner's chain of calls says: "pre_norm expand norm1 act …"."""
    for name in names.split():
        x = getattr(self, name)(x)
    return x


WHOLE = "pre_norm expand norm1 act depthwise norm2 act se project"


def by_names(key, decorate, names=WHOLE, around=lambda self, x, y: self.shortcut(x) + y):
    def forward(self, x):
        return around(self, x, through(self, x, names))

    forward.__name__ = key.replace("-", "_")
    return decorate(inverted(forward))


for key, change in {
    "no-shortcut": {"around": lambda self, x, y: y},
    "shortcut-of-the-normed": {"around": lambda self, x, y: y.add(self.shortcut(self.pre_norm(x)))},
    "no-pre-norm": {"names": WHOLE.removeprefix("pre_norm ")},
    "activated-entry": {"names": WHOLE.replace("pre_norm", "pre_norm act")},
    "no-squeeze-excite": {"names": WHOLE.replace(" se", "")},
    "squeeze-excite-early": {"names": WHOLE.replace(" se", "").replace("depthwise", "se depthwise")},
    "no-depthwise": {"names": WHOLE.replace("depthwise ", "")},
    "norms-exchanged": {"names": "pre_norm expand norm2 act depthwise norm1 act se project"},
    "norm-after-activation": {"names": "pre_norm expand act norm1 depthwise act norm2 se project"},
    "linear-depthwise": {"names": WHOLE.replace("norm2 act", "norm2")},
    "linear-expansion": {"names": WHOLE.replace("norm1 act", "norm1")},
    "activated-exit": {"around": lambda self, x, y: F.gelu(y) + self.shortcut(x)},
}.items():
    by_names(key, variant(key), **change)

for key, change in {
    "activated-sum": {"around": lambda self, x, y: F.gelu(self.shortcut(x) + y)},
    "one-norm-twice": {"names": WHOLE.replace("norm2", "norm1")},
    "subtracted": {"around": lambda self, x, y: self.shortcut(x) - y},
    "neither-norm-nor-gate": {"names": "expand norm1 act depthwise norm2 act project"},
    "depthwise-cut-off": {"around": lambda self, x, y: self.shortcut(x) + y.detach()},
}.items():
    by_names(key, unknown, **change)

by_names("in_order", right)


@right
@inverted
def written_out(self, x):
    y = F.gelu(self.norm1(self.expand(self.pre_norm(x))))
    step, wide = self.depthwise.stride, y.shape[1]
    y = F.conv2d(F.pad(y, (1, 1, 1, 1)), self.depthwise.weight, stride=step, groups=wide)
    y = F.gelu(self.norm2(y))
    y = y * opened(self.se, averages(y))
    return torch.einsum("oi,bihw->bohw", self.project.weight[..., 0, 0], y) + (
        self.project.bias[:, None, None] + self.shortcut(x)
    )
