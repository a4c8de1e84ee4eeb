"""The comparisons of lesson 02 that it has no time to train: ViT, Conv-ViT and CoAtNet, three seeds each.

    python -m benchmarks.lesson_hybrid    what runs/lesson_hybrid.jsonl lacks, then the results

All three models need the same multiply–adds for an image, within 4 %, average over places before the head, and see as
many images: 400 steps of 32. Beside them, other layouts of the same CoAtNet. Each of these models is then shown test
pictures that were moved by 1 and by 4 pixels. Last, learning rates for the ViT with either stem, in 150 steps.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.sweeps import Row, each_seed, macs, sweep
from vitcourse.data import open_dataset, subset
from vitcourse.hybrid import CoAtNet, ConvStem
from vitcourse.train import TrainConfig, TrainingError, fit
from vitcourse.vit import VisionTransformer

STEPS, SHORT, BATCH = 400, 150, 32
RATE = 3e-3
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
IMAGES = {"img_size": 28, "in_chans": 1, "num_classes": 10}
PLAIN = {"patch_size": 4, "depth": 3, "num_heads": 2, "class_token": False, "global_pool": "avg"}
STAGES = {
    "stem_dim": 8,
    "embed_dim": (16, 32, 48, 48),
    "depths": (1, 1, 1, 1),
    "stem_stride": 2,
    "strides": (1, 2, 1, 1),
    "head_dim": 16,
}
MOVED, OFFSETS = 500, (1, 4)  # test pictures, pixels


def settings() -> list[Row]:
    """Every run but for its seed, those that several plots need first."""
    usual = {"lr": RATE, "steps": STEPS}
    runs = [{"model": m, "images": n, **usual} for n in (10000, 500, 2000) for m in ("CoAtNet", "Conv-ViT", "ViT")]
    runs += [{"model": f"layout {layout}", "images": 10000, **usual} for layout in ("CCCC", "TTTT")]
    return runs + [{"model": m, "images": 10000, "lr": r, "steps": SHORT} for r in RATES for m in ("Conv-ViT", "ViT")]


def make_model(name: str) -> nn.Module:
    if name == "ViT":
        return VisionTransformer(**IMAGES, **PLAIN, embed_dim=44)
    if name == "Conv-ViT":  # a little narrower, to pay for its stem
        return VisionTransformer(**IMAGES, **PLAIN, embed_dim=42, embed_layer=ConvStem)
    return CoAtNet(**IMAGES, **STAGES, layout=name.removeprefix("layout ") if name != "CoAtNet" else "CCTT")


def moved(images: Tensor, down: int, across: int) -> Tensor:
    """(B, C, H, W) moved by so many pixels; black comes in."""
    return F.pad(images, (across, -across, down, -down))


@torch.no_grad()
def when_moved(model: nn.Module) -> dict[str, float]:
    """Accuracy on test pictures as they are, accuracy and share of equal answers when they move, over 4 directions."""
    data = open_dataset("fashion_mnist_subset", "test")
    few = subset(data, MOVED)
    images = torch.stack([image for image, _ in few]).float() / 255
    labels = torch.tensor([label for _, label in few])
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))

    def answers(pictures: Tensor) -> Tensor:
        return torch.cat([model((part - mean) / std).argmax(1) for part in pictures.split(100)])

    model.eval()
    still = answers(images)
    found = {"accuracy_moved_0": (still == labels).float().mean().item()}
    for by in OFFSETS:
        runs = [answers(moved(images, *offset)) for offset in ((by, 0), (-by, 0), (0, by), (0, -by))]
        found[f"accuracy_moved_{by}"] = torch.stack([a == labels for a in runs]).float().mean().item()
        found[f"unchanged_moved_{by}"] = torch.stack([a == still for a in runs]).float().mean().item()
    return found


def train(run: Row) -> Row:
    seed = run["seed"]
    train_set, test_set = open_dataset("fashion_mnist_subset"), open_dataset("fashion_mnist_subset", "test")
    if run["images"] < len(train_set):
        train_set = subset(train_set, run["images"], seed=seed)
    torch.manual_seed(seed)
    model = make_model(run["model"])
    row = {**run, "macs": macs(model), "parameters": sum(p.numel() for p in model.parameters())}
    epochs = -(-run["steps"] // (run["images"] // BATCH))
    config = TrainConfig(
        epochs=epochs,
        max_steps=run["steps"],
        batch_size=BATCH,
        lr=run["lr"],
        warmup=0.1,
        label_smoothing=0.0,
        channels_last=True,
        eval_every=epochs,
        seed=seed,
    )
    start = time.process_time()
    try:
        last = fit(model, train_set, test_set, config, progress=False)[-1]
        row |= {"accuracy": last["val_accuracy"], "train_loss": last["train_loss"]}
    except TrainingError as error:  # not finite: it answers no better than chance
        row |= {"accuracy": 0.1, "train_loss": None, "failed": str(error)}
    row["cpu_seconds"] = round(time.process_time() - start, 1)
    return row | when_moved(model) if run["steps"] == STEPS else row


if __name__ == "__main__":
    sweep("lesson_hybrid", __doc__, each_seed(settings()), train)
