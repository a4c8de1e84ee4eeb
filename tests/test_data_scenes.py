"""Scenes: pure functions of (seed, split, index), and targets that are exact to the pixel."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from vitcourse.data import hold_out, scenes, subset
from vitcourse.data.items import CLASSES, TINTS, draw_background, items, random_state
from vitcourse.data.scenes import MEAN, STD, Scenes


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


CROWDED = {"img_size": (72, 56), "objects": (6, 9), "scale": (0.3, 0.6)}


@pytest.mark.parametrize("options", [{}, CROWDED, {"objects": (0, 2), "img_size": 33}])
def test_targets_agree_with_each_other(options):
    dataset = scenes("test", **options)
    for index in range(30):
        image, target = dataset[index]
        assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8
        height, width = dataset.size
        assert image.shape == (3, height, width)
        masks, count = target["masks"].as_subclass(torch.Tensor), len(target["labels"])
        assert masks.shape == (count, height, width) and masks.dtype == torch.uint8
        assert masks.sum(0, dtype=torch.int64).max() <= 1  # no pixel shows two objects
        assert target["boxes"].shape == (count, 4) and target["boxes"].dtype == torch.float32
        assert target["boxes"].canvas_size == (height, width) and target["boxes"].format.name == "XYXY"
        tight = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]) if count else torch.zeros(0, 4)
        assert torch.equal(target["boxes"].as_subclass(torch.Tensor), tight)
        assert torch.equal(target["area"], masks.sum((1, 2)).float()) and (target["area"] > 0).all()
        semantic = ((target["labels"] + 1)[:, None, None] * masks).sum(0)
        assert target["semantic"].dtype == torch.int64
        assert torch.equal(target["semantic"].as_subclass(torch.Tensor), semantic)
        for key, dtype in (("labels", torch.int64), ("iscrowd", torch.int64), ("tints", torch.int64)):
            assert target[key].shape == (count,) and target[key].dtype == dtype
        assert not target["iscrowd"].any() and target["image_id"] == index
        low, high = dataset.objects
        assert count <= high and (count >= low or low > 5)
        assert (target["visible"] >= 1 - dataset.max_occlusion - 1e-6).all()


def test_masks_are_the_pixels_that_an_object_changed():
    """Draw the same scenes object by object: what changes is what the object covers, and the last to change owns it."""
    for index in range(20):
        stages = []

        class Watched(Scenes):
            def _place(self, *args):
                found = super()._place(*args)
                if found is not None:
                    window, _, cover, _ = found
                    whole = np.zeros(self.size, dtype=bool)
                    whole[window] = cover
                    stages.append(whole)  # noqa: B023
                return found

        image, target = Watched("train", **CROWDED)[index]
        random = random_state("scenes train", 0, index)
        _, background = draw_background(random, (72, 56), Watched("train").textures)
        pixels = image.permute(1, 2, 0).numpy()
        union = np.any(stages, axis=0)
        assert (pixels[~union] == background[~union]).all()
        masks = target["masks"].numpy().astype(bool)
        assert len(stages) == len(masks) > 2
        for k, whole in enumerate(stages):
            seen = whole & ~np.any(stages[k + 1 :], axis=0) if stages[k + 1 :] else whole
            assert (masks[k] == seen).all()
            assert target["visible"][k] == np.float32(seen.sum() / whole.sum())
            colours = np.unique(pixels[seen], axis=0).astype(float)
            tint = np.array(list(TINTS.values()))[target["tints"][k]]
            brightest = colours[colours.sum(1).argmax()]
            assert np.abs(brightest / np.linalg.norm(brightest) - tint / np.linalg.norm(tint)).max() < 0.2


def test_an_item_is_a_function_of_seed_split_and_index():
    one, two = scenes("train", img_size=32), scenes("train", img_size=32, length=20)
    backwards = [two[i] for i in reversed(range(20))][::-1]
    assert equal([one[i] for i in range(20)], backwards)
    assert equal(pickle.loads(pickle.dumps(one))[7], one[7])
    for other in (scenes("train", img_size=32, seed=1), scenes("val", img_size=32), scenes("test", img_size=32)):
        assert not torch.equal(other[7][0], one[7][0])
    assert not torch.equal(one[6][0], one[7][0])
    state = np.random.get_state()[1].copy()
    torch_state = torch.get_rng_state()
    one[3]
    assert (np.random.get_state()[1] == state).all() and torch.equal(torch.get_rng_state(), torch_state)


def test_workers_render_the_same():
    dataset = scenes("test", img_size=32, length=6)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=list)
    assert equal([sample for batch in loader for sample in batch], [dataset[i] for i in range(6)])


def test_splits_share_no_item():
    digests = [{planes.tobytes() for planes in items(split).planes} for split in ("train", "val", "test")]
    assert not digests[0] & digests[1] and not digests[0] & digests[2] and not digests[1] & digests[2]
    assert all(len(np.unique(items(split).labels)) == 10 for split in ("train", "val", "test"))


def test_silhouettes_have_no_holes_and_cover_the_item():
    pool = items("val")
    grey, cover = pool.planes[..., 0], pool.planes[..., 1]
    assert set(np.unique(cover)) == {0, 255} and (cover[grey >= 16] == 255).all()
    inside = cover == 255
    for axis in (1, 2):  # nothing dark is left between two pixels of the item on all four sides
        before = np.maximum.accumulate(inside, axis=axis)
        after = np.flip(np.maximum.accumulate(np.flip(inside, axis), axis=axis), axis)
        assert (before & after)[inside].all()
    assert 0.2 < inside.mean() < 0.7


def test_occlusion_and_number_are_heeded():
    apart = scenes("train", img_size=96, objects=(4, 4), scale=(0.15, 0.25), max_occlusion=0)
    assert all((apart[i][1]["visible"] == 1).all() and len(apart[i][1]["labels"]) == 4 for i in range(25))
    overlapping = scenes("train", img_size=96, objects=(6, 6), scale=(0.3, 0.4), max_occlusion=0.7)
    least = torch.cat([overlapping[i][1]["visible"] for i in range(25)]).min()
    assert 0.3 - 1e-6 <= least < 0.45
    counts = [len(scenes("train", img_size=96, objects=(0, 3))[i][1]["labels"]) for i in range(60)]
    assert set(counts) == {0, 1, 2, 3}


def test_no_object_is_a_scene_too():
    image, target = scenes("train", img_size=(40, 64), objects=(0, 0), textures=["gravel"])[0]
    assert image.shape == (3, 40, 64) and target["caption"] == "nothing on gravel"
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 40, 64)
    assert not target["semantic"].any() and target["labels"].dtype == torch.int64


@pytest.mark.parametrize("img_size", [16, (300, 20), (37, 601)])
def test_any_size(img_size):
    dataset = scenes("test", img_size=img_size)
    image, target = dataset[1]
    assert image.shape[1:] == dataset.size == target["masks"].shape[1:]


def test_captions_name_what_is_there():
    for index in range(30):
        target = scenes("test", img_size=48)[index][1]
        assert target["caption"].count(",") + target["caption"].count(" and ") == len(target["labels"]) - 1
        for tint in target["tints"]:
            assert f"{list(TINTS)[tint]} " in target["caption"]
        assert " a orange" not in f" {target['caption']}"
    first = scenes("test", img_size=48, objects=(2, 2), scale=(0.2, 0.2))[3][1]
    left = first["boxes"][:, [0, 2]].sum(1).argmin()
    assert first["caption"].split(" and ")[0].split()[1] == list(TINTS)[first["tints"][left]]


def test_the_tag_is_planted_on_an_unchanged_scene():
    plain = scenes("train", img_size=64, objects=(1, 3))
    tagged = scenes("train", img_size=64, objects=(1, 3), tag_class="Bag", tag_rates=(0.9, 0.1))
    found = {True: [], False: []}
    for index in range(150):
        (image, target), (with_tag, marked) = plain[index], tagged[index]
        assert "tag" not in target
        tag = marked["tag"][0].bool()
        assert tag.any() == bool(((image != with_tag).any(0)).any())
        assert torch.equal(image[:, ~tag], with_tag[:, ~tag])
        assert not (marked["masks"].bool() & tag).any() and not marked["semantic"][tag].any()
        found[CLASSES.index("Bag") in target["labels"].tolist()].append(bool(tag.any()))
    assert np.mean(found[True]) > 0.7 and np.mean(found[False]) < 0.25
    always = scenes("train", img_size=64, tag_class=8, tag_rates=(1, 1))
    assert all(always[i][1]["tag"].any() for i in range(5))


def test_mean_and_std_are_measured():
    dataset = scenes("train", img_size=64)
    pixels = torch.stack([dataset[i][0] for i in range(300)]) / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(MEAN), atol=0.02, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(STD), atol=0.02, rtol=0)


def test_parts_of_scenes():
    dataset = scenes("train", img_size=32, length=40)
    rest, held = hold_out(dataset, 0.25)
    assert (len(rest), len(held)) == (30, 10)
    assert sorted(part[i][1]["image_id"] for part in (rest, held) for i in range(len(part))) == list(range(40))
    few = subset(dataset, 5)
    assert len(few) == 5 and few.classes == list(CLASSES)


def test_transform_takes_image_and_target():
    dataset = scenes("train", img_size=32, transform=lambda image, target: (image.float(), len(target["labels"])))
    image, count = dataset[0]
    assert image.dtype == torch.float32 and isinstance(count, int)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split 'dev' does not exist; use 'train' or 'val' or 'test'"),
        ({"img_size": 8}, "img_size 8 is too small"),
        ({"length": 0}, "length 0 is no number"),
        ({"objects": (3, 1)}, r"objects \(3, 1\) is no range"),
        ({"objects": (1, 300)}, "objects .* is no range"),
        ({"scale": (0.0, 0.3)}, "scale .* is no range"),
        ({"scale": (0.1, 1.5)}, "scale .* is no range"),
        ({"max_occlusion": 1.0}, "max_occlusion 1.0 is out of range"),
        ({"textures": ["sand"]}, "textures .*'sand'.* use some of brick, grass, gravel"),
        ({"textures": []}, "textures"),
        ({"tag_class": "Hat"}, "tag_class 'Hat' is no class; use one of T-shirt/top"),
        ({"tag_class": 10}, "tag_class 10 is no class"),
        ({"tag_rates": (1.2, 0)}, "tag_rates .* are no probabilities"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        scenes(**options)


def test_an_index_beyond_the_end_ends_a_loop():
    assert len(list(scenes("test", img_size=16, length=3))) == 3
