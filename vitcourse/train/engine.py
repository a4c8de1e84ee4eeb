"""The engine: ``fit``, on one device or on many."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm  # text: a widget (tqdm.auto) is gone when the notebook is opened again

from vitcourse.devices import describe_device, device_of, kept_random_state, seed_all
from vitcourse.notices import in_notebook
from vitcourse.weights import check_saveable, save_weights, unwrap

from .augment import Mixer, augment, seed_of
from .batches import Plan, check_data, even_slices, train_batches
from .config import TrainConfig, TrainingError
from .evaluation import evaluate, find_mean_std, normalise
from .optim import Ema, learning_rate, make_optimizer, param_groups, set_learning_rate
from .record import History, RunFolder, TensorBoard
from .runtime import Processes, autocast, deterministic, memory_errors, resolve_precision

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

    Where it trains, ``config.device`` says. By ``"auto"`` a model that lies on an accelerator stays there; any other
    moves to the device of the session (:func:`vitcourse.devices.resolve_device`), and a line on stderr says so.

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
            ``lr_scale`` multiplies the rate, its ``weight_decay`` takes the place of the config's.
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
    config = config or TrainConfig()
    with memory_errors(config):
        trainer = _Trainer(model, train_set, val_set, config, _Hooks(loss_fn, eval_fn, on_epoch_end), groups)
        if out_dir is not None:
            trainer.open(out_dir, resume, about or {}, command)
        elif resume or config.tensorboard:
            raise ValueError("resume and tensorboard need an out_dir")
        return trainer.run(progress)


@dataclass(frozen=True)
class _Hooks:
    loss: LossFn | None
    evaluate: EvalFn | None
    on_epoch_end: Callable[[dict[str, Any]], None] | None


class _Trainer:
    """One run's state: the model and what moves it, the step it is at, the records it keeps."""

    def __init__(
        self,
        model: nn.Module,
        train_set: Dataset,
        val_set: Dataset | None,
        config: TrainConfig,
        hooks: _Hooks,
        groups: list[dict[str, Any]] | None,
    ) -> None:
        self.model, self.train_set, self.val_set, self.config, self.hooks = model, train_set, val_set, config, hooks
        if config.threads:
            torch.set_num_threads(config.threads)
        self.processes = Processes(config, model)
        self.device = self.processes.device
        self.precision = resolve_precision(config.precision, self.device)
        self.share = self.processes.share(config.accum)
        self.plan = Plan(len(train_set), config.batch_size, config.drop_last, config.seed)
        self.num_classes = self._check_data()
        self.total_steps = config.max_steps or config.epochs * self.plan.steps_per_epoch
        self._prepare_model(groups)

        self.folder: RunFolder | None = None
        self.tensorboard: TensorBoard | None = None
        self.command: str | None = None
        self.step, self.history, self.best = 0, History(), -1.0
        self.epoch_loss, self.epoch_norm, self.epoch_images, self.epoch_seconds = 0.0, 0.0, 0, 0.0
        self.pending: list[Tensor] = []  # losses and gradient norms that are still on the device
        self.about = {
            "images": len(train_set),
            "model_class": type(unwrap(model)).__name__,
            "precision": self.precision,
        }

    def _check_data(self) -> int | None:
        """The number of classes; None if it is unknown, or a loss of the caller's own needs none."""
        config, classes = self.config, getattr(self.train_set, "classes", None)
        num_classes = getattr(self.model, "num_classes", None) or (len(classes) if classes else None)
        if self.hooks.loss is not None and not (config.mixup or config.cutmix):
            num_classes = None
        for dataset, name in ((self.train_set, "train_set"), (self.val_set, "val_set")):
            if dataset is not None:
                check_data(dataset, name, num_classes=num_classes, model=self.model)
        if (config.mixup or config.cutmix) and num_classes is None:
            raise ValueError("mixup and cutmix need the number of classes; give the model `num_classes`")
        n, size = len(self.train_set), config.batch_size
        if config.drop_last and n < size:
            raise ValueError(f"train_set has {n} images, fewer than batch_size {size}; use --batch-size {n} or less")
        last = size if config.drop_last else min(size, n % size or size)
        if len(even_slices(0, last, self.share.world)) < self.share.world:
            raise ValueError(
                f"a batch of {last} images is too small for {self.share.world} processes, who take pairs; use "
                "--drop-last and a larger --batch-size"
            )
        return num_classes

    def _prepare_model(self, groups: list[dict[str, Any]] | None) -> None:
        model, config = self.model, self.config
        if config.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise ValueError(f"{type(model).__name__} has no set_grad_checkpointing; leave out grad_checkpointing")
            model.set_grad_checkpointing(True)
        lies = device_of(model)
        self.moved = lies is not None and lies.type != self.device.type
        model.to(self.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        self.mean_std = find_mean_std(model, self.train_set, self.device)
        self.ema = Ema(model, config.ema) if config.ema else None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # A wrapper's names have a prefix, by which no_weight_decay would not find its parameters.
        self.optimizer = make_optimizer(groups or param_groups(unwrap(model), config.weight_decay), config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.replica = self.processes.wrap(model)
        self.net = torch.compile(self.replica) if config.compile else self.replica

    def open(self, out_dir: str | Path, resume: bool, about: dict[str, Any], command: str | None) -> None:
        """Keep records in ``out_dir``, and take up the run that is there if ``resume``."""
        self.about.update(about)
        self.command = command
        check_saveable(self.model)  # now, not after the training
        self.folder = RunFolder(out_dir)
        with self.processes.main_first():
            if self.processes.is_main:
                self.folder.claim(self.config, self.about, resume=resume)
        if resume:
            self._load()
        if self.config.tensorboard and self.processes.is_main:
            self.tensorboard = TensorBoard(self.folder.path / "tensorboard", self.step)

    # ------------------------------------------------------------------------------------------------- the run

    def run(self, progress: bool) -> History:
        config, steps = self.config, range(self.step, self.total_steps)
        if self.moved and progress and self.processes.is_main:
            print(f"vitcourse: the model moves to {self.device} ({describe_device(self.device)})", file=sys.stderr)
        batches = train_batches(self.train_set, self.plan, self.share, steps, config, self.device, self.num_classes)
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            disable=not (progress and self.processes.is_main),
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() or in_notebook() else 10.0,  # a log file needs no smooth bar
        )
        with bar, kept_random_state(), deterministic(config.deterministic):
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
            seed_all(seed_of(config.seed, step, part.start))  # of dropout and stochastic depth
            last = part is slices[-1]
            with contextlib.nullcontext() if last else self.processes.no_sync(self.replica):
                with autocast(self.device, self.precision):
                    loss = (self.hooks.loss or self._cross_entropy)(self.net, images, labels)
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
            self.epoch_norm += norm if math.isfinite(norm) else 0.0
        if self.scaler.is_enabled() and self.scaler.get_scale() < 2**-14:
            raise TrainingError(
                f"fp16 gradients overflow at every scale (step {self.step}); use --precision fp32, or lower --lr"
            )

    def _stop_not_finite(self, step: int, what: str) -> None:
        lr = learning_rate(step, self.total_steps, self.config)
        images = (torch.as_tensor(self.train_set[int(i)][0]) for i in self.plan.batch(step))
        cause = (
            "that batch has images with NaN or infinite pixels: repair the data"
            if any(i.is_floating_point() and not bool(i.isfinite().all()) for i in images)
            else f"lower --lr ({self.config.lr:g}), raise --warmup ({self.config.warmup:g}) or use --precision fp32"
        )
        has_checkpoint = self.folder is not None and self.folder.checkpoint.exists()
        kept = f"; the last good checkpoint is {self.folder.checkpoint}" if has_checkpoint else ""
        raise TrainingError(f"the {what} is not finite at step {step} (lr {lr:.3g}): {cause}{kept}")

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
        if self.hooks.evaluate:
            return self.hooks.evaluate(model, self.val_set)
        return evaluate(
            model, self.val_set, self.config, mean_std=self.mean_std, share=self.share, reduce=self.processes.sum
        )

    def _record(self, row: dict[str, Any]) -> None:
        accuracy = row.get("val_accuracy")
        if self.folder and accuracy is not None and accuracy > self.best:
            self._save_weights("best.safetensors", row)
        self.best = max(self.best, accuracy if accuracy is not None else -1.0)
        if self.tensorboard:
            self.tensorboard.write(row)
        if self.hooks.on_epoch_end:
            self.hooks.on_epoch_end(row)

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
                "model": unwrap(self.model).state_dict(),
                "ema": unwrap(self.ema).state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "history": list(self.history),
                "best": self.best,
                "epoch": [self.epoch_loss, self.epoch_norm, self.epoch_images, self.epoch_seconds],
            }
        )
        self.folder.write_metrics(self.history)

    def _load(self) -> None:
        state = self.folder.load_checkpoint()
        if state is None:
            if self.processes.is_main:
                print(f"vitcourse: {self.folder.path} has no checkpoint yet; starting at step 0", file=sys.stderr)
            return
        unwrap(self.model).load_state_dict(state["model"])
        if self.ema:
            unwrap(self.ema).load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.history = state["step"], state["best"], History(state["history"])
        self.epoch_loss, self.epoch_norm, self.epoch_images, self.epoch_seconds = state["epoch"]

    def _save_weights(self, name: str, row: dict[str, Any]) -> None:
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
