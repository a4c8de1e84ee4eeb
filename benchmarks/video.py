"""Do our models of clips cost more than transformers' TimeSformer and torchvision's Video Swin?

    python -m benchmarks.video                           small clips, inference and a step of training
    python -m benchmarks.video --full                    and 224 pixels, the models of the papers: minutes on a CPU
    python -m benchmarks.video --only swin --rounds 31   one of them; the other rows of the file are kept

Same weights, same clips, same run, in turns; before anything is timed, both must say the same. A step of training is
the forward pass, the gradient and AdamW. Results: ``video_<device type>.json``.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import default_device, in_turns, ratio, with_earlier, write_results
from vitcourse import load_weights
from vitcourse.video import TimeSformer, VideoSwin

TARGET = 1.03  # ours over theirs, at most
Pair = tuple[nn.Module, nn.Module, str, Callable[[nn.Module, Tensor], Tensor]]
CLIPS = {  # frames, height and width
    "small": {"timesformer": (8, 96, 96), "swin": (8, 96, 96)},
    "full": {"timesformer": (8, 224, 224), "swin": (16, 224, 224)},
}


def timesformer(kind: str, size: str) -> Pair:
    """Ours, the peer, whose it is, and how its logits are asked for."""
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    width, depth, heads = (192, 4, 3) if size == "small" else (768, 12, 12)
    frames, side, _ = CLIPS[size]["timesformer"]
    config = TimesformerConfig(
        image_size=side,
        num_frames=frames,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=400,
        attention_type=f"{kind}_space_time",
    )
    ours = TimeSformer(
        side, num_frames=frames, attention_type=kind, embed_dim=width, depth=depth, num_heads=heads, num_classes=400
    )
    peer = TimesformerForVideoClassification(config)
    return ours, peer, "transformers", lambda model, clips: model(clips.transpose(1, 2)).logits


def swin(size: str) -> Pair:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    shape = {"depths": (2, 2), "num_heads": (3, 6)} if size == "small" else {}
    shape = {"depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), **shape}
    lists = {name: list(numbers) for name, numbers in shape.items()}
    peer = SwinTransformer3d([2, 4, 4], 96, **lists, window_size=[8, 7, 7], stochastic_depth_prob=0.0)
    return VideoSwin(**shape), peer, "torchvision", lambda model, clips: model(clips)


PAIRS: dict[str, Callable[[str], Pair]] = {
    "timesformer_divided": lambda size: timesformer("divided", size),
    "timesformer_joint": lambda size: timesformer("joint", size),
    "swin": swin,
}


def check_same(ours: Tensor, theirs: Tensor) -> None:
    """Raise RuntimeError unless both say the same: whoever computes less is faster."""
    error = (ours - theirs).abs().max() / theirs.abs().max()
    if not error < 1e-3:
        raise RuntimeError(f"the two models differ by {error:.1e} of their largest logit; nothing was timed")


def steps(name: str, size: str, mode: str, batch: int, device: str) -> tuple[dict[str, Callable[[], Any]], str]:
    """What is timed of each side, and whose the peer is."""
    torch.manual_seed(0)
    ours, peer, whose, ask = PAIRS[name](size)
    for parameter in peer.parameters():  # among others the layer after attention along time, which starts at zero
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else None
    ours, peer = load_weights(ours, peer).to(device), peer.to(device)
    clips = torch.randn(batch, 3, *CLIPS[size][name.partition("_")[0]], device=device)
    with torch.no_grad():
        check_same(ours.eval()(clips), ask(peer.eval(), clips))
    labels = torch.randint(0, 400, (batch,), device=device)
    asked = {"ours": (ours, ours), whose: (peer, lambda x: ask(peer, x))}
    run = trained if mode == "training" else inferred
    return {side: run(model, logits, clips, labels) for side, (model, logits) in asked.items()}, whose


def inferred(model: nn.Module, logits: Callable, clips: Tensor, labels: Tensor) -> Callable[[], Any]:
    model.eval()
    return torch.inference_mode()(lambda: logits(clips))


def trained(model: nn.Module, logits: Callable, clips: Tensor, labels: Tensor) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def step() -> None:
        F.cross_entropy(logits(clips), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, size: str, mode: str, batch: int, rounds: int, device: str) -> dict[str, Any]:
    """One row: clips a second of both, and the ratio of our time to the peer's."""
    timed, peer = steps(name, size, mode, batch, device)
    taken = in_turns(timed, device, rounds, warmup=2)
    return {
        "model": name,
        "size": size,
        "mode": mode,
        "peer": peer,
        "clips": f"{batch} × {' × '.join(map(str, CLIPS[size][name.partition('_')[0]]))}",
        "rounds": rounds,
        **ratio(taken["ours"], taken[peer]),
        "ours_clips_per_second": batch / min(taken["ours"]),
        "theirs_clips_per_second": batch / min(taken[peer]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--full", action="store_true", help="also the models of the papers, at 224 pixels")
    parser.add_argument("--rounds", type=int, default=15, help="of small clips; the full ones have a third, 5 at least")
    parser.add_argument("--batch", type=int, default=None, help="clips a step: 2 on a CPU (full: 1), 16 elsewhere")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for both sides alike")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    file = f"video_{torch.device(args.device).type}"
    for size in ("small", "full") if args.full else ("small",):
        rounds = args.rounds if size == "small" else max(5, args.rounds // 3)
        batch = args.batch or ((2 if size == "small" else 1) if args.device == "cpu" else 16)
        for name in args.only:
            for mode in ("inference", "training"):
                row = measure(name, size, mode, batch, rounds, args.device)
                verdict = "" if row["ratio"] <= TARGET else f"  slower than {TARGET}"
                print(f"{name} {size} {mode} / {row['peer']}: {row['ratio']:.3f}{verdict}", flush=True)
                rows = with_earlier(file, [row], args.device, lambda r: (r["size"], r["model"], r["mode"]))
                write_results(file, sorted(rows, key=order), args.device)


def order(row: dict[str, Any]) -> tuple[int, int, str]:
    return list(CLIPS).index(row["size"]), list(PAIRS).index(row["model"]), row["mode"]


if __name__ == "__main__":
    main()
