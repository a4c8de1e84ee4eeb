"""The Vision Transformer against timm, torchvision, and its own definition."""

import copy
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vitcourse import create_model, list_models, load_weights
from vitcourse.vit import (
    Attention,
    LinearPatchEmbed,
    PatchEmbed,
    VisionTransformer,
    image_to_patch,
    patch_to_image,
    record_attention,
    resize_matrix,
    resize_pos_embed,
    sincos_2d,
)

TINY = {"img_size": 32, "patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def compile_anew():
    torch._dynamo.reset()


@torch.no_grad()
def randomise(model):
    """Move every parameter: zero biases, zero heads and unit norms hide mistakes."""
    for parameter in model.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.3
        parameter.add_(torch.randn_like(parameter) * spread)
    return model


def tiny(**changes):
    return randomise(VisionTransformer(**{**TINY, **changes})).eval()


def assert_same_logits(ours, theirs, x, tolerance=1e-5):
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    assert a.shape == b.shape
    assert b.std(dim=0).mean() > 0.01, "logits must vary from image to image"
    assert b.std(dim=1).mean() > 0.01, "logits must vary from class to class"
    assert ((a - b).abs().max() / b.abs().max()).item() <= tolerance


# ---------------------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize(("patch", "size"), [(8, (16, 24)), ((4, 8), (16, 24)), (1, (2, 3)), (16, (16, 16))])
def test_image_to_patch_is_the_pattern_and_patch_to_image_its_inverse(patch, size):
    p1, p2 = patch if isinstance(patch, tuple) else (patch, patch)
    x = torch.randn(2, 3, *size)
    patches = image_to_patch(x, patch)
    assert torch.equal(patches, rearrange(x, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p1, p2=p2))
    assert torch.equal(patch_to_image(patches, patch, (size[0] // p1, size[1] // p2)), x)


def test_patches_lie_in_reading_order_with_channels_fastest():
    x = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6).float()
    second = image_to_patch(x, (2, 3))[0, 1]  # rows 0–1, columns 3–5
    assert second.tolist() == [x[0, c, y, x_].item() for y in (0, 1) for x_ in (3, 4, 5) for c in (0, 1)]


def test_patches_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="225 is not divisible by patch_size 16; use 224 or 240, or pad=True"):
        image_to_patch(torch.zeros(1, 3, 224, 225), 16)
    with pytest.raises(ValueError, match=r"img_size 7 is not divisible by patch_size 16; use 16"):
        image_to_patch(torch.zeros(1, 3, 16, 7), 16)
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), got shape \(3, 32, 32\)"):
        image_to_patch(torch.zeros(3, 32, 32), 16)
    with pytest.raises(ValueError, match="patch_size 0 must be a positive integer"):
        image_to_patch(torch.zeros(1, 3, 32, 32), 0)
    for shape, grid in [((1, 4, 768), (2, 3)), ((1, 4, 767), (2, 2)), ((4, 768), (2, 2))]:
        with pytest.raises(ValueError, match=rf"for a {grid[0]}×{grid[1]} grid of 16×16 patches"):
            patch_to_image(torch.zeros(shape), 16, grid)


@pytest.mark.parametrize("patch", [4, (4, 8)])
def test_linear_and_convolutional_embedding_are_one_map(patch):
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    conv, linear = PatchEmbed(patch, 3, 20).double(), LinearPatchEmbed(patch, 3, 20).double()
    torch.testing.assert_close(LinearPatchEmbed.from_conv(conv)(x), conv(x), rtol=0, atol=1e-13)
    torch.testing.assert_close(linear.to_conv()(x), linear(x), rtol=0, atol=1e-13)
    back = LinearPatchEmbed.from_conv(linear.to_conv())
    assert torch.equal(back.proj.weight, linear.proj.weight)


def test_either_embedding_serves_the_model():
    conv = tiny()
    linear = VisionTransformer(**TINY, embed_layer=LinearPatchEmbed).eval()
    linear.load_state_dict({k: v for k, v in conv.state_dict().items() if "patch_embed" not in k}, strict=False)
    linear.patch_embed = LinearPatchEmbed.from_conv(conv.patch_embed)
    assert_same_logits(linear, conv, torch.randn(3, 3, 32, 40))


# -------------------------------------------------------------------------------------------------------- positions


def test_sincos_is_that_of_mae():
    mae = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    config = mae.ViTMAEConfig(hidden_size=64, image_size=96, patch_size=16)
    embeddings = mae.ViTMAEEmbeddings(config)
    embeddings.initialize_weights()
    torch.testing.assert_close(sincos_2d(6, 6, 64), embeddings.position_embeddings[0, 1:], rtol=0, atol=1e-6)


def test_sincos_on_a_grid_that_is_not_square():
    positions = sincos_2d(3, 5, 16).reshape(3, 5, 16)
    assert torch.equal(positions[..., :8], positions[:1, :, :8].expand(3, 5, 8))  # half the channels: the column
    assert torch.equal(positions[..., 8:], positions[:, :1, 8:].expand(3, 5, 8))  # the other half: the row
    frequency = 10000 ** (-1 / 4)
    expected = torch.tensor([4 * frequency, 4 * frequency, 2 * frequency, 2 * frequency])
    found = positions[2, 4, [1, 5, 9, 13]]
    torch.testing.assert_close(
        found, torch.stack([f(e) for f, e in zip([torch.sin, torch.cos] * 2, expected, strict=True)])
    )
    with pytest.raises(ValueError, match="dim 10 is not a multiple of 4"):
        sincos_2d(2, 2, 10)


GRIDS = [((14, 14), (7, 9)), ((14, 14), (24, 37)), ((16, 16), (3, 50)), ((24, 12), (13, 25)), ((14, 14), (14, 20)),
         ((5, 7), (64, 64)), ((37, 37), (1, 1)), ((1, 1), (4, 3)), ((2, 3), (14, 14))]  # fmt: skip


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_positions_are_interpolated_as_bicubic_interpolate_does(old, new, antialias):
    prefix, patches = torch.randn(1, 2, 6), torch.randn(1, old[0] * old[1], 6)
    grid = rearrange(patches.double(), "1 (h w) d -> 1 d h w", h=old[0])
    expected = F.interpolate(grid, size=new, mode="bicubic", antialias=antialias, align_corners=False)
    expected = rearrange(expected, "1 d h w -> 1 (h w) d")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        resized = resize_pos_embed(torch.cat([prefix, patches], dim=1).to(dtype), old, new, 2, antialias)
        assert torch.equal(resized[:, :2], prefix.to(dtype))
        torch.testing.assert_close(resized[:, 2:], expected.to(dtype), rtol=tolerance, atol=tolerance)


def test_resizing_to_the_same_length_changes_nothing():
    for antialias in (True, False):
        assert torch.equal(resize_matrix(9, 9, antialias=antialias).float(), torch.eye(9))
    pos = torch.randn(1, 16, 4)
    assert resize_pos_embed(pos, (4, 4), (4, 4)) is pos


def test_gradients_flow_through_resized_positions_also_after_inference_mode():
    model = tiny()
    with torch.inference_mode():
        model(torch.randn(1, 3, 40, 56))
    model(torch.randn(1, 3, 40, 56)).square().sum().backward()
    assert model.pos_embed.grad[0].abs().sum(-1).min() > 0


def test_resizing_keeps_nothing_fake():
    pos = torch.randn(1, 16, 4)
    with FakeTensorMode() as mode:
        assert resize_pos_embed(mode.from_tensor(pos), (4, 4), (6, 11)).shape == (1, 66, 4)
    assert type(resize_pos_embed(pos, (4, 4), (6, 11))) is torch.Tensor


def test_resizing_stays_in_full_precision_under_autocast():
    pos = torch.randn(1, 16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_pos_embed(pos, (4, 4), (6, 5)), resize_pos_embed(pos, (4, 4), (6, 5)).float())
        resized = resize_pos_embed(pos, (4, 4), (6, 5))
    assert torch.equal(resized, resize_pos_embed(pos, (4, 4), (6, 5)))


def test_resizing_refuses_a_grid_that_the_positions_do_not_have():
    with pytest.raises(ValueError, match=r"17 positions, but old_grid \(4, 5\) with 1 prefix tokens has 21"):
        resize_pos_embed(torch.zeros(1, 17, 4), (4, 5), (8, 8), num_prefix_tokens=1)


def test_one_graph_serves_many_image_sizes():
    model, counter = tiny(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, size in enumerate([(40, 48), (48, 64), (64, 24), (32, 40), (40, 32), (32, 32)], start=2):
            x = torch.randn(batch, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------------------------- parity with peers

PARAMETERS = {  # timm's published counts
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_small_patch32_224": 22_878_952,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch32_224": 88_224_232,
    "vit_large_patch16_224": 304_326_632,
}


def test_every_named_size_has_as_many_parameters_as_in_timm():
    names = [name for name in list_models("vit_*_patch*") if timm.is_model(name)]
    assert PARAMETERS.keys() < set(names)
    assert {name.split("_")[1] for name in names} == {"tiny", "small", "base", "large", "huge"}
    with torch.device("meta"):
        for name, count in PARAMETERS.items():
            assert sum(p.numel() for p in create_model(name).parameters()) == count
        for name in names:
            ours, theirs = create_model(name, depth=1), timm.create_model(name, depth=1, num_classes=1000)
            assert {k: v.shape for k, v in ours.state_dict().items()} == {
                k: v.shape for k, v in theirs.state_dict().items()
            }


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "huge"])
def test_every_patch_size_has_a_name(size):
    expected = {f"vit_{size}_patch{p}_{s}" for p in (8, 14, 16, 32) for s in (224, 384) if s % p == 0}
    assert expected == set(list_models(f"vit_{size}_patch*"))


def test_base_16_has_17_56_gmacs():
    with torch.device("meta"):
        model, x = create_model("vit_base_patch16_224"), torch.zeros(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert round(counter.get_total_flops() / 2e9, 2) == 17.56


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
def test_logits_equal_timms(name):
    theirs = randomise(timm.create_model(name)).eval()
    ours = create_model(name).eval()
    ours.load_state_dict(theirs.state_dict())
    assert_same_logits(ours, theirs, torch.randn(2, 3, 224, 224))


def test_base_16_equals_timms_and_torchvisions():
    theirs = randomise(torchvision.models.vit_b_16()).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.device("meta"):
        ours, timms = create_model("vit_base_patch16_224").eval(), timm.create_model("vit_base_patch16_224").eval()
    load_weights(ours.to_empty(device="cpu"), theirs)
    assert_same_logits(ours, theirs, x)
    timms.load_state_dict(ours.state_dict(), assign=True)
    assert_same_logits(ours, timms, x)


VARIANTS = {
    "token": ({}, {}),
    "avg": ({"global_pool": "avg"},) * 2,
    "avg, no [CLS]": ({"global_pool": "avg", "class_token": False},) * 2,
    "registers": ({"reg_tokens": 4},) * 2,
    "avg, registers": ({"reg_tokens": 3, "global_pool": "avg"},) * 2,
    "patch positions only": ({"reg_tokens": 2, "no_embed_class": True},) * 2,
    "layer scale": ({"init_values": 0.5, "qkv_bias": False, "mlp_ratio": 3.0},) * 2,
    "no positions": ({"pos_embed": "none"},) * 2,
    "gray": ({"in_chans": 1},) * 2,
    "rectangle": ({"img_size": (24, 40), "patch_size": (8, 4)},) * 2,
    "no head": ({"num_classes": 0},) * 2,
    "any size": ({}, {"dynamic_img_size": True}),
    "any size, patch positions only": ({"no_embed_class": True}, {"dynamic_img_size": True, "no_embed_class": True}),
    "padded": ({"pad": True}, {"dynamic_img_size": True, "dynamic_img_pad": True}),
}
IMAGES = {"gray": (1, 32, 32), "rectangle": (3, 24, 40), "padded": (3, 45, 27)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_timms(variant):
    ours_args, timm_args = VARIANTS[variant]
    theirs = randomise(TimmVisionTransformer(**{**TINY, **timm_args})).double().eval()
    ours = VisionTransformer(**{**TINY, **ours_args}).double().eval()
    ours.load_state_dict(theirs.state_dict())
    image = (3, 24, 56) if variant.startswith("any size") else IMAGES.get(variant, (3, 32, 32))
    tolerance = 1e-5 if "dynamic_img_size" in timm_args else 1e-12  # timm interpolates in single precision
    assert_same_logits(ours, theirs, torch.randn(3, *image, dtype=torch.float64), tolerance)


def test_gradients_equal_timms():
    theirs = randomise(TimmVisionTransformer(**TINY, init_values=0.5, reg_tokens=1)).double()
    ours = VisionTransformer(**TINY, init_values=0.5, reg_tokens=1).double()
    ours.load_state_dict(theirs.state_dict())
    x, target = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 6, 1])
    for model in (ours, theirs):
        F.cross_entropy(model(x), target).backward()
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-9, atol=1e-12)


def test_features_equal_timms():
    theirs = randomise(TimmVisionTransformer(**TINY, reg_tokens=2)).eval()
    ours = VisionTransformer(**TINY, reg_tokens=2).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x))
    maps = theirs.forward_intermediates(x, indices=[0, 1], norm=True, intermediates_only=True)
    for a, b in zip(ours.feature_maps(x, indices=(0, 1)), maps, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------- compilers, precisions and layouts


def test_compiles_to_one_graph_forward_and_backward():
    model = tiny(init_values=0.1, drop_path_rate=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32)
    compiled(x).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], grads)


@pytest.mark.parametrize("changes", [{"global_pool": "avg"}, {"pad": True}, {"embed_layer": LinearPatchEmbed}])
def test_options_compile_to_one_graph(changes):
    model, x = tiny(**changes), torch.randn(2, 3, 40, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_it():
    model, x = tiny(depth=1), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_exports_with_any_batch(size):
    model = tiny(reg_tokens=1)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (torch.randn(2, 3, *size),), dynamic_shapes=shapes)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, *size)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_runs_in_half_precision_by_autocast(dtype, error):
    model, x = tiny(), torch.randn(4, 3, 48, 32)
    exact = model(x)
    with torch.autocast("cpu", dtype):
        logits = model(x)
    assert logits.dtype == dtype
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    assert 0 < (logits - exact).abs().max() <= error * exact.abs().max()


def test_runs_in_half_precision_throughout():
    model, x = tiny(), torch.randn(4, 3, 48, 32)
    exact = model(x)
    logits = model.bfloat16()(x.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).abs().max() <= 0.05 * exact.abs().max()


def test_checkpointing_gives_equal_gradients_from_fewer_activations():
    model, x = tiny(depth=3, drop_path_rate=0.5, drop_rate=0.1).train(), torch.randn(4, 3, 32, 32)
    grads, saved = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        saved.append(0)

        def count(tensor):
            saved[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(x).square().sum()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert saved[1] < saved[0] / 3


@pytest.mark.parametrize("embed_layer", [PatchEmbed, LinearPatchEmbed])
def test_memory_layout_does_not_matter(embed_layer):
    model, x = tiny(embed_layer=embed_layer), torch.randn(2, 3, 32, 40)
    expected = model(x)
    strided = torch.randn(2, 3, 40, 64).transpose(2, 3)[:, :, ::2]
    strided.copy_(x)
    assert not strided.is_contiguous()
    for same in (x.contiguous(memory_format=torch.channels_last), strided):
        torch.testing.assert_close(model(same), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected, rtol=1e-5, atol=1e-5)


def test_a_deep_copy_is_the_model():
    model, x = tiny(), torch.randn(1, 3, 32, 32)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


# ------------------------------------------------------------------------------------------- attention that is swapped


class GridMixer(nn.Module):
    """Writes down the grid that it was given."""

    def __init__(self, dim, num_heads, qkv_bias):
        super().__init__()
        self.arguments, self.grids = (dim, num_heads, qkv_bias), []

    def forward(self, x, grid):
        self.grids.append(grid)
        return x.flip(1)


def test_a_swapped_token_mixer_gets_the_grid():
    model = tiny(attn_layer=GridMixer, reg_tokens=2, qkv_bias=False)
    model(torch.randn(1, 3, 24, 40))
    model.feature_maps(torch.randn(1, 3, 16, 32))
    for block in model.blocks:
        assert block.attn.arguments == (48, 3, False)
        assert block.attn.grids == [(3, 5, 3), (2, 4, 3)]


def test_attention_backends_agree_in_the_model():
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    for block in model.blocks:
        block.attn.backend = "math"
    torch.testing.assert_close(model(x), expected)


def test_recorded_attention_is_the_attention_used():
    model, x = tiny(reg_tokens=1), torch.randn(2, 3, 32, 40)
    expected = model(x)
    with record_attention(model) as weights:
        torch.testing.assert_close(model(x), expected)
    assert [tuple(w.shape) for w in weights] == [(2, 3, 22, 22)] * 2
    for w in weights:
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 3, 22))

    tokens, _ = model.embed(x)
    block = model.blocks[0]
    q, k, _ = rearrange(block.attn.qkv(block.norm1(tokens)), "b n (t h d) -> t b h n d", t=3, h=3)
    torch.testing.assert_close(weights[0], (q @ k.transpose(-2, -1) / 4).softmax(-1))

    model(x)
    assert len(weights) == 2, "nothing is recorded after the with"


def test_gradients_reach_recorded_attention():
    model = tiny()
    with record_attention(model) as weights:
        model(torch.randn(1, 3, 32, 32))[0, 3].backward(inputs=weights)
    assert all(w.grad.abs().sum() > 0 for w in weights)


def test_recording_ends_after_an_exception_and_nests():
    model, x = tiny(), torch.randn(1, 3, 32, 32)
    with pytest.raises(KeyError), record_attention(model):
        raise KeyError
    assert all(block.attn.recorder is None for block in model.blocks)
    with record_attention(model) as outer:
        with record_attention(model) as inner:
            model(x)
        model(x)
    assert (len(outer), len(inner)) == (2, 2)
    with pytest.raises(ValueError, match="no token mixer with a recorder"), record_attention(nn.Linear(2, 2)):
        pass


# ------------------------------------------------------------------------------------------------- heads and features


def test_stochastic_depth_grows_and_acts_only_in_training():
    model = tiny(depth=3, drop_path_rate=0.4)
    assert isinstance(model.blocks[0].drop_path, nn.Identity)
    assert [block.drop_path.p for block in model.blocks[1:]] == pytest.approx([0.2, 0.4])
    plain = VisionTransformer(**{**TINY, "depth": 3}).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(x), plain(x))
    assert not torch.allclose(model.train()(x), plain(x))


@pytest.mark.parametrize("changes", [{}, {"global_pool": "avg"}, {"reg_tokens": 2, "patch_size": 4}, {"pad": True}])
def test_feature_maps(changes):
    model, x = tiny(**changes), torch.randn(2, 3, 40, 24)
    if "pad" in changes:
        x = x[:, :, :37, :19]
    (features,) = model.feature_maps(x)
    stride = model.feature_info[0]["reduction"]
    assert features.shape == (2, model.feature_info[0]["num_chs"], 40 // stride, 24 // stride)
    tokens = model.fc_norm(model.forward_features(x))[:, model.num_prefix_tokens :]
    assert torch.equal(features, rearrange(tokens, "b (h w) d -> b d h w", h=40 // stride))
    assert len(model.feature_info) == 1


def test_feature_maps_of_chosen_blocks():
    model, x = tiny(depth=4), torch.randn(1, 3, 32, 32)
    maps = model.feature_maps(x, indices=(3, 0, -1))
    assert torch.equal(maps[0], maps[2])
    assert not torch.allclose(maps[0], maps[1])
    shallow = copy.deepcopy(model)
    shallow.blocks = shallow.blocks[:1]
    assert torch.equal(maps[1], shallow.feature_maps(x)[0])
    assert model.feature_maps(x, indices=()) == []
    for wrong in (4, -5):
        with pytest.raises(ValueError, match=rf"indices \(0, {wrong}\) name blocks that do not exist; the model has 4"):
            model.feature_maps(x, indices=(0, wrong))


def test_feature_maps_show_where_things_are():
    model = tiny(depth=1, pos_embed="none")
    x = torch.zeros(1, 3, 32, 48)
    x[:, :, 8:16, 24:32] = torch.randn(3, 8, 8)
    change = (model.feature_maps(x)[0] - model.feature_maps(torch.zeros_like(x))[0]).norm(dim=1)[0]
    assert divmod(change.argmax().item(), 6) == (1, 3)


def test_average_pooling_leaves_prefix_tokens_out():
    model = tiny(global_pool="avg", reg_tokens=2)
    tokens = torch.randn(2, 3 + 16, 48)
    changed = tokens.clone()
    changed[:, :3] = torch.randn(2, 3, 48)
    assert torch.equal(model.forward_head(changed), model.forward_head(tokens))
    changed[:, 3] = torch.randn(2, 48)  # a constant would be taken out by the norm
    assert not torch.allclose(model.forward_head(changed), model.forward_head(tokens))


def test_token_pooling_reads_cls_alone():
    model = tiny(reg_tokens=2)
    tokens = torch.randn(2, 3 + 16, 48)
    changed = tokens.clone()
    changed[:, 1:] = torch.randn(2, 18, 48)
    assert torch.equal(model.forward_head(changed), model.forward_head(tokens))


def test_reset_classifier():
    model, x = tiny().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.reset_classifier(11)
    assert model.num_classes == 11
    assert model(x).shape == (2, 11)
    assert model.head.weight.dtype == torch.float64
    assert 0.015 < model.head.weight.std() < 0.025
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_features(x)[:, 0])
    with torch.device("meta"):
        other = VisionTransformer(**TINY)
    other.reset_classifier(3)
    assert other.head.weight.is_meta


def test_padding_adds_zeros_on_the_right_and_below():
    model, x = tiny(pad=True, img_size=30), torch.randn(2, 3, 29, 18)
    assert model.grid_size == (4, 4)
    assert torch.equal(model(x), model(F.pad(x, (0, 6, 0, 3))))


def test_padding_compiles_for_a_second_size():
    """To one graph, in which sizes are symbols."""
    torch._dynamo.reset()
    model = tiny(pad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((32, 32), (29, 18), (20, 37)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), model(x))


def test_sincos_positions_are_fixed():
    model = VisionTransformer(**TINY, pos_embed="sincos")
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[0, 1:], sincos_2d(4, 4, 48))
    assert not model.pos_embed[0, 0].any()


def test_initial_weights():
    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=256, depth=1, num_heads=4, reg_tokens=4)
    for spread in (model.pos_embed.std(), model.head.weight.std()):
        assert 0.019 < spread < 0.021
    for weight in (model.blocks[0].attn.qkv.weight, model.blocks[0].mlp.fc2.weight):  # Glorot and Bengio 2010, eq. 16
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not model.blocks[0].mlp.fc1.bias.any()
    assert model.cls_token.abs().max() < 1e-5
    assert model.reg_token.std() > 0, "registers that start equal stay equal"
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "reg_token"}


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 225}, r"img_size 225 is not divisible by patch_size 8; use 224 or 232, or pad=True"),
        ({"img_size": (32, 36)}, r"img_size 36 is not divisible by patch_size 8; use 32 or 40"),
        ({"img_size": 32.5}, r"img_size 32.5 must be a positive integer"),
        ({"patch_size": -8}, r"patch_size -8 must be a positive integer"),
        ({"num_heads": 5}, r"embed_dim 48 is not divisible by num_heads 5"),
        ({"num_heads": 0}, r"embed_dim 48 is not divisible by num_heads 0"),
        ({"global_pool": "max"}, r"global_pool 'max' is unknown; use 'token' or 'avg'"),
        ({"class_token": False}, r"global_pool 'token' needs class_token=True; use global_pool='avg'"),
        ({"pos_embed": "rope"}, r"pos_embed 'rope' is unknown; use 'learned', 'sincos' or 'none'"),
        ({"pos_embed": "sincos", "embed_dim": 42}, r"dim 42 is not a multiple of 4"),
        ({"drop_path_rate": 1.0}, r"drop path probability 1.0 is outside \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named_with_a_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**TINY, **arguments})


@pytest.mark.parametrize("method", ["forward", "forward_features", "feature_maps"])
def test_bad_images_are_named_with_a_remedy(method):
    call = getattr(tiny(), method)
    with pytest.raises(ValueError, match="img_size 36 is not divisible by patch_size 8; use 32 or 40, or pad=True"):
        call(torch.zeros(1, 3, 32, 36))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got shape \(1, 1, 32, 32\)"):
        call(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got shape \(3, 32, 32\)"):
        call(torch.zeros(3, 32, 32))
    for dtype in (torch.uint8, torch.int64):
        with pytest.raises(TypeError, match=rf"floating point, got {dtype}; scale to \[0, 1\] and normalise"):
            call(torch.zeros(1, 3, 32, 32, dtype=dtype))


def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="embed_dim 10 is not divisible by num_heads 3"):
        Attention(10, 3)


# ------------------------------------------------------------------------------------------ masks, and some tokens only


def test_tokens_that_are_hidden_change_nothing():
    """A batch of images of different sizes: the tokens of the smaller one are filled up, and hidden."""
    for changes in ({}, {"global_pool": "avg", "class_token": False, "reg_tokens": 2}):
        model = tiny(**changes)
        small, large = torch.randn(1, 3, 16, 24), torch.randn(1, 3, 32, 32)
        (short, _), (long, grid) = model.embed(small), model.embed(large)
        missing = long.shape[1] - short.shape[1]
        tokens = torch.cat([F.pad(short, (0, 0, 0, missing), value=9.0), long])
        mask = torch.ones(2, long.shape[1], dtype=torch.bool)
        mask[0, short.shape[1] :] = False
        logits = model.forward_head(model.forward_tokens(tokens, None, mask), mask)
        torch.testing.assert_close(logits, torch.cat([model(small), model(large)]))
        with record_attention(model) as weights:
            torch.testing.assert_close(model.forward_head(model.forward_tokens(tokens, grid, mask), mask), logits)
        assert all((w[0, :, :, short.shape[1] :] == 0).all() for w in weights)


def test_an_encoder_of_visible_patches_alone():
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    tokens, grid = model.embed(x)
    assert torch.equal(model.forward_tokens(tokens, grid), model.forward_features(x))
    visible = torch.tensor([0, 3, 5, 6, 11])
    seen = torch.zeros(17, dtype=torch.bool)
    seen[visible] = True
    alone = model.forward_tokens(tokens[:, visible], None)
    hidden = model.forward_tokens(tokens, grid, seen.expand(2, -1))
    torch.testing.assert_close(alone, hidden[:, visible])


def test_a_mask_of_pairs_with_checkpointing_and_compilation():
    model, (tokens, grid) = tiny().train(), tiny().embed(torch.randn(2, 3, 32, 32))
    causal = torch.ones(17, 17, dtype=torch.bool).tril()[None, None]
    plain = model.forward_tokens(tokens, grid, causal)
    changed = model.forward_tokens(torch.cat([tokens[:, :9], torch.randn(2, 8, 48)], 1), grid, causal)
    torch.testing.assert_close(changed[:, :9], plain[:, :9])
    compiled = torch.compile(model.forward_tokens, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, grid, causal), plain)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_tokens(tokens, grid, causal), plain)


def test_mixers_that_cannot_honour_a_mask_or_do_without_a_grid_raise():
    from vitcourse import efficient_attention, hierarchical, hybrid

    x, mask = torch.randn(1, 16, 48), torch.ones(16, 16, dtype=torch.bool)
    mixers = {
        Attention(48, 3): (True, True),
        hybrid.RelativeAttention(48, 3, grid_size=(4, 4)): (True, False),
        hierarchical.WindowAttention(48, 3, window_size=2): (False, False),
        hierarchical.CosineWindowAttention(48, 3, window_size=2): (False, False),
        efficient_attention.LinearAttention(48, 3): (False, True),
        efficient_attention.LocalAttention(48, 3, window_size=3, block_size=2): (False, False),
    }
    for mixer, (takes_masks, takes_parts) in mixers.items():
        expected = mixer(x, (4, 4, 0))
        if takes_masks:
            torch.testing.assert_close(mixer(x, (4, 4, 0), mask), expected)
        else:
            with pytest.raises(ValueError, match=f"{type(mixer).__name__} cannot honour a mask"):
                mixer(x, (4, 4, 0), mask)
        if takes_parts:
            torch.testing.assert_close(mixer(x, None), expected)
        else:
            with pytest.raises(ValueError, match="grid is None"):
                mixer(x, None)
