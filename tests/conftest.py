"""For tests, not for notebooks."""

import pytest
import torch

collect_ignore_glob = ["_*.py"]  # scripts, run by tests in processes of their own; some change their environment


@pytest.fixture(autouse=True)
def seeded():
    """Else each test's numbers depend on what ran before it, and some pair of images is too much alike."""
    torch.manual_seed(0)
