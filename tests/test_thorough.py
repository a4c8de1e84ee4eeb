"""What runs seldom has run on what is here, or on little else."""

import warnings

import pytest

from tests import thorough
from tests.stems import files_of_tests, fingerprint


@pytest.mark.parametrize("machine", thorough.MACHINES)
def test_the_report_of_a_machine_is_whole_and_not_too_old(machine):
    ran = {row["file"]: row["failed"] for row in thorough.rows() if row["machine"] == machine}
    files = files_of_tests()
    if not ran:
        pytest.skip(f"nothing was recorded on {machine} yet")
    how = "make oldest" if machine == "oldest" else f"python -m tests.thorough --stale --on {machine}"
    assert not [file for file in files if file not in ran], f"these never ran on {machine}: {how}"
    assert not [test for failed in ran.values() for test in failed], f"these failed on {machine}"
    old = thorough.stale(machine)
    if old:
        warnings.warn(f"{machine}: {len(old)} of {len(files)} test files have changed since ({how})", stacklevel=1)
    assert len(old) <= thorough.MOST_STALE * len(files), f"these have changed since they ran on {machine}: {how}"


def test_rows_are_replaced_and_those_of_other_code_are_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(thorough, "REPORT", tmp_path / "reports" / "thorough.json")
    current = {file: fingerprint(file) for file in files_of_tests()}
    assert thorough.stale("avx2") == list(current)
    thorough.record("avx2", current, {"tests/test_vit.py": ["a"]})
    thorough.record("plain", {"tests/test_vit.py": "of other code"}, {})
    assert thorough.stale("avx2") == [] and len(thorough.stale("plain")) == len(current)
    thorough.record("avx2", {"tests/test_vit.py": "of other code"}, {})
    assert thorough.stale("avx2") == ["tests/test_vit.py"]
    assert len(thorough.rows()) == len(current) + 1 and not any(row["failed"] for row in thorough.rows())
