"""The check of `dense_prediction.denoising_mask`, and its reference: the library's takes disturbed objects whole."""

import torch
from torch import Tensor

from vitcourse.course.checks import call, check
from vitcourse.dense_prediction import detr_queries


def denoising_mask(real: Tensor, num_queries: int) -> Tensor:
    """Who may attend to whom, (B, 1, N, N), N = G · n + Q: disturbed objects first, group after group, then queries.

    Args:
        real: (B, G, n), which places hold an object; images with fewer objects are filled up.
        num_queries: Q.

    >>> denoising_mask(torch.ones(1, 2, 1, dtype=torch.bool), 1)[0, 0].int().tolist()
    [[1, 0, 1], [0, 1, 1], [0, 0, 1]]
    """
    if real.dtype != torch.bool or real.ndim != 3:
        raise ValueError("real must be (B, G, n), boolean")
    labels = torch.zeros(real.flatten(1).shape, dtype=torch.int64, device=real.device)
    image, query = real.flatten(1).nonzero(as_tuple=True)
    disturbed = detr_queries.Disturbed(labels, labels.new_zeros(*labels.shape, 4), image, query, image, real.shape[1])
    return detr_queries.denoising_mask(disturbed, num_queries)


@check(
    "dense_prediction.denoising_mask",
    reference="vitcourse.course.checks.dense_prediction.denoising_mask.denoising_mask",
    level=4,
    minutes=25,
    why="With one wrong block of it the model reads the answers off, its loss is splendid, and it finds nothing.",
    hints=[
        "Number the groups: 0 … G − 1 for disturbed objects, and one number more for the queries.",
        "Two of the same number may see each other. And who else may see whom?",
        "Places without an object are columns: nobody sees them. Rows stay, or a softmax would run over nothing.",
    ],
    gradients=False,
    exempt={"large": "places are taken or not", "tiny": "places are taken or not"},
)
def denoising_cases(rng):
    yield call(_real(rng, 2, 3, 4), 5)
    yield call(_real(rng, 3, 1, 2), 6).on("one group")
    yield call(torch.ones(1, 4, 3, dtype=torch.bool), 2).on("an image, all of whose places are taken")
    yield call(torch.zeros(2, 3, 1, dtype=torch.bool), 4).on("images without objects")
    yield call(_real(rng, 2, 5, 1), 1).on("one object and one query")


def _real(rng, batch, groups, places):
    """The first image is full, the others have fewer, each the same in all of its groups."""
    counts = torch.cat([torch.tensor([places]), rng.integers(0, places + 1, (batch - 1,))])
    counts[1:2].clamp_(max=places - 1)
    return (torch.arange(places) < counts[:, None])[:, None].expand(batch, groups, places).clone()


def _mask(real, num_queries, *, blocks=None, filled=True, first=False):
    """The reference in parts, each of which a mistake may replace."""
    _, groups, places = real.shape
    group = torch.cat([torch.arange(groups).repeat_interleave(places), torch.full((num_queries,), groups)])
    query = group == groups
    row, column = group[:, None], group[None]
    blocks = blocks or (lambda row, column, _, q_column: (row == column) | q_column)
    mask = blocks(row, column, query[:, None], query[None]).expand(len(real), -1, -1)
    if filled:
        there = torch.cat([real.flatten(1), torch.ones(len(real), num_queries, dtype=torch.bool)], 1)
        mask = mask & there[:, None]
    if first:
        mask = mask.roll((num_queries, num_queries), (1, 2))
    return mask[:, None].clone()


denoising_cases.mistake(
    "leak",
    "the queries see the disturbed objects, and with them the answers: what they are to find they can copy",
    lambda real, num_queries: _mask(
        real, num_queries, blocks=lambda row, column, q_row, q_column: (row == column) | q_column | q_row
    ),
)
denoising_cases.mistake(
    "groups-see-each-other",
    "a group sees the other groups: the same objects, disturbed otherwise, from which together the truth can be guessed",
    lambda real, num_queries: _mask(real, num_queries, blocks=lambda row, column, q_row, q_column: ~q_row | q_column),
)
denoising_cases.mistake(
    "all-apart",
    "the groups do not see the queries; they may, and learn to live with them",
    lambda real, num_queries: _mask(real, num_queries, blocks=lambda row, column, q_row, q_column: row == column),
)
denoising_cases.mistake(
    "only-itself",
    "a disturbed object sees no other one of its own group; they are to sort out among themselves who is what",
    lambda real, num_queries: _mask(
        real,
        num_queries,
        blocks=lambda row, column, q_row, q_column: torch.eye(row.numel(), dtype=torch.bool) | q_column,
    ),
)
denoising_cases.mistake(
    "filled-up-seen",
    "places that hold no object are seen like objects; what was filled up is nothing that anybody should attend to",
    lambda real, num_queries: _mask(real, num_queries, filled=False),
)
denoising_cases.mistake(
    "filled-up-blind",
    "places that hold no object see nothing at all: their softmax runs over nothing, and gives NaN",
    lambda real, num_queries: _blind(real, num_queries),
)
denoising_cases.mistake(
    "inverted",
    'True stands for "must not see" here; in this course it is "may attend"',
    lambda real, num_queries: ~_mask(real, num_queries),
)
denoising_cases.mistake(
    "queries-first",
    "the queries come first here; the disturbed objects do",
    lambda real, num_queries: _mask(real, num_queries, first=True),
)
denoising_cases.mistake(
    "transposed",
    "rows and columns are exchanged: the row says who looks, the column at whom",
    lambda real, num_queries: _mask(real, num_queries).transpose(2, 3),
)


def _blind(real, num_queries):
    rows = torch.cat([real.flatten(1), torch.ones(len(real), num_queries, dtype=torch.bool)], 1)
    return _mask(real, num_queries) & rows[:, None, :, None]
