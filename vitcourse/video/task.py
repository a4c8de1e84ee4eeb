"""Video classification as a task of the engine: ``fit(model, clips, …, task=VideoClassification())``."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from vitcourse.inference import normalise
from vitcourse.layers import to_pair
from vitcourse.train import Classification, TrainConfig
from vitcourse.train.task import Part


class VideoClassification(Classification):
    """Pairs (clip, label), clips (C, T, H, W), and cross-entropy; by accuracy on single clips.

    uint8 clips are normalised on the device, by the mean and std of ``model.preprocess``, or else of the data set.

    Args:
        augments: fields of TrainConfig that the training clips' transform heeds, and that may therefore be set.

    >>> VideoClassification().best
    ('val_accuracy', 'max')
    """

    name = "video"

    def __init__(self, augments: Collection[str] = ()) -> None:
        self.augments = augments

    def check_data(self, model: nn.Module, train_set: Dataset, val_set: Dataset | None, config: TrainConfig) -> None:
        if config.channels_last:
            raise ValueError("channels_last is a memory format of images, and clips have an axis more; leave it out")
        super().check_data(model, train_set, val_set, config)

    def check_sample(self, sample: Any, model: nn.Module, name: str) -> None:
        check_clip(sample[0], model, name)

    def prepare(self, batch: tuple[Tensor, Tensor], part: Part | None) -> tuple[Tensor, Tensor]:
        clips, labels = batch
        return normalise(clips, self.mean_std), labels

    def evaluate(self, model: nn.Module, dataset: Dataset, config: TrainConfig | None = None, **several: Any) -> dict:
        """``val_loss`` and ``val_accuracy`` on ``dataset``, in batches no larger than in training."""
        config = config or TrainConfig()
        config = replace(config, eval_batch_size=min(config.eval_batch_size, config.batch_size))
        return super().evaluate(model, dataset, config, **several)


def check_clip(clip: Any, model: nn.Module, name: str) -> None:
    """Raise ValueError unless a clip is a tensor (C, T, H, W), finite, and of the model's channels, frames and size."""
    if not isinstance(clip, Tensor) or clip.ndim != 4:
        what = f"a tensor of shape {tuple(clip.shape)}" if isinstance(clip, Tensor) else type(clip).__name__
        raise ValueError(f"clips of {name} must be tensors (C, T, H, W), got {what}; use moving, or video:PATH")
    channels, frames, *size = clip.shape
    wanted = [
        ("channels", "in_chans", channels, getattr(model, "in_chans", channels)),
        ("frames", "num_frames", frames, getattr(model, "num_frames", frames)),
        ("rows and columns", "img_size", tuple(size), to_pair(getattr(model, "img_size", tuple(size)), "img_size")),
    ]
    for what, argument, has, takes in wanted:
        if has != takes:
            raise ValueError(
                f"{name} has clips of {has} {what}, the model's {argument} is {takes}; build the model with "
                f"{argument}={has}, or make other clips"
            )
    if clip.is_floating_point() and not bool(clip.isfinite().all()):
        raise ValueError(f"{name} has NaN or infinite pixels; check the transform and the files")
