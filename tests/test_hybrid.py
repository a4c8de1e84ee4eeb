"""Conv-ViT and CoAtNet: the parts against their written definitions, the whole against timm and the papers' tables."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitcourse import create_model, list_models, load_weights, save_weights
from vitcourse.hierarchical.windows import relative_position_index
from vitcourse.hybrid import (
    CoAtNet,
    ConvStem,
    MBConv,
    RelativeAttention,
    RelativeBlock,
    SqueezeExcite,
)
from vitcourse.vit import VisionTransformer, record_attention

SMALL = {"stem_dim": 8, "embed_dim": (8, 16, 32, 32), "depths": (1, 2, 2, 1), "head_dim": 8, "num_classes": 5}
LESSON = {**SMALL, "img_size": 28, "in_chans": 1, "stem_stride": 1, "strides": (2, 2, 1, 1)}  # maps of 14 and 7
TINY = {**LESSON, "embed_dim": (8, 16), "depths": (1, 1), "strides": (2, 2), "layout": "CT"}
LAYOUTS = ("CCCC", "CCTT", "TTTT", "TCTC")


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a value of its own: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.5
            tensor.copy_(0.5 + noise if name.endswith("running_var") else scale * (2 * noise - 0.5))
    return model


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gmacs(model: nn.Module, side: int) -> float:
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2e9


def millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


# ------------------------------------------------------------------------------------------------- relative attention


def attention_by_definition(mixer: RelativeAttention, x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Eq. 3 of Dai et al. 2021, one query, one key, one head at a time."""
    H, dim = mixer.num_heads, mixer.proj.in_features
    d = dim // H
    table = mixer.relative_position_bias_table.view(2 * h - 1, 2 * w - 1, H)
    outputs = []
    for tokens in x:
        q, k, v = (tokens @ mixer.qkv.weight.T + mixer.qkv.bias).split(dim, dim=1)
        rows = []
        for i in range(h * w):
            heads = []
            for n in range(H):
                own = slice(n * d, (n + 1) * d)
                scores = torch.stack(
                    [
                        q[i, own] @ k[j, own] / d**0.5 + table[i // w - j // w + h - 1, i % w - j % w + w - 1, n]
                        for j in range(h * w)
                    ]
                )
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(weights[j] * v[j, own] for j in range(h * w)))
            rows.append(torch.cat(heads))
        outputs.append(torch.stack(rows) @ mixer.proj.weight.T + mixer.proj.bias)
    return torch.stack(outputs)


@pytest.mark.parametrize("backend", ["auto", "math", "sdpa"])
def test_relative_attention_is_its_definition(backend):
    h, w = 3, 4
    mixer = RelativeAttention(8, 2, grid_size=(h, w), in_dim=6, backend=backend).double()
    randomise(mixer)
    with torch.no_grad():
        mixer.relative_position_bias_table.mul_(5)
    x = images(2, h * w, 6, dtype=torch.float64).requires_grad_()
    ours, definition = mixer(x, (h, w, 0)), attention_by_definition(mixer, x, h, w)
    torch.testing.assert_close(ours, definition, rtol=1e-12, atol=1e-12)

    wanted = [x, mixer.relative_position_bias_table, mixer.qkv.weight]
    upstream = images(*ours.shape, seed=2, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(definition, wanted, upstream), strict=True
    ):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bias_is_interpolated_for_other_maps():
    mixer = randomise(RelativeAttention(8, 2, grid_size=(4, 3)))
    table = mixer.relative_position_bias_table.T.reshape(1, 2, 7, 5)
    resized = F.interpolate(table, size=(11, 3), mode="bicubic", antialias=True).flatten(2)[0]
    expected = resized[:, relative_position_index((6, 2))][None]
    torch.testing.assert_close(mixer.position_bias((6, 2), like=table), expected, rtol=1e-5, atol=1e-6)


def test_bias_can_be_trained_after_inference_mode():
    mixer = RelativeAttention(8, 2, grid_size=(5, 9))  # a map that no other test has cached
    with torch.inference_mode():
        mixer(torch.zeros(1, 45, 8), (5, 9, 0))
    mixer(images(1, 45, 8), (5, 9, 0)).sum().backward()
    assert mixer.relative_position_bias_table.grad is not None


def test_recorded_weights_are_those_that_were_used():
    model = randomise(CoAtNet(**LESSON)).eval()
    x = images(2, 1, 28, 28)
    with record_attention(model) as weights:
        recorded = model(x)
    assert [tuple(w.shape) for w in weights] == [(2, 4, 49, 49)] * 3
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 4, 49))
    torch.testing.assert_close(recorded, model(x), rtol=1e-5, atol=1e-5)


def test_vit_takes_relative_attention():
    mixer = partial(RelativeAttention, grid_size=(4, 4))
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = VisionTransformer(**args, attn_layer=mixer, class_token=False, global_pool="avg", pos_embed="none")
    assert model(images(2, 3, 16, 24)).shape == (2, 3)
    with pytest.raises(ValueError, match="class_token=False"):
        VisionTransformer(**args, attn_layer=mixer)(images(2, 3, 16, 16))
    with pytest.raises(ValueError, match="30 is not divisible by num_heads 4"):
        RelativeAttention(30, 4, grid_size=(2, 2))


# --------------------------------------------------------------------------------------------------------- the blocks


def batch_norm(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    mean, var, weight, bias = (
        t[None, :, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


@pytest.mark.parametrize("downsample", ["expand", "depthwise"])
@pytest.mark.parametrize("stride, dim", [(1, 8), (1, 6), (2, 8), (2, 6)])
def test_mbconv_is_its_equation(downsample, stride, dim):
    block = randomise(MBConv(8, dim, stride, downsample).double()).eval()
    x = images(2, 8, 6, 4, dtype=torch.float64)

    shortcut = x
    if stride == 2:
        shortcut = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    if dim != 8:
        weight, bias = block.shortcut.proj.weight[:, :, 0, 0], block.shortcut.proj.bias
        shortcut = torch.einsum("oc,bchw->bohw", weight, shortcut) + bias[:, None, None]

    y = batch_norm(x, block.pre_norm)
    if downsample == "expand":
        y = y[:, :, ::stride, ::stride]
    y = gelu(batch_norm(torch.einsum("oc,bchw->bohw", block.expand.weight[:, :, 0, 0], y), block.norm1))
    h, w = y.shape[-2:]
    padded = F.pad(y, (1, 1, 1, 1))
    y = sum(
        padded[:, :, i : i + h, j : j + w] * block.depthwise.weight[:, 0, i, j, None, None]
        for i in range(3)
        for j in range(3)
    )
    if downsample == "depthwise":
        y = y[:, :, ::stride, ::stride]
    y = gelu(batch_norm(y, block.norm2))
    squeezed = y.mean((2, 3)) @ block.se.fc1.weight.T + block.se.fc1.bias
    excited = (squeezed * squeezed.sigmoid()) @ block.se.fc2.weight.T + block.se.fc2.bias
    y = y * excited.sigmoid()[:, :, None, None]
    y = torch.einsum("oc,bchw->bohw", block.project.weight[:, :, 0, 0], y) + block.project.bias[:, None, None]

    torch.testing.assert_close(block(x), shortcut + y, rtol=1e-10, atol=1e-10)


def test_relative_block_shrinks_both_ways_round():
    block = randomise(RelativeBlock(6, 8, num_heads=2, grid_size=(3, 2), stride=2).double())
    x = images(2, 6, 6, 4, dtype=torch.float64)

    def tokens(y):
        return F.avg_pool2d(y, 2).flatten(2).transpose(1, 2)

    normed = F.layer_norm(x.movedim(1, -1), (6,), block.norm1.weight, block.norm1.bias, eps=1e-6).movedim(-1, 1)
    y = tokens(x) @ block.shortcut.proj.weight[:, :, 0, 0].T + block.shortcut.proj.bias
    y = y + attention_by_definition(block.attn, tokens(normed), 3, 2)
    y = y + block.mlp(F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias, eps=1e-6))
    torch.testing.assert_close(block(x), y.transpose(1, 2).reshape(2, 8, 3, 2), rtol=1e-10, atol=1e-10)


def test_squeeze_excite_only_scales_channels():
    x = images(2, 8, 3, 5)
    ratio = randomise(SqueezeExcite(8, 2))(x) / x
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(x))
    assert ratio.std() > 1e-3


# ------------------------------------------------------------------------------------------------ against production


@pytest.mark.parametrize("layout", LAYOUTS)
def test_coatnet_is_timms(layout):
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    cfg = maxxvit.MaxxVitCfg(
        embed_dim=(32, 32, 64, 96), depths=(1, 2, 2, 1), block_type=tuple(layout), stem_width=16, head_hidden_size=96
    )
    theirs = randomise(maxxvit.MaxxVit(cfg, img_size=(64, 96), num_classes=7))
    ours = CoAtNet(
        img_size=(64, 96),
        num_classes=7,
        stem_dim=16,
        embed_dim=cfg.embed_dim,
        depths=cfg.depths,
        layout=layout,
        downsample="depthwise",
    )
    load_weights(ours, theirs)
    x = images(3, 3, 64, 96)
    for mode in (True, False):
        a, b = ours.train(mode)(x), theirs.train(mode)(x)
        assert b.std() > 0.05
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for stage, (mine, their) in enumerate(
        zip(ours.feature_maps(x), theirs.forward_intermediates(x)[1][1:], strict=True)
    ):
        if stage == 3:  # timm leaves the norm to the head
            their = theirs.head.norm(their)
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "size, side, params, macs, macs_depthwise",  # Dai et al. 2021, table 4 and its row for stride-2 depthwise
    [
        ("0", 224, 25, 4.2, 4.6),
        ("1", 224, 42, 8.4, 8.8),
        ("2", 224, 75, 15.7, 16.6),
        ("3", 224, 168, 34.7, None),
        ("4", 384, 275, 189.5, None),
    ],
)
def test_coatnet_meets_the_papers_table(size, side, params, macs, macs_depthwise):
    with torch.device("meta"):
        model = create_model(f"coatnet_{size}")
        assert millions(model) == pytest.approx(params, rel=0.02)
        assert gmacs(model, side) == pytest.approx(macs, rel=0.02)
        if macs_depthwise:
            model = create_model(f"coatnet_{size}", downsample="depthwise")
            assert gmacs(model, side) == pytest.approx(macs_depthwise, rel=0.02)


# ----------------------------------------------------------------------------------------------------------- Conv-ViT


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_conv_vit_has_the_macs_of_its_twin(size):
    with torch.device("meta"):
        twin, model = create_model(f"vit_{size}_patch16_224"), create_model(f"convvit_{size}_patch16_224")
        assert len(model.blocks) == len(twin.blocks) - 1
        assert gmacs(model, 224) == pytest.approx(gmacs(twin, 224), rel=0.015)


@pytest.mark.parametrize("patch_size, side", [(4, 32), (8, 224)])
def test_conv_vit_of_small_patches_is_no_dearer_than_its_twin(patch_size, side):
    with torch.device("meta"):
        args = {"patch_size": patch_size, "img_size": side}
        ratio = gmacs(create_model("convvit_tiny", **args), side) / gmacs(create_model("vit_tiny", **args), side)
    assert 0.95 < ratio < 1


@pytest.mark.parametrize("embed_dim, widths", [(192, [24, 48, 96, 192]), (384, [48, 96, 192, 384])])
def test_conv_stem_has_the_papers_widths(embed_dim, widths):
    stem = ConvStem(16, embed_dim=embed_dim)
    convs = [m for m in stem.convs if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == widths
    assert all(c.kernel_size == (3, 3) and c.stride == (2, 2) and c.bias is None for c in convs)


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16, 32])
def test_conv_stem_keeps_the_grid(patch_size):
    stem = ConvStem(patch_size, in_chans=1, embed_dim=32)
    assert stem(torch.zeros(1, 1, 2 * patch_size, 3 * patch_size)).shape == (1, 32, 2, 3)


def test_conv_stem_is_convolution_norm_relu():
    stem = randomise(ConvStem(4, embed_dim=8).double()).eval()
    x = images(2, 3, 8, 12, dtype=torch.float64)
    y = x
    for conv, norm in ((stem.convs[0], stem.convs[1]), (stem.convs[3], stem.convs[4])):
        y = batch_norm(F.conv2d(y, conv.weight, stride=2, padding=1), norm).clamp(min=0)
    y = F.conv2d(y, stem.proj.weight, stem.proj.bias)
    torch.testing.assert_close(stem(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("patch_size", [14, 7, 1, 64, (8, 16)])
def test_conv_stem_refuses_other_patches(patch_size):
    with pytest.raises(ValueError, match="patch_size .* use 2, 4, 8, 16 or 32"):
        ConvStem(patch_size)


def test_conv_stem_refuses_widths_that_cannot_be_halved():
    with pytest.raises(ValueError, match="embed_dim 100 is not divisible by 8.*use 96"):
        ConvStem(16, embed_dim=100)


def test_conv_vit_is_a_vit():
    args = {"img_size": 32, "patch_size": 8, "in_chans": 1, "num_classes": 4, "depth": 2}
    model = create_model("convvit_tiny", **args)
    x = images(2, 1, 32, 48)
    assert model(x).shape == (2, 4)
    assert [tuple(m.shape) for m in model.feature_maps(x)] == [(2, 192, 4, 6)]
    assert model.feature_info == [{"num_chs": 192, "reduction": 8}]
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------- contracts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lesson_sizes_train(layout):
    model = randomise(CoAtNet(**LESSON, layout=layout))
    logits = model(images(4, 1, 28, 28))
    assert logits.shape == (4, 5) and logits.std() > 1e-2
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_feature_maps_and_features():
    model = randomise(CoAtNet(**SMALL, img_size=64)).eval()
    x = images(2, 3, 64, 96)
    maps = model.feature_maps(x)
    assert [f["reduction"] for f in model.feature_info] == [4, 8, 16, 32]
    assert [tuple(m.shape) for m in maps] == [
        (2, f["num_chs"], 64 // f["reduction"], 96 // f["reduction"]) for f in model.feature_info
    ]
    features = model.forward_features(x)
    assert features.shape == (2, 2, 3, 32) and model.num_prefix_tokens == 0
    torch.testing.assert_close(maps[-1].movedim(1, -1), model.norm(features))
    torch.testing.assert_close(model.forward_head(features), model(x))
    last, first = model.feature_maps(x, indices=(-1, 0))
    assert torch.equal(last, maps[3]) and torch.equal(first, maps[0])
    with pytest.raises(ValueError, match="indices .4,. name stages that do not exist; the model has 4"):
        model.feature_maps(x, indices=(4,))


def test_reset_classifier():
    model = CoAtNet(**LESSON).double()
    x = images(2, 1, 28, 28, dtype=torch.float64)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)


def test_no_weight_decay_names_the_tables():
    model = CoAtNet(**LESSON)
    assert model.no_weight_decay() == {
        f"stages.{stage}.{block}.attn.relative_position_bias_table" for stage, block in ((2, 0), (2, 1), (3, 0))
    }


def test_drop_path_grows_with_depth():
    model = CoAtNet(**LESSON, drop_path_rate=0.5)
    rates = [block.drop_path.p if hasattr(block.drop_path, "p") else 0 for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_initial_weights():
    torch.manual_seed(0)
    model = CoAtNet(stem_dim=32, embed_dim=(64, 64), depths=(1, 1), layout="CT", strides=(2, 2))
    conv, block = model.stages[0][0], model.stages[1][0]
    assert conv.depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert conv.expand.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.1)
    assert block.attn.qkv.weight.std().item() == pytest.approx((2 / (64 + 192)) ** 0.5, rel=0.1)
    assert block.attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(p.abs().sum() == 0 for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"img_size": 30}, "img_size 30 is not divisible by 4, the product of all strides; use 28 or 32"),
        ({"img_size": 2}, "use 4$"),
        ({"layout": "CCXT"}, "layout 'CCXT' must be letters C"),
        ({"layout": "CT"}, "layout 'CT' has 2 stages, but embed_dim 4, depths 4 and strides 4"),
        ({"depths": (1, 0, 1, 1)}, "depths .* must be at least 1"),
        ({"strides": (2, 3, 1, 1)}, "must be 1 or 2"),
        ({"stem_stride": 4}, "stem_stride 4 .* must be 1 or 2"),
        ({"head_dim": 5}, "embed_dim 32 of a T stage is not divisible by head_dim 5"),
        ({"downsample": "pool"}, "downsample 'pool' is unknown; use 'expand' or 'depthwise'"),
        ({"drop_path_rate": 1.5}, "drop path probability"),
    ],
)
def test_errors_of_the_constructor(changes, message):
    with pytest.raises(ValueError, match=message):
        CoAtNet(**{**LESSON, **changes})


def test_errors_of_the_input():
    model = CoAtNet(**LESSON)
    with pytest.raises(ValueError, match=r"images must be \(B, 1, H, W\), got shape \(2, 3, 28, 28\)"):
        model(torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match="images must be"):
        model(torch.zeros(1, 28, 28))
    with pytest.raises(ValueError, match="img_size 30 is not divisible by 4"):
        model(torch.zeros(2, 1, 28, 30))
    with pytest.raises(TypeError, match="floating point"):
        model(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))


def test_registry_names_and_files(tmp_path):
    assert list_models("coatnet*") == ["coatnet_0", "coatnet_1", "coatnet_2", "coatnet_3", "coatnet_4"]
    assert {"convvit_tiny", "convvit_base_patch16_224"} <= set(list_models("convvit*"))
    model = randomise(create_model("coatnet_0", **LESSON)).eval()
    save_weights(model, tmp_path / "small.safetensors")
    again = create_model(tmp_path / "small.safetensors").eval()
    x = images(2, 1, 28, 28)
    assert torch.equal(again(x), model(x))
    assert again.preprocess == model.preprocess and model.preprocess.img_size == 28


def test_weights_move_to_another_resolution():
    small, large = randomise(CoAtNet(**LESSON)).eval(), CoAtNet(**{**LESSON, "img_size": 40}).eval()
    load_weights(large, small)
    x = images(2, 1, 40, 40)
    torch.testing.assert_close(large(x), small(x), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ how it is run


def test_checkpointing_changes_neither_gradients_nor_statistics():
    plain = randomise(CoAtNet(**LESSON))
    thrifty = copy.deepcopy(plain)
    thrifty.set_grad_checkpointing()
    x = images(3, 1, 28, 28)
    for model in (plain, thrifty):
        model(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, name=name: f"{name}: {m}")
    for (name, p), q in zip(plain.named_buffers(), thrifty.buffers(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_to_one_graph(checkpointing):
    torch.compiler.reset()
    model = randomise(CoAtNet(**TINY))
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = images(2, 1, 28, 28)
    eager, traced = model(x), compiled(x)
    torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)
    eager.sum().backward()
    traced.sum().backward()
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4)
    for p, q in zip(model.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(q, p)


@pytest.mark.parametrize("name", ["coatnet_0", "convvit_tiny"])
def test_exports_with_a_dynamic_batch(name):
    args = TINY if name == "coatnet_0" else {"img_size": 28, "patch_size": 4, "in_chans": 1, "depth": 1}
    model = randomise(create_model(name, **args)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(2, 1, 28, 28),), dynamic_shapes=({0: batch},))
    for n in (1, 5):
        x = images(n, 1, 28, 28, seed=n)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast():
    model = randomise(CoAtNet(**LESSON))
    x = images(4, 1, 28, 28)
    model.train()
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    rough.float().sum().backward()
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_channels_last():
    model = randomise(CoAtNet(**LESSON)).eval()
    x = images(2, 1, 28, 28)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
