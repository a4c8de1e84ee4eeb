"""The mixers of direction 5 and token merging on CUDA: against the CPU in float64, compiled, and in half precision."""

from functools import partial

import pytest
import torch

from vitcourse.efficient_attention import (
    BigBirdAttention,
    LinearAttention,
    LocalAttention,
    RandomBlockAttention,
    RandomFeatureAttention,
    TwoSoftmaxAttention,
    local_layout,
    merge_tokens,
    redraw_features,
)
from vitcourse.vit import VisionTransformer

from .parity import assert_compiled_is_eager, assert_same_as_on_the_cpu, pictures, randomise, relative_error

pytestmark = pytest.mark.gpu

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
MIXERS = {
    "elu": LinearAttention,
    "softmaxes": TwoSoftmaxAttention,
    "random features": partial(RandomFeatureAttention, num_features=16),
    "local": partial(LocalAttention, window_size=3),
    "random": partial(RandomBlockAttention, block_size=2),
    "bigbird": partial(BigBirdAttention, block_size=2),
}
EACH = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)


def model_of(mixer):
    return randomise(VisionTransformer(**SMALL, attn_layer=mixer, reg_tokens=1))


@EACH
@pytest.mark.parametrize("size", [(32, 32), (28, 44)])
def test_logits_and_gradients_are_those_of_the_cpu(mixer, size):
    assert_same_as_on_the_cpu(model_of(mixer), pictures(3, *size))


@EACH
def test_compiled_forward_and_backward(mixer):
    assert_compiled_is_eager(model_of(mixer), pictures(3, 28, 44))


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_tokens_in_half_precision(mixer, dtype):
    """4 096 tokens under autocast: finite, and as near to float64 as the steps of the precision allow."""
    attend, x = mixer(32, 2).to("cuda"), 2 * torch.randn(1, 4096, 32, device="cuda")
    grid = (64, 64, 0)
    with torch.autocast("cuda", dtype):
        out = attend(x, grid)
    assert out.dtype == dtype and out.isfinite().all()
    exact = attend.double()(x.double(), grid)
    assert relative_error(out, exact) <= 16 * torch.finfo(dtype).eps


def test_merging_is_that_of_the_cpu():
    model = randomise(VisionTransformer(**SMALL)).double()
    images = pictures(2, 32, 32).double()
    expected = list(merge_tokens(model, 9).steps(images))
    for (x, size, source), (y, other, places) in zip(
        merge_tokens(model.to("cuda"), 9).steps(images.to("cuda")), expected, strict=True
    ):
        assert torch.equal(source.cpu(), places) and torch.equal(size.cpu(), other)
        assert relative_error(x, y) <= 1e-10


def test_merging_compiled():
    """Without gradients, as it is used; in float64, since likeness that rounds otherwise merges other tokens."""
    merged, images = merge_tokens(randomise(VisionTransformer(**SMALL)).double(), 9).to("cuda"), pictures(2, 32, 32)
    images = images.double().to("cuda")
    with torch.no_grad():
        assert relative_error(torch.compile(merged, fullgraph=True)(images), merged(images)) <= 1e-8


def test_tables_are_kept_for_each_device():
    on_gpu = local_layout((6, 5, 1), 3, 2, torch.device("cuda", 0))
    on_cpu = local_layout((6, 5, 1), 3, 2, torch.device("cpu"))
    assert (on_cpu.keys.device.type, on_gpu.keys.device.type) == ("cpu", "cuda")
    assert torch.equal(on_gpu.keys.cpu(), on_cpu.keys)
    assert local_layout((6, 5, 1), 3, 2, torch.device("cuda", 0)).keys is on_gpu.keys


def test_features_are_redrawn_on_the_device():
    model = model_of(MIXERS["random features"]).to("cuda")
    before = model.blocks[0].attn.projection.clone()
    redraw_features(model, torch.Generator("cuda").manual_seed(0))
    redraw_features(model, torch.Generator().manual_seed(0))
    assert model.blocks[0].attn.projection.device.type == "cuda"
    assert not torch.equal(model.blocks[0].attn.projection, before)
