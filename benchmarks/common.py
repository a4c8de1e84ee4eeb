"""How everything here is measured and written down.

Two candidates are run in turns within one process, in alternating order, and compared round by round: whatever slows
the machine down for a while slows down both. A ratio is the median of the rounds' ratios; a time is the shortest.
"""

import argparse
import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import vitcourse
from vitcourse.devices import describe_device, resolve_device
from vitcourse.paths import results_dir

PACKAGES = ("torch", "torchvision", "triton", "timm")


def in_turns(steps: dict[str, Callable[[], Any]], device: str, rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds that each step takes, one entry a round; every round runs all of them, in alternating order.

    On a CPU they are seconds of processor time, which other people's programs disturb least; elsewhere of wall-clock
    time, with as many repetitions of each between two synchronisations as fill 50 ms.
    """
    for step in steps.values():
        for _ in range(warmup):
            step()
    number = {
        name: 1 if device == "cpu" else math.ceil(0.05 / seconds(step, device, 1)) for name, step in steps.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps) if i % 2 else reversed(steps):
            taken[name].append(seconds(steps[name], device, number[name]))
    return taken


def seconds(step: Callable[[], Any], device: str, number: int) -> float:
    """Seconds for one of ``number`` repetitions of ``step``."""
    if device == "cpu":
        start = time.process_time()
        for _ in range(number):
            step()
        return (time.process_time() - start) / number
    torch.accelerator.synchronize()
    start = time.perf_counter()
    for _ in range(number):
        step()
    torch.accelerator.synchronize()
    return (time.perf_counter() - start) / number


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """The same kernels, launched at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median and quartiles over the rounds of ours / theirs."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return {"ratio": middle, "ratio_low": low, "ratio_high": high}


def device_name(device: str) -> str:
    """What the device calls itself; for a CPU also how many threads are used."""
    if device != "cpu":
        return describe_device(torch.device(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{(models or [platform.machine()])[0]} CPU, {threads} thread{'s' * (threads > 1)}"


def default_device() -> str:
    """Where a benchmark runs that is not told: these know CUDA and the CPU."""
    return "cuda" if resolve_device().type == "cuda" else "cpu"


def require_kernels(parser: argparse.ArgumentParser) -> None:
    """End a benchmark of our attention kernels where they cannot run."""
    device = resolve_device()
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        parser.error(f"needs a CUDA device of compute capability 8.0, and this would run on {describe_device(device)}")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter to the numbers."""
    found = {"python": platform.python_version(), "vitcourse": vitcourse.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_results(name: str) -> dict[str, Any] | None:
    """The results that were written last under ``name``, or None."""
    path = results_dir() / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def with_earlier(
    name: str, rows: list[dict[str, Any]], device: str, key: Callable[[dict[str, Any]], Any]
) -> list[dict[str, Any]]:
    """The rows of an earlier run on the same device and versions, where they were not measured anew, and these."""
    earlier = read_results(name)
    if earlier is None or (earlier["device"], earlier["versions"]) != (device_name(device), versions()):
        return rows
    return list({key(row): row for row in [*earlier["rows"], *rows]}.values())


def write_results(name: str, rows: list[dict[str, Any]], device: str = "cpu") -> Path:
    """Write ``benchmarks/results/<name>.json``: rows, and what they were measured on, with what, and when."""
    record = {
        "benchmark": name,
        "device": device_name(device),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "rows": [{key: _rounded(value) for key, value in row.items()} for row in rows],
    }
    path = results_dir() / f"{name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
