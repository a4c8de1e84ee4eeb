"""Answers to `vit.learning_rate`."""

import math

import numpy as np
import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("vit.learning_rate")


def cosine_fall(high, low, t):
    return low + (high - low) * math.cos(math.pi * t / 2) ** 2


@variant("zero-first-step")
def fraction_of_the_warm_up(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return step / warm * config.lr
    return cosine_fall(config.lr, config.min_lr, (step - warm) / (total_steps - warm - 1))


@variant("no-warm-up")
def cosine_alone(step, total_steps, config):
    return cosine_fall(config.lr, config.min_lr, step / (total_steps - 1))


@variant("cosine-from-zero")
def warm_up_pasted_over_the_cosine(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    rates = [cosine_fall(config.lr, config.min_lr, i / (total_steps - 1)) for i in range(total_steps)]
    rates[:warm] = [config.lr * i / (warm + 1) for i in range(1, warm + 1)]
    return rates[step]


@variant("no-floor")
def half_a_cosine_to_zero(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr / (warm + 1) * (step + 1)
    return cosine_fall(config.lr, 0, (step - warm) / (total_steps - warm - 1))


@variant("full-period")
def a_whole_wave(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    middle, swing = (config.lr + config.min_lr) / 2, (config.lr - config.min_lr) / 2
    return middle + swing * math.cos(math.tau * (step - warm) / (total_steps - warm - 1))


@variant("never-arrives")
def one_step_short(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    decay_steps = total_steps - warm
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return cosine_fall(config.lr, config.min_lr, (step - warm) / decay_steps)


@unknown
def straight_line_down(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr + (config.min_lr - config.lr) * (step - warm) / (total_steps - warm - 1)


@unknown
def warm_up_rounded_down(step, total_steps, config):
    warm = int(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return cosine_fall(config.lr, config.min_lr, (step - warm) / (total_steps - warm - 1))


@unknown
def warm_up_rounded_up(step, total_steps, config):
    warm = math.ceil(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return cosine_fall(config.lr, config.min_lr, (step - warm) / (total_steps - warm - 1))


@variant("peak-too-early")
def peak_within_the_warm_up(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    return cosine_fall(config.lr, config.min_lr, (step - warm) / (total_steps - warm - 1))


@unknown
def floor_added_on_top(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    t = (step - warm) / (total_steps - warm - 1)
    return config.min_lr + config.lr * (1 + math.cos(math.pi * t)) / 2


@unknown
def warm_up_from_the_floor(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.min_lr + (config.lr - config.min_lr) * (step + 1) / (warm + 1)
    return cosine_fall(config.lr, config.min_lr, (step - warm) / (total_steps - warm - 1))


@unknown
def no_floor_and_never_arrives(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return cosine_fall(config.lr, 0, (step - warm) / (total_steps - warm))


@unknown
def divided_by_a_warm_up_of_zero(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    ramp = config.lr * (step + 1) / (warm + 1) if step / warm < 1 else config.lr
    return ramp if step < warm else cosine_fall(ramp, config.min_lr, (step - warm) / (total_steps - warm - 1))


@right
def half_angles(step, total_steps, config):
    warm = round(total_steps * config.warmup)
    if step <= warm:  # at step = warm both formulas give lr
        return config.lr * (step + 1) / (warm + 1)
    left = (total_steps - 1 - step) / (total_steps - 1 - warm)
    return config.min_lr + (config.lr - config.min_lr) * math.sin(math.pi / 2 * left) ** 2


@right
def the_whole_schedule_in_numpy(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    rise = config.lr * np.arange(1, warm + 1) / (warm + 1)
    wave = np.cos(np.linspace(0, np.pi, total_steps - warm))
    return np.concatenate([rise, np.interp(wave, [-1, 1], [config.min_lr, config.lr])])[step]


@right
def two_factors(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    rise = min((step + 1) / (warm + 1), 1)
    t = max(step - warm, 0) / (total_steps - 1 - warm)
    fall = 0.5 * (1 + torch.cos(torch.tensor(math.pi * t, dtype=torch.float64)).item())
    return rise * (config.min_lr * (1 - fall) + config.lr * fall)


@unknown
def straight_down(step, total_steps, config):
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr + (config.min_lr - config.lr) * (step - warm) / (total_steps - 1 - warm)
