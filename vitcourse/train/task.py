"""What is learned. A task makes batches, a loss that counts, and an evaluation; the engine does everything else."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from vitcourse.devices import device_of, kept_random_state, resolve_device, seed_all, widest_float
from vitcourse.inference import evaluating

from .batches import Share, eval_batches
from .config import TrainConfig
from .optim import param_groups
from .runtime import autocast

Count = int | float | Tensor
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """Which samples of a run a micro-batch holds: all that its augmentation may depend on, see ``train.augment``.

    Attributes:
        epoch, step: counted from 0; ``step`` is that of the optimizer.
        start: the place of the first sample in the batch of the whole step, always even.
        size: the samples of the whole step, over all processes and micro-batches.
        index: (B,), the samples' numbers in the data set.
    """

    epoch: int
    step: int
    start: int
    size: int
    index: Tensor


class Task:
    """A training task: what a batch is, what its loss is and counts, and what tells good weights from bad ones.

    Derive from it and override what differs; ``loss`` alone must be. One object serves one run of
    :func:`vitcourse.train.fit`, which calls, in this order: ``check_data``; ``setup``, when the model lies on its
    device; ``groups``; ``load_state_dict``, where a run is continued; then ``before_step``; for each micro-batch
    ``collate``, ``check_batch``, ``prepare`` and ``loss``; ``after_step``; at the end of an epoch ``after_epoch`` and
    ``evaluate``.

    What is trained belongs to the model: its parameters move, and stand in the weights file. What else must survive an
    interruption (a momentum encoder, a queue, a codebook) is the task's own and goes through ``state_dict``.

    Attributes:
        name: stands in the weights file, by which ``vitcourse evaluate`` and ``vitcourse predict`` know what to do.
        metrics: what ``evaluate`` returns, in the order in which records show it.
        best: the metric that chooses ``best.safetensors``, and whether more of it is better or less; None: none does.
        couples_batch: the loss of one sample depends on the others of its batch, as a contrastive one does. Then micro-
            batches would change it, and so ``accum`` must be 1.
        gathers_batch: a coupled loss that itself gathers what it compares from all processes; without it, it runs in
            one process.
        counts_samples: the count is the number of samples, an int, so that it is known beforehand.
        per_sample: about how much is counted per sample. The result does not depend on it; in fp16 it keeps scaled
            gradients in range.
        least_count: what the sum is divided by where a whole step, or a whole evaluation, counts less: 1 for a
            detector, whose loss also speaks of images without an object.
        takes_pairs: samples are pairs (image, label), collated as PyTorch does, and may therefore be taken at once from
            a data set that holds them as tensors.
        augments: the fields of TrainConfig among ``AUGMENTATIONS`` that ``prepare`` heeds.
        partly_trained: in some steps a part of what is trained is frozen, for which several processes must not wait.

    >>> class Count(Task):
    ...     def loss(self, model, batch):
    ...         return (model(batch["x"]) - batch["n"]).abs().sum(), batch["n"].sum()
    >>> batch = Count().collate([{"x": torch.zeros(1), "n": 2}, {"x": torch.ones(1), "n": 3}])
    >>> total, count = Count().loss(nn.Flatten(0), batch)
    >>> total.item(), count.item()
    (4.0, 5)
    """

    name: str = "task"
    metrics: tuple[str, ...] = ("val_loss",)
    best: tuple[str, Literal["max", "min"]] | None = ("val_loss", "min")
    couples_batch: bool = False
    gathers_batch: bool = False
    counts_samples: bool = False
    per_sample: float = 1.0
    least_count: float = 0.0
    takes_pairs: bool = False
    augments: Collection[str] = ()
    partly_trained: bool = False

    # ------------------------------------------------------------------------------------------------ before the run

    def check_data(self, model: nn.Module, train_set: Dataset, val_set: Dataset | None, config: TrainConfig) -> None:
        """Look at the data before anything is changed.

        Raises:
            ValueError: data, model and config do not fit together.
        """
        for dataset, name in ((train_set, "train_set"), (val_set, "val_set")):
            if dataset is not None:
                check_not_empty(dataset, name)
                try:
                    self.check(dataset[0])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error

    def check(self, sample: Any) -> None:
        """Raise ValueError, naming what is wrong and the remedy, unless ``sample`` is one that the loss understands."""

    def setup(self, model: nn.Module, train_set: Dataset, config: TrainConfig, device: torch.device) -> None:
        """Make what the task needs beside the model, which is on its ``device`` now: a momentum encoder, say."""

    def groups(self, model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer, unless the caller of ``fit`` gives some; see there for their keys."""
        return param_groups(model, config.weight_decay)

    def settings(self) -> Mapping[str, Any]:
        """What must not change between a run and its continuation, as JSON can hold it; kept in the weights file."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What of the task changes in training: tensors and numbers, kept in every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave, whose tensors are on the CPU."""

    # -------------------------------------------------------------------------------------------------- in each step

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Called before the batches of step ``step`` of ``total``: what is trained may change here, and how fast."""

    def collate(self, samples: list[Any]) -> Any:
        """Samples as the data set gives them to a batch: tensors in tuples, lists and dicts, however nested."""
        return default_collate(samples)

    def check_batch(self, batch: Any) -> None:
        """Raise ValueError for a batch, still on the CPU, that would fail on the device without saying why."""

    def prepare(self, batch: Any, part: Part | None) -> Any:
        """Augment and normalise a batch, on the device; ``part`` is None where it is evaluated: then only normalise."""
        return batch

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Count]:
        """The loss as a sum () over what is counted (images, boxes, pixels, tokens), and the count.

        What is minimised is the sum over all processes and micro-batches of a step, divided by the count over all of
        them. Where nothing is counted, the sum is 0 and must still depend on the model, as a sum over an empty
        selection of its outputs does; or ``least_count`` says what to divide by.
        """
        raise NotImplementedError(f"task {self.name!r} has no loss; override loss(model, batch) -> (sum, count)")

    def contribution(self, model: nn.Module, batch: Any, expected: float) -> tuple[Tensor, Count]:
        """The loss of a micro-batch as if its whole step counted ``expected``, and its own count."""
        total, count = self.loss(model, batch)
        return total / expected, count

    def after_step(self, model: nn.Module, step: int, total: int) -> None:
        """Called without gradients after step ``step`` of ``total``, from 0; ``model`` is without wrappers."""

    # ------------------------------------------------------------------------------------------------ after an epoch

    def after_epoch(self, model: nn.Module) -> dict[str, float]:
        """What joins the epoch's row beside the evaluation; every process calls it, ``model`` is without wrappers."""
        return {}

    def class_names(self, dataset: Dataset) -> list[str] | None:
        """What the classes are called that are learned, in their order, for the weights file; None without any."""
        return getattr(dataset, "classes", None)

    def product(self, model: nn.Module) -> nn.Module:
        """What of ``model`` the weights files hold: all of it, but for what is of use in training only."""
        return model

    def evaluate(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: TrainConfig | None = None,
        *,
        share: Share | None = None,
        reduce: Reduce = lambda total: total,
    ) -> dict[str, float | None]:
        """The ``metrics`` of ``model`` on ``dataset``; by default ``val_loss``, the mean over all that is counted.

        Args:
            share: which of several processes this is; see :meth:`batches`.
            reduce: sums a tensor over these processes, who must all call it equally often.
        """
        config = config or TrainConfig()
        device = device_of(model) or resolve_device(config.device)
        totals = torch.zeros(2, dtype=widest_float(device), device=device)
        with kept_random_state(), evaluating(model), torch.inference_mode(), autocast(device, config.precision):
            seed_all(config.seed)  # masks that a loss draws are the same in every evaluation
            for batch in self.batches(dataset, share or Share(), config, device):
                totals += pair(*self.loss(model, batch), like=totals)
        return {"val_loss": self.mean(*reduce(totals).tolist())}

    def mean(self, total: float, count: float) -> float | None:
        """The loss of all that was counted; None where that is nothing.

        >>> Task().mean(3.0, 2.0), Task().mean(0.0, 0.0)
        (1.5, None)
        """
        count = max(count, self.least_count)
        return total / count if count else None

    def batches(self, dataset: Dataset, share: Share, config: TrainConfig, device: torch.device) -> Iterator[Any]:
        """Every sample of ``dataset`` once, over all processes together, in batches as ``loss`` takes them."""
        return (self.prepare(batch, None) for batch in eval_batches(dataset, share, config, device, self))


class AroundTask(Task):
    """A task around another one, which does and says all that a class derived from this does not.

    >>> class Louder(AroundTask):
    ...     def settings(self):
    ...         return {**super().settings(), "loud": True}
    >>> inner = Task()
    >>> inner.name = "inner"
    >>> Louder(inner).name, Louder(inner).settings()
    ('inner', {'loud': True})
    """

    def __init__(self, task: Task) -> None:
        self.task = task


def _passing_on(name: str) -> Any:
    """The inner task's method, or attribute, of this name."""
    if callable(getattr(Task, name)):
        return lambda self, *args, **options: getattr(self.task, name)(*args, **options)
    return property(lambda self: getattr(self.task, name))


for _name in vars(Task):
    if not _name.startswith("_"):
        setattr(AroundTask, _name, _passing_on(_name))


def pair(total: Tensor, count: Count, like: Tensor) -> Tensor:
    """A sum and its count, (2,), without gradients, where and as exact as ``like``."""
    return torch.stack([torch.as_tensor(value).detach().to(like) for value in (total, count)])


# Fields of TrainConfig that change images; a task that does not heed one refuses it.
AUGMENTATIONS = ("crop_padding", "hflip", "randaugment", "mixup", "cutmix")


def check_task(task: Task, config: TrainConfig, world: int) -> None:
    """Raise ValueError unless a task can do what is asked of it: micro-batches, several processes, augmentation."""
    if task.couples_batch and config.accum > 1:
        raise ValueError(
            f"task {task.name!r} compares the samples of a batch with each other, which micro-batches would part; use "
            "--accum 1, and --grad-checkpointing or a smaller --batch-size to save memory"
        )
    if task.couples_batch and world > 1 and not task.gathers_batch:
        raise ValueError(
            f"task {task.name!r} compares the samples of a batch with each other, which {world} processes would part; "
            "use one process, or a loss that gathers the batch (and says so: gathers_batch = True)"
        )
    unheeded = [name for name in AUGMENTATIONS if getattr(config, name) and name not in task.augments]
    if unheeded:
        raise ValueError(
            f"task {task.name!r} does not heed {', '.join(unheeded)}; leave it out, or augment in the data's transform"
        )
    if task.best is not None and (len(task.best) != 2 or task.best[1] not in ("max", "min")):
        raise ValueError(f"task {task.name!r} has best = {task.best!r}; give (metric, 'max') or (metric, 'min')")


def is_better(value: float, than: float | None, direction: str) -> bool:
    """Whether ``value`` beats the best so far; NaN never does.

    >>> is_better(0.2, 0.3, "min"), is_better(0.2, 0.3, "max"), is_better(0.2, None, "max")
    (True, False, True)
    """
    if than is None:
        return value == value
    return value > than if direction == "max" else value < than


def check_not_empty(dataset: Dataset, name: str) -> None:
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; give a data set with at least one image")
