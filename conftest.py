"""For every test, the notebooks among them: keep the learner's progress untouched, and ask nothing of the machine."""

import os
import tempfile
from contextlib import suppress

import vitcourse  # noqa: F401 (before torch: how its threads wait)

_scratch = tempfile.TemporaryDirectory(prefix="vitcourse-")  # until Python ends
# Kernels that run notebooks inherit all of it. What their user likes Jupyter and matplotlib to do would change outputs,
# and not every home can be written to.
os.environ |= {
    "VITCOURSE_PROGRESS": "off",
    "VITCOURSE_PROFILE": "quick",
    "VITCOURSE_STRICT": "1",  # a claim of a lesson that does not hold is an error, whether outputs are compared or not
    **dict.fromkeys(("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"), _scratch.name),
    "MATPLOTLIBRC": os.devnull,
}

with suppress(ImportError):  # the tests that need a GPU do without
    from hypothesis import HealthCheck, settings

    # A busy machine is slow at drawing examples, and at running them.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


def pytest_collectstart(collector):
    """What differs from machine to machine nbval shall not compare: stderr (notices, progress bars), measurements."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "text/html")  # where it computes is a notice in HTML
        collector.sanitize_patterns[r" \(measured [^()\n]*\)"] = ""  # as vitcourse.course.expectations.MEASURED
