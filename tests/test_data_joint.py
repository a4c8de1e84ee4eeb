"""Transforms that move an image's boxes and masks with it, and batches of images of several sizes."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from vitcourse.data import (
    ClipTransform,
    Letterbox,
    SemanticMask,
    collate_dense,
    dense_eval_transform,
    dense_train_transform,
    eval_transform,
    moving,
    scenes,
    train_transform,
)
from vitcourse.data.joint import KeepVisible

GREY = ((0.5,) * 3, (0.25,) * 3)


def tight(masks):
    return masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])


def test_training_keeps_image_boxes_and_masks_together():
    dataset = scenes("train", img_size=(60, 90), objects=(2, 5), transform=dense_train_transform((48, 64), *GREY))
    torch.manual_seed(0)
    padded = 0
    for index in range(40):
        image, target = dataset[index]
        assert type(image) is torch.Tensor and image.shape == (3, 48, 64) and image.dtype == torch.float32
        masks, count = target["masks"], len(target["labels"])
        assert all(len(target[key]) == count for key in ("boxes", "masks", "area", "iscrowd", "tints", "visible"))
        assert torch.equal(target["area"], masks.sum((1, 2)).float())
        if count:
            assert torch.equal(target["boxes"], tight(masks)) and (target["area"] > 0).all()
            sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
            assert (sides >= 2).all()
        void = target["semantic"] == 255
        padded += void.any().item()
        assert (image[:, void].abs() < 0.01).all()  # padding has the colour of the mean
        for label, mask in zip(target["labels"], masks, strict=True):
            assert (target["semantic"][mask.bool()] == label + 1).all()
    assert 5 < padded < 35


def test_mirrored_pixels_lie_in_mirrored_masks():
    """Each object has a channel of its own: after flip, jitter and crop, its mask still holds its pixels, and all."""
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    masks = torch.zeros(2, 40, 50, dtype=torch.uint8)
    masks[0, 5:20, 5:15], masks[1, 22:38, 30:48] = 1, 1
    for k, mask in enumerate(masks):
        image[k, mask.bool()] = 200
    target = {
        "boxes": tv_tensors.BoundingBoxes(tight(masks), format="XYXY", canvas_size=(40, 50)),
        "labels": torch.tensor([0, 1]),
        "masks": tv_tensors.Mask(masks),
        "semantic": SemanticMask((masks[0] + 2 * masks[1]).long()),
    }
    transform = dense_train_transform(40, (0.0,) * 3, (1.0,) * 3, min_size=4)
    torch.manual_seed(1)
    for _ in range(20):
        seen, found = transform(tv_tensors.Image(image), dict(target))
        for label, mask in zip(found["labels"], found["masks"].bool(), strict=True):
            painted = 255 * seen[label]
            assert painted[mask].median() > 100
            outside = torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0] == 0
            assert painted[outside].max() < 1


def test_evaluation_letterboxes():
    plain = scenes("test", img_size=(30, 60), objects=(2, 4))
    ready = scenes("test", img_size=(30, 60), objects=(2, 4), transform=dense_eval_transform(40, *GREY))
    for index in range(10):
        (_, before), (image, after) = plain[index], ready[index]
        assert image.shape == (3, 40, 40) and len(before["labels"]) == len(after["labels"])
        assert (image[:, 20:].abs() < 0.01).all() and (after["semantic"][20:] == 255).all()
        assert not (after["semantic"][:20] == 255).any() and not after["masks"][:, 20:].any()
        torch.testing.assert_close(after["boxes"] * 1.5, before["boxes"].as_subclass(torch.Tensor))
        torch.testing.assert_close(after["area"] * 1.5**2, before["area"])


def test_letterbox_undoes_by_its_factor():
    letterbox = Letterbox((64, 64))
    assert letterbox.factor(100, 50) == 0.64
    image = torch.arange(100 * 50).reshape(1, 100, 50).to(torch.uint8)
    assert letterbox(image).shape == (1, 64, 64)
    same = Letterbox((100, 50))(image)
    assert torch.equal(same, image)


def test_images_are_resized_by_pillow():
    from PIL import Image

    picture = np.random.RandomState(0).randint(0, 256, (33, 47, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize((47 * 20 // 33, 20), Image.Resampling.BILINEAR))
    got = Letterbox((20, 28))(tv_tensors.Image(torch.from_numpy(picture).permute(2, 0, 1)))
    assert np.array_equal(got.permute(1, 2, 0).numpy(), expected)


def test_crowds_are_dropped_in_training_alone():
    boxes = tv_tensors.BoundingBoxes([[0.0, 0, 9, 9], [2, 2, 8, 8]], format="XYXY", canvas_size=(10, 10))
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "iscrowd": torch.tensor([1, 0])}
    image = tv_tensors.Image(torch.zeros(3, 10, 10, dtype=torch.uint8))
    train = dense_train_transform(10, *GREY, scale=(1, 1), hflip=False)(image, dict(target))[1]
    assert train["labels"].tolist() == [2] and train["boxes"].tolist() == [[2, 2, 8, 8]]
    assert dense_eval_transform(10, *GREY)(image, dict(target))[1]["labels"].tolist() == [1, 2]


def test_boxes_without_masks_are_clipped_and_dropped():
    boxes = tv_tensors.BoundingBoxes([[-5.0, 2, 6, 8], [9.5, 0, 20, 9]], format="XYXY", canvas_size=(10, 10))
    image, target = KeepVisible(1)(torch.zeros(3, 10, 10), {"boxes": boxes, "labels": torch.tensor([4, 5])})
    assert target["boxes"].tolist() == [[0, 2, 6, 8]] and target["labels"].tolist() == [4]
    assert target["area"].tolist() == [36] and isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert boxes.tolist()[0] == [-5, 2, 6, 8]  # what went in stays


def test_an_image_without_objects_passes():
    dataset = scenes("train", img_size=32, objects=(0, 0), transform=dense_train_transform(32, *GREY))
    image, target = dataset[0]
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 32, 32)


def test_batches_are_padded():
    small, large = (
        scenes("test", img_size=size, transform=dense_eval_transform(size, *GREY)) for size in ((20, 30), 40)
    )
    batch = collate_dense([small[0], large[0]], multiple=16)
    assert batch["images"].shape == (2, 3, 48, 48) and batch["images"].dtype == torch.float32
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [600, 1600] and batch["pixel_mask"][0, :20, :30].all()
    assert torch.equal(batch["images"][0][:, :20, :30], small[0][0]) and not batch["images"][0][:, 20:].any()
    assert batch["semantic"].shape == (2, 48, 48) and (batch["semantic"][~batch["pixel_mask"]] == 255).all()
    for target in batch["targets"]:
        assert target["masks"].shape[1:] == (48, 48)
    assert torch.equal(batch["targets"][0]["boxes"], small[0][1]["boxes"])
    assert small[0][1]["masks"].shape[1:] == (20, 30)


@pytest.mark.parametrize(
    ("samples", "multiple", "message"),
    [
        ([], 1, "0 samples"),
        ([(torch.zeros(3, 4, 4), {})], 0, "multiple 0"),
        ([(torch.zeros(3, 4, 4), {}), (torch.zeros(1, 4, 4), {})], 1, "not all .C, H, W. with equal C"),
        ([(np.zeros((3, 4)), {})], 1, "ndarray"),
    ],
)
def test_bad_batches(samples, multiple, message):
    with pytest.raises(ValueError, match=message):
        collate_dense(samples, multiple)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dense_train_transform(32, *GREY, scale=(2, 1)), "scale .* is no range"),
        (lambda: dense_train_transform(32, (0.5,), (0.5,)), "must have three values"),
        (lambda: dense_eval_transform(0, *GREY), "img_size"),
        (lambda: KeepVisible(0), "min_size 0"),
        (lambda: ClipTransform(lambda clip: clip)(torch.zeros(3, 4, 4)), r"clip has shape .*\(C, T, H, W\)"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_clip_is_augmented_alike_in_all_frames():
    still = moving("test")[0][0][:, :1].expand(3, 5, 48, 48)
    torch.manual_seed(0)
    clip = ClipTransform(train_transform(32, *GREY, randaugment=9))(still)
    assert clip.shape == (3, 5, 32, 32) and clip.is_contiguous() and torch.equal(clip, clip[:, :1].expand_as(clip))
    transform = eval_transform(32, *GREY)
    clip = moving("test")[3][0]
    frames = torch.stack([transform(clip[:, t]) for t in range(8)], dim=1)
    torch.testing.assert_close(ClipTransform(transform)(clip), frames)


def test_semantic_masks_stay_what_they_are():
    mask = SemanticMask(torch.ones(4, 6, dtype=torch.int64))
    turned = v2.RandomHorizontalFlip(1.0)(v2.Pad(1, fill={SemanticMask: 255, "others": 0})(mask))
    assert type(turned) is SemanticMask and turned.shape == (6, 8) and turned[0, 0] == 255
