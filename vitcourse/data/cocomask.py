"""COCO's two ways of writing a mask, run lengths and polygons, to the pixels that its own tools make of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_STEPS = 5  # cocoapi draws a polygon's edges on a grid this much finer


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO ``segmentation`` as (height, width), uint8, 0 or 1.

    Args:
        segmentation: a list of polygons ``[x0, y0, x1, y1, …]``, whose union it is, or run lengths: ``{"size":
            [height, width], "counts": …}`` with a list of integers, or the compressed string of cocoapi.

    Raises ValueError, saying what is wrong, for one that is neither, or of another size.

    >>> decode_mask({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3).tolist()
    [[0, 1, 0], [1, 0, 0]]
    """
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", [])) != [height, width]:
            raise ValueError(f"its mask has size {segmentation.get('size')}, the image [{height}, {width}]")
        counts = segmentation.get("counts")
        runs = _decompress(counts) if isinstance(counts, (str, bytes)) else counts
        return _from_runs(runs, height, width)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
        raise ValueError(f"its segmentation is of type {type(segmentation).__name__}, not polygons or run lengths")
    mask = np.zeros((height, width), dtype=np.uint8)
    for polygon in segmentation:
        mask |= _from_polygon(polygon, height, width)
    return mask


def encode_mask(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask (height, width) as COCO's uncompressed run lengths.

    >>> encode_mask(np.array([[0, 1], [0, 1], [1, 1]]))
    {'size': [3, 2], 'counts': [2, 4]}
    """
    flat = np.asarray(mask, dtype=bool).flatten(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, flat.size]).tolist()}


def _from_runs(runs: Any, height: int, width: int) -> np.ndarray:
    """Run lengths count down the columns, pixels outside first."""
    try:
        lengths = np.asarray(runs, dtype=np.int64).reshape(-1)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("its run lengths are no integers") from error
    if (lengths < 0).any() or (lengths > height * width).any() or lengths.sum() != height * width:
        raise ValueError(f"its run lengths come to {lengths.sum()} pixels, the image has {height * width}")
    flat = np.repeat(np.arange(len(lengths)) % 2, lengths).astype(np.uint8)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def _decompress(text: str | bytes) -> list[int]:
    """cocoapi's rleFrString: five bits a character, from ASCII 48; the fourth run and later are differences."""
    codes = text.encode("ascii", "replace") if isinstance(text, str) else text
    runs: list[int] = []
    value = shift = 0
    for code in codes:
        bits = code - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"its compressed run lengths hold {chr(code)!r}, which means nothing there")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("its compressed run lengths end in the middle of a number")
    return runs


def _from_polygon(polygon: Any, height: int, width: int) -> np.ndarray:
    """cocoapi's rleFrPoly: edges on a finer grid; where they cross the columns of pixels, run lengths begin."""
    try:
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise ValueError("a polygon of it is no list of x, y, x, y, …") from error
    if len(points) < 3 or not np.isfinite(points).all():
        raise ValueError(f"a polygon of it has {len(points)} points; it takes 3, of finite numbers")
    if (np.abs(points) > 2 * max(height, width)).any():  # whose edges would fill the memory
        raise ValueError("a polygon of it reaches far out of the image")
    u, v = _boundary(np.trunc(_STEPS * points + 0.5).astype(np.int64))
    crossing = np.flatnonzero(u[1:] != u[:-1]) + 1
    x = (np.minimum(u[crossing], u[crossing - 1]) + 0.5) / _STEPS - 0.5
    in_column = (np.floor(x) == x) & (x >= 0) & (x <= width - 1)
    y = (np.minimum(v[crossing], v[crossing - 1]) + 0.5) / _STEPS - 0.5
    y = np.ceil(np.clip(y, 0, height))
    starts = np.sort((x[in_column] * height + y[in_column]).astype(np.int64))
    return _from_runs(np.diff(starts, prepend=0, append=height * width), height, width)


def _boundary(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points along the edges of a closed polygon (k, 2), both ends of each among them, in cocoapi's rounding."""
    start, end = grid, np.roll(grid, -1, axis=0)
    across, down = np.abs(end - start).T
    flat = across >= down
    flipped = np.where(flat, start[:, 0] > end[:, 0], start[:, 1] > end[:, 1])
    start, end = (np.where(flipped[:, None], a, b) for a, b in ((end, start), (start, end)))
    length = np.maximum(across, down)
    rise = np.where(flat, end[:, 1] - start[:, 1], end[:, 0] - start[:, 0]) / np.maximum(length, 1)
    edge = np.repeat(np.arange(len(grid)), length + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
    step = np.where(flipped[edge], length[edge] - step, step)
    x0, y0, flat, rise = start[edge, 0], start[edge, 1], flat[edge], rise[edge] * step
    u = np.where(flat, x0 + step, np.trunc(x0 + rise + 0.5).astype(np.int64))
    v = np.where(flat, np.trunc(y0 + rise + 0.5).astype(np.int64), y0 + step)
    return u, v
