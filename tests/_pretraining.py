"""Small runs of each objective for tests/test_pretraining.py, which also starts this as a program of two processes."""

import os
import sys

import torch
from torch import nn

from vitcourse import create_model
from vitcourse.data import ImageDataset
from vitcourse.pretraining import Tokenization, make_objective, tokenizer_for
from vitcourse.train import Task, TrainConfig, fit

SMALL: dict[str, dict] = {
    "mae": {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2, "min_crop": 0.5},
    "moco": {"hidden_dim": 12, "out_dim": 6, "min_crop": 0.5},
    "lejepa": {"hidden_dim": 12, "out_dim": 6, "directions": 7, "min_crop": 0.5, "local_views": 1, "local_size": 4},
    "beit": {"vocab_size": 9, "code_dim": 3, "tokenizer_dim": 8, "tokenizer_depth": 1, "min_block": 2, "min_crop": 0.5},
}
NAMES = (*SMALL, "tokenizer")


def encoder(**arguments) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": (8, 12), "patch_size": 2, "in_chans": 3, "num_classes": 0, "embed_dim": 16, "depth": 2}
    return create_model("vit_tiny", **{**sizes, "num_heads": 2, "global_pool": "avg", **arguments})


def images(n: int = 40, seed: int = 0) -> ImageDataset:
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, 8, 12), dtype=torch.uint8, generator=random)
    return ImageDataset(pixels, (torch.arange(n) % 5).tolist(), list("abcde"), mean=(0.5,) * 3, std=(0.25,) * 3)


def doubles(dataset: ImageDataset) -> ImageDataset:
    """In float64, where the order of a sum does not blur a comparison."""
    dataset.images = dataset.images.double() / 255 - 0.5
    return dataset


def small(name: str, dtype: torch.dtype = torch.float32, **changes) -> tuple[nn.Module, Task]:
    """What is trained, and the task; BEiT with a tokenizer whose codes are vectors of images."""
    options = {**SMALL["beit" if name == "tokenizer" else name], **changes}
    model, task = make_objective("beit" if name == "tokenizer" else name, encoder(), **options)
    if name in ("beit", "tokenizer"):
        tokenizer = tokenizer_for(model.encoder, task.options).to(dtype)
        if name == "tokenizer":
            return tokenizer, Tokenization(task.options)
        z = tokenizer.encode(doubles(images(8, seed=3)).images.to(dtype)).flatten(0, 2)
        tokenizer.codebook.codes.copy_(z[:: len(z) // 9][:9].detach())
        model.adopt_tokenizer(tokenizer)
    return model.to(dtype), task


# 37 images in batches of 16: the last batch has 5, which two processes do not share evenly.
DOUBLE = TrainConfig(epochs=2, batch_size=16, drop_last=False, lr=1e-2, ema=0.9, device="cpu")


def joint_run(name: str) -> dict:
    model, task = small(name, torch.float64)
    history = fit(model, doubles(images(37)), doubles(images(36, seed=1)), DOUBLE, task=task, progress=False)
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in history]
    state = task.state_dict()
    return {"model": model.state_dict(), "keys": state.get("keys", {}), "rows": rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: joint_run(name) for name in NAMES}
    if os.environ["RANK"] == "0":
        torch.save(found, sys.argv[1])
