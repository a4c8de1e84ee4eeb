"""Answers to `pretraining.sigreg`."""

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("pretraining.sigreg")


def knots(x):
    t = torch.arange(17, dtype=x.dtype) * (3 / 16)
    phi = torch.exp(-0.5 * t**2)
    step = torch.full_like(t, 3 / 8)
    step[[0, -1]] = 3 / 16
    return t, phi, step * phi


def by_complex(compare=None, points=None, weigh=True, merge=None, start=None):
    """Complex exponentials, direction by direction."""

    def test(x, directions):
        t, phi, weights = knots(x)
        n = x.shape[-2] if points is None else points(x)
        found = []
        for a in directions.T:
            shadow = torch.einsum("...d,d->...", x, a)
            wave = torch.polar(torch.ones_like(shadow[..., None] * t), shadow[..., None] * t)
            phase = wave.mean(-2)
            apart = (phase - phi).abs() ** 2 if compare is None else compare(phase, wave, phi)
            found.append(n * ((apart * weights).sum(-1) if weigh else apart.sum(-1) / len(t)))
        found = torch.stack(found, -1)
        return found.sum() / found.numel() if merge is None else merge(found)

    return test


right(by_complex())


@right
def by_trapezoids(x, directions):
    t, phi, _ = knots(x)
    angles = torch.einsum("...nd,dm,k->...nmk", x, directions, t)
    real, imaginary = torch.cos(angles).sum(-3) / x.shape[-2], torch.sin(angles).sum(-3) / x.shape[-2]
    integrand = (real**2 - 2 * real * phi + phi**2 + imaginary**2) * phi
    return (2 * x.shape[-2] * torch.trapezoid(integrand, t, dim=-1)).mean()


@right
def as_a_sum_over_pairs(x, directions):
    """|φ_N|² is the mean over all pairs of the cosine of their difference."""
    t, phi, weights = knots(x)
    shadow = (x @ directions).movedim(-2, -1)  # (…, M, N)
    pairs = ((shadow[..., None] - shadow[..., None, :])[..., None] * t).cos().mean((-3, -2))
    real = (shadow[..., None] * t).cos().mean(-2)
    return ((pairs - 2 * real * phi + phi**2) @ weights * x.shape[-2]).mean()


variant("no-count")(by_complex(points=lambda x: 1))
variant("views-counted")(by_complex(points=len))
variant("real-only")(by_complex(compare=lambda phase, wave, phi: (phase.real - phi) ** 2))
variant("modulus")(by_complex(compare=lambda phase, wave, phi: (torch.hypot(phase.real, phase.imag) - phi) ** 2))
variant("bell-in-the-sines")(
    by_complex(compare=lambda phase, wave, phi: (phase.real - phi) ** 2 + (phase.imag - phi) ** 2)
)
variant("absolute")(by_complex(compare=lambda phase, wave, phi: torch.hypot(phase.real - phi, phase.imag)))
variant("no-weights")(by_complex(weigh=False))
variant("sum")(by_complex(merge=lambda found: found.sum()))
variant("each-direction")(by_complex(merge=lambda found: found))
variant("point-by-point")(by_complex(compare=lambda phase, wave, phi: ((wave - phi).abs() ** 2).mean(-2)))


@variant("directions-mixed")
def one_shadow_for_all(x, directions):
    t, phi, weights = knots(x)
    angles = torch.einsum("...nd,dm,k->...knm", x, directions, t)
    real, imaginary = angles.cos().flatten(-2).mean(-1), angles.sin().flatten(-2).mean(-1)
    return x.shape[-2] * (((real - phi) ** 2 + imaginary**2) * weights).sum(-1).mean()


@unknown
def moments(x, directions):
    shadow = x @ directions
    return (shadow.mean(-2) ** 2 + (shadow.var(-2, correction=0) - 1) ** 2).mean()


unknown(by_complex(merge=lambda found: found.amax()))
unknown(by_complex(compare=lambda phase, wave, phi: (phase.real - phi) ** 2 - phase.imag**2))
unknown(by_complex(points=lambda x: x.shape[-1]))
unknown(by_complex(compare=lambda phase, wave, phi: (phase - phi**2).abs() ** 2))
unknown(by_complex(points=lambda x: x.shape[-2] - 1))
