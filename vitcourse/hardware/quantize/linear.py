"""Layers that keep integers, in the place of ``nn.Linear`` and ``nn.Conv2d``.

They keep ``weight_int8`` or ``weight_packed``, ``weight_scale``, and perhaps ``input_scale``; ``weight`` is what a real
layer has. Scales stay in float32, whatever the model is cast to. Those of weights have no more significant bits than
float16, which is how ``save_weights`` stores them.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from .checks import GROUP_SIZES
from .formulas import dequantize_int4
from .integers import dequantize, pack_int4, quantize
from .ops import (
    quantize_per_tensor,
    quantize_per_token,
    w4a16_linear,
    w8a8_linear,
    w8a16_linear,
)


class Quantized(nn.Module):
    """What all layers that keep integers have in common: scales, and how they are loaded and cast."""

    half_in_files = ("weight_scale",)  # for save_weights: float16 holds them exactly, but for extreme ones
    weight_scale: Tensor
    dtype: torch.dtype  # of the real layer: of its weight and its input

    def keep(self, layer: nn.Linear | nn.Conv2d, scale: Tensor, name: str) -> None:
        """Register the scales and a frozen copy of the bias; an error that names the layer if it has no scales."""
        if not scale.is_meta and not scale.isfinite().all():
            raise ValueError(
                f"weights of {name!r} hold NaN or infinity, which have no integers; train it again with a smaller "
                "learning rate, or leave the layer out by skip="
            )
        self.register_buffer("weight_scale", scale)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.dtype = layer.weight.dtype

    def tie(self, other: "Quantized") -> None:
        """Keep the very integers and scales of another layer, which was made of the same weight."""
        self._buffers |= {name: tensor for name, tensor in other._buffers.items() if name.startswith("weight_")}

    def dequantize(self) -> Tensor:
        """The weights that the integers stand for, in float32, shaped as those of the real layer."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The real weights, for modules that read them instead of calling the layer: right, but made at every use."""
        return self.dequantize().to(self.dtype)

    def real_input(self, x: Tensor) -> Tensor:
        """``x`` as autocast wants it; without autocast its type must be the layer's, as that of a real layer."""
        if torch.is_autocast_enabled(x.device.type):
            return x.to(torch.get_autocast_dtype(x.device.type))
        if x.dtype != self.dtype:
            raise ValueError(
                f"input is {x.dtype}, but the layer is {self.dtype}; cast one of them, or use torch.autocast"
            )
        return x

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """``model.half()`` and the like: scales move along, but their precision stays."""
        scales = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name.endswith("_scale")}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            after = self._buffers[name]
            self._buffers[name] = after.to(before.dtype) if before.is_meta else before.to(after.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_scale.device)).dtype
        return self

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Real weights would leave the integers as they are, if it is not strict: refuse them."""
        if prefix + "weight" in state:
            args[-1].append(
                f"{prefix}weight is {state[prefix + 'weight'].dtype}, but {prefix[:-1]} is quantized: load it first, "
                "then quantize_model"
            )
        else:
            super()._load_from_state_dict(state, prefix, *args)


class QuantizedLinear(Quantized):
    """What the linear layers have in common; ``compute`` is the product of a matrix (M, in_features)."""

    def __init__(self, linear: nn.Linear, name: str, scale: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.keep(linear, scale, name)

    def compute(self, x: Tensor) -> Tensor:
        """(M, in_features) -> (M, out_features)."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:  # as nn.Linear calls it
        if input.shape[-1:] != (self.in_features,) or not input.is_floating_point():
            raise ValueError(
                f"input must be floating point (…, {self.in_features}), got {input.dtype} of shape {tuple(input.shape)}"
            )
        x = self.real_input(input)
        return self.compute(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(QuantizedLinear):
    """int8 weights, a scale per output channel; the product is made in the type of the input.

    A quarter of the memory of float32, and as much less to read. Differentiable in its input.

    Args:
        linear: the layer to take the weights of.
        name: what errors call it.

    Raises:
        ValueError: weights that are NaN or infinite, or none; in ``forward``, an input of another width or type.

    >>> layer = Int8Linear(nn.Linear(64, 10))
    >>> layer.weight_int8.dtype, tuple(layer.weight_scale.shape), layer(torch.zeros(2, 5, 64)).shape
    (torch.int8, (10, 1), torch.Size([2, 5, 10]))
    """

    weight_int8: Tensor

    def __init__(self, linear: nn.Linear, name: str = "linear") -> None:
        q, scale = quantize(linear.weight.detach(), half_scale=True)
        super().__init__(linear, name, scale)
        self.register_buffer("weight_int8", q)

    def dequantize(self) -> Tensor:
        return dequantize(self.weight_int8, self.weight_scale)

    def compute(self, x: Tensor) -> Tensor:
        return w8a16_linear(x, self.weight_int8, self.weight_scale, self.bias)


class W8A8Linear(Int8Linear):
    """int8 weights times int8 activations: the product is one of integers, which hardware does fastest.

    Activations are quantized as they come, with a scale per token (Dettmers et al. 2022, sec. 2.1, without its float16
    outliers), or, where ``input_scale`` is given, all with this one, beyond which they are clipped.

    Args:
        linear: the layer to take the weights of.
        name: what errors call it.
        input_scale: scale of all activations, (1, 1); None for one per token. NaN where it is yet to be loaded.

    Raises:
        ValueError: as :class:`Int8Linear`.
        RuntimeError: in ``forward``, the input requires a gradient: rounding has none; or the scale is NaN still.
    """

    def __init__(self, linear: nn.Linear, name: str = "linear", input_scale: Tensor | None = None) -> None:
        super().__init__(linear, name)
        self.name = name
        self.register_buffer("input_scale", input_scale)
        self.has_scale = self._look_for_scale()

    def _look_for_scale(self) -> bool:
        """Whether activations have a scale. Not asked at every call, which would wait for the GPU."""
        scale = self.input_scale
        return scale is None or scale.is_meta or bool(scale.isfinite().all())

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        self.has_scale = self._look_for_scale()

    def compute(self, x: Tensor) -> Tensor:
        if not self.has_scale:
            raise RuntimeError(
                f"{self.name!r} has no scale for its activations: no calibration batch reached it, or its weights are "
                f"not loaded yet; load them, or quantize again with batches that reach it or with skip={self.name!r}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "rounded activations have no gradient; run under torch.inference_mode(), or quantize with "
                "scheme='int8' or 'int4', which are differentiable in their input"
            )
        q, scale = quantize_per_token(x) if self.input_scale is None else quantize_per_tensor(x, self.input_scale)
        return w8a8_linear(q, scale, self.weight_int8, self.weight_scale, self.bias, x.dtype)


class Int4Linear(QuantizedLinear):
    """4-bit weights, two to a byte, a scale per ``group_size`` inputs of a channel (Frantar et al. 2023, sec. 4).

    An eighth of the memory of float32, and a scale per group. Differentiable in its input. Where
    ``group_size`` does not divide the inputs, the last group is filled with zeros, which take up room.

    Args:
        linear: the layer to take the weights of.
        name: what errors call it.
        group_size: 32, 64, 128 or 256.

    Raises:
        ValueError: another group size; otherwise as :class:`Int8Linear`.

    >>> layer = Int4Linear(nn.Linear(128, 10), group_size=64)
    >>> tuple(layer.weight_packed.shape), tuple(layer.weight_scale.shape)
    ((10, 64), (10, 2))
    """

    weight_packed: Tensor

    def __init__(self, linear: nn.Linear, name: str = "linear", group_size: int = 64) -> None:
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group_size {group_size} must be 32, 64, 128 or 256")
        q, scale = quantize(linear.weight.detach(), 4, group_size, half_scale=True)
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


class Int8Conv2d(Quantized, nn.Conv2d):
    """A convolution that keeps int8 weights, a scale per output channel: (B, C, H, W) -> (B, D, H', W').

    The weights are made real at every call. That is little work beside the convolution's own, which is made in the type
    of the input; differentiable in it.

    Args:
        conv: the convolution to take the weights of: of any stride, padding and number of groups.
        name: what errors call it.

    Raises:
        ValueError: weights that are NaN or infinite, or none; in ``forward``, an input of another type.

    >>> layer = Int8Conv2d(nn.Conv2d(3, 8, kernel_size=16, stride=16))
    >>> layer.weight_int8.dtype, tuple(layer.weight_scale.shape), layer(torch.zeros(2, 3, 32, 32)).shape
    (torch.int8, (8, 1), torch.Size([2, 8, 2, 2]))
    """

    def __init__(self, conv: nn.Conv2d, name: str = "conv") -> None:
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        super().__init__(*sizes, conv.groups, bias=False, padding_mode=conv.padding_mode, device="meta")
        del self.weight  # the parent's; from here on it is the property
        q, scale = quantize(conv.weight.detach().flatten(1), half_scale=True)
        self.keep(conv, scale, name)
        self.register_buffer("weight_int8", q.view_as(conv.weight))

    def dequantize(self) -> Tensor:
        return dequantize(self.weight_int8.flatten(1), self.weight_scale).view_as(self.weight_int8)

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            raise ValueError(f"input must be floating point (B, {self.in_channels}, H, W), got {input.dtype}")
        x = self.real_input(input)
        return self._conv_forward(x, self.dequantize().to(x.dtype), self.bias)


class SplitAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose input projection is a linear layer, which can be quantized as any other.

    It goes on to read ``in_proj_weight`` and does not call the layer. Made by :meth:`split` alone.

    >>> attention = nn.MultiheadAttention(8, 2)
    >>> SplitAttention.split(attention)
    >>> attention.in_proj
    Linear(in_features=8, out_features=24, bias=False)
    """

    in_proj: nn.Module

    @classmethod
    def split(cls, attention: nn.MultiheadAttention) -> None:
        """Turn ``attention`` into one of this class, in place. It must have ``in_proj_weight``."""
        weight = attention._parameters.pop("in_proj_weight")
        attention.in_proj = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        attention.in_proj.weight = weight
        attention.__class__ = cls

    @property
    def in_proj_weight(self) -> Tensor:
        return self.in_proj.weight
