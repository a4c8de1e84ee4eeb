import hashlib
import importlib.util
import io
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from vitcourse import data, paths
from vitcourse.data import (
    Augmented,
    ImageDataset,
    eval_transform,
    open_dataset,
    photo,
    split_names,
    subset,
    train_transform,
)

GREY = ((0.2860,), (0.3530,))
RGB = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def fashion():
    return open_dataset("fashion_mnist_subset", "test")


@pytest.fixture
def copied_data(tmp_path, monkeypatch):
    """A copy of the embedded data that a test may damage."""
    copy = shutil.copytree(paths.data_dir(), tmp_path / "data", ignore=shutil.ignore_patterns("weights"))
    monkeypatch.setattr(paths, "data_dir", lambda: copy)
    return copy


@pytest.fixture
def folder(tmp_path):
    """An imagefolder of two classes: cats are dark, dogs are bright, and sizes vary."""
    for split, count in (("train", 3), ("test", 2)):
        for name, level in (("cat", 40), ("dog", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(np.full((20 + i, 30, 3), level + i, dtype=np.uint8))
                picture.save(tmp_path / split / name / f"{i}.png")
    return tmp_path


# --- The embedded data ---


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_subset_is_balanced_mixed_and_described(split, per_class):
    dataset = open_dataset("fashion_mnist_subset", split)
    assert np.bincount(dataset.targets).tolist() == [per_class] * 10
    assert len(set(dataset.targets[:100])) == 10  # not sorted by class
    assert (dataset.in_chans, dataset.img_size, dataset.classes[9]) == (1, 28, "Ankle boot")
    image, label = dataset[0]
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8 and image.shape == (1, 28, 28)
    assert label == dataset.targets[0]
    pixels = dataset.images / 255
    torch.testing.assert_close(pixels.mean(), torch.tensor(dataset.mean[0]), atol=0.006, rtol=0)
    torch.testing.assert_close(pixels.std(), torch.tensor(dataset.std[0]), atol=0.006, rtol=0)


def test_subset_shares_no_image_between_train_and_test():
    train, test = (open_dataset("fashion_mnist_subset", split).images for split in ("train", "test"))
    digests = [{hashlib.sha256(image.numpy().tobytes()).digest() for image in part} for part in (train, test)]
    assert len(digests[0]) > 9_990 and not digests[0] & digests[1]


@pytest.mark.parametrize("name", ["fashion_mnist/test.npz", "photos/cat.png"])
def test_a_changed_byte_is_found(copied_data, name):
    file = copied_data / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file.name} is corrupt.*git checkout"):
        open_dataset("fashion_mnist_subset", "test") if file.suffix == ".npz" else photo("cat")


@pytest.mark.parametrize("name", ["test.npz", "SHA256SUMS"])
def test_a_missing_file_is_named(copied_data, name):
    (copied_data / "fashion_mnist" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing; restore it"):
        open_dataset("fashion_mnist_subset", "test")


def test_pictures():
    for names, open_picture, folder in (
        (data.photo_names(), photo, "photos"),
        (data.texture_names(), data.texture, "textures"),
    ):
        assert 3 <= len(names) <= 8
        for name in names:
            picture = open_picture(name)
            assert type(picture) is torch.Tensor and picture.dtype == torch.uint8 and picture.shape == (3, 256, 256)
            assert picture.float().std() > 15
            assert f"`{folder}/{name}.png`" in (paths.data_dir() / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"'dog' is not in photos; use one of astronaut, cat"):
        photo("dog")


def test_readme_lists_the_checksums():
    readme = (paths.data_dir() / "README.md").read_text(encoding="utf-8")
    for folder in ("fashion_mnist", "photos", "textures"):
        for line in (paths.data_dir() / folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
            digest, name = line.split()
            assert f"{digest}  {folder}/{name}" in readme


def test_build_reproduces_the_subset():
    source = os.environ.get("VITCOURSE_FASHION_MNIST")
    if not source:
        pytest.skip("set VITCOURSE_FASHION_MNIST to the folder that holds FashionMNIST/raw")
    files = _build_script().fashion_mnist(source)
    assert sorted(files) == ["test.npz", "train.npz"]
    for name, content in files.items():
        assert content == (paths.data_dir() / "fashion_mnist" / name).read_bytes()


def test_build_reproduces_the_pictures():
    pytest.importorskip("skimage")
    build = _build_script()
    for folder, names in (("photos", build.PHOTOS), ("textures", build.TEXTURES)):
        for name, content in build.crops(names).items():
            rebuilt, committed = Image.open(io.BytesIO(content)), Image.open(paths.data_dir() / folder / name)
            assert np.array_equal(np.asarray(rebuilt), np.asarray(committed))


def _build_script():
    spec = importlib.util.spec_from_file_location("build", paths.data_dir() / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Opening by name ---


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("cifar_10", "train", r"'cifar_10' is no data set; did you mean 'cifar10'"),
        ("fashion-mnist", "train", "did you mean 'fashion_mnist'"),
        ("imagefoldr:/tmp", "train", "did you mean 'imagefolder:PATH'"),
        ("zzz", "train", "known are fashion_mnist_subset, cifar10"),
        ("imagefolder", "train", "write imagefolder:PATH"),
        ("fashion_mnist_subset", "val", "split 'val' of fashion_mnist_subset does not exist; use 'train' or 'test'"),
        ("cifar10", "val", "split 'val' of cifar10 does not exist; use 'train' or 'test'"),
        ("oxford_iiit_pet", "val", "does not exist; use 'train' or 'test'"),
        ("cifar10", "tset", "split 'tset' of cifar10 does not exist"),
        ("imagefolder:anywhere", "dev", "split 'dev' of imagefolder:anywhere does not exist"),
    ],
)
def test_unknown_names(spec, split, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(spec, split)


@pytest.mark.parametrize(
    "spec",
    ["cifar10", "cifar100", "dtd", "fashion_mnist", "flowers102", "food101", "mnist", "oxford_iiit_pet", "stl10"],
)
def test_a_missing_download_names_the_folder_and_the_flag(spec, tmp_path, monkeypatch):
    for options in ({"root": tmp_path}, {}):
        monkeypatch.setenv("VITCOURSE_DATASETS", str(tmp_path))
        with pytest.raises(FileNotFoundError, match=rf"{spec} is not at {tmp_path}.*download=True.*--download"):
            open_dataset(spec, **options)


def _idx(array):
    sides = b"".join(side.to_bytes(4, "big") for side in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sides + array.tobytes()


@pytest.fixture
def mnist_root(tmp_path):
    """Seven images in Fashion-MNIST's own format."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(7 * 28 * 28, dtype=np.int64).astype(np.uint8).reshape(7, 28, 28)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(_idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(_idx(np.array([0, 1, 2, 3, 4, 5, 9], dtype=np.uint8)))
    return tmp_path


def test_fashion_mnist_from_torchvisions_files(mnist_root):
    dataset = open_dataset("fashion_mnist", "test", root=mnist_root)
    assert len(dataset) == 7 and dataset.targets[-1] == 9 and dataset.classes[9] == "Ankle boot"
    assert (dataset.in_chans, dataset.img_size, dataset.mean, dataset.std) == (1, 28, *GREY)
    assert dataset[1][0][0, 0, :3].tolist() == [16, 17, 18]  # 784 modulo 256


def test_a_truncated_download_is_named(mnist_root):
    file = mnist_root / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"fashion_mnist cannot be read: {file} is missing, incomplete or corrupt"):
        open_dataset("fashion_mnist", root=mnist_root)


def test_a_corrupt_cifar_file_is_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"cifar10 cannot be read: .*data_batch_3.*delete .*download=True"):
        open_dataset("cifar10", root=tmp_path)


class _StandIn:
    """Takes the place of a torchvision class whose files are too large for a test."""

    def __init__(self, root, download, **split):
        self.classes = ["cat", "dog"]
        vars(self).update(self.content(root, split))


def _stand_in(monkeypatch, name, content):
    monkeypatch.setattr(torchvision.datasets, name, type(name, (_StandIn,), {"content": staticmethod(content)}))


def test_cifar_arrays_become_channels_first(monkeypatch, tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    _stand_in(monkeypatch, "CIFAR10", lambda root, split: {"data": pixels, "targets": [0, 1, 1, 0]})
    (tmp_path / "cifar-10-batches-py").mkdir()
    dataset = open_dataset("cifar10", "test", root=tmp_path)
    assert (dataset.in_chans, dataset.img_size, len(dataset.mean)) == (3, 32, 3)
    assert np.array_equal(dataset[2][0].numpy(), pixels[2].transpose(2, 0, 1))


def test_file_based_sets_read_their_files(monkeypatch, folder):
    def content(root, split):
        assert split == {"split": "trainval"}
        return {"_images": [folder / "train" / "dog" / "1.png"], "_labels": [1]}

    _stand_in(monkeypatch, "OxfordIIITPet", content)
    (folder / "oxford-iiit-pet").mkdir()
    dataset = open_dataset("oxford_iiit_pet", root=folder)
    assert dataset.img_size is None and dataset.classes == ["cat", "dog"]
    image, label = dataset[0]
    assert label == 1 and image.shape == (3, 21, 30) and (image == 201).all()


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    def content(root, split):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    _stand_in(monkeypatch, "Flowers102", content)
    (tmp_path / "flowers-102").mkdir()
    with pytest.raises(ImportError, match="flowers102 needs the package scipy; install it: pip install scipy"):
        open_dataset("flowers102", root=tmp_path)


# --- Folders of images ---


def test_imagefolder(folder):
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "cat" / ".hidden").mkdir()
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "train" / "cat" / ".hidden" / "0.png")
    (folder / "train" / "cat" / "._0.png").write_bytes(b"resource fork")
    (folder / "train" / "cat" / "notes.txt").write_text("not an image", encoding="utf-8")
    Image.new("L", (9, 9), 7).save(folder / "train" / "cat" / "grey.JPG")
    Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(folder / "train" / "dog" / "clear.png")
    dataset = open_dataset(f"imagefolder:{folder}")
    assert dataset.classes == ["cat", "dog"] and dataset.targets == [0] * 4 + [1] * 4
    assert (dataset.in_chans, dataset.img_size, dataset.mean, dataset.std) == (3, None, *RGB)
    assert dataset[1][0].shape == (3, 21, 30) and (dataset[1][0] == 41).all()
    assert all(image.shape[0] == 3 and image.dtype == torch.uint8 for image, _ in dataset)
    ready = open_dataset(f"imagefolder:{folder}", transform=eval_transform(16, *RGB))
    images, labels = next(iter(DataLoader(ready, batch_size=8)))
    assert images.shape == (8, 3, 16, 16) and labels.tolist() == dataset.targets


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_val_and_test_are_two_things(folder, name):
    spec = f"imagefolder:{folder}"
    assert split_names(spec) == ["train", "test"]
    with pytest.raises(FileNotFoundError, match="has no val split"):
        open_dataset(spec, "val")
    shutil.copytree(folder / "train", folder / name)
    assert split_names(spec) == ["train", "val", "test"]
    assert len(open_dataset(spec, "test")) == 4 and len(open_dataset(spec, "val")) == 6
    shutil.rmtree(folder / "test")
    with pytest.raises(FileNotFoundError, match=rf"(?s)has no test split.*holds .*{name}"):
        open_dataset(spec, "test")
    (folder / {"val": "valid", "valid": "validation", "validation": "val"}[name]).mkdir()
    with pytest.raises(ValueError, match=r"has val\w* and val\w*; keep one of them"):
        open_dataset(spec, "val")


def test_split_names_of_torchvisions_sets():
    assert split_names("dtd") == split_names("flowers102") == ["train", "val", "test"]
    assert split_names("fashion_mnist_subset") == split_names("oxford_iiit_pet") == ["train", "test"]
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        split_names("cifar_10")


def test_layouts_are_explained(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)PATH/train/cat/1.jpg.*there is no folder"):
        open_dataset(f"imagefolder:{tmp_path / 'nowhere'}")
    with pytest.raises(FileNotFoundError, match=r"(?s)no train split.*PATH/train/cat/1.jpg.*holds cat, dog"):
        open_dataset(f"imagefolder:{folder / 'train'}")  # one level too deep
    flat = tmp_path / "flat" / "train"
    flat.mkdir(parents=True)
    shutil.copy(folder / "train" / "cat" / "0.png", flat / "0.png")
    with pytest.raises(FileNotFoundError, match=r"(?s)has no class folders.*holds 0.png"):
        open_dataset(f"imagefolder:{flat.parent}")


def test_an_empty_class_is_named(folder):
    (folder / "train" / "emu").mkdir()
    with pytest.raises(FileNotFoundError, match=r"emu holds no images \(.jpg"):
        open_dataset(f"imagefolder:{folder}")


@pytest.mark.parametrize("empty", [False, True])
def test_a_class_may_be_missing_outside_training(folder, empty, capsys):
    """The numbers of the classes are those of training, whatever a split lacks; nothing else is said."""
    shutil.rmtree(folder / "test" / "cat")
    if empty:
        (folder / "test" / "cat").mkdir()
    test = open_dataset(f"imagefolder:{folder}", "test")
    assert capsys.readouterr().err == (
        f"vitcourse: {folder / 'test'} has no images of cat, which the model learns all the same\n"
    )
    assert test.classes == ["cat", "dog"] and test.targets == [1, 1]
    open_dataset(f"imagefolder:{folder}", "train")
    assert capsys.readouterr().err == ""


def test_a_class_that_is_not_learned_is_named(folder):
    (folder / "test" / "dog").rename(folder / "test" / "hound")
    with pytest.raises(ValueError, match=r"test has images of hound, which .*train does not have"):
        open_dataset(f"imagefolder:{folder}", "test")
    for file in (folder / "test" / "hound").iterdir():
        file.unlink()
    assert open_dataset(f"imagefolder:{folder}", "test").targets == [0, 0]  # an empty folder is no class
    shutil.rmtree(folder / "test" / "cat")
    with pytest.raises(FileNotFoundError, match="test holds no images"):
        open_dataset(f"imagefolder:{folder}", "test")


def test_a_split_alone_has_its_own_classes(folder):
    shutil.rmtree(folder / "train")
    assert open_dataset(f"imagefolder:{folder}", "test").classes == ["cat", "dog"]


def _truncate(file):
    file.write_bytes(file.read_bytes()[:50])


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("<html>404</html>", encoding="utf-8"),
        lambda file: Image.fromarray(np.full((9, 9), 4000.0, dtype=np.float32)).save(file, "TIFF"),
    ],
    ids=["truncated", "empty", "html", "floats"],
)
def test_an_unusable_image_is_named(folder, damage):
    file = folder / "train" / "cat" / "1.png"
    damage(file)
    dataset = open_dataset(f"imagefolder:{folder}")
    assert dataset[0][1] == 0
    with pytest.raises(ValueError, match=rf"{file} is not a usable image: .*; replace it"):
        dataset[1]


def test_a_vanished_image_is_named(folder):
    dataset = open_dataset(f"imagefolder:{folder}")
    (folder / "train" / "dog" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2.png is missing; restore it"):
        dataset[-1]


# --- Images from elsewhere ---


def test_what_is_no_image_is_refused():
    good = torch.rand(3, 8, 8)
    holed = good.clone()
    holed[1, 2, 3] = torch.nan
    for bad, error, message in (
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "dtype torch.int64; give uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), TypeError, "dtype torch.bool"),
        (torch.rand(8, 8), ValueError, r"shape \(8, 8\); give \(C, H, W\)"),
        (torch.rand(4, 8, 8), ValueError, "with C = 1 or 3"),
        (torch.rand(3, 0, 8), ValueError, r"shape \(3, 0, 8\)"),
        (holed, ValueError, "reaches from nan to nan"),
        (good * torch.inf, ValueError, "to inf"),
        (good * 255, ValueError, r"give floats in 0..1 \(divide by 255\)"),
        (good[:1], ValueError, "1 channels where 3 are due; convert with the transform's in_chans"),
    ):
        for transform in (eval_transform(8, *RGB), train_transform(8, *RGB)):
            with pytest.raises(error, match=message):
                transform(bad)
    assert eval_transform(8, *RGB)(good).dtype == torch.float32


def test_image_dataset_checks_what_it_is_given():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    for bad_images, targets, classes, message in (
        (images, [0], ["a"], "2 images and 1 targets"),
        (images[:0], [], ["a"], "0 images and 0 targets; give one label per image, at least one"),
        (images, [0, 2], ["a", "b"], "labels reach from 0 to 2, but there are 2 classes"),
        (images, [-1, 0], ["a", "b"], "labels reach from -1 to 0"),
        (images[0], [0], ["a"], r"shape \(1, 8, 8\); give \(N, C, H, W\)"),
        (images / 0, [0, 0], ["a"], "reaches from nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageDataset(bad_images, targets, classes, mean=(0.5,), std=(0.5,))
    with pytest.raises(TypeError, match=r"torch.int32"):
        ImageDataset(images.int(), [0, 0], ["a"], mean=(0.5,), std=(0.5,))
    wide = ImageDataset(torch.rand(2, 3, 8, 9), np.array([1, 0]), ["a", "b"], mean=(0.5,), std=(0.5,))
    assert wide.img_size == (8, 9)


def test_check_batch():
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 4])
    data.check_batch(images, labels, in_chans=3, num_classes=5)
    for arguments, options, error, message in (
        ((images.byte(),), {}, TypeError, "dtype torch.uint8; a model takes floats"),
        ((images[0],), {}, ValueError, r"a model takes \(B, C, H, W\)"),
        ((images,), {"in_chans": 1}, ValueError, "3 channels, but the model's in_chans is 1"),
        ((images / 0,), {}, ValueError, "NaN or infinite"),
        ((images, labels.float()), {}, TypeError, "labels have dtype torch.float32"),
        ((images, labels[None]), {}, ValueError, r"labels have shape \(1, 2\)"),
        ((images, labels), {"num_classes": 4}, ValueError, "num_classes=5 is needed"),
        ((images, labels - 1), {"num_classes": 4}, ValueError, "labels count from 0"),
    ):
        with pytest.raises(error, match=message):
            data.check_batch(*arguments, **options)


# --- Parts ---


def test_part_is_balanced_seeded_and_described(fashion):
    part = subset(fashion, 103, seed=5)
    counts = np.bincount(part.targets, minlength=10)
    assert len(part) == 103 and counts.min() == 10 and counts.max() == 11
    assert [label for _, label in part] == part.targets
    assert len(set(part.indices)) == 103
    assert (part.classes, part.in_chans, part.img_size, part.mean) == (fashion.classes, 1, 28, fashion.mean)
    assert subset(fashion, 103, seed=5).indices == part.indices
    assert subset(fashion, 103, seed=6).indices != part.indices
    assert subset(fashion, 20, seed=0).indices[:3] == [67, 78, 128]  # the same on every machine, for ever
    assert sorted(subset(fashion, 4).targets) != [0, 0, 1, 1] and len(set(subset(fashion, 4).targets)) == 4


def test_part_larger_than_the_set(fashion):
    assert len(subset(fashion, 2000)) == 2000
    with pytest.raises(ValueError, match=r"n 2001 takes 201 of class '.*', which has 200; give n of at most 2000"):
        subset(fashion, 2001)
    with pytest.raises(ValueError, match="n 0 is no number of items"):
        subset(fashion, 0)


def test_a_part_is_held_out(fashion):
    train, val = data.hold_out(fashion, 0.13)
    assert np.bincount(val.targets).tolist() == [26] * 10 and len(train) + len(val) == 2000
    pixels = [{image.numpy().tobytes() for image in part.images} for part in (train, val, fashion)]
    assert not pixels[0] & pixels[1] and pixels[0] | pixels[1] == pixels[2]
    assert (val.classes, val.in_chans, val.img_size, val.mean) == (fashion.classes, 1, 28, fashion.mean)
    assert torch.equal(data.hold_out(fashion, 0.13)[1].images, val.images)
    assert not torch.equal(data.hold_out(fashion, 0.13, seed=1)[1].images, val.images)
    few = subset(fashion, 100)
    train, val = data.hold_out(few, 0.2)
    assert len(train) == 80 and np.bincount(val.targets).tolist() == [2] * 10
    held = {image.numpy().tobytes() for image in val.images}
    assert held < {few[i][0].numpy().tobytes() for i in range(100)}


def test_rare_classes_keep_an_image_to_train_on(folder):
    shutil.rmtree(folder / "train" / "dog")
    (folder / "train" / "dog").mkdir()
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "train" / "dog" / "0.png")
    train, val = data.hold_out(open_dataset(f"imagefolder:{folder}"), 0.9)
    assert sorted(train.targets) == [0, 1] and val.targets == [0, 0]
    assert train[1][0].shape[0] == 3
    with pytest.raises(ValueError, match="every class has one image only"):
        data.hold_out(train)
    for share in (0, 1, float("nan")):
        with pytest.raises(ValueError, match=f"share {share} is no part of the images"):
            data.hold_out(train, share)


# --- Transforms ---


SIDES = [160, 33, (160, 96), (31, 90), (64, 64)]


@pytest.mark.parametrize("img_size", SIDES, ids=str)
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_eval_transform_has_timms_pixels(interpolation, crop_pct, img_size):
    create_transform = pytest.importorskip("timm.data").create_transform
    options = {"interpolation": interpolation, "crop_pct": crop_pct, "mean": RGB[0], "std": RGB[1]}
    theirs = create_transform((3, *([img_size] * 2 if isinstance(img_size, int) else img_size)), **options)
    ours = eval_transform(img_size, **options)
    coffee = Image.fromarray(photo("coffee").permute(1, 2, 0).numpy())
    for box in ((0, 0, 256, 200), (0, 0, 131, 256), (3, 3, 20, 16), (0, 0, 101, 101), (0, 0, 255, 254)):
        picture = coffee.crop(box)
        assert torch.equal(ours(picture), theirs(picture))
        assert torch.equal(ours(data.read_image(picture)), theirs(picture))


def test_batches_and_floats_are_resized_alike():
    batch = torch.stack([photo("cat"), photo("coffee")])[:, :, 9:, 20:]
    ready = eval_transform((64, 48), *RGB, crop_pct=0.8, interpolation="bilinear")
    assert torch.equal(ready(batch), torch.stack([ready(image) for image in batch]))
    levels = (ready(batch / 255) - ready(batch)) * torch.tensor(RGB[1]).view(3, 1, 1) * 255
    assert levels.abs().max() < 1.1 and levels.abs().mean() < 0.4  # Pillow rounds to whole levels, twice


@pytest.mark.parametrize("crop", ["resized", "pad"])
def test_train_transform_makes_any_shape(crop):
    for size, shape in ((24, (24, 24)), ((16, 40), (16, 40)), ([40, 16], (40, 16))):
        transform = train_transform(size, *RGB, crop=crop)
        assert transform(photo("cat")).shape == transform(photo("cat")[:, :50]).shape == (3, *shape)


@pytest.mark.parametrize("options", [{}, {"crop": "pad"}, {"randaugment": 9, "random_erasing": 1.0}], ids=str)
@pytest.mark.parametrize("in_chans", [None, 1, 3])
def test_transforms_take_grey_and_colour(options, in_chans):
    for image in (photo("cat"), photo("cat")[:1], Image.fromarray(photo("cat")[0].numpy())):
        channels = in_chans or (3 if isinstance(image, torch.Tensor) and len(image) == 3 else 1)
        mean, std = (m[:channels] for m in RGB)
        for transform in (
            train_transform(32, mean, std, in_chans=in_chans, **options),
            eval_transform(32, mean, std, in_chans=in_chans),
        ):
            out = transform(image)
            assert type(out) is torch.Tensor and out.dtype == torch.float32 and out.shape == (channels, 32, 32)
            assert out.isfinite().all() and out.std() > 0.1


def _outcomes(image, **options):
    torch.manual_seed(0)
    transform = train_transform(64, (0.0,), (1.0,), **{"crop": "resized", "hflip": False, **options})
    return [transform(image) for _ in range(16)]


def test_each_option_of_train_transform_does_its_work():
    flat = torch.full((3, 64, 64), 102, dtype=torch.uint8)  # 0.4: no cut of it looks different
    assert all(out.unique().numel() == 1 for out in _outcomes(flat))
    assert all((out != out[:, :1, :1]).float().mean() > 0.01 for out in _outcomes(flat, random_erasing=1.0))
    assert 0 < sum(out.unique().numel() > 1 for out in _outcomes(flat, random_erasing=0.5)) < 16
    changed = [(out - 0.4).abs().max() > 0.01 for out in _outcomes(flat, randaugment=9)]
    assert sum(changed) > 4
    shifts = _outcomes(flat, crop="pad")
    assert all(out.unique().tolist() == pytest.approx([0, 0.4]) for out in shifts if out.unique().numel() > 1)
    assert {int((out[0, :, 32] > 0).sum()) for out in shifts} <= set(range(56, 65))  # 64 / 8 at most
    assert len({out.sum().item() for out in shifts}) > 8

    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(3, 64, 64)  # dark on the left
    assert all(out[0, 0, 0] < out[0, 0, -1] for out in _outcomes(ramp))
    assert 0 < sum(bool(out[0, 0, 0] > out[0, 0, -1]) for out in _outcomes(ramp, hflip=True)) < 16
    widths = [(out[0, 0, -1] - out[0, 0, 0]).item() for out in _outcomes(ramp, scale=(0.05, 0.1))]
    assert max(widths) < 0.5 < min((out[0, 0, -1] - out[0, 0, 0]).item() for out in _outcomes(ramp, scale=(0.9, 1.0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 0}, "img_size 0"),
        ({"img_size": (8, 0)}, r"img_size \(8, 0\)"),
        ({"img_size": (8, 8, 3)}, r"img_size \(8, 8, 3\) must be a positive integer or a pair"),
        ({"img_size": 2.5}, "img_size 2.5"),
        ({"mean": (0.5, 0.5)}, "do not fit"),
        ({"std": (0.0,)}, "must be positive"),
        ({"in_chans": 4}, "in_chans 4 cannot be made"),
        ({"in_chans": 1, "mean": RGB[0], "std": RGB[1]}, "do not fit in_chans 1"),
        ({"interpolation": "cubic"}, "'cubic' is unknown; use one of nearest, bilinear, bicubic"),
    ],
)
def test_bad_arguments_of_both_transforms(options, message):
    for build in (train_transform, eval_transform):
        with pytest.raises(ValueError, match=message):
            build(**{"img_size": 28, "mean": GREY[0], "std": GREY[1], **options})


def test_bad_arguments_of_one_transform():
    for options, message in (
        ({"crop": "centre"}, "use 'resized' or 'pad'"),
        ({"randaugment": 31}, "randaugment 31"),
        ({"randaugment": 0.5}, "randaugment 0.5"),
        ({"random_erasing": 1.5}, "random_erasing 1.5"),
        ({"scale": (0.5, 0.1)}, r"scale \(0.5, 0.1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train_transform(28, *GREY, **options)
    with pytest.raises(ValueError, match="crop_pct 1.5"):
        eval_transform(28, *GREY, crop_pct=1.5)


def test_batched_fetch_equals_single_items(fashion):
    dataset = open_dataset("fashion_mnist_subset", "test", transform=eval_transform(32, *GREY, in_chans=3))
    keys = [5, 1999, 0]
    for (image, label), key in zip(dataset.__getitems__(keys), keys, strict=True):
        torch.testing.assert_close(image, dataset[key][0], atol=1e-6, rtol=0)
        assert label == fashion.targets[key]


def test_a_random_transform_draws_anew_for_each_image_of_a_batch():
    same = torch.rand(1, 1, 28, 28).expand(20, 1, 28, 28)
    transform = train_transform(28, *GREY)
    dataset = ImageDataset(same, [0] * 20, ["a"], mean=GREY[0], std=GREY[1], transform=transform)
    torch.manual_seed(0)
    batch = torch.stack([image for image, _ in dataset.__getitems__(list(range(20)))])
    torch.manual_seed(0)
    assert torch.equal(batch, torch.stack([dataset[i][0] for i in range(20)]))
    assert len(batch.flatten(1).unique(dim=0)) == 20


# --- Reproducible augmentation ---

STRONG = {"randaugment": 9, "random_erasing": 0.5}


def _batches(dataset, keys, workers):
    loader = DataLoader(dataset, batch_size=7, sampler=keys, num_workers=workers)
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("options", [{"crop": "pad"}, STRONG], ids=["light", "strong"])
def test_augmentation_depends_on_seed_epoch_and_index_alone(fashion, options):
    augmented = Augmented(fashion, train_transform(28, *GREY, **options), seed=3)
    keys = [(epoch, index) for epoch in (0, 8) for index in (4, 1, 11, 4, 30)]
    expected = _batches(augmented, keys, 0)
    assert torch.equal(_batches(augmented, keys, 2), expected)
    torch.rand(3)
    assert torch.equal(_batches(augmented, keys[::-1], 0), expected.flip(0))
    assert torch.equal(augmented[8, 1][0], expected[6]) and torch.equal(augmented[1][0], augmented[0, 1][0])
    assert torch.equal(pickle.loads(pickle.dumps(augmented))[8, 1][0], expected[6])
    variants = [expected[keys.index((epoch, 4))] for epoch in (0, 8)]
    variants += [Augmented(fashion, augmented.transform, seed=seed)[0, 4][0] for seed in range(4, 14)]
    assert len({image.numpy().tobytes() for image in variants}) > 6
    same_picture = [Augmented(subset(fashion, 10), augmented.transform)[0, i][1] for i in range(10)]
    assert same_picture == subset(fashion, 10).targets


def test_equal_images_at_different_indices_are_augmented_differently():
    same = ImageDataset(torch.rand(1, 1, 28, 28).expand(30, 1, 28, 28), [0] * 30, ["a"], mean=(0.5,), std=(0.5,))
    augmented = Augmented(same, train_transform(28, *GREY, crop="pad"))
    assert len({image.numpy().tobytes() for image, _ in augmented.__getitems__(list(range(30)))}) > 20
    transform = train_transform(28, *GREY)
    neighbours = [Augmented(same, transform, seed)[key][0] for seed, key in ((0, (0, 1)), (0, (1, 0)), (1, (0, 0)))]
    assert len({image.numpy().tobytes() for image in neighbours}) == 3  # their sums are equal


def test_augmentation_leaves_the_global_generators_alone(fashion):
    augmented = Augmented(fashion, train_transform(28, *GREY, **STRONG))
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for i in range(50):
        augmented[1, i]
    augmented.__getitems__([(2, i) for i in range(50)])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]

    def fail(image):
        raise RuntimeError("broken step")

    with pytest.raises(RuntimeError, match="broken step"):
        Augmented(fashion, fail)[0]
    assert torch.equal(torch.get_rng_state(), before[0])


def test_a_data_sets_own_transform_is_seeded_too():
    dataset = open_dataset("fashion_mnist_subset", "test", transform=train_transform(28, *GREY, crop="pad"))
    augmented = Augmented(dataset)
    assert torch.equal(augmented[2, 5][0], augmented[2, 5][0])
    assert len({augmented[epoch, 5][0].numpy().tobytes() for epoch in range(20)}) > 10


def test_augmented_forwards_the_facts_and_nothing_else(fashion):
    augmented = Augmented(fashion)
    assert (len(augmented), augmented.targets, augmented.img_size) == (2000, fashion.targets, 28)
    with pytest.raises(AttributeError, match="'Augmented' object has no attribute 'colour'"):
        _ = augmented.colour


def test_images_of_several_sizes_are_augmented_one_by_one(folder):
    transform = v2.Compose([v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])
    items = Augmented(open_dataset(f"imagefolder:{folder}"), transform).__getitems__([0, 1, 2])
    assert [tuple(image.shape) for image, _ in items] == [(3, 20, 30), (3, 21, 30), (3, 22, 30)]
