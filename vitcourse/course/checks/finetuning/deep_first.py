"""The check of `finetuning.deep_first`, and its reference: the library's makes stages of a model's own parts."""

import torch
from torch import Tensor

from vitcourse.course.checks import call, check


def deep_first(parts: int, stages: int) -> Tensor:
    """Which part is trained in which stage, (stages, parts) bool: the head first, then ever more of the body.

    >>> deep_first(4, 3).int()
    tensor([[0, 0, 0, 1],
            [0, 1, 1, 1],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    body = parts - 1
    thawed = torch.tensor([1 + round(s * body / (stages - 1)) for s in range(stages)])
    return torch.arange(parts) >= parts - thawed[:, None]


@check(
    "finetuning.deep_first",
    reference="vitcourse.course.checks.finetuning.deep_first.deep_first",
    level=2,
    minutes=10,
    why="Training loops full of `if epoch > 3:` cannot be compared, saved or resumed. A table can.",
    hints=[
        "How many parts are trained in stage s, the head included?",
        "They are the last ones: part i is among the last n of `parts` if i >= parts - n.",
        "A column of stages against a row of parts: torch.arange(parts) >= first[:, None].",
    ],
)
def deep_first_cases(rng):
    yield call(7, 3)
    yield call(6, 4).on("parts that do not divide evenly")
    yield call(rng.integer(8, 14), 5).on("more parts")
    yield call(5, 2).on("two stages: the head, then everything")
    yield call(2, 2).on("a body of one part")
    yield call(3, 9).on("more stages than parts")
    yield call(8, 27).on("many stages")


def _table(parts, counts):
    return torch.stack([torch.arange(parts) >= parts - n for n in counts])


deep_first_cases.mistake(
    "shallow-first",
    "the shallow parts are thawed first; this schedule begins with the head",
    lambda parts, stages: deep_first(parts, stages).flip(1),
)
deep_first_cases.mistake(
    "one-at-a-time",
    "what an earlier stage has thawed is frozen again; the thawed part should only grow",
    lambda parts, stages: torch.cat(
        [deep_first(parts, stages)[:1], deep_first(parts, stages)[1:] & ~deep_first(parts, stages)[:-1]]
    ),
)
deep_first_cases.mistake(
    "never-all",
    "the last stage leaves part of the body frozen; there all should be trained",
    lambda parts, stages: _table(parts, [1 + round(s * (parts - 1) / stages) for s in range(stages)]),
)
deep_first_cases.mistake(
    "no-stage-for-the-head",
    "already the first stage moves a part of the body; it should train the head alone",
    lambda parts, stages: _table(parts, [1 + round((s + 1) * (parts - 1) / stages) for s in range(stages)]),
)
deep_first_cases.mistake(
    "rounded-down",
    "the number of thawed parts is rounded down; it should be rounded to the nearest",
    lambda parts, stages: _table(parts, [1 + s * (parts - 1) // (stages - 1) for s in range(stages)]),
)
deep_first_cases.mistake(
    "head-frozen",
    "the head is frozen at first, so that nothing is trained in the first stage",
    lambda parts, stages: _table(parts, [round(s * (parts - 1) / (stages - 1)) for s in range(stages)]),
)
deep_first_cases.mistake(
    "frozen-for-trained",
    "True stands for frozen here; it should stand for trained",
    lambda parts, stages: ~deep_first(parts, stages),
)
