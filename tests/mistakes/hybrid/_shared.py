"""What several answers of this lesson share."""

import torch
import torch.nn.functional as F


def opened(self, z, last=torch.sigmoid):
    """(B, C) -> (B, C, 1, 1)."""
    z = F.linear(F.silu(F.linear(z, self.fc1.weight, self.fc1.bias)), self.fc2.weight, self.fc2.bias)
    return last(z).unsqueeze(-1).unsqueeze(-1)


def averages(x):
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def offsets(size):
    return [n + n - 1 for n in size]


def heads_of(self, x):
    parts = self.qkv(x).chunk(3, dim=-1)
    return [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts]
