"""Training on CUDA: precisions, augmentation, a run that is killed, a memory that is full."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vitcourse import create_model
from vitcourse.data import ImageDataset, open_dataset, subset
from vitcourse.train import TrainConfig, TrainingError, evaluate, fit
from vitcourse.train import augment as aug
from vitcourse.train.runtime import resolve_precision
from vitcourse.vit import VisionTransformer
from vitcourse.weights import read_metadata

from .parity import relative_error

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "_train_worker.py"
CUDA = TrainConfig(device="cuda", batch_size=8)


def pictures(n: int = 40, size: int = 8, classes: int = 5) -> ImageDataset:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=random)
    labels = (torch.arange(n) % classes).tolist()
    return ImageDataset(images, labels, [f"c{i}" for i in range(classes)], mean=(0.5,) * 3, std=(0.25,) * 3)


def tiny(num_classes: int = 5, **args) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**sizes, "num_classes": num_classes, **args})


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_learning_on_real_images(precision, tmp_path):
    """Half precision learns as well, keeps its weights in float32, and says what it was."""
    few = subset(open_dataset("fashion_mnist_subset"), 500)
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny", img_size=28, patch_size=7, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=10
    )
    config = TrainConfig(epochs=12, batch_size=50, lr=3e-3, label_smoothing=0.0, precision=precision, device="cuda")
    history = fit(model, few, few, config, out_dir=tmp_path, progress=False)
    assert history[-1]["val_loss"] < 0.5 * math.log(10)
    assert history[-1]["val_accuracy"] > 0.65
    assert all(p.is_cuda and p.dtype == torch.float32 for p in model.parameters())
    native = torch.cuda.get_device_capability()[0] >= 8
    expected = {"auto": "bf16" if native else "fp16"}.get(precision, precision)
    assert read_metadata(tmp_path / "final.safetensors")["precision"] == expected
    assert resolve_precision(precision, torch.device("cuda")) == expected


def test_the_device_is_chosen():
    model = tiny()
    fit(model, pictures(), None, TrainConfig(max_steps=1, batch_size=8), progress=False)
    assert all(p.is_cuda for p in model.parameters())


def test_float32_follows_the_cpu():
    """The same steps in float32 on either device: a few hundred roundings apart."""
    config = replace(CUDA, max_steps=5, precision="fp32", hflip=True, crop_padding=1, mixup=0.8, cutmix=1.0, ema=0.9)
    here, there = tiny(), tiny()
    on_gpu = fit(there, pictures(), pictures(), config, progress=False)
    on_cpu = fit(here, pictures(), pictures(), replace(config, device="cpu"), progress=False)
    assert on_gpu[-1]["train_loss"] == pytest.approx(on_cpu[-1]["train_loss"], rel=1e-5)
    assert on_gpu[-1]["val_loss"] == pytest.approx(on_cpu[-1]["val_loss"], rel=1e-4)
    assert (weights(there) - weights(here)).abs().max() <= 1e-4


def test_float64_follows_the_cpu_to_the_last_digits():
    """Adam divides by the square root of tiny squares, which magnifies roundings: in float64 they stay small."""
    data = pictures()
    data = ImageDataset(data.images.double() / 255, data.targets, data.classes, mean=(0.5,) * 3, std=(0.25,) * 3)
    config = replace(CUDA, epochs=2, precision="fp32", hflip=True, mixup=0.8, cutmix=1.0, ema=0.9, accum=2)
    here, there = tiny().double(), tiny().double()
    fit(there, data, None, config, progress=False)
    fit(here, data, None, replace(config, device="cpu"), progress=False)
    assert (weights(tiny()) - weights(here)).abs().max() > 1e-3
    torch.testing.assert_close(weights(there), weights(here), rtol=1e-8, atol=1e-9)


def test_fp16_lowers_its_scale_where_gradients_overflow(tmp_path):
    """The loss is so large that the first scaled gradients are infinite: those steps are left out, not learned."""

    def loss_fn(model, images, labels):
        return 100 * F.cross_entropy(model(images), labels)

    model = tiny()
    config = replace(CUDA, max_steps=20, precision="fp16", warmup=0.0)
    fit(model, pictures(), None, config, loss_fn=loss_fn, out_dir=tmp_path, progress=False)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["scaler"]["scale"] < 2**16
    assert weights(model).isfinite().all()
    assert not torch.equal(weights(model), weights(tiny()))


def test_fp16_that_always_overflows_stops():
    def loss_fn(model, images, labels):
        return F.cross_entropy(model(images), labels) * 1e30

    with pytest.raises(TrainingError, match="overflow at every scale .* use --precision fp32"):
        fit(tiny(), pictures(), None, replace(CUDA, max_steps=80, precision="fp16"), loss_fn=loss_fn, progress=False)


def test_same_weights_from_memory_and_from_workers():
    config = replace(CUDA, epochs=2, crop_padding=1, hflip=True, mixup=0.5, precision="fp32")
    models = []
    for loader, workers in (("memory", 0), ("workers", 2)):
        models.append(tiny())
        fit(models[-1], pictures(), None, replace(config, loader=loader, num_workers=workers), progress=False)
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-4, atol=1e-5)


def test_options_reach_the_model():
    config = replace(CUDA, max_steps=2, precision="fp32")
    plain = fit(tiny(), pictures(), None, config, progress=False)[-1]["train_loss"]
    for option in ("compile", "grad_checkpointing", "channels_last"):
        history = fit(tiny(), pictures(), None, replace(config, **{option: True}), progress=False)
        assert history[-1]["train_loss"] == pytest.approx(plain, rel=1e-5), option


def test_the_random_state_of_the_device_is_given_back():
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    fit(tiny(drop_rate=0.1), pictures(), None, replace(CUDA, max_steps=2), progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_evaluation_is_that_of_the_cpu():
    model, dataset = tiny(), pictures()
    exact = evaluate(model, dataset)
    config = replace(CUDA, eval_batch_size=16)
    on_gpu = evaluate(model.to("cuda"), dataset, replace(config, precision="fp32"))
    assert on_gpu["val_loss"] == pytest.approx(exact["val_loss"], rel=1e-5)
    assert on_gpu["val_accuracy"] == pytest.approx(exact["val_accuracy"], abs=1 / 40)  # a tie may break either way
    assert evaluate(model, dataset, config)["val_loss"] == pytest.approx(exact["val_loss"], rel=0.02)


# -------------------------------------------------------------------------------------------------- killed, continued


def command(out: Path, *more: str) -> list[str]:
    """5 steps an epoch of real images with everything that draws random numbers, and a checkpoint every 2."""
    sizes = "img_size=28,patch_size=7,embed_dim=16,depth=2,num_heads=2,drop_path_rate=0.2,drop_rate=0.1"
    run = "--max-steps 9 --batch-size 2000 --lr 1e-2 --crop-padding 2 --hflip --randaugment 2 --mixup 0.8 --cutmix 1"
    keep = "--ema 0.9 --checkpoint-every 2 --deterministic --device cuda --quiet"
    start = ["--model", "vit_tiny", "--model-args", sizes, "--data", "fashion_mnist_subset", "--out-dir", str(out)]
    return [*start, *run.split(), *keep.split(), *more]


def launch(*program: str) -> subprocess.CompletedProcess:
    """A process that finds this clone, installed or not."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *program], capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16"])
def test_a_killed_run_continues_to_the_same_bits(precision, tmp_path):
    """Each run in a process of its own: cuBLAS reads once, at its first product, whether it has to be deterministic."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    done = launch("-m", "vitcourse.train", *command(whole, "--precision", precision))
    assert done.returncode == 0, done.stderr

    done = launch(str(WORKER), "killed", "7", *command(out, "--precision", precision))
    assert done.returncode == -9, done.stderr
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 6
    done = launch("-m", "vitcourse.train", *command(out, "--precision", precision, "--resume"))
    assert done.returncode == 0, done.stderr

    a, b = (torch.load(path / "last.pt", weights_only=True) for path in (out, whole))
    assert a["step"] == b["step"] == 9
    for part in ("model", "ema", "optimizer", "scaler"):
        assert_same_bits(a[part], b[part], part)
    assert a["scaler"] or precision != "fp16"
    for name in ("epoch", "step", "lr", "train_loss", "grad_norm", "val_loss", "val_accuracy"):
        assert [row[name] for row in a["history"]] == [row[name] for row in b["history"]], name


def assert_same_bits(a, b, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same_bits(*pair, f"{where}.{i}")
    else:
        assert a == b, where


# ------------------------------------------------------------------------------------------------------- augmentation


def test_crops_and_flips_are_those_of_the_cpu():
    config = TrainConfig(crop_padding=2, hflip=True, seed=5)
    images, index = pictures(200).images, torch.randperm(200)
    on_gpu = aug.augment(images.to("cuda"), index, 3, config)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), aug.augment(images, index, 3, config))
    assert not torch.equal(on_gpu.cpu(), images)


def test_randaugment_is_that_of_the_cpu():
    """The same operations on the same images. Devices round differently, so a pixel may be a step, or a place, off."""
    config = TrainConfig(randaugment=2, seed=5)
    images, index = open_dataset("fashion_mnist_subset").images[:256].expand(-1, 3, -1, -1), torch.arange(256)
    on_gpu = aug.augment(images.to("cuda"), index, 3, config).cpu()
    on_cpu = aug.augment(images, index, 3, config)
    changed = (on_cpu != images).flatten(1).any(1).float().mean()
    far = (on_gpu.int() - on_cpu.int()).abs() > 2
    assert changed > 0.8
    assert far.float().mean() < 0.01
    assert (far.flatten(1).float().mean(1) > 0.2).float().mean() < 0.02, "images got another operation"


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_that_of_the_cpu(alphas):
    mixer = aug.Mixer(TrainConfig(mixup=alphas[0], cutmix=alphas[1]), 5, step=4, batch_size=11)
    images, labels = torch.randn(11, 3, 12, 12), torch.arange(11) % 5
    for got, exact in zip(mixer(images.to("cuda"), labels.to("cuda"), 0), mixer(images, labels, 0), strict=True):
        assert got.is_cuda
        assert relative_error(got, exact) <= 1e-6


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_full_memory_gives_advice_and_the_next_run_works():
    def greedy(model, images, labels):
        return torch.empty(2**50, device="cuda").sum()  # four petabytes

    with pytest.raises(TrainingError, match=r"out of memory with --batch-size 8 --accum 2; use --accum 4"):
        fit(tiny(), pictures(), None, replace(CUDA, accum=2), loss_fn=greedy, progress=False)
    assert fit(tiny(), pictures(), None, replace(CUDA, max_steps=2), progress=False)[-1]["train_loss"] > 0


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    """Losses are fetched from the device only now and then; a bad one must still not reach a checkpoint."""
    steps = []

    def loss_fn(model, images, labels):
        steps.append(0)
        return F.cross_entropy(model(images), labels) * (math.nan if len(steps) == 8 else 1)

    config = replace(CUDA, epochs=3, checkpoint_every=3)
    with pytest.raises(TrainingError, match=r"loss is not finite at step 7 .*last\.pt"):
        fit(tiny(), pictures(), None, config, loss_fn=loss_fn, out_dir=tmp_path, progress=False)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 6
    assert all(v.isfinite().all() for v in state["model"].values())


def test_a_device_that_is_not_there_is_named():
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises((ValueError, RuntimeError), match="device"):
        fit(tiny(), pictures(), None, TrainConfig(device=missing, batch_size=8), progress=False)
