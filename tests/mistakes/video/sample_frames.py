"""Answers to `video.sample_frames`."""

import math
from fractions import Fraction

import numpy as np
import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("video.sample_frames")


def listed(count, frame_of):
    return torch.tensor([frame_of(k) for k in range(count)], dtype=torch.long)


@variant("every-frame")
def neighbours(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: min(start + k, video_frames - 1))


@variant("rates-exchanged")
def the_other_way_round(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: min(start + math.floor(Fraction(k * fps, video_fps)), video_frames - 1))


@variant("rounded-step")
def constant_stride(num_frames, fps, video_fps, video_frames, start=0):
    stride = max(int(video_fps / fps), 1)
    return torch.arange(start, start + num_frames * stride, stride).minimum(torch.tensor(video_frames - 1))


@variant("nearest")
def rounded(num_frames, fps, video_fps, video_frames, start=0):
    frames = (2 * np.arange(num_frames) * video_fps + fps) // (2 * fps)
    return torch.from_numpy(np.minimum(start + frames, video_frames - 1))


@variant("nearest")
def half_to_even(num_frames, fps, video_fps, video_frames, start=0):
    frames = (torch.arange(num_frames) * video_fps / fps).round().long()
    return (start + frames).clamp(max=video_frames - 1)


@variant("next-frame")
def ceiling(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: min(start + math.ceil(Fraction(k * video_fps, fps)), video_frames - 1))


@variant("begins-anew")
def loop(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: (start + k * video_fps // fps) % video_frames)


@variant("too-short")
def left_out(num_frames, fps, video_fps, video_frames, start=0):
    found = [start + k * video_fps // fps for k in range(num_frames)]
    return torch.tensor([frame for frame in found if frame <= video_frames - 1])


@variant("one-too-far")
def off_by_one(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: min(start + k * video_fps // fps, video_frames))


@variant("no-end")
def endless(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: start + k * video_fps // fps)


@variant("start-lost")
def from_the_first(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: min(k * video_fps // fps, video_frames - 1))


@variant("spread-out")
def evenly(num_frames, fps, video_fps, video_frames, start=0):
    last = video_frames - 1 - start
    return listed(num_frames, lambda k: start + (k * last // (num_frames - 1) if k else 0))


@variant("step-of-nothing")
def whole_stride(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: min(start + k * round(video_fps / fps), video_frames - 1))


@variant("falls-short")
def seconds_in_single_precision(num_frames, fps, video_fps, video_frames, start=0):
    seconds = torch.arange(num_frames) / fps
    return (start + (seconds * video_fps).floor().long()).clamp(max=video_frames - 1)


@variant("falls-short")
def seconds_in_double_precision(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: min(start + int(k / fps * video_fps), video_frames - 1))


@variant("falls-short")
def ratio_first(num_frames, fps, video_fps, video_frames, start=0):
    step = video_fps / fps
    return (start + (torch.arange(num_frames) * step).long()).clamp(max=video_frames - 1)


@variant("start-after-the-end")
def clamped_first(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: start + min(k * video_fps // fps, video_frames - 1))


@unknown
def one_late(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: min(start + (k + 1) * video_fps // fps, video_frames - 1))


@unknown
def start_in_time(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: min((start + k) * video_fps // fps, video_frames - 1))


@unknown
def held_from_the_front(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: max(min(start, video_frames - 1) - k * video_fps // fps, 0))


@right
def by_hand(num_frames, fps, video_fps, video_frames, start=0):
    return listed(num_frames, lambda k: min(start + k * video_fps // fps, video_frames - 1))


@right
def by_time(num_frames, fps, video_fps, video_frames, start=0):
    seconds = torch.arange(num_frames, dtype=torch.float64) / fps
    return (start + (seconds * video_fps + 1e-9).floor()).clamp(max=video_frames - 1).long()


@right
def by_search(num_frames, fps, video_fps, video_frames, start=0):
    """Which frames of the file have begun, in common units of time."""
    begins = torch.arange(video_frames - start) * fps
    wanted = torch.arange(num_frames) * video_fps
    return start + torch.searchsorted(begins, wanted, right=True) - 1


@right
def padded_list(num_frames, fps, video_fps, video_frames, start=0):
    found = [f for k in range(num_frames) if (f := start + k * video_fps // fps) < video_frames]
    return torch.tensor(found + [video_frames - 1] * (num_frames - len(found)))


@right
def product_first(num_frames, fps, video_fps, video_frames, start=0):
    """In floats, but the product is whole, and a quotient is rounded only once."""
    frames = (torch.arange(num_frames) * video_fps / fps).floor().long()
    return (start + frames).clamp(max=video_frames - 1)
