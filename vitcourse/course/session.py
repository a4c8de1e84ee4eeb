"""`setup`: the first line of every lesson."""

import os
import random
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch

PROFILES = ("quick", "full")


@dataclass(frozen=True)
class Session:
    """Where and how a lesson runs."""

    lesson: str  # "00_vit"; "" outside a notebook of the course
    profile: str
    device: torch.device

    @property
    def quick(self) -> bool:
        """True in the profile that needs no GPU, no network and little time."""
        return self.profile == "quick"


def setup(profile: str | None = None, *, seed: int = 0) -> Session:
    """Make a lesson repeatable: seed every generator, fix how numbers and figures look, choose profile and device.

    Args:
        profile: ``"quick"`` (embedded data, CPU or GPU, offline) or ``"full"`` (real data sets, a GPU). Without it, the
            environment variable VITCOURSE_PROFILE decides; without that, quick.
        seed: of Python's, NumPy's and PyTorch's generators.

    Prints nothing on stdout, which must be the same on every machine; the device is named on stderr.

    Raises:
        ValueError: there is no such profile.

    >>> setup("quick").quick
    True
    """
    profile = profile or os.environ.get("VITCOURSE_PROFILE") or "quick"
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is not one of {', '.join(PROFILES)} (see also VITCOURSE_PROFILE)")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_printoptions(precision=4, sci_mode=False, linewidth=100)
    np.set_printoptions(precision=4, suppress=True, linewidth=100)
    if find_spec("vitcourse.plot") and find_spec("matplotlib"):
        import_module("vitcourse.plot").use_style()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    print(f"vitcourse: profile {profile}, on {name}", file=sys.stderr)
    return Session(os.environ.get("VITCOURSE_LESSON", ""), profile, device)
