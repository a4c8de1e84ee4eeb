"""The checks of all exercises, one file per lesson, loaded when its first exercise is met.

This is how ``checks/vit.py`` writes one down::

    import torch
    from einops import rearrange

    from vitcourse.course.checks import build, call, check, holds


    @check(
        "vit.image_to_patch",
        reference="vitcourse.vit.image_to_patch",
        level=1,
        minutes=5,
        why="A transformer reads sequences, so an image has to become one.",
        hints=["Each of h and w splits in two.", "In einops: (h p1) and (w p2)."],
    )
    def image_to_patch(rng):
        yield call(rng.normal(2, 3, 8, 8), 4)
        yield call(rng.normal(1, 3, 8, 12), 4).on("a non-square image")
        yield call(rng.strided(2, 1, 4, 4), 2).on("a non-contiguous image")


    image_to_patch.mistake(
        "column-major",
        "the patches follow each other down the columns; a page is read row by row",
        lambda image, p: rearrange(image, "b c (h p1) (w p2) -> b (w h) (p1 p2 c)", p1=p, p2=p),
    )

For a class, a case says how to build it, then how to call it; a mistake may be a subclass of the reference::

    @check("vit.Attention", reference="vitcourse.vit.Attention", level=3, minutes=20, why="...", hints=["..."])
    def attention(rng):
        yield build(dim=8, num_heads=2).call(rng.normal(2, 5, 8))
        yield build(8, 4).method("heads", rng.normal(1, 3, 8)).on("a batch of one")


    @attention.mistake("no-scale", "the scores grow with the width of a head, and the softmax saturates")
    class _(vit.Attention):
        def forward(self, x): ...

`rng` is a `Random`: a new seed on every run, float64 unless told otherwise. The answer and the reference see copies of
the same inputs and the same random state; of a module, every learned parameter is random, and copied by name.
Compared are: type, shape, dtype, NaN, values, changes of the inputs in place (an in-place reference must be matched),
gradients of all inputs and parameters. What the reference cannot tell, because it is random, is a property::

        yield holds("a quarter of the tokens should stay", lambda mask: mask(rng.normal(2, 16, 4)).sum() == 8,
                    points_to="keeps-the-masked")

A mistake is recognised when the answer does what it does in *every* case, values included; if two catalogued mistakes
cannot be told apart by the cases, neither is named: add a case that separates them. So a good set of cases has every
size different from every other (batch, height, width, heads), a batch of one, and an input that is not square.

An exercise whose answer is a Triton kernel gets a runner of its own: see `vitcourse.course.kernels`.
"""

import difflib
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from ..cases import Case, Random, build, call, holds
from ..grading import CHECKS, Check, check

__all__ = ["TOPICS", "Case", "Check", "Random", "build", "call", "check", "find", "holds", "load_all"]

# The lessons in the order of the course: the number of a lesson is its place in this list.
TOPICS = (
    "vit",
    "hierarchical",
    "hybrid",
    "pretraining",
    "finetuning",
    "efficient_attention",
    "hardware",
    "dense_prediction",
    "video",
    "interpretability",
    "robustness",
    "deployment",
    "multimodal",
)


@cache
def load(topic: str) -> None:
    """Import the checks of one lesson, if it has any yet."""
    if topic in TOPICS and find_spec(f"{__name__}.{topic}"):
        import_module(f"{__name__}.{topic}")


def load_all() -> dict[str, Check]:
    """Every check there is, by lesson and then in the order of the lesson."""
    for topic in TOPICS:
        load(topic)
    return dict(sorted(CHECKS.items(), key=lambda item: _place(item[1].topic)))


def _place(topic: str) -> int:
    return TOPICS.index(topic) if topic in TOPICS else len(TOPICS)


def find(name: str) -> Check:
    """The check of exercise `name`: ``"vit.Attention"``, or ``"Attention"`` alone where only one lesson has it.

    Raises:
        ValueError: there is no such exercise; the nearest names are suggested.
    """
    if "." in name:
        load(name.partition(".")[0])
    else:
        load_all()
    if name in CHECKS:
        return CHECKS[name]
    alike = [check for check in CHECKS.values() if check.short_name == name]
    if len(alike) == 1:
        return alike[0]
    known = load_all()
    near = [check.name for check in alike] or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    raise ValueError(f"no exercise is called {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
