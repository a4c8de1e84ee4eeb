"""What PyTorch reads when it is imported is set before, and never over what the user says."""

import os
import sys
import types

import pytest

from vitcourse import startup

NAMES = (startup.MPS_FALLBACK, *startup.WAITING)


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not imported torch, and whose user says nothing: returns what of NAMES is set after the call."""

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
