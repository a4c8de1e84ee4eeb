"""What a model's linear layers are fed, watched on a few batches: observers, and the walk through the model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitcourse.devices import widest_float
from vitcourse.inference import evaluating

from .integers import scale_for


class Observer(Protocol):
    """Sees activations batch by batch, and then says by which scale to quantize them; a ValueError if it saw none."""

    def observe(self, x: Tensor) -> None: ...

    def scale(self) -> Tensor: ...


class MinMaxObserver:
    """Cover everything that was seen: the scale is that of the largest magnitude.

    >>> observer = MinMaxObserver()
    >>> observer.observe(torch.tensor([-255.0, 3.0]))
    >>> observer.scale()
    tensor(2.)
    """

    def __init__(self) -> None:
        self.largest: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        largest = x.detach().abs().amax().float()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def scale(self) -> Tensor:
        if self.largest is None:
            raise ValueError("nothing was observed yet, so there is no scale; call observe(x) first")
        return scale_for(self.largest)


class PercentileObserver:
    """Clip the outermost magnitudes, so that the others get finer steps.

    Magnitudes are counted in bins that are 2^(1/64) wide, over all of float32's range: the order of the batches and
    their size do not matter, and what is covered is the percentile rounded up, by 1.1 % at most.

    Args:
        percentile: how many of a hundred magnitudes are covered, 0 < percentile ≤ 100.

    Raises:
        ValueError: another percentile; in ``observe``, NaN, which has no place among the magnitudes.
    """

    BINS_PER_OCTAVE = 64
    OCTAVES = (-126, 128)

    def __init__(self, percentile: float = 99.99) -> None:
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile {percentile} is outside (0, 100]")
        self.percentile = percentile
        self.counts: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        if x.isnan().any():
            raise ValueError(f"x of shape {tuple(x.shape)} holds NaN, which has no magnitude to count; check the data")
        first, last = (octave * self.BINS_PER_OCTAVE for octave in self.OCTAVES)
        magnitudes = x.detach().abs().to(widest_float(x.device))
        bins = (magnitudes.log2() * self.BINS_PER_OCTAVE).ceil().clamp(first, last) - first
        counts = torch.bincount(bins.flatten().long(), minlength=last - first + 1)
        self.counts = counts if self.counts is None else self.counts + counts

    def scale(self) -> Tensor:
        if self.counts is None:
            raise ValueError("nothing was observed yet, so there is no scale; call observe(x) first")
        seen = self.counts.cpu().cumsum(0)
        wanted = seen[-1].double() * self.percentile / 100
        upper_edge = torch.searchsorted(seen.double(), wanted) / self.BINS_PER_OCTAVE + self.OCTAVES[0]
        return scale_for(2 ** upper_edge.double())


OBSERVERS: dict[str, Callable[[], Observer]] = {"minmax": MinMaxObserver, "percentile": PercentileObserver}


def watch_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable, see: Callable[[str, Tensor], None]
) -> list[str]:
    """Run ``model`` in evaluation mode over ``batches`` and call ``see(name, input)`` whenever one of ``modules`` runs.

    Args:
        model: takes one batch of images.
        modules: by the name that ``see`` is told.
        batches: tensors as the model takes them, or (images, labels) pairs as a DataLoader gives them.

    Returns:
        names of the modules that never ran.

    Raises:
        ValueError: no batch at all or an empty one, no module that ran, activations that are NaN or infinite, or a
            model on the meta device, which holds no numbers.
        TypeError: ``batches`` is one tensor, whose first dimension would be taken for a list of batches, or a batch is
            something else than images.
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches is a single tensor; put it into a list: [images]")
    device, ran, batch = next(model.parameters(), torch.empty(0)).device, set(), None
    if device.type == "meta":
        raise ValueError("the model is on the meta device, without weights to calibrate by; load them first")

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def look(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else named["input"]
            if not x.isfinite().all():
                raise ValueError(f"the input of {name!r} holds NaN or infinity on a calibration batch; check the data")
            ran.add(name)
            see(name, x)

        return look

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with evaluating(model), torch.inference_mode():
            for batch in batches:
                model(_images(batch).to(device))
    finally:
        for handle in handles:
            handle.remove()
    missed = sorted(modules.keys() - ran)
    if modules and not ran:
        cause = f"these never ran: {', '.join(missed[:4])}" if batch is not None else "batches is empty"
        raise ValueError(f"nothing to calibrate by: {cause}; give batches of images that pass through the layers")
    return missed


def _images(batch: Any) -> Tensor:
    """Those of a batch, or of a pair with labels."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise TypeError(f"a batch is {type(batch).__name__}; batches must hold images, or (images, labels) pairs")
    if not images.numel():
        raise ValueError(f"a batch of shape {tuple(images.shape)} holds no images; leave it out of batches")
    return images
