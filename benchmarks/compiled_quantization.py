"""Quantized models under torch.compile: ours against torchao's, which is written to be compiled.

    python -m benchmarks.compiled_quantization    needs torchao and a C++ compiler; five minutes on one core

A whole ViT-B, one image, on a CPU, all models in turns: float32, ours and torchao's, each as it is and compiled, with
weights frozen, which is when inductor packs them for its integer kernels. ``benchmarks.quantization`` has the rest.
Results: ``compiled_quantization_cpu.json``.
"""

import argparse
from copy import deepcopy
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from benchmarks.common import in_turns, ratio, write_results
from benchmarks.quantization import step, torchao_peers
from vitcourse import create_model
from vitcourse.hardware.quantize import quantize_model


def contestants(model: nn.Module) -> dict[str, nn.Module]:
    """The real model, and for each scheme that torchao has here ours and its."""
    models = {"real": model}
    for scheme, apply in torchao_peers("cpu").items():
        models[f"ours {scheme}"] = quantize_model(model, scheme)
        models[f"torchao {scheme}"] = deepcopy(model)
        apply(models[f"torchao {scheme}"])
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for all alike")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._inductor.config.freezing = True

    torch.manual_seed(0)
    models = contestants(create_model("vit_base_patch16_224").eval())
    if len(models) == 1:
        raise SystemExit("torchao is not installed: pip install torchao")
    images, steps = torch.randn(1, 3, 224, 224), {}
    for name, model in models.items():
        steps[name, "eager"] = step(model, images, 1)
        steps[name, "compiled"] = step(torch.compile(deepcopy(model)), images, 1)
        steps[name, "compiled"]()
        print("compiled", name, flush=True)
    taken = in_turns({" ".join(key): work for key, work in steps.items()}, "cpu", args.rounds)

    rows: list[dict[str, Any]] = []
    for scheme in torchao_peers("cpu"):
        for peer in ("real", f"torchao {scheme}"):
            for mode in ("eager", "compiled"):
                ours, theirs = taken[f"ours {scheme} {mode}"], taken[f"{peer} {mode}"]
                times = {"ours_seconds": min(ours), "theirs_seconds": min(theirs)}
                mark = {"model": "vit_base_patch16_224", "batch": 1, "scheme": scheme, "peer": peer, "mode": mode}
                rows.append({**mark, "torchao": version("torchao"), **ratio(ours, theirs), **times})
                print(f"{scheme} / {peer}, {mode}: {rows[-1]['ratio']:.3f}", flush=True)
    write_results("compiled_quantization_cpu", rows)


if __name__ == "__main__":
    main()
