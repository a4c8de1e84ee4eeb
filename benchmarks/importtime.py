"""What does ``import vitcourse`` cost over ``import torch``? At most 0.3 s is the aim.

    python -m benchmarks.importtime

Each import runs in fresh interpreters, in turns; seconds of processor time, medians. Results: ``importtime.json``.
"""

import argparse
import statistics
import subprocess
import sys

import torch

from benchmarks.common import write_results

STATEMENTS = (
    "import vitcourse",
    "from vitcourse import VisionTransformer, create_model, list_models, load_weights",
)
CHILD = """
import time
start = time.process_time()
import torch
between = time.process_time()
{statement}
print(between - start, time.process_time() - between)
"""


def import_seconds(statement: str) -> tuple[float, float]:
    """Seconds for ``import torch`` in a fresh interpreter, and for ``statement`` after it."""
    code = CHILD.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch_seconds, own_seconds = map(float, done.stdout.split())
    return torch_seconds, own_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)  # an import uses one
    taken = {statement: [] for statement in STATEMENTS}
    for _ in range(rounds):
        for statement in STATEMENTS:
            taken[statement].append(import_seconds(statement))
    rows = []
    for statement, times in taken.items():
        torch_seconds, own_seconds = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(
            {"statement": statement, "seconds": own_seconds, "import_torch_seconds": torch_seconds, "rounds": rounds}
        )
        print(f"{statement}: {own_seconds:.3f} s over import torch ({torch_seconds:.2f} s)")
    write_results("importtime", rows)


if __name__ == "__main__":
    main()
