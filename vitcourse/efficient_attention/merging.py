"""Token merging (Bolya et al. 2023, "Token Merging: Your ViT But Faster"): in every block similar tokens become one.

Nothing is trained for it: a trained softmax ViT is wrapped, and has fewer tokens to compute from block to block.
"""

from collections.abc import Iterator, Sequence
from numbers import Integral

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitcourse.efficient_attention.mixer import check_counts, single
from vitcourse.layers import always, attention
from vitcourse.registry import Preprocess
from vitcourse.vit import Attention, Block, Grid, VisionTransformer


def bipartite_matching(metric: Tensor, r: int, num_prefix_tokens: int = 0) -> Tensor:
    """Which tokens become one: bipartite soft matching (Bolya et al. 2023, sec. 3, "Bipartite soft matching").

    The patches at even places of the sequence are set A, those at odd places set B. Each token of A finds the one of B
    that is most like it (cosine); the r closest pairs are merged. Several tokens may join the same one.

    Args:
        metric: what likeness is measured on (B, N, C): the keys, averaged over the heads.
        r: tokens to remove; at most half of the patches can go.
        num_prefix_tokens: tokens at the front that are never merged.

    Returns:
        (B, N) integers: the new place of every token, among N − r. First come the prefix tokens, then those of A that
        stay, in order, then those of B.

    Raises:
        ValueError: r is no integer, negative, or more than half of the patches; more prefix tokens than tokens.

    >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]]])
    >>> bipartite_matching(metric, 1)  # A: tokens 0 and 2; B: tokens 1 and 3; token 2 joins token 1
    tensor([[0, 1, 1, 2]])
    """
    B, N, _ = metric.shape
    patches = N - num_prefix_tokens
    if not 0 <= num_prefix_tokens <= N:
        raise ValueError(f"num_prefix_tokens {num_prefix_tokens} of {N} tokens; it must be from 0 to {N}")
    if not isinstance(r, (Integral, torch.SymInt)):
        raise ValueError(f"r={r!r} must be an integer: the tokens to remove")
    if not 0 <= r <= patches // 2:
        raise ValueError(f"r={r} of {patches} patches cannot be merged; r must be from 0 to {patches // 2}")
    if always(patches < 2):
        return torch.arange(N, device=metric.device).expand(B, N)
    first = num_prefix_tokens % 2  # even places of the whole sequence, as in the authors' code
    with torch.no_grad():
        metric = nn.functional.normalize(single(metric[:, num_prefix_tokens:])[0], dim=-1)
        likeness = metric[:, first::2] @ metric[:, 1 - first :: 2].mT  # (B, A, B)
        value, partner = likeness.max(dim=-1)
        if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():  # whose only sort is stable
            closest = value.sort(dim=-1, descending=True).indices[:, :r]
        else:
            closest = value.argsort(dim=-1, descending=True, stable=True)[:, :r]
        joins = torch.zeros_like(partner, dtype=torch.bool).scatter(1, closest, True)

        staying = likeness.shape[1] - r
        place_of_a = torch.where(joins, staying + partner, (~joins).cumsum(dim=-1) - 1)
        place_of_b = torch.arange(staying, patches - r, device=metric.device)
        place = torch.empty(B, patches, dtype=torch.long, device=metric.device)
        place[:, first::2], place[:, 1 - first :: 2] = place_of_a, place_of_b
        prefix = torch.arange(num_prefix_tokens, device=metric.device).expand(B, -1)
        return torch.cat([prefix, num_prefix_tokens + place], dim=1)


def merge(x: Tensor, size: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Average the tokens that go to one place, each weighted with the number of patches that it stands for (sec. 3).

    Args:
        x: tokens (B, N, C).
        size: patches in each token (B, N).
        place: new place of each token (B, N), from 0 to count − 1; see :func:`bipartite_matching`.
        count: number of places, each of which some token goes to.

    Returns:
        merged tokens (B, count, C), and their sizes (B, count).

    Raises:
        RuntimeError: a place that is not among them (on a GPU, where such errors are found late, an assertion).

    >>> x, size = torch.tensor([[[0.0], [6.0], [5.0]]]), torch.tensor([[1.0, 2.0, 1.0]])
    >>> merge(x, size, torch.tensor([[0, 0, 1]]), 2)
    (tensor([[[4.],
             [5.]]]), tensor([[3., 1.]]))
    """
    B, _, C = x.shape
    dtype, (x, size) = x.dtype, single(x, size)  # size times token would leave the range of float16
    rows = (place + count * torch.arange(B, device=x.device)[:, None]).flatten()
    sizes = size.new_zeros(B, count).scatter_add(1, place, size)  # finds places that are too large
    total = x.new_zeros(B * count, C).index_add(0, rows, (x * size[..., None]).flatten(0, 1))
    return (total.unflatten(0, (B, count)) / sizes[..., None]).to(dtype), sizes


def unmerge(x: Tensor, place: Tensor) -> Tensor:
    """Give every original token what the token it went into became: (B, count, C) and (B, N) -> (B, N, C).

    >>> unmerge(torch.tensor([[[4.0], [5.0]]]), torch.tensor([[0, 0, 1]]))
    tensor([[[4.],
             [4.],
             [5.]]])
    """
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))


def proportional_attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(q kᵀ / √D + log size) v: a key counts as often as it has patches in it (Bolya et al. 2023, eq. 1).

    Args:
        q: queries (B, H, N_q, D).
        k: keys (B, H, N_k, D).
        v: values (B, H, N_k, D_v).
        size: patches in each key (B, N_k).
        scale: factor on the dot products; 1/√D where None.
        backend: see :func:`vitcourse.layers.attention`.

    Returns:
        (B, H, N_q, D_v): what attention over all patches would give if those of one token shared its key and value.

    >>> q, k, v = torch.randn(3, 1, 2, 4, 8)
    >>> twice = [torch.cat([t, t[:, :, -1:]], dim=2) for t in (k, v)]
    >>> got = proportional_attention(q, k, v, torch.tensor([[1.0, 1.0, 1.0, 2.0]]))
    >>> bool(torch.allclose(got, attention(q, *twice), atol=1e-6))
    True
    """
    return attention(q, k, v, scale=scale, bias=size.log().to(q.dtype)[:, None, None], backend=backend)


class _Merging:
    """What one block is told, and tells, while it merges r tokens, or half of the patches where that is less."""

    def __init__(self, grid: Grid, size: Tensor | None, r: int, proportional: bool) -> None:
        self.prefix, self.size, self.r, self.proportional = grid[2], size, r, proportional
        self.place: Tensor | None = None

    def attention_bias(self, k: Tensor) -> Tensor | None:
        """Look at the keys (B, H, N, D) to see which tokens are alike; how much more a key counts, as a bias."""
        self.keys = k.mean(dim=1)
        return self.size.log().to(k.dtype)[:, None, None] if self.proportional and self.size is not None else None

    def after_attention(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) to fewer."""
        B, N, _ = x.shape
        size = torch.ones(B, N, device=x.device) if self.size is None else self.size
        if self.r == 0 or always(N - self.prefix < 2):
            self.size, self.place = size, torch.arange(N, device=x.device).expand(B, N)
            return x
        r = torch.sym_min(self.r, (N - self.prefix) // 2)
        self.place = bipartite_matching(self.keys, r, self.prefix)
        x, self.size = merge(x, size, self.place, N - r)
        return x


def _run(
    block: Block, x: Tensor, grid: Grid, size: Tensor | None, r: int, proportional: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A block that removes r tokens; see :class:`MergingBlock`. It is called as ever: hooks on it, and in it, run."""
    merging = _Merging(grid, size, r, proportional)
    return block(x, grid, merging=merging), merging.size, merging.place


def _check(block: nn.Module, r: int) -> None:
    check_counts(0, r=r)
    if type(block.attn) is not Attention:
        raise TypeError(
            f"merging weighs softmax attention with the sizes of tokens, and cannot wrap {type(block.attn).__name__}; "
            "use vitcourse.vit.Attention"
        )
    if type(block).forward is not Block.forward:
        raise TypeError(f"merging takes place within vitcourse.vit.Block, and cannot wrap {type(block).__name__}")


class MergingBlock(nn.Module):
    """A block of ViT that merges r tokens between its attention and its MLP (sec. 3, "Token Merging").

    Args:
        block: the block to wrap; its parameters are shared, not copied.
        r: tokens to remove, or half of the patches where that is less.
        proportional: let a key count as often as it has patches in it; see :func:`merge_tokens`.

    Raises:
        ValueError: r is no integer, or negative.
        TypeError: another kind of block, or its token mixer is not ViT's softmax attention.

    >>> block = MergingBlock(Block(64, num_heads=4), r=8)
    >>> x, size, place = block(torch.randn(2, 50, 64), (7, 7, 1))
    >>> x.shape, size.sum(1), place.shape
    (torch.Size([2, 42, 64]), tensor([50., 50.]), torch.Size([2, 50]))
    """

    def __init__(self, block: Block, r: int, proportional: bool = True) -> None:
        super().__init__()
        _check(block, r)
        self.block, self.r, self.proportional = block, r, proportional

    def forward(self, x: Tensor, grid: Grid, size: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, D) and their sizes (B, N), 1 where None -> fewer tokens, their sizes, and the place of each.

        The places (B, N) are those of :func:`bipartite_matching`, or where they were if nothing merges. Of ``grid``
        only the prefix tokens are needed.
        """
        return _run(self.block, x, grid, size, self.r, self.proportional)


class TokenMerging(nn.Module):
    """A VisionTransformer in which tokens merge; made by :func:`merge_tokens`, which see.

    It is called like the model, and has its ``forward_features``, ``feature_maps``, ``reset_classifier``,
    ``set_grad_checkpointing``, ``no_weight_decay``, ``num_prefix_tokens``, ``feature_info``, ``patch_size`` and, where
    the model was made by name, ``preprocess``; all else is found in ``.model``. ``feature_maps`` are un-merged: each
    patch shows the token that it went into. Hooks on the model's blocks, and on what is in them, run as ever.

    A graph of ``torch.export`` for images of any size is one for those with more than 2r patches left in every block.
    """

    wraps = "model"  # for those who save, load or train the weights
    left_out_of_files = (
        "the file holds the model without its merging of tokens; merge_tokens(create_model(path), r) merges"
    )

    def __init__(self, model: VisionTransformer, r: int | Sequence[int], proportional: bool = True) -> None:
        super().__init__()
        if isinstance(model, TokenMerging):
            raise TypeError("the model merges tokens already; wrap its .model, which does not")
        if not isinstance(model, VisionTransformer):
            raise TypeError(f"merge_tokens wraps a VisionTransformer, not a {type(model).__name__}")
        depth = len(model.blocks)
        if not isinstance(r, (Integral, Sequence)):
            raise ValueError(f"r={r!r} must be an integer, or a list of one for each of the {depth} blocks")
        self.r, self.proportional = [r] * depth if isinstance(r, Integral) else list(r), proportional
        if len(self.r) != depth:
            raise ValueError(f"r has {len(self.r)} entries for {depth} blocks; give one for each, or one for all")
        for block, n in zip(model.blocks, self.r, strict=True):
            _check(block, n)
        self.model = model

    @property
    def num_prefix_tokens(self) -> int:
        return self.model.num_prefix_tokens

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.model.patch_size

    @property
    def preprocess(self) -> Preprocess:
        return self.model.preprocess

    @property
    def feature_info(self) -> list[dict[str, int]]:
        return self.model.feature_info

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new, randomly initialised head in place; 0 classes for none."""
        self.model.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations: less memory, more time."""
        self.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside norms and biases."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def steps(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run block by block, for whoever wants to see the tokens merge.

        Args:
            x: images (B, C, H, W).

        Yields:
            after each block, tokens (B, N, D), the number of patches in each (B, N), and the source
            (B, prefix + h · w): which of these tokens each token of the start is in.
        """
        x, grid = self.model.embed(x)
        size, source = None, torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        for block, r in zip(self.model.blocks, self.r, strict=True):
            if self.model.grad_checkpointing and torch.is_grad_enabled():
                x, size, place = checkpoint(_run, block, x, grid, size, r, self.proportional, use_reentrant=False)
            else:
                x, size, place = _run(block, x, grid, size, r, self.proportional)
            source = place.gather(1, source)
            yield x, size, source

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the tokens that are left (B, N, D), prefix tokens first."""
        return self.model.norm(self._last_step(x)[0])

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        x, _, source = self._last_step(x)
        if self.model.global_pool == "avg":  # the mean over the patches, not over what they merged into
            x = unmerge(x, source)
        return self.model.forward_head(self.model.norm(x))

    def _last_step(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for step in self.steps(x):
            last = step
        return last

    def feature_maps(self, x: Tensor, indices: Sequence[int] = (-1,)) -> list[Tensor]:
        """As :meth:`vitcourse.vit.VisionTransformer.feature_maps`: a list of (B, D, h, w), un-merged."""
        model, depth = self.model, len(self.r)
        if not all(-depth <= i < depth for i in indices):
            raise ValueError(f"indices {tuple(indices)} name blocks that do not exist; the model has {depth}")
        rows = -(-x.shape[-2] // model.patch_size[0])
        maps = []
        for tokens, _, source in self.steps(x):
            tokens = unmerge(model.fc_norm(model.norm(tokens)), source)[:, self.num_prefix_tokens :]
            maps.append(rearrange(tokens, "b (h w) d -> b d h w", h=rows))
        return [maps[i] for i in indices]


def merge_tokens(model: VisionTransformer, r: int | Sequence[int], *, proportional: bool = True) -> TokenMerging:
    """Make a trained ViT faster: each block merges its r most alike pairs of tokens (Bolya et al. 2023).

    Prefix tokens are never merged. The model is wrapped, not changed, and its parameters are shared: it may be trained
    on with merging, which the paper does too, then with ``proportional=False``.

    Args:
        model: a ViT with softmax attention.
        r: tokens to remove in each block, or one number for every block; at most half of the patches go at once.
        proportional: attend with :func:`proportional_attention`. The authors' code (facebookresearch/ToMe,
            ``apply_patch``) calls that necessary only for models that were trained without merging, and has it off in
            training, and for models pretrained as masked autoencoders.

    Raises:
        ValueError: a negative r, or a list of another length than the model has blocks.
        TypeError: no VisionTransformer, one that merges already, or one with another token mixer.

    >>> model = VisionTransformer(img_size=28, patch_size=4, in_chans=1, embed_dim=32, depth=3, num_heads=4)
    >>> merged = merge_tokens(model, 8)
    >>> [tokens.shape[1] for tokens, _, _ in merged.steps(torch.randn(1, 1, 28, 28))]
    [42, 34, 26]
    >>> merged.feature_maps(torch.randn(1, 1, 28, 28))[0].shape
    torch.Size([1, 32, 7, 7])
    """
    return TokenMerging(model, r, proportional)
