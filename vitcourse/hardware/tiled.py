"""FlashAttention's idea in plain PyTorch, to be read and checked: no matrix of all scores is ever made.

:mod:`~vitcourse.hardware.tiled_kernel` has the same steps as a Triton kernel; :mod:`~vitcourse.hardware.flash` is fast.
"""

import torch
from torch import Tensor


def attend_tile(
    peak: Tensor, total: Tensor, out: Tensor, scores: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Let one more tile of keys take part in a softmax (Milakov and Gimelshein 2018, alg. 3; Dao et al. 2022, alg. 1).

    What was summed so far is relative to e^peak, the largest weight then. Where a new score is larger, the sums shrink
    by e^(peak − new peak). After the last tile, ``out / total`` is softmax(all scores) · all values.

    Args:
        peak: (…, N_q), largest score so far; −∞ at the start.
        total: (…, N_q), Σ e^(score − peak) so far; 0 at the start.
        out: (…, N_q, D), Σ e^(score − peak) · value so far; 0 at the start.
        scores: (…, N_q, T) of the tile's T keys; −∞ hides a key.
        values: (…, T, D).

    Returns:
        the new peak, total and out.

    >>> state = torch.tensor([-torch.inf]), torch.zeros(1), torch.zeros(1, 1)
    >>> for score, value in [(0.0, 1.0), (100.0, 5.0)]:
    ...     state = attend_tile(*state, torch.tensor([[score]]), torch.tensor([[value]]))
    >>> state
    (tensor([100.]), tensor([1.]), tensor([[5.]]))
    """
    new_peak = torch.maximum(peak, scores.amax(dim=-1))
    shift = torch.where(new_peak == -torch.inf, 0.0, new_peak)  # nothing to be seen yet: −∞ − (−∞) would be NaN
    shrink = torch.exp(peak - shift)
    weights = torch.exp(scores - shift.unsqueeze(-1))
    total = total * shrink + weights.sum(dim=-1)
    out = out * shrink.unsqueeze(-1) + weights @ values
    return new_peak, total, out


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 64) -> Tensor:
    """softmax(q kᵀ / √D) v, a tile of ``block`` keys at a time: N_q · block scores in memory instead of N_q · N_k.

    Args:
        q: (…, N_q, D).
        k: (…, N_k, D).
        v: (…, N_k, D_v).
        block: keys a tile; the last one may be smaller.

    Returns:
        (…, N_q, D_v).

    Raises:
        ValueError: block below 1.

    >>> q, k, v = torch.randn(3, 2, 5, 8)
    >>> torch.allclose(tiled_attention(q, k, v, block=2), (q @ k.mT / 8**0.5).softmax(-1) @ v, atol=1e-6)
    True
    """
    if block < 1:
        raise ValueError(f"block must be at least 1 key, got {block}")
    q = q * q.shape[-1] ** -0.5
    peak = q.new_full(q.shape[:-1], -torch.inf)
    total = q.new_zeros(q.shape[:-1])
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for keys, values in zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True):
        peak, total, out = attend_tile(peak, total, out, q @ keys.mT, values)
    return out / total.unsqueeze(-1)
