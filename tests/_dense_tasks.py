"""Small runs of detection and segmentation for tests/test_dense_tasks.py, which also starts this as two processes."""

import os
import sys

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse import create_model
from vitcourse.dense_prediction import Detection, Segmentation
from vitcourse.dense_prediction.segmentation import to_map
from vitcourse.train import Task, TrainConfig, fit

PLAIN = {"backbone_args": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}, "backbone": "vit_tiny"}
SWIN = {"backbone_args": {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}}
SMALL: dict[str, tuple[str, dict]] = {
    "fcos": ("detect", {**SWIN, "channels": 8, "num_convs": 1, "extra": ""}),
    "detr": ("detect", {**PLAIN, "embed_dim": 16, "num_queries": 4, "num_heads": 2, "encoder_depth": 0,
                        "decoder_depth": 2, "mlp_dim": 16, "dropout": 0.0}),
    "eomt": ("detect", {**PLAIN, "num_queries": 4, "num_blocks": 1}),
    "eomt-semantic": ("segment", {**PLAIN, "num_queries": 4, "num_blocks": 1}),
    "unet": ("segment", {**SWIN, "channels": 8}),
}  # fmt: skip
CLASSES = ["background", "cat", "dog"]


class Shapes(Dataset):
    """Noise with 0 to 3 bright squares; every third image has any, and one of these a crowd, too."""

    classes, semantic_classes = CLASSES[1:], CLASSES
    mean, std = (0.5,) * 3, (0.25,) * 3

    def __init__(self, n: int = 11, seed: int = 0, empty: bool = False, dtype: torch.dtype = torch.float64) -> None:
        random = torch.Generator().manual_seed(seed)
        self.samples = [self._draw(i, random, 0 if empty or i % 3 else 1 + i % 4, dtype) for i in range(n)]

    def _draw(self, i: int, random: torch.Generator, count: int, dtype: torch.dtype) -> tuple[Tensor, dict]:
        image = torch.rand(3, 32, 32, generator=random, dtype=dtype)
        corners = torch.randint(0, 20, (count, 2), generator=random)
        boxes = torch.cat([corners, corners + torch.randint(6, 12, (count, 2), generator=random)], dim=1)
        labels = torch.randint(0, 2, (count,), generator=random)
        masks = torch.zeros(count, 32, 32, dtype=torch.uint8)
        for (x0, y0, x1, y1), label, mask in zip(boxes.tolist(), labels.tolist(), masks, strict=True):
            mask[y0:y1, x0:x1] = 1
            image[label, y0:y1, x0:x1] += 2
        iscrowd = torch.zeros(count, dtype=torch.int64)
        iscrowd[:1] = int(i == 3)
        found = {"masks": masks, "labels": labels + 1}
        semantic = to_map(found, (32, 32), background=0)
        semantic[:2] = 255
        target = {"boxes": boxes.float(), "labels": labels, "masks": masks, "iscrowd": iscrowd, "semantic": semantic}
        return image, {**target, "caption": "a picture"}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, target = self.samples[index]
        return image, dict(target)


def small(name: str, dtype: torch.dtype = torch.float64, **changes) -> tuple[nn.Module, Task]:
    kind, arguments = SMALL[name]
    torch.manual_seed(0)
    classes = {"num_classes": 2 if kind == "detect" else 3}
    model = create_model(name.partition("-")[0], img_size=32, **classes, **{**arguments, **changes})
    return model.to(dtype), Detection() if kind == "detect" else Segmentation()


# 11 images in batches of 4: the last batch has 3. Three steps: EoMT's masks are then on, on, and off, and never drawn.
DOUBLE = TrainConfig(epochs=1, batch_size=4, drop_last=False, lr=1e-2, warmup=0.0, ema=0.9, device="cpu")


def joint_run(name: str) -> dict:
    model, task = small(name)
    history = fit(model, Shapes(), Shapes(5, seed=1), DOUBLE, task=task, progress=False)
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in history]
    return {"model": model.state_dict(), "rows": rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: joint_run(name) for name in SMALL}
    if os.environ["RANK"] == "0":
        torch.save(found, sys.argv[1])
