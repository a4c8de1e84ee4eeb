"""What PyTorch reads when it is imported is set before, and never over what the user says."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from vitcourse import startup
from vitcourse.course import lessons

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fresh(monkeypatch):
    """A process of its own to be: a function that returns its environment after the call."""

    def found(platform="linux", torch=False, **environment):
        variables = environment.copy()
        modules = {"torch": types.ModuleType("torch")} if torch else {}
        monkeypatch.setattr(startup, "os", types.SimpleNamespace(environ=variables))
        monkeypatch.setattr(startup, "sys", types.SimpleNamespace(modules=modules, platform=platform))
        startup.before_torch()
        return variables

    return found


def test_threads_wait_without_spinning(fresh):
    assert fresh() == {"GOMP_SPINCOUNT": "1000"}


def test_what_apples_gpus_lack_is_computed_on_their_cpu(fresh):
    assert fresh("darwin") == {"GOMP_SPINCOUNT": "1000", "PYTORCH_ENABLE_MPS_FALLBACK": "1"}


@pytest.mark.parametrize("said", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": ""}])
def test_the_users_own_word_stands(fresh, said):
    assert fresh(**said) == said


def test_the_users_fallback_stands(fresh):
    assert fresh("darwin", PYTORCH_ENABLE_MPS_FALLBACK="0")["PYTORCH_ENABLE_MPS_FALLBACK"] == "0"


def test_it_is_too_late_once_torch_is_there(fresh):
    assert fresh("darwin", torch=True) == {}


# Ends the process where torch would be imported, and says what PyTorch would read.
BEFORE_TORCH = """
import os, runpy, sys

class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch, with", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Torch())
"""
PROGRAM = "sys.argv = {}; runpy.run_module({!r}, run_name='__main__')".format
WEIGHTS = "data/weights/fashion_mnist_vit.safetensors"
TRAIN = ["train", "--model", "vit_tiny", "--data", "fashion_mnist_subset"]
ENTRIES = {
    "command": PROGRAM(["vitcourse", "evaluate", WEIGHTS, "--data", "fashion_mnist_subset"], "vitcourse"),
    "module": PROGRAM(TRAIN, "vitcourse.train"),
    "builder": "import vitcourse.course.builder",
    "benchmark": "import benchmarks.models",
    "tests": "import conftest, torch",
    "library": "import vitcourse.layers",
}


def ends_with(code):
    environment = {name: value for name, value in os.environ.items() if name not in startup.WAITING}
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_TORCH + code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.stdout.splitlines()[-1:], done.stderr


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_comes_before_torch(entry):
    said, errors = ends_with(ENTRIES[entry])
    assert said == ["torch, with 1000"], errors


def test_the_first_cell_of_a_lesson_comes_before_torch():
    cell = lessons.setup_cell(lessons.Lesson(ROOT, "00_vit"), "student")
    assert ends_with(cell)[0] == ["torch, with 1000"]
