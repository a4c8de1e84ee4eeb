"""One contract for all objectives: interrupted, averaged, shared, fed with bad numbers, and asked for by name."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from vitcourse import create_model, load_weights, notices
from vitcourse.commands import main as vitcourse_main
from vitcourse.data import open_dataset
from vitcourse.pretraining import (
    MaskedAutoencoder,
    MaskedImageModel,
    MoCo,
    Tokenization,
    VQTokenizer,
    make_objective,
    make_options,
    nearest_code,
    provide_tokenizer,
    tokenizer_for,
)
from vitcourse.pretraining.options import OBJECTIVES, TokenizerOptions, option_fields
from vitcourse.pretraining.program import prepare
from vitcourse.pretraining.tokenizer import load_tokenizer
from vitcourse.train import TrainConfig, TrainingError, fit, main
from vitcourse.train.arguments import args_of, parse
from vitcourse.train.config import list_recipes, load_recipe
from vitcourse.weights import read_metadata, save_weights

sys.path.insert(0, str(Path(__file__).parent))
from _pretraining import NAMES, SMALL, encoder, images, joint_run, small

WORKER = Path(__file__).with_name("_pretraining.py")
SEARCH_PATH = os.pathsep.join(filter(None, (str(WORKER.parents[1]), os.environ.get("PYTHONPATH"))))
CONFIG = TrainConfig(epochs=3, batch_size=16, lr=1e-2, checkpoint_every=2, ema=0.9, device="cpu")
SPEED = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([t.detach().flatten().double() for t in model.state_dict().values()])


def facts(history) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in SPEED} for row in history]


def assert_same(a, b) -> None:
    """Bit by bit, in nested dicts."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ----------------------------------------------------------------------------------------------------- the contract


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_ends_in_the_same_bits(name, tmp_path):
    whole, task = small(name)
    expected = fit(whole, images(), images(20, seed=1), CONFIG, task=task, progress=False)
    model, broken = small(name)
    after_step = broken.after_step

    def interrupt(model, step, total):
        after_step(model, step, total)
        if step == 4:
            raise Interrupt

    broken.after_step = interrupt
    with pytest.raises(Interrupt):
        fit(model, images(), images(20, seed=1), CONFIG, task=broken, progress=False, out_dir=tmp_path)
    again, continued = small(name)
    more = {"task": continued, "progress": False, "out_dir": tmp_path, "resume": True}
    history = fit(again, images(), images(20, seed=1), CONFIG, **more)
    start, _ = small(name)
    assert torch.equal(weights(again), weights(whole)) and not torch.equal(weights(whole), weights(start))
    assert_same(continued.state_dict(), task.state_dict())
    assert facts(history) == facts(expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_running_mean_is_evaluated_and_kept(name, tmp_path):
    model, task = small(name)
    last, config = [], replace(CONFIG, max_steps=3)
    task.after_step = lambda model, step, total: last.append(weights(model))
    fit(model, images(), images(20, seed=1), config, task=task, progress=False, out_dir=tmp_path)
    assert not torch.equal(last[-1], weights(model))
    kept = create_model(tmp_path / "final.safetensors")
    assert torch.equal(weights(kept), weights(task.product(model)))


@pytest.mark.parametrize("name", NAMES)
def test_bad_numbers_are_named(name):
    data = images()
    data.images = data.images.float() / 255
    model, task = small(name)
    data.images[7, 0, 2, 2] = math.nan
    with pytest.raises(TrainingError, match="images with NaN"):
        fit(model, data, None, replace(CONFIG, ema=0.0), task=task, progress=False)
    data.images[0] = math.nan
    model, task = small(name)
    with pytest.raises(ValueError, match="train_set has NaN"):
        fit(model, data, None, CONFIG, task=task, progress=False)


@pytest.fixture(scope="module")
def shared_by_two(tmp_path_factory):
    out = tmp_path_factory.mktemp("joint") / "found.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": SEARCH_PATH, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(WORKER), str(out)], capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_learn_what_one_does(name, shared_by_two):
    """In float64: losses, gradients (what six steps of AdamW made of them), batch norms, codebook, keys, evaluation."""
    theirs, ours = shared_by_two[name], joint_run(name)
    start = small(name, torch.float64)[0].state_dict()
    assert any((ours["model"][k] - v).abs().max() > 1e-3 for k, v in start.items() if v.is_floating_point())
    for key in ("model", "keys"):
        for k, value in ours[key].items():
            torch.testing.assert_close(theirs[key][k], value, rtol=1e-8, atol=1e-9, msg=lambda m, k=k: f"{k}: {m}")
    for a, b in zip(theirs["rows"], ours["rows"], strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["mae", "beit", "tokenizer"])
def test_micro_batches_change_nothing(name):
    found = []
    for accum in (1, 3):
        model, task = small(name, torch.float64)
        config = replace(CONFIG, accum=accum, epochs=2, drop_last=False)
        data = images(37)
        data.images = data.images.double() / 255 - 0.5
        fit(model, data, None, config, task=task, progress=False)
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["moco", "lejepa"])
def test_compared_samples_are_not_parted(name):
    model, task = small(name)
    with pytest.raises(ValueError, match=f"task '{name}' compares .* use --accum 1"):
        fit(model, images(), None, replace(CONFIG, accum=2), task=task, progress=False)


@pytest.mark.parametrize("name", ["mae", "moco", "lejepa", "beit"])
def test_any_number_of_processes_evaluates_the_same(name):
    from vitcourse.train.batches import Share

    model, task = small(name, torch.float64)
    data = images(36, seed=1)
    data.images = data.images.double() / 255 - 0.5
    fit(model, data, None, replace(CONFIG, max_steps=1), task=task, progress=False)
    alone = task.evaluate(model, data, CONFIG)["val_loss"]
    parts = []
    for rank in range(2):
        task.evaluate(model, data, CONFIG, share=Share(rank, 2), reduce=lambda t: parts.append(t.clone()) or t)
    total, count = sum(parts).tolist()
    assert total / count == pytest.approx(alone, rel=1e-6)


# -------------------------------------------------------------------------------------------------------- refusals


def swin():
    sizes = {"img_size": 8, "patch_size": 2, "window_size": 2, "depths": (1, 1), "num_heads": (1, 2)}
    return create_model("swin_tiny", num_classes=0, embed_dim=8, **sizes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_options("mae", {"mask_ratio": 1.0}), "mask_ratio must be above 0 and below 1, got 1.0"),
        (lambda: make_options("beit", {"mask_ratio": 0}), "mask_ratio must be above 0 and below 1"),
        (lambda: fitted("lejepa", local_size=5), "local_size 5 is not divisible by the encoder's patch_size 2; use 4"),
        (
            lambda: fitted_on((8, 12), "lejepa", patch_size=(2, 4), local_views=1, local_size=6),
            r"local_size 6 is not divisible by the encoder's patch_size \(2, 4\); use 4",
        ),
        (lambda: fitted_on((8, 12), "beit", patch_size=(8, 2), min_block=1), r"a grid of \(1, 6\), and no block"),
        (lambda: make_options("moco", {"temperature": 0.0}), "temperature must be above 0"),
        (lambda: make_options("moco", {"key_momentum": 1.5}), "key_momentum must be between 0 and 1, got 1.5"),
        (lambda: make_options("mae", {"mask_rato": 0.5}), "'mask_rato' is unknown; did you mean 'mask_ratio'"),
        (lambda: make_options("mea", {}), "objective 'mea' is unknown; did you mean 'mae'"),
        (lambda: MaskedAutoencoder(encoder(), mask_ratio=0.99), "mask_ratio 0.99 leaves none of 24 patches to see"),
        (lambda: MaskedAutoencoder(encoder(), mask_ratio=0.0), "leaves none of 24 patches to predict"),
        (lambda: MaskedAutoencoder(encoder(patch_size=1, in_chans=1)), "patches of one number have no variance"),
        (lambda: MaskedAutoencoder(encoder(num_classes=5)), "encoder has a head of 5 classes, .* num_classes=0"),
        (lambda: MoCo(encoder(num_classes=5)), "encoder has a head of 5 classes, .* num_classes=0"),
        (lambda: MaskedAutoencoder(encoder(img_size=9, pad=True)), "img_size 9 is not divisible by patch_size 2, and"),
        (lambda: MaskedAutoencoder(swin()), "encoder is a SwinTransformer, .* only a plain ViT .* moco and lejepa"),
        (lambda: MaskedImageModel(swin()), "encoder is a SwinTransformer, .* only a plain ViT"),
        (lambda: make_objective("mae", nn.Conv2d(3, 4, 2)), "encoder is a Conv2d, .* only a plain ViT"),
        (lambda: MoCo(nn.Conv2d(3, 4, 2)), "encoder is a Conv2d, which does not tell how wide its features are"),
        (lambda: MoCo(create_model("coatnet_0", num_classes=0, img_size=32)), "freeze_patches=False"),
        (
            lambda: MaskedAutoencoder(create_model("convvit_tiny", img_size=32, num_classes=0, depth=1)),
            "lets patches see their neighbours",
        ),
        (lambda: MaskedAutoencoder(encoder())(torch.zeros(2, 3, 8, 8), torch.rand(2, 16)), "images are .*img_size"),
        (lambda: small("beit", min_block=12, mask_ratio=0.4)[1] and fitted("beit", min_block=12), "smaller min_block"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def fitted(name, **changes):
    model, task = small(name, **changes)
    return fit(model, images(), None, replace(CONFIG, max_steps=1), task=task, progress=False)


def fitted_on(img_size, name, patch_size, **changes):
    model, task = make_objective(name, encoder(img_size=img_size, patch_size=patch_size), **{**SMALL[name], **changes})
    if name == "beit":
        model.adopt_tokenizer(tokenizer_for(model.encoder, task.options))
    return fit(model, images(), None, replace(CONFIG, max_steps=1), task=task, progress=False)


@pytest.mark.parametrize("name", ["moco", "lejepa"])
def test_one_image_is_not_validated_on(name):
    """It would be told from no other, a loss of 0."""
    model, task = small(name)
    assert fit(model, images(), images(1), CONFIG, task=task, progress=False)[-1]["val_loss"] is None


@pytest.mark.parametrize("name", ["moco", "lejepa"])
def test_a_batch_of_one_has_nothing_to_compare(name):
    for config in (replace(CONFIG, batch_size=1), replace(CONFIG, batch_size=13, drop_last=False)):
        model, task = small(name)
        with pytest.raises(ValueError, match=r"a batch of 1 has nothing to compare with.* larger --batch-size"):
            fit(model, images(), None, config, task=task, progress=False)


def test_images_and_model_must_fit():
    model, task = small("mae")
    data = images()
    data.images = data.images[..., :8]
    with pytest.raises(ValueError, match="train_set has images of 8×8, the model's img_size is 8×12"):
        fit(model, data, None, CONFIG, task=task, progress=False)
    with pytest.raises(ValueError, match="img_size 9 is not divisible by patch_size 2; use 8 or 10"):
        encoder(img_size=9)
    with pytest.raises(ValueError, match="trains a Pretrainer, and model is a VisionTransformer"):
        fit(encoder(), images(), None, CONFIG, task=task, progress=False)
    beit, task = make_objective("beit", encoder(), **SMALL["beit"])
    with pytest.raises(ValueError, match="has no tokenizer"):
        fit(beit, images(), None, CONFIG, task=task, progress=False)
    other, _ = small("tokenizer", vocab_size=5)
    with pytest.raises(ValueError, match="vocab_size is 9, and the tokenizer has 5 codes"):
        beit.adopt_tokenizer(other)


def test_any_model_learns_by_views():
    for name in ("moco", "lejepa"):
        model, task = make_objective(name, swin(), **SMALL[name] | ({"local_views": 0} if name == "lejepa" else {}))
        data = images()
        data.images = data.images[..., :8]
        history = fit(model, data, None, replace(CONFIG, max_steps=2), task=task, progress=False)
        assert math.isfinite(history[-1]["train_loss"])


# ------------------------------------------------------------------------------------------------- the command line

MODEL = "--model vit_tiny --model-args img_size=28,patch_size=7,embed_dim=16,depth=1,num_heads=2"
RUN = f"{MODEL} --data fashion_mnist_subset --max-steps 2 --batch-size 32 --quiet --device cpu".split()
FLAGS = {
    "mae": "--decoder-dim 8 --decoder-depth 1 --decoder-heads 2 --mask-ratio 0.5",
    "moco": "--hidden-dim 8 --out-dim 4 --temperature 0.3",
    "lejepa": "--hidden-dim 8 --out-dim 4 --directions 4 --sigreg 0.1",
    "beit": "--vocab-size 8 --code-dim 2 --tokenizer-dim 4 --tokenizer-depth 0 --tokenizer-epochs 1 --min-block 2",
}


def test_a_decoder_heavier_than_its_encoder_is_named(capsys):
    notices.say_once.cache_clear()
    make_objective("mae", encoder(), decoder_dim=8, decoder_depth=1, decoder_heads=2)
    assert not capsys.readouterr().err
    make_objective("mae", encoder())
    assert "decoder_dim, decoder_depth and decoder_heads make it lighter" in capsys.readouterr().err


@pytest.mark.parametrize("name", FLAGS)
def test_the_command_line_pretrains_evaluates_and_fine_tunes(name, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main([*RUN, "--objective", name, *FLAGS[name].split(), "--out-dir", out]) == 0, capsys.readouterr().err
    file = f"{out}/final.safetensors"
    kept = read_metadata(file)
    assert (kept["task"], kept["model"], kept["model_args"]["num_classes"]) == (name, "vit_tiny", 0)
    assert create_model(f"{out}/pretrainer.safetensors").name == f"{name}_pretrainer"
    encoder = create_model(file)
    assert encoder(torch.zeros(2, 1, 28, 28)).shape == (2, 16)
    assert create_model(file, num_classes=10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    again = load_weights(create_model("vit_tiny", **kept["model_args"]), file)
    assert torch.equal(weights(again), weights(encoder))
    assert main([*RUN[4:], "--weights", file, "--out-dir", f"{out}-tuned"]) == 0  # the file says which model it is of
    assert read_metadata(f"{out}-tuned/final.safetensors")["model_args"] == {**kept["model_args"], "num_classes": 10}
    capsys.readouterr()
    assert vitcourse_main(["predict", file, str(tmp_path)]) == 1
    assert main([*RUN, "--objective", name, *FLAGS[name].split(), "--out-dir", out]) == 1
    assert "already has a run; continue it with --resume" in capsys.readouterr().err
    more = RUN[: RUN.index("--max-steps")] + RUN[RUN.index("--max-steps") + 2 :]
    assert (
        main([*more, "--max-steps", "2", "--objective", name, *FLAGS[name].split(), "--out-dir", out, "--resume"]) == 0
    )


def test_evaluate_asks_what_an_encoder_has_learnt(tmp_path, capsys, monkeypatch):
    from vitcourse.commands import pretraining as program

    monkeypatch.setattr(program, "open_split", lambda options, split: few(split))
    file = tmp_path / "encoder.safetensors"
    save_weights(
        create_model("vit_tiny", img_size=28, patch_size=7, in_chans=1, num_classes=0, depth=1), file, task="mae"
    )
    assert vitcourse_main(["evaluate", str(file), "--data", "fashion_mnist_subset", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "20 nearest neighbours" in text and "ridge regression" in text and "effective rank" in text
    whole, _ = make_objective("mae", create_model(file), decoder_dim=8, decoder_depth=1, decoder_heads=2)
    save_weights(whole, tmp_path / "pretrainer.safetensors")  # with its decoder: the same encoder is asked
    command = [
        "evaluate",
        str(tmp_path / "pretrainer.safetensors"),
        "--data",
        "fashion_mnist_subset",
        "--device",
        "cpu",
    ]
    assert vitcourse_main(command) == 0
    assert capsys.readouterr().out.splitlines()[1:] == text.splitlines()[1:]
    figure = tmp_path / "a.png"
    assert vitcourse_main(["evaluate", str(file), "--data", "fashion_mnist_subset", "--figure", str(figure)]) == 0
    assert figure.exists()
    capsys.readouterr()
    assert vitcourse_main(["evaluate", str(file), "--data", "fashion_mnist_subset", "--split", "train"]) == 1
    assert "--split train holds the examples" in capsys.readouterr().err
    picture = Path(__file__).parent.parent / "data" / "photos" / "cat.png"
    assert vitcourse_main(["predict", str(file), str(picture)]) == 1
    assert "fine-tune them first" in capsys.readouterr().err


def few(split: str):
    whole = open_dataset("fashion_mnist_subset", split)
    return whole.take(range(0, 200))


def test_options_of_each_objective_are_flags_of_their_own(capsys):
    for name, flag in (("mae", "--mask-ratio"), ("moco", "--temperature"), ("lejepa", "--sigreg")):
        with pytest.raises(SystemExit):
            main(["--objective", name, "--help"])
        assert flag in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*RUN, "--objective", "moco", "--mask-ratio", "0.5"])
    assert "--mask-ratio" in capsys.readouterr().err
    for objective in OBJECTIVES:
        assert all(f.metadata["help"] for f in option_fields(objective))


def test_a_recipe_of_one_objective_may_begin_another(tmp_path, capsys):
    recipe = tmp_path / "mae.toml"
    recipe.write_text('objective = "mae"\n[objective_args]\nmask_ratio = 0.5\ndecoder_dim = 8\n', encoding="utf-8")
    _, _, found = parse([*RUN, "--recipe", str(recipe)])
    assert args_of(found, "objective", "mae") == {"mask_ratio": 0.5, "decoder_dim": 8}
    with pytest.raises(SystemExit):
        main([*RUN, "--recipe", str(recipe), "--help"])
    assert "(0.5)" in capsys.readouterr().out
    options, _, found = parse([*RUN, "--recipe", str(recipe), "--objective", "moco", "--hidden-dim", "12"])
    model, task = prepare(options, found, encoder(), images(), CONFIG, str(tmp_path))
    assert task.name == "moco" and task.options.hidden_dim == 12


@pytest.mark.parametrize("name", SMALL)
def test_all_that_was_trained_survives_a_file(name, tmp_path):
    model, task = small(name)
    fit(model, images(), None, replace(CONFIG, max_steps=2), task=task, progress=False)
    save_weights(model, tmp_path / "whole.safetensors")
    again = create_model(tmp_path / "whole.safetensors")
    assert type(again) is type(model) and again.preprocess == model.preprocess
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    if name == "mae":
        pixels, noise = torch.rand(2, 3, 8, 12), torch.rand(2, 24)
        assert torch.equal(again.eval().reconstruct(pixels, noise)[0], model.reconstruct(pixels, noise)[0])


def test_a_trained_tokenizer_is_used_again(tmp_path):
    beit, task = make_objective("beit", encoder(), **SMALL["beit"], tokenizer_epochs=2)
    config = replace(CONFIG, epochs=1)
    provide_tokenizer(beit, task.options, images(), config, tmp_path)
    file = tmp_path / "final.safetensors"
    again = load_tokenizer(file, beit.encoder)
    assert torch.equal(weights(again), weights(beit.tokenizer))
    other, task = make_objective("beit", encoder(), **SMALL["beit"], tokenizer=str(file))
    provide_tokenizer(other, task.options, images(), config)
    assert torch.equal(weights(other.tokenizer), weights(beit.tokenizer))
    with pytest.raises(ValueError, match="patch_size"):
        load_tokenizer(file, encoder(patch_size=4))
    save_weights(encoder(), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match="holds a VisionTransformer"):
        load_tokenizer(tmp_path / "vit.safetensors", beit.encoder)


def test_a_tokenizer_reads_the_pixels_that_it_has_learnt_from():
    """Codes of images of another mean or std would be other codes, and nobody would notice."""
    model, task = small("beit")
    assert model.tokenizer.preprocess == model.encoder.preprocess
    model.tokenizer.preprocess = replace(model.encoder.preprocess, std=(0.2,) * 3)
    with pytest.raises(ValueError, match=r"tokenizer was trained on images of mean .*\(or another std\)"):
        fit(model, images(), None, CONFIG, task=task, progress=False)
    plain = encoder()
    plain.preprocess = None  # then the data set's mean and std count, for both
    assert tokenizer_for(plain, TokenizerOptions()).preprocess is None


def test_a_tokenizer_can_be_trained_alone():
    tokenizer = VQTokenizer(patch_size=2, in_chans=3, vocab_size=9, code_dim=3, embed_dim=8, depth=1)
    before = weights(tokenizer).clone()
    fit(tokenizer, images(), None, replace(CONFIG, max_steps=2), task=Tokenization(), progress=False)
    assert not torch.equal(before, weights(tokenizer))


def test_codes_are_looked_up_in_full_precision():
    torch.manual_seed(0)
    z, codes = torch.randn(500, 32), torch.randn(256, 32)
    expected = torch.cdist(z.double(), codes.double()).argmin(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_code(z, codes), expected)


def test_recipes_of_objectives_can_be_built():
    found = {}
    for name in list_recipes():
        recipe = load_recipe(name)
        if "objective" not in recipe:
            continue
        encoder = create_model(recipe["model"], num_classes=0, **recipe["model_args"])
        make_objective(recipe["objective"], encoder, **recipe.get("objective_args", {}))
        TrainConfig(**recipe["train"])
        found[recipe["objective"]] = sum(p.numel() for p in encoder.parameters())
    assert found.keys() == OBJECTIVES.keys()
    assert max(found.values()) <= 1_000_000 and len(set(found.values())) == 1, "the same backbone for all"
