"""The checks of all exercises: a folder a lesson, a file an exercise, loaded when the lesson's first exercise is met.

A file is named after its exercise (`file_stem`), and the lesson's ``__init__.py`` lists the exercises in their order. What
several of them share is in its ``_shared.py``. This is how ``checks/vit/image_to_patch.py`` writes a check down::

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

`hints` are steps, the gentlest first; the blank itself has none. ``blanks=2`` says that an exercise has two: with one of
them filled, the other is named.

`rng` is a `Random`: a new seed on every run, float64 unless told otherwise. The answer and the reference see copies of
the same inputs and the same random state; of a module, every learned parameter is random, and copied by name.
Compared are: type, shape, dtype, NaN, values, changes of the inputs in place (an in-place reference must be matched),
gradients of all inputs and parameters. What the reference cannot tell, because it is random, is a property::

        yield holds("a quarter of the tokens should stay", lambda mask: mask(rng.normal(2, 16, 4)).sum() == 8,
                    points_to="keeps-the-masked")

A mistake is recognised when the answer does what it does in *every* case, values included; if two catalogued mistakes
cannot be told apart by the cases, neither is named: add a case that separates them. So a good set of cases has every
size different from every other (batch, height, width, heads), a batch of one, and an input that is not square.

From the first case, and from each other way of building a class, `probes` derives more: other sizes and values, a second
call of the same instance, training. Where the reference takes such a case, so must every answer; what is not asked of the
exercise is exempted in its check, ``exempt={"larger": "the model has positions for images of one size"}``, and so are
the rules of `lint` that cannot hold. The first case should be the richest: equal sizes count as one and change together.

``tests/mistakes/vit/image_to_patch.py`` proves it: answers written by somebody who does not know the catalogue.

An exercise whose answer is a Triton kernel gets a runner of its own: see `vitcourse.course.kernels`. The lesson's
``__init__.py`` says ``REQUIRES = {"flash_kernel": "triton"}``, and where there is no Triton there is no such exercise.
"""

import difflib
import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from ..cases import Case, Random, build, call, holds
from ..catalogue import CHECKS, Check, check

__all__ = ["TOPICS", "Case", "Check", "Random", "build", "call", "check", "file_stem", "find", "holds", "load_all"]

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


def file_stem(exercise: str) -> str:
    """The name of the file of an exercise: its own, in small letters.

    A capital begins a new word after at least three small letters, so that MBConv and CoAtNet stay whole.

    >>> [file_stem(name) for name in ("vit.image_to_patch", "vit.VisionTransformer", "hybrid.MBConv", "CoAtNet")]
    ['image_to_patch', 'vision_transformer', 'mbconv', 'coatnet']
    """
    return re.sub(r"(?<=[a-z]{3})(?=[A-Z])", "_", exercise.rpartition(".")[2]).lower()


@cache
def load(topic: str) -> tuple[str, ...]:
    """Import the checks of one lesson, if it has any yet: their names, in the order of the lesson."""
    if topic not in TOPICS or not find_spec(f"{__name__}.{topic}"):
        return ()
    lesson = import_module(f"{__name__}.{topic}")
    requires = getattr(lesson, "REQUIRES", {})
    exercises = [name for name in lesson.EXERCISES if name not in requires or find_spec(requires[name])]
    for name in exercises:
        import_module(f"{lesson.__name__}.{file_stem(name)}")
    return tuple(f"{topic}.{name}" for name in exercises)


def load_all() -> dict[str, Check]:
    """Every check there is, by lesson and then in the order of the lesson."""
    names = [name for topic in TOPICS for name in load(topic)]
    return {name: CHECKS[name] for name in dict.fromkeys([*names, *CHECKS])}


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
