"""Names, files, targets: what all models of dense prediction share."""

import pytest
import torch

from tests._dense import randomised, target
from vitcourse import create_model, list_models, save_weights
from vitcourse.dense_prediction import check_targets, mean_loss, to_masks
from vitcourse.registry import in_head

PLAIN = {"backbone": "vit_tiny", "backbone_args": {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}}
SWIN = {"backbone": "swin_tiny", "backbone_args": {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2]}}
COATNET = {
    "backbone": "coatnet_0",
    "backbone_args": {
        **{"stem_dim": 8, "embed_dim": [8, 16], "depths": [1, 1], "layout": "CT"},
        **{"strides": [2, 2], "head_dim": 8},
    },
}
BACKBONES = {"plain": PLAIN, "swin": SWIN, "coatnet": COATNET}
SMALL = {
    "fcos": {"channels": 8, "num_convs": 1},
    "detr": {"embed_dim": 16, "num_queries": 4, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 2, "mlp_dim": 16},
    "unet": {"channels": 4},
    "segmenter": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "eomt": {"num_queries": 4, "num_blocks": 2},
}
FULL_DETR = {"queries": "proposals", "denoising": 2}
PAIRS = [(name, kind) for name in SMALL for kind in BACKBONES if name != "eomt" or kind == "plain"]


def small(name, kind="plain", **changes):
    return create_model(name, **{"img_size": 32, "num_classes": 3, **BACKBONES[kind], **SMALL[name], **changes})


def flat(output):
    parts = [output] if isinstance(output, torch.Tensor) else [p for p in output if isinstance(p, torch.Tensor)]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_file_brings_the_whole_model_back(name, kind, tmp_path):
    model = randomised(small(name, kind))
    model.classes = ["a", "b", "c"]
    images = torch.rand(2, 3, 32, 32)
    save_weights(model, tmp_path / "model.safetensors", task="detect")
    again = create_model(tmp_path / "model.safetensors").eval()
    expected = flat(model(images))
    assert expected.std() > 0.01 and torch.equal(flat(again(images)), expected)
    assert (again.classes, again.num_classes, again.img_size) == (["a", "b", "c"], 3, (32, 32))
    assert again.preprocess == model.preprocess and model.preprocess.crop_pct == 1.0
    assert model.preprocess.mean == create_model(BACKBONES[kind]["backbone"]).preprocess.mean


@pytest.mark.parametrize("name", SMALL)
def test_other_classes_and_other_sizes(name, tmp_path):
    model = randomised(small(name, num_classes=3))
    save_weights(model, tmp_path / "model.safetensors")
    larger = create_model(tmp_path / "model.safetensors", img_size=48).eval()
    images = torch.rand(1, 3, 48, 48)
    torch.testing.assert_close(flat(larger(images)), flat(model(images)), rtol=1e-4, atol=1e-4)
    model.reset_classifier(5)
    output = model(torch.rand(1, 3, 32, 32))
    shape = output.shape[1:2] if isinstance(output, torch.Tensor) else output.logits.shape[-1:]
    assert shape in ((5,), (6,)) and model.num_classes == 5
    save_weights(model, tmp_path / "five.safetensors")
    assert create_model(tmp_path / "five.safetensors").num_classes == 5


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in SMALL), ("detr", FULL_DETR)])
def test_a_file_for_other_classes_begins_with_a_new_head(name, changes, tmp_path, capsys):
    """All that ``reset_classifier`` makes anew, and no more, is what a model says of its head."""
    model, path = randomised(small(name, **changes)), tmp_path / "model.safetensors"
    model.classes = ["a", "b", "c"]
    save_weights(model, path)
    capsys.readouterr()
    other = create_model(path, num_classes=5)
    assert capsys.readouterr().err.splitlines() == [
        "vitcourse: weights are for 3 classes, not 5: the head starts untrained"
    ]
    assert other.num_classes == 5 and other.classes is None
    state, kept = model.state_dict(), {name for name in model.state_dict() if not in_head(model, name)}
    assert all(torch.equal(other.state_dict()[name], state[name]) for name in kept)
    before = dict(model.state_dict(keep_vars=True))
    model.reset_classifier(5)
    assert {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor is not before[name]} == {
        name for name in before if in_head(model, name)
    }
    assert create_model(path, num_classes=3).classes == ["a", "b", "c"] and capsys.readouterr().err == ""


def test_labels_for_denoising_may_begin_untrained(tmp_path, capsys):
    model, path = randomised(small("detr", queries="anchors")), tmp_path / "model.safetensors"
    save_weights(model, path)
    with pytest.raises(ValueError, match=r"missing: label_embed\.weight"):
        create_model(path, denoising=2)
    again = create_model(path, denoising=2, num_classes=3)
    assert "weights have no label_embed.weight: these start untrained" in capsys.readouterr().err
    assert torch.equal(again.class_head.weight, model.class_head.weight)


def test_names_are_listed_and_their_arguments_checked():
    assert set(SMALL) <= set(list_models())
    with pytest.raises(TypeError, match="model 'detr' has no argument 'num_querys'; did you mean 'num_queries'"):
        create_model("detr", num_querys=3)
    with pytest.raises(ValueError, match="model 'vit_tin' is unknown; did you mean 'vit_tiny'"):
        create_model("fcos", backbone="vit_tin")


@pytest.mark.parametrize("name", SMALL)
def test_grey_images_and_checkpointing(name):
    model = randomised(small(name, in_chans=1), std=0.1).train()
    images = torch.rand(2, 1, 32, 32)
    assert model.preprocess.mean == (0.5,)
    targets = [target([[2, 2, 20, 20]], [1], (32, 32))] * 2
    if model.wants == "map":
        targets = torch.randint(0, 3, (2, 32, 32))
    model.check_targets(targets, 2, (32, 32))
    with pytest.raises(ValueError, match="targets"):
        model.check_targets(targets[:1], 2, (32, 32))
    with pytest.raises(ValueError, match="out of the image|resize both alike"):
        model.check_targets(targets, 2, (16, 16))
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        mean_loss(model.losses(model(images, targets), targets)).backward()
        grads.append(model.backbone.blocks[0].mlp.fc1.weight.grad.clone())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0])


def test_what_decay_leaves_alone():
    from vitcourse.train.optim import param_groups

    for name in SMALL:
        model = small(name)
        _, others = param_groups(model)
        ids = {id(p) for p in others["params"]}
        spared = {n for n, p in model.named_parameters() if id(p) in ids and p.ndim > 1}
        expected = {"query_embed", "queries", "decoder.cls_embed"} & {n for n, _ in model.named_parameters()}
        assert expected <= spared and "backbone.pos_embed" in spared, name


def test_masks_of_a_map_train_eomt():
    model = randomised(small("eomt"), std=0.2).train()
    labels = torch.randint(0, 3, (2, 32, 32))
    targets = [to_masks(one) for one in labels]
    check_targets(targets, 2, 3, (32, 32), masks=True)
    assert mean_loss(model.losses(model(torch.rand(2, 3, 32, 32)), targets)).isfinite()
