"""The clock: what was measured stays within what it may cost. Nothing is timed here."""

from tests import budget


def test_no_account_is_overdrawn_and_nothing_goes_unmeasured():
    assert budget.problems(budget.read()) == []


def test_the_whole_course_fits_into_three_quarters_of_an_hour_on_two_cores():
    lessons = budget.LESSONS * (budget.DIRECTION + 2 * budget.NOTEBOOK)
    assert lessons + budget.SHARED + budget.INSTALLATION + budget.SITE <= budget.WHOLE == 5400


def test_an_overdrawn_account_a_new_file_and_one_that_is_gone_are_refused():
    seconds = {entry: 1.0 for account in budget.accounts() for entry in account.entries}
    assert budget.problems(seconds) == []
    del seconds["tests/test_cli.py"]
    seconds |= {"tests/test_hybrid.py": 103.0, "solutions/00_vit.ipynb": 90.5, "tests/test_gone.py": 1.0}
    found = "\n".join(budget.problems(seconds))
    assert found == (
        "tests/test_cli.py has no entry: python -m tests.budget tests/test_cli.py\n"
        "tests/test_gone.py is no test file or notebook: drop it\n"
        "hybrid: 103 CPU seconds, allowed are 102\n"
        "solutions/00_vit.ipynb: 90 CPU seconds, allowed are 90"
    )


def test_every_file_is_in_one_account():
    entries = [entry for account in budget.accounts() for entry in account.entries]
    assert len(entries) == len(set(entries))
    assert {f"tests/{name}" for name in ("test_vit.py", "test_quantize_kernels.py", "test_cli.py")} < set(entries)
