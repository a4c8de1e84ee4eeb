"""Multi-head self-attention, what every token mixer is called with, and how its weights are recorded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol

from torch import Tensor, nn

from vitcourse.layers import attention, attention_qkvpacked, attention_weights, check_mask

Grid = tuple[int, int, int]  # rows and columns of patches, then the number of prefix tokens ([CLS], registers)


class Merging(Protocol):
    """What takes part where the tokens of a block become fewer; see :mod:`vitcourse.efficient_attention.merging`."""

    def attention_bias(self, k: Tensor) -> Tensor | None: ...

    def after_attention(self, x: Tensor) -> Tensor: ...


class Attention(nn.Module):
    """Multi-head self-attention (sec. 3.1 and appendix A): the token mixer of ViT.

    A token mixer is called as ``mixer(x, grid, mask)`` with x (B, N, D) and returns (B, N, D). ``grid`` says how the
    tokens lie on the image, for mixers that need to know; this one does not. It is None for a part of the tokens. A
    boolean ``mask``, broadcastable to (B, H, N, N), is True where a token may attend to another; without one the mixer
    is called as ``mixer(x, grid)``. A mixer that cannot honour either raises.

    A mixer whose heads do not depend on each other can lose some of them (:mod:`vitcourse.hardware.prune`). It has
    ``num_heads``, ``qkv`` and ``proj`` as here, and ``head_axes`` names its other parameters, or linear layers, each
    with the axis along which the heads lie, one after the other; None where they share it. A mixer with parameters that
    it does not name keeps all its heads.

    Args:
        dim: width D.
        num_heads: heads H.
        qkv_bias: biases on the projection to queries, keys and values.
        backend: see :func:`vitcourse.layers.attention`.
        head_dim: width of a head where it is not D/H, as in a pruned layer.

    Raises:
        ValueError: dim is not divisible by num_heads, and no head_dim is given.
    """

    head_axes: ClassVar[dict[str, int | None]] = {}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        backend: str = "auto",
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}; every head is as wide")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.backend = backend
        self.recorder: list[Tensor] | None = None  # see record_attention
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * self.head_dim, dim)

    def forward(
        self, x: Tensor, grid: Grid | None = None, mask: Tensor | None = None, merging: Merging | None = None
    ) -> Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        if self.recorder is None and merging is None:
            x = attention_qkvpacked(qkv, mask=mask, backend=self.backend)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            bias = None if merging is None else merging.attention_bias(k)
            if self.recorder is None:
                x = attention(q, k, v, bias=bias, mask=mask, backend=self.backend)
            else:  # fused kernels never form the weights, so whoever wants to see them pays for the plain equation
                check_mask(mask, (*q.shape[:3], N))
                weights = attention_weights(q, k, bias=bias, mask=mask)
                self.recorder.append(weights)
                x = weights @ v
        return self.proj(x.transpose(1, 2).flatten(2))


def whole_grid(grid: Grid | None, mixer: nn.Module) -> Grid:
    """The grid, for a mixer that cannot do without.

    Raises:
        ValueError: there is none, since the tokens are a part of the image's.
    """
    if grid is None:
        raise ValueError(
            f"{type(mixer).__name__} needs to know where the tokens lie, and grid is None, as for a part of them; "
            "use vitcourse.vit.Attention"
        )
    return grid


def refuse_mask(mask: Tensor | None, mixer: nn.Module) -> None:
    """For a mixer that has no pairs of tokens to hide from each other, or hides some already.

    Raises:
        ValueError: there is a mask.
    """
    if mask is not None:
        raise ValueError(f"{type(mixer).__name__} cannot honour a mask; use vitcourse.vit.Attention")


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the attention weights of every block that runs inside the ``with``, in order.

    Yields:
        a list that fills with (B, H, N, N) tensors. They are part of the graph, so gradients reach them.

    Raises:
        ValueError: the model has no token mixer that can record.

    >>> import torch
    >>> from vitcourse.vit import VisionTransformer
    >>> model = VisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=4)
    >>> with record_attention(model) as weights:
    ...     _ = model(torch.zeros(1, 3, 32, 32))
    >>> [tuple(w.shape) for w in weights]
    [(1, 4, 5, 5), (1, 4, 5, 5)]
    """
    mixers = [m for m in model.modules() if hasattr(m, "recorder")]
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no token mixer with a recorder, so no attention can be recorded")
    before, weights = [m.recorder for m in mixers], []
    for mixer in mixers:
        mixer.recorder = weights
    try:
        yield weights
    finally:
        for mixer, recorder in zip(mixers, before, strict=True):
            mixer.recorder = recorder
