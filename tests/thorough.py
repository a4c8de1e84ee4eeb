"""Run the tests on machines like many, as far as this one can pretend to be them.

    python -m tests.thorough                                  all of them: about seven minutes each on two cores
    python -m tests.thorough --on avx2 threads -- tests/test_vit.py -k compiles

What follows ``--`` is for pytest. Every machine runs the same tests, and the last lines say which of them failed where.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).parents[1]
MACHINES: dict[str, dict[str, str]] = {
    # Most laptops of before 2020, and many in clouds: no AVX-512, and no products of 8-bit integers (VNNI).
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    # Other sums and other random numbers than any x86 of today gives: as near to another BLAS as MKL comes.
    "plain": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "one thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    # Without MKL_DYNAMIC=FALSE, PyTorch takes no more threads than there are cores.
    "threads": {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4", "MKL_DYNAMIC": "FALSE", "GOMP_SPINCOUNT": "0"},
    # A user of another place: no home, a narrow terminal that knows ASCII, a clock of quarter hours.
    "stranger": {
        "HOME": os.devnull,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONWARNDEFAULTENCODING": "1",
        "PYTHONHASHSEED": "1",
        "COLUMNS": "60",
        "TZ": "NPT-5:45",
    },
}
# On the stranger's machine, a file that we read or write without saying how it is encoded is an error. (Of what another
# process says, subprocess asks the same, in a sentence with a full stop: both have one locale.)
UNSAID = [
    f"error:'encoding' argument not specified$:EncodingWarning:{ours}" for ours in ("vitcourse", "benchmarks", "test")
]


def run(machine: str, arguments: list[str]) -> tuple[list[str], str]:
    """The tests that fail on a machine, and how many ran in how many seconds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")} | MACHINES[machine]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # Inductor would take for its own what it has compiled for another machine.
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not thorough", f"--junit-xml={report}"]
        command += ["-p", "no:cacheprovider"]
        command += ["--override-ini=filterwarnings=" + "\n".join(UNSAID), *arguments]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if status and not failed:
        failed = [f"pytest ended with status {status}"]
    return failed, f"{len(cases)} tests, {len(failed)} failed, {time.monotonic() - started:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", nargs="+", choices=MACHINES, default=list(MACHINES), metavar="MACHINE")
    parser.add_argument("tests", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    found = {}
    for machine in options.on:
        print(f"\n{machine}: " + " ".join(f"{name}={value}" for name, value in MACHINES[machine].items()), flush=True)
        found[machine] = run(machine, options.tests)
    print()
    for machine, (failed, summary) in found.items():
        print(f"{machine:<12} {summary}", *(f"    {name}" for name in failed), sep="\n")
    return 1 if any(failed for failed, _ in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
