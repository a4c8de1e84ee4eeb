"""Tests that need CUDA. ``make gpu`` runs them; elsewhere each is skipped."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def cuda():
    """Before any other fixture, so that none trains a model in vain."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch.cuda.is_available() is false")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 means float32. Convolutions use TF32, of 10 bits, unless they are told not to; matrix products do not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert torch.get_float32_matmul_precision() == "highest"
    torch._dynamo.reset()
