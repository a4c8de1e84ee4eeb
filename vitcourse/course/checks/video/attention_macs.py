"""The check of `video.attention_macs`, and its reference: the library counts operations instead."""

from vitcourse.course.checks import call, check


def attention_macs(kind: str, frames: int, places: int, dim: int) -> int:
    """Multiply–adds of the attention of one block on one clip, projections included: joint, space_only or divided.

    >>> attention_macs("joint", 8, 196, 768), attention_macs("divided", 8, 196, 768)
    (7483000320, 8838623232)
    """

    def cost(tokens: int) -> int:
        return 4 * tokens * dim**2 + 2 * tokens**2 * dim

    if kind == "joint":
        return cost(1 + frames * places)
    in_space = frames * cost(1 + places)
    if kind == "space_only":
        return in_space
    return in_space + places * cost(frames) + frames * places * dim**2


@check(
    "video.attention_macs",
    reference="vitcourse.course.checks.video.attention_macs.attention_macs",
    level=2,
    minutes=15,
    why="Whether a model of clips can be trained at all is known before the GPUs are rented, by a formula of three lines.",
    hints=[
        "Write the cost of attention among n tokens first: four projections of D × D for each token, and two products "
        "in which every token meets every other.",
        "Joint: how many tokens are there, [CLS] included? In each frame by itself: how many, and how many times?",
        "Divided: the places of a frame look along time, each by itself, without [CLS]; then comes one more projection "
        "of D × D for every patch; then the frames.",
    ],
)
def attention_macs_cases(rng):
    for kind in ("joint", "space_only", "divided"):
        yield call(kind, 3, 11, 5)
        yield call(kind, rng.integer(4, 9), rng.integer(10, 15), 6).on(f"{kind} attention, other sizes")
        yield call(kind, 1, 7, 4).on(f"{kind} attention in one frame")
        yield call(kind, 13, 2, 3).on(f"{kind} attention, more frames than places")


def _counted(
    kind, frames, places, dim, *,
    projections=4, products=2, cls=1, last=1, last_cls=0, factor=1, time=None, joint=None, space=None, in_divided=1,
):  # fmt: skip
    """The count in its parts, each of which a mistake may replace."""

    def cost(tokens):
        return projections * tokens * dim**2 + products * tokens**2 * dim

    if kind == "joint":
        return factor * (joint(frames, places, cost) if joint else cost(cls + frames * places))
    in_space = space(frames, places, cost) if space else frames * cost(cls + places)
    if kind == "space_only":
        return factor * in_space
    in_time = time(frames, places, cost) if time else places * cost(frames)
    return factor * (in_divided * in_space + in_time + (last_cls + last * frames * places) * dim**2)


def _catalogue(key, message, **change):
    attention_macs_cases.mistake(
        key, message, lambda kind, frames, places, dim: _counted(kind, frames, places, dim, **change)
    )


_catalogue("no-cls", "[CLS] is not counted; it looks, and is looked at, in every frame", cls=0)
_catalogue(
    "joint-without-cls",
    "in joint attention [CLS] is not counted; it is one of all tokens",
    joint=lambda frames, places, cost: cost(frames * places),
)
_catalogue(
    "frames-without-cls",
    "the frames are counted without [CLS], of which each has a copy",
    space=lambda frames, places, cost: frames * cost(places),
)
_catalogue("products-alone", "the four projections are not counted; on short clips they cost most", projections=0)
_catalogue("three-projections", "three projections are counted; what the heads found is projected, too", projections=3)
_catalogue(
    "one-product", "one of the two products is not counted: scores are made, and then values are mixed", products=1
)
_catalogue("no-last", "the projection after attention along time is not counted", last=0)
_catalogue("doubled", "these are floating-point operations; a multiply–add is two of them", factor=2)
_catalogue(
    "time-once",
    "attention along time is counted for one place; every place of a frame has its own",
    time=lambda frames, places, cost: cost(frames),
)
_catalogue(
    "time-with-cls",
    "[CLS] is counted in attention along time as well; it takes no part in it",
    time=lambda frames, places, cost: places * cost(1 + frames),
)
_catalogue(
    "time-is-joint",
    "along time every patch meets all patches of all frames here; it should meet those in its own place",
    time=lambda frames, places, cost: cost(frames * places),
)
_catalogue(
    "time-in-frames",
    "along time the places of a frame look at each other here; it should be the frames of a place",
    time=lambda frames, places, cost: frames * cost(places),
)
_catalogue(
    "last-with-cls",
    "the projection after attention along time is counted for [CLS] as well, which attention along time leaves alone",
    last_cls=1,
)
_catalogue("time-alone", "of divided attention the second part is not counted: after time comes space", in_divided=0)
_catalogue(
    "no-time",
    "attention along time is not counted",
    time=lambda frames, places, cost: 0,
    last=0,
)
_catalogue(
    "joint-with-many-cls",
    "joint attention has one [CLS] for the clip, not one for each frame",
    joint=lambda frames, places, cost: cost(frames * (1 + places)),
)
