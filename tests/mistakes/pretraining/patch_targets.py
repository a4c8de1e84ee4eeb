"""Answers to `pretraining.patch_targets`."""

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("pretraining.patch_targets")


def cut(images, p):
    """(B, N, p · p · C) by unfolding."""
    b, c, h, w = images.shape
    columns = F.unfold(images, p, stride=p)  # (B, C p p, N)
    return columns.reshape(b, c, p * p, -1).permute(0, 3, 2, 1).reshape(b, (h // p) * (w // p), p * p * c)


def with_sums(finish, when=lambda norm_pix: norm_pix):
    """`finish(x, mean, squares, n)`, with what sums over the patch give."""

    def targets(images, patch_size, norm_pix=True):
        x = cut(images, patch_size)
        if not when(norm_pix):
            return x
        n = x.shape[2]
        mean = (x.sum(2) / n).unsqueeze(2)
        return finish(x, mean, ((x - mean) ** 2).sum(2, keepdim=True), n)

    return targets


right(with_sums(lambda x, mean, squares, n: (x - mean) / torch.sqrt(squares / (n - 1) + 1e-6)))
right(with_sums(lambda x, mean, squares, n: (squares / (n - 1) + 1e-6) ** -0.5 * (x - mean)))


@right
def patch_by_patch(images, patch_size, norm_pix=True):
    b, c, h, w = images.shape
    found = []
    for y in range(0, h, patch_size):
        for x in range(0, w, patch_size):
            patch = images[:, :, y : y + patch_size, x : x + patch_size].permute(0, 2, 3, 1).reshape(b, -1)
            if norm_pix:
                var, mean = torch.var_mean(patch, dim=1, keepdim=True)
                patch = (patch - mean) / (var + 1e-6).sqrt()
            found.append(patch)
    return torch.stack(found, dim=1)


variant("biased")(with_sums(lambda x, mean, squares, n: (x - mean) / torch.sqrt(squares / n + 1e-6)))
variant("no-epsilon")(with_sums(lambda x, mean, squares, n: (x - mean) / torch.sqrt(squares / (n - 1))))
variant("epsilon-outside")(with_sums(lambda x, mean, squares, n: (x - mean) / (torch.sqrt(squares / (n - 1)) + 1e-6)))
variant("not-centred")(with_sums(lambda x, mean, squares, n: x / torch.sqrt(squares / (n - 1) + 1e-6)))
variant("no-root")(with_sums(lambda x, mean, squares, n: (x - mean) / (squares / (n - 1) + 1e-6)))
variant("never")(with_sums(None, when=lambda norm_pix: False))
variant("always")(
    with_sums(lambda x, mean, squares, n: (x - mean) / torch.sqrt(squares / (n - 1) + 1e-6), when=lambda norm_pix: True)
)


@variant("whole-image")
def of_the_image(images, patch_size, norm_pix=True):
    if norm_pix:
        flat = images.flatten(1)
        var, mean = torch.var_mean(flat, dim=1)
        images = (images - mean[:, None, None, None]) / (var + 1e-6).sqrt()[:, None, None, None]
    return cut(images, patch_size)


@variant("across-patches")
def wrong_axis(images, patch_size, norm_pix=True):
    x = cut(images, patch_size).transpose(1, 2)
    if norm_pix:
        var, mean = torch.var_mean(x, dim=-1, keepdim=True)
        x = (x - mean) / (var + 1e-6).sqrt()
    return x.transpose(1, 2)


@variant("by-channel")
def colours_apart(images, patch_size, norm_pix=True):
    apart = [cut(images[:, c : c + 1], patch_size) for c in range(images.shape[1])]
    if norm_pix:
        apart = [(x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt() for x in apart]
    return torch.stack(apart, dim=-1).flatten(2)


@variant("channels-first")
def as_unfold_has_it(images, patch_size, norm_pix=True):
    x = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt() if norm_pix else x


@unknown
def to_unit_range(images, patch_size, norm_pix=True):
    x = cut(images, patch_size)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (x - low) / (high - low + 1e-6) if norm_pix else x


@unknown
def as_layer_norm_does(images, patch_size, norm_pix=True):
    x = cut(images, patch_size)
    return F.layer_norm(x, x.shape[-1:], eps=1e-5) if norm_pix else x


unknown(with_sums(lambda x, mean, squares, n: x - mean))
unknown(with_sums(lambda x, mean, squares, n: (x - mean) / squares.sqrt().clamp(min=1e-6)))
unknown(with_sums(lambda x, mean, squares, n: (x - mean) / torch.sqrt(squares + 1e-6)))
unknown(
    with_sums(
        lambda x, mean, squares, n: (x - mean) / torch.sqrt(squares / (n - 1) + 1e-6),
        when=lambda norm_pix: not norm_pix,
    )
)


@unknown
def columns_first(images, patch_size, norm_pix=True):
    return patch_by_patch(images.transpose(2, 3), patch_size, norm_pix)


@unknown
def normalised_twice_over(images, patch_size, norm_pix=True):
    x = patch_by_patch(images, patch_size, norm_pix)
    return x - x.mean(1, keepdim=True) if norm_pix else x
