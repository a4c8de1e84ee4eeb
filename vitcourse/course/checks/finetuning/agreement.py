"""The check of `finetuning.agreement`."""

import torch

from vitcourse.course.checks import call, check


@check(
    "finetuning.agreement",
    reference="vitcourse.finetuning.agreement",
    level=1,
    minutes=5,
    why="Two models of equal accuracy may fail on the same pictures or on others, and only then is it worth running "
    "both.",
    hints=[
        "Stack them: (M, N). Which axes must be added, so that each row meets each other row?",
        "The mean of a comparison is a share, once it is a float.",
    ],
    exempt={"batch": "predictions are classes of N pictures", "single": "predictions are classes of N pictures"},
)
def agreement_cases(rng):
    yield call([rng.integers(0, 3, (16,)) for _ in range(4)])
    yield call([rng.integers(0, 5, (8,)) for _ in range(2)]).on("two classifiers")
    yield call([rng.integers(0, 2, (32,))]).on("one classifier")
    names = torch.tensor([743, 744, 999, 1000])
    yield call([names[rng.integers(0, 4, (24,))] for _ in range(3)]).on("a thousand classes")


def _equal(predictions):
    said = torch.stack(list(predictions))
    return (said[:, None] == said[None]).float()


agreement_cases.mistake(
    "over-the-models", "the mean runs over the classifiers; it should run over the pictures",
    lambda predictions: _equal(predictions).mean(1),
)  # fmt: skip
agreement_cases.mistake(
    "counted", "these are counts; a share does not depend on the number of pictures",
    lambda predictions: _equal(predictions).sum(-1),
)  # fmt: skip
agreement_cases.mistake(
    "disagreement", "this says how often they differ: a classifier should agree with itself always",
    lambda predictions: 1 - _equal(predictions).mean(-1),
)  # fmt: skip
agreement_cases.mistake(
    "all-at-once", "this is how often all say the same, one number; it is asked of each two",
    lambda predictions: (torch.stack(list(predictions)) == predictions[0]).all(0).float().mean(),
)  # fmt: skip
