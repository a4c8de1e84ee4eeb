"""The check of `hierarchical.relative_position_index`."""

import torch

from vitcourse.course.checks import call, check


@check(
    "hierarchical.relative_position_index",
    reference="vitcourse.hierarchical.relative_position_index",
    level=3,
    minutes=20,
    why="Swin has no other positions: what a token knows of its neighbours' places, it knows from this table.",
    hints=[
        "For each pair of tokens you need two numbers: how many rows lie between them, and how many columns. Query minus "
        "key.",
        "Distances may be negative, row numbers of a table may not: let each axis start at 0.",
        "It is the numbering of a grid: the table's grid is (2p − 1) high, and how wide?",
    ],
)
def relative_position_index(rng):
    yield call((2, 3))
    yield call((3, 3)).on("a square window")
    yield call((1, 4)).on("a single row")
    yield call((4, 2)).on("a tall window")


def _distances(window_size):
    """Rows and columns between query and key, each (N, N)."""
    rows, columns = torch.meshgrid(*map(torch.arange, window_size), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    return rows[:, None] - rows, columns[:, None] - columns


def _catalogue_index(key, message, number):
    def faulty(window_size):
        return number(*_distances(window_size), *window_size)

    relative_position_index.mistake(key, message, faulty)


_catalogue_index(
    "key-minus-query",
    "left and right are exchanged, and so are above and below: each pair looks up the opposite distance",
    lambda down, across, p, q: (p - 1 - down) * (2 * q - 1) + q - 1 - across,
)
_catalogue_index(
    "from-below-zero",
    "some numbers are negative, which wraps around to the table's other end without an error",
    lambda down, across, p, q: down * (2 * q - 1) + across,
)
_catalogue_index(
    "sum-of-axes",
    "the distances along both axes are added, so that one down and one right count the same as two down",
    lambda down, across, p, q: down + p - 1 + across + q - 1,
)
_catalogue_index(
    "as-wide-as-the-window",
    "distances overlap: there are more of them along an axis than there are tokens",
    lambda down, across, p, q: (down + p - 1) * q + across + q - 1,
)
_catalogue_index(
    "height-for-width",
    "height and width of the window are mixed up, which square windows hide",
    lambda down, across, p, q: (down + p - 1) * (2 * p - 1) + across + q - 1,
)
_catalogue_index(
    "columns-first",
    "the table is numbered column by column; the pretrained tables are numbered row by row",
    lambda down, across, p, q: (across + q - 1) * (2 * p - 1) + down + p - 1,
)
_catalogue_index(
    "without-sign",
    "only how far counts here, not in which direction: left and right share an entry",
    lambda down, across, p, q: down.abs() * (2 * q - 1) + across.abs(),
)
_catalogue_index(
    "pairs-not-numbers",
    "these are the two distances of each pair; they still have to become one number",
    lambda down, across, p, q: torch.stack([down + p - 1, across + q - 1], dim=-1),
)
