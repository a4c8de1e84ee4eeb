"""Answers to `pretraining.straight_through`."""

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("pretraining.straight_through")


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, quantized):
        return quantized.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


right(Through.apply)


@right
def the_other_way_round(z, quantized):
    return quantized.detach() + z - z.detach()


@right
def without_grad(z, quantized):
    with torch.no_grad():
        step = quantized - z
    return z + step


variant("codes-alone")(lambda z, quantized: quantized.clone())
variant("both")(lambda z, quantized: z - z.detach() + quantized)
variant("z-alone")(lambda z, quantized: z - quantized.detach() + quantized)
variant("mean")(lambda z, quantized: z - 0.5 * z.detach() + 0.5 * quantized.detach())


@variant("codes-alone")
def cancels(z, quantized):
    return quantized - z + z


@variant("all-detached")
def a_copy(z, quantized):
    return quantized.detach().clone()


unknown(lambda z, quantized: z.detach() + (z - quantized))
unknown(lambda z, quantized: 2 * z - (2 * z).detach() + quantized.detach())
unknown(lambda z, quantized: z.detach() + (z - quantized).detach() + 0 * z)
unknown(lambda z, quantized: quantized.detach() - z + z.detach())
variant("z-alone")(lambda z, quantized: z.clone())
