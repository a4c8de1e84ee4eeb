"""Checkpoints of transformers in our ViT: names of files and of models in memory, and what a config says beside."""

import json

import pytest
import torch
from torch import nn

from vitcourse import create_model, list_models, load_weights, save_weights
from vitcourse.notices import say_once
from vitcourse.weights.huggingface import facts_of_config, preprocess_of, translate

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter and every eps as no default has it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def ours(**options) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
    return create_model("vit_tiny", **{**sizes, **options}).eval()


def theirs(kind: str, **options) -> nn.Module:
    made = {
        "ViTForImageClassification": transformers.ViTConfig,
        "ViTModel": transformers.ViTConfig,
        "ViTMAEForPreTraining": transformers.ViTMAEConfig,
        "ViTMAEModel": transformers.ViTMAEConfig,
        "BeitForImageClassification": transformers.BeitConfig,
        "BeitModel": transformers.BeitConfig,
    }[kind]
    if "MAE" in kind:
        decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        options = {**decoder, "decoder_intermediate_size": 32, "mask_ratio": 0.0, **options}
    if "Beit" in kind:
        options = {"use_absolute_position_embeddings": True, **options}
    return randomise(getattr(transformers, kind)(made(**SIZES, num_labels=7, **options)))


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def features(model: nn.Module) -> torch.Tensor:
    """(B, N, D) after the norm; MAE's patches in their order, none of them hidden."""
    if model.config.model_type == "vit_mae":
        model = getattr(model, "vit", model)
        return model(images(), noise=torch.arange(16.0).expand(3, 16)).last_hidden_state
    return model(images()).last_hidden_state


BUILT = {
    "ViTForImageClassification": {},
    "ViTModel": {"num_classes": 0},
    "ViTMAEForPreTraining": {"num_classes": 0},
    "ViTMAEModel": {"num_classes": 0},
    "BeitForImageClassification": {"global_pool": "avg", "init_values": 0.1},
}


@pytest.mark.parametrize("kind", BUILT)
@pytest.mark.parametrize("source", ["model", "folder", "file", "state"])
def test_the_same_weights_compute_the_same(kind, source, tmp_path, capsys):
    """The eps is 1e-2 here, where nobody could overlook it; a bare state dict and file do not tell it."""
    peer = theirs(kind, layer_norm_eps=1e-2)
    say_once.cache_clear()
    told = source in ("model", "folder")
    model = ours(**BUILT[kind], **({} if told else {"norm_eps": 1e-2}))
    peer.save_pretrained(tmp_path)
    sources = {
        "model": peer,
        "folder": f"hf:{tmp_path}",
        "file": tmp_path / "model.safetensors",
        "state": peer.state_dict(),
    }
    load_weights(model, sources[source])
    err = capsys.readouterr().err
    if "Classification" in kind:
        found, expected = model(images()), peer(images()).logits
    else:
        found, expected = model.forward_features(images()), features(peer)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1
    assert ("the norms take over eps 0.01" in err) == told
    left_out = {"ViTModel": "pooler.dense", "ViTMAEForPreTraining": "decoder"}.get(kind)
    assert ("left out of the weights" in err) == bool(left_out) and (not left_out or left_out in err)


def test_beit_with_a_cls_token_for_its_features():
    peer = theirs("BeitModel", use_mean_pooling=False)
    model = load_weights(ours(num_classes=0, init_values=0.1), peer)
    torch.testing.assert_close(model.forward_features(images()), features(peer), rtol=1e-5, atol=1e-5)


def test_the_eps_survives_in_a_file(tmp_path):
    model = load_weights(ours(), theirs("ViTForImageClassification", layer_norm_eps=1e-2))
    save_weights(model, tmp_path / "model.safetensors")
    again = create_model(tmp_path / "model.safetensors").eval()
    assert again.norm_eps == 1e-2 and torch.equal(again(images()), model(images()))
    default = ours()
    default.load_state_dict(model.state_dict())
    assert (default(images()) - model(images())).abs().max() > 1e-3


def test_another_size_another_head_and_grey_images(capsys):
    peer = theirs("ViTForImageClassification")
    model = create_model(
        "vit_tiny", **{**ours().model_args, "img_size": 48, "in_chans": 1, "num_classes": 4}, weights=peer
    )
    assert model(torch.randn(2, 1, 48, 48)).shape == (2, 4)
    err = capsys.readouterr().err
    assert "weights are for 7 classes, not 4" in err and "for 3 channels, not 1: summed" in err


@pytest.mark.parametrize(
    ("options", "built", "message"),
    [
        ({}, {"num_heads": 2}, r"num_heads: 4 there, 2 in the model"),
        ({"hidden_act": "relu"}, {}, r"activation: ReLU\(\) there"),
        ({"hidden_act": "quick"}, {}, "hidden_act 'quick' of the weights is unknown; known: gelu"),
        ({}, {"global_pool": "avg"}, "fc_norm"),
        ({"qkv_bias": False}, {}, r"missing: blocks\.0\.attn\.qkv\.bias"),
    ],
)
def test_weights_of_what_computes_otherwise_are_refused(options, built, message, tmp_path):
    theirs("ViTForImageClassification").save_pretrained(tmp_path)
    if "qkv_bias" in options:
        theirs("ViTForImageClassification", **options).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | options), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_weights(ours(**built), f"hf:{tmp_path}")


@pytest.mark.parametrize("option", ["use_relative_position_bias", "use_shared_relative_position_bias"])
def test_relative_positions_need_a_model_that_has_some(option):
    peer = theirs("BeitForImageClassification", **{option: True})
    with pytest.raises(ValueError, match=r"prefix_bias_table(.|\n)*relative positions, as BEiT has them"):
        load_weights(ours(global_pool="avg", init_values=0.1), peer)


@pytest.mark.skipif(not list_models("beit_tiny"), reason="the library has no BEiT")
@pytest.mark.parametrize("option", ["use_relative_position_bias", "use_shared_relative_position_bias"])
@pytest.mark.parametrize("source", ["model", "folder"])
def test_beit_with_relative_positions(option, source, tmp_path):
    peer = theirs("BeitForImageClassification", **{option: True, "use_absolute_position_embeddings": False})
    peer.save_pretrained(tmp_path)
    sizes = {key: ours().model_args[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    model = create_model("beit_tiny", **sizes, num_classes=7).eval()
    load_weights(model, peer if source == "model" else f"hf:{tmp_path}")
    torch.testing.assert_close(model(images()), peer(images()).logits, rtol=1e-5, atol=1e-5)
    assert peer(images()).logits.std() > 0.1


def test_tables_of_relative_positions_are_parted():
    """Older files have a buffer of indices beside; the three last rows are of [CLS]."""
    block, table = "beit.encoder.layer.0.attention.attention", torch.arange(12.0).view(12, 1)
    state = {
        f"{block}.relative_position_bias.relative_position_bias_table": table,
        f"{block}.relative_position_bias.relative_position_index": torch.zeros(2, 2),
    }
    found, _ = translate(state)
    assert found["blocks.0.attn.prefix_bias_table"].flatten().tolist() == [9, 10, 11]
    assert torch.equal(found["blocks.0.attn.relative_position_bias_table"], table[:9]) and len(found) == 2
    weight = {f"{block}.query.weight": torch.zeros(1, 1), f"{block}.key.weight": torch.zeros(1, 1)}
    weight[f"{block}.value.weight"] = torch.zeros(1, 1)
    found, _ = translate({**weight, "beit.encoder.relative_position_bias.relative_position_bias_table": table})
    assert set(found) == {
        f"blocks.0.attn.{n}" for n in ("qkv.weight", "relative_position_bias_table", "prefix_bias_table")
    }


def test_other_models_are_refused():
    with pytest.raises(ValueError, match=r"transformers' 'deit'; vitcourse's ViT takes those of vit, vit_mae, beit"):
        facts_of_config({"model_type": "deit"}, True)


def test_older_names_are_known():
    """Of files on the hub, whatever the transformers at hand calls them."""
    block = "vit.encoder.layer.1"
    names = {
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        f"{block}.attention.output.dense.bias": "blocks.1.attn.proj.bias",
        f"{block}.intermediate.dense.weight": "blocks.1.mlp.fc1.weight",
        f"{block}.output.dense.weight": "blocks.1.mlp.fc2.weight",
        f"{block}.layernorm_after.bias": "blocks.1.norm2.bias",
        "vit.layernorm.weight": "norm.weight",
        "classifier.bias": "head.bias",
    }
    qkv = {f"{block}.attention.attention.{name}.bias": torch.full((2,), float(i)) for i, name in enumerate(QKV)}
    found, left_out = translate({**dict.fromkeys(names, torch.zeros(1)), **qkv, "decoder.mask_token": torch.zeros(1)})
    assert found.keys() == {*names.values(), "blocks.1.attn.qkv.bias"} and left_out == ["decoder"]
    assert found["blocks.1.attn.qkv.bias"].tolist() == [0, 0, 1, 1, 2, 2]


QKV = ("query", "key", "value")


def test_folders_tell_how_images_are_prepared(tmp_path):
    theirs("ViTForImageClassification").save_pretrained(tmp_path)
    told = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "size": {"height": 32, "width": 32},
        "resample": 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told), encoding="utf-8")
    model = load_weights(ours(), f"hf:{tmp_path}")
    assert model.preprocess.mean == (0.1, 0.2, 0.3) and model.preprocess.interpolation == "bicubic"
    assert model.preprocess.img_size == 32 and model.preprocess.crop_pct == 1.0
    cropped = preprocess_of({**told, "size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True})
    assert cropped.img_size == 224 and cropped.crop_pct == 0.875 and preprocess_of({}) is None


def test_parts_of_a_checkpoint_are_put_together(tmp_path):
    peer = theirs("ViTForImageClassification")
    peer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(load_weights(ours(), f"hf:{tmp_path}")(images()), peer(images()).logits)


def test_incomplete_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_weights(ours(), f"hf:{tmp_path}")
    theirs("ViTForImageClassification").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt"):
        load_weights(ours(), f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        load_weights(ours(), f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is corrupt"):
        load_weights(ours(), f"hf:{tmp_path}")


def test_without_a_network_the_remedy_is_named(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=r"config\.json of hf:nobody/nothing is neither.*hf download nobody/nothing"
    ):
        load_weights(ours(), "hf:nobody/nothing")


def test_the_hub_is_asked_for_the_files_of_a_revision(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    peer = theirs("ViTForImageClassification")
    peer.save_pretrained(tmp_path)
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        if not (tmp_path / file).exists():
            raise hub.errors.EntryNotFoundError(f"no {file}")
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    torch.testing.assert_close(load_weights(ours(), "hf:some/vit@v2")(images()), peer(images()).logits)
    assert asked[0] == ("some/vit", "config.json", "v2") and ("some/vit", "model.safetensors", "v2") in asked


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install huggingface_hub; or give a folder"):
        load_weights(ours(), "hf:some/vit")
