"""Tables as tensors: made once for each size and device, and found again by all layers and by compiled graphs.

:mod:`.layouts` says what is in them, in NumPy, and need not know who asks: a model as it is, one that is traced by
``torch.compile`` or ``torch.export``, or one of stand-ins for tensors.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from operator import index
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

PARTS = 4  # tables of a layout: queries, keys, hidden and home
LIMIT = 128 * PARTS  # tables that are kept, for eager models and for graphs; a model has one layout a grid, or a layer

Build = Callable[..., tuple[np.ndarray, ...]]
_BUILDS: dict[str, Build] = {}  # by name: what a tracer takes for a constant must not be made of functions
_OF_GRAPHS = SimpleNamespace()  # where compiled graphs find theirs, the one that was asked for last at the end


def concrete(sizes: Iterable[int]) -> tuple[int, ...]:
    """Sizes as ints. Where they are symbols, a graph is for these sizes, like its tables.

    Raises:
        ValueError: an export for images of any size.
    """
    if torch.compiler.is_exporting() and any(isinstance(n, torch.SymInt) for n in sizes):
        raise ValueError(
            "sparse attention looks up who sees whom in tables that are made for one grid, and cannot be exported for "
            "images of any size; leave height and width out of dynamic_shapes"
        )
    return tuple(index(n) for n in sizes)


def shared(build: Build) -> Callable[..., list[Tensor]]:
    """Make of ``build(*sizes)``, which returns arrays, a function of a device and sizes, which returns tensors.

    They are the same tensors each time, as long as no more than ``LIMIT`` others were asked for since.
    """
    _BUILDS[build.__name__] = lru_cache(maxsize=LIMIT // PARTS)(build)
    name = build.__name__

    @wraps(build)
    def on_device(device: torch.device | None, *sizes: object) -> list[Tensor]:
        if torch.compiler.is_dynamo_compiling():
            key = _kept(name, device, *sizes)
            return [getattr(_OF_GRAPHS, f"{key} {part}") for part in range(PARTS)]
        # A tracer's stand-in for a tensor must not be kept: real inputs come later.
        make = _remembered if type(torch.empty(0)) is Tensor else _make
        return [make(part, name, device, *sizes) for part in range(PARTS)]

    return on_device


def _make(part: int, name: str, device: torch.device | None, *sizes: object) -> Tensor:
    with torch.inference_mode(False):  # training may want the same table later
        return torch.tensor(_BUILDS[name](*sizes)[part], device=device)


_remembered = lru_cache(maxsize=LIMIT)(_make)


@torch.compiler.assume_constant_result
def _kept(name: str, device: torch.device | None, *sizes: object) -> str:
    """Make the tables while a graph is traced, and say under which name it will find them.

    They could be constants of the graph, but PyTorch 2.11 lets a graph have only one from each function. A graph whose
    tables had to make room is traced anew when it is next called: PyTorch looks whether they are still there.
    """
    key, tables = f"{name} {sizes} {device}", vars(_OF_GRAPHS)
    for part in range(PARTS):
        tables.pop(f"{key} {part}", None)
        setattr(_OF_GRAPHS, f"{key} {part}", _remembered(part, name, device, *sizes))
    for oldest in list(tables)[:-LIMIT]:
        delattr(_OF_GRAPHS, oldest)
    return key
