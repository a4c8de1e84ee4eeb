"""What does it cost that threads wait in a loop, when several programs share the cores?

    python -m benchmarks.spinning

The same training steps of a small ViT, alone and in several programs at once, for several settings of how OpenMP's
threads wait (`vitcourse/startup.py` chooses one). The settings are run in turns, in alternating order; seconds until
the last program has made its steps, medians over the rounds. Nothing else may run. Results: ``spinning.json``.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common import write_results
from vitcourse.startup import WAITING

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
AT_ONCE = (1, 2, 3)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # left to PyTorch, which takes one for each core


def train(ready: Any, steps: int) -> None:
    """One program: make the model and a few steps, wait for the others, and make the steps that are timed."""
    import torch
    from torch.nn import functional as F

    from vitcourse import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = torch.randn(16, 1, 28, 28), torch.randint(10, (16,))
    for step in range(-5, steps):
        if step == 0:
            ready.wait()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def serve() -> None:
    """A process of one setting: for each line of stdin, ``programs steps``, the seconds that they take.

    It imports PyTorch, which reads the setting, computes nothing, and forks the programs.
    """
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        programs, steps = map(int, line.split())
        ready = context.Barrier(programs + 1)
        running = [context.Process(target=train, args=(ready, steps)) for _ in range(programs)]
        for program in running:
            program.start()
        ready.wait()
        start = time.perf_counter()
        for program in running:
            program.join()
        print(time.perf_counter() - start, flush=True)


def start(setting: dict[str, str]) -> subprocess.Popen:
    """Start the process of a setting. In it torch comes first: the course adds nothing of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in (*WAITING, *THREADS)}
    code = "import torch, vitcourse.vit; from benchmarks.spinning import serve; serve()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment | setting, **pipes)


def measure(steps: int, rounds: int, at_once: Sequence[int] = AT_ONCE) -> list[dict[str, Any]]:
    """A row per setting and number of programs."""
    servers = {name: start(setting) for name, setting in SETTINGS.items()}

    def seconds(name: str, programs: int, steps: int) -> float:
        print(programs, steps, file=servers[name].stdin, flush=True)
        return float(servers[name].stdout.readline())

    for name in SETTINGS:
        seconds(name, 1, 1)  # imports
    taken: dict[tuple[str, int], list[float]] = {(name, programs): [] for programs in at_once for name in SETTINGS}
    for i in range(rounds):
        for name, programs in reversed(taken) if i % 2 else list(taken):
            taken[name, programs].append(seconds(name, programs, steps))
            print(f"{name:<26}{programs} at once: {taken[name, programs][-1]:6.2f} s", flush=True)
    for server in servers.values():
        server.stdin.close()
        server.wait()
    return [
        {"setting": name, "programs": programs, "seconds": statistics.median(found)}
        | {"fastest": min(found), "slowest": max(found), "steps": steps, "rounds": rounds, "cores": os.cpu_count()}
        for (name, programs), found in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", type=int, nargs="+", default=AT_ONCE, help="so many at once")
    options = parser.parse_args()
    write_results("spinning", measure(options.steps, options.rounds, options.programs))


if __name__ == "__main__":
    main()
