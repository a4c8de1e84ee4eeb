"""The comparison of lesson 01 that it has no time to train: Swin and ViT at equal multiply–adds, three seeds each.

    python -m benchmarks.lesson_hierarchical    what runs/lesson_hierarchical.jsonl lacks, then the results

All models start from Xavier's distribution, as our ViT does: Swin's own σ = 0.02 is meant for widths of 96 and more,
and a narrow model would crawl from it.
"""

import time
from typing import Any

import torch
from torch import nn

from benchmarks.sweeps import each_seed, macs, sweep
from vitcourse.data import open_dataset
from vitcourse.hierarchical import SwinTransformer
from vitcourse.train import TrainConfig, fit
from vitcourse.vit import VisionTransformer

STEPS, BATCH = 300, 100  # three passes over the 10 000 embedded images
IMAGES = {"img_size": 28, "in_chans": 1, "num_classes": 10}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "Swin": (SwinTransformer, {"patch_size": 2, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}),
    "ViT, patch 4": (VisionTransformer, {"patch_size": 4, "embed_dim": 50, "depth": 3, "num_heads": 2}),
    "ViT, patch 7": (VisionTransformer, {"patch_size": 7, "embed_dim": 64, "depth": 6, "num_heads": 4}),
}


def make_model(name: str) -> nn.Module:
    build, sizes = MODELS[name]
    model = build(**IMAGES, **sizes)
    for part, module in model.named_modules():
        if isinstance(module, nn.Linear) and not part.startswith("head"):
            nn.init.xavier_uniform_(module.weight)
    return model


def train(name: str, seed: int) -> dict[str, Any]:
    train_set, test_set = open_dataset("fashion_mnist_subset"), open_dataset("fashion_mnist_subset", "test")
    torch.manual_seed(seed)
    model = make_model(name)
    cost = macs(model)
    epochs = -(-STEPS * BATCH // len(train_set))
    config = TrainConfig(
        epochs=epochs,
        max_steps=STEPS,
        batch_size=BATCH,
        lr=3e-3,
        warmup=0.1,
        label_smoothing=0.0,
        eval_every=epochs,
        seed=seed,
    )
    start = time.process_time()
    history = fit(model, train_set, test_set, config, progress=False)
    return {
        "name": name,
        "seed": seed,
        "images": len(train_set),
        "steps": STEPS,
        "accuracy": history[-1]["val_accuracy"],
        "train_loss": history[-1]["train_loss"],
        "cpu_seconds": round(time.process_time() - start, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": (28 // MODELS[name][1]["patch_size"]) ** 2,
        "macs": cost,
    }


if __name__ == "__main__":
    sweep("lesson_hierarchical", __doc__, each_seed([{"name": name} for name in MODELS]), lambda run: train(**run))
