"""One answer to "on what device?", and a dress rehearsal on a pretend accelerator, for machines without a real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vitcourse import course, devices
from vitcourse.course import catalogue, grading
from vitcourse.course.trial import Trial
from vitcourse.train import TrainConfig, cli, evaluate, runtime

TESTS = Path(__file__).parent
LESSONS = sorted(path.stem for path in (TESTS.parent / "solutions").glob("[0-9][0-9]_*.py"))


@pytest.fixture(autouse=True)
def no_session(monkeypatch):
    monkeypatch.setattr(devices, "_session", None)
    monkeypatch.delenv("VITCOURSE_DEVICE", raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with two GPUs, as far as anybody asks."""
    monkeypatch.setattr(devices, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")


# ----------------------------------------------------------------------------------------------------------- one answer


def test_the_session_decides_then_the_environment_then_the_machine(monkeypatch, gpu):
    assert devices.resolve_device() == torch.device("cuda")
    monkeypatch.setenv("VITCOURSE_DEVICE", "cuda:1")
    assert devices.resolve_device() == torch.device("cuda:1")
    assert course.setup(device="cpu").device == devices.resolve_device() == torch.device("cpu")
    assert devices.resolve_device("cuda") == torch.device("cuda")  # asked for by name
    assert course.setup().device == devices.resolve_device() == torch.device("cuda:1")
    monkeypatch.setenv("VITCOURSE_DEVICE", "auto")
    assert course.setup().device == torch.device("cuda")


def test_setup_names_the_device(gpu, capsys):
    course.setup("quick")
    assert capsys.readouterr().err == "vitcourse: profile quick, on Tesla T4\n"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_an_unknown_device_is_an_error_that_names_both_ways_to_choose(name, monkeypatch):
    rest = r"is unknown; use auto, cuda, mps or cpu \(a `device` argument or VITCOURSE_DEVICE chooses\)"
    with pytest.raises(ValueError, match=f"device '{name}' {rest}"):
        course.setup(device=name)
    with pytest.raises(ValueError, match=f"device '{name}' {rest}"):
        devices.resolve_device(name)
    if name:
        monkeypatch.setenv("VITCOURSE_DEVICE", name)
        for decide in (course.setup, devices.resolve_device, lambda: runtime.choose_device("auto", nn.Linear(1, 1))):
            with pytest.raises(ValueError, match=f"VITCOURSE_DEVICE '{name}' {rest}"):
                decide()


@pytest.mark.parametrize(
    ("name", "here"),
    [("xla", "use auto or cpu"), ("meta", "use auto or cpu"), ("cuda:2", "this machine has 2 of them, counted from 0")],
)
def test_a_device_that_is_not_here_is_an_error(name, here, gpu):
    with pytest.raises(ValueError, match=f"device '{name}' is not available here; {here}"):
        devices.resolve_device(name)


def test_an_error_leaves_the_session_as_it_was():
    devices.use_device("cpu")
    with pytest.raises(ValueError, match="unknown"):
        devices.use_device("gpu")
    assert devices._session == torch.device("cpu")


def test_a_wrong_device_ends_the_command_line_with_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("VITCOURSE_DEVICE", "gpu")
    size = "img_size=28,patch_size=14,embed_dim=8,depth=1,num_heads=1"
    arguments = ["--model", "vit_tiny", "--model-args", size, "--data", "fashion_mnist_subset", "--max-steps", "1"]
    assert cli.main([*arguments, "--out-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: VITCOURSE_DEVICE 'gpu' is unknown; use auto, cuda, mps or cpu")


def test_a_model_stays_where_somebody_has_put_it(gpu, monkeypatch):
    for lies, asked, expected in [
        ("cpu", "auto", "cuda"),
        ("cuda:1", "auto", "cuda:1"),
        ("cuda:1", "cpu", "cpu"),
        ("cuda:1", "cuda:0", "cuda:0"),
        (None, "auto", "cuda"),
    ]:
        monkeypatch.setattr(runtime, "device_of", lambda _, lies=lies: lies and torch.device(lies))
        assert runtime.choose_device(asked, nn.Identity()) == torch.device(expected)


def test_a_model_without_parameters_is_evaluated_too():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 2).float()

    data = [(torch.zeros(1, 2, 2), label) for label in (0, 0, 0, 1)]
    assert devices.device_of(Constant()) is None
    assert evaluate(Constant(), data, TrainConfig(device="cpu"))["val_accuracy"] == 0.75


def test_graders_try_the_device_of_the_session(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(grading, "map_tensors", lambda tree, function: seen.append(grading.resolve_device()) or tree)
    spec = catalogue.CHECKS.get("vit.image_to_patch") or course.exercises.checks.find("vit.image_to_patch")
    trial = Trial(spec, 0)
    grading._elsewhere(trial, trial.reference)
    devices.use_device("cpu")
    grading._elsewhere(trial, trial.reference)
    assert seen == [torch.device("cuda")]


# ----------------------------------------------------------------------------------------------- what devices differ in


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_half_precision_goes_by_compute_capability(monkeypatch, capability, dtype):
    """A T4 says that it supports bfloat16, which it emulates."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert devices.half_dtype(torch.device("cuda")) == dtype
    assert devices.half_dtype(torch.device("mps")) == torch.float16


def test_nobody_asks_pytorch_itself():
    """A second answer would contradict the first on some machine."""
    root = TESTS.parent
    files = [*root.glob("vitcourse/**/*.py"), *root.glob("benchmarks/*.py"), *root.glob("solutions/*.py")]
    own = {"vitcourse/devices.py"}
    words = ("cuda.is_available", "mps.is_available", "is_bf16_supported(", "current_accelerator")
    found = [
        f"{path.relative_to(root)}: {word}"
        for path in files
        if path.relative_to(root).as_posix() not in own
        for word in words
        if word in path.read_text(encoding="utf-8")
    ]
    assert not found


@pytest.mark.parametrize(("platform", "expected"), [("darwin", "1"), ("linux", None)])
def test_what_apples_gpus_lack_is_computed_on_their_cpu(platform, expected):
    name = "PYTORCH_ENABLE_MPS_FALLBACK"
    code = f"import os, sys; sys.platform = {platform!r}; import vitcourse; print(os.environ.get({name!r}))"
    environment = {key: value for key, value in os.environ.items() if key != name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)


# -------------------------------------------------------------------------------------------------------- the rehearsal


def own_process(*command, **environment):
    """A process that has the pretend device, and one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent), **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, cwd=TESTS.parent
    )


@pytest.mark.parametrize("kind", ["mac", pytest.param("cuda", marks=pytest.mark.thorough)])
def test_the_library_works_on_a_device_that_is_not_the_cpu(kind):
    options = ["-q", "-p", "no:cacheprovider", "--no-header"]
    done = own_process("-m", "pytest", *options, TESTS / "on_pretend_device.py", VITCOURSE_PRETEND=kind)
    assert done.returncode == 0, done.stdout + done.stderr


def rehearsed(*options):
    """What became of every lesson, all in one process."""
    done = own_process(TESTS / "_rehearsal.py", *options, *LESSONS)
    assert done.returncode == 0, done.stderr
    return {row["lesson"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def on_a_mac():
    return rehearsed("--mac")


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_lesson_runs_on_a_device_that_is_not_the_cpu(lesson, on_a_mac):
    """It refuses all that a GPU refuses, and float64 as well."""
    assert on_a_mac[lesson]["device"] == "pretend"
    assert not on_a_mac[lesson]["failures"], "\n".join(on_a_mac[lesson]["failures"])


@pytest.mark.thorough
@pytest.mark.parametrize("options", [["--student"], ["--student", "--mac"], []], ids=" ".join)
def test_both_editions_run_on_both_devices_and_miss_what_they_miss_on_the_cpu(options):
    cut = rehearsed("--cpu", *(["--student"] if "--student" in options else []))
    for lesson, row in rehearsed(*options).items():
        assert row["device"] == "pretend"
        assert not row["failures"], "\n".join(row["failures"])
        assert set(row["missed"]) <= set(cut[lesson]["missed"])
