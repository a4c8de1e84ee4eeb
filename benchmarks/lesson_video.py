"""The comparisons of lesson 08 that it has no time to train: which attention tells motions apart, and by what.

    python -m benchmarks.lesson_video            every run that runs/lesson_video.jsonl lacks, then the results
    python -m benchmarks.lesson_video --runs 4   four of them, to share a machine; results of who is finished

The four straight motions of ``moving`` on a plain ground, clips of 8 × 32 × 32, 1 600 to train on. Every model has
about the same width and depth, the same 240 steps of 32 clips, and its own best rate. "tune" rows: one seed, judged by
200 clips of the split ``val``. While the best rate lies at the end of its range, the range grows. "test" rows: the
chosen rate, three seeds, judged by 800 clips of ``test`` as they are, shuffled, reversed and frozen, and motion by
motion. ``takeoff`` is the first step at which the mean loss of 20 steps is below half of the loss of guessing.

``inflated`` starts as a ViT that was trained on the pictures of Fashion-MNIST, and ``divided`` from nothing. Positions
in time start at zero in both, as the paper has it; in ``joint``, which is longer on the ground that way, at random.
"""

import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lesson_tuning import RATES, widened
from benchmarks.sweeps import SEEDS, Row, sweep
from vitcourse.data import ImageDataset, moving, open_dataset
from vitcourse.hardware.prune import count_macs
from vitcourse.train import TrainConfig, fit, learning_rate, param_groups
from vitcourse.video import TimeSformer, VideoSwin, single_frame_bias
from vitcourse.vit import VisionTransformer

FRAMES, SIDE, CLASSES = 8, 32, 4
CLIPS, HELD_OUT, TESTED = 1600, 200, 800
STEPS, BATCH = 240, 32
SIZES = {"img_size": SIDE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
START = (3e-4, 1e-3, 3e-3)  # the rates that every search begins with
IMAGE_MODEL = Path("runs") / "lesson_video_image.pt"


def timesformer(kind: str) -> TimeSformer:
    sizes = {"num_frames": FRAMES, "tubelet_size": 2, "num_classes": CLASSES, **SIZES}
    return TimeSformer(attention_type=kind, **sizes)


def inflated() -> TimeSformer:
    """A TimeSformer that says of a still clip what a trained model of pictures says, but for a new head."""
    model = timesformer("divided")
    state = {name: tensor for name, tensor in image_model().items() if not name.startswith("head.")}
    missing, unexpected = model.load_state_dict(model.adapt_state_dict(state), strict=False)
    assert sorted(missing) == ["head.bias", "head.weight"] and not unexpected, (missing, unexpected)
    return model


def video_swin() -> VideoSwin:
    sizes = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": (2, 4, 4)}
    return VideoSwin(SIDE, 4, num_frames=FRAMES, tubelet_size=2, num_classes=CLASSES, **sizes)


def random_times(model: TimeSformer) -> TimeSformer:
    """Positions in time that differ from the beginning."""
    nn.init.trunc_normal_(model.time_embed, std=0.02)
    return model


MODELS = {
    "divided": lambda: timesformer("divided"),
    "joint": lambda: random_times(timesformer("joint")),
    "space only": lambda: timesformer("space_only"),
    "video swin": video_swin,
    "inflated": inflated,
    "joint, times at zero": lambda: timesformer("joint"),
}


def wanted(rows: list[Row]) -> Iterator[Row]:
    """Every run, given the rows of those before it."""
    for name in MODELS:
        rates, before = START, None
        while rates != before:
            for lr in rates:
                yield {"model": name, "stage": "tune", "lr": lr, "seed": 0}
            before, best = rates, chosen(rows, name)
            rates = widened(rates, RATES, best["lr"])
        for seed in SEEDS:
            yield {"model": name, "stage": "test", "lr": best["lr"], "seed": seed}


def chosen(rows: list[Row], name: str) -> Row:
    """The row that was best on the held-out clips; of equals, the one with the lower loss there."""
    tuned = [row for row in rows if row["model"] == name and row["stage"] == "tune"]
    return max(tuned, key=lambda row: (row["accuracy"], -row["loss"]))


# -------------------------------------------------------------------------------------------------------- the clips


@cache
def clips_of(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Clips (N, 3, T, H, W), ready for a model, and their motions (N,), of films that move straight: one in two."""
    films = moving(split, num_frames=FRAMES, img_size=SIDE, length=2 * count, textures=())
    chosen = [i for i, motion in enumerate(films.targets) if motion < CLASSES]
    clips = torch.stack([films[i][0] for i in chosen]).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (films.mean, films.std))
    return (clips - mean) / std, torch.tensor([films.targets[i] for i in chosen])


@cache
def image_model() -> dict[str, Tensor]:
    """Weights of a ViT trained on Fashion-MNIST, in three channels and a frame's size; made once."""
    if not IMAGE_MODEL.exists():
        data = open_dataset("fashion_mnist_subset")
        images = torch.stack([torch.as_tensor(image) for image, _ in data])
        images = F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
        facts = {"mean": data.mean * 3, "std": data.std * 3}
        torch.manual_seed(0)
        model = VisionTransformer(num_classes=10, **SIZES)
        config = TrainConfig(epochs=4, batch_size=64, lr=3e-3, eval_every=100)
        fit(model, ImageDataset(images, data.targets, data.classes, **facts), config=config, progress=False)
        torch.save(model.state_dict(), IMAGE_MODEL)
    return torch.load(IMAGE_MODEL, weights_only=True)


# --------------------------------------------------------------------------------------------------------- one run


def train(run: Row) -> Row:
    torch.manual_seed(run["seed"])
    model, config = MODELS[run["model"]](), TrainConfig(lr=run["lr"], warmup=0.1)
    clips, labels = clips_of("train", CLIPS)
    optimizer = torch.optim.AdamW(param_groups(model, config.weight_decay))
    began, losses = time.process_time(), []
    for step in range(STEPS):
        if step % (CLIPS // BATCH) == 0:
            order = torch.randperm(CLIPS).split(BATCH)
        batch = order[step % (CLIPS // BATCH)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, config)
        loss = F.cross_entropy(model(clips[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        losses.append(loss.item())
    row = {"cpu_seconds": round(time.process_time() - began, 1), "train_loss": sum(losses[-20:]) / 20}
    below = [step for step in range(20, STEPS + 1) if sum(losses[step - 20 : step]) / 20 < math.log(CLASSES) / 2]
    row["takeoff"] = below[0] if below else None
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "macs": count_macs(model, clips[:1])}
    return row | (judged(model) if run["stage"] == "test" else validated(model))


@torch.no_grad()
def validated(model: nn.Module) -> Row:
    clips, labels = clips_of("val", HELD_OUT)
    logits = torch.cat([model(part) for part in clips.split(100)])
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return {"accuracy": accuracy, "loss": F.cross_entropy(logits, labels).item()}


@torch.no_grad()
def judged(model: nn.Module) -> Row:
    """Accuracy on each view of the test clips, and as they are for each motion by itself."""
    clips, labels = clips_of("test", TESTED)
    pairs = list(zip(clips.split(100), labels.split(100), strict=True))
    found = single_frame_bias(model, pairs, after_reversal=lambda label: label ^ 1)
    answers = torch.cat([model(part).argmax(1) for part, _ in pairs])
    by_motion = [(answers[labels == k] == k).float().mean().item() for k in range(CLASSES)]
    return {"accuracy": found.pop("as_they_are"), **found, "by_motion": by_motion}


if __name__ == "__main__":
    sweep("lesson_video", __doc__, wanted, train, whole="model")
