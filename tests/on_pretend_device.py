"""The library on a pretend accelerator. ``tests/test_devices.py`` runs this file in a process of its own, twice.

With VITCOURSE_PRETEND=mac the device has no float64.
"""

import os

import pytest

if "VITCOURSE_PRETEND" not in os.environ:  # doctests are looked for here, too, in the process of all other tests
    pytest.skip("changes PyTorch for the whole process", allow_module_level=True)

import pretend_device

os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("VITCOURSE_DEVICE", None)
MAC = os.environ.get("VITCOURSE_PRETEND") == "mac"
DEVICE = pretend_device.install(float64=not MAC)

import copy  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from _dense_tasks import SMALL as DENSE  # noqa: E402
from _dense_tasks import Shapes  # noqa: E402
from _dense_tasks import small as small_dense  # noqa: E402
from _pretraining import NAMES, small  # noqa: E402
from _pretraining import images as small_images  # noqa: E402
from _tasks import Nearness, Points, TwoViews, Views, regressor  # noqa: E402
from torch import nn  # noqa: E402

from vitcourse import course, create_model, devices  # noqa: E402
from vitcourse.course import checks, grading  # noqa: E402
from vitcourse.course.cases import Case  # noqa: E402
from vitcourse.course.running import isolated, leaves  # noqa: E402
from vitcourse.course.trial import Trial  # noqa: E402
from vitcourse.data import ImageDataset, moving  # noqa: E402
from vitcourse.efficient_attention import (  # noqa: E402
    BigBirdAttention,
    LinearAttention,
    LocalAttention,
    RandomBlockAttention,
    RandomFeatureAttention,
    TwoSoftmaxAttention,
    merge_tokens,
)
from vitcourse.finetuning import METHODS, finetune, load_adapter, merge_lora, save_adapter  # noqa: E402
from vitcourse.hardware.prune import magnitude_prune, make_permanent, prune_model  # noqa: E402
from vitcourse.hardware.quantize import SCHEMES, quantize_model  # noqa: E402
from vitcourse.train import TrainConfig, evaluate, fit  # noqa: E402
from vitcourse.video import VideoClassification  # noqa: E402
from vitcourse.vit import VisionTransformer, record_attention  # noqa: E402
from vitcourse.weights import save_weights  # noqa: E402

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def tiny(**options):
    torch.manual_seed(0)
    return VisionTransformer(**{**SIZES, **options})


def named(**options):
    """One that the registry knows, and can build again."""
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", **{**SIZES, **options})


def pictures(n=40):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return ImageDataset(images, [i % 5 for i in range(n)], list("abcde"), mean=(0.5,) * 3, std=(0.25,) * 3)


def images(n=4):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def close(got, expected):
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


def everything(model):
    return torch.cat([value.detach().cpu().float().flatten() for value in model.state_dict().values()])


CONFIG = TrainConfig(max_steps=4, batch_size=8, lr=1e-2, warmup=0.0)


# ----------------------------------------------------------------------------------------------------------- the device


def test_a_tensor_of_the_cpu_is_a_stranger():
    x = torch.ones(3, device=DEVICE)
    for meet in (
        lambda: x + torch.ones(3),
        lambda: torch.ones(3).add_(x),
        lambda: torch.stack([x, torch.ones(3)]),
        lambda: torch.ones(3)[torch.tensor([0], device=DEVICE)],
        lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="same device|device type"):
            meet()
    with pytest.raises(TypeError, match="to numpy"):
        np.asarray(x)
    with pytest.raises(TypeError, match="no float64") if MAC else nullcontext():
        x.double()
    assert (x[torch.tensor([0, 1])] + torch.tensor(1.0)).tolist() == [2, 2]


def test_the_device_is_found_and_chosen(monkeypatch, capsys):
    assert devices.resolve_device() == course.setup().device == DEVICE
    assert "on a pretend accelerator" in capsys.readouterr().err
    assert devices.has_float64(DEVICE) is not MAC
    with pytest.raises(ValueError, match=r"device 'pretend:1' is not available here; this machine has 1 of them"):
        course.setup(device="pretend:1")
    assert course.setup(device="cpu").device == devices.resolve_device() == torch.device("cpu")
    assert course.setup().device == DEVICE
    monkeypatch.setenv("VITCOURSE_DEVICE", "cpu")
    assert devices.resolve_device() == DEVICE  # the session's
    assert course.setup().device.type == "cpu"
    monkeypatch.delenv("VITCOURSE_DEVICE")
    course.setup()


def test_random_numbers_of_the_device_are_given_back():
    model = tiny(drop_path_rate=0.5).to(DEVICE)
    torch.manual_seed(3)
    expected = torch.rand(4, device=DEVICE), torch.rand(4)
    torch.manual_seed(3)
    with isolated(5):
        torch.rand(7, device=DEVICE), torch.rand(7)
    fit(model, pictures(), None, CONFIG, progress=False)
    assert torch.equal(torch.rand(4, device=DEVICE).cpu(), expected[0].cpu())
    assert torch.equal(torch.rand(4), expected[1])


# ----------------------------------------------------------------------------------------------------------- the engine


def test_a_model_is_trained_where_it_lies_or_where_the_session_is(capsys):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    fit(model, pictures(), None, CONFIG)
    assert devices.device_of(model).type == "pretend"
    assert "vitcourse: the model moves to pretend (a pretend accelerator)" in capsys.readouterr().err
    devices.use_device("cpu")
    try:
        fit(model, pictures(), None, CONFIG)
        assert devices.device_of(model).type == "pretend"  # somebody put it there
        assert "moves" not in capsys.readouterr().err
        fresh = tiny()
        fit(fresh, pictures(), None, CONFIG)
        assert devices.device_of(fresh).type == "cpu"
    finally:
        devices.use_device()
    fit(model, pictures(), None, replace(CONFIG, device="cpu"), progress=False)
    assert devices.device_of(model).type == "cpu"


def test_evaluation_goes_to_the_model_and_says_where_it_is():
    data = pictures()
    here, there = evaluate(tiny(), data), evaluate(tiny().to(DEVICE), data)
    assert there == pytest.approx(here, rel=1e-4)
    with pytest.raises(ValueError, match="the model lies on cpu, and device is 'pretend'"):
        evaluate(tiny(), data, TrainConfig(device="pretend"))


@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.9, "accum": 2},
        {"mixup": 0.8, "cutmix": 1.0, "crop_padding": 2, "hflip": True, "randaugment": 1},
        {"loader": "workers", "optimizer": "sgd", "grad_checkpointing": True, "precision": "bf16"},
    ],
    ids=["mean and accumulation", "augmentation", "loader"],
)
def test_a_run_is_the_same_as_on_the_cpu_and_goes_on_where_it_stopped(tmp_path, options):
    config, data = replace(CONFIG, checkpoint_every=1, **options), pictures()
    whole = named()
    history = fit(whole, data, data, config, out_dir=tmp_path / "whole", progress=False)
    assert devices.device_of(whole).type == "pretend"

    class Stop(Exception):
        pass

    def stop_at_the_third(model, images, labels):
        nonlocal calls
        calls += 1
        if calls > 2 * config.accum:
            raise Stop
        return nn.functional.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)

    calls, halves = 0, named()
    with pytest.raises(Stop):
        fit(halves, data, data, config, out_dir=tmp_path / "halves", loss_fn=stop_at_the_third, progress=False)
    halves = named()
    fit(halves, data, data, config, out_dir=tmp_path / "halves", resume=True, progress=False)
    assert torch.equal(everything(whole), everything(halves))
    if config.precision == "auto":  # there are no half precision products on this device
        cpu = named()
        expected = fit(cpu, data, data, replace(config, device="cpu"), progress=False)
        assert history[-1]["val_loss"] == pytest.approx(expected[-1]["val_loss"], rel=1e-2)
    again = create_model(tmp_path / "whole" / "final.safetensors")
    assert torch.equal(everything(again), everything(whole))


@pytest.mark.parametrize("kind", ["counts", "views"])
def test_other_tasks_train_there_too(kind):
    def run(device: str):
        if kind == "counts":
            model, data, task = regressor().float(), Points(), Nearness()
            data.x, data.points = data.x.float(), [points.float() for points in data.points]
        else:
            torch.manual_seed(0)
            model, data, task = nn.Linear(6, 3), Views(), TwoViews()
        accum = 1 if task.couples_batch else 2
        config = TrainConfig(epochs=2, batch_size=8, accum=accum, lr=1e-2, device=device)
        history = fit(model, data, data, config, task=task, progress=False)
        assert devices.device_of(model).type == device
        return everything(model).cpu(), history[-1]["val_loss"]

    (there, loss), (here, expected) = run("pretend"), run("cpu")
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)
    assert loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", [*DENSE, "clips"])
def test_detection_segmentation_and_clips_are_the_same_as_on_the_cpu(name):
    found = []
    for device in ("cpu", DEVICE.type):
        if name == "clips":
            torch.manual_seed(0)
            sizes = {"img_size": 16, "patch_size": 8, "num_frames": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
            model, task = create_model("timesformer_tiny", **sizes, num_classes=8), VideoClassification()
            data = [moving(split, num_frames=2, img_size=16, length=8) for split in ("train", "val")]
        else:
            denoising = {"denoising": 2} if name == "detr" else {}
            model, task = small_dense(name, torch.float32, **denoising)
            data = [Shapes(seed=seed, dtype=torch.float32) for seed in (0, 1)]
        config = replace(CONFIG, device=device, max_steps=3, batch_size=4, accum=2, ema=0.9, optimizer="sgd", lr=1e-3)
        history = fit(model, *data, config, task=task, progress=False)
        found.append((everything(model), history[-1]))
    (ours, row), (theirs, there) = found[1], found[0]
    if name != "detr":  # whose noise is drawn by each device's own generator
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-3, atol=1e-4)
        for key in task.metrics:
            assert row[key] == (there[key] and pytest.approx(there[key], rel=1e-2, abs=1e-3)), key


@pytest.mark.parametrize("name", NAMES)
def test_pre_training_is_the_same_as_on_the_cpu(name):
    """By SGD: AdamW would make whole steps of gradients that are zero but for rounding, as those of the keys' bias."""
    found = []
    for device in ("cpu", DEVICE.type):
        model, task = small(name)
        config = replace(CONFIG, device=device, max_steps=2, batch_size=16, ema=0.9, optimizer="sgd")
        history = fit(model, small_images(), small_images(20), config, task=task, progress=False)
        found.append((everything(model), history[-1]))
    (ours, row), (theirs, there) = found[1], found[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for key in task.metrics:
        assert row[key] == pytest.approx(there[key], rel=1e-2, abs=1e-3), key


# ------------------------------------------------------------------------------------------------------------ the parts


MODELS = {
    "vit": tiny,
    "swin": lambda: create_model("swin_tiny", img_size=32, window_size=4, embed_dim=8, num_heads=(1, 1, 2, 2)),
    "swin_v2": lambda: create_model(
        "swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=8, num_heads=(1, 1, 2, 2)
    ),
    "coatnet": lambda: create_model(
        "coatnet_0", img_size=32, stem_dim=8, embed_dim=(8, 8, 32, 32), depths=(1, 1, 1, 1)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same_and_at_another_size(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    there = copy.deepcopy(model).to(DEVICE)
    for size in ((16, 16), (20, 28)) if name == "vit" else ((64, 64),):
        x = torch.randn(2, 3, *size)
        got = there(x.to(DEVICE))
        assert got.device.type == "pretend"
        close(got, model(x))
    got.sum().backward()


def test_attention_is_recorded():
    model, x = tiny().eval(), images()
    with record_attention(model) as expected:
        model(x)
    with record_attention(model.to(DEVICE)) as weights:
        model(x.to(DEVICE))
    for got, right in zip(weights, expected, strict=True):
        close(got, right)


@pytest.mark.parametrize(
    "mixer",
    [
        LinearAttention,
        TwoSoftmaxAttention,
        RandomFeatureAttention,
        partial(LocalAttention, window_size=3, block_size=2),
        partial(RandomBlockAttention, block_size=2, num_random=1),
        partial(BigBirdAttention, block_size=2, num_random=1, radius=1),
    ],
)
def test_efficient_attentions(mixer):
    model, x = tiny(attn_layer=mixer).eval(), images()
    expected = model(x)
    close(model.to(DEVICE)(x.to(DEVICE)), expected)
    with record_attention(model) as weights:
        model(x.to(DEVICE)).sum().backward()
    assert {w.device.type for w in weights} == {"pretend"}


def test_tokens_are_merged():
    model, x = merge_tokens(tiny().eval(), 3), images()
    expected = model(x)
    close(model.to(DEVICE)(x.to(DEVICE)), expected)
    fit(model, pictures(), pictures(), CONFIG, progress=False)


@pytest.mark.parametrize("scheme", [*SCHEMES, "w8a8_static, percentile"])
def test_models_are_quantized(scheme, tmp_path):
    x, (scheme, _, observer) = images(), scheme.partition(", ")
    how = {"batches": [x], "observer": observer or "minmax"} if scheme == "w8a8_static" else {}
    expected = quantize_model(named().eval(), scheme, **how)(x)
    model = quantize_model(named().eval().to(DEVICE), scheme, **how)
    assert {value.device.type for value in model.state_dict().values()} == {"pretend"}
    close(model(x.to(DEVICE)), expected)
    save_weights(model, tmp_path / "it.safetensors")
    close(create_model(tmp_path / "it.safetensors").eval()(x), expected)


def test_models_are_pruned():
    batches = [(images(), torch.tensor([0, 1, 2, 3]))]
    expected = prune_model(tiny().eval(), batches, macs=0.7)
    pruned = prune_model(tiny().eval().to(DEVICE), [tuple(t.to(DEVICE) for t in b) for b in batches], macs=0.7)
    close(pruned(images().to(DEVICE)), expected(images()))
    for pattern in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        sparse = magnitude_prune(tiny().to(DEVICE), **pattern)
        fit(sparse, pictures(), None, CONFIG, progress=False)
        assert (make_permanent(sparse).blocks[0].mlp.fc1.weight == 0).sum().item() >= 0.5 * 32 * 128


@pytest.mark.parametrize("method", METHODS)
def test_models_are_fine_tuned(method, tmp_path):
    """From where the model lies or is brought to: weights, adapters and costs are those of the CPU."""
    trained = {}
    for device in ("pretend", "cpu"):
        torch.manual_seed(0)
        model = named()
        task = finetune(model.to(device), method)
        fit(model, pictures(), pictures(), replace(CONFIG, device=device), task=task, progress=False)
        assert {value.device.type for value in model.state_dict().values()} == {device}
        trained[device] = everything(model)
    torch.testing.assert_close(trained["pretend"], trained["cpu"], rtol=1e-3, atol=1e-3)
    if task.method.trained(model) is not None:
        save_adapter(model, tmp_path / "adapter.safetensors")
        again = load_adapter(named().to(DEVICE), tmp_path / "adapter.safetensors").eval()
        close(again(images().to(DEVICE)), model(images()))
    if method == "lora":
        model = merge_lora(model.to(DEVICE))
        close(model(images().to(DEVICE)), again.cpu()(images()))


# ---------------------------------------------------------------------------------------------------------- the graders

CHECKS = {name: spec for name, spec in checks.load_all().items() if spec.topic in checks.TOPICS}
ON_THE_DEVICE = {name: spec for name, spec in CHECKS.items() if not hasattr(spec.runner, "device_types")}


@pytest.mark.parametrize("name", ON_THE_DEVICE)
def test_references_run_on_the_device(name):
    """Else answers to that exercise would be tried on the CPU alone, and nobody would know."""
    trial = Trial(ON_THE_DEVICE[name], seed=0)
    if not any(isinstance(case, Case) for case in trial.cases):
        pytest.skip("nothing but properties")
    seen = []

    def watch(outcome):
        seen.append(outcome)
        return outcome

    runner = trial.spec.runner
    trial.spec = replace(trial.spec, runner=lambda *args, **options: watch(runner(*args, **options)))
    assert grading._elsewhere(trial, trial.reference) == ""
    assert [outcome.error for outcome in seen] == [None, None]
    inputs = [leaf for _, leaf in leaves(seen[0].before) if isinstance(leaf, torch.Tensor)]
    assert {leaf.device.type for leaf in inputs} <= {"pretend"}


def answered(name, source, capsys):
    """What a notebook prints below the cell of an exercise."""
    names = {"TODO": course.TODO, "exercise": course.exercise, "torch": torch, "nn": nn}
    exec(compile(f"@exercise({name!r})\n{source}", f"<cell {hash(source)}>", "exec"), names)
    return capsys.readouterr().out.strip()


PATCHES = """
def image_to_patch(x, patch_size):
    b, c, h, w = x.shape
    p = patch_size
    x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)
    return {}
"""


def test_an_answer_that_leaves_something_on_the_cpu_is_told(capsys):
    tell = lambda end: answered("vit.image_to_patch", PATCHES.format(end), capsys)  # noqa: E731
    assert tell("x") == "✓ image_to_patch"
    mixed, returned, seen = (
        tell("x + torch.zeros(x.shape, dtype=x.dtype)"),
        tell("x.cpu()"),
        tell("x * int(x.detach().numpy().size > 0)"),
    )
    assert mixed.startswith("✗ image_to_patch: right on the CPU, but on pretend: RuntimeError: Expected all tensors")
    assert returned.startswith("✗ image_to_patch: right on the CPU, but on pretend the output is on cpu, expected on")
    assert seen.startswith("✗ image_to_patch: right on the CPU, but on pretend: TypeError: can't convert")
    devices.use_device("cpu")
    try:
        assert tell("x + torch.zeros(x.shape, dtype=x.dtype)") == "✓ image_to_patch"  # the session has no other device
    finally:
        devices.use_device()
