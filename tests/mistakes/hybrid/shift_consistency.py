"""Answers to `hybrid.shift_consistency`."""

import numpy as np
import torch
import torch.nn.functional as F

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hybrid.shift_consistency")
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))


def moved(x, down, across):
    """A new picture of zeros, and the old one drawn into it elsewhere."""
    out, (h, w) = torch.zeros_like(x), x.shape[-2:]
    for row in range(h):
        for column in range(w):
            if 0 <= row - down < h and 0 <= column - across < w:
                out[..., row, column] = x[..., row - down, column - across]
    return out


def said(model, x):
    return model(x).max(dim=-1).indices.numpy()


def mean_over(answers, still):
    return float(np.mean([a == b for answer in answers for a, b in zip(answer, still, strict=True)]))


@variant("rolled")
def around_the_edge(model, images, pixels):
    answers = [said(model, torch.roll(images, (pixels * d, pixels * a), (2, 3))) for d, a in DIRECTIONS]
    return mean_over(answers, said(model, images))


@variant("border-repeated")
def clamped_indices(model, images, pixels):
    h, w = images.shape[-2:]
    answers = []
    for d, a in DIRECTIONS:
        rows, columns = (torch.arange(h) - pixels * d).clamp(0, h - 1), (torch.arange(w) - pixels * a).clamp(0, w - 1)
        answers.append(said(model, images[:, :, rows][..., columns]))
    return mean_over(answers, said(model, images))


@variant("diagonal")
def both_axes(model, images, pixels):
    answers = [said(model, moved(images, d * pixels, a * pixels)) for d in (-1, 1) for a in (-1, 1)]
    return mean_over(answers, said(model, images))


@variant("one-pixel")
def forgets_the_argument(model, images, pixels):
    return mean_over([said(model, moved(images, d, a)) for d, a in DIRECTIONS], said(model, images))


@variant("right-and-down-only")
def two_directions(model, images, pixels):
    answers = [said(model, moved(images, 0, pixels)), said(model, moved(images, pixels, 0))]
    return mean_over(answers, said(model, images))


@variant("all-four-at-once")
def withstands_everything(model, images, pixels):
    kept = np.ones(len(images), dtype=bool)
    for d, a in DIRECTIONS:
        kept &= said(model, moved(images, d * pixels, a * pixels)) == said(model, images)
    return kept.sum() / len(kept)


@variant("changed-not-kept")
def one_minus(model, images, pixels):
    return 1 - drawn_anew(model, images, pixels)


@variant("logits-compared")
def exactly_equal(model, images, pixels):
    still = model(images)
    same = [torch.eq(model(moved(images, d * pixels, a * pixels)), still) for d, a in DIRECTIONS]
    return torch.cat(same).double().mean().item()


@unknown
def against_the_previous(model, images, pixels):
    order = (DIRECTIONS[1], DIRECTIONS[0], DIRECTIONS[3], DIRECTIONS[2])  # up, down, left, right
    answers = [said(model, moved(images, d * pixels, a * pixels)) for d, a in order]
    return float(np.mean([(a == b).mean() for a, b in zip(answers, answers[1:], strict=False)]))


@unknown
def down_only(model, images, pixels):
    return mean_over([said(model, moved(images, pixels, 0))], said(model, images))


@unknown
def in_per_cent(model, images, pixels):
    return 100 * drawn_anew(model, images, pixels)


@unknown
def half_the_way(model, images, pixels):
    return drawn_anew(model, images, pixels + 1)


@unknown
def counted(model, images, pixels):
    return drawn_anew(model, images, pixels) * len(images)


@unknown
def a_tensor(model, images, pixels):
    return torch.tensor(drawn_anew(model, images, pixels))


@right
def drawn_anew(model, images, pixels):
    answers = [said(model, moved(images, d * pixels, a * pixels)) for d, a in DIRECTIONS]
    return mean_over(answers, said(model, images))


@right
def cut_from_a_larger_picture(model, images, pixels):
    (h, w), same = images.shape[-2:], []
    frame = F.pad(images, (pixels,) * 4)
    for top, left in ((0, pixels), (2 * pixels, pixels), (pixels, 0), (pixels, 2 * pixels)):
        same += (said(model, frame[..., top : top + h, left : left + w]) == said(model, images)).tolist()
    return sum(same) / len(same)
