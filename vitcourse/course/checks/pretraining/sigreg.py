"""The check of `pretraining.sigreg`."""

import torch.nn.functional as F

from vitcourse.course.checks import call, check
from vitcourse.pretraining.lejepa import quadrature


@check(
    "pretraining.sigreg",
    reference="vitcourse.pretraining.sigreg",
    level=4,
    minutes=25,
    why="The newest answer to collapse, in six lines: no teacher, no stopped gradient, and one weight.",
    hints=[
        "One product projects on all directions: (…, N, M). Each projection meets each knot: one axis more.",
        "The mean over the points comes before anything is squared: of the cosines, and of the sines.",
        "Squared distance of two complex numbers; a weighted sum over the knots; times N; a mean over what is left.",
    ],
)
def sigreg(rng):
    yield call(rng.normal(6, 5), _unit(rng.normal(5, 4)))
    yield call(rng.normal(2, 7, 3), _unit(rng.normal(3, 5))).on("two views")
    yield call(0 * rng.normal(9, 4), _unit(rng.normal(4, 3))).on("embeddings that are all 0")
    yield call(rng.normal(1, 3) + 1, _unit(rng.normal(3, 2))).on("one image")


def _unit(directions):
    return F.normalize(directions, dim=0)


def _squared(real, imaginary, phi):
    return (real - phi).square() + imaginary.square()


def _test(x, directions, average=lambda parts: parts.mean(-3), distance=_squared, count=None, integrate=None, end=None):
    """The test in its steps, each of which a mistake may replace."""
    t, phi, weights = quadrature(x)
    angles = (x @ directions)[..., None] * t
    apart = distance(average(angles.cos()), average(angles.sin()), phi)
    total = (apart @ weights if integrate is None else integrate(apart, t, weights)) * (
        x.shape[-2] if count is None else count(x)
    )
    return total.mean() if end is None else end(total)


def _catalogue(key, message, **change):
    sigreg.mistake(key, message, lambda x, directions: _test(x, directions, **change))


_catalogue(
    "no-count", "the factor N is missing, so the level of a Gaussian sample depends on its size", count=lambda x: 1
)
_catalogue(
    "real-only",
    "the sines are missing: points that lie to one side would pass for centred",
    distance=lambda re, im, phi: (re - phi).square(),
)
_catalogue(
    "modulus",
    "sizes are compared, not complex numbers: points that are moved as a whole would pass",
    distance=lambda re, im, phi: ((re.square() + im.square() + 1e-300).sqrt() - phi).square(),
)
_catalogue(
    "bell-in-the-sines",
    "the bell is taken from the imaginary part, too, where it has none",
    distance=lambda re, im, phi: (re - phi).square() + (im - phi).square(),
)
_catalogue(
    "absolute", "the distance is not squared", distance=lambda re, im, phi: (_squared(re, im, phi) + 1e-300).sqrt()
)
_catalogue(
    "no-weights", "the knots are averaged without their weights", integrate=lambda apart, t, weights: apart.mean(-1)
)
_catalogue("sum", "directions are summed up; it should be their mean", end=lambda total: total.sum())
_catalogue("each-direction", "one number a direction comes back; it should be their mean", end=lambda total: total)
_catalogue("views-counted", "N is taken from the first axis, where the views are", count=lambda x: x.shape[0])


@sigreg.mistake("point-by-point", "each point is compared with the bell by itself; their mean should be")
def _(x, directions):
    t, phi, weights = quadrature(x)
    angles = (x @ directions)[..., None] * t
    return x.shape[-2] * (_squared(angles.cos(), angles.sin(), phi) @ weights).mean()


@sigreg.mistake("directions-mixed", "the directions are averaged before they are compared; each has a test of its own")
def _(x, directions):
    return _test(x, directions, average=lambda parts: parts.mean((-3, -2)))
