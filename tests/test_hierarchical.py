"""Swin and Swin V2 against their plain definition, timm, torchvision and the papers' tables."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.swin_transformer import SwinTransformerBlock as TimmBlock
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vitcourse import create_model, list_models, load_weights, save_weights
from vitcourse.hierarchical import (
    V2,
    CosineWindowAttention,
    PatchMerging,
    SwinTransformer,
    WindowAttention,
    relative_position_index,
    resize_bias_table,
    shift_mask,
    window_partition,
    window_reverse,
)
from vitcourse.hierarchical.windows import cached_shift_mask
from vitcourse.vit import VisionTransformer, record_attention

SMALL = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "num_classes": 11}
TWO_STAGES = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5, "window_size": 4}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, at a scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            p.data = 1 + 0.3 * noise
        elif p.ndim > 1 and not name.endswith(("table", "logit_scale")):
            p.data = noise / p[0].numel() ** 0.5
        else:
            p.data = 0.5 * noise
    return model.eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


def pictures(batch: int, height: int, width: int) -> torch.Tensor:
    """Noise on a tint of its own for each image: of plain noise a mean over the map sees little."""
    return torch.randn(batch, 3, height, width) + 3 * torch.randn(batch, 3, 1, 1)


def assert_varies(logits: torch.Tensor) -> None:
    assert (logits[0] - logits[1]).abs().max() > 1e-2 * logits.abs().max()


# --------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("window", [3, (2, 5), (6, 1)])
def test_windows_are_the_slices_of_the_map(window):
    p, q = (window, window) if isinstance(window, int) else window
    x = torch.randn(2, 2 * p, 3 * q, 4)
    windows = window_partition(x, window)
    cut = [x[b, i : i + p, j : j + q] for b in range(2) for i in (0, p) for j in (0, q, 2 * q)]
    assert torch.equal(windows, torch.stack(cut).flatten(1, 2))
    assert torch.equal(window_reverse(windows, window, (2 * p, 3 * q)), x)


def test_relative_position_index_numbers_the_distances():
    p, q = 3, 4
    index = relative_position_index((p, q))
    tokens = [(y, x) for y in range(p) for x in range(q)]
    for n, (y, x) in enumerate(tokens):
        for m, (v, u) in enumerate(tokens):
            assert index[n, m] == (y - v + p - 1) * (2 * q - 1) + (x - u + q - 1)


@pytest.mark.parametrize("size", [(14, 21), (15, 10), (7, 8)])
def test_shift_mask_is_timms(size):
    block = TimmBlock(16, (64, 64), num_heads=2, window_size=7, shift_size=3)
    padded = torch.zeros(1, *(math.ceil(n / 7) * 7 for n in size), 16)
    assert torch.equal(shift_mask(size, (7, 7), (3, 3)), block.get_attn_mask(padded) != 0)


def test_shift_mask_of_padding_lets_nobody_look_at_nothing():
    mask = shift_mask((5, 9), (4, 4), (2, 2), mask_padding=True)
    assert mask.shape == (6, 16, 16)
    assert not mask.diagonal(dim1=1, dim2=2).any()
    assert torch.equal(mask, mask.mT)


def test_tables_are_made_once_per_size_and_device():
    like = torch.zeros(1)
    arguments = ((20, 12), (4, 4), (2, 2), False)
    with torch.inference_mode():
        first = cached_shift_mask(*arguments, like=like)
    assert cached_shift_mask(*arguments, like=like) is first
    assert not first.is_inference()
    assert cached_shift_mask(*arguments, like=like.to("meta")).device.type == "meta"
    assert cached_shift_mask((20, 16), *arguments[1:], like=like).shape[0] == 20


def test_a_tracers_stand_in_is_not_remembered():
    model = SwinTransformer(img_size=36, **TWO_STAGES)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(torch.zeros(1, 3, 36, 52)))
    assert model(torch.zeros(1, 3, 36, 52)).isfinite().all()


# ------------------------------------------------------------------------------------------- the plain definition


def plain_bias(mixer: WindowAttention, dy: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
    """Bias (tokens, heads) at distances query − key."""
    p, q = mixer.window_size
    if isinstance(mixer, CosineWindowAttention):
        scaled = torch.stack([8 * dy / (p - 1), 8 * dx / (q - 1)], dim=-1)
        return 16 * mixer.cpb_mlp(scaled.sign() * torch.log2(scaled.abs() + 1) / math.log2(8)).sigmoid()
    table = mixer.relative_position_bias_table.view(2 * p - 1, 2 * q - 1, -1)
    return table[(dy + p - 1).long(), (dx + q - 1).long()]


def plain_window_attention(mixer: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """Token by token: cut the plane at shift + k · window, and attend to whoever lies in the same piece."""
    h, w, dim = x.shape
    heads = mixer.num_heads
    cosine = isinstance(mixer, CosineWindowAttention)
    qkv = mixer.qkv(x).flatten(0, 1)
    if cosine:
        qkv = qkv + torch.cat([mixer.q_bias, 0 * mixer.q_bias, mixer.v_bias])
    q, k, v = (t.view(h * w, heads, dim // heads) for t in qkv.chunk(3, dim=-1))
    (p, r), (s, t) = mixer.window_size, mixer.shift_size
    s, t = s if h > p else 0, t if w > r else 0
    ys, xs = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    out = torch.empty(h * w, heads, dim // heads, dtype=x.dtype)
    for n in range(h * w):
        mates = [
            m for m in range(h * w) if (ys[m] - s) // p == (ys[n] - s) // p and (xs[m] - t) // r == (xs[n] - t) // r
        ]
        if cosine:
            similarity = F.cosine_similarity(q[n], k[mates], dim=-1)  # (mates, heads)
            scores = similarity * mixer.logit_scale.flatten().clamp(max=math.log(100)).exp()
        else:
            scores = (q[n] * k[mates]).sum(-1) / (dim // heads) ** 0.5
        bias = plain_bias(mixer, (ys[n] - ys[mates]).to(x.dtype), (xs[n] - xs[mates]).to(x.dtype))
        out[n] = ((scores + bias).softmax(dim=0)[:, :, None] * v[mates]).sum(0)
    return mixer.proj(out.flatten(1)).view(h, w, dim)


@pytest.mark.parametrize("layer", [WindowAttention, CosineWindowAttention])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((8, 12), 4, 2),  # nothing to pad
        ((9, 7), 4, 0),
        ((9, 7), 4, 2),
        ((10, 5), (3, 4), (1, 2)),
        ((3, 11), 4, 2),  # fits into one window along one axis
        ((4, 4), 4, 2),
        ((2, 3), 5, 2),
    ],
)
def test_masked_windows_are_the_plain_definition(layer, size, window, shift):
    mixer = layer(12, num_heads=3, window_size=window, shift_size=shift, mask_padding=True).double()
    randomise(mixer).double()
    if layer is CosineWindowAttention:
        mixer.logit_scale.data[0] = 6.0  # beyond the clamp
    x = torch.randn(2, *size, 12, dtype=torch.double, requires_grad=True)
    ours = mixer(x.flatten(1, 2), (*size, 0)).unflatten(1, size)
    plain = torch.stack([plain_window_attention(mixer, image) for image in x])
    tolerance = 1e-12 if layer is WindowAttention else 1e-6  # the log-spaced offsets are float32
    assert_close(ours, plain, tolerance)
    target = torch.randn_like(plain)
    ours_grad, plain_grad = (torch.autograd.grad((y * target).sum(), x)[0] for y in (ours, plain))
    assert_close(ours_grad, plain_grad, tolerance)


def test_masking_changes_only_what_is_padded():
    plain, masked = (
        randomise(WindowAttention(12, num_heads=3, window_size=4, shift_size=2, mask_padding=m)) for m in (False, True)
    )
    even, odd = torch.randn(1, 8 * 12, 12), torch.randn(1, 9 * 7, 12)
    assert torch.equal(plain(even, (8, 12, 0)), masked(even, (8, 12, 0)))
    assert (plain(odd, (9, 7, 0)) - masked(odd, (9, 7, 0))).abs().max() > 1e-2


def test_shrunk_windows_equal_masked_large_ones():
    large = randomise(SwinTransformer(img_size=224, mask_padding=True, **SMALL))
    small = load_weights(SwinTransformer(img_size=128, mask_padding=True, **SMALL), large).eval()
    assert small.layers[3].blocks[0].attn.window_size == (4, 4)
    images = torch.randn(2, 3, 128, 128)
    assert_close(small(images), large(images))


# ----------------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize("build", [224, (96, 160)])
@torch.no_grad()
def test_small_swin_is_timms_at_any_size(build):
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=build, strict_img_size=False, window_size=7, **SMALL
    )
    ours = SwinTransformer(img_size=build, **SMALL).eval()
    ours.load_state_dict(randomise(theirs).state_dict())
    for size in [(224, 224), (96, 160), (200, 236), (100, 60), (28, 32)]:
        images = pictures(2, *size)
        logits = theirs(images)
        assert_varies(logits)
        assert_close(ours(images), logits)
        expected = theirs.forward_intermediates(images, norm=True, intermediates_only=True)
        for ours_map, theirs_map in zip(ours.feature_maps(images), expected, strict=True):
            assert_close(ours_map, theirs_map)


@torch.no_grad()
def test_small_swin_v2_is_timms_at_any_size():
    theirs = timm.create_model("swinv2_tiny_window8_256", img_size=128, strict_img_size=False, window_size=8, **SMALL)
    ours = SwinTransformer(img_size=128, window_size=8, **SMALL, **V2).eval()
    ours.load_state_dict(randomise(theirs).state_dict())
    for size in [(128, 128), (200, 236), (28, 32)]:
        images = pictures(2, *size)
        assert_varies(theirs(images))
        assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(("name", "side"), [("swin_tiny_patch4_window7_224", 224), ("swinv2_tiny_window8_256", 256)])
@torch.no_grad()
def test_full_size_logits_are_timms(name, side):
    theirs = randomise(timm.create_model(name))
    ours = create_model(name).eval()
    ours.load_state_dict(theirs.state_dict())
    images = pictures(2, side, side)
    logits = theirs(images)
    assert_varies(logits)
    assert_close(ours(images), logits)


@pytest.mark.parametrize("version", [1, 2])
def test_gradients_are_timms(version):
    name, extra = ("swin_tiny_patch4_window7_224", {}) if version == 1 else ("swinv2_tiny_window8_256", V2)
    theirs = timm.create_model(name, img_size=72, strict_img_size=False, drop_path_rate=0.0, **TWO_STAGES)
    ours = SwinTransformer(img_size=72, **TWO_STAGES, **extra)
    ours.load_state_dict(randomise(theirs).state_dict())
    images, target = torch.randn(2, 3, 72, 60), torch.randn(2, 5)
    for model in (ours, theirs):
        (model(images) * target).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert expected[name].grad.abs().max() > 0, name
        assert_close(parameter.grad, expected[name].grad, 1e-4)


@torch.no_grad()
def test_torchvisions_swin_t_loads_strictly():
    theirs = randomise(torchvision.models.swin_t())
    ours = load_weights(create_model("swin_tiny"), theirs).eval()
    images = pictures(2, 224, 224)
    assert_varies(theirs(images))
    assert_close(ours(images), theirs(images))


@torch.no_grad()
def test_torchvisions_swin_v2_loads_strictly():
    tv = torchvision.models.swin_transformer
    theirs = tv.SwinTransformer(
        [4, 4],
        16,
        [2, 2],
        [2, 4],
        [4, 4],
        num_classes=5,
        block=tv.SwinTransformerBlockV2,
        downsample_layer=tv.PatchMergingV2,
    )
    ours = load_weights(SwinTransformer(img_size=64, **TWO_STAGES, **V2), randomise(theirs)).eval()
    images = pictures(2, 64, 64)
    assert_varies(theirs(images))
    assert_close(ours(images), theirs(images))


def test_the_authors_checkpoints_load():
    model = SwinTransformer(img_size=32, **TWO_STAGES)
    state = {name.replace("head.fc.", "head."): tensor for name, tensor in model.state_dict().items()}
    state = {name.replace("layers.1.downsample", "layers.0.downsample"): tensor for name, tensor in state.items()}
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    other = load_weights(randomise(SwinTransformer(img_size=32, **TWO_STAGES)), state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_bias_tables_for_other_windows():
    table = torch.randn(49, 3)  # of a 4 × 4 window
    grid = table.view(7, 7, 3)
    assert resize_bias_table(table, (4, 4)) is table
    assert torch.equal(resize_bias_table(table, (3, 2)), grid[1:-1, 2:-2].reshape(-1, 3))
    wide = F.interpolate(grid.permute(2, 0, 1)[None], (11, 11), mode="bicubic")[0].permute(1, 2, 0)
    assert_close(resize_bias_table(table, (6, 6)), wide.reshape(-1, 3))
    assert_close(resize_bias_table(table.expand(49, 3) * 0 + 2, (6, 3)), torch.full((55, 3), 2.0))


# -------------------------------------------------------------------------------------------------- papers' tables


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [  # Liu et al. 2021, table 1
        ("swin_tiny_patch4_window7_224", 28.288_354, 4.49),
        ("swin_small_patch4_window7_224", 49.606_258, 8.7),
        ("swin_base_patch4_window7_224", 87.768_224, 15.4),
        ("swin_base_patch4_window12_384", 87.904_0, 47.0),
        ("swin_large_patch4_window7_224", 196.532_476, 34.5),
        ("swin_large_patch4_window12_384", 196.735_5, 103.9),
        ("swinv2_tiny_window8_256", 28.347_154, 5.9),  # the authors' table of models
    ],
)
def test_parameters_and_macs(name, params, gmacs):
    with torch.device("meta"):
        model = create_model(name)
        images = torch.zeros(1, 3, *model.img_size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=1e-3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.01)


# ------------------------------------------------------------------------------------------------------ contracts


def test_outputs_of_a_backbone():
    model = SwinTransformer(img_size=64, **SMALL)
    images = torch.randn(2, 3, 61, 90)  # not even a multiple of the patch
    assert model(images).shape == (2, 11)
    assert model.forward_features(images).shape == (2, 2, 3, 128)
    assert model.num_prefix_tokens == 0
    maps = model.feature_maps(images)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 16, 23), (2, 32, 8, 12), (2, 64, 4, 6), (2, 128, 2, 3)]
    assert [(i["num_chs"], i["reduction"]) for i in model.feature_info] == [(16, 4), (32, 8), (64, 16), (128, 32)]
    assert torch.equal(maps[-1], model.forward_features(images).permute(0, 3, 1, 2))
    last, second = model.feature_maps(images, (-1, 1))
    assert torch.equal(last, maps[3]) and torch.equal(second, maps[1])


def test_heads():
    images = torch.randn(2, 3, 32, 32)
    model = SwinTransformer(img_size=32, **TWO_STAGES).double()
    model.reset_classifier(7)
    assert model(images.double()).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    features = model.forward_features(images.double())
    assert torch.equal(model(images.double()), features.mean((1, 2)))
    most = SwinTransformer(img_size=32, **{**TWO_STAGES, "num_classes": 0}, global_pool="max").double()
    most.load_state_dict(model.state_dict())
    assert torch.equal(most(images.double()), features.amax((1, 2)))


def test_windows_follow_the_image_size():
    model = SwinTransformer(img_size=(96, 224), **SMALL)
    attns = [[block.attn for block in stage.blocks] for stage in model.layers]
    assert [[a.window_size for a in stage] for stage in attns] == [
        [(7, 7)] * 2,
        [(7, 7)] * 2,
        [(6, 7)] * 2,
        [(3, 7)] * 2,
    ]
    assert [[a.shift_size for a in stage] for stage in attns] == [
        [(0, 0), (3, 3)],
        [(0, 0), (3, 3)],
        [(0, 0), (0, 3)],
        [(0, 0), (0, 0)],
    ]


def test_no_weight_decay_names_the_position_parameters():
    swin = SwinTransformer(img_size=32, **TWO_STAGES)
    assert swin.no_weight_decay() == {
        f"layers.{i}.blocks.{j}.attn.relative_position_bias_table" for i in range(2) for j in range(2)
    }
    v2 = SwinTransformer(img_size=32, **TWO_STAGES, **V2).no_weight_decay()
    assert {name.split(".attn.")[1] for name in v2} == {
        "logit_scale",
        *(f"cpb_mlp.{n}" for n in ("0.weight", "0.bias", "2.weight")),
    }


def test_v2_blocks_start_as_the_identity():
    block = SwinTransformer(img_size=32, **TWO_STAGES, **V2).layers[0].blocks[1]
    x = torch.randn(2, 64, 16)
    assert torch.equal(block(x, (8, 8, 0)), x)


def test_patch_merging_takes_its_neighbours():
    merge = PatchMerging(2)
    x = torch.randn(1, 3, 4, 2)
    merged = merge.gather(x)
    assert torch.equal(merged[0, 0, 1], torch.cat([x[0, 0, 2], x[0, 1, 2], x[0, 0, 3], x[0, 1, 3]]))
    assert torch.equal(merged[0, 1, 0, 2:4], torch.zeros(2))  # below the border


def test_drop_path_grows_with_depth_and_rests_in_eval():
    model = SwinTransformer(img_size=32, **TWO_STAGES, drop_path_rate=0.6)
    rates = [getattr(block.drop_path, "p", 0.0) for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6])
    images = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_grad_checkpointing_changes_no_gradient():
    model = SwinTransformer(img_size=32, **TWO_STAGES)
    images = torch.randn(2, 3, 40, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("extra", [{}, V2], ids=["v1", "v2"])
@torch.no_grad()
def test_attention_can_be_recorded(extra):
    model = randomise(SwinTransformer(img_size=32, **TWO_STAGES, **extra))
    images = torch.randn(2, 3, 32, 32)
    with record_attention(model) as weights:
        recorded = model(images)
    assert_close(recorded, model(images))
    assert [tuple(w.shape) for w in weights] == [(8, 2, 16, 16), (8, 2, 16, 16), (2, 4, 16, 16), (2, 4, 16, 16)]
    for w in weights:
        assert_close(w.sum(-1), torch.ones(w.shape[:-1]))
    hidden = shift_mask((8, 8), (4, 4), (2, 2)).repeat(2, 1, 1)[:, None].expand_as(weights[1])
    assert (weights[1][hidden] == 0).all() and (weights[1][~hidden] > 0).all()


@pytest.mark.parametrize("extra", [{}, V2], ids=["v1", "v2"])
def test_backends_agree(extra):
    model = randomise(SwinTransformer(img_size=36, **TWO_STAGES, **extra))
    images, logits = torch.randn(2, 3, 36, 52), []
    for backend in ("math", "sdpa"):
        for stage in model.layers:
            for block in stage.blocks:
                block.attn.backend = backend
        logits.append(model(images))
    assert_close(*logits)


def test_windows_are_a_token_mixer_of_vit():
    model = VisionTransformer(
        32, 4, embed_dim=32, depth=2, num_heads=4, class_token=False, global_pool="avg", attn_layer=WindowAttention
    )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 1000)
    with pytest.raises(ValueError, match="1 prefix tokens; build the model with class_token=False"):
        VisionTransformer(32, 4, embed_dim=32, depth=1, num_heads=4, attn_layer=WindowAttention)(
            torch.zeros(1, 3, 32, 32)
        )


@pytest.mark.parametrize("mask_padding", [False, True])
def test_bfloat16_is_finite(mask_padding):
    model = randomise(SwinTransformer(img_size=36, mask_padding=mask_padding, **TWO_STAGES))
    images = torch.randn(2, 3, 36, 52)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    mixed.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert_close(mixed.float(), model(images), 0.05)
    assert_close(model.bfloat16()(images.bfloat16()).float(), mixed.float(), 0.1)


ONE_STAGE = {**TWO_STAGES, "depths": (2,), "num_heads": (2,)}


@pytest.mark.parametrize(("extra", "mask_padding"), [({}, False), (V2, True)], ids=["v1", "v2"])
def test_compiles_to_one_graph_for_any_batch(extra, mask_padding):
    model = randomise(SwinTransformer(img_size=36, mask_padding=mask_padding, **ONE_STAGE, **extra))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (2, 3):
        images = torch.randn(batch, 3, 36, 52)
        torch._dynamo.mark_dynamic(images, 0)
        gradients = []
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            for run in (model, compiled):
                logits = run(images)
                gradients.append(torch.autograd.grad(logits.square().sum(), list(model.parameters())))
        assert_close(logits, model(images))
        for eager, traced in zip(*gradients, strict=True):
            assert_close(traced, eager, 1e-4)


@pytest.mark.parametrize("extra", [{}, V2], ids=["v1", "v2"])
@torch.no_grad()
def test_exports_with_a_dynamic_batch(extra):
    model = randomise(SwinTransformer(img_size=36, **{**TWO_STAGES, "depths": (2, 1)}, **extra))
    dynamic = ({0: torch.export.Dim("batch", max=64)},)
    program = torch.export.export(model, (torch.randn(2, 3, 36, 52),), dynamic_shapes=dynamic).module()
    for batch in (1, 5):
        images = torch.randn(batch, 3, 36, 52)
        assert_close(program(images), model(images))


def test_registered_names(tmp_path):
    names = list_models("swin*")
    for name in names:
        if "_window" in name:
            assert name in timm.list_models(), name
    assert {"swin_tiny", "swin_small", "swin_base", "swin_large", "swin_large_patch4_window12_384"} <= set(names)
    model = create_model("swin_tiny", img_size=32, window_size=4, embed_dim=8, num_heads=(1, 1, 2, 2), num_classes=3)
    assert model.preprocess.img_size == 32 and model.preprocess.crop_pct == 0.9
    save_weights(model, tmp_path / "swin.safetensors")
    again = create_model(tmp_path / "swin.safetensors").eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(images), model.eval()(images))


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_size": 0}, "window_size 0 must be a positive integer"),
        ({"window_size": (4, -1)}, r"window_size \(4, -1\) must be"),
        ({"embed_dim": 15}, "stage 0 is 15 wide .* num_heads 2 does not divide; change embed_dim or num_heads"),
        ({"num_heads": (2, 3)}, "stage 1 is 32 wide .* num_heads 3 does not divide"),
        ({"depths": (2, 2, 2)}, r"depths \(2, 2, 2\) and num_heads \(2, 4\) need one positive number for each stage"),
        ({"depths": (2, 0)}, "need one positive number for each stage"),
        ({"global_pool": "token"}, "global_pool 'token' is unknown; use 'avg' or 'max'"),
        ({"img_size": -224}, "img_size -224 must be a positive integer"),
        ({"drop_path_rate": 1.5}, "drop path probability .* outside"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SwinTransformer(**{"img_size": 32, **TWO_STAGES, **arguments})


def test_misspelt_argument():
    with pytest.raises(TypeError, match="no argument 'windowsize'; did you mean 'window_size'"):
        create_model("swin_tiny", windowsize=4)


def test_bad_images():
    model = SwinTransformer(img_size=32, **TWO_STAGES)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got shape \(3, 32, 32\)"):
        model(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got shape \(1, 1, 32, 32\)"):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(TypeError, match=r"images must be floating point, got torch.uint8; scale to \[0, 1\]"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"indices \(2,\) name stages that do not exist; the model has 2"):
        model.feature_maps(torch.zeros(1, 3, 32, 32), (2,))


def test_bad_windows():
    with pytest.raises(ValueError, match="dim 30 is not divisible by num_heads 4"):
        WindowAttention(30, num_heads=4)
    with pytest.raises(ValueError, match="shift_size 7 must be at least 0 and less than window_size 7"):
        WindowAttention(32, num_heads=4, shift_size=7)
    with pytest.raises(ValueError, match="a map of 8×9 does not divide into windows of 4×4; pad it first"):
        window_partition(torch.zeros(1, 8, 9, 2), 4)
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, C\), got shape \(8, 8, 2\)"):
        window_partition(torch.zeros(8, 8, 2), 4)
    with pytest.raises(ValueError, match=r"windows of shape \(3, 16, 2\) are not \(B · 4, 16, C\)"):
        window_reverse(torch.zeros(3, 16, 2), 4, (8, 8))
