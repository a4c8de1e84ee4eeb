"""The check of `hierarchical.PatchMerging`."""

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vitcourse import hierarchical
from vitcourse.course.checks import build, check


@check(
    "hierarchical.PatchMerging",
    reference="vitcourse.hierarchical.PatchMerging",
    level=2,
    minutes=15,
    why="This makes the pyramid: half the side, twice the channels, and the next windows see four times the area.",
    hints=[
        "Two sides split in two once more; this time the inner halves join the channels.",
        "The order of the four neighbours: top left, bottom left, top right, bottom right. Pretrained weights rely on it.",
        "F.pad counts from the last axis: (0, 0) for the channels, then (left, right), then (top, bottom).",
    ],
)
def patch_merging(rng):
    yield build(3).call(rng.normal(2, 4, 6, 3))
    yield build(4).call(rng.normal(1, 5, 3, 4)).on("odd sides")
    yield build(2).call(rng.strided(3, 2, 7, 2)).on("one odd side")


def _even(x):
    return F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))


class _WrongMerging(hierarchical.PatchMerging):
    """Patch merging with another way of gathering the neighbours."""

    pattern = "b (h p) (w q) c -> b h w (q p c)"

    def gather(self, x):
        return rearrange(_even(x), self.pattern, p=2, q=2)


@patch_merging.mistake(
    "reading-order", "the four neighbours are taken row by row; the pretrained weights expect them column by column"
)
class _(_WrongMerging):
    pattern = "b (h p) (w q) c -> b h w (p q c)"


@patch_merging.mistake(
    "channels-outermost",
    "the same channel of the four neighbours lies side by side; a neighbour should stay in one piece",
)
class _(_WrongMerging):
    pattern = "b (h p) (w q) c -> b h w (c q p)"


@patch_merging.mistake(
    "distant-tokens", "the four tokens that are merged are no neighbours: they come from the four quarters of the map"
)
class _(_WrongMerging):
    pattern = "b (p h) (q w) c -> b h w (q p c)"


@patch_merging.mistake("odd-cropped", "the last row or column of a map with an odd side is lost")
class _(_WrongMerging):
    def gather(self, x):
        return super().gather(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])


@patch_merging.mistake(
    "padded-in-front", "the zeros stand above and on the left, which moves the whole map; they belong behind"
)
class _(_WrongMerging):
    def gather(self, x):
        return super().gather(F.pad(x, (0, 0, x.shape[2] % 2, 0, x.shape[1] % 2, 0)))


@patch_merging.mistake("no-norm", "the gathered neighbours are projected without being normalised first")
class _(_WrongMerging):
    def forward(self, x):
        return self.reduction(self.gather(x))


@patch_merging.mistake(
    "norm-of-the-result",
    "the norm sits behind the projection, as in Swin V2; here it comes before, where the token is 4C wide",
)
class _(_WrongMerging):
    def __init__(self, dim):
        super().__init__(dim)
        self.norm = nn.LayerNorm(2 * dim)


@patch_merging.mistake("with-bias", "the projection has a bias, which no pretrained checkpoint has a value for")
class _(_WrongMerging):
    def __init__(self, dim):
        super().__init__(dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim)
