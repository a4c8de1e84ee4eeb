"""The check of `efficient_attention.neighbourhood_mask`."""

import torch

from vitcourse.course.checks import call, check


@check(
    "efficient_attention.neighbourhood_mask",
    reference="vitcourse.efficient_attention.neighbourhood_mask",
    level=2,
    minutes=15,
    why="On an image, near means near in two directions; and somebody has to carry news across.",
    hints=[
        "First, for every patch, its row and its column. Prefix tokens have neither.",
        "Two patches are near when they are near along the rows and near along the columns.",
        "How far may a patch look, if the square around it is window_size wide and it sits in the middle?",
    ],
)
def neighbourhood_mask(rng):
    yield call((4, 6, 1), 3)
    yield call((3, 7, 2), 5).on("two prefix tokens")
    yield call((5, 2, 0), 3).on("no prefix token")
    yield call((8, 9, 1), 7).on("a wide window")


def _near(grid, window_size, metric=lambda down, across: torch.maximum(down, across), reach=None, width=None):
    h, w, _ = grid
    number = torch.arange(h * w)
    down, across = (
        (t[:, None] - t).abs() for t in (number.div(width or w, rounding_mode="floor"), number.remainder(width or w))
    )
    return metric(down, across) <= (window_size // 2 if reach is None else reach)


def _with_prefix(near, prefix, sees=True, seen=True):
    n = len(near) + prefix
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[:prefix, :prefix] = True
    mask[:prefix, prefix:] = sees
    mask[prefix:, :prefix] = seen
    mask[prefix:, prefix:] = near
    return mask


neighbourhood_mask.mistake(
    "inverted",
    "true and false are exchanged: here true marks what may be seen",
    lambda grid, window_size: ~_with_prefix(_near(grid, window_size), grid[2]),
)
neighbourhood_mask.mistake(
    "along-the-sequence",
    "near in the sequence is not near in the image: the patch below is a whole row further on",
    lambda grid, window_size: _with_prefix(_near(grid, window_size, width=grid[0] * grid[1]), grid[2]),
)
neighbourhood_mask.mistake(
    "diamond",
    "the neighbourhood is a diamond: the distances along rows and columns are added, though a square has corners",
    lambda grid, window_size: _with_prefix(_near(grid, window_size, torch.add), grid[2]),
)
neighbourhood_mask.mistake(
    "whole-window-each-way",
    "the square is twice as wide as asked for: window_size is its side, with the patch in the middle",
    lambda grid, window_size: _with_prefix(_near(grid, window_size, reach=window_size), grid[2]),
)
neighbourhood_mask.mistake(
    "height-for-width",
    "rows and columns are worked out with the height of the grid, which square grids hide",
    lambda grid, window_size: _with_prefix(_near(grid, window_size, width=grid[0]), grid[2]),
)
neighbourhood_mask.mistake(
    "prefix-not-seen",
    "prefix tokens see all patches, but no patch sees them: what they gather is passed on to nobody",
    lambda grid, window_size: _with_prefix(_near(grid, window_size), grid[2], seen=False),
)
neighbourhood_mask.mistake(
    "prefix-blind",
    "all patches see the prefix tokens, but these see no patch: [CLS] has nothing to tell",
    lambda grid, window_size: _with_prefix(_near(grid, window_size), grid[2], sees=False),
)
