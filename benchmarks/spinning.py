"""What does it cost that threads wait in a loop, when several programs share the cores?

    python -m benchmarks.spinning

The same training steps of a small ViT, alone and in several programs at once, for several settings of how OpenMP's
threads wait (`vitcourse/startup.py` chooses one). The settings are run in turns, in alternating order; seconds of the
last program to end, medians over the rounds. Nothing else may run. Results: ``spinning.json``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from benchmarks.common import write_results
from vitcourse.startup import WAITING

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
AT_ONCE = (1, 2, 3)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # as many as there are cores, which is PyTorch's default


class Program:
    """A process that trains when it is told to, and says how long it took."""

    def __init__(self, setting: dict[str, str]) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in (*WAITING, *THREADS)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import torch; from benchmarks.spinning import serve; serve()"],
            env=environment | setting,  # torch comes first: the course adds nothing to it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, steps: int) -> None:
        print(steps, file=self._process.stdin, flush=True)

    def answer(self) -> float:
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """The child: train as many steps as each line of stdin says."""
    import torch
    from torch.nn import functional as F

    from vitcourse import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = torch.randn(16, 1, 28, 28), torch.randint(10, (16,))
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(time.perf_counter() - start, flush=True)


def together(programs: list[Program], steps: int) -> float:
    """Seconds until all of them have made their steps."""
    start = time.perf_counter()
    for program in programs:
        program.tell(steps)
    for program in programs:
        program.answer()
    return time.perf_counter() - start


def measure(steps: int, rounds: int) -> list[dict]:
    """A row per setting and number of programs."""
    programs = {name: [Program(setting) for _ in range(max(AT_ONCE))] for name, setting in SETTINGS.items()}
    for program in sum(programs.values(), []):
        together([program], 5)  # imports, and warms up
    taken: dict[tuple[str, int], list[float]] = {(name, k): [] for k in AT_ONCE for name in SETTINGS}
    for i in range(rounds):
        for name, k in list(taken) if i % 2 else reversed(taken):
            taken[name, k].append(together(programs[name][:k], steps))
    for program in sum(programs.values(), []):
        program.end()
    return [
        {
            "setting": name,
            "programs": k,
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "steps": steps,
            "rounds": rounds,
            "cores": os.cpu_count(),
        }
        for (name, k), seconds in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = measure(options.steps, options.rounds)
    for row in rows:
        print(f"{row['setting']:<26}{row['programs']} at once: {row['seconds']:6.2f} s")
    write_results("spinning", rows)


if __name__ == "__main__":
    main()
