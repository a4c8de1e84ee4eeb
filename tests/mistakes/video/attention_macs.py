"""Answers to `video.attention_macs`."""

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("video.attention_macs")


def tally(kind, frames, places, dim, each=None, cls=1):
    """The cost, sequence by sequence: their lengths are written down, and each is paid for."""
    each = each or (lambda n: 4 * n * dim * dim + 2 * n * n * dim)
    if kind == "joint":
        return each(frames * places + cls)
    spatial = sum(each(places + cls) for _ in range(frames))
    if kind == "space_only":
        return spatial
    return spatial + sum(each(frames) for _ in range(places)) + dim * dim * frames * places


@variant("no-cls")
def patches_alone(kind, frames, places, dim):
    return tally(kind, frames, places, dim, cls=0)


@variant("products-alone")
def only_scores_and_values(kind, frames, places, dim):
    return tally(kind, frames, places, dim, lambda n: n * n * dim + n * n * dim)


@variant("three-projections")
def qkv_alone(kind, frames, places, dim):
    return tally(kind, frames, places, dim, lambda n: n * dim * 3 * dim + 2 * n * n * dim)


@variant("one-product")
def scores_alone(kind, frames, places, dim):
    return tally(kind, frames, places, dim, lambda n: n * dim * (4 * dim + n))


@variant("no-last")
def without_the_linear(kind, frames, places, dim):
    return tally(kind, frames, places, dim) - (frames * places * dim**2 if kind == "divided" else 0)


@variant("doubled")
def flops(kind, frames, places, dim):
    return 2 * tally(kind, frames, places, dim)


@variant("time-once")
def one_place(kind, frames, places, dim):
    whole = tally(kind, frames, places, dim)
    if kind != "divided":
        return whole
    return whole - (places - 1) * (4 * frames * dim**2 + 2 * frames**2 * dim)


@variant("time-with-cls")
def cls_everywhere(kind, frames, places, dim):
    if kind != "divided":
        return tally(kind, frames, places, dim)
    n = frames + 1
    in_time = places * n * (4 * dim**2 + 2 * n * dim)
    return tally("space_only", frames, places, dim) + in_time + frames * places * dim**2


@variant("time-is-joint")
def all_patches(kind, frames, places, dim):
    if kind != "divided":
        return tally(kind, frames, places, dim)
    everything = tally("joint", frames, places, dim, cls=0)
    return tally("space_only", frames, places, dim) + everything + frames * places * dim**2


@variant("no-time")
def frames_alone(kind, frames, places, dim):
    return tally("space_only" if kind == "divided" else kind, frames, places, dim)


@variant("joint-with-many-cls")
def a_cls_a_frame(kind, frames, places, dim):
    return tally(kind, frames, places, dim, cls=frames) if kind == "joint" else tally(kind, frames, places, dim)


@variant("joint-without-cls")
def all_patches_and_no_cls(kind, frames, places, dim):
    return tally(kind, frames, places, dim, cls=int(kind != "joint"))


@variant("frames-without-cls")
def cls_in_joint_alone(kind, frames, places, dim):
    return tally(kind, frames, places, dim, cls=int(kind == "joint"))


@variant("time-in-frames")
def places_in_time(kind, frames, places, dim):
    if kind != "divided":
        return tally(kind, frames, places, dim)
    in_time = tally("space_only", frames, places, dim, cls=0)
    return tally("space_only", frames, places, dim) + in_time + frames * places * dim**2


@variant("last-with-cls")
def all_tokens_at_last(kind, frames, places, dim):
    return tally(kind, frames, places, dim) + (dim**2 if kind == "divided" else 0)


@variant("time-alone")
def without_space(kind, frames, places, dim):
    if kind != "divided":
        return tally(kind, frames, places, dim)
    return places * frames * dim * (5 * dim + 2 * frames)


@unknown
def with_the_mlp(kind, frames, places, dim):
    return tally(kind, frames, places, dim) + 8 * (1 + frames * places) * dim**2


@unknown
def float_cost(kind, frames, places, dim):
    return tally(kind, frames, places, dim) * 1.01


@unknown
def linear_cost(kind, frames, places, dim):
    return tally(kind, frames, places, dim, lambda n: 4 * n * dim**2 + 2 * n * dim**2)


@right
def sequence_by_sequence(kind, frames, places, dim):
    return tally(kind, frames, places, dim)


@right
def expanded(kind, frames, places, dim):
    n = 1 + places
    whole = 1 + frames * places
    return {
        "joint": 2 * whole * dim * (2 * dim + whole),
        "space_only": 2 * frames * n * dim * (2 * dim + n),
        "divided": 2 * frames * n * dim * (2 * dim + n) + places * frames * dim * (5 * dim + 2 * frames),
    }[kind]


@right
def by_lengths(kind, frames, places, dim):
    lengths = {"joint": [1 + frames * places], "space_only": [1 + places] * frames}
    lengths["divided"] = lengths["space_only"] + [frames] * places
    total = 0
    for n in lengths[kind]:
        q = k = v = out = n * dim * dim
        scores = mixing = n * n * dim
        total += q + k + v + out + scores + mixing
    if kind == "divided":
        total += frames * places * dim * dim
    return total
