"""For every test, the notebooks among them: keep the learner's progress untouched, and do not compare stderr."""

import os

# Kernels that run notebooks inherit both.
os.environ["VITCOURSE_PROGRESS"] = "off"
os.environ["VITCOURSE_PROFILE"] = "quick"


def pytest_collectstart(collector):
    """Notices and progress bars go to stderr, and differ from machine to machine: nbval shall not compare them."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
