"""Attention whose cost is linear in the number of tokens: the exponential of a dot product becomes a dot product.

Softmax attention weighs value j by exp(qᵢ·kⱼ) over the sum of these. Where the weight is φ(qᵢ)·φ(kⱼ) instead, the keys
and values can be summed up once for all queries, φ(K)ᵀV, and the (N, N) matrix is never needed.
"""

import math

import torch
from torch import Tensor, nn

from vitcourse.efficient_attention.mixer import TokenMixer, check_counts, single
from vitcourse.vit import Grid
from vitcourse.vit.positions import full_precision


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with weights proportional to q·k, in O(N) (Katharopoulos et al. 2020, eq. 5).

    The sums over tokens are made in float32 at least, also under autocast: N · M positive numbers overflow float16.

    Args:
        q: features of the queries (B, H, N_q, M), not negative.
        k: features of the keys (B, H, N_k, M), not negative, such that no query has a weight of zero for all keys.
        v: values (B, H, N_k, D).

    Returns:
        (B, H, N_q, D), each a weighted mean of the values.

    >>> q, k, v = torch.rand(3, 1, 2, 100, 8)
    >>> weights = q @ k.mT
    >>> bool(torch.allclose(linear_attention(q, k, v), weights / weights.sum(-1, keepdim=True) @ v, atol=1e-5))
    True
    """
    dtype = v.dtype
    with full_precision(v.device.type):
        q, k, v = single(q, k, v)
        summary = k.mT @ v  # (B, H, M, D): all that the queries will know of keys and values
        total = k.sum(dim=-2).unsqueeze(-1)  # (B, H, M, 1)
        return (q @ summary / (q @ total)).to(dtype)


def elu_features(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1 (Katharopoulos et al. 2020, eq. 7), in float32 at least.

    Written as exp(x) for x < 0, since elu(x) + 1 rounds to zero below x = −17 in float32, and below −8 in float16. No
    feature is less than exp(−80): a query whose features were all zero would get 0/0.

    >>> [f"{x:.1e}" for x in elu_features(torch.tensor([-500.0, -20.0, 0.0, 2.0])).tolist()]
    ['1.8e-35', '2.1e-09', '1.0e+00', '3.0e+00']
    """
    (x,) = single(x)
    return torch.where(x > 0, x + 1, x.clamp(-80, 0).exp())


def two_softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two softmaxes in place of one (Shen et al. 2021, eq. 4): of q over its channels, of k over the tokens.

    The paper's "efficient attention". The weights sum to 1 of themselves: each channel of k spreads one unit over the
    tokens, and q divides one unit among the channels. In float32 at least, also under autocast.

    Args:
        q: queries (B, H, N_q, D).
        k: keys (B, H, N_k, D).
        v: values (B, H, N_k, D_v).

    Returns:
        (B, H, N_q, D_v).

    >>> two_softmax_attention(*torch.randn(3, 1, 2, 100, 8)).shape
    torch.Size([1, 2, 100, 8])
    """
    dtype = v.dtype
    with full_precision(v.device.type):
        q, k, v = single(q, k, v)
        return (q.softmax(dim=-1) @ (k.softmax(dim=-2).mT @ v)).to(dtype)


def orthogonal_projection(
    num_features: int, dim: int, generator: torch.Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """Directions for random features (Choromanski et al. 2021, sec. 2.4): Gaussian rows, orthogonal in groups of D.

    Each row alone is a standard normal vector, which makes the features unbiased; that rows avoid each other makes them
    vary less. The orthogonal matrix of a QR decomposition is not uniformly distributed until the signs of R's diagonal
    are taken out (Mezzadri 2007, sec. 5): LAPACK fixes one sign a column, which would bias exp(w·x).

    Args:
        num_features: rows m.
        dim: columns D.
        generator: source of the random numbers, of the device's kind; the global one where None.
        device: where the matrix is wanted.

    Returns:
        (m, D) in float32.

    Raises:
        ValueError: num_features or dim is no positive integer.

    >>> w = orthogonal_projection(8, 8)
    >>> bool(torch.allclose(w @ w.T, torch.diag(w.square().sum(1)), atol=1e-4))
    True
    """
    check_counts(1, num_features=num_features, dim=dim)
    groups = math.ceil(num_features / dim)
    gaussian = torch.randn(2, groups, dim, dim, generator=generator, device=device)
    directions, triangle = torch.linalg.qr(gaussian[0])
    directions = directions * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    lengths = gaussian[1].norm(dim=-1, keepdim=True)  # those of independent normal vectors
    return (directions.mT * lengths).flatten(0, 1)[:num_features]


def log_positive_features(x: Tensor, projection: Tensor) -> Tensor:
    """Logarithms of FAVOR+'s features, φ(x) = exp(Wx − |x|²/2) / √m (Choromanski et al. 2021, lemma 1).

    For any two vectors E[φ(x)·φ(y)] = exp(x·y) over the rows of W, and all features are positive.

    Args:
        x: (…, N, D).
        projection: W (m, D).

    Returns:
        (…, N, m).

    >>> x, w = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    >>> log_positive_features(x, w)
    tensor([[0.],
            [0.]])
    """
    half_square = x.square().sum(dim=-1, keepdim=True) / 2
    return x @ projection.mT - half_square - math.log(projection.shape[0]) / 2


def random_feature_attention(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *, scale: float | None = None
) -> Tensor:
    """Softmax attention, approximated in O(N) by positive random features (Choromanski et al. 2021, FAVOR+).

    The error falls as 1/√m, and grows exponentially with |q|² and |k|². Like the paper's appendix B.1, it subtracts
    maxima before the exponential; a maximum for each *feature* over the keys, which then moves over to the queries, so
    that no denominator can underflow and no ε is added to any feature. In float32 at least, also under autocast.

    Args:
        q: queries (B, H, N_q, D).
        k: keys (B, H, N_k, D).
        v: values (B, H, N_k, D_v).
        projection: directions (m, D), see :func:`orthogonal_projection`.
        scale: factor on the dot products; 1/√D where None.

    Returns:
        (B, H, N_q, D_v).

    Raises:
        ValueError: the projection does not fit the width of q, or there are no keys.

    >>> q, k, v = torch.randn(3, 1, 2, 100, 8)
    >>> random_feature_attention(q, k, v, orthogonal_projection(64, 8)).shape
    torch.Size([1, 2, 100, 8])
    """
    dtype = v.dtype
    with full_precision(v.device.type):
        q, k, v = single(q, k, v)
        return linear_attention(*_stable_features(q, k, projection, scale), v).to(dtype)


def _stable_features(q: Tensor, k: Tensor, projection: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Features (B, H, N, m) of q and k, up to factors that cancel where the weights of a query are normalised."""
    if projection.ndim != 2 or projection.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"projection of shape {tuple(projection.shape)} does not fit queries of width {q.shape[-1]}; "
            f"make it with orthogonal_projection(m, {q.shape[-1]})"
        )
    if k.shape[-2] == 0:
        raise ValueError(f"k of shape {tuple(k.shape)} has no tokens: a query needs a key to attend to")
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    log_q, log_k = (log_positive_features(t * root, projection.to(t.dtype)) for t in (q, k))
    largest = log_k.detach().amax(dim=-2, keepdim=True)  # of each feature
    log_q = log_q + largest
    return (log_q - log_q.detach().amax(dim=-1, keepdim=True)).exp(), (log_k - largest).exp()


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


class LinearAttention(TokenMixer):
    """Linear attention with the features elu(x) + 1 (Katharopoulos et al. 2020): a mixer of cost O(N · D²/H).

    >>> LinearAttention(64, num_heads=4)(torch.zeros(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None) -> Tensor:
        return linear_attention(elu_features(q), elu_features(k), v)

    def weights(self, q: Tensor, k: Tensor, grid: Grid | None) -> Tensor:
        return _normalised(elu_features(q) @ elu_features(k).mT).to(q.dtype)


class TwoSoftmaxAttention(TokenMixer):
    """Linear attention with softmax-normalised queries and keys (Shen et al. 2021): a mixer of cost O(N · D²/H).

    >>> TwoSoftmaxAttention(64, num_heads=4)(torch.zeros(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None) -> Tensor:
        return two_softmax_attention(q, k, v)

    def weights(self, q: Tensor, k: Tensor, grid: Grid | None) -> Tensor:
        return q.softmax(dim=-1) @ k.softmax(dim=-2).mT


class RandomFeatureAttention(TokenMixer):
    """Softmax attention approximated by positive orthogonal random features (Choromanski et al. 2021): O(N · m · D).

    The projection is a buffer and saved with the weights; a checkpoint of softmax attention, which has none, loads too
    and leaves it as it was drawn (through :func:`vitcourse.load_weights` with ``strict=False``).

    Args:
        dim: width D.
        num_heads: heads H, each D/H wide.
        qkv_bias: biases on the projection to queries, keys and values.
        num_features: features m of each head; by default (D/H) · ln(D/H), the paper's optimal order (theorem 4).

    Raises:
        ValueError: dim is not divisible by num_heads, or num_features is no positive integer.

    >>> RandomFeatureAttention(64, num_heads=4, num_features=32)(torch.zeros(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True, num_features: int | None = None) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        width = dim // num_heads
        if num_features is None:
            num_features = max(1, math.ceil(width * math.log(width)))
        self.register_buffer("projection", orthogonal_projection(num_features, width))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new features, for instance every thousand training steps, so that a model does not adapt to one draw."""
        fresh = orthogonal_projection(*self.projection.shape, generator, generator.device if generator else None)
        self.projection.copy_(fresh)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None) -> Tensor:
        return random_feature_attention(q, k, v, self.projection)

    def weights(self, q: Tensor, k: Tensor, grid: Grid | None) -> Tensor:
        phi_q, phi_k = _stable_features(*single(q, k), self.projection, None)
        return _normalised(phi_q @ phi_k.mT).to(q.dtype)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: object) -> None:
        state.setdefault(prefix + "projection", self.projection)
        super()._load_from_state_dict(state, prefix, *args)


def redraw_features(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw new random features in every :class:`RandomFeatureAttention` of a model.

    Raises:
        ValueError: the model has none.
    """
    mixers = [m for m in model.modules() if isinstance(m, RandomFeatureAttention)]
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no RandomFeatureAttention whose features could be redrawn")
    for mixer in mixers:
        mixer.redraw(generator)
