"""EoMT and the losses of masks against transformers."""

import pytest
import torch
from torch import nn

from tests._dense import plain, randomised, swin, target
from vitcourse import create_model
from vitcourse.dense_prediction.eomt import Eomt
from vitcourse.dense_prediction.masks import MaskSetLoss, dice_loss, instances, pairwise_costs, sample, semantic_scores
from vitcourse.dense_prediction.terms import mean_loss, sum_and_count

SIZE = (32, 32)
TARGETS = [
    target([[2, 3, 20, 18], [10, 12, 30, 31]], [1, 4], SIZE),
    target([], [], SIZE),
    target([[5, 5, 15, 25]], [0], SIZE),
]


def vit(**changes):
    sizes = {"depth": 4, "reg_tokens": 2, "no_embed_class": True, "init_values": 1.0}
    return plain(**{**sizes, **changes})


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    config = transformers.EomtConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_upscale_blocks=1,
        num_blocks=2,
        num_queries=6,
        num_register_tokens=2,
        num_labels=5,
        train_num_points=40,
    )
    torch.manual_seed(1)
    model = randomised(transformers.EomtForUniversalSegmentation(config), std=0.3)
    model.criterion.empty_weight.copy_(torch.tensor([1.0] * 5 + [0.1]))
    return model


NAMES = (
    ("embeddings.cls_token", "backbone.cls_token"),
    ("embeddings.register_tokens", "backbone.reg_token"),
    ("embeddings.patch_embeddings.projection", "backbone.patch_embed.proj"),
    ("layernorm2d.", "3."),
    ("layernorm.", "backbone.norm."),
    ("layers.", "backbone.blocks."),
    ("attention.out_proj", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("upscale_block.block.", "upscale."),
    ("conv1.", "0."),
    ("conv2.", "2."),
    ("class_predictor", "class_head"),
    ("mask_head.fc1", "mask_head.0"),
    ("mask_head.fc2", "mask_head.2"),
    ("mask_head.fc3", "mask_head.4"),
    ("attn_mask_probs", "mask_probs"),
)


def copied(theirs):
    ours, state = Eomt(vit(), 5, num_queries=6, num_blocks=2), dict(theirs.state_dict())
    mapped = {
        "queries": state.pop("query.weight"),
        "backbone.pos_embed": state.pop("embeddings.position_embeddings.weight")[None],
    }
    state.pop("criterion.empty_weight")
    for i in range(4):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"layers.{i}.attention.{x}_proj.{kind}") for x in "qkv"]
            mapped[f"backbone.blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    for name, tensor in state.items():
        for old, new in NAMES:
            name = name.replace(old, new)
        mapped[name] = tensor
    ours.load_state_dict(mapped)
    return ours.eval()


@pytest.mark.parametrize("probs", [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
def test_predictions_are_those_of_transformers(theirs, probs):
    theirs.attn_mask_probs.copy_(torch.tensor(probs))
    ours, images = copied(theirs), torch.randn(3, 3, 32, 32)
    expected, found = theirs(images), ours(images)
    assert found.logits.shape[0] == 1 + sum(p > 0 for p in probs)
    assert expected.class_queries_logits.std((0, 1)).min() > 0.1 and expected.masks_queries_logits.std() > 0.3
    assert (expected.class_queries_logits[0] - expected.class_queries_logits[1]).abs().max() > 0.1
    torch.testing.assert_close(found.logits[-1], expected.class_queries_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.masks[-1], expected.masks_queries_logits, rtol=1e-4, atol=1e-4)
    plain_run = copied(theirs)
    plain_run.set_probs([0.0, 0.0])
    differs = (plain_run(images).masks[-1] - found.masks[-1]).abs().max() > 1e-3
    assert differs == any(probs)


def test_a_training_step_is_that_of_transformers(theirs):
    """With half of the masks let go, and points drawn, in the same order as there."""
    theirs.attn_mask_probs.copy_(torch.tensor([0.4, 1.0]))
    ours, images = copied(theirs).train(), torch.randn(3, 3, 32, 32)
    theirs.train()
    ours.criterion = MaskSetLoss(points=40, class_count="weights")
    torch.manual_seed(5)
    expected = theirs(
        images, mask_labels=[t["masks"].float() for t in TARGETS], class_labels=[t["labels"] for t in TARGETS]
    )
    torch.manual_seed(5)
    output = ours(images)
    layers = zip(output.logits, output.masks, strict=True)
    loss = sum(mean_loss(ours.criterion(*layer, TARGETS)) for layer in layers)
    theirs.eval()
    assert len(output.logits) == 3
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-4)
    wanted = torch.autograd.grad(expected.loss, [theirs.query.weight, theirs.class_predictor.weight])
    found = torch.autograd.grad(loss, [ours.queries, ours.class_head.weight])
    for a, b in zip(found, wanted, strict=True):
        assert b.abs().max() > 0.01
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_semantic_maps_are_those_of_transformers():
    """Its image processor works with torch and torchvision alone."""
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

    logits, masks = torch.randn(2, 6, 6) * 3, torch.randn(2, 6, 96, 96)
    output = SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks)
    processor = Mask2FormerImageProcessor()
    expected = processor.post_process_semantic_segmentation(output, target_sizes=None)
    scores = nn.functional.interpolate(
        semantic_scores(logits, nn.functional.interpolate(masks, (384, 384), mode="bilinear")), (384, 384)
    )
    assert all(torch.equal(a, b) for a, b in zip(scores.argmax(1), expected, strict=True))


def test_eomt_large_has_the_papers_size():
    """316 M (table 1), counted beside transformers'."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.EomtForUniversalSegmentation(transformers.EomtConfig(num_labels=133))
        backbone = create_model(
            "vit_large", img_size=640, patch_size=16, num_classes=0, reg_tokens=4, no_embed_class=True, init_values=1.0
        )
        ours = Eomt(backbone, 133)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e6) in (315, 316, 317)


# first and last steps of each block's fall in the authors' settings, and the steps of an epoch times the epochs
AUTHORS = {
    "coco_panoptic_small_640": ((29564, 73910, 118256), (59128, 103474, 147820), 24 * 7391),
    "coco_panoptic_large_640": ((14782, 29564, 44346, 59128), (29564, 44346, 59128, 73910), 12 * 7391),
    "coco_panoptic_giant_640": ((14782, 25869, 36955, 48042, 59128), (29564, 40651, 51737, 62824, 73910), 12 * 7391),
    "cityscapes_base_640": ((3317, 8292, 13268), (6634, 11609, 16585), 107 * 186),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_masks_are_annealed_as_the_authors_do(name):
    starts, ends, total = AUTHORS[name]
    model = Eomt(vit(depth=5), 5, num_queries=3, num_blocks=len(starts))
    for step in sorted({0, *starts, *ends, *((a + b) // 2 for a, b in zip(starts, ends, strict=True)), total}):
        model.anneal(step, total)
        t = [min(1.0, max(0.0, (step - a) / (b - a))) for a, b in zip(starts, ends, strict=True)]
        expected = torch.tensor([(1 - x) ** 0.9 for x in t])
        torch.testing.assert_close(model.mask_probs, expected, rtol=0, atol=5e-4)  # they round to steps


def test_queries_see_their_mask_and_everything_else_sees_all():
    model = Eomt(vit(), 5, num_queries=3, num_blocks=1)
    masks = torch.full((2, 3, 8, 8), -5.0)
    masks[0, 1, :4] = 5.0
    attend = model.attend(masks, 3 + 3 + 16, (4, 4))
    assert attend.shape == (2, 1, 22, 22) and attend[:, :, 3:].all() and attend[..., :6].all()
    assert attend[0, 0, 1, 6:].view(4, 4).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert not attend[1, 0, :3, 6:].any()
    many = masks[1:, :1].expand(400, 3, -1, -1)
    free = model.attend(many, 22, (4, 4), torch.tensor(0.25))[:, 0, :3, 6:].all(-1)
    assert 0.7 < free.float().mean() < 0.8  # with probability 0.25 they are bound to their masks
    assert model.attend(masks, 22, (4, 4), torch.tensor(0.0)).all()


@pytest.mark.parametrize("points", [None, 30])
def test_all_of_it_is_trained_also_without_an_object(points):
    model = randomised(Eomt(vit(), 5, num_queries=4, num_blocks=2), std=0.2).train()
    model.criterion = MaskSetLoss(points=points)
    images = torch.rand(3, 3, *SIZE)
    for targets, some in ((TARGETS, True), ([TARGETS[1]] * 3, False)):
        model.zero_grad()
        terms = model.losses(model(images), targets)
        assert len(terms) == 9 and {t.count.item() for t in terms.values()} == {3.0 if some else 0.0}
        mean_loss(terms).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert (model.mask_head[0].weight.grad.abs().max() > 0) == some
        assert model.class_head.weight.grad.abs().max() > 0


def test_parts_of_a_batch_add_up():
    model = randomised(Eomt(vit(), 5, num_queries=4, num_blocks=2), std=0.2).double()
    images = torch.rand(3, 3, *SIZE, dtype=torch.float64)
    whole = sum_and_count(model.losses(model(images), TARGETS))
    parts = [sum_and_count(model.losses(model(images[i:j]), TARGETS[i:j])) for i, j in ((0, 1), (1, 3))]
    assert whole[1] == 3
    torch.testing.assert_close(whole[0], sum(p[0] for p in parts))


@pytest.mark.parametrize("size", [(32, 48), (30, 41)])
def test_images_of_any_size_that_the_backbone_takes(size):
    model = randomised(Eomt(vit(pad=True), 5, num_queries=4, num_blocks=2))
    output = model(torch.rand(2, 3, *size))
    assert output.extent == (32, 48) and model.segment(output).shape == (2, 5, *size)
    found = model.results(output)
    assert found[0]["masks"].shape[1:] == size
    targets = [target([[2, 2, 20, 20]], [1], size)] * 2
    assert mean_loss(model.losses(output, targets)).isfinite()


def test_costs_are_the_losses_of_all_pairs():
    logits, wanted = torch.randn(4, 50), (torch.rand(3, 50) > 0.5).float()
    error, dice = pairwise_costs(logits, wanted)
    for i in range(4):
        for j in range(3):
            torch.testing.assert_close(
                error[i, j], nn.functional.binary_cross_entropy_with_logits(logits[i], wanted[j])
            )
            torch.testing.assert_close(dice[i, j], dice_loss(logits[i : i + 1], wanted[j : j + 1])[0])


def test_points_are_columns_and_rows():
    values = torch.arange(12.0).view(1, 3, 4)
    centres = torch.tensor([[[(c + 0.5) / 4, (r + 0.5) / 3] for r in range(3) for c in range(4)]])
    torch.testing.assert_close(sample(values, centres), values.flatten(1))


def test_instances_come_with_their_scores():
    logits = torch.tensor([[[5.0, 0, 0], [0, 5, 0], [0, 0, 9.0]]])
    masks = torch.full((1, 3, 4, 4), -9.0)
    masks[0, 0, :2], masks[0, 1, 2:] = 1.0, 9.0
    (found,) = instances(logits, masks, threshold=0.01)
    assert found["labels"].tolist() == [1, 0] and found["masks"].sum((1, 2)).tolist() == [8, 8]
    p = logits[0, 0].softmax(-1)[0]
    torch.testing.assert_close(found["scores"][1], p * torch.tensor(1.0).sigmoid())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="backbone is a SwinTransformer, and queries join a plain ViT"):
        Eomt(swin())
    with pytest.raises(ValueError, match="num_blocks 9 must be from 1 to the backbone's depth, 4"):
        Eomt(vit(), num_blocks=9)
