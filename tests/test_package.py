"""What is installed, and what an import costs."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import vitcourse
from vitcourse.paths import data_dir, results_dir

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = {"torchvision", "matplotlib", "timm", "accelerate", "tensorboard", "transformers", "pandas", "scipy", "IPython"}


def imported_by(code):
    """Top-level packages that are loaded after ``code`` ran in a fresh interpreter."""
    report = "\nimport sys; print('\\n'.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    ours = imported_by("import vitcourse") - imported_by("")  # what is installed may have Python load more
    assert "vitcourse" in ours and not ours & (HEAVY | {"torch", "numpy", "einops"})


def test_building_and_running_a_model_loads_nothing_heavy():
    code = """
import torch, vitcourse
model = vitcourse.create_model("vit_tiny", img_size=32, depth=1)
model(torch.zeros(1, 3, 48, 32))
vitcourse.load_weights(model, model.state_dict())
"""
    assert not (imported_by(code) - imported_by("import torch")) & (HEAVY | {"triton", "sympy"})


ON_A_TERMINAL = """
import runpy, sys
for module, *arguments in [["train", "--help"], ["course", "progress"], ["course", "mistakes"]]:
    sys.stdout.reconfigure(errors="strict")
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(f"vitcourse.{module}", run_name="__main__")
    except SystemExit as end:
        print("ended with", end.code)
"""


def test_commands_print_on_a_terminal_that_knows_few_characters():
    """``python -m vitcourse.train`` and ``…course``, all in one process: each would import PyTorch anew."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_TERMINAL], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    *printed, rest = done.stdout.split("ended with 0\n")
    assert len(printed) == 3 and not rest and all(r"\u" in text for text in printed), done.stderr


def test_the_public_names_resolve():
    for name in vitcourse.__all__:
        assert callable(getattr(vitcourse, name))


def test_environment_yml_lists_what_pyproject_does():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert environment["name"] == PROJECT["name"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    assert pip == ["-e .", *PROJECT["dependencies"], *PROJECT["optional-dependencies"]["lab"]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    backend = pytest.importorskip("hatchling.build")
    assert backend
    folder = tmp_path_factory.mktemp("wheel")
    build = f"import hatchling.build; hatchling.build.build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


def files_below(folder):
    """But for those that Python, an editor or a file manager leaves behind."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {file.as_posix() for file in files if not any(part.startswith((".", "__pycache__")) for part in file.parts)}


def test_the_wheel_carries_code_data_and_results(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for inside, folder in [
        ("vitcourse/_data/data", data_dir()),
        ("vitcourse/_data/results", results_dir()),
        ("vitcourse", ROOT / "vitcourse"),
    ]:
        expected = {f"{inside}/{name}" for name in files_below(folder)}
        assert expected
        assert expected <= names
    assert "vitcourse/py.typed" in names
    assert any(name.startswith("vitcourse/recipes/") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "notebooks/", "solutions/"))]


def test_the_wheel_finds_its_data_without_the_clone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import vitcourse.paths as p; print(p.data_dir()); print(p.results_dir())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [Path(line) for line in done.stdout.splitlines()] == [
        tmp_path / "vitcourse" / "_data" / "data",
        tmp_path / "vitcourse" / "_data" / "results",
    ]
