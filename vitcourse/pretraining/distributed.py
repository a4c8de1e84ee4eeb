"""One batch that several processes share: what a loss needs from the others, and gradients as if it were one process.

The engine adds up the gradients of all processes. A loss that takes part in a sum over them (:func:`summed`) therefore
gets, on the way back, what all processes ask of it.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vitcourse.layers import widened


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gathered(x: Tensor) -> Tensor:
    """What all processes have of a tensor (B, …), in the order of the processes, without gradients.

    Processes may have different B.
    """
    if world_size() == 1:
        return x.detach()
    sizes = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(len(x), device=x.device))
    most = int(max(sizes))
    padded = torch.cat([x.detach(), x.new_zeros(most - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def place_in_gathered(x: Tensor) -> int:
    """Where this process's rows begin in what :func:`gathered` returns."""
    return 0 if world_size() == 1 else int(gathered(torch.tensor([len(x)], device=x.device))[: rank()].sum())


class _Summed(torch.autograd.Function):
    """A sum over processes whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


def summed(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, through which gradients flow."""
    return x if world_size() == 1 else _Summed.apply(x)


class JointBatchNorm(nn.BatchNorm1d):
    """Batch norm of (B, D) by the statistics of all processes together; PyTorch's SyncBatchNorm runs on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if world_size() == 1 or not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = widened(x)
            count = summed(wide.new_tensor(len(x)))
            mean = summed(wide.sum(0)) / count
            var = summed((wide - mean).square().sum(0)) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((var * count / (count - 1)).to(self.running_var), self.momentum)
            out = (wide - mean) * (var + self.eps).rsqrt()
            if self.affine:
                out = torch.addcmul(self.bias, out, self.weight)
        return out.to(x.dtype)


def mlp(dims: list[int], last_norm: bool) -> nn.Sequential:
    """Linear layers with batch norm and ReLU between them: (B, dims[0]) -> (B, dims[-1]).

    With ``last_norm`` a batch norm without weights ends it, as in SimCLR and MoCo v3, and no layer has a bias.
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(dims, dims[1:], strict=False)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(before, after, bias=last and not last_norm))
        if not last:
            layers += [JointBatchNorm(after), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(JointBatchNorm(after, affine=False))
    return nn.Sequential(*layers)


def normalised(x: Tensor) -> Tensor:
    """Directions (B, D), in float32 at least."""
    return F.normalize(widened(x), dim=1)
