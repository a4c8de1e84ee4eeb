"""What a change concerns, and how much of it fits into three minutes."""

import subprocess

import pytest

from tests import fast
from tests.stems import fingerprint, notebooks, sources


@pytest.mark.parametrize(
    ("file", "first", "among"),
    [
        ("vitcourse/vit/patches.py", "tests/test_vit.py", {"solutions/00_vit.ipynb"}),
        ("tests/test_cli.py", "tests/test_cli.py", set()),
        ("vitcourse/hardware/flash/ops.py", "tests/test_flash.py", {"solutions/06_hardware.ipynb"}),
        ("solutions/02_hybrid.py", "solutions/02_hybrid.ipynb", {"solutions/02_hybrid.ipynb"}),
        ("vitcourse/layers/dot_product.py", "tests/test_layers.py", {"tests/test_efficient_attention.py"}),
        ("vitcourse/course/checks/hybrid/mbconv.py", "tests/test_course.py", {"solutions/02_hybrid.ipynb"}),
    ],
)
def test_what_a_change_concerns_comes_nearest_first(file, first, among):
    found = fast.concerned({file}, {})
    assert found[0] == first and among <= set(found)
    assert "tests/test_reading.py" not in found


def test_what_concerns_nothing_runs_nothing():
    assert fast.concerned({"LICENSE", "notebooks/00_vit.ipynb"}, {}) == []


def test_what_does_not_fit_is_left_and_the_first_always_fits():
    seconds = {"a": fast.SECONDS + 1, "b": 1, "c": fast.SECONDS - 10, "d": 20, "e": 9}
    assert fast.fitting("abe", seconds) == (["a"], ["b", "e"])
    assert fast.fitting("bcde", seconds) == (["b", "c", "e"], ["d"])


def test_what_failed_is_named_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(fast, "changed", lambda since: {"tests/test_cli.py"})
    monkeypatch.setattr(fast, "_ruff", lambda *command: int(command[0] == "format"))
    monkeypatch.setattr(
        fast, "_quietly", lambda entry: subprocess.CompletedProcess(entry, entry != fast.DOCTESTS, "why")
    )
    monkeypatch.setattr("sys.argv", ["fast"])
    assert fast.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "failed: ruff format --check, tests/test_cli.py"


def test_changes_are_those_since_the_branch_began(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(fast, "ROOT", tmp_path)
    git("init", "--initial-branch=main")
    for name in ("old", "edited", "committed"):
        (tmp_path / name).write_text("1", encoding="utf-8")
    git("add", "old", "edited")
    git("commit", "-m", "1")
    assert fast.changed() == {"committed"}
    git("checkout", "-b", "branch")
    git("add", "committed")
    git("commit", "-m", "2")
    (tmp_path / "edited").write_text("2", encoding="utf-8")
    (tmp_path / "new").write_text("2", encoding="utf-8")
    assert fast.changed() == {"committed", "edited", "new"}
    assert fast.changed("HEAD") == {"edited", "new"}


def test_a_fingerprint_changes_with_any_of_its_files_and_with_no_other(tmp_path, monkeypatch):
    from tests import stems

    entry = notebooks()[0]
    files = sources(entry)
    assert len(files) > 5 and not any("/layers/" in file for file in files)
    monkeypatch.setattr(stems, "ROOT", tmp_path)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file, encoding="utf-8")
    before = fingerprint(entry)
    (tmp_path / "vitcourse" / "layers").mkdir()
    (tmp_path / "vitcourse" / "layers" / "parts.py").write_text("another", encoding="utf-8")
    assert fingerprint(entry) == before
    for file in files:
        (tmp_path / file).write_text("another", encoding="utf-8")
        assert fingerprint(entry) != before
        (tmp_path / file).write_text(file, encoding="utf-8")
