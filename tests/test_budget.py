"""The clock: what was measured stays within what it may cost. Nothing is timed here."""

import os

import pytest

from tests import budget
from tests.stems import files_of_tests, notebooks


@pytest.mark.skipif("VITCOURSE_CPU" in os.environ, reason="it is being measured")
def test_no_account_is_overdrawn_and_nothing_goes_unmeasured():
    assert budget.problems(budget.read()) == []


def test_the_whole_course_fits_into_three_quarters_of_an_hour_on_two_cores():
    lessons = budget.LESSONS * (budget.DIRECTION + 2 * budget.NOTEBOOK)
    assert (
        lessons + sum(budget.MORE.values()) + budget.SHARED + budget.INSTALLATION + budget.SITE <= budget.WHOLE == 5400
    )


def test_an_overdrawn_account_a_new_file_and_one_that_is_gone_are_refused():
    seconds = {entry: 1.0 for account in budget.accounts() for entry in account.entries}
    assert budget.problems(seconds) == []
    del seconds["tests/test_cli.py"]
    seconds |= {"tests/test_hybrid.py": 102.0, "solutions/00_vit.ipynb": 90.5, "tests/test_gone.py": 1.0}
    assert budget.problems(seconds) == [
        "hybrid: 103.0 CPU seconds, allowed are 102",
        "tests/test_cli.py has no entry: python -m tests.budget shared",
        "solutions/00_vit.ipynb: 90.5 CPU seconds, allowed are 90",
        "tests/test_gone.py is no test file or notebook: drop it",
    ]


def test_every_file_is_in_one_account():
    files = [file for account in budget.accounts() for file in account.files]
    assert len(files) == len(set(files)) and set(files) == {*files_of_tests(), *notebooks()}
    of = {file: account.name for account in budget.accounts() for file in account.files}
    assert of["tests/test_quantize_kernels.py"] == of["tests/test_flash.py"] == "hardware"
    assert of["tests/test_cli.py"] == of["vitcourse"] == "shared" and of["tests/test_vit.py"] == "vit"
