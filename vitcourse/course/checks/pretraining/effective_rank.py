"""The check of `pretraining.effective_rank`."""

import math

import torch

from vitcourse.course.checks import call, check


@check(
    "pretraining.effective_rank",
    reference="vitcourse.pretraining.effective_rank",
    level=3,
    minutes=15,
    why="A falling loss does not tell learning from collapse; this number does, without a label.",
    hints=[
        "Centre each dimension over the images; then torch.linalg.svdvals.",
        "Shares sum to one. Their entropy is largest where they are equal: what is its exponential then?",
        "Throw the values away that are only rounding, before you make shares. What if none is left?",
    ],
    gradients=False,
)
def effective_rank(rng):
    yield call(rng.normal(9, 5, dtype=torch.float32))
    yield call(rng.normal(4, 7, dtype=torch.float32) + 3).on("fewer images than dimensions, far from 0")
    yield call(torch.full((6, 3), 0.5)).on("features that are all the same")
    yield call(rng.normal(8, 2, dtype=torch.float32) @ rng.normal(2, 6, dtype=torch.float32)).on("two directions only")
    yield call(torch.zeros(5, 4)).on("features that are all 0")
    yield call(rng.normal(7, 4, dtype=torch.float32) / 256 + 4).on("features that differ little, far from 0")
    last_bit = torch.full((9, 3), 4096.0)
    last_bit[rng.integer(0, 9), rng.integer(0, 3)] += 2**-11
    yield call(last_bit).on("features that differ in one last bit")
    # Three orthogonal patterns with mean 0: two directions of one size, and a faint one on either side of the floor.
    patterns = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]])
    for size, where in ((4e-5, "below the floor"), (3e-4, "above the floor")):
        sizes = torch.tensor([1.0, 1.0, size])
        yield call((patterns * sizes[:, None]).T.repeat(250, 1)).on(f"many images, and a direction just {where}")
        wide = (patterns.T * sizes) @ patterns.repeat(1, 250)
        yield call(wide).on(f"many dimensions, and a direction just {where}")


def _rank(x, centre=lambda x: x - x.mean(0), power=1, finish=math.exp, floor=True, end=None):
    """The rank in its steps, each of which a mistake may replace."""
    x = x.detach().float()
    values = torch.linalg.svdvals(centre(x))
    if floor:
        values = values[values > torch.finfo(torch.float32).eps * max(x.shape) * torch.linalg.matrix_norm(x, 2)]
        if not len(values):
            return 0.0
    if end is not None:
        return end(values)
    shares = values**power / (values**power).sum()
    return finish(-torch.xlogy(shares, shares).sum().item())


def _catalogue(key, message, **change):
    effective_rank.mistake(key, message, lambda features: _rank(features, **change))


_catalogue("not-centred", "the features are not centred, so their mean counts as a direction", centre=lambda x: x)
_catalogue(
    "centred-by-image",
    "each image is centred over its dimensions; each dimension should be, over the images",
    centre=lambda x: x - x.mean(1, keepdim=True),
)
_catalogue("squared", "the shares are those of the squared values, the variances", power=2)
_catalogue("entropy", "this is the entropy; the rank is its exponential", finish=lambda entropy: entropy)
_catalogue("bits", "the entropy is taken to another base than its exponential", finish=lambda entropy: 2**entropy)
_catalogue(
    "count", "directions are counted, however little the features differ along them", end=lambda v: float(len(v))
)
_catalogue(
    "participation",
    "this is (Σσ)²/Σσ², another count of directions",
    end=lambda v: (v.sum() ** 2 / v.square().sum()).item(),
)
_catalogue(
    "upside-down", "the sign of the entropy is lost, so more directions give less", finish=lambda e: math.exp(-e)
)
_catalogue("no-floor", "of features that are all the same, 0 is divided by 0", floor=False)
