"""The check of `finetuning.LoRALinear`."""

import torch
import torch.nn.functional as F
from torch import nn

from vitcourse import finetuning
from vitcourse.course.checks import build, check


def _linear(rng, width, out):
    layer = nn.Linear(width, out).double()
    with torch.no_grad():
        layer.weight.copy_(rng.normal(out, width))
        layer.bias.copy_(rng.normal(out))
    return layer


@check(
    "finetuning.LoRALinear",
    reference="vitcourse.finetuning.LoRALinear",
    level=3,
    minutes=20,
    why="The most widely used way to adapt a large model, and on a fused `qkv` the one that is most often wired up "
    "wrongly.",
    hints=[
        "First what the frozen layer gives. Then, for each slice, its own update, onto its own rows of the output.",
        "A x is (..., r), and B takes that to the width of the slice. In PyTorch weights are (out, in).",
        "The factor is α / r. Rows of W are the last axis of y.",
    ],
)
def lora_linear(rng):
    slices = {"q": (0, 4), "v": (8, 12)}
    yield build(_linear(rng, 5, 12), slices, rank=2, alpha=3.0).call(rng.normal(3, 7, 5))
    yield build(_linear(rng, 6, 9), {"k": (3, 6)}, rank=3, alpha=1.0).call(rng.normal(1, 2, 6)).on("an update of k")
    every = {"q": (0, 2), "k": (2, 4), "v": (4, 6)}
    yield build(_linear(rng, 4, 6), every, rank=3, alpha=2.0).call(rng.normal(2, 5, 4)).on("updates of all three")
    yield build(_linear(rng, 3, 5), {"all": (0, 5)}, rank=1).call(rng.normal(4, 3)).on("one slice, and alpha left out")


class _WrongUpdate(finetuning.LoRALinear):
    """Product, factor and sum, each of which a mistake may replace."""

    def factor(self):
        return self.alpha / self.rank

    def update(self, x, name):
        return x @ self.lora_A[name].T @ self.lora_B[name].T

    def rows(self, name):
        return slice(*self.slices[name])

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        for name in self.slices:
            self.join(y, self.rows(name), self.update(x, name) * self.factor())
        return y

    def join(self, y, rows, update):
        y[..., rows] += update


@lora_linear.mistake("no-factor", "the update is not scaled: with another rank it would want another learning rate")
class _(_WrongUpdate):
    def factor(self):
        return 1.0


@lora_linear.mistake("alpha-alone", "the update is scaled by α, not by α / r")
class _(_WrongUpdate):
    def factor(self):
        return self.alpha


@lora_linear.mistake("factor-upside-down", "the factor is r / α; it is α / r")
class _(_WrongUpdate):
    def factor(self):
        return self.rank / self.alpha


@lora_linear.mistake(
    "update-alone", "on its rows the update takes the place of what the frozen layer gives; it should be added"
)
class _(_WrongUpdate):
    def join(self, y, rows, update):
        y[..., rows] = update


@lora_linear.mistake("no-update", "the low-rank updates are never added: this is the frozen layer alone")
class _(_WrongUpdate):
    def join(self, y, rows, update):
        pass


@lora_linear.mistake(
    "one-after-the-other", "all updates land on the first rows, one behind the other: the rows of v lie further down"
)
class _(_WrongUpdate):
    def rows(self, name):
        width, place = len(self.lora_B[name]), list(self.slices).index(name)
        return slice(place * width, (place + 1) * width)


@lora_linear.mistake("shared-a", "all updates share the first A; each slice has its own")
class _(_WrongUpdate):
    def update(self, x, name):
        return x @ self.lora_A[next(iter(self.slices))].T @ self.lora_B[name].T


@lora_linear.mistake("non-linear", "something non-linear stands between A and B, so the update cannot be merged into W")
class _(_WrongUpdate):
    def update(self, x, name):
        return F.gelu(x @ self.lora_A[name].T) @ self.lora_B[name].T
