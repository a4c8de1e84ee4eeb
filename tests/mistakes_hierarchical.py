"""Answers to the exercises of lesson 01, as learners write them: the proof that its checks diagnose rightly.

None of them knows the catalogue in ``checks/hierarchical.py``: they reach the same numbers by other means.

* ``VARIANTS`` make a catalogued mistake, and have to be told that mistake.
* ``UNKNOWN`` are wrong in another way, and have to be rejected without a diagnosis.
* ``RIGHT`` are right, and have to be accepted.

Of a class the lesson gives most of ``__init__``, and the learner writes the rest; so do the answers here.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from mistakes_common import collect
from torch import nn

from vitcourse.hierarchical import SwinBlock, SwinTransformer, WindowAttention
from vitcourse.hierarchical.swin import NormPatchEmbed

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect()


# --------------------------------------------------------------------------------------------------- window_partition

PARTITION = "hierarchical.window_partition"


def split_sides(x, p):
    """(B, H, W, C) -> (B, rows, p, columns, p, C)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // p, p, w // p, p, c)


@variant(PARTITION, "column-major")
def columns_in_the_outer_loop(x, window_size):
    p = window_size
    windows = [
        image[top : top + p, left : left + p].flatten(0, 1)
        for image in x
        for left in range(0, x.shape[2], p)
        for top in range(0, x.shape[1], p)
    ]
    return torch.stack(windows)


@variant(PARTITION, "transposed-window")
def unfolded_the_wrong_way_round(x, window_size):
    p, c = window_size, x.shape[-1]
    windows = x.unfold(1, p, p).unfold(2, p, p)  # b i j c p q
    return windows.permute(0, 1, 2, 5, 4, 3).reshape(-1, p * p, c)


@variant(PARTITION, "scattered")
def every_nth_token(x, window_size):
    rows, columns = x.shape[1] // window_size, x.shape[2] // window_size
    windows = [image[i::rows, j::columns].flatten(0, 1) for image in x for i in range(rows) for j in range(columns)]
    return torch.stack(windows)


@variant(PARTITION, "batch-inside")
def window_by_window_over_the_batch(x, window_size):
    p = window_size
    windows = [
        x[:, top : top + p, left : left + p].flatten(1, 2)
        for top in range(0, x.shape[1], p)
        for left in range(0, x.shape[2], p)
    ]
    return torch.cat(windows)


@variant(PARTITION, "window-not-flat")
def as_in_the_authors_code(x, window_size):
    return split_sides(x, window_size).transpose(2, 3).flatten(0, 2)


@variant(PARTITION, "plain-reshape")
def view_and_hope(x, window_size):
    return x.flatten(1, 2).unflatten(1, (-1, window_size * window_size)).flatten(0, 1)


@unknown(PARTITION)
def rows_of_tokens_not_exchanged(x, window_size):
    return split_sides(x, window_size).flatten(0, 1).reshape(-1, window_size**2, x.shape[-1]).flip(1)


@unknown(PARTITION)
def channels_first(x, window_size):
    return split_sides(x, window_size).permute(0, 1, 3, 5, 2, 4).flatten(0, 2).flatten(2)


@unknown(PARTITION)
def overlapping(x, window_size):
    p = window_size
    windows = x.unfold(1, p, 1).unfold(2, p, 1)
    return windows.movedim(3, -1).reshape(-1, p * p, x.shape[-1])


@unknown(PARTITION)
def first_image_only(x, window_size):
    return split_sides(x[:1].expand_as(x), window_size).transpose(2, 3).flatten(0, 2).flatten(1, 2)


@unknown(PARTITION)
def cut_off_from_the_graph(x, window_size):
    return split_sides(x.detach(), window_size).transpose(2, 3).flatten(0, 2).flatten(1, 2)


@right(PARTITION)
def permuted(x, window_size):
    return split_sides(x, window_size).permute(0, 1, 3, 2, 4, 5).reshape(-1, window_size**2, x.shape[-1])


@right(PARTITION)
def sliced(x, window_size):
    p = window_size
    windows = []
    for image in x:
        for strip in image.split(p):
            windows += [square.flatten(0, 1) for square in strip.split(p, dim=1)]
    return torch.stack(windows)


@right(PARTITION)
def unfolded_by_the_convolution_helper(x, window_size):
    columns = F.unfold(x.permute(0, 3, 1, 2), window_size, stride=window_size)  # b (c p q) n
    return columns.unflatten(1, (x.shape[-1], -1)).permute(0, 3, 2, 1).flatten(0, 1)


# ----------------------------------------------------------------------------------------------------- window_reverse

REVERSE = "hierarchical.window_reverse"


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


@variant(REVERSE, "column-major")
def pasted_down_the_columns(windows, window_size, size):
    return paste(windows, window_size, size, lambda n: divmod(n, size[0] // window_size)[::-1])


@variant(REVERSE, "transposed-window")
def swapped_inside(windows, window_size, size):
    grid = pieces(windows, window_size, size).transpose(3, 4)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, *size, windows.shape[-1])


@variant(REVERSE, "scattered")
def written_with_a_stride(windows, window_size, size):
    rows, columns = size[0] // window_size, size[1] // window_size
    grid = pieces(windows, window_size, size)
    out = windows.new_zeros(grid.shape[0], *size, windows.shape[-1])
    for i in range(rows):
        for j in range(columns):
            out[:, i::rows, j::columns] = grid[:, i, j]
    return out


@variant(REVERSE, "batch-inside")
def batch_taken_for_the_fast_axis(windows, window_size, size):
    rows, columns = size[0] // window_size, size[1] // window_size
    stacks = windows.reshape(rows, columns, -1, window_size, window_size, windows.shape[-1])
    return torch.cat([torch.cat(list(row), dim=2) for row in stacks], dim=1)


@variant(REVERSE, "size-exchanged")
def width_before_height(windows, window_size, size):
    w, h = size
    grid = windows.view(-1, h // window_size, w // window_size, window_size, window_size, windows.shape[-1])
    return grid.transpose(2, 3).reshape(-1, h, w, windows.shape[-1])


@variant(REVERSE, "plain-reshape")
def flattened_like_text(windows, window_size, size):
    return windows.flatten(0, 1).unflatten(0, (-1, size[0], size[1]))


@unknown(REVERSE)
def upside_down(windows, window_size, size):
    return permuted_back(windows, window_size, size).flip(1)


@unknown(REVERSE)
def first_image_for_all(windows, window_size, size):
    out = permuted_back(windows, window_size, size)
    return out[-1:].expand_as(out).clone().mul(1.5)


@unknown(REVERSE)
def windows_of_the_last_row_first(windows, window_size, size):
    return pieces(windows, window_size, size).flip(1).transpose(2, 3).reshape(-1, *size, windows.shape[-1])


@unknown(REVERSE)
def no_gradient(windows, window_size, size):
    with torch.no_grad():
        return permuted_back(windows, window_size, size)


@right(REVERSE)
def permuted_back(windows, window_size, size):
    return pieces(windows, window_size, size).permute(0, 1, 3, 2, 4, 5).reshape(-1, *size, windows.shape[-1])


@right(REVERSE)
def pasted(windows, window_size, size):
    return paste(windows, window_size, size, lambda n: divmod(n, size[1] // window_size))


@right(REVERSE)
def folded(windows, window_size, size):
    count = (size[0] // window_size) * (size[1] // window_size)
    columns = windows.mT.flatten(1).unflatten(0, (-1, count)).mT  # b (c p q) n
    return F.fold(columns, tuple(size), window_size, stride=window_size).movedim(1, -1)


# --------------------------------------------------------------------------------------------------------- shift_mask

MASK = "hierarchical.shift_mask"


def kinds(size, window_size, shift, cut=None):
    """Numbers on the rolled map, as the authors' code makes them, with slices."""
    region, number = torch.zeros(size, dtype=torch.long), 0
    axes = []
    for n, p, s in zip(size, window_size, cut or shift, strict=True):
        axes.append([range(0, n - p), range(n - p, n - s), range(n - s, n)])
    for rows in axes[0]:
        for columns in axes[1]:
            region[rows.start : rows.stop, columns.start : columns.stop] = number
            number += 1
    return region


def squares(region, window_size):
    """(H, W) -> (windows, N)."""
    p, q = window_size
    return torch.stack([square.flatten() for strip in region.split(p) for square in strip.split(q, dim=1)])


def pairs(numbers):
    return numbers.unsqueeze(1) - numbers.unsqueeze(2) != 0


@variant(MASK, "inverted")
def who_may(size, window_size, shift):
    numbers = squares(kinds(size, window_size, shift), window_size)
    return numbers.unsqueeze(1) == numbers.unsqueeze(2)


@variant(MASK, "nobody-masked")
def numbered_by_regular_window(size, window_size, shift):
    rows, columns = (torch.arange(n) // p for n, p in zip(size, window_size, strict=True))
    return pairs(squares(rows[:, None] * 100 + columns, window_size))


@variant(MASK, "additive")
def minus_a_hundred(size, window_size, shift):
    mask = pairs(squares(kinds(size, window_size, shift), window_size)).float()
    return mask.masked_fill(mask != 0, -100.0)


@variant(MASK, "other-direction")
def cut_after_the_shift(size, window_size, shift):
    cut = [(p - s) % p for p, s in zip(window_size, shift, strict=True)]
    return pairs(squares(kinds(size, window_size, shift, cut), window_size))


@variant(MASK, "before-the-roll")
def displaced_windows_of_the_map_itself(size, window_size, shift):
    rows, columns = (torch.arange(n) - s < 0 for n, s in zip(size, shift, strict=True))
    return pairs(squares(10 * rows.long()[:, None] + columns.long(), window_size))


@variant(MASK, "rows-only")
def one_loop_forgotten(size, window_size, shift):
    region = torch.zeros(size)
    region[size[0] - shift[0] :] = 1
    return pairs(squares(region, window_size))


@variant(MASK, "columns-only")
def other_loop_forgotten(size, window_size, shift):
    region = torch.zeros(size)
    region[:, size[1] - shift[1] :] = 1
    return pairs(squares(region, window_size))


@variant(MASK, "two-kinds")
def inside_and_outside(size, window_size, shift):
    region = torch.ones(size)
    region[: size[0] - shift[0], : size[1] - shift[1]] = 0
    return pairs(squares(region, window_size))


@variant(MASK, "plain-reshape")
def viewed_as_windows(size, window_size, shift):
    wrapped = [(torch.arange(n) + s) // n for n, s in zip(size, shift, strict=True)]
    region = wrapped[0][:, None] + 2 * wrapped[1]
    return pairs(region.view(-1, math.prod(window_size)))


@unknown(MASK)
def corner_only(size, window_size, shift):
    region = torch.zeros(size)
    region[size[0] - shift[0] :, size[1] - shift[1] :] = 1
    return pairs(squares(region, window_size))


@unknown(MASK)
def strangers_only_if_they_differ_twice(size, window_size, shift):
    down, across = (
        pairs(squares(wrapped.expand(size), window_size))
        for wrapped in (
            (torch.arange(size[0]) >= size[0] - shift[0]).long()[:, None],
            (torch.arange(size[1]) >= size[1] - shift[1]).long(),
        )
    )
    return down & across


@unknown(MASK)
def always_half_a_window(size, window_size, shift):
    return pairs(squares(kinds(size, window_size, [max(p // 2, 1) for p in window_size]), window_size))


@unknown(MASK)
def integers(size, window_size, shift):
    return pairs(squares(kinds(size, window_size, shift), window_size)).int()


@unknown(MASK)
def one_sided(size, window_size, shift):
    numbers = squares(kinds(size, window_size, shift), window_size)
    return numbers.unsqueeze(1) > numbers.unsqueeze(2)


@unknown(MASK)
def last_window_only(size, window_size, shift):
    return pairs(squares(kinds(size, window_size, shift), window_size))[-1:]


@right(MASK)
def nine_slices(size, window_size, shift):
    return pairs(squares(kinds(size, window_size, shift), window_size))


@right(MASK)
def rolled_origins(size, window_size, shift):
    """Where did it come from, and to which displaced window does that place belong?"""
    region = torch.stack(
        torch.meshgrid(
            *(
                torch.div(torch.arange(n) - s, p, rounding_mode="floor")
                for n, p, s in zip(size, window_size, shift, strict=True)
            ),
            indexing="ij",
        )
    )
    region = torch.roll(region[0] * 1000 + region[1], [-s for s in shift], (0, 1))
    return pairs(squares(region, window_size))


@right(MASK)
def pair_by_pair(size, window_size, shift):
    (h, w), (p, q) = size, window_size
    masks = []
    for top in range(0, h, p):
        for left in range(0, w, q):
            tokens = [
                (y >= h - shift[0], x >= w - shift[1]) for y in range(top, top + p) for x in range(left, left + q)
            ]
            masks.append([[a != b for b in tokens] for a in tokens])
    return torch.tensor(masks)


# -------------------------------------------------------------------------------------------- relative_position_index

INDEX = "hierarchical.relative_position_index"


def number_pairs(window_size, number):
    """``number(down, across)`` for each query and key."""
    p, q = window_size
    places = [divmod(n, q) for n in range(p * q)]
    return torch.tensor([[number(a - c, b - d) for c, d in places] for a, b in places])


@variant(INDEX, "key-minus-query")
def authors_code_with_the_axes_exchanged(window_size):
    return authors_code(window_size).T


@variant(INDEX, "from-below-zero")
def offsets_forgotten(window_size):
    return number_pairs(window_size, lambda down, across: down * (2 * window_size[1] - 1) + across)


@variant(INDEX, "sum-of-axes")
def added_up(window_size):
    places = np.stack(np.indices(window_size)).reshape(2, -1)
    offsets = places[:, :, None] - places[:, None] + np.array(window_size).reshape(2, 1, 1) - 1
    return torch.from_numpy(offsets.sum(0))


@variant(INDEX, "as-wide-as-the-window")
def window_width_as_stride(window_size):
    p, q = window_size
    return number_pairs(window_size, lambda down, across: q * (down + p - 1) + across + q - 1)


@variant(INDEX, "height-for-width")
def height_as_stride(window_size):
    p, q = window_size
    return number_pairs(window_size, lambda down, across: (2 * p - 1) * (down + p - 1) + across + q - 1)


@variant(INDEX, "columns-first")
def ravelled_in_fortran_order(window_size):
    p, q = window_size
    table = np.arange((2 * p - 1) * (2 * q - 1)).reshape((2 * p - 1, 2 * q - 1), order="F")
    return number_pairs(window_size, lambda down, across: int(table[down + p - 1, across + q - 1]))


@variant(INDEX, "without-sign")
def only_how_far(window_size):
    return number_pairs(window_size, lambda down, across: abs(down) * (2 * window_size[1] - 1) + abs(across))


@variant(INDEX, "pairs-not-numbers")
def two_numbers_each(window_size):
    p, q = window_size
    return number_pairs(window_size, lambda down, across: [down + p - 1, across + q - 1])


@unknown(INDEX)
def number_of_the_key(window_size):
    n = window_size[0] * window_size[1]
    return torch.arange(n).expand(n, n).clone()


@variant(INDEX, "as-wide-as-the-window")
def difference_of_running_numbers(window_size):
    n = torch.arange(window_size[0] * window_size[1])
    return n[:, None] - n + len(n) - 1


@unknown(INDEX)
def one_too_far(window_size):
    p, q = window_size
    return number_pairs(window_size, lambda down, across: (down + p) * (2 * q - 1) + across + q)


@unknown(INDEX)
def as_floats(window_size):
    return authors_code(window_size).float()


@unknown(INDEX)
def flattened(window_size):
    return authors_code(window_size).flatten()


@unknown(INDEX)
def twice_the_width(window_size):
    p, q = window_size
    return number_pairs(window_size, lambda down, across: (down + p - 1) * 2 * q + across + q - 1)


@right(INDEX)
def authors_code(window_size):
    p, q = window_size
    coords = torch.flatten(torch.stack(torch.meshgrid(torch.arange(p), torch.arange(q), indexing="ij")), 1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
    relative[:, :, 0] += p - 1
    relative[:, :, 1] += q - 1
    relative[:, :, 0] *= 2 * q - 1
    return relative.sum(-1)


@right(INDEX)
def looked_up_in_a_table(window_size):
    p, q = window_size
    table = torch.arange((2 * p - 1) * (2 * q - 1)).view(2 * p - 1, 2 * q - 1)
    return number_pairs(window_size, lambda down, across: table[down + p - 1, across + q - 1].item())


@right(INDEX)
def sliding_windows(window_size):
    """The row of a query is the window of the table, turned around, that begins at its place."""
    p, q = window_size
    table = torch.arange((2 * p - 1) * (2 * q - 1)).view(2 * p - 1, 2 * q - 1)
    rows = [table[i : i + p, j : j + q].flip(0, 1).flatten() for i in range(p) for j in range(q)]
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------- WindowAttention

WINDOWS = "hierarchical.WindowAttention"


def mixer(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Mixer(nn.Module):
        def __init__(self, dim, num_heads, window_size=7, shift_size=0):
            super().__init__()
            self.num_heads, self.window_size, self.shift_size = num_heads, window_size, shift_size
            self.qkv = nn.Linear(dim, 3 * dim)
            self.proj = nn.Linear(dim, dim)
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))

    Mixer.forward, Mixer.__name__ = forward, forward.__name__
    return Mixer


def bias_of(self):
    n = (self.window_size,) * 2
    return torch.stack([column[authors_code(n)] for column in self.relative_position_bias_table.T])


def to_windows(self, x, grid, direction=-1):
    h, w, _ = grid
    s = direction * self.shift_size
    rolled = torch.roll(x.view(len(x), h, w, -1), (s, s), (1, 2))
    return permuted(rolled, self.window_size)


def to_tokens(self, windows, grid, direction=1):
    s = direction * self.shift_size
    return torch.roll(permuted_back(windows, self.window_size, grid[:2]), (s, s), (1, 2)).flatten(1, 2)


def strangers(self, grid, batch):
    h, w, _ = grid
    mask = nine_slices((h, w), (self.window_size,) * 2, (self.shift_size,) * 2)
    return torch.cat([mask] * batch)[:, None]


def heads_of(self, windows):
    b, n, dim = windows.shape
    parts = self.qkv(windows).split(dim, dim=-1)
    return [part.view(b, n, self.num_heads, dim // self.num_heads).transpose(1, 2) for part in parts]


def side_by_side(heads):
    return torch.cat(heads.unbind(1), dim=-1)


def fused(self, windows, mask, bias=None, scale=None):
    q, k, v = heads_of(self, windows)
    bias = bias_of(self) if bias is None else bias
    scores = torch.where(mask, -math.inf, bias.to(q.dtype))
    return side_by_side(F.scaled_dot_product_attention(q, k, v, attn_mask=scores, scale=scale))


@variant(WINDOWS, "no-mask")
@mixer
def neighbours_all(self, x, grid):
    windows = to_windows(self, x, grid)
    out = fused(self, windows, torch.zeros_like(strangers(self, grid, len(x))))
    return to_tokens(self, self.proj(out), grid)


@variant(WINDOWS, "no-bias")
@mixer
def places_unknown(self, x, grid):
    windows = to_windows(self, x, grid)
    out = fused(self, windows, strangers(self, grid, len(x)), torch.zeros(1))
    return to_tokens(self, self.proj(out), grid)


@variant(WINDOWS, "not-rolled-back")
@mixer
def left_where_they_were_rolled(self, x, grid):
    out = self.proj(fused(self, to_windows(self, x, grid), strangers(self, grid, len(x))))
    return pasted(out, self.window_size, grid[:2]).flatten(1, 2)


@variant(WINDOWS, "rolled-the-wrong-way")
@mixer
def plus_first_minus_last(self, x, grid):
    out = fused(self, to_windows(self, x, grid, +1), strangers(self, grid, len(x)))
    return to_tokens(self, self.proj(out), grid, -1)


@variant(WINDOWS, "not-rolled")
@mixer
def mask_without_a_roll(self, x, grid):
    windows = permuted(x.unflatten(1, grid[:2]), self.window_size)
    out = self.proj(fused(self, windows, strangers(self, grid, len(x))))
    return permuted_back(out, self.window_size, grid[:2]).flatten(1, 2)


@variant(WINDOWS, "masked-after-softmax")
@mixer
def weights_multiplied_by_zero(self, x, grid):
    q, k, v = heads_of(self, to_windows(self, x, grid))
    weights = F.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + bias_of(self), dim=-1)
    out = (weights * strangers(self, grid, len(x)).logical_not()) @ v
    return to_tokens(self, self.proj(side_by_side(out)), grid)


@variant(WINDOWS, "masks-in-the-wrong-order")
@mixer
def each_mask_repeated_for_the_batch(self, x, grid):
    mask = strangers(self, grid, 1).expand(-1, len(x), -1, -1).flatten(0, 1)[:, None]
    out = fused(self, to_windows(self, x, grid), mask)
    return to_tokens(self, self.proj(out), grid)


@variant(WINDOWS, "bias-transposed")
@mixer
def key_before_query(self, x, grid):
    bias = self.relative_position_bias_table[authors_code((self.window_size,) * 2)].permute(2, 1, 0)
    out = fused(self, to_windows(self, x, grid), strangers(self, grid, len(x)), bias)
    return to_tokens(self, self.proj(out), grid)


@variant(WINDOWS, "no-scale")
@mixer
def scale_of_one(self, x, grid):
    out = fused(self, to_windows(self, x, grid), strangers(self, grid, len(x)), scale=1.0)
    return to_tokens(self, self.proj(out), grid)


@variant(WINDOWS, "heads-outermost")
@mixer
def chunked_inside_each_head(self, x, grid):
    windows = to_windows(self, x, grid)
    q, k, v = self.qkv(windows).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias_of(self)
    out = scores.masked_fill(strangers(self, grid, len(x)), -math.inf).softmax(-1) @ v
    return to_tokens(self, self.proj(side_by_side(out)), grid)


@variant(WINDOWS, "no-projection")
@mixer
def projection_forgotten(self, x, grid):
    return to_tokens(self, fused(self, to_windows(self, x, grid), strangers(self, grid, len(x))), grid)


@unknown(WINDOWS)
@mixer
def global_attention(self, x, grid):
    q, k, v = heads_of(self, x)
    return self.proj(side_by_side(F.scaled_dot_product_attention(q, k, v)))


@unknown(WINDOWS)
@mixer
def neither_mask_nor_bias(self, x, grid):
    q, k, v = heads_of(self, to_windows(self, x, grid))
    return to_tokens(self, self.proj(side_by_side(F.scaled_dot_product_attention(q, k, v))), grid)


@unknown(WINDOWS)
@mixer
def mask_of_ten(self, x, grid):
    q, k, v = heads_of(self, to_windows(self, x, grid))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias_of(self) - 1.0 * strangers(self, grid, len(x))
    return to_tokens(self, self.proj(side_by_side(scores.softmax(-1) @ v)), grid)


@unknown(WINDOWS)
@mixer
def residual_inside(self, x, grid):
    out = self.proj(fused(self, to_windows(self, x, grid), strangers(self, grid, len(x))))
    return x + to_tokens(self, out, grid)


@unknown(WINDOWS)
@mixer
def one_bias_for_all_heads(self, x, grid):
    bias = bias_of(self).mean(0, keepdim=True) * 2
    out = fused(self, to_windows(self, x, grid), strangers(self, grid, len(x)), bias)
    return to_tokens(self, self.proj(out), grid)


@unknown(WINDOWS)
@mixer
def table_cut_off(self, x, grid):
    out = fused(self, to_windows(self, x, grid), strangers(self, grid, len(x)), bias_of(self).detach())
    return to_tokens(self, self.proj(out), grid)


@right(WINDOWS)
@mixer
def fused_in_windows(self, x, grid):
    out = fused(self, to_windows(self, x, grid), strangers(self, grid, len(x)))
    return to_tokens(self, self.proj(out), grid)


@right(WINDOWS)
@mixer
def as_in_the_authors_repository(self, x, grid):
    """Mask of −∞ in an axis of its own, windows and batch split for the sum."""
    windows = to_windows(self, x, grid)
    q, k, v = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias_of(self).unsqueeze(0)
    mask = strangers(self, grid, 1).squeeze(1)
    extra = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(mask, -math.inf)
    scores = scores.unflatten(0, (len(x), len(mask))) + extra[None, :, None]
    out = scores.flatten(0, 1).softmax(-1) @ v
    return to_tokens(self, self.proj(out.transpose(1, 2).flatten(2)), grid)


@right(WINDOWS)
@mixer
def token_by_token(self, x, grid):
    """No windows at all: who is in my displaced window, and how far away?"""
    (h, w, _), p, s = grid, self.window_size, self.shift_size
    rows, columns = (t.flatten() for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    home = torch.stack([(rows - s).div(p, rounding_mode="floor"), (columns - s).div(p, rounding_mode="floor")])
    together = (home[:, :, None] == home[:, None]).all(0)
    down, across = rows[:, None] - rows + p - 1, columns[:, None] - columns + p - 1
    index = torch.where(together, down * (2 * p - 1) + across, 0)
    bias = self.relative_position_bias_table[index].permute(2, 0, 1).masked_fill(~together, -math.inf)
    q, k, v = heads_of(self, x)
    return self.proj(side_by_side(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


# ------------------------------------------------------------------------------------------------------- PatchMerging

MERGING = "hierarchical.PatchMerging"


def merging(gather):
    """The lesson's class, with the learner's way of gathering neighbours."""

    class Merging(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.norm = nn.LayerNorm(4 * dim)
            self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

        def forward(self, x):
            return self.reduction(self.norm(gather(x)))

    Merging.__name__ = gather.__name__
    return Merging


def padded(x):
    b, h, w, c = x.shape
    out = x.new_zeros(b, h + h % 2, w + w % 2, c)
    out[:, :h, :w] = x
    return out


def quarters(x):
    """Top left, bottom left, top right, bottom right."""
    return [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]


@variant(MERGING, "reading-order")
@merging
def row_by_row(x):
    x = padded(x)
    return torch.cat([x[:, 0::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 0::2], x[:, 1::2, 1::2]], dim=-1)


@variant(MERGING, "channels-outermost")
@merging
def stacked_behind_the_channels(x):
    return torch.stack(quarters(padded(x)), dim=-1).flatten(3)


@variant(MERGING, "distant-tokens")
@merging
def four_quarters_of_the_map(x):
    x = padded(x)
    return torch.cat([half for side in x.chunk(2, dim=2) for half in side.chunk(2, dim=1)], dim=-1)


@variant(MERGING, "odd-cropped")
@merging
def unfolded_without_padding(x):
    windows = x.unfold(1, 2, 2).unfold(2, 2, 2)  # b h w c p q
    return windows.permute(0, 1, 2, 5, 4, 3).flatten(3)


@variant(MERGING, "padded-in-front")
@merging
def zeros_on_the_left(x):
    return torch.cat(quarters(padded(x.flip(1, 2)).flip(1, 2)), dim=-1)


@variant(MERGING, "no-norm")
class Unnormed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        return F.linear(torch.cat(quarters(padded(x)), dim=-1), self.reduction.weight)


@variant(MERGING, "norm-of-the-result")
class NormLast(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x):
        return self.norm(self.reduction(torch.cat(quarters(padded(x)), dim=-1)))


@variant(MERGING, "with-bias")
class Biased(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim)

    def forward(self, x):
        return self.reduction(self.norm(torch.cat(quarters(padded(x)), dim=-1)))


@unknown(MERGING)
@merging
def right_column_first(x):
    return torch.cat(quarters(padded(x))[::-1], dim=-1)


@unknown(MERGING)
@merging
def averaged_four_times(x):
    mean = torch.stack(quarters(padded(x))).mean(0)
    return torch.cat([mean] * 4, dim=-1)


@unknown(MERGING)
@merging
def padded_with_the_border(x):
    x = F.pad(x.movedim(-1, 1), (0, x.shape[2] % 2, 0, x.shape[1] % 2), mode="replicate").movedim(1, -1)
    return torch.cat(quarters(x), dim=-1) * torch.linspace(1, 2, 4 * x.shape[-1], dtype=x.dtype)


@unknown(MERGING)
@merging
def reading_order_and_cropped(x):
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=-1)


@unknown(MERGING)
@merging
def neighbours_cut_off(x):
    return torch.cat(quarters(padded(x.detach())), dim=-1)


@right(MERGING)
@merging
def as_the_authors_write_it(x):
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    return torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)


@right(MERGING)
@merging
def reshaped(x):
    x = padded(x)
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)


# ----------------------------------------------------------------------------------------------------- SwinTransformer

MODEL = "hierarchical.SwinTransformer"


def plan(side, window_size, block):
    """Window and shift of a block."""
    if side <= window_size:
        return side, 0
    return window_size, window_size // 2 * (block % 2)


def tail(self, x):
    return self.head["fc"](self.norm(x).flatten(1, 2).mean(1))


def model(plan=plan, tail=tail, embed=NormPatchEmbed, merge_first=True):
    """The lesson's class, with the learner's plan of windows and end of ``forward``."""

    class Model(nn.Module):
        def __init__(self, img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size):
            super().__init__()
            self.patch_embed = embed(patch_size, in_chans, embed_dim)
            self.layers = nn.ModuleList()
            side, stages = img_size // patch_size, len(depths)
            for i in range(stages):
                dim = embed_dim * 2**i
                blocks = nn.ModuleList()
                for j in range(depths[i]):
                    window, shift = plan(side, window_size, j)
                    block = SwinBlock(dim, num_heads[i])
                    block.attn = WindowAttention(dim, num_heads[i], window_size=window, shift_size=shift)
                    blocks.append(block)
                stage = nn.ModuleDict({"blocks": blocks})
                if i > 0 and merge_first:
                    stage["downsample"] = Merge(dim // 2)
                if i < stages - 1 and not merge_first:
                    stage["downsample"] = Merge(dim)
                self.layers.append(stage)
                side = math.ceil(side / 2)
            self.norm = nn.LayerNorm(dim)
            self.head = nn.ModuleDict({"fc": nn.Linear(dim, num_classes)})

        def forward(self, x):
            x = self.patch_embed(x)
            for stage in self.layers:
                if "downsample" in stage and merge_first:
                    x = stage["downsample"](x)
                b, h, w, c = x.shape
                x = x.reshape(b, h * w, c)
                for block in stage["blocks"]:
                    x = block(x, (h, w, 0))
                x = x.reshape(b, h, w, c)
                if "downsample" in stage and not merge_first:
                    x = stage["downsample"](x)
            return tail(self, x)

    return Model


Merge = as_the_authors_write_it


class BareEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).movedim(1, -1)


for key, change in {
    "never-shifted": {"plan": lambda side, p, i: (min(side, p), 0)},
    "shifted-first": {"plan": lambda side, p, i: (min(side, p), p // 2 if side > p and not i % 2 else 0)},
    "always-shifted": {"plan": lambda side, p, i: (min(side, p), p // 2 if side > p else 0)},
    "shifted-single-window": {"plan": lambda side, p, i: (min(side, p), min(side, p) // 2 if i % 2 else 0)},
    "window-not-shrunk": {"plan": lambda side, p, i: (p, p // 2 if side > p and i % 2 else 0)},
    "no-final-norm": {"tail": lambda self, x: self.head["fc"](torch.einsum("bhwc->bc", x) / x[0, ..., 0].numel())},
    "norm-after-the-mean": {"tail": lambda self, x: self.head["fc"](self.norm(x.mean(2).mean(1)))},
    "first-token": {"tail": lambda self, x: self.head["fc"](self.norm(x.flatten(1, 2)))[:, 0]},
    "patches-unnormed": {"embed": BareEmbed},
    "merged-last": {"merge_first": False},
}.items():
    variant(MODEL, key)(model(**change))

for change in (
    {"plan": lambda side, p, i: (min(side, p), 1 if side > p and i % 2 else 0)},
    {"tail": lambda self, x: self.head["fc"](self.norm(x).amax((1, 2)))},
    {"tail": lambda self, x: self.head["fc"](self.norm(x).sum((1, 2)))},
    {"tail": lambda self, x: tail(self, x).softmax(-1)},
    {"tail": lambda self, x: self.head["fc"](self.norm(x))},
    {"plan": lambda side, p, i: (min(side, p), 0), "tail": lambda self, x: self.head["fc"](x.mean((1, 2)))},
):
    unknown(MODEL)(model(**change))

right(MODEL)(model())


@right(MODEL)
class FromTheLibrarysStages(nn.Module):
    """The library's own stages, run backwards through indices, with an average pool at the end."""

    def __init__(self, img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size):
        super().__init__()
        inner = SwinTransformer(
            img_size, patch_size, in_chans, num_classes, "avg", embed_dim, depths, num_heads, window_size
        )
        self.patch_embed, self.layers, self.norm, self.head = inner.patch_embed, inner.layers, inner.norm, inner.head

    def forward(self, x):
        x = self.patch_embed(x)
        for i in range(len(self.layers)):
            x = self.layers[i](x)
        return self.head(F.adaptive_avg_pool2d(self.norm(x).movedim(-1, 1), 1).flatten(1))
