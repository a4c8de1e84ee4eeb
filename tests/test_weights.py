"""Weights from everywhere they come from, and back: as they went, or refused."""

import copy
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from vitcourse import create_model, load_weights, registry
from vitcourse.data import ImageDataset, eval_transform, open_dataset, subset
from vitcourse.efficient_attention import LinearAttention, merge_tokens
from vitcourse.hardware import quantize_model
from vitcourse.hardware.prune import keep_units, magnitude_prune
from vitcourse.hierarchical import PostNormBlock
from vitcourse.notices import say_once
from vitcourse.paths import data_dir
from vitcourse.pretraining import extract_features, knn_accuracy
from vitcourse.pretraining.transfer import encoder_of
from vitcourse.registry import Preprocess, register_model
from vitcourse.train import Ema, TrainConfig, evaluate, fit
from vitcourse.vit import Attention, resize_pos_embed
from vitcourse.weights import fitting, read_metadata, save_weights, sources, unwrap
from vitcourse.weights.sources import Source

SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}
ODD = Preprocess(img_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=0.8)


@pytest.fixture
def registered(monkeypatch):
    """A copy of the registry, which a test may add to."""
    monkeypatch.setattr(registry, "_models", dict(registry._registered()))


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224x", "has no weights 'vit_tiny_patch16_224x': .*did you mean '"),
        ("vit_tiny_patch16_224.nope", "has no weights 'vit_tiny_patch16_224.nope': .*nope"),
    ],
)
def test_weights_that_timm_has_not_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        small(weights=f"timm:{name}")


def test_a_missing_peer_says_what_to_install(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(sources, "import_module", absent)
    with pytest.raises(ImportError, match="weights of timm need the package: pip install timm"):
        load_weights(nn.Linear(1, 1), "timm:vit_tiny_patch16_224")


@pytest.mark.parametrize("source", ["vit_tiny_patch16_224", "hub:vit", "timm:", "weights.onnx", ""])
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


# ----------------------------------------------------------------------------------------------- wrapped, or changed

WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "replicated": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "timm's running mean": lambda model: timm.utils.ModelEmaV3(model),
    "merging": lambda model: merge_tokens(model, 2),
    "ours": lambda model: Ema(model, decay=0.9),
    "several": lambda model: nn.DataParallel(torch.compile(merge_tokens(model, 2), backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_seen_through_when_saving_and_loading(tmp_path, wrap):
    model, path = randomised(small()), tmp_path / "model.safetensors"
    save_weights(wrap(model), path)
    rebuilt = create_model(path)
    assert same_weights(rebuilt, model) and rebuilt.preprocess == model.preprocess
    assert same_weights(load_weights(small(), wrap(model)), model)  # as a source …
    wrapped = wrap(small())
    assert load_weights(wrapped, path) is wrapped  # … and as a target
    assert same_weights(unwrap(wrapped), model)


def test_whoever_saves_a_merging_model_is_told_what_the_file_has(tmp_path, capsys):
    say_once.cache_clear()
    for _ in range(2):
        save_weights(merge_tokens(small(), 2), tmp_path / "model.safetensors")
    assert capsys.readouterr().err.count("the file holds the model without its merging of tokens") == 1


def test_parts_may_be_compiled(tmp_path):
    model, path = randomised(small()), tmp_path / "model.safetensors"
    parts = copy.deepcopy(model)
    parts.blocks[0] = torch.compile(parts.blocks[0], backend="eager")
    save_weights(parts, path)
    assert same_weights(create_model(path), model)
    load_weights(parts, randomised(small()))
    load_weights(parts, path)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(parts(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4"])
def test_a_quantized_model_keeps_a_new_real_head(tmp_path, scheme):
    model, path = quantize_model(randomised(small()), scheme, skip="blocks.0.mlp"), tmp_path / "model.safetensors"
    model.reset_classifier(3)
    save_weights(randomised(model), path)
    rebuilt, x = create_model(path).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), model.eval()(x))
    assert type(rebuilt.head) is nn.Linear and type(rebuilt.blocks[1].mlp.fc1) is not nn.Linear


def test_what_cannot_be_rebuilt_is_refused_before_it_is_trained_or_saved(tmp_path):
    model, path = small(), tmp_path / "model.safetensors"
    model.blocks[1].mlp = nn.Linear(48, 48)
    with pytest.raises(ValueError, match=r"vit_tiny cannot be rebuilt from a file: .*blocks\.1\.mlp"):
        save_weights(model, path)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    data = ImageDataset(images, [0, 1, 2, 3], "abcdefg", mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        fit(model, data, config=TrainConfig(epochs=1, batch_size=2), out_dir=tmp_path / "run", progress=False)
    assert not list(tmp_path.iterdir())


def test_weights_that_were_tied_are_refused_and_those_that_are_come_back(tmp_path, registered):
    model, path = small(), tmp_path / "model.safetensors"
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.bias = blocks\.1\.mlp\.fc1\.bias"):
        save_weights(model, path)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inward, self.outward = nn.Linear(4, 4), nn.Linear(4, 4)
            self.outward.weight = self.inward.weight

    register_model("tied", Tied)
    model = randomised(create_model("tied"))
    save_weights(model, path)
    rebuilt = create_model(path)
    assert same_weights(rebuilt, model) and rebuilt.outward.weight is rebuilt.inward.weight


@pytest.mark.parametrize("wrap", ["compiled", "merging"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_fit_of_a_wrapped_model_leaves_files_that_open(tmp_path, wrap, ema):
    model, images = small(num_classes=2), torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    data = ImageDataset(images, [0, 1] * 4, "ab", mean=(0.5,) * 3, std=(0.5,) * 3)
    config = TrainConfig(epochs=1, batch_size=4, ema=ema, device="cpu")
    fit(WRAPPERS[wrap](model), data, data, config, out_dir=tmp_path, progress=False)
    for name in ("best", "final"):
        assert same_weights(create_model(tmp_path / f"{name}.safetensors"), model)


# ---------------------------------------------------------------------------------------------- prefixes of checkpoints


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "module.model.backbone."]
)
@pytest.mark.parametrize("theirs", ["timm", "torchvision"])
def test_prefixes_are_taken_off_where_the_names_then_fit(prefix, theirs, capsys):
    if theirs == "timm":
        other = randomised(TimmVisionTransformer(**SMALL))
    else:
        other = randomised(torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 192, num_classes=7)).eval()
    model, x = small(), torch.randn(2, 3, 32, 32)
    load_weights(model, {prefix + name: tensor for name, tensor in other.state_dict().items()})
    torch.testing.assert_close(model(x), other.eval()(x))
    told = prefix.replace("_orig_mod.", "")  # torch.compile's own is no news
    err = capsys.readouterr().err
    assert err == (f"vitcourse: names of the weights begin with {told!r}, which was taken off\n" if told else "")


def test_names_that_fit_keep_their_prefix(capsys):
    """torchvision's own names begin with ``encoder.``."""
    other = torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 192, num_classes=7)
    load_weights(small(), other.state_dict())
    assert capsys.readouterr().err == ""


def test_a_backbone_with_a_head_beside_it(capsys):
    other = randomised(small())
    state = {(k if k.startswith("head.") else f"backbone.{k}"): v for k, v in other.state_dict().items()}
    assert same_weights(load_weights(small(), state), other)


def test_no_word_of_heads_before_the_names_fit(capsys):
    state = {f"strange.{k}": v for k, v in small(num_classes=5).state_dict().items()}
    with pytest.raises(ValueError, match=r"(?s)missing: .*not in the model: strange"):
        load_weights(small(), state, new_head=True)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------- preprocessing, and its image size


def test_weights_bring_mean_and_crop_but_not_their_size(tmp_path):
    theirs, path = small(), tmp_path / "model.safetensors"
    theirs.preprocess = ODD
    save_weights(theirs, path)
    for size in (48, (24, 56)):
        model = create_model("vit_tiny", **{**SMALL, "img_size": size}, weights=path)
        assert model.preprocess == replace(ODD, img_size=size)
        for source in (path, tmp_path / "again.safetensors"):
            again = create_model(source, **({"img_size": size} if source == path else {}))
            assert again.preprocess == model.preprocess
            save_weights(again, tmp_path / "again.safetensors")
        image = eval_transform(**asdict(model.preprocess))(torch.rand(3, 70, 80))
        assert image.shape[1:] == model.img_size and model.eval()(image[None]).shape == (1, 7)


def test_a_timm_module_of_another_size_brings_no_size_either():
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=2, num_classes=7)
    ours = create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=2, num_classes=7, weights=theirs)
    assert ours.preprocess.img_size == (32, 64)


# ---------------------------------------------------------------------------------------- positions that are not square


def of_any_origin(model, tmp_path):
    """A model's weights as the model itself, as a file, and as a state dict with its size."""
    save_weights(model, tmp_path / "model.safetensors")
    return [
        (model, {}),
        (tmp_path / "model.safetensors", {}),
        (model.state_dict(), {"source_img_size": model.img_size}),
    ]


@pytest.mark.parametrize(
    ("old", "new"), [((16, 64), (32, 32)), ((32, 64), (64, 32)), ((32, 64), (48, 48)), (32, (16, 64))]
)
def test_positions_of_any_shape_are_read_as_they_were_laid_out(tmp_path, old, new):
    other = randomised(small(img_size=old))
    expected = resize_pos_embed(other.pos_embed, other.grid_size, small(img_size=new).grid_size, 1)
    for source, more in of_any_origin(other, tmp_path):
        model = load_weights(small(img_size=new), source, **more)
        torch.testing.assert_close(model.pos_embed, expected)


def test_positions_of_a_timm_module_are_read_as_they_were_laid_out():
    other = randomised(TimmVisionTransformer(**{**SMALL, "img_size": (16, 64)}))
    model = load_weights(small(), other)
    torch.testing.assert_close(model.pos_embed, resize_pos_embed(other.pos_embed, (2, 8), (4, 4), 1))


@pytest.mark.parametrize("old", [(32, 64), (64, 32), 64])
def test_positions_that_could_lie_in_several_ways_are_refused(old):
    model, state = small(img_size=(64, 32)), small(img_size=old).state_dict()
    with pytest.raises(ValueError, match=r"8×4.*not the only reading.*source_img_size=\(height, width\)"):
        load_weights(model, state)
    load_weights(model, state, source_img_size=old)


def test_a_wrong_size_of_the_source_is_an_error():
    with pytest.raises(ValueError, match="pos_embed of the weights has 16 positions, and source_img_size makes 8×8"):
        load_weights(small(), small().state_dict(), source_img_size=64)
    with pytest.raises(ValueError, match=r"(?s)pos_embed is \(1, 33, 48\).*source_img_size"):
        load_weights(small(), small(img_size=(32, 64)).state_dict())


def test_what_differs_beside_the_positions_is_named():
    for change, name in (({"patch_size": 16}, "patch_embed.proj.weight"), ({"reg_tokens": 2}, "reg_token")):
        with pytest.raises(ValueError, match=rf"(?s)do not fit vit_tiny:.*{name}"):
            load_weights(small(), TimmVisionTransformer(**{**SMALL, **change}))


COATNET = {"stem_dim": 8, "embed_dim": (16, 32), "depths": (1, 1), "layout": "CT", "stem_stride": 1, "strides": (2, 2),
           "head_dim": 16, "num_classes": 7}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), [((16, 64), (32, 32)), ((32, 64), (64, 32)), (32, (16, 64))])
def test_tables_of_coatnet_are_read_as_they_were_laid_out(tmp_path, old, new):
    other = randomised(create_model("coatnet_0", img_size=old, **COATNET))
    fresh, key = create_model("coatnet_0", img_size=new, **COATNET), "stages.1.0.attn.relative_position_bias_table"
    sizes = [[2 * (side // 4) - 1 for side in model.img_size] for model in (other, fresh)]
    expected = resize_pos_embed(other.state_dict()[key][None], *sizes)[0]
    for source, more in of_any_origin(other, tmp_path):
        torch.testing.assert_close(load_weights(fresh, source, **more).state_dict()[key], expected)
    if old != 32 and new != (32, 32):
        with pytest.raises(ValueError, match="not the only reading"):
            load_weights(fresh, other.state_dict())


SWIN = {"img_size": (24, 40), "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 7}


def test_tables_of_swin_are_read_as_they_were_laid_out(tmp_path):
    other = randomised(create_model("swin_tiny", **SWIN, window_size=(3, 5)))
    key, table = "layers.0.blocks.1.attn.relative_position_bias_table", other.layers[0].blocks[1].attn
    grid = table.relative_position_bias_table.view(5, 9, 2)
    for source, _ in of_any_origin(other, tmp_path)[:2]:
        turned = create_model("swin_tiny", **SWIN, window_size=(5, 3), weights=source).state_dict()[key]
        expected = F.interpolate(grid.permute(2, 0, 1)[None], (9, 9), mode="bicubic")[0, :, :, 2:-2]
        torch.testing.assert_close(turned, expected.permute(1, 2, 0).reshape(45, 2))
    with pytest.raises(ValueError, match="not the only reading"):
        create_model("swin_tiny", **SWIN, window_size=(5, 3), weights=other.state_dict())


# ----------------------------------------------------------------------------------- Swin V2 at another window

V2 = {"img_size": 64, "patch_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 7}


def timms_v2(window, pretrained, side=64):
    sizes = {**V2, "img_size": side, "window_size": window, "pretrained_window_sizes": pretrained}
    return randomised(timm.models.swin_transformer_v2.SwinTransformerV2(**sizes)).eval()


@pytest.mark.parametrize("pretrained", [(0, 0), (4, 4), (12, 6)])
def test_windows_of_the_pretraining_come_with_timms_module(tmp_path, pretrained):
    theirs, x = timms_v2(8, pretrained), torch.randn(2, 3, 64, 64)
    ours = create_model("swinv2_tiny_window8_256", **V2, weights=theirs).eval()
    torch.testing.assert_close(ours(x), theirs(x))
    save_weights(ours, tmp_path / "model.safetensors")
    torch.testing.assert_close(create_model(tmp_path / "model.safetensors").eval()(x), theirs(x))
    if any(pretrained):
        told = create_model("swinv2_tiny_window8_256", **V2, pretrained_window_sizes=pretrained)
        torch.testing.assert_close(load_weights(told, theirs.state_dict()).eval()(x), theirs(x))


def test_windows_of_the_pretraining_are_read_off_the_offsets_in_a_checkpoint():
    theirs, x = timms_v2(8, (12, 6)), torch.randn(2, 3, 64, 64)
    buffers = {name: b for name, b in theirs.named_buffers() if name.endswith("relative_coords_table")}
    ours = create_model("swinv2_tiny_window8_256", **V2, weights={**theirs.state_dict(), **buffers}).eval()
    torch.testing.assert_close(ours(x), theirs(x))
    other = torchvision.models.swin_transformer.SwinTransformer(
        [4, 4], 32, [2, 2], [2, 4], [8, 8], num_classes=7,
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    )  # fmt: skip
    for source in (other, other.state_dict()):
        wide = create_model("swinv2_tiny_window16_256", **V2, weights=source)
        assert wide.layers[0].blocks[0].attn.window_size == (16, 16)
        assert wide.model_args["pretrained_window_sizes"] == ((8, 8), 0)


def test_what_a_source_knows_stays_as_it_was():
    """Names, the caller's word and what is read off the tensors go into facts of their own."""
    theirs = timms_v2(8, (12, 6))
    buffers = {name: b for name, b in theirs.named_buffers() if name.endswith("relative_coords_table")}
    source = Source({**theirs.state_dict(), **buffers}, facts={"num_classes": 7})
    ours = create_model("swinv2_tiny_window8_256", **V2)
    fitted = fitting._fit(ours, source, "here", strict=True, new_head=False, img_size=(64, 32))
    assert source.facts == {"num_classes": 7}
    assert fitted.facts["num_classes"] == 7 and fitted.facts["source_img_size"] == (64, 32)
    assert fitted.facts["layers.0.blocks.1.attn.pretrained_window_size"] == (12, 12)


def test_our_own_weights_count_offsets_as_they_were_trained(tmp_path):
    """A pair of tokens keeps its bias when the window grows."""
    small_windows = randomised(create_model("swinv2_tiny_window8_256", **V2))
    save_weights(small_windows, tmp_path / "model.safetensors")
    for source in (small_windows, tmp_path / "model.safetensors"):
        wide = create_model("swinv2_tiny_window16_256", **V2, weights=source)
        near, far = (m.layers[0].blocks[0].attn.position_bias(torch.zeros(1)) for m in (small_windows, wide))
        torch.testing.assert_close(far.view(2, 16, 16, 16, 16)[:, :8, :8, :8, :8], near.view(2, 8, 8, 8, 8))


def test_the_weights_have_the_last_word_about_their_windows(tmp_path):
    asked = create_model("swinv2_tiny_window8_256", **V2, pretrained_window_sizes=(6, 6))
    load_weights(asked, timms_v2(8, (4, 4)))
    save_weights(asked, tmp_path / "model.safetensors")
    attention = [m.layers[0].blocks[0].attn for m in (asked, create_model(tmp_path / "model.safetensors"))]
    assert [a.pretrained_window_size for a in attention] == [(4, 4), (4, 4)]
    load_weights(asked, timms_v2(8, (0, 0)).state_dict())  # which does not tell
    assert attention[0].pretrained_window_size == (6, 6)


def test_windows_that_no_attention_knows_are_refused():
    with pytest.raises(ValueError, match="pretrained_window_sizes are for Swin V2"):
        create_model("swin_tiny", pretrained_window_sizes=(6, 6, 6, 6))
    with pytest.raises(ValueError, match=r"pretrained_window_sizes \(6,\) must have one entry for each of 4 stages"):
        create_model("swinv2_tiny_window8_256", pretrained_window_sizes=(6,))


@pytest.mark.parametrize(
    "name", ["swinv2_base_window12_192", "swinv2_base_window12to16_192to256", "swinv2_large_window12to24_192to384"]
)
def test_swin_v2_names_are_timms(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        windows = [
            (b.attn.window_size, getattr(b.attn, "pretrained_window_size", None) or (0, 0))
            for s in (mine, other)
            for b in s.blocks[:1]
        ]
        assert windows[0] == windows[1]
    assert ours.preprocess.img_size == theirs.pretrained_cfg["input_size"][-1]


# ------------------------------------------------------------------------------------- differences without parameters


def quick_gelu():
    class QuickGELU(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    return QuickGELU


DIFFERENT = {
    "num_heads": ({"num_heads": 6}, r"num_heads: 6 there, 3 in the model \(blocks\.0\.attn\) and 1 more"),
    "activation": ({"act_layer": nn.ReLU}, r"activation: ReLU\(\) there, GELU\(approximate='none'\) in the model"),
    "its approximation": ({"act_layer": lambda: nn.GELU("tanh")}, "activation: GELU"),
    "a class of its own": ({"act_layer": quick_gelu()}, "activation: QuickGELU"),
    "eps": ({"norm_layer": lambda dim, **_: nn.LayerNorm(dim, eps=1e-3)}, "eps: 0.001 there, 1e-06 in the model"),
    "pooling": ({"global_pool": "avg", "fc_norm": False}, "global_pool: avg there, token in the model"),
}


@pytest.mark.parametrize(("change", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_module_that_computes_otherwise_is_refused(change, message):
    theirs = TimmVisionTransformer(**{**SMALL, **change})
    model = small()
    before = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=rf"(?s)fit vit_tiny in name and shape, but .*otherwise.*{message}.*bare state dict"
    ):
        load_weights(model, theirs)
    assert same_weights(model, before)
    assert same_weights(load_weights(model, theirs.state_dict()), theirs)  # asked for


def test_a_file_of_a_model_that_computes_otherwise_is_refused(tmp_path):
    save_weights(small(num_heads=6), tmp_path / "vit.safetensors")
    for build in (
        lambda: small(weights=tmp_path / "vit.safetensors"),
        lambda: create_model(tmp_path / "vit.safetensors", num_heads=3),
    ):
        with pytest.raises(ValueError, match="num_heads: 6 there, 3 in the model"):
            build()
    save_weights(create_model("coatnet_0", img_size=32, **COATNET), tmp_path / "coatnet.safetensors")
    with pytest.raises(
        ValueError, match=r"stride: \(2, 2\) there, \(1, 1\) in the model \(stages\.0\.0\.expand\) and 1 more"
    ):
        create_model(tmp_path / "coatnet.safetensors", downsample="depthwise")
    save_weights(create_model("swin_tiny", **SWIN), tmp_path / "swin.safetensors")
    with pytest.raises(ValueError, match="global_pool: avg there, max in the model"):
        create_model(tmp_path / "swin.safetensors", global_pool="max")


def test_another_mixer_with_the_same_parameters_is_refused():
    with pytest.raises(ValueError, match="mixer: Attention there, LinearAttention in the model"):
        small(attn_layer=LinearAttention, weights=small())


def test_a_pruned_file_is_compared_with_what_it_became(tmp_path):
    model = keep_units(randomised(small()), {"blocks.0.attn": [0, 2], "blocks.1.mlp": range(64)})
    save_weights(model, tmp_path / "pruned.safetensors")
    assert same_weights(create_model(tmp_path / "pruned.safetensors", drop_path_rate=0.1), model)


# --------------------------------------------------------------------------------------- images of other channels


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["vit_tiny", "convvit_tiny", "coatnet_0", "swin_tiny"])
def test_filters_are_fitted_to_other_channels_as_timm_does(name, channels, capsys):
    sizes = {"vit": SMALL, "con": {**SMALL}, "coa": {"img_size": 32, **COATNET}, "swi": SWIN}[name[:3]]
    theirs = randomised(create_model(name, **sizes))
    ours = create_model(name, **sizes, in_chans=channels, weights=theirs)
    key = next(k for k, v in theirs.state_dict().items() if v.ndim == 4 and v.shape[1] == 3)
    expected = timm.models.adapt_input_conv(channels, theirs.state_dict()[key])
    torch.testing.assert_close(ours.state_dict()[key], expected)
    how = "summed" if channels == 1 else "repeated and rescaled"
    assert capsys.readouterr().err == f"vitcourse: {key} is for 3 channels, not {channels}: {how}\n"
    assert len(ours.preprocess.mean) == len(ours.preprocess.std) == channels


def test_filters_for_grey_images_see_the_same_in_colour():
    theirs, x = randomised(small(in_chans=1)), torch.randn(2, 1, 32, 32)
    ours = small(weights=theirs)
    torch.testing.assert_close(ours(x.expand(-1, 3, -1, -1)), theirs(x))


def test_mean_and_std_follow_the_channels():
    theirs = small()
    theirs.preprocess = ODD
    assert small(in_chans=1, weights=theirs).preprocess == replace(ODD, mean=(0.2,), std=(0.5,))
    assert small(in_chans=4, weights=theirs).preprocess.mean == (0.1, 0.2, 0.3, 0.1)


# ------------------------------------------------------------------------------------------------ awkward, and mended


@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4"])
def test_integers_are_not_summed(tmp_path, scheme):
    save_weights(quantize_model(small(), scheme), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="quantized models are not trained for other channels"):
        create_model(tmp_path / "model.safetensors", in_chans=1)


CHANGED = {
    "activation": (small, lambda m: setattr(m.blocks[0].mlp, "act", nn.ReLU()), r"activation: ReLU\(\) there"),
    "heads": (small, lambda m: vars(m.blocks[0].attn).update(num_heads=6, head_dim=8), "num_heads: 6 there"),
    "mixer": (small, lambda m: setattr(m.blocks[0], "attn", LinearAttention(48, 3)), "mixer: LinearAttention there"),
    "pool": (
        lambda: create_model("swin_tiny", **SWIN), lambda m: setattr(m, "global_pool", "max"), "global_pool: max there",
    ),
    "window": (
        lambda: create_model("swinv2_tiny_window8_256", **V2),
        lambda m: setattr(m.layers[0].blocks[0].attn, "pretrained_window_size", (4, 4)),
        r"pretrained_window_size: \(4, 4\) there",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "change", "message"), CHANGED.values(), ids=CHANGED)
def test_changes_without_parameters_are_refused_when_saving(tmp_path, build, change, message):
    model = build()
    save_weights(model, tmp_path / "model.safetensors")
    change(model)
    with pytest.raises(ValueError, match=f"cannot be rebuilt from a file: .*{message}"):
        save_weights(model, tmp_path / "model.safetensors")


def test_other_places_of_the_norms_are_refused():
    theirs = TimmVisionTransformer(**SMALL, block_fn=timm.models.vision_transformer.ResPostBlock)
    with pytest.raises(
        ValueError, match="where_it_normalises: after each branch there, before each branch in the model"
    ):
        small(weights=theirs)
    with pytest.raises(ValueError, match="where_it_normalises: after each branch there"):
        create_model("swin_tiny", **SWIN, weights=create_model("swin_tiny", **SWIN, block_layer=PostNormBlock))


def test_other_means_are_refused(tmp_path):
    theirs = TimmVisionTransformer(**SMALL, global_pool="avg", fc_norm=True, pool_include_prefix=True)
    with pytest.raises(ValueError, match="pool_include_prefix: True there, False in the model"):
        small(global_pool="avg", weights=theirs)
    save_weights(create_model("swin_tiny", **SWIN, mask_padding=True), tmp_path / "swin.safetensors")
    with pytest.raises(ValueError, match="mask_padding: True there, False in the model"):
        create_model(tmp_path / "swin.safetensors", mask_padding=False)


def test_nothing_loaded_is_an_error_also_where_not_all_is_due():
    for state in ({}, {"x": torch.zeros(1)}, {f"strange.{k}": v for k, v in small().state_dict().items()}):
        with pytest.raises(ValueError, match="do not fit"):
            load_weights(small(), state, strict=False)


def test_half_precision_keeps_what_is_beyond_its_range(tmp_path):
    model = create_model("coatnet_0", img_size=32, **COATNET)
    model.stem[1].running_var[0] = 1e5
    save_weights(model, tmp_path / "model.safetensors", half=True)
    assert create_model(tmp_path / "model.safetensors").stem[1].running_var[0] == 1e5


def test_numbers_of_another_kind_are_refused():
    for change in (torch.Tensor.int, lambda t: t.to(torch.complex64), lambda t: t.to("meta")):
        with pytest.raises(ValueError, match="numbers of the same kind"):
            load_weights(small(), {k: change(v) for k, v in small().state_dict().items()})
    with torch.device("meta"):
        empty = small()
    with pytest.raises(ValueError, match="model.to_empty first"):
        load_weights(empty, small().state_dict())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        load_weights(small(), {k: v.to(dtype) for k, v in small().state_dict().items()})


class Counts(nn.Module):
    """Computes with numbers while it is built, and calls its classes otherwise."""

    def __init__(self, classes=4):
        super().__init__()
        self.rates = [x.item() for x in torch.linspace(0, 1, 3)]
        self.num_classes, self.fc = classes, nn.Linear(3, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def test_a_class_that_computes_while_it_is_built(tmp_path, registered):
    register_model("counts", Counts)
    model, path = create_model("counts", classes=3), tmp_path / "model.safetensors"
    state = torch.get_rng_state()
    save_weights(model, path)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(create_model(path), model)


def test_a_file_of_an_unknown_model_loads_into_one_that_fits(tmp_path, registered, monkeypatch, capsys):
    register_model("counts", Counts)
    save_weights(create_model("counts"), tmp_path / "model.safetensors")
    monkeypatch.delitem(registry._models, "counts")
    load_weights(Counts(), tmp_path / "model.safetensors")
    assert "what" in (err := capsys.readouterr().err) and "cannot be compared: model 'counts' is unknown" in err


def test_a_compiled_run_is_continued_without_the_compiler(tmp_path):
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    data = ImageDataset(images, [0, 1] * 4, "ab", mean=(0.5,) * 3, std=(0.5,) * 3)
    config = TrainConfig(epochs=1, batch_size=4, device="cpu")
    model = small(num_classes=2)
    fit(torch.compile(model, backend="eager"), data, config=config, out_dir=tmp_path, progress=False)
    again = small(num_classes=2)
    fit(again, data, config=config, out_dir=tmp_path, resume=True, progress=False)
    assert same_weights(again, model)


def test_prefixes_may_be_longer_in_some_names():
    other = randomised(small())
    for inner, outer in (("model.backbone.", "model."), ("module.backbone.", "module.")):
        state = {(outer if k.startswith("head.") else inner) + k: v for k, v in other.state_dict().items()}
        assert same_weights(load_weights(small(), state), other)


def test_the_count_of_a_running_mean_is_no_weight():
    model = randomised(small())
    assert same_weights(load_weights(small(), torch.optim.swa_utils.AveragedModel(model).state_dict()), model)


def test_weights_that_are_held_at_zero_are_read_as_they_are(tmp_path):
    pruned = magnitude_prune(randomised(small()), 0.5)
    weights = load_weights(small(), pruned)
    assert (weights.blocks[0].mlp.fc1.weight == 0).float().mean() > 0.4
    with pytest.raises(ValueError, match="make_permanent"):
        load_weights(pruned, small())
    chain = magnitude_prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), 0.5)
    save_weights(chain, tmp_path / "chain.safetensors")
    load_weights(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), tmp_path / "chain.safetensors")


def test_files_end_in_safetensors_and_headers_are_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match=r"'.*model\.pt' must end in \.safetensors"):
        save_weights(small(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="metadata model_args would take the place"):
        save_weights(small(), tmp_path / "model.safetensors", model_args={})
    with pytest.raises(TypeError, match="JSON"):
        save_weights(small(), tmp_path / "model.safetensors", accuracy=torch.tensor(1.0))
    assert not list(tmp_path.iterdir())


def test_many_may_save_to_one_place(tmp_path):
    model, path = small(), tmp_path / "model.safetensors"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: save_weights(model, path), range(16)))
    assert same_weights(create_model(path), model) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt", ".bin", ".PTH"])
def test_checkpoints_of_training_scripts(tmp_path, suffix, capsys):
    model, mean = randomised(small()), randomised(small())
    content = {"state_dict": model.state_dict(), "state_dict_ema": mean.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / f"checkpoint{suffix}")
    for source in (tmp_path / f"checkpoint{suffix}", content):
        assert same_weights(load_weights(small(), source), mean)
        assert "holds state_dict_ema and state_dict; taking state_dict_ema" in capsys.readouterr().err


@pytest.mark.parametrize("state", [{"student": {}, "teacher": {}}, {0: torch.zeros(1)}, {"a": None}, {"a": [1, 2]}])
def test_a_mapping_without_a_state_dict_says_what_it_has(state):
    with pytest.raises(ValueError, match=f"the mapping holds no state dict .* it has .*{list(state)[0]}"):
        load_weights(small(), state)


def test_no_head_there_says_what_to_do():
    with pytest.raises(ValueError, match=r"no head: create_model\(name, num_classes=0\)"):
        load_weights(small(), TimmVisionTransformer(**{**SMALL, "num_classes": 0}))


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


STARTS = ("supervised", "moco", "beit", "lejepa", "mae")


@pytest.mark.parametrize("name", STARTS)
def test_each_start_opens_and_says_where_it_comes_from(name):
    file = data_dir() / "weights" / f"fashion_mnist_{name}.safetensors"
    record = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    model = create_model(file)
    encoder = getattr(model, "encoder", model)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"] <= 1e6
    assert encoder.preprocess.mean == (0.286,) and encoder.feature_maps(torch.zeros(1, 1, 28, 28))[0].shape[1] == 96
    assert record["command"].startswith(f"python -m vitcourse.train --recipe fashion_mnist_{name} ")


@pytest.mark.parametrize("name", STARTS)
def test_each_start_finds_more_neighbours_than_an_encoder_that_was_not_trained(name):
    trained = encoder_of(create_model(data_dir() / "weights" / f"fashion_mnist_{name}.safetensors"))
    torch.manual_seed(0)
    untrained = create_model(trained.name, **{**trained.model_args, "num_classes": 0})
    untrained.preprocess = trained.preprocess
    few = [
        subset(open_dataset("fashion_mnist_subset", split), count) for split, count in (("train", 500), ("test", 500))
    ]
    found = [knn_accuracy(*(extract_features(model, part) for part in few)) for model in (trained, untrained)]
    assert found[0] > found[1] + 0.1, found


def test_all_weights_of_fashion_mnist_are_six_megabytes():
    assert sum(f.stat().st_size for f in (data_dir() / "weights").glob("fashion_mnist_*.safetensors")) <= 6e6


def test_the_recipe_is_the_command():
    from vitcourse.train.arguments import parse

    argv = RECORD["command"].removeprefix("python -m vitcourse.train ").split()
    options, config, _ = parse(argv)
    again, recipe_config, _ = parse(["--recipe", "fashion_mnist_tiny", "--threads", str(config.threads)])
    assert config == recipe_config
    assert options.model == again.model and options.data == again.data
