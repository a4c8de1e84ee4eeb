"""The check of `hierarchical.window_reverse`."""

from einops import rearrange

from vitcourse.course.checks import call, check


@check(
    "hierarchical.window_reverse",
    reference="vitcourse.hierarchical.window_reverse",
    level=2,
    minutes=10,
    why="What attention has changed must return to the very place it came from.",
    hints=[
        "It is the pattern of window_partition, read from right to left.",
        "einops cannot guess how many windows lie side by side: work it out from the size of the map.",
        "How many images there are need not be told: it is what is left of the first axis.",
    ],
)
def window_reverse(rng):
    yield call(rng.normal(2 * 2 * 3, 9, 4), 3, (6, 9))
    yield call(rng.normal(2, 4, 3), 2, (4, 2)).on("a batch of one")
    yield call(rng.strided(3 * 2, 16, 5), 4, (4, 8)).on("non-contiguous windows")
    yield call(rng.normal(2 * 5 * 3, 1, 4), 1, (5, 3)).on("windows of one token")


def _put_back(pattern):
    def put_back(windows, window_size, size):
        sides = {"i": size[0] // window_size, "j": size[1] // window_size, "p": window_size, "q": window_size}
        return rearrange(windows, pattern, **sides)

    return put_back


window_reverse.mistake(
    "column-major",
    "the windows are laid down column by column; they come row by row",
    _put_back("(b j i) (p q) c -> b (i p) (j q) c"),
)
window_reverse.mistake(
    "transposed-window",
    "each window is mirrored at its diagonal: its tokens come row by row",
    _put_back("(b i j) (q p) c -> b (i p) (j q) c"),
)
window_reverse.mistake(
    "scattered",
    "the tokens of a window are spread over the whole map: a side is joined in the wrong order",
    _put_back("(b i j) (p q) c -> b (p i) (q j) c"),
)
window_reverse.mistake(
    "batch-inside",
    "windows of one image end up in another: images are the slowest part of the first axis",
    _put_back("(i j b) (p q) c -> b (i p) (j q) c"),
)
window_reverse.mistake(
    "size-exchanged",
    "rows and columns of the map are exchanged, which square maps would hide",
    lambda windows, window_size, size: _put_back("(b i j) (p q) c -> b (i p) (j q) c")(
        windows, window_size, size[::-1]
    ),
)
window_reverse.mistake(
    "plain-reshape",
    "a reshape alone lays the windows down like text, one after the other, not as squares",
    lambda windows, window_size, size: windows.reshape(-1, *size, windows.shape[-1]),
)
