"""transformers' DETR and EoMT in our models: from memory, from a folder, from a bare state dict."""

import json

import pytest
import torch
from torch import nn

from tests._dense import randomised
from vitcourse import create_model, load_weights, save_weights
from vitcourse.dense_prediction.resnet import ResNet

transformers = pytest.importorskip("transformers")

DETR = {"embed_dim": 32, "num_queries": 6, "num_heads": 4, "encoder_depth": 2, "decoder_depth": 2, "mlp_dim": 40}
EOMT = {"num_queries": 6, "num_blocks": 2}
VIT = {
    **{"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2},
    **{"reg_tokens": 2, "no_embed_class": True, "init_values": 1.0},
}


def detr(**changes) -> nn.Module:
    args = {"backbone": "resnet18", "backbone_args": {"depths": (1, 1, 1, 1)}, "img_size": 64, "num_classes": 5, **DETR}
    return create_model("detr", **{**args, **changes}).eval()


def eomt(inner=(), **changes) -> nn.Module:
    args = {"backbone": "vit_tiny", "backbone_args": {**VIT, **dict(inner)}, "img_size": 32, "num_classes": 5, **EOMT}
    return create_model("eomt", **{**args, **changes}).eval()


def their_detr(backbone: dict | None = None, **changes) -> nn.Module:
    small = {"model_type": "resnet", "hidden_sizes": [64, 128, 256, 512], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    config = transformers.DetrConfig(
        backbone_config={**(backbone or small), "out_features": ["stage4"]} if backbone is None else backbone,
        use_timm_backbone=False,
        num_labels=5,
        **{"d_model": 32, "num_queries": 6, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 40, **changes},
    )
    torch.manual_seed(1)
    model = randomised(transformers.DetrForObjectDetection(config), std=0.35)
    for module in model.modules():  # frozen norms, all of whose numbers are buffers
        if type(module).__name__ == "DetrFrozenBatchNorm2d":
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.3)
    for parameter in model.model.backbone.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, mode="fan_out")
    return model.eval()


def their_eomt(**changes) -> nn.Module:
    config = transformers.EomtConfig(
        **{"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
        | {"num_upscale_blocks": 1, "num_blocks": 2, "num_queries": 6, "num_register_tokens": 2, "num_labels": 5}
        | {"layer_norm_eps": 1e-2, **changes}
    )
    torch.manual_seed(1)
    model = randomised(transformers.EomtForUniversalSegmentation(config), std=0.3)
    model.attn_mask_probs.copy_(torch.tensor([0.0, 1.0])[: config.num_blocks])
    return model


def images(side: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (theirs[0] - theirs[1]).abs().max() > 0.02 and theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def peer() -> nn.Module:
    return their_detr()


@torch.no_grad()
def same_detections(ours: nn.Module, theirs: nn.Module, side: int = 64) -> None:
    found, expected = ours(images(side)), theirs(images(side))
    same(found.logits[-1], expected.logits)
    same(found.boxes[-1], expected.pred_boxes)


@torch.no_grad()
def same_masks(ours: nn.Module, theirs: nn.Module) -> None:
    found, expected = ours(images(32)), theirs(images(32))
    same(found.logits[-1], expected.class_queries_logits)
    same(found.masks[-1], expected.masks_queries_logits)


@pytest.mark.parametrize("source", ["model", "folder", "state"])
def test_detr_is_transformers(source, peer, tmp_path, capsys):
    """All of it, the backbone of transformers' own kind included; the folder has the names of the hub."""
    peer.save_pretrained(tmp_path)
    ours = load_weights(detr(), {"model": peer, "folder": f"hf:{tmp_path}", "state": peer.state_dict()}[source])
    same_detections(ours, peer)
    assert "vitcourse:" not in capsys.readouterr().err


def test_detr_around_a_backbone_of_timm():
    """As the hub's files are: facebook/detr-resnet-50 has timm's ResNet."""
    pytest.importorskip("timm")
    inner = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [1, 2, 3, 4]}
    peer = their_detr({**inner, "features_only": True, "use_pretrained_backbone": False})
    assert "model.backbone.model.layer4.1.conv2.weight" in peer.state_dict()
    same_detections(load_weights(detr(backbone_args=None), peer), peer)
    old = {}  # the names of the hub's files, before transformers 5
    for name, tensor in peer.state_dict().items():
        name = name.replace(".backbone.", ".backbone.conv_encoder.").replace("o_proj", "out_proj")
        old[name if ".backbone." in name else name.replace(".mlp.fc", ".fc")] = tensor
    assert "model.decoder.layers.0.fc1.weight" in old and "model.encoder.layers.0.self_attn.out_proj.bias" in old
    same_detections(load_weights(detr(backbone_args=None), old), peer)


def test_a_resnet_with_bottlenecks_and_without_the_last_stride():
    pytest.importorskip("timm")
    inner = {"model_type": "timm_backbone", "backbone": "resnet50", "out_indices": [1, 2, 3, 4], "features_only": True}
    peer = their_detr({**inner, "use_pretrained_backbone": False, "output_stride": 16}, dilation=True)
    ours = detr(backbone="resnet50", backbone_args={"dilated": True})
    same_detections(load_weights(ours, peer), peer)
    with pytest.raises(ValueError, match=r"stride: \(1, 1\) there, \(2, 2\) in the model \(backbone\.layer4\.0\."):
        load_weights(detr(backbone="resnet50", backbone_args=None), peer)


def test_a_detr_with_other_classes_begins_with_a_new_head(peer, capsys):
    model = create_model("detr", **{**detr().model_args, "num_classes": 3}, weights=peer).eval()
    assert "weights are for 5 classes, not 3: the head starts untrained" in capsys.readouterr().err
    with torch.no_grad():
        same(model(images(64)).boxes[-1], peer(images(64)).pred_boxes)
    with pytest.raises(ValueError, match=r"class_head\.\w+ is \(6.*\n.*new_head=True"):
        load_weights(detr(num_classes=3), peer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 8}, "num_heads: 4 there, 8 in the model"),
        ({"num_queries": 7}, r"query_embed is \(6, 32\), the model's \(7, 32\)"),
        ({"decoder_depth": 1}, r"not in the model: decoder\.1"),
        (
            {"backbone": "swin_tiny", "backbone_args": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}},
            r"which are for Detr, do not fit detr:(.|\n)*missing: backbone(.|\n)*is a ResNet: .*backbone='resnet50'",
        ),
    ],
)
def test_a_detr_that_is_another_is_refused(changes, message, peer):
    with pytest.raises(ValueError, match=message):
        load_weights(detr(**changes), peer)


def test_the_transformer_alone_around_another_backbone(peer, capsys):
    """With strict=False, where the map is as wide."""
    inner = {"embed_dim": 128, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 4}
    model = detr(backbone="swin_tiny", backbone_args=inner)
    before = model.backbone.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    load_weights(model, peer.state_dict(), strict=False)
    assert "weights loaded in part; missing: backbone." in capsys.readouterr().err
    assert torch.equal(model.query_embed, peer.model.query_position_embeddings.weight)
    assert torch.equal(model.input_proj.weight, peer.model.input_projection.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_embedding_type": "learned"}, "'learned' of the weights: vitcourse's Detr has sine positions"),
        ({"activation_function": "gelu"}, r"activation: GELU.* there, ReLU\(\) in the model \(encoder\.0\.mlp\.1\)"),
        ({"activation_function": "quick"}, "activation_function 'quick' of the weights is unknown"),
        ({"encoder_attention_heads": 2}, r"num_heads: 2 there, 4 in the model \(encoder\.0\.self_attn\)"),
        ({"backbone_config": {"model_type": "swin"}}, "backbone of the weights is 'swin', .* takes over ResNets alone"),
        (
            {"model_type": "conditional_detr"},
            "transformers' 'conditional_detr'; .*Detr takes those of detr",
        ),
    ],
)
def test_a_config_of_what_computes_otherwise_is_refused(options, message, peer, tmp_path):
    peer.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | options), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_weights(detr(), f"hf:{tmp_path}")


def test_folders_tell_how_images_are_prepared(peer, tmp_path):
    peer.save_pretrained(tmp_path)
    told = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    told |= {"size": {"shortest_edge": 800, "longest_edge": 1333}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told), encoding="utf-8")
    model = load_weights(detr(), f"hf:{tmp_path}")
    found = model.preprocess
    assert (found.mean, found.std, found.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert found.img_size == 64 and found.crop_pct == 1.0
    save_weights(model, tmp_path / "ours.safetensors")
    assert create_model(tmp_path / "ours.safetensors").preprocess == found


# ---------------------------------------------------------------------------------------------------------------- EoMT


@pytest.mark.parametrize("source", ["model", "folder", "state"])
def test_eomt_is_transformers(source, tmp_path, capsys):
    """With eps 1e-2, where nobody could overlook it; a bare state dict does not tell it."""
    peer = their_eomt()
    peer.save_pretrained(tmp_path)
    ours = eomt({"norm_eps": 1e-2} if source == "state" else {})
    load_weights(ours, {"model": peer, "folder": f"hf:{tmp_path}", "state": peer.state_dict()}[source])
    same_masks(ours, peer)
    assert ours.mask_probs.tolist() == [0.0, 1.0] and "left out" not in capsys.readouterr().err
    save_weights(ours, tmp_path / "ours.safetensors")
    again = create_model(tmp_path / "ours.safetensors").eval()
    assert again.backbone.norm_eps == 1e-2
    same_masks(again, peer)


def test_eomt_without_registers_and_with_other_classes(capsys):
    peer = their_eomt(num_register_tokens=0)
    same_masks(load_weights(eomt({"reg_tokens": 0}), peer), peer)
    args = {**eomt({"reg_tokens": 0}).model_args, "num_classes": 9}
    capsys.readouterr()
    model = create_model("eomt", **args, weights=peer).eval()
    assert "weights are for 5 classes, not 9: the head starts untrained" in capsys.readouterr().err
    same(model(images(32)).masks[-1], peer(images(32)).masks_queries_logits)


def test_eomt_at_another_size():
    """Positions are interpolated, as a ViT's are."""
    peer = their_eomt()
    model = load_weights(eomt(img_size=48), peer)
    alike = load_weights(eomt(), peer)
    x = images(48)
    torch.testing.assert_close(model(x).masks, alike(x).masks, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("inner", "changes", "message"),
    [
        ({"num_heads": 4}, {}, r"num_heads: 2 there, 4 in the model"),
        ({}, {"num_blocks": 3}, r"mask_probs is \(2,\), the model's \(3,\)(.|\n)*build the model with that num_blocks"),
        ({"reg_tokens": 0}, {}, r"not in the model: backbone\.reg_token"),
        ({"patch_size": 16}, {}, r"which are for Eomt, do not fit eomt"),
    ],
)
def test_an_eomt_that_is_another_is_refused(inner, changes, message):
    with pytest.raises(ValueError, match=message):
        load_weights(eomt(inner, **changes), their_eomt())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "relu"}, r"activation: ReLU\(\) there, GELU"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn of the weights: vitcourse's ViT has no SwiGLU"),
        ({"num_attention_heads": 4}, "num_heads: 4 there, 2 in the model"),
        ({"model_type": "eomt_dinov3"}, "transformers' 'eomt_dinov3'; .*Eomt takes those of eomt"),
    ],
)
def test_a_config_of_another_eomt_is_refused(options, message, tmp_path):
    their_eomt().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | options), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_weights(eomt(), f"hf:{tmp_path}")


def test_weights_of_one_model_are_not_another_models(peer):
    with pytest.raises(ValueError, match="which are for Detr, do not fit eomt"):
        load_weights(eomt(), peer)
    with pytest.raises(ValueError, match="which are for Eomt, do not fit vit_tiny"):
        load_weights(create_model("vit_tiny"), their_eomt())


# -------------------------------------------------------------------------------------------------------------- ResNet


@torch.no_grad()
def test_resnet_is_torchvisions_and_timms():
    timm = pytest.importorskip("timm")
    from torchvision.models import resnet18

    x = images(64)
    for peer in (randomised(resnet18(num_classes=7)), randomised(timm.create_model("resnet18", num_classes=7))):
        for parameter in peer.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, mode="fan_out")
        for frozen in (True, False):
            ours = load_weights(create_model("resnet18", num_classes=7, frozen_norms=frozen), peer).eval()
            same(ours(x), peer(x))
        body = create_model("resnet18", num_classes=0, weights=peer).eval()
        maps = body.feature_maps(x)
        assert [m.shape[1:] for m in maps] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
        same(maps[-1].mean((2, 3)) @ peer.fc.weight.T + peer.fc.bias, peer(x))


def test_norms_of_a_backbone_keep_still():
    body = create_model("resnet18", depths=(1, 1, 1, 1)).train()
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    body.set_grad_checkpointing()
    body(images(32)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in body.state_dict().items())
    assert body.conv1.weight.grad.abs().max() > 0 and "bn1.weight" not in dict(body.named_parameters())


def test_a_resnet_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="block 'wide' is unknown; use 'basic' or 'bottleneck'"):
        ResNet(block="wide")
    with pytest.raises(ValueError, match=r"depths \(2, 2\) must be of four stages"):
        ResNet(depths=(2, 2))
    with pytest.raises(ValueError, match="dilated needs block='bottleneck'"):
        ResNet(block="basic", dilated=True)
    with pytest.raises(ValueError, match=r"indices \(4,\) name stages that do not exist"):
        ResNet(depths=(1, 1, 1, 1), block="basic").feature_maps(images(32), (4,))
