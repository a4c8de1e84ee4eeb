"""Answers to `hardware.smoothing_factors`."""

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hardware.smoothing_factors")


def in_logs(x_share, w_share, peak=lambda weight: weight.abs().max(0).values, guard=True):
    """exp(share · log max|X| − share · log max|W|), channel by channel."""

    def answer(largest, weight, alpha):
        peaks = peak(weight)
        s = torch.exp(x_share(alpha) * largest.log() + w_share(alpha) * peaks.log())
        if guard:
            s[(largest == 0) | (weight.abs().sum(0) == 0)] = 1.0
        return s

    return answer


def share(alpha):
    return alpha


def rest(alpha):
    return -(1 - alpha)


variant("exponents-exchanged")(in_logs(lambda a: 1 - a, lambda a: -a))
variant("inverted")(in_logs(lambda a: -a, lambda a: 1 - a))
variant("multiplied")(in_logs(share, lambda a: 1 - a))
variant("weights-ignored")(in_logs(share, lambda a: 0.0, peak=lambda weight: torch.ones(weight.shape[1])))
variant("mean-weight")(in_logs(share, rest, peak=lambda weight: weight.norm(p=1, dim=0) / len(weight)))
variant("signed-weight")(in_logs(share, rest, peak=lambda weight: weight.max(0).values))
variant("dead-channels")(in_logs(share, rest, guard=False))
right(in_logs(share, rest))


@variant("of-the-outputs")
def rows_of_the_weight(largest, weight, alpha):
    return largest.pow(alpha) * weight.norm(p=float("inf"), dim=1).pow(alpha - 1)


@unknown
def always_half(largest, weight, alpha):
    return in_logs(share, rest)(largest, weight, 0.5)


@unknown
def one_factor_for_all(largest, weight, alpha):
    s = largest.max() ** alpha / weight.abs().max() ** (1 - alpha)
    return s.expand_as(largest).contiguous()


@unknown
def smoothed_already(largest, weight, alpha):
    return weight * in_logs(share, rest)(largest, weight, alpha)


unknown(in_logs(share, rest, peak=lambda weight: weight.norm(dim=0)))


@right
def channel_by_channel(largest, weight, alpha):
    factors = []
    for x, column in zip(largest.tolist(), weight.T.tolist(), strict=True):
        w = max(map(abs, column))
        factors.append(x**alpha / w ** (1 - alpha) if x and w else 1.0)
    return torch.tensor(factors)
