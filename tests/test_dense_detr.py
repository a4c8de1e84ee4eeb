"""DETR against transformers, and what its options promise."""

import pytest
import torch
from torch import nn

from tests._dense import BACKBONES, plain, random_boxes, randomised, swin, target
from vitcourse.dense_prediction.boxes import to_centres
from vitcourse.dense_prediction.detr import Detr, as_parts
from vitcourse.dense_prediction.detr_queries import Denoising, denoising_mask, disturb
from vitcourse.dense_prediction.matching import hungarian
from vitcourse.dense_prediction.set_loss import BoxSetLoss
from vitcourse.dense_prediction.terms import mean_loss, sum_and_count
from vitcourse.vit import record_attention

SMALL = {"embed_dim": 32, "num_queries": 6, "num_heads": 4, "encoder_depth": 2, "decoder_depth": 3, "mlp_dim": 40}
TARGETS = [target([[2, 3, 20, 18], [10, 12, 30, 31]], [1, 4]), target([], []), target([[5, 5, 15, 25]], [0])]


def detr(kind="plain", num_classes=5, **changes):
    return Detr(BACKBONES[kind](), num_classes, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def theirs():
    """transformers' DETR with a tiny convolutional backbone, of which the comparison takes the map."""
    transformers = pytest.importorskip("transformers")
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = transformers.DetrConfig(
        backbone_config={**backbone, "out_features": ["stage2"], "layer_type": "basic"},
        use_timm_backbone=False,
        d_model=32,
        num_queries=6,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_labels=5,
        dropout=0.0,
    )
    torch.manual_seed(1)
    return randomised(transformers.DetrForObjectDetection(config), std=0.35)


class Maps(nn.Module):
    """transformers' backbone behind the contract of ours."""

    img_size, in_chans, num_classes = (32, 32), 3, 0

    def __init__(self, model):
        super().__init__()
        self.model, self.feature_info = model, [{"num_chs": 16, "reduction": 8}]

    def feature_maps(self, x, indices=(-1,)):
        return [self.model(x).feature_maps[-1]]


NAMES = (
    ("model.query_position_embeddings.weight", "query_embed"),
    ("model.input_projection.", "input_proj."),
    ("model.decoder.layernorm.", "norm."),
    ("model.encoder.layers.", "encoder."),
    ("model.decoder.layers.", "decoder."),
    ("encoder_attn_layer_norm", "norm2"),
    ("encoder_attn.", "cross_attn."),
    ("self_attn_layer_norm", "norm1"),
    ("q_proj", "q"),
    ("k_proj", "k"),
    ("v_proj", "v"),
    ("o_proj", "proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.3"),
    ("class_labels_classifier", "class_head"),
    ("bbox_predictor.layers.0", "box_head.0"),
    ("bbox_predictor.layers.1", "box_head.2"),
    ("bbox_predictor.layers.2", "box_head.4"),
)


def our_name(name):
    for old, new in NAMES:
        name = name.replace(old, new)
    return name.replace("final_layer_norm", "norm2" if name.startswith("encoder") else "norm3")


def copied(theirs):
    ours = Detr(Maps(theirs.model.backbone.model), 5, **SMALL, dropout=0.0)
    state = {our_name(k): v for k, v in theirs.state_dict().items() if not k.startswith("model.backbone.")}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("backbone.") for name in missing)
    return ours.eval()


@pytest.mark.parametrize("padded", [False, True])
def test_predictions_are_those_of_transformers(theirs, padded):
    ours, images = copied(theirs), torch.randn(3, 3, 48, 64)
    valid = torch.ones(3, 48, 64, dtype=torch.bool)
    if padded:
        valid[0, 32:], valid[2, :, 40:] = False, False
    expected = theirs(images, pixel_mask=valid.long())
    found = ours(images, valid=valid) if padded else ours(images)
    assert expected.logits.std((0, 1)).min() > 0.01 and expected.pred_boxes.std() > 0.05
    assert (expected.logits[0] - expected.logits[1]).abs().max() > 0.01
    torch.testing.assert_close(found.logits[-1], expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, rtol=1e-4, atol=1e-5)
    assert found.sizes == ([(32, 64), (48, 64), (48, 40)] if padded else [(48, 64)] * 3)


def labels_of(targets, size):
    return [{"class_labels": t["labels"], "boxes": to_centres(t["boxes"], size)} for t in targets]


def test_the_loss_and_its_gradients_are_those_of_transformers(theirs):
    """Each layer's; transformers' own decoder normalises twice where it keeps them, so that its losses get ours."""
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    ours, images = copied(theirs), torch.randn(3, 3, 32, 32)
    ours.criterion = BoxSetLoss(class_count="weights")
    output = ours(images)
    terms = ours.losses(output, TARGETS)
    config = theirs.config
    config.auxiliary_loss = True
    expected, parts, _ = ForObjectDetectionLoss(
        output.logits[-1],
        labels_of(TARGETS, (32, 32)),
        "cpu",
        output.boxes[-1],
        config,
        outputs_class=output.logits,
        outputs_coord=output.boxes,
    )
    config.auxiliary_loss = False
    names = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
    for name, theirs_name in names.items():
        for ours_end, theirs_end in (("", ""), ("_aux0", "_0"), ("_aux1", "_1")):
            torch.testing.assert_close(
                terms[name + ours_end].mean, parts[theirs_name + theirs_end], rtol=1e-4, atol=1e-5
            )
    torch.testing.assert_close(mean_loss(terms), expected, rtol=1e-4, atol=1e-4)
    wanted = torch.autograd.grad(expected, (output.logits, output.boxes), retain_graph=True)
    for a, b in zip(torch.autograd.grad(mean_loss(terms), (output.logits, output.boxes)), wanted, strict=True):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_results_are_those_of_transformers(theirs):
    from transformers import DetrForObjectDetection  # noqa: F401 (before its image processor)
    from transformers.models.detr.image_processing_detr import DetrImageProcessor

    ours, images = copied(theirs), torch.randn(3, 3, 48, 64)
    output = theirs(images)
    sizes = [(480, 640), (96, 128), (48, 64)]
    expected = DetrImageProcessor().post_process_object_detection(
        output, threshold=0.1, target_sizes=torch.tensor(sizes)
    )
    found = ours.results(ours(images), sizes, threshold=0.1)
    assert sum(len(e["scores"]) for e in expected) > 3
    for a, b in zip(found, expected, strict=True):
        order = b["scores"].argsort(descending=True)
        assert torch.equal(a["labels"], b["labels"][order])
        torch.testing.assert_close(a["boxes"], b["boxes"][order], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(a["scores"], b["scores"][order], rtol=1e-4, atol=1e-5)


def test_detr_has_the_papers_size():
    """41.3 M with ResNet-50 (table 1; 23.5 M of them the backbone), here counted beside transformers'."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.DetrConfig(
            backbone_config={"model_type": "resnet", "out_features": ["stage4"]}, use_timm_backbone=False, num_labels=91
        )
        theirs = transformers.DetrForObjectDetection(config)
        backbone = Maps(theirs.model.backbone.model)
        backbone.feature_info = [{"num_chs": 2048, "reduction": 32}]
        ours = Detr(backbone, 91)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e6, 1) in (41.3, 41.5)  # transformers counts batch norms that the authors freeze


# ----------------------------------------------------------------------------------------------------------- matching


def test_the_matching_is_the_best_of_all():
    from itertools import permutations

    cost = torch.randn(5, 3)
    match = hungarian([torch.randn(5, 2), cost])
    best = min(permutations(range(5), 3), key=lambda rows: sum(cost[row, i] for i, row in enumerate(rows)))
    pairs = {(q, o) for i, q, o in zip(*(x.tolist() for x in match), strict=True) if i == 1}
    assert pairs == {(row, i + 2) for i, row in enumerate(best)}
    bad = torch.tensor([[float("nan"), 0.0], [1.0, float("inf")], [2.0, 2.0]])
    assert hungarian([bad]).query.tolist() == [0, 1]
    assert hungarian([torch.randn(2, 5)]).query.tolist() == [0, 1]  # more objects than predictions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_no_number_does_not_blur_the_rest(dtype):
    """Two of five predictions are numbers, for three objects: these two are still where they cost least."""
    from itertools import permutations

    for _ in range(10):
        cost = torch.rand(5, 3, dtype=dtype)
        cost[2], cost[3:] = float("inf"), float("nan")
        match = hungarian([cost])
        found = sum(c for c in cost[match.query, match.object].tolist() if c < 2)
        least = min((cost[0, a] + cost[1, b]).item() for a, b in permutations(range(3), 2))
        assert found == pytest.approx(least, abs=1e-6) and match.object.unique().tolist() == [0, 1, 2]


def test_boxes_are_matched_as_the_loss_sees_them():
    logits = torch.zeros(1, 3, 3)
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4]]])
    targets = [{"boxes": boxes[0, [2, 0]], "labels": torch.tensor([1, 0])}]
    terms = BoxSetLoss()(logits, boxes, targets)
    assert terms["l1"].total == 0 and terms["giou"].total.abs() < 1e-6 and terms["l1"].count == 2
    ln3 = torch.tensor(3.0).log()
    torch.testing.assert_close(terms["class"].total, ln3 * 2.1)
    weighted = BoxSetLoss(class_count="weights")(logits, boxes, targets)["class"]
    torch.testing.assert_close(weighted.mean, ln3)


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("queries", ["embedded", "anchors", "proposals"])
@pytest.mark.parametrize("denoising", [0, 3])
def test_every_kind_of_query_trains_all_of_the_model(queries, denoising):
    model = randomised(detr("swin", level=-2, queries=queries, denoising=denoising), std=0.1).train()
    images = torch.rand(3, 3, 32, 32)
    output = model(images, TARGETS)
    terms = model.losses(output, TARGETS)
    ends = {name.partition("_")[2] for name in terms}
    extra = {"proposals"} if queries == "proposals" else set()
    assert ends == {"", "aux0", "aux1"} | extra | ({f"denoising{i}" for i in range(3)} if denoising else set())
    mean_loss(terms).backward()
    # Embedded queries have no content yet that the first layer could exchange.
    idle = () if queries != "embedded" or denoising else ("decoder.0.self_attn.v.weight",)
    unused = ("backbone.norm", "backbone.layers.2")  # the stage after the one that is asked for
    for name, p in model.named_parameters():
        if not name.startswith(unused):
            assert p.grad is not None and p.grad.isfinite().all(), name
            assert p.grad.abs().max() > 0 or name.endswith((".k.bias", *idle)), name
    assert (output.logits[-1, 0] - output.logits[-1, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_may_be_asked(kind):
    model = randomised(detr(kind, encoder_depth=0, queries="proposals"))
    found = model.results(model(torch.rand(2, 3, 64, 32)))
    assert [len(f["boxes"]) for f in found] == [6, 6]
    assert (found[0]["boxes"] - found[1]["boxes"]).abs().max() > 1e-3
    assert all((f["scores"].diff() <= 0).all() for f in found)


@pytest.mark.parametrize("queries", ["embedded", "anchors", "proposals"])
def test_nothing_leaks_through_the_denoising_mask(queries):
    """In float64: queries must not feel the disturbed objects, nor groups each other, nor anybody what fills up."""
    model = randomised(detr("plain", queries=queries, denoising=2)).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    memory, position, valid, _ = model.encode(images)
    queries, _ = model.make_queries(memory, valid)
    torch.manual_seed(3)
    first = disturb(as_parts(TARGETS, [(32, 32)] * 3), 5, model.denoising)
    n = first.labels.shape[1]
    assert n == 4 and first.image.tolist() == [0, 0, 0, 0, 2, 2] and first.query.tolist() == [0, 1, 2, 3, 0, 2]

    def outputs(disturbed):
        mask = denoising_mask(disturbed, 6)
        return torch.cat(model.decode(model._with_denoising(queries, disturbed), memory, position, mask), dim=-1)

    def changed(places):
        labels, boxes = first.labels.clone(), first.boxes.clone()
        labels[:, places], boxes[:, places] = (labels[:, places] + 1) % 5, 0.9
        return outputs(first._replace(labels=labels, boxes=boxes))

    before = outputs(first)
    alone = torch.cat(model.decode(queries, memory, position), dim=-1)
    torch.testing.assert_close(before[:, :, n:], alone, rtol=0, atol=1e-12)
    other = changed([0, 1])  # the first group
    torch.testing.assert_close(other[:, :, 2:], before[:, :, 2:], rtol=0, atol=1e-12)
    assert (other[:, 0, :2] - before[:, 0, :2]).abs().max() > 1e-3
    filled = changed([1, 3])  # objects of image 0, filled up in image 2
    torch.testing.assert_close(filled[:, 2, [0, 2]], before[:, 2, [0, 2]], rtol=0, atol=1e-12)
    assert (filled[:, 0, [0, 2]] - before[:, 0, [0, 2]]).abs().max() > 1e-4  # of one group, they see each other


def test_noise_is_as_large_as_it_says():
    boxes = to_centres(random_boxes(200, (64, 64)), (64, 64))
    targets = [{"boxes": boxes, "labels": torch.zeros(200, dtype=torch.int64)}]
    made = disturb(targets, 10, Denoising(4, label_noise=0.5, box_noise=0.4))
    wanted = boxes[made.object]
    moved = (made.boxes[made.image, made.query] - wanted).abs() / wanted[:, 2:].repeat(1, 2)
    assert made.object.view(4, 200).equal(torch.arange(200).expand(4, 200))
    assert 0.19 < moved[:, :2].max() <= 0.2 + 1e-5 and 0.38 < moved[:, 2:].max() <= 0.4 + 1e-5
    assert 0.3 < (made.labels != 0).float().mean() < 0.6
    still = disturb(targets, 10, Denoising(1, 0.0, 0.0))
    torch.testing.assert_close(still.boxes[0], boxes)


def test_no_object_at_all_is_a_loss_like_any_other():
    model = randomised(detr(queries="proposals", denoising=2), std=0.1).train()
    nothing = [target([], [])] * 2
    terms = model.losses(model(torch.rand(2, 3, 32, 32), nothing), nothing)
    assert {t.count.item() for t in terms.values()} == {0}
    assert all((t.total > 0) == name.startswith("class") for name, t in terms.items() if "denoising" not in name)
    assert all(t.total == 0 for name, t in terms.items() if "denoising" in name)
    mean_loss(terms).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.class_head.weight.grad.abs().max() > 0 and model.box_head[-1].weight.grad.abs().max() == 0


def test_parts_of_a_batch_add_up():
    model = randomised(detr(queries="proposals", denoising=2), std=0.1).double()  # in evaluation: without noise
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    whole = sum_and_count(model.losses(model(images), TARGETS))
    parts = [sum_and_count(model.losses(model(images[i:j]), TARGETS[i:j])) for i, j in ((0, 1), (1, 3))]
    assert whole[1] == 3
    torch.testing.assert_close(whole[0], sum(p[0] for p in parts), rtol=1e-9, atol=1e-9)
    model.criterion = BoxSetLoss(class_count="weights")
    with pytest.raises(ValueError, match="use a loss with class_count='objects'"):
        sum_and_count(model.losses(model(images), TARGETS))


def test_what_a_query_looks_at_can_be_recorded():
    model = randomised(detr())
    images = torch.rand(2, 3, 32, 32)
    expected = model(images)
    with record_attention(model.decoder) as weights:
        found = model(images)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-5)
    assert [tuple(w.shape) for w in weights] == [(2, 4, 6, 6), (2, 4, 6, 16)] * 3
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(2, 4, 6))


def test_layers_correct_the_box_of_the_layer_before():
    model = detr(queries="anchors").eval()
    output = model(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(output.boxes[:, 0], model.anchors.sigmoid().expand(3, -1, -1))  # untrained: nothing


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="queries 'some' is unknown; use 'embedded', 'anchors', 'proposals'"):
        detr(queries="some")
    with pytest.raises(ValueError, match="embed_dim 30 is not divisible by num_heads 4"):
        detr(embed_dim=30)
    with pytest.raises(ValueError, match="level 3 does not exist; the backbone has 3 maps"):
        detr("swin", level=3)
    with pytest.raises(ValueError, match="num_queries 40 are more than the 16 tokens that proposals come from"):
        detr(num_queries=40, queries="proposals")(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="must be at least 1"):
        detr(num_queries=0)
    assert plain().num_classes == 0 and swin().num_classes == 0
