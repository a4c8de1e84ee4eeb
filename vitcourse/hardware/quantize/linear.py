"""Linear layers that keep integers. Each takes the place of an ``nn.Linear``: (…, in_features) -> (…, out_features).

What they keep is named as in the compressed-tensors format: ``weight`` or ``weight_packed``, ``weight_scale``,
``input_scale``. Scales stay in float32, whatever the model is cast to.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from .integers import dequantize, pack_int4, quantize, round_to
from .ops import dequantize_int4, quantize_per_token, w4a16_linear, w8a8_linear, w8a16_linear


class QuantizedLinear(nn.Module):
    """What the layers below have in common; ``compute`` is the product of a matrix (M, in_features)."""

    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, name: str, scale: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if not scale.isfinite().all():
            raise ValueError(
                f"weights of {name!r} hold NaN or infinity, which have no integers; train it again with a smaller "
                "learning rate, or leave the layer out by skip="
            )
        self.register_buffer("weight_scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def dequantize(self) -> Tensor:
        """The weights that the integers stand for: (out_features, in_features) float32."""
        raise NotImplementedError

    def compute(self, x: Tensor) -> Tensor:
        """(M, in_features) -> (M, out_features)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise ValueError(
                f"x must be floating point (…, {self.in_features}), got {x.dtype} of shape {tuple(x.shape)}"
            )
        if torch.is_autocast_enabled(x.device.type):  # as nn.Linear does
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.compute(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """``model.half()`` and the like: scales move along, but their precision stays."""
        scales = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name.endswith("_scale")}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            self._buffers[name] = before.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Real weights would be truncated to integers without a word: refuse them."""
        weight = state.get(prefix + "weight")
        if weight is not None and weight.is_floating_point():
            args[-1].append(
                f"{prefix}weight is {weight.dtype}, but {prefix[:-1]} is quantized: load it first, then quantize_model"
            )
        else:
            super()._load_from_state_dict(state, prefix, *args)


class Int8Linear(QuantizedLinear):
    """int8 weights, a scale per output channel; the product is made in the type of the input.

    A quarter of the memory of float32, and as much less to read. Differentiable in its input.

    Args:
        linear: the layer to take the weights of.
        name: what errors call it.

    Raises:
        ValueError: weights that are NaN or infinite; in ``forward``, an input of another width, or of integers.

    >>> layer = Int8Linear(nn.Linear(64, 10))
    >>> layer.weight.dtype, tuple(layer.weight_scale.shape), layer(torch.zeros(2, 5, 64)).shape
    (torch.int8, (10, 1), torch.Size([2, 5, 10]))
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear, name: str = "linear") -> None:
        q, scale = quantize(linear.weight.detach())
        super().__init__(linear, name, scale)
        self.register_buffer("weight", q)

    def dequantize(self) -> Tensor:
        return dequantize(self.weight, self.weight_scale)

    def compute(self, x: Tensor) -> Tensor:
        return w8a16_linear(x, self.weight, self.weight_scale, self.bias)


class W8A8Linear(Int8Linear):
    """int8 weights times int8 activations: the product is one of integers, which hardware does fastest.

    Activations are quantized as they come, with a scale per token (Dettmers et al. 2022, sec. 2.1, without its float16
    outliers), or, where ``input_scale`` is given, all with this one, which saves looking for the maximum.

    Args:
        linear: the layer to take the weights of.
        name: what errors call it.
        input_scale: scale of all activations, (1, 1); None for one per token.

    Raises:
        ValueError: as :class:`Int8Linear`.
        RuntimeError: in ``forward``, the input requires a gradient: rounding has none.
    """

    def __init__(self, linear: nn.Linear, name: str = "linear", input_scale: Tensor | None = None) -> None:
        super().__init__(linear, name)
        self.register_buffer("input_scale", input_scale)

    def compute(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "rounded activations have no gradient; run under torch.inference_mode(), or quantize with "
                "scheme='int8' or 'int4', which are differentiable in their input"
            )
        if self.input_scale is None:
            q, scale = quantize_per_token(x)
        else:
            q, scale = round_to(x.float(), self.input_scale), self.input_scale
        return w8a8_linear(q, scale, self.weight, self.weight_scale, self.bias, x.dtype)


class Int4Linear(QuantizedLinear):
    """4-bit weights, two to a byte, a scale per ``group_size`` inputs of a channel (Frantar et al. 2023, sec. 4).

    An eighth of the memory of float32, and a scale of 4 bytes per group. Differentiable in its input. Where
    ``group_size`` does not divide the inputs, the last group is filled with zeros, which take up room.

    Args:
        linear: the layer to take the weights of.
        name: what errors call it.
        group_size: a power of two from 32 to 256.

    Raises:
        ValueError: another group size; otherwise as :class:`Int8Linear`.

    >>> layer = Int4Linear(nn.Linear(128, 10), group_size=64)
    >>> tuple(layer.weight_packed.shape), tuple(layer.weight_scale.shape)
    ((10, 64), (10, 2))
    """

    weight_packed: Tensor

    def __init__(self, linear: nn.Linear, name: str = "linear", group_size: int = 64) -> None:
        if group_size not in (32, 64, 128, 256):
            raise ValueError(f"group_size {group_size} must be 32, 64, 128 or 256")
        q, scale = quantize(linear.weight.detach(), 4, group_size)
        super().__init__(linear, name, scale)
        self.group_size = group_size
        padded = nn.functional.pad(q, (0, -q.shape[1] % group_size)).unflatten(1, (-1, group_size))
        self.register_buffer("weight_packed", pack_int4(padded).flatten(1))

    def dequantize(self) -> Tensor:
        return dequantize_int4(self.weight_packed, self.weight_scale, self.group_size, self.in_features)

    def compute(self, x: Tensor) -> Tensor:
        return w4a16_linear(x, self.weight_packed, self.weight_scale, self.bias, self.group_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"
