"""What can be pruned, heads and hidden channels, and what each of them costs."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitcourse.inference import evaluating
from vitcourse.layers import Mlp

Structure = dict[str, int]  # heads, or hidden channels, of each layer that has some, by the layer's name


def structure(model: nn.Module) -> Structure:
    """Heads of each attention and hidden channels of each :class:`vitcourse.layers.Mlp`, by the layer's name.

    What an attention must be like is said at :class:`vitcourse.vit.Attention`; Swin's, CoAtNet's and the mixers of
    :mod:`vitcourse.efficient_attention` are. It is all that :func:`prune_like` needs to build a pruned model again.

    >>> from vitcourse import create_model
    >>> structure(create_model("vit_tiny", img_size=32, patch_size=16, depth=1))
    {'blocks.0.attn': 3, 'blocks.0.mlp': 768}
    """
    return {name: units_of(layer) for name, layer in prunable(model).items()}


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    found = {name: layer for name, layer in model.named_modules() if type(layer) is Mlp or _can_lose_heads(layer)}
    if not found:
        raise ValueError(f"{type(model).__name__} has nothing to prune: no attention with head_axes, and no layers.Mlp")
    for name, layer in found.items():
        for part in ("fc1", "fc2") if type(layer) is Mlp else ("qkv", "proj"):
            if type(getattr(layer, part)) is not nn.Linear:
                kind = type(getattr(layer, part)).__name__
                raise ValueError(f"{name}.{part} is a {kind}, not nn.Linear; prune first, then quantize or adapt")
    return found


def _can_lose_heads(layer: nn.Module) -> bool:
    """Whether the layer says of each of its parameters where the heads are."""
    axes = getattr(layer, "head_axes", None)
    if axes is None:
        return False
    known = ("qkv", "proj", *axes)
    return all(any(within(name, part) for part in known) for name, _ in layer.named_parameters())


def within(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.")


def units_of(layer: nn.Module) -> int:
    return layer.fc1.out_features if type(layer) is Mlp else layer.num_heads


def outlet(layer: nn.Module) -> nn.Linear:
    """The linear layer that adds up what the heads, or the hidden channels, have found."""
    return layer.fc2 if type(layer) is Mlp else layer.proj


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply–adds of one forward pass, as ``torch.utils.flop_counter`` counts them: products only, no norms.

    >>> count_macs(nn.Linear(8, 4), torch.zeros(1, 8))
    32
    """
    return counted(model, images).get_total_flops() // 2


def counted(model: nn.Module, images: Tensor) -> FlopCounterMode:
    mixers = [(m, m.backend) for m in model.modules() if isinstance(getattr(m, "backend", None), str)]
    try:
        for mixer, _ in mixers:
            mixer.backend = "math"  # whose products every counter knows; PyTorch 2.11's knows no fused kernel of a CPU
        with evaluating(model), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
    finally:
        for mixer, backend in mixers:
            mixer.backend = backend
    return counter


def macs_per_unit(model: nn.Module, images: Tensor) -> tuple[dict[str, float], int]:
    """MACs of one head, or channel, of each layer, which are the same for each of them, and of the whole model."""
    counter, costs = counted(model, images), {}
    counts = counter.get_flop_counts()

    def macs(name: str) -> float:
        return sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) / 2

    for name, layer in prunable(model).items():
        aliases = [n for n, module in model.named_modules(remove_duplicate=False) if module is layer]  # counted by any
        shared = [part for part, axis in getattr(layer, "head_axes", {}).items() if axis is None]
        costs[name] = sum(macs(n) - sum(macs(f"{n}.{part}") for part in shared) for n in aliases) / units_of(layer)
        if not costs[name]:
            raise ValueError(f"{name} did not run on the calibration images, so what it costs is unknown")
    return costs, counter.get_total_flops() // 2
