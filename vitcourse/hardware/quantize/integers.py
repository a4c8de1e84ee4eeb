"""From real numbers to few-bit integers and back, and two 4-bit integers to a byte."""

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize(
    x: Tensor, bits: int = 8, group_size: int | None = None, *, half_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Round to 2^bits − 1 evenly spaced values, symmetric around 0: x ≈ q · scale (Jacob et al. 2018, eq. 1).

    Every row of the last dimension has a scale of its own, or every ``group_size`` numbers of it have. The largest
    magnitude of those that share a scale decides: scale = max|x| / (2^(bits−1) − ½) is the distance between two steps.
    The outermost lie half a step within max|x|, so no number, not even the largest, is further than scale / 2 from
    its step. Their zero point is 0, so that zero stays zero, and products need no correction.

    Weights (out, in) quantized so have a scale per output channel, activations (tokens, in) a scale per token.

    Args:
        x: (…, K), floating point.
        bits: 2 to 8.
        group_size: how many neighbours along K share a scale; the last group may be smaller. None for all K.
        half_scale: round each scale up to 11 significant bits, as many as float16 has. It grows by 2⁻¹⁰ at most, and
            the error is no larger than half of it, as before. A group of zeros has scale 1.

    Returns:
        q: (…, K) int8, of magnitude at most 2^(bits−1) − 1.
        scale: (…, G) float32, G = ⌈K / group_size⌉, or 1. NaN or infinite where x is.

    Raises:
        ValueError: bits or group_size out of range, or K = 0.
        TypeError: x is not floating point.

    >>> q, scale = quantize(torch.tensor([[-3.0, -1.2, 0.0, 1.4]]), bits=2)
    >>> q, scale
    (tensor([[-1, -1,  0,  1]], dtype=torch.int8), tensor([[2.]]))
    >>> dequantize(q, scale)
    tensor([[-2., -2.,  0.,  2.]])
    """
    _check_bits(bits)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point to be quantized, got {x.dtype}")
    if x.shape[-1] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)} has no numbers along its last dimension to quantize")
    groups = _in_groups(x.float(), group_size)  # (…, G, g)
    largest = groups.abs().amax(dim=-1)
    scale = scale_for(largest, bits)
    if half_scale:
        scale = _round_up(scale).masked_fill(largest == 0, 1.0)
    q = round_to(groups, scale.unsqueeze(-1), bits)
    return q.flatten(-2)[..., : x.shape[-1]], scale


def dequantize(q: Tensor, scale: Tensor, group_size: int | None = None) -> Tensor:
    """The real numbers that the integers stand for: q · scale.

    Args:
        q: (…, K) integers.
        scale: (…, G) float32, as :func:`quantize` returns it.
        group_size: the one that was given to :func:`quantize`.

    Returns:
        (…, K) float32.

    Raises:
        ValueError: the number of scales does not fit K and the group size.
    """
    groups = _in_groups(q, group_size)
    if scale.shape[-1] != groups.shape[-2]:
        raise ValueError(
            f"scale has {scale.shape[-1]} groups, but {q.shape[-1]} numbers in groups of {group_size} make "
            f"{groups.shape[-2]}; pass the group_size that quantize was given"
        )
    return (groups * scale.unsqueeze(-1)).flatten(-2)[..., : q.shape[-1]]


def scale_for(largest: Tensor, bits: int = 8) -> Tensor:
    """The distance between two steps, if ``largest`` is the largest magnitude that must be covered.

    It is kept away from 0, by which a row of zeros or denormals would be divided.
    """
    return (largest.float() / (2 ** (bits - 1) - 0.5)).clamp(min=torch.finfo(torch.float32).tiny)


def _round_up(scale: Tensor) -> Tensor:
    """The next number with 11 significant bits, which is ``scale`` itself if it has no more."""
    mantissa, exponent = torch.frexp(scale)  # 0.5 ≤ mantissa < 1
    return torch.ldexp((mantissa * 2**11).ceil() / 2**11, exponent)


def round_to(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """The nearest step, as int8; what lies beyond the outermost is clipped to it."""
    outermost = 2 ** (bits - 1) - 1
    return (x / scale).round_().clamp_(-outermost, outermost).to(torch.int8)


def pack_int4(q: Tensor) -> Tensor:
    """Two 4-bit integers to a byte: the first half of the last dimension in the low nibbles, the second in the high.

    Halves and not neighbours, so that a kernel which unpacks a tile has two tiles, and nothing to interleave.

    Args:
        q: (…, 2n) integers from −8 to 7.

    Returns:
        (…, n) uint8.

    Raises:
        ValueError: an odd number of integers, or one that does not fit into 4 bits.

    >>> packed = pack_int4(torch.tensor([1, 2, -1, 7], dtype=torch.int8))
    >>> [f"{byte:08b}" for byte in packed.tolist()]
    ['11110001', '01110010']
    >>> unpack_int4(packed)
    tensor([ 1,  2, -1,  7], dtype=torch.int8)
    """
    if q.shape[-1] % 2:
        raise ValueError(f"q has {q.shape[-1]} numbers in its last dimension, and two go to a byte; pad it with a zero")
    if q.numel() and not q.is_meta and not (q.min() >= -8 and q.max() <= 7):
        raise ValueError(f"q goes from {q.min().item()} to {q.max().item()}, but 4 bits hold −8 to 7")
    low, high = q.to(torch.int8).chunk(2, dim=-1)
    return ((low & 15) | (high << 4)).view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """The reverse of :func:`pack_int4`: (…, n) uint8 to (…, 2n) int8."""
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    raised = packed ^ 0x88  # with its top bit flipped, each nibble is 8 more than what it stands for, and has no sign
    return torch.cat([(raised & 15).to(torch.int8), (raised >> 4).to(torch.int8)], dim=-1) - 8


def _in_groups(x: Tensor, group_size: int | None) -> Tensor:
    """(…, K) to (…, G, g), filled with zeros at the end."""
    if group_size is None:
        return x.unsqueeze(-2)
    if group_size < 1:
        raise ValueError(f"group_size {group_size} must be at least 1, or None for one scale per row")
    padding = -x.shape[-1] % group_size
    return (F.pad(x, (0, padding)) if padding else x).unflatten(-1, (-1, group_size))


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits {bits} is outside 2 to 8")
