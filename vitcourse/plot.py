"""Figures of the lessons: one style, and the few plots that more than one lesson draws."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Okabe and Ito's palette (2008): told apart by colour-blind readers, and in print.
BLUE, ORANGE, GREEN, RED, SKY, PURPLE, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#000000",
)
COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE, BLACK)


# The look of every figure in the course: small files, readable labels, colours for everybody.
STYLE = {
    "figure.dpi": 80,
    "savefig.dpi": 80,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "image.cmap": "viridis",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}


def use_style() -> None:
    """Draw every figure from now on in the style of the course."""
    plt.rcParams.update(STYLE)


def styled() -> AbstractContextManager[None]:
    """The style of the course for a while; what a program has set is then as it was."""
    return plt.rc_context(STYLE)


def panels(rows: int = 1, columns: int = 1, *, width: float = 3.0, height: float = 3.0) -> tuple[Figure, np.ndarray]:
    """A figure of ``rows`` × ``columns`` axes, each ``width`` × ``height`` inches; the axes come as a flat array."""
    figure, axes = plt.subplots(rows, columns, figsize=(columns * width, rows * height), squeeze=False)
    return figure, axes.ravel()


def show_image(ax: Axes, image: Tensor, title: str = "", **options: Any) -> None:
    """Draw an image (C, H, W) or a map (H, W) without axes.

    Integers are taken as 0…255; floating-point images of three channels are clipped to [0, 1]; one channel is grey.
    """
    image = torch.as_tensor(image).detach().cpu()
    if image.ndim == 3 and image.shape[0] == 1:
        image, options = image[0], {"cmap": "gray", **options}
    if image.ndim == 3:
        image = image.permute(1, 2, 0)
        image = image.float().clamp(0, 1) if image.is_floating_point() else image
    ax.imshow((image.float() if image.dtype == torch.bfloat16 else image).numpy(), **options)
    ax.set_axis_off()
    ax.set_title(title)


def draw_grid(ax: Axes, size: tuple[int, int], patch: int, colour: str = "white") -> None:
    """Lines between the patches of an image of ``size`` (height, width) pixels."""
    for y in range(patch, size[0], patch):
        ax.axhline(y - 0.5, color=colour, linewidth=0.8)
    for x in range(patch, size[1], patch):
        ax.axvline(x - 0.5, color=colour, linewidth=0.8)


def show_attention(ax: Axes, image: Tensor, weights: Tensor) -> None:
    """Lay attention weights (h, w) over an image (C, H, W): the brighter, the more."""
    show_image(ax, image)
    weights = weights.detach().cpu()
    extent = (-0.5, image.shape[-1] - 0.5, image.shape[-2] - 0.5, -0.5)
    ax.imshow(weights, cmap="inferno", extent=extent, alpha=0.3 + 0.6 * weights / weights.max())


def spread(ax: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], label: str = "", **options: Any) -> None:
    """The mean over seeds with the range from the lowest to the highest; ``runs`` is one list of seeds for each x."""
    mean = [float(np.mean(r)) for r in runs]
    (line,) = ax.plot(x, mean, marker="o", label=label, **options)
    ax.fill_between(x, [min(r) for r in runs], [max(r) for r in runs], color=line.get_color(), alpha=0.2, linewidth=0)


def bars(ax: Axes, runs: Mapping[str, Sequence[float]], *, unit: str = "", digits: int = 1) -> None:
    """Horizontal bars of the mean over seeds, each seed a dot, with the mean written beside it."""
    for i, (values, colour) in enumerate(zip(runs.values(), COLOURS * len(runs), strict=False)):
        ax.barh(i, np.mean(values), color=colour, alpha=0.75)
        ax.plot(values, [i] * len(values), "o", color=BLACK, markersize=4)
        ax.annotate(
            f"{np.mean(values):.{digits}f}{unit}",
            (max(values), i),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
        )
    ax.set_yticks(range(len(runs)), list(runs))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def curves(
    ax: Axes, histories: Mapping[str, Sequence[Mapping[str, Any]]], key: str, ylabel: str, x: str = "epoch"
) -> None:
    """One line a training run: column ``key`` of its history, where it was measured, over ``x``, "epoch" or "step"."""
    for label, history in histories.items():
        rows = [row for row in history if row[key] is not None]
        ax.plot([row[x] for row in rows], [row[key] for row in rows], marker="o", label=label)
    ax.set_xlabel(x)
    ax.set_ylabel(ylabel)
    ax.legend()
