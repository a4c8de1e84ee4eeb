"""Answers to `vit.image_to_patch`."""

import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("vit.image_to_patch")


@variant("column-major")
def columns_in_the_outer_loop(x, patch_size):
    p, tokens = patch_size, []
    for left in range(0, x.shape[3], p):
        for top in range(0, x.shape[2], p):
            tokens.append(x[:, :, top : top + p, left : left + p].permute(0, 2, 3, 1).flatten(1))
    return torch.stack(tokens, dim=1)


@variant("channels-first")
def plain_unfold(x, patch_size):
    return F.unfold(x, patch_size, stride=patch_size).transpose(1, 2)


@variant("transposed-patch")
def unfold_twice_and_swap(x, patch_size):
    windows = x.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # b c h w p1 p2
    return windows.permute(0, 2, 3, 5, 4, 1).flatten(3).flatten(1, 2)


@variant("strided-pixels")
def every_nth_pixel(x, patch_size):
    rows, columns = x.shape[2] // patch_size, x.shape[3] // patch_size
    tokens = [x[:, :, i::rows, j::columns] for i in range(rows) for j in range(columns)]
    return torch.stack([token.movedim(1, -1).flatten(1) for token in tokens], dim=1)


@variant("plain-reshape")
def equal_stretches(x, patch_size):
    count = x.shape[2] * x.shape[3] // patch_size**2
    return torch.stack(x.flatten(1).chunk(count, dim=1), dim=1)


@variant("channels-last-reshape")
def channels_last_then_reshape(x, patch_size):
    count = x.shape[2] * x.shape[3] // patch_size**2
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], count, -1)


@unknown
def columns_first_and_channels_first(x, patch_size):
    return F.unfold(x.mT, patch_size, stride=patch_size).transpose(1, 2)


@unknown
def last_patches_dropped(x, patch_size):
    p, tokens = patch_size, []
    for top in range(0, x.shape[2] - p, p):
        for left in range(0, x.shape[3] - p, p):
            tokens.append(x[:, :, top : top + p, left : left + p].permute(0, 2, 3, 1).flatten(1))
    return torch.stack(tokens, dim=1)


@unknown
def from_the_bottom_up(x, patch_size):
    return interleaved_unfold(x, patch_size).flip(1)


@unknown
def cut_off_from_the_graph(x, patch_size):
    return interleaved_unfold(x.detach(), patch_size)


@unknown
def image_centred_in_place(x, patch_size):
    tokens = interleaved_unfold(x, patch_size).clone()
    x -= 0.5
    return tokens


@unknown  # it does not take a photo, which is bytes
def interleaved_unfold(x, patch_size):
    stretches = F.unfold(x, patch_size, stride=patch_size)  # b (c p1 p2) n
    return stretches.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1).flatten(2)


@right
def loop_over_patches(x, patch_size):
    p, (b, c, h, w) = patch_size, x.shape
    out = x.new_zeros(b, (h // p) * (w // p), p * p * c)
    for i in range(h // p):
        for j in range(w // p):
            patch = x[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p]
            out[:, i * (w // p) + j] = patch.permute(0, 2, 3, 1).reshape(b, -1)
    return out


@right
def convolution_with_unit_kernels(x, patch_size):
    c, p = x.shape[1], patch_size
    kernels = torch.eye(p * p * c, dtype=x.dtype, device=x.device).view(-1, p, p, c).permute(0, 3, 1, 2)
    return F.conv2d(x, kernels, stride=p).flatten(2).transpose(1, 2)


@right
def unfolded_as_floats(x, patch_size):
    return interleaved_unfold(x.to(torch.get_default_dtype() if not x.is_floating_point() else x.dtype), patch_size).to(
        x
    )
