"""Answers to `hierarchical.window_reverse`."""

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hierarchical.window_reverse")


def pieces(windows, p, size):
    """(B · windows, p · p, C) -> (B, rows, columns, p, p, C)."""
    return windows.reshape(-1, size[0] // p, size[1] // p, p, p, windows.shape[-1])


def paste(windows, p, size, place):
    """Lay window n of each image down at ``place(n) = (top, left)``, in windows."""
    count = (size[0] // p) * (size[1] // p)
    out = windows.new_zeros(windows.shape[0] // count, *size, windows.shape[-1])
    for n, window in enumerate(windows):
        i, j = place(n % count)
        out[n // count, i * p : i * p + p, j * p : j * p + p] = window.unflatten(0, (p, p))
    return out


@variant("column-major")
def pasted_down_the_columns(windows, window_size, size):
    return paste(windows, window_size, size, lambda n: divmod(n, size[0] // window_size)[::-1])


@variant("transposed-window")
def swapped_inside(windows, window_size, size):
    grid = pieces(windows, window_size, size).transpose(3, 4)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, *size, windows.shape[-1])


@variant("scattered")
def written_with_a_stride(windows, window_size, size):
    rows, columns = size[0] // window_size, size[1] // window_size
    grid = pieces(windows, window_size, size)
    out = windows.new_zeros(grid.shape[0], *size, windows.shape[-1])
    for i in range(rows):
        for j in range(columns):
            out[:, i::rows, j::columns] = grid[:, i, j]
    return out


@variant("batch-inside")
def batch_taken_for_the_fast_axis(windows, window_size, size):
    rows, columns = size[0] // window_size, size[1] // window_size
    stacks = windows.reshape(rows, columns, -1, window_size, window_size, windows.shape[-1])
    return torch.cat([torch.cat(list(row), dim=2) for row in stacks], dim=1)


@variant("size-exchanged")
def width_before_height(windows, window_size, size):
    w, h = size
    grid = windows.view(-1, h // window_size, w // window_size, window_size, window_size, windows.shape[-1])
    return grid.transpose(2, 3).reshape(-1, h, w, windows.shape[-1])


@variant("plain-reshape")
def flattened_like_text(windows, window_size, size):
    return windows.flatten(0, 1).unflatten(0, (-1, size[0], size[1]))


@unknown
def upside_down(windows, window_size, size):
    return permuted_back(windows, window_size, size).flip(1)


@unknown
def first_image_for_all(windows, window_size, size):
    out = permuted_back(windows, window_size, size)
    return out[-1:].expand_as(out).clone().mul(1.5)


@unknown
def windows_of_the_last_row_first(windows, window_size, size):
    return pieces(windows, window_size, size).flip(1).transpose(2, 3).reshape(-1, *size, windows.shape[-1])


@unknown
def no_gradient(windows, window_size, size):
    with torch.no_grad():
        return permuted_back(windows, window_size, size)


@right
def permuted_back(windows, window_size, size):
    return pieces(windows, window_size, size).permute(0, 1, 3, 2, 4, 5).reshape(-1, *size, windows.shape[-1])


@right
def pasted(windows, window_size, size):
    return paste(windows, window_size, size, lambda n: divmod(n, size[1] // window_size))


@unknown  # it does not take a photo, which is bytes
def folded(windows, window_size, size):
    count = (size[0] // window_size) * (size[1] // window_size)
    columns = windows.mT.flatten(1).unflatten(0, (-1, count)).mT  # b (c p q) n
    return F.fold(columns, tuple(size), window_size, stride=window_size).movedim(1, -1)


@right
def folded_as_floats(windows, window_size, size):
    return folded(windows if windows.is_floating_point() else windows.float(), window_size, size).to(windows)
