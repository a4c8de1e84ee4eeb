"""Linear, random-feature and sparse attention against their plain definitions; token merging against plain loops."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from vitcourse import create_model
from vitcourse.efficient_attention import (
    BigBirdAttention,
    LinearAttention,
    LocalAttention,
    MergingBlock,
    RandomBlockAttention,
    RandomFeatureAttention,
    TwoSoftmaxAttention,
    bipartite_matching,
    block_layout,
    elu_features,
    layout_mask,
    linear_attention,
    local_layout,
    log_positive_features,
    merge,
    merge_tokens,
    neighbourhood_mask,
    orthogonal_projection,
    proportional_attention,
    random_feature_attention,
    redraw_features,
    sparse,
    sparse_attention,
    tables,
    two_softmax_attention,
    unmerge,
)
from vitcourse.layers import attention_weights
from vitcourse.train import TrainConfig, fit
from vitcourse.train.optim import param_groups
from vitcourse.vit import Attention, Block, VisionTransformer, record_attention

SPARSE = {
    "local": partial(LocalAttention, window_size=3, block_size=3),
    "random": partial(RandomBlockAttention, block_size=2, num_random=2),
    "bigbird": partial(BigBirdAttention, block_size=2, num_random=1),
}
LINEAR = {
    "elu": LinearAttention,
    "softmaxes": TwoSoftmaxAttention,
    "random features": partial(RandomFeatureAttention, num_features=24),
}
MIXERS = LINEAR | SPARSE
EACH = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
EACH_SPARSE = pytest.mark.parametrize("mixer", SPARSE.values(), ids=SPARSE)
GRIDS = [(4, 6, 0), (5, 7, 1), (1, 9, 2), (7, 2, 3)]  # some divide into no blocks, some have a single row
SMALL = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 5, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def compile_anew():
    torch._dynamo.reset()


def qkv(tokens, batch=2, heads=3, width=4, dtype=torch.float64, scale=1.0):
    q, k, v = torch.randn(3, batch, heads, tokens, width, dtype=dtype)
    return scale * q, scale * k, v


def dense(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def assert_close(got, expected, tolerance=1e-12):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def tokens_of(grid):
    return grid[0] * grid[1] + grid[2]


# ------------------------------------------------------------------------------------------------------------ linear


def test_linear_attention_is_its_matrix():
    q, k, v = qkv(11)
    q, k = q.abs(), k.abs()[:, :, :7]
    weights = torch.einsum("bhnm,bhkm->bhnk", q, k)
    expected = torch.einsum("bhnk,bhkd->bhnd", weights / weights.sum(-1, keepdim=True), v[:, :, :7])
    assert_close(linear_attention(q, k, v[:, :, :7]), expected)


def test_elu_features_never_become_zero():
    x = torch.linspace(-90, 5, 200)
    assert (elu_features(x) > 0).all()
    assert_close(elu_features(x.double()), F.elu(x.double()) + 1)
    steep = torch.tensor([1e4, -50.0, -1e4], requires_grad=True)
    elu_features(steep).sum().backward()
    assert_close(steep.grad, torch.tensor([1.0, math.exp(-50), 0.0]), 1e-5)


def test_two_softmax_attention_is_its_matrix():
    q, k, v = qkv(9)
    weights = q.softmax(-1) @ k.softmax(-2).mT
    assert_close(weights.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))
    assert_close(two_softmax_attention(q, k, v), weights @ v)


def test_random_features_are_the_papers():
    """The estimator of lemma 1, with no stabilisation: exp(w·x − |x|²/2) / √m."""
    q, k, v = qkv(6, width=5)
    projection = orthogonal_projection(13, 5).double()

    def phi(x):
        x = x * 5**-0.25
        return torch.exp(torch.einsum("bhnd,md->bhnm", x, projection) - (x * x).sum(-1, keepdim=True) / 2) / 13**0.5

    weights = phi(q) @ phi(k).mT
    assert_close(random_feature_attention(q, k, v, projection), weights / weights.sum(-1, keepdim=True) @ v)


def test_random_features_are_unbiased():
    """The mean of φ(x)·φ(y) over 2 000 draws of a group is exp(x·y), as far as its own spread lets it tell."""
    x, y = torch.tensor([[0.9, -0.4, 0.3]]).double(), torch.tensor([[-0.5, 0.2, 0.8]]).double()
    generator = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(2000):
        w = orthogonal_projection(3, 3, generator).double()
        estimates.append((log_positive_features(x, w).exp() * log_positive_features(y, w).exp()).sum().item())
    error = np.mean(estimates) - math.exp((x * y).sum())
    assert abs(error) <= 3.5 * np.std(estimates) / len(estimates) ** 0.5
    assert np.std(estimates) / len(estimates) ** 0.5 < 0.03  # else the line above could hardly fail


def test_directions_are_uniform():
    """Of a plain QR decomposition the first entry of the first direction has always the same sign."""
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([orthogonal_projection(4, 4, generator) for _ in range(400)])  # (400, 4, 4)
    assert first.mean(0).abs().max() <= 4 / 400**0.5
    assert abs(first.square().sum(-1).mean().item() - 4) <= 0.3  # the lengths of normal vectors of four numbers
    assert first.square().sum(-1).std() > 1
    assert len({len(orthogonal_projection(m, 4)) for m in (1, 4, 6, 9)} ^ {1, 4, 6, 9}) == 0


def test_error_of_random_features_falls_as_one_over_root_m():
    q, k, v = qkv(20, batch=1, heads=1, width=8, scale=0.3)  # for longer vectors this begins at much larger m only
    exact = dense(q, k, v, None)
    counts, errors = [16, 64, 256, 1024], []
    for m in counts:
        draws = [random_feature_attention(q, k, v, orthogonal_projection(m, 8).double()) for _ in range(25)]
        errors.append((torch.stack(draws) - exact).square().mean().sqrt().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.6 <= slope <= -0.4
    assert errors[-1] <= 0.01


def test_orthogonal_features_vary_less_than_independent_ones():
    q, k, v = qkv(20, batch=1, heads=1, width=8, scale=0.3)
    exact = dense(q, k, v, None)
    errors = {}
    for name, draw in {"orthogonal": orthogonal_projection, "independent": torch.randn}.items():
        draws = [random_feature_attention(q, k, v, draw(8, 8).double()) for _ in range(200)]
        errors[name] = (torch.stack(draws) - exact).square().mean()
    assert errors["orthogonal"] <= 0.95 * errors["independent"]


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_random_features_of_long_vectors_stay_finite(size):
    """Unstabilised, exp(Wx − |x|²/2) is zero for all features here, and 0/0 follows."""
    q, k, v = qkv(12, dtype=torch.float32, scale=size)
    q.requires_grad_()
    out = random_feature_attention(q, k, v, orthogonal_projection(16, 4))
    assert out.isfinite().all() and out.abs().max() <= v.abs().max() * 1.001
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


def test_redrawing_changes_all_features_and_can_be_repeated():
    model = VisionTransformer(**SMALL, attn_layer=LINEAR["random features"])
    before = [block.attn.projection.clone() for block in model.blocks]
    redraw_features(model, torch.Generator().manual_seed(3))
    after = [block.attn.projection.clone() for block in model.blocks]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(*after)
    redraw_features(model, torch.Generator().manual_seed(3))
    assert torch.equal(model.blocks[1].attn.projection, after[1])


def test_random_features_are_saved_with_the_weights():
    model, other = (VisionTransformer(**SMALL, attn_layer=LINEAR["random features"]) for _ in range(2))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.blocks[1].attn.projection, model.blocks[1].attn.projection)


def test_default_number_of_features_is_the_papers_order():
    assert RandomFeatureAttention(128, 2).projection.shape == (math.ceil(64 * math.log(64)), 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixer", LINEAR.values(), ids=LINEAR)
def test_sums_over_many_tokens_fit_half_precision(mixer, dtype):
    """4 096 tokens whose features sum to more than 65 504, the largest number of float16."""
    attend = mixer(32, 2)
    q, k, v = (t.to(dtype) for t in qkv(4096, batch=1, heads=2, width=16, dtype=torch.float32))
    q, k = q + 8, k + 8
    assert (elu_features(k) * elu_features(q[:, :, :1])).sum() > 65504
    with torch.autocast("cpu", dtype):
        out = attend.mix(q, k, v, None)
    assert out.dtype == dtype
    exact = attend.double().mix(q.double(), k.double(), v.double(), None)
    step = torch.finfo(dtype).eps
    assert (out.double() - exact).abs().max() <= step * exact.abs().max()


# ------------------------------------------------------------------------------------------------------------ sparse


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("window", "block"), [(3, 3), (5, 2), (1, 4), (9, 3)])
def test_local_attention_is_masked_attention(grid, window, block):
    q, k, v = qkv(tokens_of(grid))
    mask = neighbourhood_mask(grid, window)
    layout = local_layout(grid, window, block)
    assert torch.equal(layout_mask(layout), mask)
    assert_close(sparse_attention(q, k, v, layout), dense(q, k, v, mask))


def test_neighbourhood_is_what_it_is_called():
    grid = h, w, prefix = 4, 5, 2
    mask = neighbourhood_mask(grid, 3)
    for query in range(tokens_of(grid)):
        for key in range(tokens_of(grid)):
            (y, x), (v, u) = divmod(query - prefix, w), divmod(key - prefix, w)
            near = abs(y - v) <= 1 and abs(x - u) <= 1
            assert mask[query, key] == (query < prefix or key < prefix or near)
    assert h * w + prefix == len(mask)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("block", "radius", "random"), [(2, 0, 2), (2, 1, 1), (3, 1, 0), (1, 1, 3)])
def test_block_attention_is_masked_attention(grid, block, radius, random):
    q, k, v = qkv(tokens_of(grid))
    layout = block_layout(grid, block, radius, random, seed=5)
    mask = layout_mask(layout)
    assert_close(sparse_attention(q, k, v, layout), dense(q, k, v, mask))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("block", "radius", "random"), [(2, 0, 2), (2, 1, 1), (1, 1, 3)])
def test_blocks_see_their_neighbours_and_as_many_others_as_asked_for(grid, block, radius, random):
    h, w, prefix = grid
    mask = layout_mask(block_layout(grid, block, radius, random, seed=5))
    assert mask[:prefix].all() and mask[:, :prefix].all()
    rows, columns = -(-h // block), -(-w // block)
    home = [(i // w // block) * columns + i % w // block for i in range(h * w)]
    seen = torch.zeros(rows * columns, rows * columns, dtype=torch.bool)
    for query in range(h * w):
        for key in range(h * w):
            seen[home[query], home[key]] |= mask[prefix + query, prefix + key]
    for query in range(h * w):  # whole blocks or nothing
        for key in range(h * w):
            assert mask[prefix + query, prefix + key] == seen[home[query], home[key]]
    for i in range(rows * columns):
        near = [
            j
            for j in range(rows * columns)
            if max(abs(i // columns - j // columns), abs(i % columns - j % columns)) <= radius
        ]
        assert seen[i, near].all()
        assert seen[i].sum() == min(len(near) + random, rows * columns)


def test_random_blocks_depend_on_the_seed_alone():
    grid = (8, 8, 1)
    masks = [layout_mask(block_layout(grid, 2, 0, 3, seed)) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@EACH_SPARSE
def test_gradients_are_those_of_masked_attention(mixer):
    grid = (5, 4, 1)
    attend = mixer(12, 3)
    x = [t.requires_grad_() for t in qkv(tokens_of(grid))]
    weight = torch.randn_like(x[0])
    got = torch.autograd.grad((attend.mix(*x, grid) * weight).sum(), x)
    expected = torch.autograd.grad((dense(*x, attend.attention_mask(grid)) * weight).sum(), x)
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, theirs)


@EACH_SPARSE
def test_cost_is_sparse(mixer):
    """Multiply–adds of the mixer without its projections: four times the patches, about four times the work."""
    attend, work = mixer(8, 2), []
    for side in (24, 48):
        q = torch.randn(1, 2, side * side, 4)
        with FlopCounterMode(display=False) as counter:
            attend.mix(q, q, q, (side, side, 0))
        work.append(counter.get_total_flops())
    assert 3.5 <= work[1] / work[0] <= 4.5
    assert work[1] <= 0.05 * 4 * 2 * 2304**2 * 4  # of what all pairs would take


def test_long_sequences_in_pieces(monkeypatch):
    grid = (9, 8, 1)
    q, k, v = qkv(tokens_of(grid))
    layout = local_layout(grid, 3, 2)
    whole = sparse_attention(q, k, v, layout)
    monkeypatch.setattr(sparse, "GATHERED_KEYS", 3 * layout.keys.shape[1])
    assert torch.equal(sparse_attention(q, k, v, layout), whole)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_every_backend(backend):
    grid = (5, 6, 2)
    q, k, v = qkv(tokens_of(grid))
    layout = local_layout(grid, 5, 4)
    assert_close(sparse_attention(q, k, v, layout, backend=backend), dense(q, k, v, neighbourhood_mask(grid, 5)))


def test_tables_are_made_once_for_a_grid_and_no_stand_in_is_kept():
    with FakeTensorMode():
        local_layout((6, 5, 1), 3, 2)
    with torch.inference_mode():
        first = local_layout((6, 5, 1), 3, 2)
    assert not first.hidden.is_inference()
    for a, b in zip(first, local_layout((6, 5, 1), 3, 2), strict=True):
        assert a is b
    assert local_layout((6, 5, 1), 3, 2, torch.device("meta")).keys.device.type == "meta"


@pytest.mark.parametrize("mixer", [SPARSE["local"], SPARSE["random"]], ids=["local", "random"])
def test_tables_of_graphs_make_room_and_come_back(mixer, monkeypatch):
    monkeypatch.setattr(tables, "LIMIT", 2 * tables.PARTS)
    monkeypatch.setattr(tables, "_OF_GRAPHS", SimpleNamespace())
    attend, kept = mixer(8, 2), vars(tables._OF_GRAPHS)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=False)
    for grid in ((3, 5, 0), (4, 2, 1), (2, 7, 0), (3, 5, 0)):  # the first has been pushed out when it is back
        x = torch.randn(2, tokens_of(grid), 8)
        assert_close(compiled(x, grid), attend(x, grid), 1e-5)
        assert len(kept) <= tables.LIMIT
        assert sum(f"({grid}, " in key for key in kept) == tables.PARTS


# ------------------------------------------------------------------------------------------------------- token mixers


@EACH
def test_weights_of_softmax_attention_load(mixer):
    trained = VisionTransformer(**SMALL)
    model = VisionTransformer(**SMALL, attn_layer=mixer)
    assert not any(model.load_state_dict(trained.state_dict(), strict=True))
    assert torch.equal(model.blocks[1].attn.qkv.weight, trained.blocks[1].attn.qkv.weight)


@EACH
def test_a_mixer_is_its_recorded_weights(mixer):
    grid = (5, 6, 2)
    attend, x = mixer(12, 3).double(), torch.randn(2, 32, 12, dtype=torch.float64)
    fast = attend(x, grid)
    with record_attention(attend) as recorded:
        assert_close(attend(x, grid), fast)
    assert_close(recorded[0].sum(-1), torch.ones(2, 3, 32, dtype=torch.float64))
    q, k, v = attend.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    assert_close(attend.proj((recorded[0] @ v).transpose(1, 2).flatten(2)), fast)


def test_a_wide_window_is_plain_attention():
    plain, local = Attention(12, 3).double(), LocalAttention(12, 3, window_size=11, block_size=4).double()
    local.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1 + 6 * 5, 12, dtype=torch.float64)
    assert_close(local(x, (6, 5, 1)), plain(x))


@EACH
def test_gradcheck(mixer):
    grid = (2, 3, 1)
    attend = mixer(4, 2).double()
    x = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attend(x, grid), x)


@EACH
def test_compiled_without_breaks_at_two_sizes(mixer):
    """The second size makes the tracer try symbols for height and width, of which tables cannot be made."""
    attend = mixer(8, 2)

    def mix(image):
        return attend(image.flatten(2).mT, (*image.shape[-2:], 0))

    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    for size in ((4, 5), (3, 7)):
        image = torch.randn(2, 8, *size, requires_grad=True)
        assert_close(compiled(image), mix(image), 1e-5)
    got, expected = (torch.autograd.grad(f(image).square().sum(), image)[0] for f in (compiled, mix))
    assert_close(got, expected, 1e-4)


@EACH
def test_exported_with_a_free_batch(mixer):
    model = VisionTransformer(**SMALL | {"depth": 1}, attn_layer=mixer).eval()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (torch.randn(2, 1, 28, 28),), dynamic_shapes=(batch,))
    x = torch.randn(5, 1, 28, 28)
    assert_close(program.module()(x), model(x), 1e-5)


# ----------------------------------------------------------------------------------------------------- token merging


def plain_matching(metric, r, prefix):
    """One sequence (N, C), with loops, after the paper's text: lists of the old tokens in each new one."""
    alike = lambda a, b: F.cosine_similarity(metric[a], metric[b], dim=0).item()  # noqa: E731
    in_a = [i for i in range(prefix, len(metric)) if i % 2 == 0]
    in_b = [i for i in range(prefix, len(metric)) if i % 2 == 1]
    best = {a: max(in_b, key=lambda b: alike(a, b)) for a in in_a}
    gone = sorted(in_a, key=lambda a: alike(a, best[a]), reverse=True)[:r]
    groups = [[i] for i in range(prefix)] + [[a] for a in in_a if a not in gone]
    return groups + [[b] + [a for a in gone if best[a] == b] for b in in_b]


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
@pytest.mark.parametrize(("patches", "r"), [(10, 3), (10, 5), (11, 4), (9, 1), (2, 1)])
def test_merging_is_that_of_plain_loops(prefix, patches, r):
    n = prefix + patches
    metric, x = torch.randn(3, n, 6), torch.randn(3, n, 4, dtype=torch.float64)
    size = torch.randint(1, 5, (3, n)).double()
    place = bipartite_matching(metric, r, prefix)
    merged, sizes = merge(x, size, place, n - r)
    for b in range(3):
        groups = plain_matching(metric[b], r, prefix)
        assert len(groups) == n - r
        for new, old in enumerate(groups):
            assert place[b, old].eq(new).all()
            assert_close(merged[b, new], torch.stack([size[b, i] * x[b, i] for i in old]).sum(0) / size[b, old].sum())
            assert sizes[b, new] == size[b, old].sum()
    spread = unmerge(merged, place)
    assert_close((spread * size[..., None]).sum(1), (x * size[..., None]).sum(1))


def test_without_a_pair_to_merge_places_follow_the_same_rule():
    """Prefix tokens, then A (the even places of the sequence), then B."""
    assert bipartite_matching(torch.randn(2, 7, 3), 0, 1).tolist() == [[0, 4, 1, 5, 2, 6, 3]] * 2
    assert bipartite_matching(torch.randn(1, 4, 3), 0).tolist() == [[0, 2, 1, 3]]
    assert bipartite_matching(torch.randn(1, 1, 3), 0, 1).tolist() == [[0]]


def test_proportional_attention_counts_a_key_as_often_as_it_has_patches():
    q, k, v = qkv(5)
    size = torch.tensor([[1, 3, 1, 2, 1], [2, 1, 1, 1, 4]])
    for b in range(2):
        k_all, v_all = (t[b : b + 1].repeat_interleave(size[b], dim=2) for t in (k, v))
        got = proportional_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], size[b : b + 1].double())
        assert_close(got, dense(q[b : b + 1], k_all, v_all, None))


def test_without_merging_it_is_the_plain_model():
    model, x = (
        VisionTransformer(**SMALL, init_values=0.5, global_pool="avg").double(),
        torch.randn(3, 1, 28, 20).double(),
    )
    merged = merge_tokens(model, 0)
    assert_close(merged(x), model(x))
    assert_close(merged.feature_maps(x, [0, -1])[0], model.feature_maps(x, [0])[0])
    block = MergingBlock(model.blocks[0], 0)
    tokens, grid = model.embed(x)
    out, size, place = block(tokens, grid)
    assert_close(out, model.blocks[0](tokens, grid))
    assert (size == 1).all() and torch.equal(place[0], torch.arange(36))


def test_merging_alike_tokens_changes_nothing():
    """Every patch has a twin beside it and no positions tell them apart: 24 tokens can go without a trace."""
    model = VisionTransformer(**SMALL, pos_embed="none", class_token=False, global_pool="avg").double()
    half = torch.randn(2, 1, 28, 3, 4).double()
    x = half.repeat_interleave(2, dim=3).flatten(3)  # (2, 1, 28, 24): six columns of patches, in pairs
    merged = merge_tokens(model, [21, 0])
    assert [tokens.shape[1] for tokens, _, _ in merged.steps(x)] == [21, 21]
    assert_close(merged(x), model(x), 1e-10)
    assert_close(merged.feature_maps(x)[0], model.feature_maps(x)[0], 1e-10)


def test_prefix_tokens_stay_alone_and_first():
    model = VisionTransformer(**SMALL | {"depth": 4}, reg_tokens=2)
    with torch.no_grad():
        model.cls_token.normal_()
        model.reg_token.copy_(model.cls_token)  # as alike as can be
    steps = list(merge_tokens(model, 100).steps(torch.randn(2, 1, 28, 28)))
    assert [tokens.shape[1] for tokens, _, _ in steps] == [3 + n for n in (25, 13, 7, 4)]
    for _, size, source in steps:
        assert (size[:, :3] == 1).all() and (size.sum(1) == 52).all()
        assert torch.equal(source[:, :3], torch.arange(3).expand(2, 3)) and (source[:, 3:] >= 3).all()
        for b in range(2):
            assert torch.equal(source[b].bincount().float(), size[b])


def test_features_are_unmerged_to_where_they_came_from():
    model = VisionTransformer(**SMALL)
    merged, x = merge_tokens(model, [9, 4]), torch.randn(2, 1, 28, 36)
    tokens, _, source = list(merged.steps(x))[-1]
    maps = merged.feature_maps(x)[0]
    assert maps.shape == (2, 16, 7, 9)
    for patch in (0, 17, 62):
        token = tokens[1, source[1, 1 + patch]]
        assert_close(maps[1, :, patch // 9, patch % 9], model.norm(token), 1e-5)


def test_gradients_flow_through_merging():
    torch.manual_seed(1)
    block = MergingBlock(Block(4, 2), r=2).double()
    x = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block(x, (2, 3, 1))[0], x)


def test_checkpointing_changes_nothing():
    model, x = VisionTransformer(**SMALL), torch.randn(2, 1, 28, 28)
    merged, gradients = merge_tokens(model, 8), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(merged(x).sum(), model.cls_token)[0])
    assert_close(*gradients, 1e-6)


def test_keys_may_count_once_each():
    """Without proportional attention the sizes are kept for averages alone: the next block attends as ViT's own."""
    model, x = VisionTransformer(**SMALL).double(), torch.randn(2, 1, 28, 28).double()
    (first, size, _), (counted, _, _) = merge_tokens(model, [9, 0]).steps(x)
    (same, _, _), (once, _, _) = merge_tokens(model, [9, 0], proportional=False).steps(x)
    expected = model.blocks[1](first, (7, 7, 1))
    assert torch.equal(same, first) and size.amax() > 1
    assert_close(once, expected)
    assert_close(MergingBlock(model.blocks[1], 0, proportional=False)(first, (7, 7, 1), size)[0], expected)
    assert (counted - expected).abs().max() > 1e-6


def test_merging_records_attention_over_the_tokens_that_are_left():
    merged = merge_tokens(VisionTransformer(**SMALL), 8)
    with record_attention(merged) as weights:
        recorded = merged(x := torch.randn(2, 1, 28, 28))
    assert [w.shape for w in weights] == [(2, 2, 50, 50), (2, 2, 42, 42)]
    assert_close(recorded, merged(x), 1e-5)


def test_merging_compiles_and_exports():
    merged, x = merge_tokens(VisionTransformer(**SMALL | {"depth": 1}).eval(), 8), torch.randn(3, 1, 28, 28)
    expected = merged(x)
    assert_close(torch.compile(merged, fullgraph=True, backend="aot_eager")(x), expected, 1e-5)
    program = torch.export.export(merged, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert_close(program.module()(x[:2]), merged(x[:2]), 1e-5)


def test_hooks_on_blocks_and_in_them_run_as_in_the_plain_model():
    model, x, calls = VisionTransformer(**SMALL).double(), torch.randn(2, 1, 28, 28).double(), []
    for name, part in model.blocks.named_modules():
        part.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, len(args), args[0].shape[:2])))
        part.register_forward_hook(lambda _, args, out, name=name: calls.append((name, len(args), out.shape[:2])))
    plain, merged = model(x), merge_tokens(model, [0, 8])
    expected = calls.copy()
    calls.clear()
    assert_close(merge_tokens(model, 0)(x), plain)
    assert calls == expected and ("0", 2, (2, 50)) in calls and ("1.attn", 2, (2, 50)) in calls
    calls.clear()
    merged(x)
    assert [call[:2] for call in calls] == [call[:2] for call in expected]
    assert calls[-1] == ("1", 2, (2, 42)) and calls[-2][0] == "1.drop_path"


def test_what_a_hook_changes_is_changed_under_merging_too():
    model, x = VisionTransformer(**SMALL).double(), torch.randn(2, 1, 28, 28).double()
    merged, before = merge_tokens(model, 8), merge_tokens(model, 8)(x)
    for part, change in ((model.blocks[0], lambda _, __, out: 2 * out), (model.blocks[1].mlp, lambda _, __, out: -out)):
        hook = part.register_forward_hook(change)
        changed = merged(x)
        hook.remove()
        assert (changed - before).abs().max() > 1e-3
    hook = model.blocks[1].attn.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    assert (merged(x) - before).abs().max() > 1e-3
    hook.remove()
    assert_close(merged(x), before)


def test_a_model_that_merges_is_trained_as_any_other():
    torch.manual_seed(0)
    merged = merge_tokens(VisionTransformer(**SMALL), 8)
    merged.model.no_weight_decay = lambda: {"head.weight"}
    decayed = {id(p) for group in param_groups(merged) if group["weight_decay"] for p in group["params"]}
    assert id(merged.model.blocks[0].mlp.fc1.weight) in decayed and id(merged.model.head.weight) not in decayed
    data = TensorDataset(torch.randn(8, 1, 28, 28), torch.arange(8) % 5)
    config = TrainConfig(epochs=1, batch_size=4, device="cpu", grad_checkpointing=True)
    fit(merged, data, config=config, progress=False)
    assert merged.model.grad_checkpointing
    with torch.no_grad():
        assert merged(torch.zeros(1, 1, 28, 28)).isfinite().all()


@EACH
def test_no_images_give_no_logits(mixer):
    model = VisionTransformer(**SMALL, attn_layer=mixer)
    assert model(torch.zeros(0, 1, 28, 28)).shape == (0, 5)
    assert model.feature_maps(torch.zeros(0, 1, 28, 36))[0].shape == (0, 16, 7, 9)
    with record_attention(model) as weights:
        model(torch.zeros(0, 1, 28, 28))
    assert [w.shape for w in weights] == [(0, 2, 50, 50)] * 2


def test_merging_in_half_precision_keeps_sizes_exact():
    x, size = torch.full((1, 4, 2), 100, dtype=torch.float16), torch.full((1, 4), 3000.0)
    merged, sizes = merge(x, size, torch.zeros(1, 4, dtype=torch.long), 1)
    assert merged.dtype == torch.float16 and (merged == 100).all() and sizes.item() == 12000


def test_the_wrapped_model_shares_weights_and_answers_for_it():
    model = VisionTransformer(**SMALL)
    merged = merge_tokens(model, 4)
    assert merged.feature_info == model.feature_info and merged.num_prefix_tokens == 1 and merged.patch_size == (4, 4)
    assert merge_tokens(create_model("vit_tiny_patch16_224"), 4).preprocess.img_size == 224
    assert [id(p) for p in merged.parameters()] == [id(p) for p in model.parameters()]
    merged.reset_classifier(3)
    assert merged(torch.zeros(1, 1, 28, 28)).shape == (1, 3)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalAttention(8, 2, window_size=4), "window_size 4 must be odd"),
        (lambda: LocalAttention(8, 2, block_size=0), "block_size 0 must be an integer of at least 1"),
        (lambda: RandomBlockAttention(8, 2, num_random=-1), "num_random -1 must be an integer of at least 0"),
        (lambda: BigBirdAttention(8, 2, radius=-1), "radius -1 must be"),
        (lambda: LinearAttention(8, 3), "embed_dim 8 is not divisible by num_heads 3"),
        (lambda: RandomFeatureAttention(8, 2, num_features=0), "num_features 0 must be an integer of at least 1"),
        (lambda: neighbourhood_mask((2, 2, 0), 2), "window_size 2 must be odd"),
        (lambda: local_layout((2, 2, 0), 3, 0), "block_size 0 must be"),
        (lambda: block_layout((2, 2, 0), 2, 0, -1, 0), "num_random -1 must be"),
        (lambda: LocalAttention(8, 2)(torch.zeros(1, 9, 8)), "grid is None"),
        (lambda: LocalAttention(8, 2)(torch.zeros(1, 9, 8), (3, 3, 1)), r"1 \+ 3·3 = 10 tokens, but x has 9"),
        (lambda: sparse_attention(*torch.zeros(3, 1, 1, 5, 4), local_layout((2, 3, 0), 3, 2)), "q has 5 tokens"),
        (
            lambda: random_feature_attention(*torch.zeros(3, 1, 1, 5, 4), torch.zeros(7, 3)),
            r"projection of shape \(7, 3\) does not fit queries of width 4",
        ),
        (lambda: redraw_features(VisionTransformer(**SMALL)), "has no RandomFeatureAttention"),
        (
            lambda: bipartite_matching(torch.zeros(1, 9, 2), 5, 1),
            "r=5 of 8 patches .* from 0 to 4",
        ),
        (lambda: bipartite_matching(torch.zeros(1, 9, 2), -1), "r=-1 of 9"),
        (lambda: merge_tokens(VisionTransformer(**SMALL), -1), "r -1 must be an integer of at least 0"),
        (lambda: merge_tokens(VisionTransformer(**SMALL), 2.0), "r=2.0 must be an integer, or a list"),
        (lambda: merge_tokens(VisionTransformer(**SMALL), [2, 1.5]), "r 1.5 must be an integer"),
        (lambda: bipartite_matching(torch.zeros(1, 9, 2), 2.0), "r=2.0 must be an integer"),
        (lambda: bipartite_matching(torch.zeros(1, 3, 2), 0, 5), "num_prefix_tokens 5 of 3 tokens; .* from 0 to 3"),
        (lambda: RandomFeatureAttention(8, 2, num_features=3.5), "num_features 3.5 must be an integer"),
        (lambda: local_layout((0, 4, 1), 3, 2), r"grid \(0, 4, 1\) needs at least one row"),
        (lambda: block_layout((4, 4, -1), 2, 1, 1, 0), r"grid \(4, 4, -1\) needs"),
        (lambda: sparse_attention(*torch.zeros(3, 1, 1, 8, 4), local_layout((2, 3, 1), 3, 2)), "q has 8 .* 1 prefix"),
        (
            lambda: sparse_attention(*(torch.zeros(1, 1, n, 4) for n in (7, 6, 7)), local_layout((2, 3, 1), 3, 2)),
            "k has 6 tokens, but the layout is for 1 prefix tokens and 6 patches",
        ),
        (
            lambda: random_feature_attention(*(torch.zeros(1, 1, n, 4) for n in (7, 0, 0)), torch.zeros(7, 4)),
            "has no tokens",
        ),
        (lambda: merge_tokens(VisionTransformer(**SMALL), [1, 2, 3]), "r has 3 entries for 2 blocks"),
        (
            lambda: merge_tokens(VisionTransformer(**SMALL), 1).feature_maps(torch.zeros(1, 1, 28, 28), [2]),
            "do not exist",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_softmax_attention_can_be_wrapped():
    with pytest.raises(TypeError, match="cannot wrap LinearAttention; use vitcourse.vit.Attention"):
        merge_tokens(VisionTransformer(**SMALL, attn_layer=LinearAttention), 4)


def test_a_block_that_runs_otherwise_cannot_merge():
    class Parallel(Block):
        def forward(self, x, grid=None):
            return x + self.attn(self.norm1(x), grid) + self.mlp(self.norm2(x))

    with pytest.raises(TypeError, match="takes place within vitcourse.vit.Block, and cannot wrap Parallel"):
        MergingBlock(Parallel(16, 2), 2)


def test_only_a_vision_transformer_that_does_not_merge_yet_can_be_wrapped():
    with pytest.raises(TypeError, match="wraps a VisionTransformer, not a Linear"):
        merge_tokens(torch.nn.Linear(3, 3), 1)
    with pytest.raises(TypeError, match="merges tokens already; wrap its .model"):
        merge_tokens(merge_tokens(VisionTransformer(**SMALL), 1), 1)


def test_sizes_may_be_numpys_and_grids_lists():
    merged, model = (merge_tokens(VisionTransformer(**SMALL), r) for r in (np.int64(2), 2))
    assert merged.r == model.r
    assert local_layout([3, 4, 1], 3, np.int64(2)).queries is local_layout((3, 4, 1), 3, 2).queries


def test_no_token_is_merged_into_the_next_image():
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        merge(torch.randn(2, 3, 2), torch.ones(2, 3), torch.tensor([[0, 0, 2], [0, 1, 1]]), 2)


@EACH
def test_mixers_answer_on_meta(mixer):
    """Shapes and costs can be had without values, also where PyTorch's autocast knows no such device."""
    assert mixer(8, 2).to("meta")(torch.zeros(2, 13, 8, device="meta"), (3, 4, 1)).shape == (2, 13, 8)


def test_a_query_far_below_zero_gets_a_mean():
    q, (k, v) = torch.full((1, 1, 3, 4), -500.0), torch.randn(2, 1, 1, 5, 4)
    out = linear_attention(elu_features(q), elu_features(k), v)
    assert out.isfinite().all() and (out <= v.amax(2, keepdim=True)).all()


def test_weights_that_random_features_stand_for():
    """With many features the recorded weights approach the softmax's."""
    mixer = RandomFeatureAttention(8, 1, num_features=4096).double()
    q, k, _ = qkv(10, heads=1, width=8, scale=0.3)
    assert (mixer.weights(q, k, None) - attention_weights(q, k)).abs().max() <= 0.01
