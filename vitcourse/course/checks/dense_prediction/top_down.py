"""The check of `dense_prediction.top_down`, and its reference: the library has it inside of a module."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from vitcourse.course.checks import call, check


def top_down(maps: Sequence[Tensor]) -> list[Tensor]:
    """Each map and, by nearest neighbour, the next coarser sum: maps (B, C, H_i, W_i), finest first, as they come.

    >>> import torch
    >>> top_down([torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)])[0].flatten().tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    sums = [maps[-1]]
    for finer in maps[-2::-1]:
        sums.insert(0, finer + F.interpolate(sums[0], size=finer.shape[-2:], mode="nearest"))
    return sums


@check(
    "dense_prediction.top_down",
    reference="vitcourse.course.checks.dense_prediction.top_down.top_down",
    level=2,
    minutes=10,
    why="Nearly every detector of the last years stands on these sums, and each map is only as good as what comes down to it.",
    hints=[
        "Begin at the coarse end: the last map has nothing above it, and stays.",
        "What comes down to a map is the *sum* of the level above, not its map.",
        "A map of 7 rows lies under one of 4. F.interpolate takes a size.",
    ],
    exempt={
        "larger": "the maps of a pyramid halve, rounded up; changed one by one they would not",
        "smaller": "the maps of a pyramid halve, rounded up; changed one by one they would not",
    },
)
def top_down_cases(rng):
    def maps(batch, channels, *sizes):
        return [rng.normal(batch, channels, *size) for size in sizes]

    yield call(maps(2, 5, (22, 26), (11, 13), (6, 7)))
    yield call(maps(1, 3, (13, 10), (7, 5), (4, 3), (2, 2))).on("maps of odd sizes")
    yield call(maps(3, 1, (5, 9), (3, 5))).on("two maps")
    yield call(maps(2, 4, (6, 7))).on("one map")
    yield call(maps(1, 2, (8, 16), (4, 8), (2, 4), (1, 2), (1, 1))).on("five maps")


def _walk(maps, enlarge, add):
    sums = [maps[-1]]
    for finer in maps[-2::-1]:
        sums.insert(0, add(finer, enlarge(sums[0], finer.shape[-2:])))
    return sums


def _nearest(x, size):
    return F.interpolate(x, size=size, mode="nearest")


top_down_cases.mistake(
    "bilinear",
    "the coarser sum is enlarged by interpolation; here each pixel is simply repeated",
    lambda maps: _walk(maps, lambda x, size: F.interpolate(x, size=size, mode="bilinear"), lambda a, b: a + b),
)
top_down_cases.mistake(
    "nearest-exact",
    "middles of pixels are compared, over the whole of a side; where a side is odd, a pixel is then not simply repeated",
    lambda maps: _walk(maps, lambda x, size: F.interpolate(x, size=size, mode="nearest-exact"), lambda a, b: a + b),
)
top_down_cases.mistake(
    "one-step",
    "each map gets the next coarser *map* and nothing from further up: what the coarsest knows ends one level below it",
    lambda maps: [
        *(a + _nearest(b, a.shape[-2:]) for a, b in zip(maps, maps[1:], strict=False)),
        maps[-1],
    ],
)
top_down_cases.mistake(
    "mean",
    "the two are averaged; they should be added",
    lambda maps: _walk(maps, _nearest, lambda a, b: (a + b) / 2),
)
top_down_cases.mistake(
    "coarsest-first",
    "the sums are right, and in the wrong order: the finest comes first, as it came in",
    lambda maps: top_down(maps)[::-1],
)
top_down_cases.mistake(
    "replaced",
    "the finer maps are lost: every level is the coarsest one, enlarged",
    lambda maps: _walk(maps, _nearest, lambda a, b: b + 0 * a),
)
top_down_cases.mistake(
    "bottom-up",
    "here the fine maps are shrunk and added to the coarse ones; it is the coarse ones that have something to tell the fine",
    lambda maps: _up(maps),
)


def _up(maps):
    sums = [maps[0]]
    for coarser in maps[1:]:
        sums.append(coarser + _nearest(sums[-1], coarser.shape[-2:]))
    return sums
