"""The check of `pretraining.patch_targets`."""

import torch
from einops import rearrange

from vitcourse.course.checks import call, check
from vitcourse.vit import image_to_patch


@check(
    "pretraining.patch_targets",
    reference="vitcourse.pretraining.patch_targets",
    level=2,
    minutes=5,
    why="The sum decides what the encoder learns: the mean of a patch its neighbours give away, its structure they do not.",
    hints=[
        "Which numbers share a mean: those of an image, of a patch, of a channel?",
        "Of (B, N, P) the last axis is the patch. keepdim=True lets the mean meet what it is taken from.",
        "The small number belongs under the root, together with the variance.",
    ],
    gradients=False,  # nothing learns from what the targets are made of
)
def patch_targets(rng):
    yield call(rng.normal(2, 3, 8, 12), 4)
    yield call(rng.normal(1, 2, 6, 9), 3, norm_pix=False).on("plain pixels")
    yield call(torch.full((2, 1, 4, 6), 0.25, dtype=torch.float64), 2).on("patches of one colour")
    yield call(rng.normal(2, 1, 9, 3) / 512, 3, norm_pix=True).on("faint patches")


def _root(var):
    return (var + 1e-6).sqrt()


def _normalised(x, dim=-1, correction=1, centred=True, scale=_root):
    mean = x.mean(dim, keepdim=True) if centred else 0
    return (x - mean) / scale(x.var(dim, correction=correction, keepdim=True))


def _catalogue(key, message, **change):
    def targets(images, patch_size, norm_pix=True):
        patches = image_to_patch(images, patch_size)
        return _normalised(patches, **change) if norm_pix else patches

    patch_targets.mistake(key, message, targets)


_catalogue("biased", "the variance divides by the number of pixels; the authors' is the unbiased one", correction=0)
_catalogue(
    "no-epsilon", "nothing is added to the variance, so a patch of one colour is 0 / 0", scale=lambda var: var.sqrt()
)
_catalogue(
    "epsilon-outside",
    "the small number is added to the standard deviation; it should be added to the variance, under the root",
    scale=lambda var: var.sqrt() + 1e-6,
)
_catalogue("whole-image", "mean and variance are those of the whole image; each patch should have its own", dim=(1, 2))
_catalogue(
    "across-patches", "mean and variance run over the patches, for each pixel; they should run within a patch", dim=1
)
_catalogue("not-centred", "the patches are scaled, but keep their mean", centred=False)
_catalogue("no-root", "the patches are divided by their variance, not by its root", scale=lambda var: var + 1e-6)


@patch_targets.mistake("always", "`norm_pix=False` is ignored: plain pixels were asked for")
def _(images, patch_size, norm_pix=True):
    return _normalised(image_to_patch(images, patch_size))


@patch_targets.mistake("never", "nothing is normalised")
def _(images, patch_size, norm_pix=True):
    return image_to_patch(images, patch_size)


@patch_targets.mistake(
    "by-channel", "each channel of a patch is normalised by itself; a patch has one mean and one variance"
)
def _(images, patch_size, norm_pix=True):
    patches = image_to_patch(images, patch_size)
    if not norm_pix:
        return patches
    apart = rearrange(patches, "b n (p c) -> b n p c", c=images.shape[1])
    return _normalised(apart, dim=2).flatten(2)


@patch_targets.mistake("channels-first", "within a patch the channels come first; `image_to_patch` has them last")
def _(images, patch_size, norm_pix=True):
    p = patch_size
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
    return _normalised(patches) if norm_pix else patches
