"""Which DETR converges within a lesson? Small variants on small scenes, the same budget of steps each.

    python -m benchmarks.detr_feasibility --list
    python -m benchmarks.detr_feasibility --only plain proposals+denoising --seeds 0 --steps 600

Simple scenes are discs, squares and triangles of one colour each, on noise; ``--scenes rendered`` takes those of
``vitcourse.data.scenes``. What is reported: mean average precision on scenes that were not trained on, as the training
goes on, and CPU seconds. Results: ``detr_feasibility.json``.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import read_results, write_results
from vitcourse import create_model
from vitcourse.dense_prediction import DetectionMetric, mean_loss
from vitcourse.inference import evaluating

NAME = "detr_feasibility"
POOL = 2000  # scenes that are trained on
SMALL = {"embed_dim": 64, "num_heads": 4, "encoder_depth": 1, "decoder_depth": 3, "mlp_dim": 128, "dropout": 0.0}
PLAIN = {"backbone": "vit_tiny", "backbone_args": {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}}
FINE = {"backbone": "vit_tiny", "backbone_args": {**PLAIN["backbone_args"], "patch_size": 4}}
STEM = {"backbone": "convvit_tiny", "backbone_args": PLAIN["backbone_args"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_queries": 50},
    "few": {"num_queries": 10},
    "few+fine": {"num_queries": 10, **FINE},
    "few+stem": {"num_queries": 10, **STEM},
    "anchors": {"num_queries": 10, "queries": "anchors"},
    "proposals": {"num_queries": 10, "queries": "proposals"},
    "few+denoising": {"num_queries": 10, "denoising": 4},
    "anchors+denoising": {"num_queries": 10, "queries": "anchors", "denoising": 4},
    "proposals+denoising": {"num_queries": 10, "queries": "proposals", "denoising": 4},
    "proposals+denoising+stem": {"num_queries": 10, "queries": "proposals", "denoising": 4, **STEM},
}
Scene = tuple[Tensor, dict[str, Tensor]]


def simple_scene(number: int, side: int) -> Scene:
    """One to three shapes on noise: an image (3, side, side) in 0 to 1, and its target."""
    random = torch.Generator().manual_seed(number)
    image = 0.5 + 0.15 * torch.randn(3, side, side, generator=random)
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    boxes, labels = [], []
    for _ in range(int(torch.randint(1, 4, (), generator=random))):
        size = int(torch.randint(side // 6, side // 3, (), generator=random))
        left, top = torch.randint(0, side - size, (2,), generator=random).tolist()
        label = int(torch.randint(0, 3, (), generator=random))
        x, y = (xs - left + 0.5) / size, (ys - top + 0.5) / size
        inside = (x > 0) & (x < 1) & (y > 0) & (y < 1)
        shape = (inside, (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.25, inside & ((x - 0.5).abs() * 2 < y))[label]
        colour = torch.rand(3, generator=random)
        image = torch.where(shape, colour[:, None, None], image)
        boxes.append([left, top, left + size, top + size])
        labels.append(label)
    return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}


class SimpleScenes:
    """As many simple scenes as anybody asks for; number i is always the same."""

    classes = ("square", "disc", "triangle")

    def __init__(self, side: int, first: int) -> None:
        self.side, self.first = side, first

    def __getitem__(self, i: int) -> Scene:
        return simple_scene(self.first + i, self.side)


class RenderedScenes:
    """The course's own scenes, one to three objects each, as floating point."""

    def __init__(self, side: int, split: str) -> None:
        from vitcourse.data.scenes import scenes

        self.scenes = scenes(split, img_size=side, objects=(1, 3))
        self.classes = self.scenes.classes

    def __getitem__(self, i: int) -> Scene:
        image, target = self.scenes[i % len(self.scenes)]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.scenes.mean, self.scenes.std))
        plain = {key: target[key].as_subclass(Tensor) for key in ("boxes", "labels")}
        return (image.as_subclass(Tensor) / 255 - mean) / std, plain


def open_scenes(kind: str, side: int) -> tuple[Any, Any]:
    """Scenes to train on, and others."""
    if kind == "rendered":
        return RenderedScenes(side, "train"), RenderedScenes(side, "val")
    return SimpleScenes(side, 1_000_000), SimpleScenes(side, 0)


def batches(
    scenes: Any, size: int, steps: int, pool: int, seed: int
) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
    """Batches of a pool of scenes, which are rendered once."""
    kept = [scenes[i] for i in range(pool)]
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = [kept[i] for i in torch.randint(pool, (size,), generator=random).tolist()]
        yield torch.stack([image for image, _ in chosen]), [target for _, target in chosen]


@torch.no_grad()
def score(model: nn.Module, scenes: Any, count: int, side: int) -> dict[str, float | None]:
    """Mean average precision on the first scenes, and how different the images' answers are.

    A model that says the same for every image has a spread of 0: the standard deviation of boxes over images.
    """
    metric, boxes = DetectionMetric(small=side / 4), []
    with evaluating(model):
        for start in range(0, count, 32):
            images, targets = zip(*(scenes[i] for i in range(start, min(start + 32, count))), strict=True)
            output = model(torch.stack(images))
            metric.update(model.results(output), targets)
            boxes.append(output.boxes[-1])
    found = metric.compute()
    return {key: found[key] for key in ("map", "map_50")} | {"spread": torch.cat(boxes).std(0).mean().item()}


def run(variant: str, seed: int, kind: str, steps: int, side: int, batch: int, lr: float, looks: int) -> dict[str, Any]:
    """Train one variant, and look at it ``looks`` times on the way."""
    torch.manual_seed(seed)
    train, val = open_scenes(kind, side)
    model = create_model(
        "detr", img_size=side, num_classes=len(train.classes), **{**SMALL, **PLAIN, **VARIANTS[variant]}
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    curve, spent = [], 0.0
    for step, (images, targets) in enumerate(batches(train, batch, steps, POOL, seed), start=1):
        started = time.process_time()
        model.train()
        loss = mean_loss(model.losses(model(images, targets), targets))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        spent += time.process_time() - started
        if step % (steps // looks) == 0:
            curve.append({"step": step, "loss": loss.item(), "cpu_seconds": spent, **score(model, val, 128, side)})
            told = ", ".join(f"{k} {v:.3f}" for k, v in curve[-1].items() if isinstance(v, float))
            print(f"{variant}, seed {seed}, step {step}: {told}", flush=True)
    settings = {"scenes": kind, "steps": steps, "side": side, "batch": batch, "lr": lr}
    return {"variant": variant, "seed": seed, **settings, "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scenes", choices=("simple", "rendered"), default="simple")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--looks", type=int, default=4)
    parser.add_argument("--list", action="store_true", help="name the variants")
    args = parser.parse_args()
    if args.list:
        for name, arguments in VARIANTS.items():
            print(f"{name}: {arguments}")
        return
    torch.set_num_threads(1)
    for seed in args.seeds:
        for variant in args.only:
            row = run(variant, seed, args.scenes, args.steps, args.side, args.batch, args.lr, args.looks)
            keys = ("variant", "seed", "scenes", "steps", "side", "batch", "lr")
            earlier = (read_results(NAME) or {"rows": []})["rows"]
            rows = [old for old in earlier if any(old[k] != row[k] for k in keys)]
            write_results(NAME, [*rows, row])


if __name__ == "__main__":
    main()
