"""The comparisons of lesson 07 that it has no time to train: detectors with and without a pyramid, decoders of masks.

    python -m benchmarks.lesson_dense            every run that runs/lesson_dense.jsonl lacks, then results
    python -m benchmarks.lesson_dense --runs 6   six of them, to share a machine; results of who is finished

Scenes of 64 × 64 pixels, five kinds of clothing, 1 500 of them to train on. Detectors: FCOS on one small CoAtNet; its
last map alone (stride 16), its finest map alone (stride 4), or the pyramid of all three. Decoders of masks: a U-Net on
the same CoAtNet, with and without skip connections; UNETR with and without, Segmenter, and EoMT, on one small ViT.

Every entry has 200 steps of 16 scenes, at its own best rate. "tune" rows: one seed, judged by 200 scenes of the split
``val``. While the best rate lies at the end of its range, the range grows. "test" rows: the chosen rate, three seeds
(other weights at the start, other order), judged by 300 scenes of ``test``, by which nothing was chosen.
"""

import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import vitcourse
from benchmarks.lesson_tuning import RATES, widened
from benchmarks.sweeps import SEEDS, Row, sweep
from vitcourse.data import scenes
from vitcourse.dense_prediction import (
    DetectionMetric,
    Eomt,
    Fcos,
    FcosLoss,
    SegmentationMetric,
    Segmenter,
    UNet,
    Unetr,
    mean_loss,
    to_masks,
)
from vitcourse.dense_prediction.fcos import FcosOutput, Points, points_of
from vitcourse.inference import evaluating

SIDE, STEPS, BATCH, LOOKS = 64, 200, 16, 5
COUNTS = {"train": 1500, "val": 200, "test": 300}
SCENES = {"objects": (1, 4), "scale": (0.12, 0.5)}
KINDS = ("top", "trousers", "dress", "shoe", "bag")
KIND_OF = torch.tensor([0, 1, 0, 2, 0, 3, 0, 3, 4, 3])  # of each of Fashion-MNIST's classes
SMALL = 10  # pixels: below its square an object is small, above nine times that large
COATNET = {"stem_dim": 16, "embed_dim": (32, 48, 96), "depths": (1, 1, 2), "strides": (2, 2, 2), "layout": "CCT"}
VIT = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
SPANS = ((0.0, 10.5), (10.5, 20.5), (20.5, float("inf")))
DETECTORS = {"one map": [2], "pyramid": [0, 1, 2], "finest map": [0]}
NAMES = (
    *("one map", "pyramid", "U-Net", "U-Net, no skips"),
    *("Segmenter", "EoMT", "UNETR", "finest map", "UNETR, no skips"),
)
FIRST = (1e-3, 3e-3, 1e-2)  # the rates that every search starts with


def wanted(rows: list[Row]) -> Iterator[Row]:
    """Every run, given the rows of those before it."""
    for name in NAMES:
        rates, before = FIRST, None
        while rates != before:
            for lr in rates:
                yield {"name": name, "stage": "tune", "lr": lr, "seed": 0}
            best = max((r for r in rows if r["name"] == name and r["stage"] == "tune"), key=lambda r: r["accuracy"])
            before, rates = rates, widened(rates, RATES, best["lr"])
        for seed in SEEDS:
            yield {"name": name, "stage": "test", "lr": best["lr"], "seed": seed}


# ------------------------------------------------------------------------------------------------------- the scenes


@cache
def load(split: str) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images (N, 3, 64, 64), normalised, and targets: boxes, labels, and a map with 0 for the ground, else kind + 1."""
    data = scenes(split, img_size=SIDE, **SCENES)
    table = torch.cat([torch.zeros(1, dtype=torch.int64), KIND_OF + 1])
    images, targets = [], []
    for i in range(COUNTS[split]):
        image, target = data[i]
        images.append(image.as_subclass(Tensor))
        found = {"boxes": target["boxes"].as_subclass(Tensor), "labels": KIND_OF[target["labels"]]}
        targets.append({**found, "map": table[target["semantic"].as_subclass(Tensor)]})
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    return (torch.stack(images) / 255 - mean) / std, targets


# ------------------------------------------------------------------------------------------------------- the models


class SpannedFcos(Fcos):
    """FCOS whose levels share out boxes of at most 64 pixels; its own spans are for pictures of a thousand."""

    def points(self, output: FcosOutput) -> Points:
        points = points_of(output.sizes, self.strides)
        spans = SPANS if len(self.strides) > 1 else ((0.0, float("inf")),)
        rows = [torch.tensor(span).expand(h * w, 2) for span, (h, w) in zip(spans, output.sizes, strict=True)]
        return points._replace(span=torch.cat(rows))


def build(name: str) -> nn.Module:
    if name in DETECTORS or name.startswith("U-Net"):
        body = vitcourse.create_model("coatnet_0", img_size=SIDE, num_classes=0, **COATNET)
    else:
        body = vitcourse.create_model("vit_tiny", img_size=SIDE, num_classes=0, **VIT)
    classes, skips = len(KINDS) + 1, not name.endswith("no skips")
    if name in DETECTORS:
        model = SpannedFcos(body, len(KINDS), channels=32, levels=DETECTORS[name], extra="", num_convs=1)
        model.criterion = FcosLoss(radius=None)
        return model
    if name.startswith("UNETR"):
        return Unetr(body, classes, channels=8, skips=skips)
    if name == "Segmenter":
        return Segmenter(body, classes, depth=1, num_heads=3)
    if name == "EoMT":
        return Eomt(body, classes, num_queries=10, num_blocks=2)
    return UNet(body, classes, channels=8, skips=skips)


def targets_of(model: nn.Module, targets: list[dict[str, Tensor]]) -> Any:
    """What the model's loss wants: boxes, a map, or a mask for each class that there is."""
    if model.wants == "boxes":
        return targets
    maps = torch.stack([target["map"] for target in targets])
    return maps if model.wants == "map" else [to_masks(one) for one in maps]


@torch.no_grad()
def judged(model: nn.Module, split: str) -> Row:
    images, targets = load(split)
    boxes = DetectionMetric(small=SMALL)
    kinds, cloth = SegmentationMetric(len(KINDS) + 1), SegmentationMetric(2, boundary=1)
    with evaluating(model):
        for start in range(0, len(images), 50):
            output, part = model(images[start : start + 50]), targets[start : start + 50]
            if model.wants == "boxes":
                boxes.update(model.results(output), part)
            else:
                found, maps = model.segment(output).argmax(1), torch.stack([target["map"] for target in part])
                kinds.update(found, maps)
                cloth.update((found > 0).long(), (maps > 0).long())
    if model.wants == "boxes":
        found = {name: value or 0.0 for name, value in boxes.compute().items()}
        return {"accuracy": found["map_50"], **found}
    of_cloth = cloth.compute()
    found = kinds.compute()
    return {
        "accuracy": found["miou"],
        **found,
        "cloth_iou": of_cloth["miou"],
        "cloth_edge": of_cloth["boundary_accuracy"],
    }


# --------------------------------------------------------------------------------------------------------- one run


def train(run: Row) -> Row:
    torch.manual_seed(run["seed"])
    model, (images, targets) = build(run["name"]), load("train")
    split = "val" if run["stage"] == "tune" else "test"
    optimizer = torch.optim.AdamW(model.parameters(), lr=run["lr"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run["lr"], total_steps=STEPS + 1, pct_start=0.15)
    spent, curve = 0.0, []
    for step in range(1, STEPS + 1):
        where = torch.randint(len(images), (BATCH,)).tolist()
        began = time.process_time()
        model.train()
        if isinstance(model, Eomt):
            model.anneal(step, STEPS)
        loss = mean_loss(model.losses(model(images[where]), targets_of(model, [targets[i] for i in where])))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        spent += time.process_time() - began
        if not loss.isfinite():
            return {"accuracy": 0.0, "failed": f"loss {loss.item()} in step {step}"}
        if run["stage"] == "test" and step % (STEPS // LOOKS) == 0:
            curve.append({"step": step, "cpu_seconds": round(spent, 1), "accuracy": judged(model, split)["accuracy"]})
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": round(spent, 1),
        "loss": loss.item(),
    }
    return row | judged(model, split) | ({"curve": curve} if curve else {})


if __name__ == "__main__":
    sweep("lesson_dense", __doc__, wanted, train, whole="name")
