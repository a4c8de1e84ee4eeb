"""`setup`: the first line of every lesson."""

import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch

from vitcourse.devices import accelerator, describe_device, has_float64, use_device
from vitcourse.notices import notice
from vitcourse.startup import MPS_FALLBACK

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


def setup(profile: str | None = None, *, device: str | torch.device | None = None, seed: int = 0) -> Session:
    """Make a lesson repeatable: seed every generator, fix how numbers and figures look, choose profile and device.

    Args:
        profile: ``"quick"`` (embedded data, CPU or GPU, offline) or ``"full"`` (real data sets, a GPU). Without it, the
            environment variable VITCOURSE_PROFILE decides; without that, quick.
        device: ``"cuda"``, ``"mps"``, ``"cpu"``, …, on which ``fit`` and the graders work from now on, too. Without it,
            the environment variable VITCOURSE_DEVICE decides; without that, this machine's accelerator, or the CPU.
        seed: of Python's, NumPy's and PyTorch's generators.

    Prints nothing on stdout, which must be the same on every machine; the device is named on stderr, or in a notebook
    in an output that the builder leaves out.

    Raises:
        ValueError: there is no such profile, or no such device here.

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

    chosen = use_device(device)
    notice(f"vitcourse: profile {profile}, on {describe_device(chosen)}")
    for line in _limits(chosen):
        print(f"vitcourse: {line}", file=sys.stderr)
    return Session(os.environ.get("VITCOURSE_LESSON", ""), profile, chosen)


def _limits(device: torch.device) -> Iterator[str]:
    """What a learner should know of a device beforehand."""
    if not has_float64(device):
        yield f"{device} has no double precision; what wants it is computed in single precision there"
    if device.type == "mps" and os.environ.get(MPS_FALLBACK) != "1":
        yield f"operations that {device} lacks will fail; set {MPS_FALLBACK}=1 before torch is imported"
    left = accelerator()  # a GPU for which Triton may be set up, or shall be
    if left and left.type == "cuda" != device.type and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            yield f"Triton compiles for {left} already; to interpret its kernels restart with VITCOURSE_DEVICE={device}"
        else:
            os.environ["TRITON_INTERPRET"] = "1"
