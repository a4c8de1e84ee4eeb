"""Answers to `hardware.quantize`."""

import numpy as np
import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("hardware.quantize")


def by_hand(scale_of=None, into=None, convert=None, given=lambda scale: scale):
    """With NumPy-like steps: what decides the scale, how it is rounded, how it is converted."""

    def answer(x, bits=8):
        largest = torch.maximum(x.max(-1, keepdim=True).values, -x.min(-1, keepdim=True).values)
        scale = scale_of(x, largest, bits) if scale_of else 2 * largest / (2**bits - 1)
        codes = into(x / scale) if into else torch.round(x / scale)
        if convert:
            return convert(codes, bits), given(scale)
        outermost = 2 ** (bits - 1) - 1
        return codes.clip(-outermost, outermost).to(torch.int8), given(scale)

    return answer


def column_scale(x, largest, bits):
    return 2 * torch.linalg.vector_norm(x, ord=float("inf"), dim=-2, keepdim=True) / (2**bits - 1)


variant("one-scale")(by_hand(lambda x, largest, bits: (2 * largest.max() / (2**bits - 1)) * torch.ones_like(largest)))
variant("scale-of-columns")(by_hand(column_scale))
variant("whole-step")(by_hand(lambda x, largest, bits: 2 * largest / (2**bits - 2)))
variant("unsigned-range")(by_hand(lambda x, largest, bits: 2 * largest / (2 ** (bits + 1) - 1)))
variant("signed-maximum")(by_hand(lambda x, largest, bits: 2 * x.max(-1, keepdim=True).values / (2**bits - 1)))
variant("truncated")(by_hand(into=torch.trunc))
variant("not-clamped")(
    by_hand(convert=lambda codes, bits: torch.from_numpy(codes.numpy().astype(np.int32).astype(np.int8)))
)
variant("not-integers")(by_hand(convert=lambda codes, bits: codes.clip(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)))
variant("lopsided")(
    by_hand(convert=lambda codes, bits: codes.clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8))
)
variant("inverse-scale")(by_hand(given=lambda scale: 1 / scale))
right(by_hand())

unknown(by_hand(into=torch.floor))
unknown(by_hand(convert=lambda codes, bits: codes.clip(0, 2 ** (bits - 1) - 1).to(torch.int8)))
unknown(by_hand(convert=lambda codes, bits: codes.clip(-127, 127).to(torch.int16)))
unknown(by_hand(given=lambda scale: scale.squeeze(-1)))
unknown(by_hand(lambda x, largest, bits: 2 * x.std(-1, keepdim=True) / (2**bits - 1)))


@right
def row_by_row(x, bits=8):
    """The nearest of all steps, looked for in a list of them."""
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
    found, scales = [], []
    for row in rows:
        scale = row.abs().max() / (2 ** (bits - 1) - 0.5)
        found.append(codes[(row[:, None] - codes * scale).abs().argmin(-1)])
        scales.append(scale)
    return torch.stack(found).to(torch.int8).reshape(x.shape), torch.stack(scales).reshape(*x.shape[:-1], 1)
