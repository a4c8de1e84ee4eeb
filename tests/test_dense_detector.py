"""Pyramids and FCOS against torchvision's and detectron2's definitions."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, generalized_box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from tests._dense import BACKBONES, plain, random_boxes, randomised, swin, target
from vitcourse.dense_prediction.boxes import check_targets, giou, to_centres, to_corners
from vitcourse.dense_prediction.fcos import Fcos, FcosHead, FcosLoss, Points, assign, points_of
from vitcourse.dense_prediction.pyramid import FeaturePyramid, Pyramid, SimpleFeaturePyramid
from vitcourse.dense_prediction.terms import Term, mean_loss, sum_and_count

# ---------------------------------------------------------------------------------------------------------- pyramids


@pytest.mark.parametrize("extra", ["", "pool", "p6p7"])
def test_the_feature_pyramid_is_torchvisions(extra):
    blocks = {"": None, "pool": LastLevelMaxPool(), "p6p7": LastLevelP6P7(12, 12)}
    theirs = randomised(FeaturePyramidNetwork([8, 16, 24], 12, blocks[extra]))
    ours = FeaturePyramid([8, 16, 24], 12, extra)
    names = {"inner_blocks": "lateral", "layer_blocks": "output", "extra_blocks": "extra"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        kind, _, rest = name.partition(".")
        state[f"{names[kind]}.{rest.replace('.0.', '.')}"] = tensor
    ours.load_state_dict(state)
    maps = [torch.randn(2, c, *size) for c, size in ((8, (13, 17)), (16, (7, 9)), (24, (4, 5)))]
    expected = list(theirs(OrderedDict(zip("abc", maps, strict=True))).values())
    found = ours(maps)
    assert len(found) == len(expected) and min(m.std() for m in expected) > 0.1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def detectron2s_simple_pyramid(x, p, channels):
    """As detectron2's SimpleFeaturePyramid has it, in functions: conv without bias, then layer norm over channels."""

    def norm(x, name):
        x = x.permute(0, 2, 3, 1)
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return ((x - mean) / (var + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]).permute(0, 3, 1, 2)

    def up(x, name):
        return F.conv_transpose2d(x, p[f"{name}.weight"], p[f"{name}.bias"], stride=2)

    def end(x, stage, first):
        x = norm(F.conv2d(x, p[f"{stage}.{first}.weight"]), f"{stage}.{first + 1}")
        return norm(F.conv2d(x, p[f"{stage}.{first + 2}.weight"], padding=1), f"{stage}.{first + 3}")

    four = up(F.gelu(norm(up(x, "stages.0.0"), "stages.0.1")), "stages.0.3")
    two, half = up(x, "stages.1.0"), F.max_pool2d(x, 2, 2)
    maps = [end(four, "stages.0", 4), end(two, "stages.1", 1), end(x, "stages.2", 0), end(half, "stages.3", 1)]
    return [*maps, F.max_pool2d(maps[-1], 1, 2)]


def test_the_simple_pyramid_is_detectron2s():
    ours = randomised(SimpleFeaturePyramid(16, 12, extra="pool"))
    x = torch.randn(2, 16, 4, 6)
    expected = detectron2s_simple_pyramid(x, dict(ours.named_parameters()), 12)
    found = ours([torch.randn(2, 3, 1, 1), x])
    assert [m.shape for m in found] == [m.shape for m in expected]
    for a, b in zip(found, expected, strict=True):
        assert b.std() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_gives_a_pyramid(kind):
    model = randomised(Pyramid(BACKBONES[kind](), channels=8, extra="p6p7"))
    images = torch.rand(2, 3, 32, 64)
    maps = model(images)
    assert len(maps) == len(model.strides) and model.strides == sorted(model.strides)
    for x, stride in zip(maps, model.strides, strict=True):
        assert x.shape == (2, 8, -(-32 // stride), -(-64 // stride))
        assert (x[0] - x[1]).abs().max() > 1e-3


def test_pyramids_refuse_levels_that_do_not_exist():
    with pytest.raises(ValueError, match=r"levels \(1, 5\) must be stages of the backbone, of which it has 3"):
        Pyramid(swin(), levels=(1, 5))
    with pytest.raises(ValueError, match=r"scales \(3,\) must be some of 4, 2, 1 and 0.5"):
        Pyramid(plain(), levels=(3,))
    with pytest.raises(ValueError, match="extra 'p8' is unknown; use '', 'pool' or 'p6p7'"):
        Pyramid(swin(), extra="p8")
    with pytest.raises(ValueError, match="embed_dim 18 of the backbone is not a multiple of 4"):
        SimpleFeaturePyramid(18)


# -------------------------------------------------------------------------------------------------------------- FCOS

STRIDES = (8, 16, 32)
SIZE = (64, 96)


def both_heads():
    theirs = randomised(FCOSHead(64, 1, 5, num_convs=2), std=0.1)
    ours = FcosHead(64, 5, num_convs=2).eval()
    names = (
        ("classification_head.conv", "class_branch"),
        ("classification_head.cls_logits", "logits"),
        ("regression_head.conv", "box_branch"),
        ("regression_head.bbox_reg", "distances"),
        ("regression_head.bbox_ctrness", "centerness"),
    )
    state = theirs.state_dict()
    for old, new in names:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    ours.load_state_dict(state)
    return ours, theirs


def torchvisions_points(sizes):
    """Where torchvision has its points: in the corner of their square, and not in the middle."""
    return points_of(sizes, STRIDES, offset=0)


def detector(theirs):
    backbone = nn.Identity()
    backbone.out_channels = 64
    anchors = AnchorGenerator(tuple((s,) for s in STRIDES), ((1.0,),) * 3)
    model = FCOS(backbone, 5, anchor_generator=anchors, head=theirs, score_thresh=0.3, detections_per_img=7)
    return model.eval()


def maps_and_targets():
    maps = [torch.randn(3, 64, SIZE[0] // s, SIZE[1] // s) for s in STRIDES]
    boxes = [random_boxes(n, SIZE) for n in (9, 4, 0)]
    return maps, [{"boxes": b, "labels": torch.randint(0, 5, (len(b),))} for b in boxes]


def test_the_head_and_its_loss_are_torchvisions():
    ours, theirs = both_heads()
    maps, targets = maps_and_targets()
    expected, found = theirs(maps), ours(maps)
    torch.testing.assert_close(found.logits, expected["cls_logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.distances, expected["bbox_regression"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.centerness, expected["bbox_ctrness"][..., 0], rtol=1e-4, atol=1e-5)
    assert found.logits.std() > 0.1 and (found.distances > 0).float().mean() > 0.2

    model = detector(theirs)
    anchors = model.anchor_generator(ImageList(torch.zeros(3, 3, *SIZE), [SIZE] * 3), maps)
    losses = model.compute_loss(targets, expected, anchors, [h * w for h, w in found.sizes])
    terms = FcosLoss()(found, torchvisions_points(found.sizes), targets)
    assert terms["class"].count > 10  # points that have a box
    names = {"class": "classification", "box": "bbox_regression", "centerness": "bbox_ctrness"}
    for name, theirs_name in names.items():
        torch.testing.assert_close(terms[name].mean, losses[theirs_name], rtol=1e-4, atol=1e-5)
    mean_loss(terms).backward()
    sum(losses.values()).backward()
    torch.testing.assert_close(
        ours.distances.weight.grad, theirs.regression_head.bbox_reg.weight.grad, rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(
        ours.class_branch[0].weight.grad, theirs.classification_head.conv[0].weight.grad, rtol=1e-3, atol=1e-5
    )


def test_detections_are_torchvisions():
    ours, theirs = both_heads()
    maps, _ = maps_and_targets()
    model, output = detector(theirs), ours(maps)
    expected = theirs(maps)
    lengths = [h * w for h, w in output.sizes]
    anchors = model.anchor_generator(ImageList(torch.zeros(3, 3, *SIZE), [SIZE] * 3), maps)
    split = {name: list(value.split(lengths, dim=1)) for name, value in expected.items()}
    wanted = model.postprocess_detections(split, [list(a.split(lengths)) for a in anchors], [SIZE] * 3)
    shell = Fcos(swin(), 5, 64, num_convs=2)
    shell.strides, shell.head = list(STRIDES), ours
    assert shell(torch.rand(1, 3, 30, 45)).size == (30, 45)
    shell.points = lambda output: torchvisions_points(output.sizes)
    found = shell.results(output, SIZE, threshold=0.3, detections=7)
    assert all(len(w["boxes"]) == 7 for w in wanted)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a["labels"], b["labels"])
        torch.testing.assert_close(a["boxes"], b["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(a["scores"], b["scores"], rtol=1e-5, atol=1e-6)


def test_points_lie_in_the_middle_and_large_boxes_go_to_coarse_maps():
    points = points_of([(8, 12), (4, 6), (2, 3)], STRIDES)
    assert points.xy[:2].tolist() == [[4, 4], [12, 4]] and points.xy[-1].tolist() == [80, 48]
    small, large = torch.tensor([[10.0, 10, 26, 26]]), torch.tensor([[-40.0, -40, 136, 104]])
    level = torch.repeat_interleave(torch.arange(3), torch.tensor([96, 24, 6]))
    assert level[assign(points, small) == 0].unique().tolist() == [0]
    assert 0 not in level[assign(points, large) == 0] and (assign(points, large) == 0).any()
    inside = assign(points, small, radius=None) == 0
    assert inside.sum() == 4 and (assign(points, small, radius=0.5) == 0).sum() == 1  # a point near the middle


def test_a_box_that_holds_no_point_is_nobodys():
    points = points_of([(2, 2)], [8])
    assert assign(points, torch.tensor([[5.0, 5.0, 8.0, 8.0]])).tolist() == [-1] * 4


@pytest.mark.parametrize("kind", BACKBONES)
def test_fcos_learns_on_every_backbone(kind):
    torch.manual_seed(1)
    model = Fcos(BACKBONES[kind](), 3, channels=16, num_convs=1).train()
    images = torch.rand(2, 3, 32, 32)
    targets = [target([[2, 2, 22, 20]], [1]), target([], [])]
    check_targets(targets, 2, 3, (32, 32), masks=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        loss = mean_loss(model.losses(model(images), targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_no_object_at_all_is_a_loss_like_any_other():
    model = randomised(Fcos(swin(), 3, channels=16, num_convs=1), std=0.1)
    terms = model.losses(model(torch.rand(2, 3, 32, 32)), [target([], [])] * 2)
    assert {name: (term.total.item() != 0, term.count.item()) for name, term in terms.items()} == {
        "class": (True, 0),
        "box": (False, 0),
        "centerness": (False, 0),
    }
    mean_loss(terms).backward()
    assert model.head.logits.weight.grad.abs().max() > 0 and model.head.distances.weight.grad.abs().max() == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_parts_of_a_batch_add_up():
    model = randomised(Fcos(swin(), 3, channels=16, num_convs=1), std=0.1).double()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    targets = [target(random_boxes(n, (32, 32)).tolist(), [0] * n) for n in (1, 0, 3, 2)]
    whole = sum_and_count(model.losses(model(images), targets))
    parts = [sum_and_count(model.losses(model(images[i : i + 2]), targets[i : i + 2])) for i in (0, 2)]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0])
    assert whole[1] == parts[0][1] + parts[1][1] > 0
    different = {"a": Term(whole[0], torch.tensor(2)), "b": Term(whole[0], torch.tensor(3))}
    with pytest.raises(ValueError, match="terms 'a' and 'b' are divided by different counts, 2 and 3"):
        sum_and_count(different)


def test_fcos_has_torchvisions_size():
    """The model of FCOS_ResNet50_FPN has 32 269 600 parameters, 23 454 912 of them in the backbone."""
    with torch.device("meta"):
        ours = sum(p.numel() for p in FcosHead(256, 91).parameters())
        ours += sum(p.numel() for p in FeaturePyramid([512, 1024, 2048], 256, "p6p7").parameters())
    # its batch norms are frozen: 53 120 numbers that are no parameters there
    assert ours == 32_269_600 - (25_557_032 - 2_049_000 - 53_120)


# ------------------------------------------------------------------------------------------------- boxes and targets


def test_boxes_there_and_back_and_their_overlap():
    boxes = random_boxes(7, (48, 80))
    torch.testing.assert_close(to_corners(to_centres(boxes, (48, 80)), (48, 80)), boxes)
    others = random_boxes(7, (48, 80))
    torch.testing.assert_close(giou(boxes, others), generalized_box_iou(boxes, others).diag())
    tiny = torch.tensor([[0.5, 0.5, 0.5001, 0.5001]])
    assert giou(tiny, tiny).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, ValueError, r"targets\[1\]: object 1 has label 3, and there are 3 classes"),
        ({"labels": torch.tensor([0, -1])}, ValueError, "object 1 has label -1"),
        ({"labels": torch.tensor([0.0, 1.0])}, TypeError, "labels are torch.float32; give class numbers as int64"),
        ({"boxes": torch.tensor([[0, 0, 5, 5], [4, 4, 4, 9.0]])}, ValueError, r"box 1, \[4.0, 4.0, 4.0, 9.0\], has no"),
        ({"boxes": torch.tensor([[0, 0, 5, 5], [4, 4, 3, 9.0]])}, ValueError, r"and give corners \(x1, y1, x2, y2\)"),
        ({"boxes": torch.tensor([[0, 0, 5, 5], [4, 4, 41, 9.0]])}, ValueError, "reaches out of the image of 32×40"),
        ({"boxes": torch.tensor([[0, 0, 5, 5], [4, 4, float("nan"), 9]])}, ValueError, "is not of finite numbers"),
        ({"boxes": torch.zeros(3, 4)}, ValueError, r"boxes must be \(2, 4\), one for each label, got \(3, 4\)"),
    ],
)
def test_bad_boxes_are_named(change, error, message):
    good = target([[0, 0, 5, 5], [4, 4, 20, 9]], [0, 2])
    check_targets([target([], []), good], 2, 3, (32, 40), masks=False)
    with pytest.raises(error, match=message):
        check_targets([target([], []), {**good, **change}], 2, 3, (32, 40), masks=False)


def test_bad_masks_are_named():
    good = target([[0, 0, 5, 5]], [0], (32, 40))
    check_targets([good, target([], [], (32, 40))], 2, 3, (32, 40), masks=True)
    for masks, message in (
        (torch.ones(1, 16, 20), r"masks are \(16, 20\), and the image is \(32, 40\); resize both alike"),
        (torch.zeros(1, 32, 40), "mask 0 is empty"),
        (torch.ones(2, 32, 40), r"masks must be \(1, H, W\), one for each label"),
    ):
        with pytest.raises(ValueError, match=message):
            check_targets([{**good, "masks": masks}], 1, 3, (32, 40), masks=True)
    with pytest.raises(ValueError, match=r"targets\[0\] has no 'masks'"):
        check_targets([target([], [])], 1, 3, masks=True)
    with pytest.raises(ValueError, match="there are 1 targets for 2 images"):
        check_targets([good], 2, 3, masks=True)


def test_what_is_no_backbone_is_named():
    with pytest.raises(ValueError, match="backbone is a Linear, which has no feature_maps"):
        Fcos(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="backbone has a head of 4 classes"):
        Fcos(plain(num_classes=4))
    assert isinstance(points_of([(1, 1)], [4]), Points)
