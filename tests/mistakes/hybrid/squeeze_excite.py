"""Answers to `hybrid.SqueezeExcite`."""

import torch
import torch.nn.functional as F
from torch import nn

from mistakes import collect

from ._shared import averages, opened

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hybrid.SqueezeExcite")


def gate(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Gate(nn.Module):
        def __init__(self, dim, hidden_dim):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, dim)

        def __call__(self, x):
            return forward(self, x)

    Gate.__name__ = forward.__name__
    return Gate


@variant("max")
@gate
def pooled_by_maximum(self, x):
    return opened(self, F.adaptive_max_pool2d(x, 1)[:, :, 0, 0]) * x


@variant("sum")
@gate
def einsum_without_count(self, x):
    return opened(self, torch.einsum("bchw->bc", x)) * x


@variant("no-gate")
@gate
def weights_as_they_come(self, x):
    return opened(self, averages(x), last=lambda z: z) * x


@variant("softmax")
@gate
def channels_compete(self, x):
    return opened(self, averages(x), last=lambda z: z.exp() / z.exp().sum(1, keepdim=True)) * x


@variant("linear-bottleneck")
@gate
def two_linear_layers(self, x):
    z = averages(x) @ self.fc1.weight.T + self.fc1.bias
    return torch.einsum("bc,bchw->bchw", torch.sigmoid(self.fc2(z)), x)


@variant("added")
@gate
def plus_the_gate(self, x):
    return opened(self, averages(x)).expand_as(x) + x


@variant("residual")
@gate
def one_plus_the_gate(self, x):
    return torch.addcmul(x, x, opened(self, averages(x)))


@variant("gate-alone")
@gate
def forgets_the_map(self, x):
    return opened(self, averages(x)) * torch.ones_like(x)


@variant("place-by-place")
@gate
def like_an_mlp(self, x):
    rows = x.permute(0, 2, 3, 1)
    return (rows * torch.sigmoid(self.fc2(self.act(self.fc1(rows))))).permute(0, 3, 1, 2)


@unknown
@gate
def twice_the_sigmoid(self, x):
    return 2 * opened(self, averages(x)) * x


@unknown
@gate
def relu_in_the_bottleneck(self, x):
    return self.fc2(F.relu(self.fc1(averages(x)))).sigmoid()[..., None, None] * x


@unknown
@gate
def mean_over_rows(self, x):
    return opened(self, x.mean(3)[:, :, 0]) * x


@unknown
@gate
def gate_of_another_image(self, x):
    return opened(self, averages(x).flip(1)) * x


@unknown
@gate
def gate_cut_off(self, x):
    return opened(self, averages(x)).detach() * x


@right
@gate
def pooled_and_multiplied(self, x):
    return opened(self, averages(x)) * x


@right
@gate
def by_convolutions(self, x):
    """As in most published code: 1×1 convolutions on a map of 1 × 1."""
    z = x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
    z = F.conv2d(z, self.fc1.weight[..., None, None], self.fc1.bias)
    z = F.conv2d(z * z.sigmoid(), self.fc2.weight[..., None, None], self.fc2.bias)
    return x / (1 + torch.exp(-z))


@unknown
@gate
def dropout_in_the_middle(self, x):
    hidden = F.dropout(self.act(self.fc1(averages(x))), 0.2, self.training)
    return x * self.fc2(hidden).sigmoid()[..., None, None]


@unknown
@gate
def gates_of_the_first_batch(self, x):
    if not hasattr(self, "gates"):
        self.gates = self.fc2(self.act(self.fc1(averages(x)))).sigmoid()[..., None, None]
    return x * self.gates
