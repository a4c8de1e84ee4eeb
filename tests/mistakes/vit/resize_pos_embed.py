"""Answers to `vit.resize_pos_embed`."""

import numpy as np
import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("vit.resize_pos_embed")


def as_image(patches, grid):
    """(1, h w, D) -> (1, D, h, w)."""
    return patches.reshape(1, grid[0], grid[1], -1).permute(0, 3, 1, 2)


def as_sequence(image):
    return image.flatten(2).transpose(1, 2)


def around(resize):
    """An answer that keeps the prefix, and leaves the patches (1, D, h, w) to ``resize(image, new_grid)``."""

    def answer(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
        prefix, patches = pos_embed.tensor_split([num_prefix_tokens], dim=1)
        return torch.cat([prefix, as_sequence(resize(as_image(patches, old_grid), new_grid))], dim=1)

    answer.__name__ = resize.__name__
    return answer


def sampled(image, grid, **options):
    """Bicubic interpolation at normalised coordinates."""
    ends = 1.0 if options["align_corners"] else [1 - 1 / size for size in grid]
    ys, xs = (
        torch.linspace(-end, end, size, dtype=image.dtype, device=image.device)
        for end, size in zip(np.broadcast_to(ends, 2).tolist(), grid, strict=True)
    )
    places = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)[None]
    return F.grid_sample(image, places, mode="bicubic", padding_mode="border", **options)


@variant("bilinear")
@around
def bilinear_axis_by_axis(image, grid):
    image = F.interpolate(image, size=(grid[0], image.shape[3]), mode="bilinear", antialias=True)
    return F.interpolate(image, size=(image.shape[2], grid[1]), mode="bilinear", antialias=True)


@variant("nearest")
@around
def copied_by_index(image, grid):
    rows = [i * image.shape[2] // grid[0] for i in range(grid[0])]
    columns = [j * image.shape[3] // grid[1] for j in range(grid[1])]
    return image[:, :, rows][..., columns]


@variant("align-corners")
@around
def sampled_from_corner_to_corner(image, grid):
    return sampled(image, grid, align_corners=True)


@variant("align-corners-antialiased")
@around
def aligned_channel_by_channel(image, grid):
    channels = [
        F.interpolate(c, size=tuple(grid), mode="bicubic", antialias=True, align_corners=True)
        for c in image.split(1, dim=1)
    ]
    return torch.cat(channels, dim=1)


@variant("no-antialias")
@around
def sampled_at_the_centres(image, grid):
    return sampled(image, grid, align_corners=False)


@variant("transposed")
def all_sizes_exchanged(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    return separable(pos_embed, old_grid[::-1], new_grid[::-1], num_prefix_tokens)


@variant("one-dimensional")
def line_by_hand(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    prefix, line = pos_embed.tensor_split([num_prefix_tokens], dim=1)
    n, m = line.shape[1], new_grid[0] * new_grid[1]
    out = []
    for i in range(m):
        place = max((i + 0.5) * n / m - 0.5, 0)
        left = int(place)
        out.append(torch.lerp(line[:, left], line[:, min(left + 1, n - 1)], place - left))
    return torch.cat([prefix, torch.stack(out, dim=1)], dim=1)


@variant("prefix-last")
def cat_in_the_wrong_order(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    answer = separable(pos_embed, old_grid, new_grid, num_prefix_tokens)
    return answer.roll(-num_prefix_tokens, dims=1)


@variant("prefix-lost")
def patches_only(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    image = as_image(pos_embed[:, num_prefix_tokens:], old_grid)
    return as_sequence(F.interpolate(image, size=new_grid, mode="bicubic", antialias=True))


@unknown
@around
def bilinear_without_antialiasing(image, grid):
    return F.interpolate(image, size=grid, mode="bilinear")


@unknown
@around
def averaged(image, grid):
    return F.adaptive_avg_pool2d(image, grid)


@unknown
@around
def nearest_exact(image, grid):
    return F.interpolate(image, size=grid, mode="nearest-exact")


@unknown
@around
def new_size_exchanged(image, grid):
    return F.interpolate(image, size=grid[::-1], mode="bicubic", antialias=True)


@unknown
def columns_first_in_the_table(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    prefix, patches = pos_embed.tensor_split([num_prefix_tokens], dim=1)
    image = patches.mT.reshape(1, -1, old_grid[1], old_grid[0]).transpose(2, 3)
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return torch.hstack([prefix, as_sequence(image)])


@unknown
def prefix_stretched_too(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    length = num_prefix_tokens + new_grid[0] * new_grid[1]
    return F.interpolate(pos_embed.mT, size=length, mode="linear").mT


@unknown
def prefix_of_one_token(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    return separable(pos_embed, old_grid, new_grid, 1)


@unknown
def prefix_without_positions(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    answer = separable(pos_embed, old_grid, new_grid, num_prefix_tokens)
    return torch.cat([torch.zeros_like(answer[:, :num_prefix_tokens]), answer[:, num_prefix_tokens:]], dim=1)


@unknown
def in_float32(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    return separable(pos_embed.float(), old_grid, new_grid, num_prefix_tokens)


@unknown
def no_gradient(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    with torch.no_grad():
        return separable(pos_embed, old_grid, new_grid, num_prefix_tokens)


@right
@around
def separable(image, grid):
    image = F.interpolate(image, size=(grid[0], image.shape[3]), mode="bicubic", antialias=True)
    return F.interpolate(image, size=(image.shape[2], grid[1]), mode="bicubic", antialias=True)


@right
def batch_of_channels(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    channels = pos_embed[0, num_prefix_tokens:].T.reshape(-1, 1, *old_grid)
    channels = F.interpolate(channels, size=tuple(new_grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([pos_embed[0, :num_prefix_tokens], channels.flatten(1).T]).unsqueeze(0)


@right
@around
def filter_by_hand(image, grid):
    """Keys' cubic with a = -1/2, stretched where the grid shrinks, its weights normalised at the border."""

    def cubic(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    def matrix(old, new):
        stretch = max(old / new, 1)
        rows = [[cubic((j + 0.5 - (i + 0.5) * old / new) / stretch) for j in range(old)] for i in range(new)]
        weights = torch.tensor(rows, dtype=image.dtype, device=image.device)
        return weights / weights.sum(1, keepdim=True)

    return matrix(image.shape[2], grid[0]) @ image @ matrix(image.shape[3], grid[1]).T


@unknown
def by_a_factor(pos_embed, old_grid, new_grid, num_prefix_tokens=0):
    prefix, patches = pos_embed.tensor_split([num_prefix_tokens], dim=1)
    factor = tuple(new / old for new, old in zip(new_grid, old_grid, strict=True))
    grid = patches.unflatten(1, old_grid).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=factor, mode="bicubic", antialias=True)
    return torch.cat([prefix, grid.flatten(2).mT], dim=1)
