"""What a check tries an answer on: calls with fresh inputs, and properties that must hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Random:
    """Fresh inputs from one seed, without touching PyTorch's global generator.

    Floats are float64 unless told otherwise: rounding then stays far below any real mistake, and the comparison with
    the reference can be tight.

    >>> rng = Random(0)
    >>> rng.normal(2, 3).dtype, rng.integers(0, 10, (4,)).shape
    (torch.float64, torch.Size([4]))
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Uniform numbers in [low, high): probabilities, or an image in [0, 1)."""
        unit = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * unit).to(dtype)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        """int64 numbers in [low, high): labels, indices."""
        return torch.randint(low, high, tuple(shape), generator=self.generator)

    def integer(self, low: int, high: int) -> int:
        """One Python int in [low, high)."""
        return int(self.integers(low, high, ()))

    def choice(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return options[self.integer(0, len(options))]

    def strided(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Normal numbers that are not contiguous in memory, on which a careless ``view`` fails."""
        return self.normal(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., :-1]


@dataclass(frozen=True)
class Case:
    """One call that the answer and the reference both make; see `call` and `build`."""

    args: tuple
    kwargs: dict[str, Any]
    init: tuple[tuple, dict[str, Any]] | None = None  # constructor arguments, where the answer is a class
    method: str = "__call__"
    training: bool = False
    label: str = ""
    earlier: tuple["Case", ...] = ()  # calls of the same instance that come before, while its weights are still others

    def on(self, label: str) -> "Case":
        """Name what is special about this case; a learner reads ``(on a non-square image)``."""
        return replace(self, label=f"on {label}")


@dataclass(frozen=True)
class Property:
    """Something that must be true of every right answer; see `holds`."""

    text: str
    predicate: Callable[[Any], bool]
    points_to: str | None = None

    label = ""


def call(*args: Any, **kwargs: Any) -> Case:
    """Call the answer, a function, with these arguments.

    >>> call(torch.zeros(2, 3), 4).on("a tiny image").label
    'on a tiny image'
    """
    return Case(args, kwargs)


@dataclass(frozen=True)
class _Built:
    init: tuple[tuple, dict[str, Any]]
    training: bool = False

    def train(self) -> "_Built":
        """Leave the module in training mode; it is put in evaluation mode otherwise."""
        return replace(self, training=True)

    def call(self, *args: Any, **kwargs: Any) -> Case:
        """Call the module."""
        return Case(args, kwargs, self.init, training=self.training)

    def method(self, name: str, *args: Any, **kwargs: Any) -> Case:
        """Call one of its methods by name."""
        return Case(args, kwargs, self.init, method=name, training=self.training)


def build(*args: Any, **kwargs: Any) -> _Built:
    """Construct the answer, a class, with these arguments; then ``.call(x)`` or ``.method("name", x)``.

    The learned parameters of a module are filled with the reference's, by name, every one of them random.

    >>> build(dim=8, num_heads=2).call(torch.zeros(1, 5, 8)).init
    ((), {'dim': 8, 'num_heads': 2})
    """
    return _Built((args, kwargs))


def holds(text: str, predicate: Callable[[Any], bool], *, points_to: str | None = None) -> Property:
    """Require ``predicate(answer)``, for what no comparison with the reference can tell (anything random, say).

    `text` is what a learner reads when it is false. `points_to` names the catalogued mistake that this proves, if any.
    """
    return Property(text, predicate, points_to)
