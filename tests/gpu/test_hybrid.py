"""Conv-ViT and CoAtNet on CUDA: against the CPU in float64, timm in half precision, and themselves compiled."""

import copy

import pytest
import torch

from vitcourse import create_model, load_weights
from vitcourse.hybrid import CoAtNet

from .parity import (
    assert_as_exact_as_theirs,
    assert_compiled_is_eager,
    assert_same_as_on_the_cpu,
    pictures,
    randomise,
    relative_error,
)

pytestmark = pytest.mark.gpu

SMALL = {"stem_dim": 8, "embed_dim": (8, 16, 32, 32), "depths": (1, 2, 2, 1), "head_dim": 8, "num_classes": 5}
CONV_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 5, "depth": 3}


def small(**changes) -> CoAtNet:
    return randomise(CoAtNet(**{**SMALL, "img_size": 64, **changes}))


@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
@pytest.mark.parametrize("layout", ["CCTT", "TCTC"])
def test_logits_and_gradients_are_those_of_the_cpu(layout, size):
    assert_same_as_on_the_cpu(small(layout=layout), pictures(4, *size))


def test_conv_vit_is_that_of_the_cpu():
    assert_same_as_on_the_cpu(randomise(create_model("convvit_tiny", **CONV_VIT)), pictures(4, 32, 40))


def test_batch_statistics_are_those_of_the_cpu():
    model = small().train()
    x = pictures(8, 64, 64)
    exact, ours = copy.deepcopy(model).double(), copy.deepcopy(model).to("cuda")
    with torch.no_grad():
        assert relative_error(ours(x.to("cuda")), exact(x.double())) <= 1e-4
    for (name, right), got in zip(exact.named_buffers(), ours.buffers(), strict=True):
        if right.is_floating_point():
            assert relative_error(got, right) <= 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_timms(dtype):
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    shape = {"embed_dim": (32, 64, 96, 128), "depths": (1, 2, 2, 1)}
    cfg = maxxvit.MaxxVitCfg(**shape, block_type=tuple("CCTT"), stem_width=16, head_hidden_size=128)
    theirs = randomise(maxxvit.MaxxVit(cfg, img_size=(128, 96), num_classes=7))
    ours = CoAtNet(img_size=(128, 96), num_classes=7, stem_dim=16, **shape, layout="CCTT", downsample="depthwise")
    load_weights(ours, theirs)
    assert_as_exact_as_theirs(ours.eval(), theirs, pictures(8, 128, 96), dtype)


def test_compiled_forward_and_backward():
    assert_compiled_is_eager(small(), pictures(4, 64, 64))


@pytest.mark.parametrize("build", [small, lambda: randomise(create_model("convvit_tiny", **CONV_VIT))])
def test_channels_last(build):
    model, x = build().to("cuda"), pictures(2, 64, 64).to("cuda")
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        assert relative_error(model(x.contiguous(memory_format=torch.channels_last)), expected) <= 1e-5
