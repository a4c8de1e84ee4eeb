"""Quantization: weights, and activations, as integers of 8 or 4 bits.

* :mod:`.integers`: from real numbers to integers and back, two 4-bit integers to a byte.
* :mod:`.linear`: linear layers and convolutions that keep integers.
* :mod:`.model`: ``quantize_model``, for all linear layers and convolutions of a model.
* :mod:`.calibration`: observers, which find the scale of activations.
* :mod:`.smoothing`: SmoothQuant, against outliers in activations.
* :mod:`.formulas`: the products of integers in PyTorch's own operators; :mod:`.onnx_export`: what ONNX says otherwise.
* :mod:`.kernels`, :mod:`.tilings`, :mod:`.launchers`: the same in Triton.
* :mod:`.ops`: one function each, which takes the faster of the two, and PyTorch's knowledge of them as operators.

Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference.
Dettmers et al. 2022, LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale.
Xiao et al. 2023, SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models.
Frantar et al. 2023, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers.
"""

from vitcourse.registry import register_form

from .calibration import MinMaxObserver, Observer, PercentileObserver, watch_inputs
from .integers import dequantize, pack_int4, quantize, unpack_int4
from .linear import Int4Linear, Int8Conv2d, Int8Linear, QuantizedLinear, W8A8Linear
from .model import SCHEMES, describe_quantization, model_bytes, quantize_like, quantize_model
from .smoothing import smooth, smoothing_factors

__all__ = [
    "SCHEMES",
    "Int4Linear",
    "Int8Conv2d",
    "Int8Linear",
    "MinMaxObserver",
    "Observer",
    "PercentileObserver",
    "QuantizedLinear",
    "W8A8Linear",
    "dequantize",
    "model_bytes",
    "pack_int4",
    "quantize",
    "quantize_like",
    "quantize_model",
    "smooth",
    "smoothing_factors",
    "unpack_int4",
    "watch_inputs",
]

register_form("quantization", describe_quantization, quantize_like)
