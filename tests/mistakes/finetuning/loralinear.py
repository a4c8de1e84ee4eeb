"""Answers to `finetuning.LoRALinear`."""

import torch
from torch import nn

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("finetuning.LoRALinear")


def layer(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Adapted(nn.Module):
        def __init__(self, base, slices, rank, alpha=None):
            super().__init__()
            self.weight, self.bias = base.weight, base.bias
            self.weight.requires_grad_(False)
            self.bias.requires_grad_(False)
            self.slices, self.rank, self.alpha = dict(slices), rank, rank if alpha is None else alpha
            like = {"device": base.weight.device, "dtype": base.weight.dtype}
            self.lora_A = nn.ParameterDict({n: torch.randn(rank, base.in_features, **like) * 0.1 for n in slices})
            self.lora_B = nn.ParameterDict({n: torch.zeros(b - a, rank, **like) for n, (a, b) in slices.items()})

    Adapted.forward, Adapted.__name__ = forward, forward.__name__
    return Adapted


def changed(self, x, scale, between=lambda z: z, a_of=lambda name: name):
    """By a weight for each slice, laid into a zero matrix where nothing is linear, else by padding."""
    y = torch.einsum("...i,oi->...o", x, self.weight) + self.bias
    for name, (start, stop) in self.slices.items():
        low = between(torch.einsum("...i,ri->...r", x, self.lora_A[a_of(name)]))
        high = scale * torch.einsum("...r,or->...o", low, self.lora_B[name])
        y = y + nn.functional.pad(high, (start, y.shape[-1] - stop))
    return y


@variant("no-factor")
@layer
def unscaled(self, x):
    return changed(self, x, 1)


@variant("alpha-alone")
@layer
def by_alpha(self, x):
    return changed(self, x, self.alpha)


@variant("factor-upside-down")
@layer
def rank_over_alpha(self, x):
    return changed(self, x, self.rank / self.alpha)


@variant("update-alone")
@layer
def overwrites(self, x):
    y = x @ self.weight.T + self.bias
    for name, (start, stop) in self.slices.items():
        new = x @ (self.lora_B[name] @ self.lora_A[name]).T * (self.alpha / self.rank)
        y = torch.cat([y[..., :start], new, y[..., stop:]], dim=-1)
    return y


@variant("no-update")
@layer
def plain(self, x):
    return changed(self, x, 0.0)


@variant("one-after-the-other")
@layer
def laid_end_to_end(self, x):
    y = x @ self.weight.T + self.bias
    new = torch.cat([x @ (self.lora_B[n] @ self.lora_A[n]).T for n in self.slices], dim=-1) * (self.alpha / self.rank)
    return y + nn.functional.pad(new, (0, y.shape[-1] - new.shape[-1]))


@variant("shared-a")
@layer
def first_a_for_all(self, x):
    return changed(self, x, self.alpha / self.rank, a_of=lambda name: list(self.slices)[0])


@variant("non-linear")
@layer
def an_mlp(self, x):
    return changed(self, x, self.alpha / self.rank, between=nn.GELU())


@unknown
@layer
def with_relu(self, x):
    return changed(self, x, self.alpha / self.rank, between=torch.relu)


@unknown
@layer
def without_bias(self, x):
    return changed(self, x, self.alpha / self.rank) - self.bias


@unknown
@layer
def cut_off(self, x):
    return changed(self, x, self.alpha / self.rank, between=torch.detach)


@right
@layer
def as_one_matrix(self, x):
    weight = self.weight.clone()
    for name, (start, stop) in self.slices.items():
        weight[start:stop] = weight[start:stop] + self.alpha / self.rank * self.lora_B[name] @ self.lora_A[name]
    return nn.functional.linear(x, weight, self.bias)


@right
@layer
def padded(self, x):
    return changed(self, x, self.alpha / self.rank)
