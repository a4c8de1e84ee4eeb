"""Weights go from the device to a file, and from a file to the device."""

import pytest
import torch

from vitcourse import create_model, load_weights, save_weights

from .parity import randomise, relative_error

pytestmark = pytest.mark.gpu

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


def test_weights_travel_between_devices(tmp_path):
    model, x = randomise(create_model("vit_tiny", **SIZES)).to("cuda"), torch.randn(3, 3, 32, 32)
    save_weights(model, tmp_path / "model.safetensors")
    on_cpu = create_model(tmp_path / "model.safetensors").eval()
    assert all(p.device.type == "cpu" for p in on_cpu.parameters())
    with torch.no_grad():
        expected = model(x.to("cuda"))
        assert relative_error(on_cpu(x), expected) <= 1e-5
        again = load_weights(create_model("vit_tiny", **SIZES).to("cuda"), tmp_path / "model.safetensors").eval()
        assert all(p.is_cuda for p in again.parameters())
        assert torch.equal(again(x.to("cuda")), expected)


def test_positions_of_another_size_load_on_the_device():
    source = randomise(create_model("vit_tiny", **SIZES)).to("cuda")
    larger = {**SIZES, "img_size": 48}
    on_gpu = load_weights(create_model("vit_tiny", **larger).to("cuda"), source.state_dict())
    on_cpu = load_weights(create_model("vit_tiny", **larger), source.cpu().state_dict())
    assert relative_error(on_gpu.pos_embed.detach(), on_cpu.pos_embed.detach()) <= 1e-6


def test_a_new_head_is_made_where_the_model_is():
    model = create_model("vit_tiny", **SIZES).to("cuda")
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 32, 32, device="cuda")).shape == (2, 3)
