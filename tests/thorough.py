"""Run the tests on machines like many, as far as this one can pretend to be them.

    python -m tests.thorough                                  all of them: about seven minutes each on two cores
    python -m tests.thorough --stale                          only what has changed since it ran there
    python -m tests.thorough --on avx2 threads -- tests/test_vit.py -k compiles

What follows ``--`` is for pytest, and such a run is not recorded. Every machine runs the same tests, but for ``here``,
which runs those that take minutes. The last lines say which of them failed where. ``oldest`` is no pretence: `make
oldest` runs it where the oldest supported versions are installed.

``reports/thorough.json`` has a row for each machine and test file, with the fingerprint of what ran
(``tests/stems.py``). Rows may be older than the code: a third of those of a machine at most, and once there is one,
none may be missing or failed (``test_thorough.py``). So a change costs no rerun of everything, and no file is forgotten
for long.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from tests.stems import DOCTESTS, files_of_tests, fingerprint

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
MACHINES |= {"here": {}, "oldest": {}}
PRETENDED = [name for name in MACHINES if name != "oldest"]
REPORT = Path(__file__).parent / "reports" / "thorough.json"
MOST_STALE = 1 / 3
# On the stranger's machine, a file that we read or write without saying how it is encoded is an error. (Of what another
# process says, subprocess asks the same, in a sentence with a full stop: both have one locale.)
UNSAID = [
    f"error:'encoding' argument not specified$:EncodingWarning:{ours}" for ours in ("vitcourse", "benchmarks", "test")
]


def run(machine: str, arguments: list[str]) -> dict[str, list[str]]:
    """Run tests on a machine: by file, how many there were and which failed, as ``{file: [failed, …]}``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")} | MACHINES[machine]
    with tempfile.TemporaryDirectory() as folder:
        # Inductor would take for its own what it has compiled for another machine.
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        report = Path(folder) / "report.xml"
        marks = "thorough" if machine == "here" else "not slow and not thorough"
        command = [sys.executable, "-m", "pytest", "-q", "-m", marks, f"--junit-xml={report}"]
        command += ["-p", "no:cacheprovider"]
        command += ["--override-ini=filterwarnings=" + "\n".join(UNSAID), *arguments]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    found: dict[str, list[str]] = {}
    for case in cases:
        failed = found.setdefault(file_of(case.get("classname", "")), [])
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    if status not in (0, 5) and not any(found.values()):  # 5: no test of these marks
        found[""] = [f"pytest ended with status {status}"]
    return found


def file_of(classname: str) -> str:
    """The entry of a case in JUnit's report.

    >>> file_of("tests.test_vit"), file_of("vitcourse.layers")
    ('tests/test_vit.py', 'vitcourse')
    """
    first, _, rest = classname.partition(".")
    return f"tests/{rest.partition('.')[0]}.py" if first == "tests" and rest.startswith("test_") else DOCTESTS


def rows() -> list[dict[str, Any]]:
    """What ran, and when: machine, file, fingerprint, failed, date."""
    return json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else []


def record(machine: str, files: dict[str, str], failed: dict[str, list[str]]) -> None:
    """Replace the rows of `files`, given with the fingerprints that they had when they were run."""
    today = datetime.date.today().isoformat()
    kept = [row for row in rows() if row["machine"] != machine or row["file"] not in files]
    kept += [
        {"machine": machine, "file": file, "fingerprint": mark, "failed": failed.get(file, []), "date": today}
        for file, mark in files.items()
    ]
    kept.sort(key=lambda row: (row["machine"], row["file"]))
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept) + "\n]\n", encoding="utf-8")


def stale(machine: str) -> list[str]:
    """The test files that have no row of this machine, or one of another fingerprint."""
    ran = {row["file"]: row["fingerprint"] for row in rows() if row["machine"] == machine}
    return [file for file in files_of_tests() if ran.get(file) != fingerprint(file)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", nargs="+", choices=MACHINES, default=PRETENDED, metavar="MACHINE")
    parser.add_argument("--stale", action="store_true", help="only test files that have changed since they ran there")
    parser.add_argument("--workers", type=int, default=1, help="processes of pytest-xdist")
    parser.add_argument("tests", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    parallel = ["-n", str(options.workers), "--dist", "loadfile"] if options.workers > 1 else []
    found = {}
    for machine in options.on:
        print(f"\n{machine}: " + " ".join(f"{name}={value}" for name, value in MACHINES[machine].items()), flush=True)
        files = {file: fingerprint(file) for file in (stale(machine) if options.stale else files_of_tests())}
        if not files:
            continue
        failed = run(machine, parallel + (options.tests or list(files)))
        found[machine] = sum(failed.values(), [])
        if not options.tests and "" not in failed:
            record(machine, files, failed)
    print()
    for machine, names in found.items():
        print(f"{machine:<12} {len(names)} failed", *(f"    {name}" for name in names), sep="\n")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
