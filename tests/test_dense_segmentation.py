"""U-Net, UNETR, Segmenter: against definitions written here, on every backbone and at odd sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests._dense import BACKBONES, coatnet, plain, randomised, swin, target
from vitcourse.dense_prediction.segmentation import PixelLoss, check_map, evenly, to_map, to_masks
from vitcourse.dense_prediction.segmenter import MaskTransformer, Segmenter
from vitcourse.dense_prediction.terms import mean_loss, sum_and_count
from vitcourse.dense_prediction.unet import UNet, UNetDecoder, Unetr, plain_or_pyramid


def test_the_mask_transformer_is_its_definition():
    """Section 3.2 and the authors' code, in plain functions of the parameters."""
    ours = randomised(MaskTransformer(12, 5, 16, depth=2, num_heads=4))
    p, x = dict(ours.named_parameters()), torch.randn(3, 12, 4, 6)

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return y * p[f"{name}.weight"] + p[f"{name}.bias"]

    tokens = linear(x.flatten(2).transpose(1, 2), "embed")
    tokens = torch.cat([tokens, p["cls_embed"].expand(3, -1, -1)], dim=1)  # the classes last, as the authors have them
    for i in range(2):
        name = f"blocks.{i}"
        q, k, v = linear(norm(tokens, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.view(3, 29, 4, 4).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(2, 3) / 2).softmax(-1)
        tokens = tokens + linear((weights @ v).transpose(1, 2).reshape(3, 29, 16), f"{name}.attn.proj")
        hidden = F.gelu(linear(norm(tokens, f"{name}.norm2"), f"{name}.mlp.fc1"))
        tokens = tokens + linear(hidden, f"{name}.mlp.fc2")
    tokens = norm(tokens, "norm")
    patches, classes = tokens[:, :24] @ p["proj_patch"], tokens[:, 24:] @ p["proj_classes"]
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    masks = norm(torch.einsum("bnd,bkd->bnk", patches, classes), "mask_norm")
    expected = masks.transpose(1, 2).reshape(3, 5, 4, 6)
    found = ours(x)
    assert expected.std((0, 2, 3)).min() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_segmenter_has_the_size_that_its_definition_gives():
    """Seg-B-Mask/16 at 512 pixels, 150 classes: ViT-B, two blocks, three square maps, 150 tokens and norms."""
    from vitcourse import create_model

    with torch.device("meta"):
        backbone = create_model("vit_base_patch16_384", img_size=512, num_classes=0)
        model = Segmenter(backbone, 150)
    d = 768
    block = 12 * d * d + 13 * d
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in backbone.parameters())
    assert count == 2 * block + (d * d + d) + 2 * d * d + 150 * d + 2 * d + 2 * 150
    assert model.decoder.blocks[0].attn.num_heads == 12


def test_the_decoder_is_its_definition():
    """Top-down: 1×1 convolution, bilinear to the finer map's size, that map beside it, two convolutions."""
    ours = randomised(UNetDecoder([8, 16, 24]))
    maps = [torch.randn(2, c, *size) for c, size in ((8, (13, 10)), (16, (7, 5)), (24, (4, 3)))]
    x = maps[-1]
    for i in (1, 0):
        block = ours.blocks[i]
        x = F.interpolate(F.conv2d(x, block.reduce.weight, block.reduce.bias), maps[i].shape[-2:], mode="bilinear")
        x = torch.cat([x, maps[i]], dim=1)
        for j in (0, 3):
            x = F.conv2d(x, block.block[j].weight, padding=1)
            groups = block.block[j + 1].num_groups
            x = F.relu(F.group_norm(x, groups, block.block[j + 1].weight, block.block[j + 1].bias))
    assert x.std() > 0.1
    torch.testing.assert_close(ours(maps), x, rtol=1e-5, atol=1e-5)


def models(num_classes=4):
    yield "unet swin", UNet(swin(), num_classes, channels=8)
    yield "unet coatnet", UNet(coatnet(), num_classes, channels=8)
    yield "unetr", Unetr(plain(patch_size=8, depth=3), num_classes, channels=4)
    for kind, build in BACKBONES.items():
        yield f"segmenter {kind}", Segmenter(build(), num_classes, embed_dim=16, num_heads=2)


@pytest.mark.parametrize(("name", "model"), list(models()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_model_trains_all_of_itself(name, model):
    model = randomised(model, std=0.15).train()
    images, labels = torch.rand(2, 3, 32, 64), torch.randint(0, 4, (2, 32, 64))
    logits = model(images)
    assert logits.shape == (2, 4, 32, 64) and (logits[0] - logits[1]).abs().max() > 1e-3
    mean_loss(model.losses(logits, labels)).backward()
    for parameter_name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, parameter_name
    assert torch.allclose(model.segment(logits).sum(1), torch.ones(2, 32, 64))


ODD = {
    "unet": lambda: UNet(swin(), 4, channels=8),
    "unetr": lambda: Unetr(plain(pad=True, depth=3), 4, channels=4),
    "unetr without skips": lambda: Unetr(plain(pad=True, depth=3), 4, channels=4, skips=False),
    "segmenter swin": lambda: Segmenter(swin(), 4, embed_dim=16, num_heads=2),
    "segmenter": lambda: Segmenter(plain(pad=True), 4, embed_dim=16, num_heads=2),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_sizes(name):
    logits = randomised(ODD[name]())(torch.rand(2, 3, 37, 50))
    assert logits.shape == (2, 4, 37, 50) and logits.std() > 0.01


@pytest.mark.parametrize(
    "build", [lambda skips: UNet(swin(), 3, 8, skips=skips), lambda skips: Unetr(plain(depth=3), 3, 4, skips)]
)
def test_without_skips_only_the_last_map_is_left(build):
    with_skips, without = build(True), randomised(build(False))
    fewer = sum(p.numel() for p in without.parameters())
    assert fewer < sum(p.numel() for p in with_skips.parameters())
    images = torch.rand(1, 3, 32, 32)
    expected = without(images)
    maps = without.backbone.feature_maps

    def nothing_but_the_last(x, indices):
        *earlier, last = maps(x, indices)
        return [torch.full_like(m, 9.0) for m in earlier] + [last]

    without.backbone.feature_maps = nothing_but_the_last
    assert torch.equal(without(images), expected) and expected.std() > 0.01
    assert without.stem is None


def test_unetr_taps_layers_evenly():
    model = Unetr(plain(depth=12, patch_size=16), 3, channels=4)
    assert model.indices == [2, 5, 8, 11]
    assert [len(rise) // 4 for rise in model.rise] == [3, 2, 1]
    assert [up.in_channels for up in model.up] == [8, 16, 32, 16] and evenly(3, 3) == [0, 1, 2]
    assert isinstance(plain_or_pyramid(plain(depth=3), 3), Unetr) and isinstance(plain_or_pyramid(swin(), 3), UNet)


def test_pixels_of_no_class_do_not_count():
    logits, labels = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randint(0, 3, (2, 4, 5))
    labels[0, :2] = 255
    term = PixelLoss()(logits, labels)["pixel"]
    torch.testing.assert_close(term.mean, F.cross_entropy(logits, labels, ignore_index=255))
    assert term.count == 30
    nothing = PixelLoss()(logits, torch.full_like(labels, 255))
    (grad,) = torch.autograd.grad(mean_loss(nothing), logits)
    assert nothing["pixel"].total == 0 and nothing["pixel"].count == 0 and grad.abs().max() == 0
    parts = [sum_and_count(PixelLoss()(logits[i : i + 1], labels[i : i + 1])) for i in (0, 1)]
    torch.testing.assert_close(sum(p[0] for p in parts), term.total)
    assert sum(p[1] for p in parts) == 30


def test_masks_and_maps():
    made = target([[0, 0, 4, 4], [2, 2, 6, 6]], [1, 3], (8, 8))
    labels = to_map(made, (8, 8), background=0)
    assert labels[3, 3] == 3 and labels[0, 0] == 1 and labels[7, 7] == 0
    again = to_masks(labels, ignored=0)
    assert again["labels"].tolist() == [1, 3] and again["masks"].sum((1, 2)).tolist() == [12, 16]
    assert torch.equal(to_map(again, (8, 8), background=0), labels)
    empty = to_masks(torch.full((4, 4), 255))
    assert empty["masks"].shape == (0, 4, 4) and torch.equal(to_map(empty, (4, 4)), torch.full((4, 4), 255))


def test_bad_input_is_named():
    check_map(torch.tensor([[0, 2, 255]]), 3, (1, 3))
    for labels, error, message in (
        (torch.tensor([[0, 3]]), ValueError, "map has class 3, and there are 3 classes"),
        (torch.tensor([[0, -1]]), ValueError, "map has class -1"),
        (torch.tensor([[0.0, 1.0]]), TypeError, "map is torch.float32; give class numbers as int64"),
        (torch.tensor([[0, 1, 2]]), ValueError, r"map is \(1, 3\), and the image is \(1, 2\); resize both alike"),
    ):
        with pytest.raises(error, match=message):
            check_map(labels, 3, (1, 2))
    model = Segmenter(plain(), 4, embed_dim=16, num_heads=2)
    with pytest.raises(ValueError, match=r"targets are \(16, 16\), and the output is \(32, 32\)"):
        model.losses(model(torch.rand(1, 3, 32, 32)), torch.zeros(1, 16, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"levels \(0,\) must be two or more maps .*; for a plain ViT use Unetr"):
        UNet(plain())
    with pytest.raises(ValueError, match="Unetr is for a plain ViT, for others there is UNet"):
        Unetr(swin())
    with pytest.raises(ValueError, match=r"patch_size \(6, 6\) of the backbone cannot be reached by halving"):
        Unetr(plain(img_size=36, patch_size=6))
    with pytest.raises(ValueError, match="backbone has 2 blocks, and 4 are tapped for patches of 16"):
        Unetr(plain(patch_size=16))


@pytest.mark.parametrize("kind", ["unet", "segmenter"])
def test_other_classes(kind):
    model = UNet(swin(), 4, 8) if kind == "unet" else Segmenter(swin(), 4, 16, num_heads=2)
    model.reset_classifier(7)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 7, 32, 32) and model.num_classes == 7
    assert isinstance(model, nn.Module)
