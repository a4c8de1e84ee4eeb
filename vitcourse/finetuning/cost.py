"""What training a part of a model costs, and what freezing the rest saves: predicted by rules, and measured.

The rules: below the shallowest trained parameter nothing is computed backwards and nothing is kept. Above it the
gradient passes through every layer, be it frozen: each matrix product costs as much again for the gradient of its
input, and once more for that of its weight, if that is trained; for the latter its input is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .lora import LoRALinear
from .parts import free_names, parts_of


@dataclass(frozen=True)
class Layer:
    """A layer as it ran: shapes of what it was given and has returned.

    Attributes:
        held: bytes that keeping the former would hold: of all tokens, where it is a view of one of them.
    """

    name: str
    module: nn.Module
    given: torch.Size
    returned: torch.Size
    held: int

    @property
    def trains_weight(self) -> bool:
        weight = getattr(self.module, "weight", None)
        return isinstance(weight, nn.Parameter) and weight.requires_grad

    @property
    def trains_any(self) -> bool:
        return any(p.requires_grad for p in self.module.parameters())


def layers_in_order(model: nn.Module, images: Tensor) -> list[Layer]:
    """The layers without layers in them, in the order in which they run, each with its shapes."""
    found, hooks = [], []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            found.append(Layer(name, module, args[0].shape, output.shape, args[0].untyped_storage().nbytes()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) or not list(module.children()):
            hooks.append(module.register_forward_hook(note(name)))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _flowing(model: nn.Module, images: Tensor) -> Iterator[tuple[Layer, bool]]:
    """Each layer, and whether a gradient of its input is asked for: something before it is trained."""
    parts = parts_of(model)
    stem = next(iter(parts))
    # Tokens, positions and prompts are in no layer: they come in between the stem and the blocks.
    joined = any(
        "." not in name or name.startswith("prompts.")
        for name in free_names(model) & {*parts[stem], *parts.get("prompts", ())}
    )
    flows = False
    for layer in layers_in_order(model, images):
        flows = flows or (joined and f"{layer.name}.".partition(".")[0] not in ("patch_embed", "stem"))
        yield layer, flows
        flows = flows or layer.trains_any


def backward_flops(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Floating-point operations of the backward pass by the rules above, in matrix products and convolutions.

    Attention is counted as four products backwards for its two forwards, recomputation left out.

    Args:
        model: with its parameters frozen or not.
        images: a batch (B, C, H, W).

    Returns:
        FLOPs of each part (:func:`vitcourse.finetuning.parts_of`), two for each multiplication and addition.

    >>> from vitcourse import create_model
    >>> model = create_model("vit_tiny", img_size=32, patch_size=16, depth=2, num_classes=5)
    >>> _ = model.requires_grad_(False).head.requires_grad_(True)
    >>> backward_flops(model, torch.zeros(1, 3, 32, 32))
    {'patch_embed': 0, 'blocks.0': 0, 'blocks.1': 0, 'norm': 0, 'head': 1920}
    """
    counted = _forward_flops(model, images)
    costs = dict.fromkeys(parts_of(model), 0)
    for layer, flows in _flowing(model, images):
        part = next((p for p in costs if f"{layer.name}.".startswith(f"{p}.")), next(iter(costs)))
        costs[part] += _layer_backward(layer, flows, counted.get(layer.name, 0))
        if layer.name.endswith(".qkv") and (flows or layer.trains_any):
            mixer = layer.name.removesuffix(".qkv")
            inside = (n for name, n in counted.items() if name.rpartition(".")[0] == mixer)
            costs[part] += 2 * (counted.get(mixer, 0) - sum(inside))
    return costs


def _layer_backward(layer: Layer, flows: bool, forward: int) -> int:
    if not isinstance(layer.module, LoRALinear):
        return forward * (int(flows) + int(layer.trains_weight))
    tokens, module = prod(layer.given[:-1]), layer.module
    down = 2 * tokens * module.in_features * module.rank * len(module.slices)
    up = 2 * tokens * module.rank * sum(stop - start for start, stop in module.slices.values())
    base = forward - down - up
    return int(flows) * (base + down) + down + 2 * up


def _forward_flops(model: nn.Module, images: Tensor) -> dict[str, int]:
    """FLOPs of each module, by its name; attention as plain products, which all devices count alike."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(images)
    root = type(model).__name__
    return {
        name.removeprefix(f"{root}."): sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
        if name not in ("Global", root)
    }


def saved_bytes(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Bytes of activations that a plain ViT keeps for the backward pass by the rules above, for each part.

    A block of width D keeps, for each token, 16 D numbers if all of it is trained, 10 D if a gradient only passes
    through it (what norms, attention and GELU need), and none below the shallowest trained parameter; statistics of
    norms and of attention are added to that. On a CPU this is exact; kernels of GPUs may pad their statistics.

    Args:
        model: a ViT of ours or of timm's, with fused attention, and with its parameters frozen or not.
        images: a batch (B, C, H, W), as the model takes it.

    Raises:
        ValueError: a layer of another kind than a plain ViT has; :func:`measure_backward` measures every model.

    >>> from vitcourse import create_model
    >>> model = create_model("vit_tiny", img_size=32, patch_size=16, depth=2, num_classes=5)
    >>> _ = model.requires_grad_(False).blocks[1].requires_grad_(True)
    >>> saved_bytes(model, torch.zeros(1, 3, 32, 32))
    {'patch_embed': 0, 'blocks.0': 0, 'blocks.1': 61580, 'norm': 3880, 'head': 0}
    """
    costs = dict.fromkeys(parts_of(model), 0)
    size = images.element_size()
    for layer, flows in _flowing(model, images):
        part = next((p for p in costs if f"{layer.name}.".startswith(f"{p}.")), next(iter(costs)))
        costs[part] += _layer_saves(layer, flows, size)
        if layer.name.endswith(".qkv") and (flows or layer.trains_any):
            heads = model.get_submodule(layer.name.removesuffix(".qkv")).num_heads
            # q, k and v, the output, and for each row of scores the logarithm of its sum, in float32
            costs[part] += prod(layer.returned) * size * 4 // 3 + prod(layer.returned[:-1]) * heads * 4
    return costs


def _layer_saves(layer: Layer, flows: bool, size: int) -> int:
    module, given = layer.module, prod(layer.given) * size
    if isinstance(module, nn.LayerNorm):
        rows = prod(layer.given) // prod(module.normalized_shape)
        return (given + 2 * rows * 4) * (flows or layer.trains_any)
    if isinstance(module, nn.GELU):
        return given * flows
    if isinstance(module, nn.Conv2d):
        return given * (flows or layer.trains_any)  # PyTorch keeps it whatever is asked for
    if type(module) is nn.Linear:
        shared = layer.name.endswith(".attn.proj") and flows  # the output of attention is kept already
        return layer.held * (layer.trains_weight and not shared)
    if isinstance(module, LoRALinear):  # x for A, and A x for B
        return given + prod(layer.given[:-1]) * size * module.rank * len(module.slices)
    if isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not (module.training and module.p)):
        return 0
    raise ValueError(f"{layer.name} is a {type(module).__name__}, for which there is no rule; use measure_backward")


def measure_backward(model: nn.Module, images: Tensor) -> dict[str, int]:
    """What a forward and a backward pass do: ``{"forward_flops", "backward_flops", "saved_bytes"}``.

    FLOPs by PyTorch's counter, attention as plain products; bytes of all that autograd keeps for the backward pass,
    parameters left out, and what is kept twice counted once.

    Raises:
        ValueError: nothing is trained.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}  # an address that every device has
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing of the model is trained, so nothing is computed backwards; thaw a part")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(images).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    del output
    model.zero_grad(set_to_none=True)
    return {
        "forward_flops": forward.get_total_flops(),
        "backward_flops": backward.get_total_flops(),
        "saved_bytes": sum(kept.values()),
    }
