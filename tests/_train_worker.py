"""Programs that tests/test_train.py runs in processes of their own: a run that is killed, and one of many processes."""

import os
import signal
import sys

import torch
from _tasks import COUNTED, Nearness, Points, regressor

from vitcourse.data import ImageDataset
from vitcourse.train import TrainConfig, engine, fit, main
from vitcourse.vit import VisionTransformer


def double_run() -> tuple[VisionTransformer, ImageDataset, ImageDataset]:
    """A model and data in float64, where the order of a sum does not blur a comparison."""
    random = torch.Generator().manual_seed(0)
    images, labels = torch.rand(50, 3, 8, 8, generator=random), torch.randint(0, 5, (50,), generator=random)

    def dataset(part: slice) -> ImageDataset:
        return ImageDataset(images[part].double(), labels[part].tolist(), list("abcde"), mean=(0.0,), std=(1.0,))

    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, num_classes=5, embed_dim=16, depth=2, num_heads=2)
    return model.double(), dataset(slice(37)), dataset(slice(37, None))


# 37 images in batches of 16: the last batch has 5, which neither processes nor micro-batches share evenly.
DOUBLE = TrainConfig(epochs=3, batch_size=16, drop_last=False, lr=1e-2, mixup=0.8, cutmix=1.0, hflip=True, ema=0.9)


def killed(step: int, argv: list[str]) -> None:
    """The command line, killed without warning after ``step`` steps."""
    update = engine._Trainer._update

    def update_and_die(self: engine._Trainer, *sums: torch.Tensor | None) -> None:
        update(self, *sums)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    engine._Trainer._update = update_and_die
    sys.exit(main(argv))


def distributed(out: str) -> None:
    model, train_set, val_set = double_run()
    history = fit(model, train_set, val_set, DOUBLE, progress=False)
    counted = regressor()
    counts = fit(counted, Points(), Points(11), COUNTED, task=Nearness(), progress=False)
    if os.environ["RANK"] == "0":
        found = {"model": model.state_dict(), "history": list(history)}
        torch.save({**found, "counted": counted.state_dict(), "counts": list(counts)}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        killed(int(sys.argv[2]), sys.argv[3:])
    else:
        distributed(sys.argv[2])
