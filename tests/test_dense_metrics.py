"""Mean average precision, mean IoU, and accuracy near boundaries."""

import sys

import pytest
import torch

from tests._dense import random_boxes, target
from vitcourse.dense_prediction import DetectionMetric, SegmentationMetric, near_boundary
from vitcourse.dense_prediction.matching import hungarian


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


def test_what_lies_on_a_crowd_is_neither_right_nor_wrong():
    boxes, labels = torch.tensor([[4.0, 4, 14, 14], [20, 20, 60, 60]]), torch.tensor([0, 0])
    found = {"boxes": boxes, "labels": labels, "scores": torch.tensor([0.5, 0.9])}
    for iscrowd, expected in ((None, 1.0), ([0, 1], 1.0)):
        metric, target = DetectionMetric(), {"boxes": boxes, "labels": labels}
        if iscrowd:
            target["iscrowd"] = torch.tensor(iscrowd)
        metric.update([found], [target])
        assert metric.compute()["map"] == expected
    metric = DetectionMetric()  # the surest one is wrong where there is nothing
    metric.update([found], [{"boxes": boxes[:1], "labels": labels[:1]}])
    assert metric.compute()["map"] == 0.5


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
