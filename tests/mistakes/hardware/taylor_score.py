"""Answers to `hardware.taylor_score`."""

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hardware.taylor_score")


def per_image(combine, over_images=torch.mean, product=lambda x, g: x * g, interleaved=False):
    """``combine`` makes one number of a unit's (N, width) products in one image."""

    def answer(x, gradient, units):
        width = x.shape[-1] // units
        table = []
        for image, slope in zip(x, gradient, strict=True):
            products = product(image, slope)
            parts = [
                products[:, u::units] if interleaved else products[:, u * width : (u + 1) * width] for u in range(units)
            ]
            table.append(torch.stack([combine(part) for part in parts]))
        return over_images(torch.stack(table), dim=0)

    return answer


def magnitude_of_sum(part):
    return part.sum().abs()


variant("magnitudes-first")(per_image(lambda part: part.abs().sum()))
variant("magnitude-last")(per_image(torch.sum, lambda table, dim: table.mean(dim).abs()))
variant("signed")(per_image(torch.sum))
variant("per-token")(per_image(lambda part: part.sum(-1).norm(p=1)))
variant("heads-interleaved")(per_image(magnitude_of_sum, interleaved=True))
variant("sum-of-images")(per_image(magnitude_of_sum, torch.sum))
variant("mean-of-tokens")(per_image(lambda part: part.mean().abs()))
variant("squared")(per_image(lambda part: part.sum() ** 2))
variant("gradient-only")(per_image(magnitude_of_sum, product=lambda x, g: g))
variant("size-only")(per_image(magnitude_of_sum, product=lambda x, g: x))
right(per_image(magnitude_of_sum))

unknown(per_image(magnitude_of_sum, torch.amax))
unknown(per_image(lambda part: part.norm()))
unknown(per_image(magnitude_of_sum, product=lambda x, g: x + g))
unknown(per_image(lambda part: part[0].sum().abs() if len(part) > 1 else 2 * part.sum().abs()))
unknown(lambda x, gradient, units: per_image(magnitude_of_sum)(x, gradient, units)[:1])


@right
def as_a_gate(x, gradient, units):
    """The gate's own gradient, of a loss that is linear in the activations."""
    gates = torch.ones(len(x), units, dtype=x.dtype, requires_grad=True)
    wide = gates.repeat_interleave(x.shape[-1] // units, dim=1)[:, None]
    (slope,) = torch.autograd.grad((x.detach() * wide * gradient.detach()).sum(), gates)
    return slope.abs().mean(0)
