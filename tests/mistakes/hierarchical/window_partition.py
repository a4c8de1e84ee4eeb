"""Answers to `hierarchical.window_partition`."""

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hierarchical.window_partition")


def split_sides(x, p):
    """(B, H, W, C) -> (B, rows, p, columns, p, C)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // p, p, w // p, p, c)


@variant("column-major")
def columns_in_the_outer_loop(x, window_size):
    p = window_size
    windows = [
        image[top : top + p, left : left + p].flatten(0, 1)
        for image in x
        for left in range(0, x.shape[2], p)
        for top in range(0, x.shape[1], p)
    ]
    return torch.stack(windows)


@variant("transposed-window")
def unfolded_the_wrong_way_round(x, window_size):
    p, c = window_size, x.shape[-1]
    windows = x.unfold(1, p, p).unfold(2, p, p)  # b i j c p q
    return windows.permute(0, 1, 2, 5, 4, 3).reshape(-1, p * p, c)


@variant("scattered")
def every_nth_token(x, window_size):
    rows, columns = x.shape[1] // window_size, x.shape[2] // window_size
    windows = [image[i::rows, j::columns].flatten(0, 1) for image in x for i in range(rows) for j in range(columns)]
    return torch.stack(windows)


@variant("batch-inside")
def window_by_window_over_the_batch(x, window_size):
    p = window_size
    windows = [
        x[:, top : top + p, left : left + p].flatten(1, 2)
        for top in range(0, x.shape[1], p)
        for left in range(0, x.shape[2], p)
    ]
    return torch.cat(windows)


@variant("window-not-flat")
def as_in_the_authors_code(x, window_size):
    return split_sides(x, window_size).transpose(2, 3).flatten(0, 2)


@variant("plain-reshape")
def view_and_hope(x, window_size):
    return x.flatten(1, 2).unflatten(1, (-1, window_size * window_size)).flatten(0, 1)


@unknown
def rows_of_tokens_not_exchanged(x, window_size):
    return split_sides(x, window_size).flatten(0, 1).reshape(-1, window_size**2, x.shape[-1]).flip(1)


@unknown
def channels_first(x, window_size):
    return split_sides(x, window_size).permute(0, 1, 3, 5, 2, 4).flatten(0, 2).flatten(2)


@unknown
def overlapping(x, window_size):
    p = window_size
    windows = x.unfold(1, p, 1).unfold(2, p, 1)
    return windows.movedim(3, -1).reshape(-1, p * p, x.shape[-1])


@unknown
def first_image_only(x, window_size):
    return split_sides(x[:1].expand_as(x), window_size).transpose(2, 3).flatten(0, 2).flatten(1, 2)


@unknown
def cut_off_from_the_graph(x, window_size):
    return split_sides(x.detach(), window_size).transpose(2, 3).flatten(0, 2).flatten(1, 2)


@right
def permuted(x, window_size):
    return split_sides(x, window_size).permute(0, 1, 3, 2, 4, 5).reshape(-1, window_size**2, x.shape[-1])


@right
def sliced(x, window_size):
    p = window_size
    windows = []
    for image in x:
        for strip in image.split(p):
            windows += [square.flatten(0, 1) for square in strip.split(p, dim=1)]
    return torch.stack(windows)


@unknown  # it does not take a photo, which is bytes
def unfolded_by_the_convolution_helper(x, window_size):
    columns = F.unfold(x.permute(0, 3, 1, 2), window_size, stride=window_size)  # b (c p q) n
    return columns.unflatten(1, (x.shape[-1], -1)).permute(0, 3, 2, 1).flatten(0, 1)


@right
def unfolded_as_floats(x, window_size):
    return unfolded_by_the_convolution_helper(x if x.is_floating_point() else x.float(), window_size).to(x)
