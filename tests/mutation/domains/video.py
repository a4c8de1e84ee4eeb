"""Lesson 08: frames of a file, filters, costs, divided attention, positions in time, views, windows, tubes."""

import torch

from vitcourse.course.cases import Case, build, call

from ..domain import Draws, domain


@domain("video.sample_frames")
def sample_frames(rng: Draws) -> Case:
    video_fps, fps = rng.choice([(30, 30), (30, 12), (25, 10), (24, 8), (30, 7), (60, 15), (25, 50), (24, 5)])
    start = 0 if rng.sometimes(0.3) else rng.size(0, 40)
    return call(rng.size(1, 12), fps, video_fps, start + rng.size(1, 90), start)


@domain("video.inflate_weight")
def inflate_weight(rng: Draws) -> Case:
    weight = rng.floats(rng.size(1, 5), rng.size(1, 4), rng.size(1, 6), rng.size(1, 6))
    how = () if rng.sometimes(0.2) else (rng.choice(["mean", "centre"]),)
    return call(weight, rng.size(1, 9), *how)


@domain("video.attention_macs")
def attention_macs(rng: Draws) -> Case:
    kind = rng.choice(["joint", "space_only", "divided"])
    return call(kind, rng.size(1, 9), rng.size(1, 12), rng.size(1, 6))  # small: a mutant may take powers of powers


@domain("video.DividedBlock")
def divided_block(rng: Draws) -> list[Case]:
    heads, width = rng.size(1, 3), rng.size(2, 4)
    block = build(heads * width, heads)
    cases = []
    for _ in range(rng.size(1, 2)):
        t, h, w = rng.size(1, 5), rng.size(1, 4), rng.size(1, 4)
        cases.append(block.call(rng.floats(rng.size(1, 3), 1 + t * h * w, heads * width), (t, h, w, 1)))
    return cases


@domain("video.resize_time_embed")
def resize_time_embed(rng: Draws) -> Case:
    prefix = rng.size(0, 3)
    table = rng.floats(1, prefix + rng.size(1, 9), rng.size(1, 6))
    return call(table, rng.size(1, 12), prefix) if prefix or rng.sometimes(0.5) else call(table, rng.size(1, 12))


@domain("video.clip_views")
def clip_views(rng: Draws) -> Case:
    count, frames = rng.size(1, 4), rng.size(1, 7)
    clips = rng.floats(count, rng.size(1, 3), frames, rng.size(1, 4), rng.size(1, 4))
    return call(clips, torch.stack([rng.normal(frames).argsort() for _ in range(count)]))


@domain("video.shift_mask_3d")
def shift_mask_3d(rng: Draws) -> Case:
    size = tuple(rng.size(1, 6) for _ in range(3))
    window = tuple(min(n, rng.size(1, 4)) for n in size)
    shift = tuple(rng.size(0, p - 1) if n > p else 0 for n, p in zip(size, window, strict=True))
    return call(size, window, shift)


@domain("video.tube_mask")
def tube_mask(rng: Draws) -> Case:
    clips, places = rng.size(1, 4), rng.size(2, 12)
    return call(rng.positive(clips, places), rng.size(1, places - 1), rng.size(1, 5))
