"""The check of `hierarchical.window_partition`."""

from einops import rearrange

from vitcourse.course.checks import call, check


@check(
    "hierarchical.window_partition",
    reference="vitcourse.hierarchical.window_partition",
    level=1,
    minutes=10,
    why="Attention inside windows starts with cutting the map, and every later step relies on the order of the pieces.",
    hints=[
        "Each side of the map splits in two: which window, and which place inside the window.",
        "Windows join the batch: all windows of the first image come first, then those of the second.",
        "Read the wanted order off the shape: (image · row of windows · column of windows), then (row in the window · "
        "column in the window), then the channels.",
    ],
)
def window_partition(rng):
    yield call(rng.normal(2, 6, 9, 4), 3)
    yield call(rng.normal(1, 4, 2, 3), 2).on("a batch of one")
    yield call(rng.strided(3, 4, 8, 5), 4).on("a non-contiguous map")


def _cut(pattern):
    return lambda x, window_size: rearrange(x, pattern, p=window_size, q=window_size)


window_partition.mistake(
    "column-major",
    "the windows follow each other down the columns; they should be read like a page, row by row",
    _cut("b (i p) (j q) c -> (b j i) (p q) c"),
)
window_partition.mistake(
    "transposed-window",
    "inside a window the tokens are read column by column",
    _cut("b (i p) (j q) c -> (b i j) (q p) c"),
)
window_partition.mistake(
    "scattered",
    "a window gathers tokens from all over the map: the two halves of a split side are in the wrong order",
    _cut("b (p i) (q j) c -> (b i j) (p q) c"),
)
window_partition.mistake(
    "batch-inside",
    "the windows of different images take turns; an image should be finished before the next one begins",
    _cut("b (i p) (j q) c -> (i j b) (p q) c"),
)
window_partition.mistake(
    "window-not-flat",
    "each window still is a small map; attention wants its tokens in one sequence",
    _cut("b (i p) (j q) c -> (b i j) p q c"),
)
window_partition.mistake(
    "plain-reshape",
    "a reshape alone cuts the map's memory into equal stretches, not into squares",
    lambda x, window_size: x.reshape(-1, window_size**2, x.shape[-1]),
)
