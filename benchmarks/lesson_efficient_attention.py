"""The comparison of lesson 05 that it has no time to train: one ViT with eight ways of mixing tokens, trained for
one pass and for four, three seeds each.

    python -m benchmarks.lesson_efficient_attention    what the log in runs/ lacks, then the results

Patches of 3 × 3 pixels give 10 × 10 patches and [CLS]. In all sparse patterns a patch sees about 35 of these 101
tokens. Merging takes 24 tokens away in each of the two blocks.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn

from benchmarks.sweeps import each_seed, macs, sweep
from vitcourse.data import open_dataset
from vitcourse.efficient_attention import (
    BigBirdAttention,
    LinearAttention,
    LocalAttention,
    RandomBlockAttention,
    RandomFeatureAttention,
    TwoSoftmaxAttention,
    merge_tokens,
)
from vitcourse.train import TrainConfig, fit
from vitcourse.vit import Attention, VisionTransformer

EPOCHS, BATCH = (1, 4), 50  # a short and a longer training, in passes over the 10 000 embedded images
SIZES = {"img_size": 28, "patch_size": 3, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 2}


def per_layer(mixer: Callable[..., nn.Module], **options: int) -> Callable[..., nn.Module]:
    """A constructor that gives each layer a random pattern of its own."""
    seeds = count()
    return lambda dim, **kwargs: mixer(dim, seed=next(seeds), **options, **kwargs)


MIXERS: dict[str, Callable[[], Callable[..., nn.Module]]] = {
    "softmax": lambda: Attention,
    "linear, elu + 1": lambda: LinearAttention,
    "linear, two softmaxes": lambda: TwoSoftmaxAttention,
    "random features": lambda: partial(RandomFeatureAttention, num_features=32),
    "local 7 × 7": lambda: partial(LocalAttention, block_size=2),
    "random blocks": lambda: per_layer(RandomBlockAttention, block_size=2, num_random=8),
    "local + global + random": lambda: per_layer(BigBirdAttention, block_size=2, num_random=1),
    "softmax, merging": lambda: Attention,
}


def make_model(name: str) -> nn.Module:
    model = VisionTransformer(**SIZES, pad=True, attn_layer=MIXERS[name]())
    return merge_tokens(model, 24) if name == "softmax, merging" else model


@torch.no_grad()
def milliseconds(model: nn.Module) -> float:
    """Processor time for one image, in batches of 50: the best of seven."""
    images, taken = torch.randn(50, 1, 28, 28), []
    for _ in range(8):
        start = time.process_time()
        model.eval()(images)
        taken.append(time.process_time() - start)
    return 1e3 * min(taken[1:]) / len(images)


def train(name: str, epochs: int, seed: int) -> dict[str, Any]:
    train_set, test_set = open_dataset("fashion_mnist_subset"), open_dataset("fashion_mnist_subset", "test")
    torch.manual_seed(seed)
    model = make_model(name)
    cost = {"macs": macs(model), "milliseconds": milliseconds(model)}
    config = TrainConfig(
        epochs=epochs,
        batch_size=BATCH,
        lr=3e-3,
        warmup=0.1,
        label_smoothing=0.0,
        seed=seed,
    )
    start = time.process_time()
    history = fit(model.train(), train_set, test_set, config, progress=False)
    return {
        "name": name,
        "seed": seed,
        "images": len(train_set),
        "epochs": epochs,
        "accuracy": history[-1]["val_accuracy"],
        "train_loss": history[-1]["train_loss"],
        "cpu_seconds": round(time.process_time() - start, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        **cost,
    }


if __name__ == "__main__":
    sweep(
        "lesson_efficient_attention",
        __doc__,
        each_seed([{"name": name, "epochs": epochs} for epochs in EPOCHS for name in MIXERS]),
        lambda run: train(**run),
    )
