"""Names, files, metrics, graphs: what all models of dense prediction share."""

import sys

import pytest
import torch

from tests._dense import random_boxes, randomised, target
from vitcourse import create_model, list_models, save_weights
from vitcourse.dense_prediction import (
    DetectionMetric,
    SegmentationMetric,
    check_targets,
    mean_loss,
    near_boundary,
    to_masks,
)
from vitcourse.dense_prediction.matching import hungarian

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


# ------------------------------------------------------------------------------------------------------------ metrics


def test_mean_average_precision_is_cocos():
    """Perfect boxes give 1, moved ones what their IoU passes; small objects by the caller's size."""
    pytest.importorskip("torchmetrics")
    boxes = [random_boxes(5, (128, 128), smallest=8) for _ in range(3)]
    targets = [{"boxes": b, "labels": torch.arange(5) % 2} for b in boxes]
    perfect = [{**t, "scores": torch.rand(5)} for t in targets]
    metric = DetectionMetric(classes=["cat", "dog"])
    metric.update(perfect, targets)
    found = metric.compute()
    assert found["map"] == found["map_cat"] == found["map_dog"] == found["mar"] == 1.0
    shrunk = [
        {
            **p,
            "boxes": torch.cat(
                [
                    p["boxes"][:, :2],
                    p["boxes"][:, 2:] - 0.3 * (p["boxes"][:, 2:] - p["boxes"][:, :2]) * torch.tensor([1.0, 0.0]),
                ],
                1,
            ),
        }
        for p in perfect
    ]
    metric = DetectionMetric()
    metric.update(shrunk, targets)
    found = metric.compute()
    assert found["map_50"] == 1.0 and found["map_75"] == 0.0 and 0.3 < found["map"] < 0.6  # IoU 0.7
    box = torch.tensor([[10.0, 10, 30, 30]])
    one = [{"boxes": box, "labels": torch.tensor([0]), "scores": torch.tensor([0.5])}]
    for size, small_map, medium in ((32.0, 1.0, None), (16.0, None, 1.0)):
        metric = DetectionMetric(small=size)
        metric.update(one, one)
        result = metric.compute()
        assert (result["map_small"], result["map_medium"], result["map_large"]) == (small_map, medium, None)
    nothing = DetectionMetric()
    nothing.update(
        [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}], [target([], [])]
    )
    assert nothing.compute()["map"] is None


def test_masks_have_a_mean_average_precision_too():
    pytest.importorskip("torchmetrics")
    made = [target([[2, 2, 20, 20], [10, 8, 30, 30]], [0, 1], (32, 32))]
    found = [{**made[0], "scores": torch.tensor([0.9, 0.8])}]
    metric = DetectionMetric(masks=True)
    metric.update(found, made)
    assert metric.compute()["map"] == 1.0
    with pytest.raises(ValueError, match="small 16 is for boxes; of masks, sizes are COCO's"):
        DetectionMetric(masks=True, small=16)


def test_mean_iou_is_over_the_data_set_and_over_classes_that_occur():
    pytest.importorskip("torchmetrics")
    found, wanted = torch.randint(0, 3, (4, 9, 11)), torch.randint(0, 3, (4, 9, 11))
    wanted[0, 0] = 255
    metric = SegmentationMetric(5, classes=list("abcde"))
    for i in range(4):
        metric.update(torch.nn.functional.one_hot(found[i : i + 1], 5).permute(0, 3, 1, 2).float(), wanted[i : i + 1])
    counted = wanted != 255
    ious = []
    for k in range(3):
        a, b = (found == k) & counted, wanted == k
        ious.append(((a & b).sum() / (a | b).sum()).item())
    result = metric.compute()
    assert result["miou"] == pytest.approx(sum(ious) / 3, abs=1e-6)
    assert [result[f"iou_{c}"] for c in "abc"] == pytest.approx(ious, abs=1e-6) and "iou_d" not in result
    assert result["pixel_accuracy"] == pytest.approx((found == wanted)[counted].float().mean().item(), abs=1e-6)
    near = near_boundary(wanted, 2)
    assert result["boundary_accuracy"] == pytest.approx((found == wanted)[near].float().mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match="differ in size"):
        metric.update(found[:, :4], wanted)


def test_boundaries_are_where_another_class_is_near():
    labels = torch.zeros(1, 6, 8, dtype=torch.int64)
    labels[0, :, 4:] = 1
    labels[0, 0] = 255
    near = near_boundary(labels, 1)[0]
    assert near[1:, 3:5].all() and near.sum() == 10


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(
        ImportError, match=r"mean average precision needs faster_coco_eval: pip install 'vitcourse\[dense\]'"
    ):
        DetectionMetric()
    with pytest.raises(
        ImportError, match=r"mean IoU needs torchmetrics.classification: pip install 'vitcourse\[dense\]'"
    ):
        SegmentationMetric(3)
    with pytest.raises(ImportError, match=r"Hungarian matching needs scipy.optimize: pip install 'vitcourse\[dense\]'"):
        hungarian([torch.zeros(2, 2)])


def test_masks_of_a_map_train_eomt():
    model = randomised(small("eomt"), std=0.2).train()
    labels = torch.randint(0, 3, (2, 32, 32))
    targets = [to_masks(one) for one in labels]
    check_targets(targets, 2, 3, (32, 32), masks=True)
    assert mean_loss(model.losses(model(torch.rand(2, 3, 32, 32)), targets)).isfinite()


@pytest.mark.parametrize("name", ["fcos", "detr", "eomt"])
def test_benchmarked_steps_do_the_same_work(name):
    """In place of times, which depend on the machine: the operations of a step, counted."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import dense

    if name != "fcos":
        pytest.importorskip("transformers")
    counts = {}
    for kind, step in dense.steps(name, "train", False, "cpu").items():
        with FlopCounterMode(display=False) as counter:
            step()
        counts[kind] = counter.get_total_flops()
    ours, (theirs,) = counts.pop("ours"), counts.values()
    assert 0.95 < ours / theirs <= 1.03


def test_scenes_of_the_feasibility_study_hold_what_their_boxes_say():
    from benchmarks.detr_feasibility import VARIANTS, SimpleScenes

    scenes = SimpleScenes(64, 0)
    for i in range(5):
        image, target = scenes[i]
        check_targets([target], 1, 3, (64, 64), masks=False)
        assert image.shape == (3, 64, 64) and torch.equal(image, scenes[i][0])
    assert set(VARIANTS) > {"plain", "few", "proposals", "proposals+denoising"}
