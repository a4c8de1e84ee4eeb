"""Which DETR converges within a lesson? Variants on scenes of 64 pixels, the same number of steps each.

    python -m benchmarks.detr_feasibility            every run that runs/detr_feasibility.jsonl lacks, then results
    python -m benchmarks.detr_feasibility --runs 8   eight of them, to share a machine; results of who is finished

One variant learns everything anew. The others have the backbone that is shipped for it, which has learned to segment
such scenes and stays as it is: the maps of all images are computed once, and the detector alone learns. 500 steps of 16
scenes, those of lesson 07 with its five kinds of clothing; each variant has its own best rate. "tune" rows: one seed,
judged by 256 scenes of the split ``val``; while the best rate lies at the end of its range, the range grows. "test"
rows: the chosen rate, three seeds, judged by 512 scenes of ``test``.

``accuracy`` is mean average precision (IoU from 0.5 to 0.95, five kinds). ``curve`` has what it was on the way; with
``spread``, the standard deviation of boxes over images (0: the same answer for every image); and ``moved``, the share
of objects that were matched to another query at the look before.
"""

import time
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitcourse
from benchmarks.lesson_dense import KIND_OF, KINDS, SCENES, SMALL
from benchmarks.lesson_tuning import RATES, widened
from benchmarks.sweeps import SEEDS, Row, sweep
from vitcourse import paths
from vitcourse.data import scenes
from vitcourse.dense_prediction import DetectionMetric, Detr, mean_loss
from vitcourse.dense_prediction.boxes import Target
from vitcourse.dense_prediction.detr import as_parts
from vitcourse.inference import evaluating
from vitcourse.train import TrainConfig, learning_rate

SIDE = 64
STEPS, BATCH, POOL = 500, 16, 4000
LOOKS = 5  # at the model on its way
HELD_OUT, TESTED = 256, 512
SHIPPED = "scenes_segmenter.safetensors"
HEAD = {"embed_dim": 96, "num_heads": 4, "encoder_depth": 1, "decoder_depth": 3, "mlp_dim": 192, "dropout": 0.0}
PROPOSALS = {"num_queries": 10, "queries": "proposals"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_queries": 50},
    "few": {"num_queries": 10},
    "proposals": PROPOSALS,
    "proposals, denoising": {**PROPOSALS, "denoising": 4},
    "few, denoising": {"num_queries": 10, "denoising": 4},
    "few, finer tokens": {"num_queries": 10},
    "proposals, denoising, from scratch": {**PROPOSALS, "denoising": 4},
}
START = (3e-4, 1e-3, 3e-3)


class Given(nn.Module):
    """Stands for a backbone: its input is the map that the backbone has made."""

    num_classes, in_chans = 0, 3

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.img_size, self.feature_info = backbone.img_size, backbone.feature_info

    def feature_maps(self, x: Tensor, indices: Any = None) -> list[Tensor]:
        return [x]


class Pictures(NamedTuple):
    """What a detector sees (N, C, H, W), pictures or maps, and targets in its pixels."""

    x: Tensor
    targets: list[Target]


def wanted(rows: list[Row]) -> Iterator[Row]:
    """Every run, given the rows of those before it."""
    for variant in VARIANTS:
        rates, before = START, None
        while rates != before:
            for lr in rates:
                yield {"variant": variant, "stage": "tune", "lr": lr, "seed": 0}
            before, best = rates, chosen(rows, variant)
            rates = widened(rates, RATES, best["lr"])
        for seed in SEEDS:
            yield {"variant": variant, "stage": "test", "lr": best["lr"], "seed": seed}


def chosen(rows: list[Row], variant: str) -> Row:
    """The row that was best on the held-out scenes; of equals, the one with the lower loss."""
    tuned = [row for row in rows if {"variant": variant, "stage": "tune"}.items() <= row.items()]
    return max(tuned, key=lambda row: (row["accuracy"], -row["train_loss"]))


def backbone(variant: str) -> nn.Module:
    """The shipped one; one like it that has learned nothing; or one for pictures that are enlarged."""
    shipped = vitcourse.create_model(paths.data_dir() / "weights" / SHIPPED).backbone
    if "from scratch" in variant:
        return vitcourse.create_model(shipped.name, **shipped.model_args)
    if "finer" in variant:
        finer = vitcourse.create_model(shipped.name, **{**shipped.model_args, "img_size": 2 * SIDE})
        finer.load_state_dict(finer.adapt_state_dict(shipped.state_dict()))
        return finer
    return shipped


@cache
def pictures(split: str, count: int, seen_by: str) -> Pictures:
    """Scenes as a detector sees them: as they are ("scratch"), or by the maps of a backbone."""
    data = scenes(split, img_size=SIDE, **SCENES)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    images, targets = zip(*(data[i] for i in range(count)), strict=True)
    x = (torch.stack([image.as_subclass(Tensor) for image in images]) / 255 - mean) / std
    plain = [{"boxes": t["boxes"].as_subclass(Tensor), "labels": KIND_OF[t["labels"]]} for t in targets]
    if seen_by == "scratch":
        return Pictures(x, plain)
    body = backbone(seen_by)
    if seen_by == "finer":
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
    with evaluating(body), torch.no_grad():
        maps = torch.cat([body.feature_maps(part)[0] for part in x.split(128)])
    shrunk = maps.shape[-1] / SIDE
    return Pictures(maps, [{**target, "boxes": target["boxes"] * shrunk} for target in plain])


def seen_by(variant: str) -> str:
    kinds = {"from scratch": "scratch", "finer": "finer"}
    return next((kind for word, kind in kinds.items() if word in variant), "shipped")


def train(run: Row) -> Row:
    """Train one variant, and look at it on the way."""
    variant, seen = run["variant"], seen_by(run["variant"])
    given, judge = pictures("train", POOL, seen), judges(run["stage"], seen)
    torch.manual_seed(run["seed"])
    body = backbone(variant)
    model = Detr(body if seen == "scratch" else Given(body), len(KINDS), **{**HEAD, **VARIANTS[variant]})
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    config = TrainConfig(lr=run["lr"], warmup=0.1)
    random = torch.Generator().manual_seed(run["seed"])
    curve, losses, matched, spent = [], [], None, 0.0
    for step in range(STEPS):
        began = time.process_time()
        some = torch.randint(POOL, (BATCH,), generator=random).tolist()
        targets = [given.targets[i] for i in some]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, config)
        loss = mean_loss(model.losses(model(given.x[some], targets), targets))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent += time.process_time() - began
        losses.append(loss.item())
        if (step + 1) % (STEPS // LOOKS) == 0:
            seen_now, matched = look(model, judge, matched)
            curve.append({"step": step + 1, "cpu_seconds": round(spent, 1), **seen_now})
    last = curve[-1]
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "accuracy": last["map"],
        "map_50": last["map_50"],
        "train_loss": sum(losses[-50:]) / 50,
        "parameters": parameters,
        "cpu_seconds": round(spent, 1),
        "curve": curve,
    }


def judges(stage: str, seen: str) -> Pictures:
    return pictures("val", HELD_OUT, seen) if stage == "tune" else pictures("test", TESTED, seen)


@torch.no_grad()
def look(model: Detr, judge: Pictures, before: Tensor | None) -> tuple[dict[str, float | None], Tensor]:
    """Mean average precision, how much boxes differ from image to image, and who is matched with whom."""
    metric, boxes, matched = DetectionMetric(small=SMALL), [], []
    with evaluating(model):
        for start in range(0, len(judge.targets), 64):
            targets = judge.targets[start : start + 64]
            output = model(judge.x[start : start + 64])
            metric.update(model.results(output), targets)
            boxes.append(output.boxes[-1])
            match = model.criterion.match(output.logits[-1], output.boxes[-1], as_parts(targets, output.sizes))
            matched.append(match.query[match.object.argsort()])
    found, now = metric.compute(), torch.cat(matched)
    moved = None if before is None else (now != before).float().mean().item()
    spread = torch.cat(boxes).std(0).mean().item()
    return {"map": found["map"], "map_50": found["map_50"], "spread": spread, "moved": moved}, now


if __name__ == "__main__":
    sweep("detr_feasibility", __doc__, wanted, train, whole="variant")
