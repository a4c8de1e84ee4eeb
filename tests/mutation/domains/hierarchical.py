"""Lesson 01: maps and windows of any shape that divides, shifts of any size, modules called again with other maps."""

from vitcourse.course.cases import Case, build, call

from ..domain import Draws, domain


@domain("hierarchical.window_partition")
def window_partition(rng: Draws) -> Case:
    m = rng.size(1, 5)
    return call(rng.floats(rng.size(1, 3), m * rng.size(1, 4), m * rng.size(1, 4), rng.size(1, 6)), m)


@domain("hierarchical.window_reverse")
def window_reverse(rng: Draws) -> Case:
    m, rows, columns = rng.size(1, 5), rng.size(1, 4), rng.size(1, 4)
    windows = rng.floats(rng.size(1, 3) * rows * columns, m * m, rng.size(1, 6))
    return call(windows, m, (rows * m, columns * m))


@domain("hierarchical.shift_mask")
def shift_mask(rng: Draws) -> Case:
    windows = rng.size(1, 5), rng.size(1, 5)
    size = tuple(side * rng.size(1, 4) for side in windows)
    return call(size, windows, tuple(rng.size(0, side - 1) for side in windows))


@domain("hierarchical.relative_position_index")
def relative_position_index(rng: Draws) -> Case:
    return call((rng.size(1, 8), rng.size(1, 8)))


@domain("hierarchical.WindowAttention")
def window_attention(rng: Draws) -> list[Case]:
    heads, m = rng.size(1, 4), rng.size(1, 4)
    dim, shift = heads * rng.size(1, 5), rng.size(0, m - 1)
    module = build(dim, heads, window_size=m, shift_size=shift)
    module = module.train() if rng.sometimes(0.5) else module
    grids = [(m * rng.size(1, 3), m * rng.size(1, 3)) for _ in range(rng.size(1, 3))]
    return [module.call(rng.floats(rng.size(1, 3), h * w, dim), (h, w, 0)) for h, w in grids]


@domain("hierarchical.PatchMerging")
def patch_merging(rng: Draws) -> list[Case]:
    dim = rng.size(1, 6)
    module = build(dim).train() if rng.sometimes(0.5) else build(dim)
    maps = (rng.floats(rng.size(1, 3), rng.size(1, 8), rng.size(1, 8), dim) for _ in range(rng.size(1, 3)))
    return [module.call(x) for x in maps]


@domain("hierarchical.SwinTransformer")
def swin_transformer(rng: Draws) -> list[Case]:
    stages, window, patch, channels = rng.size(1, 3), rng.size(2, 4), rng.choice([1, 2, 4]), rng.size(1, 3)
    sides = [side for side in range(1, 17) if _fits(side, window, side, stages)]
    side, heads = rng.choice(sides), rng.size(1, 2)
    module = build(
        img_size=side * patch,
        patch_size=patch,
        in_chans=channels,
        num_classes=rng.size(1, 5),
        embed_dim=heads * rng.size(1, 3) * 2,
        depths=tuple(rng.size(1, 4) for _ in range(stages)),
        num_heads=tuple(heads * rng.choice([1, 2]) for _ in range(stages)),
        window_size=window,
    )
    module = module.train() if rng.sometimes(0.5) else module
    others = [other for other in {side, *range(1, 13)} if _fits(side, window, other, stages)]
    grids = [(side, side)] + [(rng.choice(others), rng.choice(others)) for _ in range(rng.size(0, 1))]
    return [module.call(rng.floats(rng.size(1, 3), channels, h * patch, w * patch)) for h, w in grids]


def _fits(side: int, window: int, other: int, stages: int) -> bool:
    """Do the windows of a model for maps of `side` divide, in each stage, maps that begin with `other`?"""
    for _ in range(stages):
        if other % min(side, window):
            return False
        side, other = (side + 1) // 2, (other + 1) // 2
    return True
