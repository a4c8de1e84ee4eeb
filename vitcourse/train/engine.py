"""The engine: ``fit`` and ``evaluate``, on one device or on many."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .augment import Mixer, augment, seed_of
from .batches import Plan, Share, TrainBatches, check_data, eval_batches
from .config import TrainConfig, TrainingError
from .optim import Ema, learning_rate, make_optimizer, param_groups, set_learning_rate
from .record import History, RunFolder, TensorBoard

LossFn = Callable[[nn.Module, Tensor, Tensor], Tensor]
EvalFn = Callable[[nn.Module, Dataset], dict[str, float]]


def fit(
    model: nn.Module,
    train_set: Dataset,
    val_set: Dataset | None = None,
    config: TrainConfig | None = None,
    *,
    out_dir: str | Path | None = None,
    resume: bool = False,
    loss_fn: LossFn | None = None,
    eval_fn: EvalFn | None = None,
    groups: list[dict[str, Any]] | None = None,
    on_epoch_end: Callable[[dict[str, Any]], None] | None = None,
    about: dict[str, Any] | None = None,
    command: str | None = None,
    progress: bool = True,
) -> History:
    """Train ``model`` in place and return what happened, one row per epoch.

    uint8 images are augmented as ``config`` says, scaled to [0, 1] and normalised on the device, by
    ``model.preprocess`` or else by the mean and std of ``train_set``; floating-point images are taken as they come
    (then only crops, flips and mixing apply). Afterwards the model holds the weights that the last evaluation
    measured, which with ``config.ema`` are their running mean, and is in evaluation mode.

    Launched by ``torchrun`` or ``accelerate launch``, every process calls this, and each takes its share of every
    batch; ``config.batch_size`` stays the size of the whole.

    Args:
        model: images (B, C, H, W) to logits (B, num_classes), or whatever ``loss_fn`` makes of it.
        train_set: pairs (image, label); a random transform in it is seeded by (seed, epoch, index).
        val_set: evaluated after every ``config.eval_every`` epochs and at the end.
        config: every other choice; the defaults are in :class:`TrainConfig`.
        out_dir: folder for checkpoints, metrics and weights; without one nothing is written.
        resume: continue the run in ``out_dir`` from its last checkpoint, to the same weights as without a break.
        loss_fn: ``loss_fn(model, images, labels)``, a mean over the images; cross-entropy by default.
        eval_fn: ``eval_fn(model, val_set)``, a dict that joins the row; ``{"val_loss", "val_accuracy"}`` by default.
        groups: parameter groups for the optimizer in place of ``param_groups(model, config.weight_decay)``; a group's
            ``lr_scale`` multiplies the rate.
        on_epoch_end: called with each finished row.
        about: facts that must not change between a run and its continuation, and that go into the weights file.
        command: the command line of this run, to be kept beside the weights.
        progress: show a bar on stderr.

    Raises:
        ValueError: data, model and config do not fit together; ``out_dir`` has another run.
        TrainingError: the loss is not finite, memory is full, or a checkpoint is damaged.

    >>> from vitcourse.data import open_dataset, subset
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    >>> few = subset(open_dataset("fashion_mnist_subset"), 500)
    >>> history = fit(model, few, few, TrainConfig(epochs=4, batch_size=50, lr=1e-2), progress=False)
    >>> len(history), history[-1]["val_accuracy"] > 0.7
    (4, True)
    """
    trainer = _Trainer(
        model,
        train_set,
        val_set,
        config or TrainConfig(),
        out_dir=out_dir,
        resume=resume,
        loss_fn=loss_fn,
        eval_fn=eval_fn,
        groups=groups,
        on_epoch_end=on_epoch_end,
        about=about or {},
        command=command,
        progress=progress,
    )
    return trainer.run()


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    config: TrainConfig | None = None,
    device: torch.device | str | None = None,
    mean_std: tuple[Tensor, Tensor] | None = None,
    share: Share | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Mean cross-entropy and accuracy of ``model`` on a data set: ``{"val_loss", "val_accuracy"}``.

    Every image counts exactly once, in a distributed run too. ``config`` gives precision, batch size and workers.

    >>> from vitcourse.data import open_dataset
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    >>> sorted(evaluate(model, open_dataset("fashion_mnist_subset", "test")))
    ['val_accuracy', 'val_loss']
    """
    config = config or TrainConfig()
    device = torch.device(device) if device else next(model.parameters()).device
    mean_std = mean_std or find_mean_std(model, dataset, device)
    was_training = model.training
    model.eval()
    sums = []
    with torch.inference_mode(), autocast(device, config.precision):
        for images, labels in eval_batches(dataset, share or Share(), config, device):
            logits = model(normalise(images, mean_std)).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums.append(torch.stack([loss, (logits.argmax(1) == labels).sum().to(loss)]))
    model.train(was_training)
    total = torch.stack(sums).sum(0) if sums else torch.zeros(2, device=device)
    loss, correct = (reduce(total) if reduce else total).tolist()
    return {"val_loss": loss / len(dataset), "val_accuracy": correct / len(dataset)}


def find_mean_std(model: nn.Module, dataset: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per channel (C, 1, 1): the model's own mean and std if it has some, else those of the data set.

    Raises:
        ValueError: neither says, and the images are uint8.
    """
    source = getattr(model, "preprocess", None) or dataset
    if not hasattr(source, "mean"):
        if dataset[0][0].dtype == torch.uint8:
            raise ValueError("uint8 images need mean and std to be normalised; set model.preprocess or the data set's")
        source = _UNIT
    return tuple(torch.tensor(v, device=device).view(-1, 1, 1) for v in (source.mean, source.std))


class _UNIT:
    mean, std = (0.0,), (1.0,)


def normalise(images: Tensor, mean_std: tuple[Tensor, Tensor]) -> Tensor:
    """uint8 images (B, C, H, W) to standardised float32; floating-point images are what they should be already."""
    if images.is_floating_point():
        return images
    mean, std = mean_std
    return (images.float() / 255 - mean) / std


def resolve_device(name: str) -> torch.device:
    """The device that is asked for, or for ``"auto"`` the best there is.

    Raises:
        ValueError: there is no such device here.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in has.items() if present)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; use auto, cuda, mps or cpu") from None
    if not has.get(device.type, True):
        raise ValueError(f"device {name!r} is not available here; use --device auto or cpu")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """What ``"auto"`` means on a device: bf16 where it is native (compute capability 8), fp16 on older GPUs."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    precision = resolve_precision(precision, device)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


class _Processes:
    """One process, or several under Accelerate: what differs between the two."""

    def __init__(self, config: TrainConfig) -> None:
        self.accelerator = None
        self.device = resolve_device(config.device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise TrainingError("several processes need Accelerate: pip install accelerate") from error
            self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")
            self.device = self.accelerator.device

    def share(self, accum: int) -> Share:
        if self.accelerator is None:
            return Share(0, 1, accum)
        return Share(self.accelerator.process_index, self.accelerator.num_processes, accum)

    @property
    def is_main(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    def wrap(self, model: nn.Module) -> nn.Module:
        return model if self.accelerator is None else self.accelerator.prepare_model(model)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.accelerator is None else self.accelerator.no_sync(model)

    def sum(self, values: Tensor) -> Tensor:
        return values if self.accelerator is None else self.accelerator.reduce(values, "sum")

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


class _Trainer:
    def __init__(
        self, model: nn.Module, train_set: Dataset, val_set: Dataset | None, config: TrainConfig, **options: Any
    ) -> None:
        self.model, self.train_set, self.val_set, self.config = model, train_set, val_set, config
        self.loss_fn, self.eval_fn = options["loss_fn"] or self._cross_entropy, options["eval_fn"]
        self.on_epoch_end, self.progress, self.command = (options[k] for k in ("on_epoch_end", "progress", "command"))
        if config.threads:
            torch.set_num_threads(config.threads)
        self.processes = _Processes(config)
        self.device = self.processes.device
        self.share = self.processes.share(config.accum)
        self.precision = resolve_precision(config.precision, self.device)

        self.num_classes = getattr(model, "num_classes", None) or len(getattr(train_set, "classes", ())) or None
        for dataset, name in ((train_set, "train_set"), (val_set, "val_set")):
            if dataset is not None:
                classes = self.num_classes if options["loss_fn"] is None else None
                check_data(dataset, name, num_classes=classes, model=model)
        if (config.mixup or config.cutmix) and self.num_classes is None:
            raise ValueError("mixup and cutmix need the number of classes; give the model `num_classes`")
        self.plan = Plan(len(train_set), config.batch_size, config.drop_last, config.seed)
        self._check_batches()
        self.total_steps = config.max_steps or config.epochs * self.plan.steps_per_epoch

        self._prepare_model(options["groups"])
        self.step, self.history, self.best = 0, History(), -1.0
        self.epoch_loss, self.epoch_norm, self.epoch_images, self.epoch_seconds = 0.0, 0.0, 0, 0.0
        self.pending: list[Tensor] = []
        self.about = {**options["about"], "images": len(train_set), "model_class": type(model).__name__}
        self.folder = self._open_folder(options["out_dir"], options["resume"])

    def _check_batches(self) -> None:
        n, config = len(self.train_set), self.config
        if config.drop_last and n < config.batch_size:
            raise ValueError(
                f"train_set has {n} images, fewer than batch_size {config.batch_size}; use --batch-size {n} or less"
            )
        last = config.batch_size if config.drop_last else (n % config.batch_size or config.batch_size)
        if min(last, config.batch_size) < 2 * self.share.world - 1:
            raise ValueError(
                f"a batch of {last} images cannot be shared by {self.share.world} processes, who take pairs; "
                "use a larger --batch-size, and --drop-last"
            )

    def _prepare_model(self, groups: list[dict[str, Any]] | None) -> None:
        model, config = self.model, self.config
        if config.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise ValueError(f"{type(model).__name__} has no set_grad_checkpointing; leave out grad_checkpointing")
            model.set_grad_checkpointing(True)
        model.to(self.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        self.mean_std = find_mean_std(model, self.train_set, self.device)
        self.ema = Ema(model, config.ema) if config.ema else None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(groups or param_groups(model, config.weight_decay), config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.net = self.processes.wrap(torch.compile(model) if config.compile else model)

    def _open_folder(self, out_dir: str | Path | None, resume: bool) -> RunFolder | None:
        self.tensorboard = None
        if out_dir is None:
            if resume or self.config.tensorboard:
                raise ValueError("resume and tensorboard need an out_dir")
            return None
        if self.processes.is_main:
            folder = RunFolder(out_dir, self.config, {**self.about, "precision": self.precision}, resume=resume)
        self.processes.wait()
        if not self.processes.is_main:
            folder = RunFolder(out_dir, self.config, {**self.about, "precision": self.precision}, resume=True)
        if resume:
            self._load(folder)
        if self.config.tensorboard and self.processes.is_main:
            self.tensorboard = TensorBoard(folder.path / "tensorboard", self.step)
        return folder

    # ------------------------------------------------------------------------------------------------- the run

    def run(self) -> History:
        batches = iter(
            TrainBatches(
                self.train_set, self.plan, self.share, range(self.step, self.total_steps), self.config, self.device
            )
        )
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            disable=not (self.progress and self.processes.is_main),
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )
        with (
            bar,
            _own_random_state(self.device),
            _deterministic(self.config.deterministic),
            _memory_errors(self.config),
        ):
            self.model.train()
            while self.step < self.total_steps:
                started = time.perf_counter()
                self._train_step(batches)
                self.epoch_seconds += time.perf_counter() - started
                bar.update()
                self._after_step(bar)
            self._finish()
        return self.history

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        config, step = self.config, self.step
        size = len(self.plan.batch(step))
        mixer = Mixer(config, self.num_classes, step, size) if config.mixup or config.cutmix else None
        slices = self.share.slices(size)
        loss_sum = torch.zeros((), device=self.device)
        for part in slices:
            images, labels = self._prepare(next(batches), part, mixer)
            torch.manual_seed(seed_of(config.seed, step, part.start))  # of dropout and stochastic depth
            last = part is slices[-1]
            with contextlib.nullcontext() if last else self.processes.no_sync(self.net):
                with autocast(self.device, self.precision):
                    loss = self.loss_fn(self.net, images, labels)
                # Means of the parts, weighted by their sizes, are the mean of the whole; DDP divides by `world`.
                weight = (part.stop - part.start) / size
                self.scaler.scale(loss * (weight * self.share.world)).backward()
            loss_sum += loss.detach() * weight
        self._update(loss_sum)

    def _prepare(self, batch: tuple[Tensor, Tensor], part: slice, mixer: Mixer | None) -> tuple[Tensor, Tensor]:
        images, labels = batch
        index = self.plan.batch(self.step)[part]
        images = augment(images, index, self.plan.epoch_of(self.step), self.config)
        images = normalise(images, self.mean_std)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return mixer(images, labels, part.start) if mixer else (images, labels)

    def _cross_entropy(self, net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        logits = net(images)
        if logits.ndim != 2 or (self.num_classes and logits.shape[1] != self.num_classes):
            expected = f"(B, {self.num_classes or 'num_classes'})"
            raise ValueError(f"the model's output has shape {tuple(logits.shape)}, expected logits {expected}")
        return F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)

    def _update(self, loss: Tensor) -> None:
        config = self.config
        set_learning_rate(self.optimizer, learning_rate(self.step, self.total_steps, config))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip_grad or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, self.step)
        self.pending.append(torch.stack([loss.float(), norm.float()]))
        self.epoch_images += len(self.plan.batch(self.step))
        self.step += 1

    # ------------------------------------------------------------------------------ between the steps: keep records

    def _after_step(self, bar: tqdm) -> None:
        config, finished = self.config, self.step == self.total_steps
        epoch_ends = self.step % self.plan.steps_per_epoch == 0 or finished
        due = self.step % config.checkpoint_every == 0 if config.checkpoint_every else epoch_ends
        if epoch_ends or due or self.device.type == "cpu" or len(self.pending) >= 50:
            self._check_losses()
        if epoch_ends:
            self._end_epoch(finished)
            bar.set_postfix({k: round(v, 4) for k, v in self.history[-1].items() if k in _SHOWN and v is not None})
        if due or finished:
            self._save()

    def _check_losses(self) -> None:
        """Fetch the losses of the last steps from the device, all at once, and stop if one is not finite."""
        started, first = time.perf_counter(), self.step - len(self.pending)
        losses, norms = torch.stack(self.pending, dim=1)
        losses, norms = self.processes.sum(losses).tolist(), norms.tolist()
        self.pending.clear()
        self.epoch_seconds += time.perf_counter() - started  # this is where a GPU is waited for
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.precision == "fp16"):
                self._stop_not_finite(first + i, "loss" if not math.isfinite(loss) else "gradient")
            self.epoch_loss += loss
            self.epoch_norm += norm

    def _stop_not_finite(self, step: int, what: str) -> None:
        lr = learning_rate(step, self.total_steps, self.config)
        images = (torch.as_tensor(self.train_set[int(i)][0]) for i in self.plan.batch(step))
        cause = (
            "that batch has images with NaN or infinite pixels: repair the data"
            if any(i.is_floating_point() and not bool(i.isfinite().all()) for i in images)
            else f"lower --lr ({self.config.lr:g}), raise --warmup ({self.config.warmup:g}) or use --precision fp32"
        )
        kept = f"; the last good checkpoint is {self.folder.checkpoint}" if self._has_checkpoint() else ""
        raise TrainingError(f"the {what} is not finite at step {step} (lr {lr:.3g}): {cause}{kept}")

    def _has_checkpoint(self) -> bool:
        return self.folder is not None and self.folder.checkpoint.exists()

    def _end_epoch(self, finished: bool) -> None:
        epoch = self.plan.epoch_of(self.step - 1) + 1
        first = (epoch - 1) * self.plan.steps_per_epoch
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "lr": learning_rate(self.step - 1, self.total_steps, self.config),
            "train_loss": self.epoch_loss / (self.step - first),
            "grad_norm": self.epoch_norm / (self.step - first),
            "val_loss": None,
            "val_accuracy": None,
            "seconds": self.epoch_seconds,
            "images_per_second": self.epoch_images / max(self.epoch_seconds, 1e-9),
        }
        if self.val_set is not None and (finished or epoch % self.config.eval_every == 0):
            row.update(self._evaluate())
        self.history.append(row)
        self.epoch_loss, self.epoch_norm, self.epoch_images, self.epoch_seconds = 0.0, 0.0, 0, 0.0
        if self.processes.is_main:
            self._record(row)

    def _evaluate(self) -> dict[str, float]:
        model = self.ema.model if self.ema else self.model
        if self.eval_fn:
            return self.eval_fn(model, self.val_set)
        return evaluate(
            model,
            self.val_set,
            config=self.config,
            device=self.device,
            mean_std=self.mean_std,
            share=self.share,
            reduce=self.processes.sum,
        )

    def _record(self, row: dict[str, Any]) -> None:
        accuracy = row.get("val_accuracy")
        if self.folder and accuracy is not None and accuracy > self.best:
            self._save_weights("best.safetensors", row)
        self.best = max(self.best, accuracy if accuracy is not None else -1.0)
        if self.tensorboard:
            self.tensorboard.write(row)
        if self.on_epoch_end:
            self.on_epoch_end(row)

    def _finish(self) -> None:
        if self.ema:
            self.model.load_state_dict(self.ema.model.state_dict())
        self.model.eval()
        if self.folder and self.processes.is_main:
            self.folder.write_metrics(self.history)
            self._save_weights("final.safetensors", self.history[-1])
        self.processes.wait()

    # --------------------------------------------------------------------------------------- checkpoints, weights

    def _save(self) -> None:
        if not (self.folder and self.processes.is_main):
            return
        self.folder.save_checkpoint(
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "ema": self.ema.model.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "history": list(self.history),
                "best": self.best,
                "epoch": [self.epoch_loss, self.epoch_norm, self.epoch_images, self.epoch_seconds],
            }
        )
        self.folder.write_metrics(self.history)

    def _load(self, folder: RunFolder) -> None:
        state = folder.load_checkpoint()
        if state is None:
            print(f"vitcourse: {folder.path} has no checkpoint yet; starting at step 0", file=sys.stderr)
            return
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.history = state["step"], state["best"], History(state["history"])
        self.epoch_loss, self.epoch_norm, self.epoch_images, self.epoch_seconds = state["epoch"]

    def _save_weights(self, name: str, row: dict[str, Any]) -> None:
        from vitcourse.registry import save_weights

        model = self.ema.model if self.ema else self.model
        measured = {k: row[k] for k in ("epoch", "step", "val_loss", "val_accuracy") if row[k] is not None}
        facts = {
            "classes": getattr(self.train_set, "classes", None),
            "seed": self.config.seed,
            "command": self.command,
            **self.about,
            **measured,
        }
        save_weights(model, self.folder.path / name, half=self.config.save_dtype == "fp16", **facts)


_SHOWN = ("epoch", "train_loss", "val_loss", "val_accuracy")


@contextlib.contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Leave the caller's random numbers as they were: the engine seeds the global generators at every step."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def _memory_errors(config: TrainConfig) -> Iterator[None]:
    """Turn a full memory into advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(s in str(error) for s in _FULL):
            raise
        raise TrainingError(
            f"out of memory with batch_size {config.batch_size} in {config.accum} micro-batches; use --accum "
            f"{2 * config.accum} (same result, half the memory), --grad-checkpointing, or a smaller --batch-size"
        ) from error


_FULL = ("can't allocate memory", "not enough memory", "out of memory")
