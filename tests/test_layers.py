"""Attention's one door, the MLP and the regularisers."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from vitcourse.layers import (
    DropPath,
    LayerScale,
    Mlp,
    attention,
    attention_qkvpacked,
    attention_weights,
    dot_product,
    drop_path_rates,
    init_linear,
    masked_mean,
    to_pair,
)
from vitcourse.notices import say_once

BACKENDS = ("math", "sdpa", "flash")  # flash is sdpa where its kernels cannot run


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch):
    """Other tests of this process may have asked for Triton's interpreter, which runs flash on a CPU, too."""
    monkeypatch.setattr("vitcourse.hardware.flash.ops.is_interpreted", lambda: False)
    dot_product._flash_obstacle.cache_clear()
    yield
    dot_product._flash_obstacle.cache_clear()


def qkv(batch=2, heads=3, queries=7, keys=11, dim=8, dim_v=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (queries, dim), (keys, dim), (keys, dim_v)
    return [torch.randn(batch, heads, *shape, generator=generator, dtype=dtype) for shape in shapes]


def by_hand(q, k, v, scale, bias):
    """The equation once more, one query at a time."""
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*[torch.arange(n) for n in q.shape[:3]]).tolist():
        scores = torch.stack([torch.dot(q[b, h, i], key) for key in k[b, h]]) * scale + bias[b, h, i]
        out[b, h, i] = (scores.exp() / scores.exp().sum()) @ v[b, h]
    return out


# -------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_is_the_equation(backend, scale, biased):
    q, k, v = qkv()
    bias = torch.randn(2, 3, 7, 11, dtype=torch.float64) if biased else None
    expected = by_hand(q, k, v, scale or 8**-0.5, torch.zeros(2, 3, 7, 11) if bias is None else bias)
    torch.testing.assert_close(attention(q, k, v, scale=scale, bias=bias, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_broadcasts_and_minus_infinity_hides_a_key(backend):
    q, k, v = qkv()
    bias = torch.zeros(1, 1, 1, 11, dtype=torch.float64)
    bias[..., 4:] = -torch.inf
    seen = attention(q, k[:, :, :4], v[:, :, :4], backend=backend)
    torch.testing.assert_close(attention(q, k, v, bias=bias, backend=backend), seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_q_k_v_and_bias(backend):
    inputs = [t.requires_grad_() for t in qkv(1, 2, 3, 4, 4, 4)]
    inputs.append(torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda q, k, v, b: attention(q, k, v, bias=b, backend=backend), inputs)


MASKS = {
    "pairs": (2, 3, 7, 11),
    "pairs, for all heads": (2, 1, 7, 11),
    "keys": (2, 1, 1, 11),
    "for all images": (7, 11),
}


def some_mask(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_a_mask_hides_keys_in_every_backend(backend, biased, shape):
    q, k, v = qkv()
    mask, bias = some_mask(shape), torch.randn(2, 3, 7, 11, dtype=torch.float64)
    bias = bias if biased else torch.zeros_like(bias)
    expected = by_hand(q, k, v, 8**-0.5, bias.masked_fill(~mask, -torch.inf))
    got = attention(q, k, v, bias=bias if biased else None, mask=mask, backend=backend)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_query_that_may_attend_to_nothing_gets_zero_and_no_nan(backend):
    q, k, v = [t.requires_grad_() for t in qkv()]
    mask = some_mask((2, 3, 7, 11))
    mask[1, :, 4] = False
    out = attention(q, k, v, mask=mask, backend=backend)
    assert (out[1, :, 4] == 0).all() and out.isfinite().all()
    out.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v)) and (q.grad[1, :, 4] == 0).all()


def test_packed_projections_take_masks_too():
    qkv_packed, mask = torch.randn(2, 5, 3, 4, 8), some_mask((2, 4, 5, 5))
    q, k, v = qkv_packed.permute(2, 0, 3, 1, 4)
    for backend in ("auto", *BACKENDS):
        got = attention_qkvpacked(qkv_packed, mask=mask, backend=backend)
        torch.testing.assert_close(got, attention(q, k, v, mask=mask, backend="math"))


def test_masks_that_others_read_otherwise_are_refused():
    q, k, v = qkv()
    with pytest.raises(
        TypeError, match=r"mask is torch.float64; it must be boolean, with True where a query may attend"
    ):
        attention(q, k, v, mask=torch.zeros(7, 11, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"mask \(2, 11\) cannot be broadcast .* for a mask of keys .* mask\[:, None, None\]"
    ):
        attention(q, k, v, mask=torch.ones(2, 11, dtype=torch.bool))


def test_the_mean_of_what_counts():
    x, mask = torch.randn(3, 5, 2), torch.rand(3, 5) < 0.5
    mask[0], mask[1] = True, False
    mean = masked_mean(x, mask)
    torch.testing.assert_close(mean[0], x[0].mean(0))
    assert (mean[1] == 0).all()
    torch.testing.assert_close(mean[2], x[2, mask[2]].mean(0) if mask[2].any() else mean[2] * 0)
    x[~mask] = torch.nan
    assert torch.equal(masked_mean(x, mask), mean)
    assert torch.equal(masked_mean(x[:1], None), x[:1].mean(1))
    with pytest.raises(TypeError, match=r"mask must be boolean \(B, N\) = \(3, 5\), got torch.float32"):
        masked_mean(x, mask.float())
    with pytest.raises(ValueError, match="mask must be boolean"):
        masked_mean(x, mask[:1])


def test_auto_never_fails_where_sdpa_works():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        q, k, v = qkv(dtype=dtype)
        assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_flash_says_once_why_another_backend_is_used(capsys):
    say_once.cache_clear()
    q, k, v = qkv()
    for _ in range(2):
        assert torch.equal(attention(q, k, v, backend="flash"), attention(q, k, v, backend="sdpa"))
    assert capsys.readouterr().err == (
        "vitcourse: attention backend 'flash' needs an NVIDIA GPU, and the tensors are on cpu; using 'sdpa' instead\n"
    )
    attention(q, k, v, backend="auto")
    assert capsys.readouterr().err == "", "nobody asked for flash"


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [
        ((7, 5), True, "needs compute capability 8.0, and Tesla T4 has less"),
        ((8, 0), False, "needs Triton, which is not installed"),
        ((8, 0), True, None),
    ],
)
def test_what_keeps_flash_from_running_on_a_gpu(monkeypatch, capability, triton, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(dot_product, "find_spec", lambda name: object() if triton else None)
    assert dot_product._flash_obstacle.__wrapped__(torch.device("cuda:0")) == reason


def test_asking_for_flash_compiles_to_one_graph():
    q, k, v = qkv()
    say_once.cache_clear()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, backend="flash"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, backend="math"))


def test_attention_weights_are_probabilities():
    q, k, _ = qkv()
    weights = attention_weights(q, k, bias=torch.randn(11, dtype=torch.float64))
    assert weights.shape == (2, 3, 7, 11)
    assert weights.min() > 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))


def test_attention_refuses_what_does_not_fit():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"backend 'flsh' is unknown; use 'auto' or one of"):
        attention(q, k, v, backend="flsh")
    with pytest.raises(ValueError, match=r"must be \(B, H, N, D\), got \(3, 7, 8\)"):
        attention(q[0], k[0], v[0])
    for wrong in ((q[..., :4], k, v), (q, k[:, :, :5], v), (q[:, :2], k, v), (q[:1], k, v)):
        with pytest.raises(ValueError, match="do not fit together"):
            attention(*wrong)
    with pytest.raises(TypeError, match="bias is boolean; pass it as mask"):
        attention(q, k, v, bias=torch.ones(7, 11, dtype=torch.bool))


# --------------------------------------------------------------------------------------------- the MLP, regularisers


def test_mlp_is_timms():
    ours, theirs = Mlp(12, 20, out_dim=7), timm.layers.Mlp(12, 20, 7)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 12)
    assert torch.equal(ours(x), theirs(x))


def test_mlp_drops_after_both_layers():
    mlp = Mlp(16, 64, drop=0.5)
    seen = []
    mlp.drop.register_forward_hook(lambda module, args, out: seen.append((out == 0).float().mean().item()))
    mlp(torch.randn(50, 16))
    assert len(seen) == 2
    assert all(0.4 < zeros < 0.6 for zeros in seen)
    mlp.eval()(torch.randn(50, 16))
    assert seen[2:] == [0, 0]


def test_drop_path_keeps_or_drops_whole_samples_and_the_expectation():
    torch.manual_seed(0)
    x = torch.rand(20_000, 2, 3) + 0.5
    out = DropPath(0.3).train()(x)
    kept = (out != 0).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1))
    torch.testing.assert_close(out[kept.all(1)], x[kept.all(1)] / 0.7)
    assert abs(kept.all(1).float().mean().item() - 0.7) < 4 * (0.3 * 0.7 / 20_000) ** 0.5


def test_drop_path_is_the_identity_in_evaluation_and_at_zero():
    x = torch.randn(4, 3)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0).train()(x) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_drop_path_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=rf"drop path probability {p} is outside \[0, 1\)"):
        DropPath(p)


def test_layer_scale_multiplies_each_channel():
    scale = LayerScale(3, 0.5)
    assert scale.gamma.tolist() == [0.5] * 3
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert scale(torch.ones(1, 2, 3)).tolist() == [[[1, 2, 3], [1, 2, 3]]]


def test_drop_path_rates_grow_from_zero():
    assert drop_path_rates(0.2, 5) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rates(0.2, 1) == [0]


def test_init_linear():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300, bias=False), nn.LayerNorm(300)).apply(init_linear)
    for layer in layers[:2]:
        assert 0.019 < layer.weight.std() < 0.021
    assert not layers[0].bias.any()
    assert torch.equal(layers[2].weight, torch.ones(300))


def test_to_pair():
    assert to_pair(7, "window") == (7, 7)
    assert to_pair([7, 8], "window") == (7, 8)
    for wrong in (0, -1, 7.0, (7,), (7, 8, 9), (7, 0), "16"):
        with pytest.raises(ValueError, match="window .* must be a positive integer or a pair"):
            to_pair(wrong, "window")
