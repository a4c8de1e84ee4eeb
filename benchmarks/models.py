"""Are our models ever slower than timm's and torchvision's?

    python -m benchmarks.models                              all models, on a GPU where there is one
    python -m benchmarks.models --only "vit*" --modes eager  some of them; the other rows of the file are kept

Same shapes, same run, in turns. Inference, and a training step: forward, backward, AdamW. A GPU runs in 16 bits by
autocast, bfloat16 where it has that. Results: ``models_<device type>.json``.
"""

import argparse
import fnmatch
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import default_device, in_turns, ratio, with_earlier, write_results
from vitcourse import create_model
from vitcourse.devices import half_dtype

TARGET = 1.02  # ours over theirs, at most


@dataclass(frozen=True)
class Pair:
    """A model of ours and the peer that it is compared with; batch sizes on a CPU and on a GPU."""

    model: str
    peer: str
    batch_cpu: int
    batch_gpu: int
    img_size: int = 224
    options: tuple[tuple[str, Any], ...] = ()  # of our model, where the peer's default differs


PAIRS = (
    Pair("vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", 8, 256),
    Pair("vit_small_patch16_224", "timm:vit_small_patch16_224", 4, 256),
    Pair("vit_base_patch16_224", "timm:vit_base_patch16_224", 2, 128),
    Pair("vit_base_patch16_224", "torchvision:vit_b_16", 2, 128),
    Pair("swin_tiny_patch4_window7_224", "timm:swin_tiny_patch4_window7_224", 2, 128),
    Pair("swin_tiny_patch4_window7_224", "torchvision:swin_t", 2, 128),
    Pair("coatnet_0", "timm:coatnet_0_224", 2, 128, options=(("downsample", "depthwise"),)),
)


def build_peer(peer: str) -> nn.Module:
    """``"timm:NAME"`` or ``"torchvision:NAME"``, without weights and without stochastic depth."""
    library, _, name = peer.partition(":")
    if library == "timm":
        return import_module("timm").create_model(name, drop_path_rate=0.0)
    torchvision = import_module("torchvision")
    model = torchvision.models.get_model(name)
    for module in model.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    return model


def autocast(images: Tensor) -> torch.autocast:
    return torch.autocast(images.device.type, half_dtype(images.device), enabled=images.is_cuda)


def inference(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    model.eval()

    def step() -> None:
        with torch.inference_mode(), autocast(images):
            model(images)

    return step


def training(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    model.train()
    labels = torch.arange(len(images), device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with autocast(images):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS = {"inference": inference, "training": training}


def measure(pair: Pair, kind: str, mode: str, device: str, rounds: int) -> dict[str, Any]:
    """One row: both models' times and the ratio of ours to theirs."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    batch = pair.batch_cpu if device == "cpu" else pair.batch_gpu
    images = torch.randn(batch, 3, pair.img_size, pair.img_size, device=device)
    models = {
        "ours": create_model(pair.model, drop_path_rate=0.0, **dict(pair.options)),
        "theirs": build_peer(pair.peer),
    }
    steps = {}
    for name, model in models.items():
        model = model.to(device)
        steps[name] = STEPS[kind](torch.compile(model) if mode == "compiled" else model, images)
    taken = in_turns(steps, device, rounds)
    return {
        "model": pair.model,
        "peer": pair.peer,
        "step": kind,
        "mode": mode,
        "batch": batch,
        "img_size": pair.img_size,
        "rounds": rounds,
        **ratio(taken["ours"], taken["theirs"]),
        "ours_seconds": min(taken["ours"]),
        "theirs_seconds": min(taken["theirs"]),
    }


def merged(name: str, rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """These rows, and those of an earlier run, in the order of ``PAIRS``."""
    table = {_key(row): row for row in with_earlier(name, rows, device, _key)}
    order = [(pair.model, pair.peer, kind, mode) for pair in PAIRS for kind in STEPS for mode in ("eager", "compiled")]
    return [table[key] for key in order if key in table]


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["model"], row["peer"], row["step"], row["mode"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--only", default="*", help="shell wildcard for our models' names")
    parser.add_argument("--peers", default="*", help="shell wildcard for the peers' names")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for both sides alike")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    name = f"models_{torch.device(args.device).type}"
    for pair in PAIRS:
        if not (fnmatch.fnmatch(pair.model, args.only) and fnmatch.fnmatch(pair.peer, args.peers)):
            continue
        try:
            build_peer(pair.peer)
        except ImportError as error:
            print(f"skipped {pair.peer}: {error}", file=sys.stderr)
            continue
        for kind in args.steps:
            for mode in args.modes:
                row = measure(pair, kind, mode, args.device, args.rounds)
                verdict = "" if row["ratio"] <= TARGET else f"  slower than {TARGET}"
                print(f"{pair.model} / {pair.peer} {kind} {mode}: {row['ratio']:.3f}{verdict}", flush=True)
                write_results(name, merged(name, [row], args.device), args.device)


if __name__ == "__main__":
    main()
