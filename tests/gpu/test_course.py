"""Exercises on a machine with CUDA: answers are tried on the device too."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from vitcourse import course
from vitcourse.course import checks
from vitcourse.course.cases import Case
from vitcourse.course.grading import grade
from vitcourse.course.running import isolated, leaves, map_tensors
from vitcourse.course.trial import Trial
from vitcourse.devices import resolve_device

pytestmark = pytest.mark.gpu

CHECKS = {name: spec for name, spec in checks.load_all().items() if spec.topic in checks.TOPICS}


def answered(name: str, source: str) -> str:
    """What a notebook prints below the cell of an exercise."""
    names = {"__name__": "__main__", "TODO": course.TODO, "exercise": course.exercise, "torch": torch, "nn": nn}
    exec(compile(f"@exercise({name!r})\n{source}", f"<cell {hash(source)}>", "exec"), names)


def test_the_device_is_found():
    assert resolve_device() == torch.device("cuda")
    assert course.setup("quick").device.type == "cuda"


@pytest.mark.parametrize("name", CHECKS)
def test_references_run_on_the_device(name):
    """Else answers to that exercise would be tried on the CPU alone, and nobody would know."""
    spec = CHECKS[name]
    trial = Trial(spec, seed=0)
    for i, case in enumerate(trial.cases):
        if not isinstance(case, Case):
            continue
        args, kwargs = map_tensors((case.args, case.kwargs), lambda tensor: tensor.to("cuda"))
        moved = replace(case, args=args, kwargs=kwargs)
        run = spec.runner(spec.reference, moved, trial.weights[i], spec.reference, gradients=False, seconds=60, seed=i)
        assert run.error is None, run.error
        given = [leaf for _, leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if given:
            assert all(leaf.is_cuda for _, leaf in leaves(run.output) if isinstance(leaf, torch.Tensor))


@pytest.mark.parametrize("name", CHECKS)
def test_right_answers_are_right(name):
    assert grade(CHECKS[name], CHECKS[name].reference).status == "right"


PATCHES = """
def image_to_patch(x, patch_size):
    b, c, h, w = x.shape
    p = patch_size
    x = x.reshape(b, c, h // p, p, w // p, p)
    return torch.einsum("bchpwq->bhwpqc", x).reshape(b, -1, p * p * c)
"""


def test_an_answer_is_ticked(capsys):
    answered("vit.image_to_patch", PATCHES)
    assert capsys.readouterr().out == "✓ image_to_patch\n"


def test_a_tensor_left_on_the_cpu_is_found(capsys):
    answered("vit.image_to_patch", PATCHES.replace("x.shape\n", "x.shape\n    x = x + torch.zeros(b, c, h, w)\n"))
    assert capsys.readouterr().out.startswith("✗ image_to_patch: right on the CPU, but on cuda: RuntimeError: ")
    answered("vit.image_to_patch", PATCHES.replace("-1, p * p * c)", "-1, p * p * c).cpu()"))
    line = capsys.readouterr().out
    assert line.startswith("✗ image_to_patch: right on the CPU, but on cuda the output is on cpu, expected on cuda:0")


def test_an_answer_tied_to_the_device_is_wrong(capsys):
    answered("vit.image_to_patch", PATCHES.replace("-1, p * p * c)", "-1, p * p * c).cuda()"))
    assert "on cuda:0, expected on cpu" in capsys.readouterr().out


def test_grading_leaves_the_random_numbers_of_the_device_alone():
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    grade(CHECKS["vit.image_to_patch"], CHECKS["vit.image_to_patch"].reference)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    with isolated(7):
        first = torch.rand(4, device="cuda")
    with isolated(7):
        assert torch.equal(torch.rand(4, device="cuda"), first)
