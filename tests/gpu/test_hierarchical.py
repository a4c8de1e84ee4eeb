"""Swin and Swin V2 on CUDA: against the CPU in float64, timm in half precision, and themselves compiled."""

import pytest
import timm
import torch

from vitcourse import create_model
from vitcourse.hierarchical import V2, SwinTransformer
from vitcourse.hierarchical.windows import cached_shift_mask

from .parity import (
    assert_as_exact_as_theirs,
    assert_compiled_is_eager,
    assert_same_as_on_the_cpu,
    pictures,
    randomise,
    relative_error,
)

pytestmark = pytest.mark.gpu

SMALL = {"img_size": 36, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5, "window_size": 4}
VERSIONS = pytest.mark.parametrize("extra", [{}, V2], ids=["v1", "v2"])


@VERSIONS
@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("size", [(36, 36), (61, 90)])
def test_logits_and_gradients_are_those_of_the_cpu(extra, mask_padding, size):
    """The second size divides neither into patches nor into windows."""
    model = randomise(SwinTransformer(**SMALL, mask_padding=mask_padding, **extra))
    assert_same_as_on_the_cpu(model, pictures(3, *size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_half_precision_is_as_exact_as_timms(name, dtype):
    theirs = randomise(timm.create_model(name))
    ours = create_model(name).eval()
    ours.load_state_dict(theirs.state_dict())
    assert_as_exact_as_theirs(ours, theirs, pictures(4, *ours.img_size), dtype)


@VERSIONS
def test_compiled_forward_and_backward(extra):
    assert_compiled_is_eager(randomise(SwinTransformer(**SMALL, **extra)), pictures(3, 36, 52))


def test_channels_last():
    model, x = randomise(SwinTransformer(**SMALL)).to("cuda"), pictures(2, 36, 52).to("cuda")
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        assert relative_error(model(x.contiguous(memory_format=torch.channels_last)), expected) <= 1e-5


@VERSIONS
@torch.no_grad()
def test_backends_agree(extra):
    model, x = randomise(SwinTransformer(**SMALL, **extra)).to("cuda"), pictures(2, 36, 52).to("cuda")
    logits = []
    for backend in ("math", "sdpa"):
        for stage in model.layers:
            for block in stage.blocks:
                block.attn.backend = backend
        logits.append(model(x))
    assert relative_error(*logits) <= 1e-5


def test_masks_are_kept_for_each_device():
    arguments = ((20, 12), (4, 4), (2, 2), False)
    on_cpu = cached_shift_mask(*arguments, like=torch.zeros(1))
    on_gpu = cached_shift_mask(*arguments, like=torch.zeros(1, device="cuda"))
    assert (on_cpu.device.type, on_gpu.device.type) == ("cpu", "cuda")
    assert torch.equal(on_gpu.cpu(), on_cpu)
    assert cached_shift_mask(*arguments, like=torch.zeros(1, device="cuda")) is on_gpu
