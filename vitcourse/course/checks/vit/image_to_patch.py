"""The check of `vit.image_to_patch`."""

from einops import rearrange

from vitcourse.course.checks import call, check


@check(
    "vit.image_to_patch",
    reference="vitcourse.vit.image_to_patch",
    level=1,
    minutes=10,
    why="A transformer reads sequences, so an image has to become one, without losing where each pixel was.",
    hints=[
        "The height splits in two: which row of patches, and which row of pixels inside a patch. So does the width.",
        "Read the wanted order off the shape: (rows of patches · columns of patches), then (row in the patch · column in "
        "the patch · channel).",
        "In einops an axis is split with brackets on the left, (h p1), and joined with brackets on the right.",
    ],
)
def image_to_patch(rng):
    yield call(rng.normal(2, 3, 8, 12), 4)
    yield call(rng.normal(1, 2, 6, 3), 3).on("a batch of one")
    yield call(rng.normal(3, 1, 4, 10), 2).on("a grey image")
    yield call(rng.strided(2, 3, 4, 6), 2).on("a non-contiguous image")


def _patches(pattern):
    return lambda x, patch_size: rearrange(x, pattern, p1=patch_size, p2=patch_size)


image_to_patch.mistake(
    "column-major",
    "the patches follow each other down the columns; they should be read like a page, row by row",
    _patches("b c (h p1) (w p2) -> b (w h) (p1 p2 c)"),
)
image_to_patch.mistake(
    "channels-first",
    "inside a patch all of one channel comes before the next; the channels of one pixel should stay side by side",
    _patches("b c (h p1) (w p2) -> b (h w) (c p1 p2)"),
)
image_to_patch.mistake(
    "transposed-patch",
    "each patch is mirrored at its diagonal: its pixels are read column by column",
    _patches("b c (h p1) (w p2) -> b (h w) (p2 p1 c)"),
)
image_to_patch.mistake(
    "strided-pixels",
    "a token gathers pixels from all over the image: the two halves of a split axis are in the wrong order",
    _patches("b c (p1 h) (p2 w) -> b (h w) (p1 p2 c)"),
)


@image_to_patch.mistake(
    "plain-reshape",
    "a reshape alone cuts the image's memory into equal stretches, not into squares",
)
def _(x, patch_size):
    batch, channels, height, width = x.shape
    return x.reshape(batch, (height // patch_size) * (width // patch_size), patch_size * patch_size * channels)


@image_to_patch.mistake(
    "channels-last-reshape",
    "with the channels last, a reshape still cuts the rows of pixels into equal stretches; a square is parts of several rows",
)
def _(x, patch_size):
    return rearrange(x, "b c h w -> b (h w c)").unflatten(1, (-1, patch_size**2 * x.shape[1]))
