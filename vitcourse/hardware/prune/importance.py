"""How much a head or a channel matters: the change of the loss without it, to first order."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitcourse.inference import evaluating, find_mean_std, normalise

from .units import outlet, prunable, units_of

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), as the model takes them, and labels (B,)
Loss = Callable[[Tensor, Tensor], Tensor]  # logits and labels to their mean loss
NO_IMAGES = "calibration holds no images; give batches (images, labels) or a data set"


@torch.inference_mode(False)
def taylor_importance(
    model: nn.Module, calibration: Dataset | Iterable[Batch], *, loss_fn: Loss = F.cross_entropy
) -> dict[str, Tensor]:
    """How much the loss would change without each head and each hidden channel, to first order, mean over images.

    A gate ξ = 1 on each unit's output would have the gradient ∂L/∂ξ = Σ a · ∂L/∂a over the unit's activations a; its
    absolute value is the change of an image's loss when the gate is closed (Michel et al. 2019, eq. 2, for heads;
    Molchanov et al. 2019, sec. 3.1, for channels). One forward and one backward pass give it for all units at once.

    Args:
        model: gives logits (B, num_classes); it runs in evaluation mode, and its weights' gradients stay as they are.
        calibration: batches (images, labels), ready for the model, or a data set, whose uint8 images are normalised by
            ``model.preprocess`` or the data set's mean and std.
        loss_fn: mean loss over a batch.

    Returns:
        for each layer of :func:`structure` one number ≥ 0 a head, or a channel, on the CPU.

    Raises:
        ValueError: nothing to prune; no images; a score that is NaN or infinite.
        TypeError: calibration that is not batches (images, labels).
    """
    layers = prunable(model)
    totals = {name: torch.zeros(units_of(layer), dtype=torch.float64) for name, layer in layers.items()}
    runs: list[tuple[str, Tensor]] = []  # what entered the outlet of which layer, in the order of the forward pass

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            # Below the first trainable weight there is no graph to differentiate; start one.
            runs.append((name, inputs[0] if inputs[0].requires_grad else inputs[0].requires_grad_()))

        return hook

    hooks = [outlet(layer).register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    seen = 0
    try:
        with evaluating(model):
            for images, labels in batches(model, calibration):
                runs.clear()
                with torch.enable_grad():
                    loss = loss_fn(model(images), labels) * len(images)  # the sum, so each image's gradient is its own
                    found = list(runs)  # the backward pass runs checkpointed blocks again
                    gradients = torch.autograd.grad(loss, [x for _, x in found])
                for name, effect in _effects(found, gradients, layers).items():
                    totals[name] += len(images) * effect.abs().mean(0).cpu()
                seen += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(NO_IMAGES)
    for name, total in totals.items():
        if not total.isfinite().all():
            raise ValueError(
                f"the importance of {name} is not finite; look for NaN and infinity in calibration, weights and loss"
            )
    return {name: total / seen for name, total in totals.items()}


def _effects(
    runs: list[tuple[str, Tensor]], gradients: Sequence[Tensor], layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """∂L/∂ξ for each image and unit (B, units) of every layer: one gate for all runs of a layer, so they add up."""
    effects: dict[str, Tensor] = {}
    for (name, x), gradient in zip(runs, gradients, strict=True):
        effects[name] = effects.get(name, 0) + _effect(x.detach(), gradient, units_of(layers[name]))
    return effects


def taylor_score(x: Tensor, gradient: Tensor, units: int) -> Tensor:
    """|Σ x · ∂L/∂x| over tokens and over each unit's stretch of the last axis, mean over images.

    Args:
        x: activations (B, …, units · width), a unit's values side by side.
        gradient: of the loss summed over images, with regard to x.
        units: heads, or channels, that the last axis holds.

    Returns:
        (units,).

    >>> taylor_score(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[1.0, -1.0, 0.0, 2.0]]]), units=2)
    tensor([1., 8.])
    """
    return _effect(x, gradient, units).abs().mean(0)


def _effect(x: Tensor, gradient: Tensor, units: int) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    effect = (x.to(exact) * gradient.to(exact)).reshape(len(x), -1, units, x.shape[-1] // units)
    return effect.sum((1, 3))


def batches(model: nn.Module, calibration: Dataset | Iterable[Batch]) -> Iterator[Batch]:
    device = next(model.parameters()).device
    mean_std = None
    if isinstance(calibration, Dataset):
        mean_std = find_mean_std(model, calibration, device)
        calibration = DataLoader(calibration, batch_size=128)
    if not isinstance(calibration, Iterable) or isinstance(calibration, Tensor):
        raise TypeError(f"calibration is a {type(calibration).__name__}; give batches (images, labels) or a data set")
    for batch in calibration:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"calibration gave a batch of type {type(batch).__name__}; it must be (images, labels)")
        images, labels = (t.clone() if t.is_inference() else t for t in batch)
        yield normalise(images.to(device), mean_std), labels.to(device)
