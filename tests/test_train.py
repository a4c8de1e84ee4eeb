"""The training engine: its parts against their definitions, whole runs against each other, and every error."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from vitcourse import create_model, load_weights
from vitcourse.data import ImageDataset, open_dataset, subset
from vitcourse.inference import evaluating, normalise
from vitcourse.notices import say_once
from vitcourse.train import (
    Ema,
    TrainConfig,
    TrainingError,
    engine,
    evaluate,
    fit,
    learning_rate,
    list_recipes,
    load_recipe,
    main,
    param_groups,
)
from vitcourse.train import augment as aug
from vitcourse.train.batches import Plan, Share, even_slices
from vitcourse.train.optim import make_optimizer, set_learning_rate
from vitcourse.train.record import write_atomically
from vitcourse.train.runtime import resolve_precision
from vitcourse.vit import VisionTransformer
from vitcourse.weights import read_metadata

sys.path.insert(0, str(Path(__file__).parent))
from _tasks import COUNTED, Nearness, Points, regressor
from _train_worker import DOUBLE, double_run

WORKER = Path(__file__).with_name("_train_worker.py")
# Processes of their own find this clone, installed or not.
SEARCH_PATH = os.pathsep.join(filter(None, (str(WORKER.parents[1]), os.environ.get("PYTHONPATH"))))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(n: int = 40, size: int = 8, classes: int = 5, seed: int = 0) -> ImageDataset:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=random)
    labels = (torch.arange(n) % classes).tolist()
    return ImageDataset(images, labels, [f"c{i}" for i in range(classes)], mean=(0.5,) * 3, std=(0.25,) * 3)


def tiny(num_classes: int = 5, **args) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**sizes, "num_classes": num_classes, **args})


def test_a_finished_bar_is_a_line_of_text(capsys):
    """In a notebook, too: a widget is gone when the notebook is opened again."""
    fit(tiny(), pictures(), None, TrainConfig(max_steps=2, batch_size=8))
    assert "100%" in capsys.readouterr().err.splitlines()[-1]
    assert engine.tqdm.__module__ == "tqdm.std"


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(config: TrainConfig, dataset: Dataset | None = None, **options) -> torch.Tensor:
    model = tiny(drop_path_rate=0.2, drop_rate=0.1)
    fit(model, dataset or pictures(), None, config, progress=False, **options)
    return weights(model)


# ------------------------------------------------------------------------------------------------ optimizer, schedule


def test_decay_is_for_matrices_only():
    model = tiny(init_values=1e-4, reg_tokens=2)
    decayed, others = param_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    assert all(p.ndim >= 2 for p in decayed["params"])
    exempt = {names[id(p)] for p in others["params"]}
    assert {"pos_embed", "cls_token", "reg_token", "norm.weight", "head.bias", "blocks.0.ls1.gamma"} <= exempt
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_decay_obeys_the_model_and_skips_frozen_parameters():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model.no_weight_decay = lambda: {"b.weight"}
    model["c"].requires_grad_(False)
    decayed, others = param_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model["a"].weight)]
    assert {id(p) for p in others["params"]} == {id(p) for p in (model["a"].bias, *model["b"].parameters())}


def test_schedule_at_known_steps():
    config = TrainConfig(lr=1.0, min_lr=0.1, warmup=0.1)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate(0, 101, replace(config, warmup=0.0)) == 1.0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_is_the_optimizers(name):
    """One step, redone by hand with the peer's optimizer, decay groups and clipping."""
    model, dataset, _ = double_run()
    other = double_run()[0]
    config = TrainConfig(max_steps=1, batch_size=37, optimizer=name, lr=0.01, warmup=0.0, clip_grad=0.5)
    fit(model, dataset, None, config, progress=False)

    peer = {"adamw": torch.optim.AdamW, "sgd": partial(timm.optim.SGDW, momentum=0.9)}[name]
    optimizer = peer(param_groups(other, 0.05), lr=0.01)
    F.cross_entropy(other(dataset.images), torch.tensor(dataset.targets), label_smoothing=0.1).backward()
    assert nn.utils.clip_grad_norm_(other.parameters(), 0.5) > 0.5
    optimizer.step()
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_decays_beside_the_gradient(momentum):
    """Six steps at a changing rate against Loshchilov and Hutter 2019, algorithm 1; each group has its own settings.

    The momentum buffer is that of the gradients alone.
    """
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 2, dtype=torch.float64)) for _ in range(3)]
    decays, scales = (0.5, 0.0, 0.2), (1.0, 1.0, 0.1)
    groups = [{"params": [p], "weight_decay": 0.0} for p in params]
    for group, decay, scale in zip(groups, decays, scales, strict=True):
        group |= {"weight_decay": decay, "lr_scale": scale}
    optimizer = make_optimizer(groups, TrainConfig(optimizer="sgd", momentum=momentum, lr=1.0))
    theta, m = [p.detach().clone() for p in params], [0.0] * 3
    for lr in (0.1, 0.3, 0.2, 0.1, 0.05, 0.01):
        set_learning_rate(optimizer, lr)
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            m[i] = momentum * m[i] + p.grad
            theta[i] = theta[i] - lr * scales[i] * m[i] - lr * scales[i] * decays[i] * theta[i]
        optimizer.step()
    for i, p in enumerate(params):
        torch.testing.assert_close(p.detach(), theta[i], rtol=1e-12, atol=1e-12)
        if momentum:
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], m[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_means_the_same_for_both_optimizers(name):
    """Where the gradient is zero, a step shrinks by lr · weight_decay, and so does the next; the state stays empty.

    A group that names no decay has the config's.
    """
    decayed, exempt, unused = (nn.Parameter(torch.full((2, 2), 4.0)) for _ in range(3))
    groups = [{"params": [decayed, unused]}, {"params": [exempt], "weight_decay": 0.0}]
    optimizer = make_optimizer(groups, TrainConfig(optimizer=name, lr=0.1, weight_decay=0.5))
    for step in (1, 2):
        decayed.grad, exempt.grad = torch.zeros(2, 2), torch.zeros(2, 2)
        optimizer.step()
        torch.testing.assert_close(decayed.detach(), torch.full((2, 2), 4.0 * 0.95**step))
    assert torch.equal(exempt.detach(), torch.full((2, 2), 4.0))
    assert torch.equal(unused.detach(), torch.full((2, 2), 4.0)), "no gradient, no step"
    assert not any(
        optimizer.state[decayed][key].any() for key in ("momentum_buffer", "exp_avg") if key in optimizer.state[decayed]
    )


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_that_overflows_changes_nothing(name):
    """fp16's scaler leaves such a step out, decay included."""
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer([{"params": [p]}], TrainConfig(optimizer=name, lr=0.1, weight_decay=0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, stays in ((math.inf, True), (1.0, False)):
        scaler.scale((factor * p).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p.detach(), torch.ones(2, 2)) == stays
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_interrupted_run_has_the_weights_of_a_whole_one(name, tmp_path):
    config = TrainConfig(max_steps=7, batch_size=8, optimizer=name, lr=0.02, weight_decay=0.5, checkpoint_every=1)
    whole = trained(config)

    class Interrupt(Exception):
        pass

    calls = iter(range(100))

    def loss(net, images, labels):
        if next(calls) == 4:
            raise Interrupt
        return F.cross_entropy(net(images), labels, label_smoothing=0.1)

    with pytest.raises(Interrupt):
        trained(config, out_dir=tmp_path, loss_fn=loss)
    assert torch.equal(trained(config, out_dir=tmp_path, resume=True), whole)


def test_lr_scale_of_a_group():
    model = tiny()
    groups = [{"params": list(model.blocks.parameters()), "lr_scale": 0.0}, {"params": list(model.head.parameters())}]
    before, head = weights(model.blocks).clone(), weights(model.head).clone()
    fit(model, pictures(), None, TrainConfig(max_steps=2, batch_size=8), groups=groups, progress=False)
    assert torch.equal(weights(model.blocks), before)
    assert not torch.equal(weights(model.head), head)


def test_ema_formula():
    model = nn.Linear(3, 2)
    ema, mean = Ema(model, decay=0.5), weights(model).clone()
    for step in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weights(model)
        torch.testing.assert_close(weights(ema.model), mean, rtol=1e-6, atol=1e-6)
    assert not ema.model.weight.requires_grad


def test_ema_weights_are_those_evaluated_and_kept(tmp_path):
    model, dataset = tiny(), pictures()
    config = TrainConfig(max_steps=6, batch_size=8, lr=1e-2, ema=0.9)
    row = fit(model, dataset, dataset, config, out_dir=tmp_path, progress=False)[-1]
    assert evaluate(model, dataset)["val_loss"] == pytest.approx(row["val_loss"], rel=1e-5)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state["ema"].items())
    assert not torch.equal(state["model"]["head.weight"], state["ema"]["head.weight"])


def test_precision_by_device(monkeypatch):
    gpu = torch.device("cuda")
    for capability, name in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert resolve_precision("auto", gpu) == name
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("fp32", gpu) == "fp32"


def test_bf16_on_request_is_near_fp32():
    config = TrainConfig(max_steps=5, batch_size=8, warmup=0.0)
    full, half = (fit(tiny(), pictures(), None, replace(config, precision=p), progress=False) for p in ("fp32", "bf16"))
    assert full[0]["train_loss"] != half[0]["train_loss"]
    assert half[0]["train_loss"] == pytest.approx(full[0]["train_loss"], rel=0.02)


# ------------------------------------------------------------------------------------------------------- augmentation


def test_hashed_numbers_are_uniform_and_independent():
    numbers = aug.uniform(4, 7, 3, torch.arange(20000))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert torch.allclose(numbers.mean(0), torch.full((4,), 0.5), atol=0.01)
    assert torch.allclose(numbers.var(0), torch.full((4,), 1 / 12), atol=0.003)
    assert (torch.corrcoef(numbers.T) - torch.eye(4)).abs().max() < 0.03
    neighbours = torch.stack([numbers[:-1, 0], numbers[1:, 0]])
    assert torch.corrcoef(neighbours)[0, 1].abs() < 0.03
    for other in (aug.uniform(4, 8, 3, torch.arange(20000)), aug.uniform(4, 7, 4, torch.arange(20000))):
        assert torch.corrcoef(torch.stack([numbers[:, 0], other[:, 0]]))[0, 1].abs() < 0.03


def test_crop_moves_and_pads_each_image():
    images = torch.arange(1, 2 * 16 + 1, dtype=torch.uint8).view(2, 1, 4, 4)
    cropped = aug.random_crop(images, 1, torch.tensor([[0.0, 0.0], [0.99, 0.5]]))
    assert torch.equal(cropped[0], F.pad(images[0], [1, 0, 1, 0])[:, :4, :4])  # the window at the top left
    assert torch.equal(cropped[1], F.pad(images[1], [0, 0, 0, 1])[:, 1:])
    assert torch.equal(aug.random_flip(images, torch.tensor([0.4, 0.6])), torch.stack([images[0].flip(-1), images[1]]))


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    config = TrainConfig(crop_padding=2, hflip=True, randaugment=2, seed=5)
    images, index = pictures(30).images, torch.randperm(30)
    whole = aug.augment(images[index], index, 3, config)
    one_by_one = torch.cat([aug.augment(images[i : i + 1], torch.tensor([i]), 3, config) for i in index.tolist()])
    assert torch.equal(whole, one_by_one)
    for other in (
        aug.augment(images[index], index, 4, config),
        aug.augment(images[index], index, 3, replace(config, seed=6)),
    ):
        assert (whole != other).flatten(1).any(1).float().mean() > 0.9


def test_randaugment_is_torchvisions():
    """Each operation and strength against torchvision's own RandAugment."""
    from torchvision.transforms import v2

    peer = v2.RandAugment()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    names = {n.replace("_", "").lower(): n for n in aug.OPERATIONS}
    assert len(names) == len(peer._AUGMENTATION_SPACE) == 14
    for name, (magnitudes, signed) in peer._AUGMENTATION_SPACE.items():
        values = magnitudes(31, 16, 16)
        for sign in (1, -1) if signed else (1,):
            value = 0.0 if values is None else float(values[9]) * sign
            expected = peer._apply_image_or_video_transform(
                images, name, value, interpolation=v2.InterpolationMode.NEAREST, fill={}
            )
            got = aug.apply_operation(images, names[name.lower()], sign * 9 / 30)
            assert (got.int() - expected.int()).abs().max() <= 1, name  # torchvision's strengths are float32


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_keeps_the_mass_of_labels_and_of_pixels(alphas):
    config = TrainConfig(mixup=alphas[0], cutmix=alphas[1])
    labels = torch.arange(11) % 5
    images = F.one_hot(labels, 5).double()[:, :, None, None].expand(11, 5, 12, 12)  # channel k shows class k
    mixed, targets = aug.Mixer(config, 5, step=1, batch_size=11)(images, labels, 0)
    assert torch.allclose(targets.sum(1), torch.ones(11).double())
    assert torch.allclose(mixed.mean(dim=(2, 3)), targets, atol=1e-6)  # a label weighs what its image covers
    assert torch.equal(targets[10], F.one_hot(labels[10], 5).double())  # the odd last one has no partner
    assert (targets.max(1).values < 0.99).sum() >= 6
    is_blend = ((mixed > 0.01) & (mixed < 0.99)).flatten(1).any(1)
    assert is_blend.any() == (alphas[0] > 0)
    if alphas[0] and alphas[1]:
        assert not is_blend[:10].all()


def test_mixing_is_the_same_in_parts():
    config, labels = TrainConfig(mixup=0.8, cutmix=1.0), torch.arange(10) % 5
    images, mixer = torch.randn(10, 3, 8, 8), aug.Mixer(config, 5, step=4, batch_size=10)
    whole = mixer(images, labels, 0)
    parts = [mixer(images[s], labels[s], s.start) for s in even_slices(0, 10, 3)]
    for a, b in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(a, torch.cat(b))
    none = aug.Mixer(replace(config, mix_prob=0.0), 5, step=4, batch_size=10)(images, labels, 0)
    assert torch.equal(none[0], images)
    with pytest.raises(ValueError, match="even"):
        mixer(images[:5], labels[:5], 3)


# ------------------------------------------------------------------------------------------------------ batches, runs


def test_an_epoch_has_each_image_once():
    plan = Plan(23, 5, drop_last=False, seed=1)
    batches = [plan.batch(step) for step in range(10)]
    assert sorted(torch.cat(batches[:5]).tolist()) == sorted(torch.cat(batches[5:]).tolist()) == list(range(23))
    assert not torch.equal(batches[0], batches[5])
    assert Plan(23, 5, drop_last=True, seed=1).steps_per_epoch == 4
    for world, accum, size in ((1, 1, 7), (2, 3, 16), (3, 2, 13), (2, 4, 5)):
        parts = [s for rank in range(world) for s in Share(rank, world, accum).slices(size)]
        assert [i for s in parts for i in range(s.start, s.stop)] == list(range(size))
        assert all(s.start % 2 == 0 for s in parts)


@pytest.mark.parametrize("accum", [2, 3, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(accum):
    """In float64, with mixing and a smaller last batch."""
    whole, train_set, _ = double_run()
    fit(whole, train_set, None, DOUBLE, progress=False)
    model, *_ = double_run()
    start = weights(model).clone()
    fit(model, train_set, None, replace(DOUBLE, accum=accum), progress=False)
    assert (weights(whole) - start).abs().max() > 1e-2
    torch.testing.assert_close(weights(model), weights(whole), rtol=1e-9, atol=1e-10)


def test_same_weights_from_memory_and_from_workers():
    config = TrainConfig(epochs=2, batch_size=8, crop_padding=1, hflip=True, mixup=0.5)
    assert torch.equal(trained(config), trained(replace(config, loader="workers", num_workers=2)))


def test_seed_and_global_random_state():
    config = TrainConfig(max_steps=3, batch_size=8, hflip=True)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    model = tiny()
    torch.random.set_rng_state(state)
    fit(model, pictures(), None, config, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(trained(config), trained(config))
    assert not torch.equal(trained(config), trained(replace(config, seed=1)))


def test_random_transforms_of_a_data_set_are_seeded():
    from torchvision.transforms import v2

    def noisy():
        dataset = pictures()
        dataset.transform = v2.RandomResizedCrop(8)
        return dataset

    config = TrainConfig(epochs=2, batch_size=8)
    first = trained(config, noisy())
    assert torch.equal(first, trained(replace(config, num_workers=2), noisy()))
    assert not torch.equal(first, trained(replace(config, seed=1), noisy()))


def test_evaluation_counts_each_image_once():
    model, dataset = tiny(), pictures(23)
    x, y = normalise(dataset.images, (torch.tensor(0.5), torch.tensor(0.25))), torch.tensor(dataset.targets)
    with torch.no_grad():
        logits = model.eval()(x)
    for config in (TrainConfig(), TrainConfig(eval_batch_size=5), TrainConfig(loader="workers", eval_batch_size=4)):
        results = evaluate(model, dataset, config)
        assert results["val_accuracy"] == (logits.argmax(1) == y).float().mean().item() or math.isclose(
            results["val_accuracy"], (logits.argmax(1) == y).double().mean().item()
        )
        assert results["val_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)


def test_evaluation_leaves_every_part_in_its_mode():
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 10)), []
    model[1].eval()
    model[3].register_forward_hook(lambda *_: seen.append([part.training for part in model]))
    evaluate(model, pictures())
    assert model.training and [part.training for part in model] == [True, False, True, True]
    assert seen and not any(any(modes) for modes in seen)
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training and [part.training for part in model] == [True, False, True, True]


def test_history_and_metrics_file(tmp_path):
    config = TrainConfig(epochs=3, batch_size=8, eval_every=2, tensorboard=True)
    rows = []
    history = fit(
        tiny(), pictures(), pictures(seed=1), config, out_dir=tmp_path, on_epoch_end=rows.append, progress=False
    )
    assert [r["epoch"] for r in history] == [1, 2, 3] and [r["step"] for r in history] == [5, 10, 15]
    assert [r["val_accuracy"] is None for r in history] == [True, False, False]
    assert rows == history and len(history.column("val_loss")) == 2
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(history[0]) and float(table[2]["train_loss"]) == history[2]["train_loss"]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_learning_on_real_images():
    few = subset(open_dataset("fashion_mnist_subset"), 500)
    model = tiny(10, img_size=28, patch_size=7, in_chans=1, embed_dim=32)
    config = TrainConfig(epochs=12, batch_size=50, lr=3e-3, label_smoothing=0.0)
    history = fit(model, few, few, config, progress=False)
    assert history[-1]["val_loss"] < 0.5 * math.log(10)
    assert history[-1]["val_accuracy"] > 0.65


def test_own_loss_and_evaluation(tmp_path):
    """What pre-training needs: no labels looked at, other figures in the records."""
    dataset = pictures()
    model = nn.Conv2d(3, 3, 1)
    history = fit(
        model,
        dataset,
        dataset,
        TrainConfig(epochs=4, batch_size=8, lr=0.05),
        loss_fn=lambda net, images, _: F.mse_loss(net(images), images),
        eval_fn=lambda net, data: {"bias": float(net.bias.detach().abs().max())},
        out_dir=tmp_path,
        progress=False,
    )
    assert history[-1]["train_loss"] < history[0]["train_loss"] and history[-1]["bias"] >= 0
    assert "bias" in (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()[0]


def test_options_reach_the_model(monkeypatch):
    import functools

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = TrainConfig(max_steps=2, batch_size=8)
    plain = fit(tiny(depth=1), pictures(), None, config, progress=False)[-1]["train_loss"]
    for option in ("compile", "grad_checkpointing", "channels_last", "deterministic"):
        history = fit(tiny(depth=1), pictures(), None, replace(config, **{option: True}), progress=False)
        assert history[-1]["train_loss"] == pytest.approx(plain, rel=1e-5), option
    assert not torch.are_deterministic_algorithms_enabled()


# -------------------------------------------------------------------------------------------------- killed, continued


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An image folder of pictures of several sizes."""
    path = tmp_path_factory.mktemp("pictures")
    random = torch.Generator().manual_seed(0)
    for split, count in (("train", 11), ("test", 5)):
        for label, name in enumerate(("cat", "dog")):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                h, w = torch.randint(12, 24, (2,), generator=random).tolist()
                pixels = torch.randint(0, 128, (h, w, 3), dtype=torch.uint8, generator=random) + 100 * label
                Image.fromarray(pixels.numpy()).save(path / split / name / f"{i}.png")
    return path


def command(folder: Path, out: Path, *more: str) -> list[str]:
    sizes = "img_size=8,patch_size=4,embed_dim=16,depth=2,num_heads=2,drop_path_rate=0.2"
    run = (
        "--epochs 3 --batch-size 6 --lr 1e-2 --crop-scale 0.3 --hflip --randaugment 2 --mixup 0.8 --cutmix 1 --ema 0.9"
    )
    start = ["--model", "vit_tiny", "--model-args", sizes, "--data", f"imagefolder:{folder}", "--out-dir", str(out)]
    return [*start, *run.split(), "--threads", "1", "--checkpoint-every", "2", "--quiet", *more]


def without_times(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8") as file:
        table = list(csv.reader(file))
    return [row[: table[0].index("seconds")] for row in table]


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(folder, out, "--num-workers", "1")) == 0
    return out


def test_a_killed_run_continues_to_the_same_bits(folder, uninterrupted, tmp_path):
    """3 epochs of 3 steps, a checkpoint every 2: killed in mid-epoch, continued with another number of workers."""
    out = tmp_path / "killed"
    program = [sys.executable, str(WORKER), "killed", "5", *command(folder, out, "--num-workers", "2")]
    environment = {**os.environ, "PYTHONPATH": SEARCH_PATH}
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == -9, done.stderr
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 4
    assert not (out / "final.safetensors").exists()

    assert main(command(folder, out, "--num-workers", "0", "--resume")) == 0
    for part in ("model", "ema", "optimizer"):
        a, b = (torch.load(p / "last.pt", weights_only=True)[part] for p in (out, uninterrupted))
        assert _flat(a) == _flat(b), part
    assert without_times(out / "metrics.csv") == without_times(uninterrupted / "metrics.csv")
    assert [row[0] for row in without_times(out / "metrics.csv")] == ["epoch", "1", "2", "3"]
    a, b = ((p / "final.safetensors").read_bytes() for p in (out, uninterrupted))
    assert a[-2000:] == b[-2000:]  # the tensors; the headers tell of different folders


def _flat(state) -> list:
    if isinstance(state, torch.Tensor):
        return state.flatten().tolist()
    items = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else [state]
    return [
        x for item in items for x in (_flat(item) if isinstance(item, (dict, list, tuple, torch.Tensor)) else [item])
    ]


def test_command_line_end_to_end(folder, uninterrupted, capsys):
    path = uninterrupted / "final.safetensors"
    facts = read_metadata(path)
    assert facts["classes"] == ["cat", "dog"] and facts["seed"] == 0
    assert facts["command"].startswith("python -m vitcourse.train --model vit_tiny")
    model = create_model(path)
    assert model.preprocess.img_size == 8 and len(model.preprocess.mean) == 3
    load_weights(create_model("vit_tiny", **facts["model_args"]), path)
    assert (uninterrupted / "best.safetensors").exists()
    assert json.loads((uninterrupted / "config.json").read_text(encoding="utf-8"))["config"]["epochs"] == 3

    before = path.read_bytes()
    assert main(command(folder, uninterrupted)) == 1
    assert "already has a run" in capsys.readouterr().err
    assert main(command(folder, uninterrupted, "--resume", "--lr", "0.02", "--model-args", "img_size=16")) == 1
    message = capsys.readouterr().err
    assert "lr: 0.01 then, 0.02 now" in message and "model_args" in message and "Traceback" not in message
    assert path.read_bytes() == before


def test_files_can_be_held_in_memory(folder, tmp_path, capsys):
    runs = [tmp_path / loader for loader in ("memory", "workers")]
    for out in runs:
        assert main(command(folder, out, "--loader", out.name, "--crop-scale", "1", "--max-steps", "4")) == 0
    assert without_times(runs[0] / "metrics.csv") == without_times(runs[1] / "metrics.csv")
    assert main(command(folder, tmp_path / "other", "--loader", "memory")) == 1
    assert "use --loader workers" in capsys.readouterr().err


def test_a_write_that_is_cut_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    write_atomically(path, lambda f: torch.save({"step": 1}, f))

    def cut(file):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, cut)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_damaged_checkpoint_is_named(tmp_path):
    config = TrainConfig(max_steps=2, batch_size=8)
    fit(tiny(), pictures(), None, config, out_dir=tmp_path, progress=False)
    (tmp_path / "last.pt").write_bytes(b"rubbish")
    with pytest.raises(TrainingError, match=r"last\.pt cannot be read"):
        fit(tiny(), pictures(), None, config, out_dir=tmp_path, resume=True, progress=False)


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(tmp_path, capsys):
    config = TrainConfig(max_steps=2, batch_size=8)
    with pytest.raises(RuntimeError, match="early"):
        trained(config, out_dir=tmp_path, loss_fn=_fails_early)
    assert torch.equal(trained(config, out_dir=tmp_path, resume=True), trained(config))
    assert "no checkpoint yet" in capsys.readouterr().err


def _fails_early(model, images, labels):
    raise RuntimeError("early")


# --------------------------------------------------------------------------------------------------- many processes


def test_two_processes_do_what_one_does(tmp_path):
    """torchrun with two CPU processes against this one: float64 weights, and every test image counted once."""
    out = tmp_path / "out.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": SEARCH_PATH, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = [*launch, str(WORKER), "distributed", str(out)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(out, weights_only=True)

    model, train_set, val_set = double_run()
    history = fit(model, train_set, val_set, DOUBLE, progress=False)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(theirs["model"][name], value, rtol=1e-9, atol=1e-10)
    for name, rel in (("train_loss", 1e-6), ("val_loss", 1e-6), ("val_accuracy", 1e-7)):
        assert [r[name] for r in theirs["history"]] == pytest.approx([r[name] for r in history], rel=rel)

    model = regressor()  # and where what is counted differs between samples
    history = fit(model, Points(), Points(11), COUNTED, task=Nearness(), progress=False)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(theirs["counted"][name], value, rtol=1e-9, atol=1e-10)
    for name in ("train_loss", "grad_norm", "val_loss", "furthest"):
        assert [r[name] for r in theirs["counts"]] == pytest.approx([r[name] for r in history], rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    steps = []

    def loss_fn(model, images, labels):
        steps.append(0)
        return F.cross_entropy(model(images), labels) * (math.nan if len(steps) == 8 else 1)

    config = TrainConfig(epochs=3, batch_size=8, checkpoint_every=3)
    with pytest.raises(TrainingError, match=r"loss is not finite at step 7 \(lr .*lower --lr .*last\.pt"):
        fit(tiny(), pictures(), None, config, loss_fn=loss_fn, out_dir=tmp_path, progress=False)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["model"].values())


def test_bad_gradients_never_reach_a_checkpoint(tmp_path):
    """A finite loss with an infinite gradient spoils the weights in that very step."""

    def loss_fn(model, images, labels):
        return F.cross_entropy(model(images), labels) + _spike(model)

    with pytest.raises(TrainingError, match="gradient is not finite at step 0"):
        fit(tiny(), pictures(), None, TrainConfig(batch_size=8, checkpoint_every=1), loss_fn=loss_fn, out_dir=tmp_path)
    assert not (tmp_path / "last.pt").exists()


def _spike(model):
    return (model.head.bias * 0).abs().sum().sqrt()  # 0, with gradient 0 · ∞


def test_nan_pixels_are_named():
    dataset = pictures()
    floats = dataset.images.float() / 255
    bad = ImageDataset(floats, dataset.targets, dataset.classes, mean=(0.5,), std=(0.5,))
    bad.images[7, 0, 0, 0] = math.nan
    with pytest.raises(TrainingError, match="images with NaN"):
        fit(tiny(), bad, None, TrainConfig(batch_size=8, epochs=1), progress=False)


class _Listed(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize(
    ("model", "dataset", "config", "message"),
    [
        (tiny, lambda: _Listed([]), {}, "train_set is empty"),
        (tiny, pictures, {"batch_size": 41}, "40 images, fewer than batch_size 41; use --batch-size 40"),
        (lambda: tiny(4), pictures, {}, "num_classes is 4 but train_set has 5 classes; .*num_classes=5"),
        (tiny, lambda: pictures(size=12), {}, "12×12, the model's img_size is 8×8"),
        (lambda: tiny(in_chans=1), pictures, {}, "3-channel images, the model's in_chans is 1"),
        (tiny, lambda: _Listed([(torch.zeros(3, 8, 8), 5)] * 8), {}, "label 5 of .* out of range"),
        (tiny, lambda: _Listed([(torch.zeros(3, 8, 8), -1)] * 8), {}, "label -1 of .* out of range"),
        (tiny, lambda: _Listed([(torch.zeros(3, 8, 8) / 0, 1)] * 8), {}, "NaN or infinite"),
        (tiny, lambda: _Listed([(Image.new("RGB", (8, 8)), 1)] * 8), {}, r"must be tensors \(C, H, W\), got Image"),
        (tiny, lambda: _Listed([(torch.zeros(3, 8, 8, dtype=torch.uint8), 1)] * 8), {}, "need mean and std"),
        (tiny, lambda: _Listed([(torch.zeros(3, 8, 8), 1)] * 8), {"loader": "memory"}, "loader 'memory' needs"),
        (lambda: tiny().requires_grad_(False), pictures, {}, "no trainable parameter"),
        (lambda: nn.Conv2d(3, 5, 8), pictures, {}, r"output has shape \(8, 5, 1, 1\)"),
        (lambda: nn.Conv2d(3, 5, 8), pictures, {"grad_checkpointing": True}, "no set_grad_checkpointing"),
        (tiny, pictures, {"device": "cuda:7" if not torch.cuda.is_available() else "xla"}, "not available|unknown"),
    ],
)
def test_what_does_not_fit_is_said(model, dataset, config, message):
    with pytest.raises(ValueError, match=message):
        fit(model(), dataset(), None, TrainConfig(**{"batch_size": 8, "max_steps": 1, **config}), progress=False)


def test_val_set_is_checked_before_training():
    with pytest.raises(ValueError, match="val_set has 4 classes|val_set"):
        fit(tiny(), pictures(), pictures(classes=4), TrainConfig(batch_size=8), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamww"}, "did you mean 'adamw'"),
        ({"precision": "fp8"}, "did you mean 'fp"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"label_smoothing": 1.5}, "between 0 and 1, got 1.5"),
        ({"lr": 1e-6}, "min_lr 1e-05 is above lr 1e-06"),
        ({"lr": math.nan}, "lr must be"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_gives_advice(error):
    def loss_fn(model, images, labels):
        raise error

    with pytest.raises(TrainingError, match=r"--batch-size 8 --accum 2; use --accum 4"):
        fit(tiny(), pictures(), None, TrainConfig(batch_size=8, accum=2), loss_fn=loss_fn, progress=False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--recipe cifar10_smal", "did you mean 'cifar10_small'"),
        ("--recipe nowhere.toml", "does not exist"),
        ("--model vit_tinny --data fashion_mnist_subset", "did you mean"),
        ("--model vit_tiny --data fashion_mnits", "did you mean"),
        ("--model vit_tiny --data fashion_mnist_subset --optimizer adan", "optimizer 'adan' is unknown"),
        ("--model vit_tiny --model-args dept=2 --data fashion_mnist_subset", "did you mean 'depth'"),
        (
            "--model vit_tiny --model-args depth=x --data fashion_mnist_subset",
            "'depth' of model 'vit_tiny' must be int",
        ),
        ("--weights timm:vit_tiny_patch16_224 --data fashion_mnist_subset", "--model is missing, and --weights timm:"),
        ("--weights gone.safetensors --data fashion_mnist_subset", "weights file gone.safetensors does not exist"),
        ("--model vit_tiny --data fashion_mnist_subset --objective mae --method lora", "leave one out"),
        (
            "--model vit_tiny --model-args num_classes=7,img_size=28,patch_size=7 --data fashion_mnist_subset",
            "10 classes",
        ),
    ],
)
def test_command_line_errors_are_one_line(argv, message, capsys, tmp_path):
    assert main([*argv.split(), "--out-dir", str(tmp_path), "--quiet"]) == 1
    *notices, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert all(line.startswith("vitcourse: ") for line in notices)


def test_missing_tensorboard_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match="pip install tensorboard"):
        fit(tiny(), pictures(), None, TrainConfig(batch_size=8, tensorboard=True), out_dir=tmp_path, progress=False)


# ---------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_build(name):
    recipe = load_recipe(name)
    config = TrainConfig(**recipe["train"])
    of_data = {"num_classes": 10, "in_chans": 3 if recipe["data"] in ("cifar10", "scenes", "moving") else 1}
    of_data |= {name: value for name, value in recipe.get("data_args", {}).items() if name == "img_size"}
    model = create_model(recipe["model"], **{**of_data, **recipe["model_args"]})
    assert sum(p.numel() for p in model.parameters()) <= 10e6
    assert asdict(config)["epochs"] == recipe["train"]["epochs"]


def test_model_arguments_are_read_as_in_python_and_as_in_a_recipe(capsys):
    from vitcourse.train.arguments import parse

    def read(text):
        return parse(["--model", "vit_tiny", "--data", "cifar10", "--model-args", text])[0].model_args

    text = "img_size=32,class_token=false,no_embed_class=True,global_pool=avg"
    assert read(text) == {"img_size": 32, "class_token": False, "no_embed_class": True, "global_pool": "avg"}
    for text, expected in (
        ("depths=(2,2,6,2),img_size=(32, 64)", {"depths": (2, 2, 6, 2), "img_size": (32, 64)}),
        ("a=[1,2],b=(3,)", {"a": [1, 2], "b": (3,)}),
        ("a=((1,2),[3,(4,)]),b=()", {"a": ((1, 2), [3, (4,)]), "b": ()}),
        ("a=(true,avg,'x,y'),b=none,c=None", {"a": (True, "avg", "x,y"), "b": "none", "c": None}),
        ("a='(1,2',b=\"it's, so\"", {"a": "(1,2", "b": "it's, so"}),
        ("a={'k':(1,2)},b=-1e-3, c = 4 ,", {"a": {"k": (1, 2)}, "b": -1e-3, "c": 4}),
        ("a=timm:x/y.z,b=1x,c=a=b", {"a": "timm:x/y.z", "b": "1x", "c": "a=b"}),
        ("", {}),
    ):
        assert read(text) == expected
    for text, message in (
        ("depth", "'depth' is not KEY=VALUE"),
        ("depth=2,6", "'6' is not KEY=VALUE"),
        ("depth=", "'depth=' is not KEY=VALUE"),
        ("=2", "'=2' is not KEY=VALUE"),
        ("depth=2,depth=3", "'depth=3' gives depth a second time"),
        ("a=1,depths=(2,2", r"'depths=\(2,2' has brackets without a partner"),
        ("depths=2,2)", r"brackets without a partner"),
        ("a='b,c=2", '"a=\'b,c=2" has a quote without a partner'),
        ("a=1,depths=(2;2)", r"'depths=\(2;2\)' cannot be read; write it as in Python"),
        ("a=(f(1),2)", r"'a=\(f\(1\),2\)' cannot be read"),
    ):
        with pytest.raises(SystemExit):
            read(text)
        assert re.search(message, capsys.readouterr().err), text


def test_flags_override_the_recipe(tmp_path):
    from vitcourse.train.arguments import parse

    file = tmp_path / "mine.toml"
    file.write_text(
        'model = "vit_tiny"\ndata = "cifar10"\n[train]\nlr = 0.5\nhflip = true\nepochs = 7\n', encoding="utf-8"
    )
    options, config, _ = parse(["--recipe", str(file), "--lr", "0.25", "--no-hflip", "--max-steps", "3"])
    assert (options.model, options.data) == ("vit_tiny", "cifar10")
    assert (config.lr, config.hflip, config.epochs, config.max_steps) == (0.25, False, 7, 3)
    file.write_text("[train]\nlearning_rate = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'learning_rate' is unknown"):
        load_recipe(file)


def test_a_mean_that_nobody_measured_is_told_of(capsys):
    """A new model for grey images is built with mean and std 0.5, and these win over the data's own."""
    pixels = torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8)
    data = ImageDataset(pixels, [0, 1] * 4, "ab", mean=(0.286,), std=(0.353,))
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 2}
    config = TrainConfig(epochs=1, batch_size=8)
    say_once.cache_clear()
    model = create_model("vit_tiny", in_chans=1, **sizes)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    fit(model, data, None, config, progress=False)
    fit(model, data, None, config, progress=False)
    err = capsys.readouterr().err
    assert err.count("mean 0.5 and std 0.5, and not by the data's own 0.286 and 0.353; for a model") == 1
    assert seen[0].unique().shape[0] > 1 and seen[0].abs().max() <= 1 + 1e-6
    quiet = [
        (replace(model.preprocess, mean=data.mean, std=data.std), data),
        (model.preprocess, ImageDataset(pixels, [0, 1] * 4, "ab", mean=(0.5,), std=(0.5,))),
        (model.preprocess, [(image.float(), label) for image, label in data]),
    ]
    for preprocess, images in quiet:
        say_once.cache_clear()
        model.preprocess = preprocess
        fit(model, images, None, config, progress=False)
    say_once.cache_clear()
    fit(
        create_model("vit_tiny", **sizes),
        ImageDataset(pixels.expand(-1, 3, -1, -1), [0, 1] * 4, "ab", mean=(0.4,) * 3, std=(0.2,) * 3),
        None,
        config,
        progress=False,
    )
    assert "images are normalised" not in capsys.readouterr().err
