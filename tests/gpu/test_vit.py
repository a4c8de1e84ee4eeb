"""The Vision Transformer on CUDA: against the CPU in float64, timm in half precision, and itself compiled."""

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from torch._dynamo.testing import CompileCounterWithBackend

from vitcourse import create_model
from vitcourse.vit import (
    LinearPatchEmbed,
    VisionTransformer,
    image_to_patch,
    patch_to_image,
    record_attention,
    resize_pos_embed,
)

from .parity import (
    assert_as_exact_as_theirs,
    assert_compiled_is_eager,
    assert_same_as_on_the_cpu,
    randomise,
    relative_error,
)

pytestmark = pytest.mark.gpu

TINY = {"img_size": 32, "patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 3, "num_heads": 3}


def tiny(**changes):
    return randomise(VisionTransformer(**{**TINY, **changes}))


CASES = {
    "token": ({}, (32, 32)),
    "mean, registers, layer scale": ({"global_pool": "avg", "reg_tokens": 2, "init_values": 0.5}, (32, 32)),
    "another size": ({}, (24, 56)),
    "patch positions only, another size": ({"reg_tokens": 1, "no_embed_class": True}, (40, 16)),
    "padded": ({"pad": True}, (29, 45)),
    "linear patches": ({"embed_layer": LinearPatchEmbed}, (32, 32)),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_the_cpu(case):
    changes, size = CASES[case]
    assert_same_as_on_the_cpu(tiny(**changes), torch.randn(4, 3, *size))


def test_a_model_of_usual_size_is_that_of_the_cpu():
    model = randomise(create_model("vit_tiny_patch16_224", num_classes=20))
    assert_same_as_on_the_cpu(model, torch.randn(2, 3, 224, 224))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
def test_half_precision_is_as_exact_as_timms(name, dtype):
    theirs = randomise(timm.create_model(name))
    ours = create_model(name).eval()
    ours.load_state_dict(theirs.state_dict())
    assert_as_exact_as_theirs(ours, theirs, torch.randn(8, 3, 224, 224), dtype)


def test_compiled_forward_and_backward():
    assert_compiled_is_eager(tiny(init_values=0.5, reg_tokens=1), torch.randn(4, 3, 32, 32))


def test_compiled_in_half_precision():
    """As exact as eager, or more: a compiler may leave out roundings, not add any."""
    model, x = tiny().to("cuda"), torch.randn(16, 3, 32, 32, device="cuda")
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cuda", torch.bfloat16):
            eager, traced = model(x), compiled(x)
    assert traced.dtype == torch.bfloat16
    assert 0 < relative_error(traced, exact) <= 2 * relative_error(eager, exact)


def test_one_compiled_graph_serves_many_image_sizes():
    model, counter = tiny().to("cuda"), CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch, size in enumerate([(40, 48), (48, 64), (64, 24), (32, 40), (40, 32), (32, 32)], start=2):
            x = torch.randn(batch, 3, *size, device="cuda")
            assert relative_error(compiled(x), model(x)) <= 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("embed_layer", [None, LinearPatchEmbed])
def test_memory_layout_does_not_matter(embed_layer):
    model = tiny(**({"embed_layer": embed_layer} if embed_layer else {})).to("cuda")
    x = torch.randn(2, 3, 32, 40, device="cuda")
    strided = torch.empty(2, 3, 40, 64, device="cuda").transpose(2, 3)[:, :, ::2]
    strided.copy_(x)
    assert not strided.is_contiguous()
    with torch.no_grad():
        expected = model(x)
        for same in (x.contiguous(memory_format=torch.channels_last), strided):
            assert relative_error(model(same), expected) <= 1e-5
        model.to(memory_format=torch.channels_last)
        assert relative_error(model(x.contiguous(memory_format=torch.channels_last)), expected) <= 1e-5


def test_checkpointing_gives_equal_gradients_from_less_memory():
    """With dropout and stochastic depth, whose draws on the device have to be repeated."""
    model = randomise(VisionTransformer(**{**TINY, "depth": 8}, drop_rate=0.1, drop_path_rate=0.3))
    model.to("cuda").train()
    x, gradients, peaks = torch.randn(256, 3, 32, 32, device="cuda"), [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients.append(torch.autograd.grad(model(x).square().mean(), list(model.parameters())))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    for plain, recomputed in zip(*gradients, strict=True):
        assert relative_error(recomputed, plain) <= 1e-5
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (7, 9)), ((14, 14), (24, 37)), ((16, 16), (3, 50)), ((5, 7), (1, 1))]
)
def test_positions_are_interpolated_on_the_device(old, new, antialias):
    prefix, patches = torch.randn(1, 2, 6), torch.randn(1, old[0] * old[1], 6)
    grid = rearrange(patches.double(), "1 (h w) d -> 1 d h w", h=old[0])
    expected = F.interpolate(grid, size=new, mode="bicubic", antialias=antialias, align_corners=False)
    expected = rearrange(expected, "1 d h w -> 1 (h w) d")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        pos = torch.cat([prefix, patches], dim=1).to("cuda", dtype)
        resized = resize_pos_embed(pos, old, new, 2, antialias)
        assert (resized.device, resized.dtype) == (pos.device, dtype)
        assert torch.equal(resized[:, :2], pos[:, :2])
        assert relative_error(resized[:, 2:], expected) <= tolerance


def test_positions_keep_full_precision_under_autocast():
    pos = torch.randn(1, 16, 8, device="cuda")
    with torch.autocast("cuda", torch.float16):
        resized = resize_pos_embed(pos, (4, 4), (6, 5))
    assert torch.equal(resized, resize_pos_embed(pos, (4, 4), (6, 5)))


def test_positions_are_trained_after_inference_mode_and_on_either_device():
    """What is kept from one call for the next belongs to its device, and to training as well."""
    model = tiny().to("cuda")
    with torch.inference_mode():
        model(torch.randn(1, 3, 40, 56, device="cuda"))
    model(torch.randn(1, 3, 40, 56, device="cuda")).square().sum().backward()
    assert model.pos_embed.grad[0].abs().sum(-1).min() > 0
    assert model.cpu()(torch.randn(1, 3, 40, 56)).isfinite().all()


def test_patches_are_those_of_the_cpu():
    x = torch.randn(2, 3, 16, 24)
    patches = image_to_patch(x.to("cuda"), 8)
    assert torch.equal(patches.cpu(), image_to_patch(x, 8))
    assert torch.equal(patch_to_image(patches, 8, (2, 3)).cpu(), x)


def test_recorded_attention_is_the_attention_used():
    model, x = tiny().to("cuda"), torch.randn(2, 3, 32, 32, device="cuda")
    with torch.no_grad(), record_attention(model) as weights:
        recorded = model(x)
    assert relative_error(recorded, model(x).detach()) <= 1e-5
    assert [tuple(w.shape) for w in weights] == [(2, 3, 17, 17)] * 3
    assert all(w.is_cuda for w in weights)
