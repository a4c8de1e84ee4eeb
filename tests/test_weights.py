"""Weights from everywhere they come from, and back: as they went, or refused."""

import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from vitcourse import create_model, load_weights
from vitcourse.data import open_dataset
from vitcourse.paths import data_dir
from vitcourse.registry import Preprocess
from vitcourse.train import evaluate
from vitcourse.vit import Attention, resize_pos_embed
from vitcourse.weights import read_metadata, save_weights, sources

SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}
ODD = Preprocess(img_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=0.8)


def small(**changes):
    return create_model("vit_tiny", **{**SMALL, **changes}).eval()


@torch.no_grad()
def randomised(model):
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------------------- weights: where from


def test_weights_from_a_timm_model_bring_its_preprocessing():
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7)
    theirs.pretrained_cfg = {**theirs.pretrained_cfg, "input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3)}
    ours = create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7)
    assert load_weights(ours, randomised(theirs)) is ours
    assert same_weights(ours, theirs)
    cfg = theirs.pretrained_cfg
    assert ours.preprocess == Preprocess(32, (0.1, 0.2, 0.3), cfg["std"], cfg["interpolation"], cfg["crop_pct"])


def test_weights_from_a_state_dict():
    theirs, ours = randomised(TimmVisionTransformer(**SMALL)), small()
    before = ours.preprocess
    load_weights(ours, theirs.state_dict())
    assert same_weights(ours, theirs)
    assert ours.preprocess == before
    assert same_weights(small(weights=theirs.state_dict()), theirs)


def test_weights_from_torchvision():
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 192, num_classes=7).eval()
    with torch.no_grad():
        randomised(theirs)
    ours, x = small(), torch.randn(3, 3, 32, 32)
    load_weights(ours, theirs)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
def test_weights_from_files_of_other_origin(tmp_path, suffix):
    theirs, path = randomised(TimmVisionTransformer(**SMALL)), tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(theirs.state_dict(), path)
    else:
        torch.save(theirs.state_dict(), path)
    for source in (path, str(path)):
        ours = small()
        before = ours.preprocess
        assert same_weights(load_weights(ours, source), theirs)
        assert ours.preprocess == before


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_weights_inside_a_training_checkpoint(tmp_path, key):
    theirs = randomised(TimmVisionTransformer(**SMALL))
    torch.save({key: theirs.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    assert same_weights(load_weights(small(), tmp_path / "checkpoint.pth"), theirs)


def test_weights_from_timms_hub(monkeypatch):
    theirs = randomised(TimmVisionTransformer(**SMALL))
    theirs.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
                             "interpolation": "bilinear", "crop_pct": 0.8}  # fmt: skip
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **args: asked.append((name, args)) or theirs)
    ours = small(weights="timm:vit_tiny_patch8_32.some_tag")
    assert asked == [("vit_tiny_patch8_32.some_tag", {"pretrained": True})]
    assert same_weights(ours, theirs)
    assert ours.preprocess == ODD


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_16.IMAGENET1K_V1"])
def test_weights_from_torchvisions_hub(monkeypatch, name):
    theirs = randomised(torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 192, num_classes=7))
    transform = SimpleNamespace(crop_size=[32], resize_size=[40], mean=ODD.mean, std=ODD.std,
                                interpolation=SimpleNamespace(value="bilinear"))  # fmt: skip
    entry = SimpleNamespace(transforms=lambda: transform, get_state_dict=lambda **_: theirs.state_dict())
    known = {"vit_b_16": {"DEFAULT": entry, "IMAGENET1K_V1": entry}}
    monkeypatch.setattr(torchvision.models, "get_model_weights", known.__getitem__)
    ours = load_weights(small(), f"torchvision:{name}")
    assert ours.preprocess == ODD
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs.eval()(x))


def test_torchvisions_real_entry_is_understood(monkeypatch):
    """Its own transforms, only the download replaced."""
    theirs = torchvision.models.VisionTransformer(224, 32, 1, 3, 48, 192)
    weights = torchvision.models.ViT_B_32_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: theirs.state_dict())
    ours = create_model("vit_tiny", patch_size=32, depth=1, embed_dim=48, weights="torchvision:vit_b_32")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert ours.preprocess == Preprocess(224, mean, std, "bilinear", 0.875)


@pytest.mark.parametrize("name", ["vit_b_17", "vit_b_16.IMAGENET9"])
def test_torchvisions_unknown_weights_are_named(name):
    stem, _, tag = name.partition(".")
    with pytest.raises(ValueError, match=rf"torchvision has no weights '{stem}' '{tag}'; did you mean .*'vit_b_16'"):
        load_weights(small(), f"torchvision:{name}")


def test_a_missing_peer_says_what_to_install(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(sources, "import_module", absent)
    with pytest.raises(ImportError, match="weights of timm need the package: pip install timm"):
        load_weights(nn.Linear(1, 1), "timm:vit_tiny_patch16_224")


@pytest.mark.parametrize("source", ["vit_tiny_patch16_224", "hub:vit", "timm:", "weights.bin", ""])
def test_unknown_sources_list_the_known_ones(source):
    with pytest.raises(ValueError, match=f"weights source '{source}' is unknown; use 'timm:NAME', 'torchvision:NAME'"):
        load_weights(small(), source)


# ------------------------------------------------------------------------------------------------ weights: save, load


@pytest.mark.parametrize("half", [False, True])
def test_a_saved_model_is_rebuilt_from_its_file(tmp_path, half):
    model, path = randomised(small(img_size=(32, 40), reg_tokens=1)), tmp_path / "model.safetensors"
    model.preprocess = replace(ODD, img_size=(32, 40))
    save_weights(model, path, half=half, accuracy=0.91, command="python -m vitcourse.train")
    saved = read_metadata(path)
    assert (saved["model"], saved["accuracy"], saved["command"]) == ("vit_tiny", 0.91, "python -m vitcourse.train")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]

    rebuilt = create_model(path).eval()
    assert rebuilt.preprocess == model.preprocess
    assert rebuilt.img_size == (32, 40)
    assert all(p.dtype == torch.float32 for p in rebuilt.parameters())
    for ours, theirs in zip(rebuilt.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.half().float() if half else theirs)
    size = sum(p.numel() for p in model.parameters()) * (2 if half else 4)
    assert size < path.stat().st_size < size + 8000
    assert same_weights(load_weights(small(img_size=(32, 40), reg_tokens=1), str(path)), rebuilt)


def test_saving_follows_the_present_head(tmp_path):
    model, path = small(), tmp_path / "model.safetensors"
    model.reset_classifier(4)
    save_weights(randomised(model), path)
    assert same_weights(create_model(path), model)


def test_a_rebuilt_model_takes_overrides(tmp_path, capsys):
    model, path = randomised(small()), tmp_path / "model.safetensors"
    save_weights(model, path)
    other = create_model(path, num_classes=3, drop_path_rate=0.1, img_size=48)
    assert "weights are for 7 classes, not 3: the head starts untrained" in capsys.readouterr().err
    assert other.head.out_features == 3
    assert torch.equal(other.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    resized = resize_pos_embed(model.pos_embed, (4, 4), (6, 6), 1)
    torch.testing.assert_close(other.pos_embed, resized)
    with pytest.raises(TypeError, match="has no argument 'drop_path'; did you mean 'drop_path_rate'"):
        create_model(path, drop_path=0.1)


def test_a_file_names_its_model_or_says_that_it_does_not(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(small().state_dict(), path)
    assert read_metadata(path) == {}
    with pytest.raises(ValueError, match=r"does not say which model it is for; use create_model\(model_name, weights="):
        create_model(path)
    with pytest.raises(ValueError, match="holds weights already; leave out the argument weights"):
        create_model(path, weights={})


def test_a_model_with_parts_that_no_file_can_hold_is_saved_with_a_notice(tmp_path, capsys):
    class Mixer(Attention):
        pass

    path = tmp_path / "model.safetensors"
    model = small(attn_layer=Mixer)
    save_weights(model, path)
    assert "arguments no file can hold" in capsys.readouterr().err
    assert "model" not in read_metadata(path)
    assert same_weights(small(attn_layer=Mixer, weights=path), model)


def test_a_plain_module_can_be_saved(tmp_path):
    save_weights(nn.Linear(2, 3), tmp_path / "linear.safetensors")
    assert read_metadata(tmp_path / "linear.safetensors") == {}
    linear = nn.Linear(2, 3)
    load_weights(linear, tmp_path / "linear.safetensors")


def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_weights(small(), path)
    before = path.read_bytes()

    def crash(state, file, metadata):
        Path(file).write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_weights(small(), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_may_be_read_by_whom_the_umask_says(tmp_path, umask):
    path = tmp_path / "model.safetensors"
    (tmp_path / "model.safetensors.partial").touch(0o600)  # a crash left it
    before = os.umask(umask)
    try:
        save_weights(small(), path)
        (tmp_path / "any").touch()
    finally:
        os.umask(before)
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["any", "model.safetensors"]


def test_metadata_is_plain_json(tmp_path):
    save_weights(small(), tmp_path / "model.safetensors", seed=3)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = json.loads(file.metadata()["vitcourse"])
    assert saved["seed"] == 3
    assert saved["preprocess"] == {**asdict(small().preprocess), "mean": [0.5] * 3, "std": [0.5] * 3}


# -------------------------------------------------------------------------------------------- weights that do not fit


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not weights" * 99])
def test_corrupt_files_are_named(tmp_path, suffix, damage):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(small().state_dict(), path)
    else:
        save_weights(small(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"weights file .*weights\.{suffix} .*corrupt"):
        load_weights(small(), path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt"])
def test_missing_files_are_named(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=rf"weights file .*absent\.{suffix} does not exist"):
        load_weights(small(), tmp_path / f"absent.{suffix}")


class Trap:
    """Pickled, it would write a file on loading."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_pickle_never_runs(tmp_path, save):
    save({"state_dict": Trap(tmp_path / "evidence")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="a pickle of other things, which is never run: save a state dict instead"):
        load_weights(small(), tmp_path / "weights.pth")
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"epoch": 3}, {"model": "vit_tiny"}])
def test_a_file_without_a_state_dict_says_so(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(small(), tmp_path / "weights.pth")


def test_another_number_of_classes_is_an_error_with_its_remedy():
    other = randomised(small(num_classes=5))
    with pytest.raises(ValueError, match=r"head\.bias is \(5,\), the model's \(7,\)(.|\n)*new_head=True"):
        load_weights(small(), other)


def test_new_head_keeps_the_models_own_and_says_so_in_one_line(capsys):
    other, model = randomised(small(num_classes=5)), small()
    head = model.head.weight.clone()
    load_weights(model, other, new_head=True)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "vitcourse: weights are for 5 classes, not 7: the head starts untrained\n")
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, other.norm.weight)
    load_weights(small(num_classes=5), other, new_head=True)
    assert capsys.readouterr().err == "", "nothing is lost where the classes agree"


def test_create_model_with_classes_takes_a_checkpoint_of_others(capsys):
    other = randomised(small(num_classes=5))
    model = small(weights=other)
    assert model.head.out_features == 7
    assert len(capsys.readouterr().err.splitlines()) == 1
    headless = small(num_classes=0, weights=other)
    assert torch.equal(headless.norm.weight, other.norm.weight)
    assert same_weights(small(weights=headless).blocks, other.blocks)
    assert "weights are for no classes, not 7" in capsys.readouterr().err


def test_strict_names_what_is_missing_left_over_and_of_another_shape():
    state = {f"blocks.0.{k}": v for k, v in small().blocks[0].state_dict().items()}
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.attn.* and \d+ more"):
        load_weights(small(), state)
    with pytest.raises(ValueError, match="not in the model: surplus"):
        load_weights(small(), {**small().state_dict(), "surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weights from VisionTransformer do not fit vit_tiny:(.|\n)*of another shape"):
        load_weights(small(), small(embed_dim=24))


def test_a_failed_load_changes_nothing():
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit"):
        load_weights(model, randomised(small(num_classes=5)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_not_strict_loads_what_fits_and_says_what_did_not(capsys):
    model, other = small(), randomised(small())
    state = {k: v for k, v in other.state_dict().items() if not k.startswith("norm.")}
    load_weights(model, {**state, "surplus": torch.zeros(1)}, strict=False)
    assert torch.equal(model.head.weight, other.head.weight)
    err = capsys.readouterr().err
    assert err == "vitcourse: weights loaded in part; missing: norm.bias, norm.weight; left over: surplus\n"
    with pytest.raises(ValueError, match="of another shape"):
        load_weights(model, small(num_classes=5), strict=False)


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_positions_are_resized_for_another_grid(no_embed_class):
    other = randomised(small(no_embed_class=no_embed_class))
    model = load_weights(small(no_embed_class=no_embed_class, img_size=(24, 56)), other)
    prefix = 0 if no_embed_class else 1
    torch.testing.assert_close(model.pos_embed, resize_pos_embed(other.pos_embed, (4, 4), (3, 7), prefix))
    x = torch.randn(1, 3, 24, 56)
    torch.testing.assert_close(model(x), other(x))


# ------------------------------------------------------------------------------------- what comes with the course

FILE = data_dir() / "weights" / "fashion_mnist_vit.safetensors"
RECORD = json.loads(FILE.with_suffix(".json").read_text(encoding="utf-8"))


def test_the_recorded_accuracy_is_measured_again():
    model = create_model(FILE).eval()
    measured = evaluate(model, open_dataset("fashion_mnist_subset", "test"))["val_accuracy"]
    assert measured == pytest.approx(
        RECORD["accuracy_embedded"], abs=0.001
    )  # two of 2 000, for other machines' rounding
    assert sum(p.numel() for p in model.parameters()) == RECORD["parameters"]


def test_the_file_is_small_and_says_where_it_comes_from():
    metadata = read_metadata(FILE)
    assert FILE.stat().st_size <= 3e6
    assert metadata["command"] == RECORD["command"] and metadata["seed"] == RECORD["seed"]
    assert metadata["command"].startswith("python -m vitcourse.train ")
    assert metadata["classes"] == open_dataset("fashion_mnist_subset", "test").classes
    assert metadata["preprocess"]["img_size"] == 28 and len(metadata["preprocess"]["mean"]) == 1


def test_the_recipe_is_the_command():
    from vitcourse.train.cli import parse

    argv = RECORD["command"].removeprefix("python -m vitcourse.train ").split()
    options, config, _ = parse(argv)
    again, recipe_config, _ = parse(["--recipe", "fashion_mnist_tiny", "--threads", str(config.threads)])
    assert config == recipe_config
    assert options.model == again.model and options.data == again.data
