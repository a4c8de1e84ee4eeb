"""Answers to `vit.sincos_2d`."""

import math

import numpy as np
import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("vit.sincos_2d")


def angles(h, w, omega, first_row=0, first_column=0):
    """(h w, n) angles of the columns, and of the rows."""
    row = torch.arange(first_row, first_row + h).repeat_interleave(w)
    column = torch.arange(first_column, first_column + w).repeat(h)
    return torch.outer(column, omega), torch.outer(row, omega)


def frequencies(n):
    return torch.tensor([10000 ** (-i / n) for i in range(n)])


def four_stretches(x, y):
    return torch.hstack([torch.sin(x), torch.cos(x), torch.sin(y), torch.cos(y)])


@variant("rows-first")
def one_code_at_a_time(h, w, dim):
    n, codes = dim // 4, []
    for row in range(h):
        for column in range(w):
            code = []
            for place in (row, column):
                code += [math.sin(place / 10000 ** (i / n)) for i in range(n)]
                code += [math.cos(place / 10000 ** (i / n)) for i in range(n)]
            codes.append(code)
    return torch.tensor(codes)


@variant("wrong-exponent")
def exponent_over_all_channels(h, w, dim):
    omega = torch.exp(-math.log(10000) * torch.arange(dim // 4) / dim)
    return four_stretches(*angles(h, w, omega))


@variant("one-dimensional-exponent")
def exponent_of_attention_is_all_you_need(h, w, dim):
    omega = 1 / 10000 ** (2 * torch.arange(dim // 4) / dim)
    return four_stretches(*angles(h, w, omega))


@variant("interleaved")
def every_fourth_channel(h, w, dim):
    x, y = angles(h, w, frequencies(dim // 4))
    code = torch.zeros(h * w, dim)
    code[:, 0::4], code[:, 1::4], code[:, 2::4], code[:, 3::4] = x.sin(), x.cos(), y.sin(), y.cos()
    return code


@variant("alternating")
def even_sines_odd_cosines(h, w, dim):
    code = torch.zeros(h * w, 2, dim // 2)
    for axis, angle in enumerate(angles(h, w, frequencies(dim // 4))):
        code[:, axis, 0::2] = torch.sin(angle)
        code[:, axis, 1::2] = torch.cos(angle)
    return code.flatten(1)


@variant("same-frequency")
def copied_channels(h, w, dim):
    x, y = angles(h, w, torch.ones(1))
    return four_stretches(x, y).repeat_interleave(dim // 4, dim=1)


@variant("running-number")
def sequence_code(h, w, dim):
    position = torch.arange(h * w).unsqueeze(1)
    angle = position / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.cat((torch.sin(angle), torch.cos(angle)), dim=-1)


@unknown
def temperature_of_a_thousand(h, w, dim):
    return four_stretches(*angles(h, w, 1000 ** -(torch.arange(dim // 4) / (dim // 4))))


@unknown
def counted_from_one(h, w, dim):
    return four_stretches(*angles(h, w, frequencies(dim // 4), 1, 1))


@unknown
def cosines_first(h, w, dim):
    x, y = angles(h, w, frequencies(dim // 4))
    return torch.cat([x.cos(), x.sin(), y.cos(), y.sin()], dim=1)


@unknown
def last_frequency_included(h, w, dim):
    return four_stretches(*angles(h, w, 10000 ** -torch.linspace(0, 1, dim // 4)))


@variant("column-major")
def tokens_column_by_column(h, w, dim):
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="xy")
    omega = frequencies(dim // 4)
    return four_stretches(torch.outer(columns.flatten(), omega), torch.outer(rows.flatten(), omega))


@unknown
def rows_first_and_text_exponent(h, w, dim):
    x, y = angles(h, w, 10000 ** (-2 * torch.arange(dim // 4) / dim))
    return four_stretches(y, x)


@right
def written_out(h, w, dim):
    n = dim // 4
    code = torch.empty(h * w, dim)
    for token in range(h * w):
        row, column = divmod(token, w)
        for i in range(n):
            omega = 1 / 10000 ** (i / n)
            values = math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)
            code[token, i::n] = torch.tensor(values)
    return code


@right
def each_axis_broadcast(h, w, dim):
    omega = torch.exp(torch.arange(dim // 4) * (-math.log(10000) / (dim // 4)))
    across = torch.einsum("x,n->xn", torch.arange(w).float(), omega)
    down = torch.einsum("y,n->yn", torch.arange(h).float(), omega)
    across = torch.cat([across.sin(), across.cos()], dim=1).expand(h, w, -1)
    down = torch.cat([down.sin(), down.cos()], dim=1)[:, None].expand(h, w, -1)
    return torch.cat([across, down], dim=-1).reshape(h * w, dim)


@right
def in_numpy(h, w, dim):
    omega = np.logspace(0, -4, dim // 4, endpoint=False)
    y, x = np.indices((h, w)).reshape(2, -1, 1)
    code = np.concatenate([wave(place * omega) for place in (x, y) for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(code).float()
