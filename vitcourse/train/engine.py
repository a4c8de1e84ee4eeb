"""The engine: ``fit``, on one device or on many."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm  # text: a widget (tqdm.auto) is gone when the notebook is opened again

from vitcourse.devices import describe_device, device_of, kept_random_state, seed_all, widest_float
from vitcourse.inference import frozen_modules, ignored_mean_std
from vitcourse.notices import in_notebook, say_once
from vitcourse.weights import HEADER_KEYS, check_saveable, save_weights, unwrap

from .augment import seed_of
from .batches import Plan, check_plan, has_bad_numbers, train_batches
from .classification import EvalFn, FunctionTask, LossFn
from .config import TrainConfig, TrainingError
from .ledger import Ledger, check_scale
from .optim import Ema, learning_rate, make_optimizer, set_learning_rate
from .record import History, RunFolder, TensorBoard
from .runtime import Processes, autocast, deterministic, memory_errors, resolve_precision
from .task import Count, Part, Task, check_task, is_better

EpochHook = Callable[[dict[str, Any]], None]


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
    on_epoch_end: EpochHook | None = None,
    about: dict[str, Any] | None = None,
    command: str | None = None,
    progress: bool = True,
    task: Task | None = None,
) -> History:
    """Train ``model`` in place and return what happened, one row per epoch.

    uint8 images are augmented as ``config`` says, scaled to [0, 1] and normalised on the device, by
    ``model.preprocess`` or else by the mean and std of ``train_set``; floating-point images are taken as they come
    (then only crops, flips and mixing apply). Afterwards the model holds the weights that the last evaluation
    measured, which with ``config.ema`` are their running mean, and is in evaluation mode.

    What a caller has frozen stays frozen: parts in evaluation mode of a model in training mode, and batch norms without
    a parameter to train (:func:`vitcourse.inference.frozen_modules`).

    Where it trains, ``config.device`` says. By ``"auto"`` a model that lies on an accelerator stays there; any other
    moves to the device of the session (:func:`vitcourse.devices.resolve_device`), and a line on stderr says so.

    Launched by ``torchrun`` or ``accelerate launch``, every process calls this, and each takes its share of every
    batch; ``config.batch_size`` stays the size of the whole.

    Args:
        model: images (B, C, H, W) to logits (B, num_classes), or whatever ``loss_fn`` or ``task`` makes of it.
        train_set: pairs (image, label), or the samples that ``task`` takes; a random transform in it is seeded by
            (seed, epoch, index).
        val_set: evaluated after every ``config.eval_every`` epochs and at the end.
        config: every other choice; the defaults are in :class:`TrainConfig`.
        out_dir: folder for checkpoints, metrics and weights; without one nothing is written.
        resume: continue the run in ``out_dir`` from its last checkpoint, to the same weights as without a break.
        loss_fn: ``loss_fn(model, images, labels)``, a mean over the images; cross-entropy by default.
        eval_fn: ``eval_fn(model, val_set)``, a dict that joins the row; ``{"val_loss", "val_accuracy"}`` by default.
        groups: parameter groups for the optimizer in place of ``task.groups(model, config)``; a group's
            ``lr_scale`` multiplies the rate, its ``weight_decay`` takes the place of the config's.
        on_epoch_end: called with each finished row.
        about: facts that must not change between a run and its continuation, and that go into the weights file.
        command: the command line of this run, to be kept beside the weights.
        progress: show a bar on stderr.
        task: what is learned, where it is not image classification; takes the place of ``loss_fn`` and ``eval_fn``.

    Raises:
        ValueError: data, model, task and config do not fit together; ``out_dir`` has another run.
        TrainingError: the loss is not finite, memory is full, or a checkpoint is damaged.

    >>> from vitcourse.data import open_dataset, subset
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    >>> few = subset(open_dataset("fashion_mnist_subset"), 500)
    >>> history = fit(model, few, few, TrainConfig(epochs=4, batch_size=50, lr=1e-2), progress=False)
    >>> len(history), history[-1]["val_accuracy"] > 0.7
    (4, True)
    """
    config = config or TrainConfig()
    if task is not None and (loss_fn or eval_fn):
        raise ValueError("task brings its own loss and evaluation; leave out loss_fn and eval_fn")
    task = task or FunctionTask(loss_fn, eval_fn)
    with memory_errors(config):
        trainer = _Trainer(model, train_set, val_set, config, task, groups, on_epoch_end)
        if out_dir is not None:
            trainer.open(out_dir, resume, about or {}, command)
        elif resume or config.tensorboard:
            raise ValueError("resume and tensorboard need an out_dir")
        return trainer.run(progress)


class _Trainer:
    """One run's state: the model and what moves it, the step it is at, the records it keeps."""

    def __init__(
        self,
        model: nn.Module,
        train_set: Dataset,
        val_set: Dataset | None,
        config: TrainConfig,
        task: Task,
        groups: list[dict[str, Any]] | None,
        on_epoch_end: EpochHook | None,
    ) -> None:
        self.model, self.train_set, self.val_set, self.config, self.task = model, train_set, val_set, config, task
        self.on_epoch_end = on_epoch_end
        if config.threads:
            torch.set_num_threads(config.threads)
        self.processes = Processes(config, model, task.partly_trained)
        self.device = self.processes.device
        self.precision = resolve_precision(config.precision, self.device)
        self.share = self.processes.share(config.accum)
        self.plan = Plan(len(train_set), config.batch_size, config.drop_last, config.seed)
        check_task(task, config, self.share.world)
        task.check_data(model, train_set, val_set, config)
        check_plan(self.plan, self.share)
        self.total_steps = config.max_steps or config.epochs * self.plan.steps_per_epoch
        self._prepare_model(groups)

        self.folder: RunFolder | None = None
        self.tensorboard: TensorBoard | None = None
        self.command: str | None = None
        self.step, self.history = 0, History()
        self.best: float | None = None
        self.ledger = Ledger(self.processes.sum, self.precision)
        self.about = {
            "task": task.name,
            "images": len(train_set),
            "model_class": type(unwrap(model)).__name__,
            "precision": self.precision,
            **task.settings(),
        }

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
        self.task.setup(unwrap(model), self.train_set, config, self.device)
        self.frozen = frozen_modules(model)
        self.ema = Ema(model, config.ema) if config.ema else None
        # A wrapper's names have a prefix, by which no_weight_decay would not find its parameters.
        self.optimizer = make_optimizer(groups or self.task.groups(unwrap(model), config), config)
        trained = {id(p): p for group in self.optimizer.param_groups for p in group["params"]}
        self.parameters = [p for p in model.parameters() if trained.pop(id(p), None) is not None]
        self.parameters += trained.values()  # what is in the caller's groups, and not in the model
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.replica = self.processes.wrap(model)
        self.net = torch.compile(self.replica) if config.compile else self.replica

    def open(self, out_dir: str | Path, resume: bool, about: dict[str, Any], command: str | None) -> None:
        """Keep records in ``out_dir``, and take up the run that is there if ``resume``."""
        self.about.update(about)
        self.command = command
        check_saveable(self.task.product(self.model))  # now, not after the training
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
        if self.processes.is_main and (line := ignored_mean_std(self.model, self.train_set)):
            say_once(line)
        if self.moved and progress and self.processes.is_main:
            print(f"vitcourse: the model moves to {self.device} ({describe_device(self.device)})", file=sys.stderr)
        batches = train_batches(self.train_set, self.plan, self.share, steps, config, self.device, self.task)
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            disable=not (progress and self.processes.is_main),
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() or in_notebook() else 10.0,  # a log file needs no smooth bar
        )
        with bar, kept_random_state(), deterministic(config.deterministic):
            self.model.zero_grad(set_to_none=True)  # what a caller's own backward pass has left
            self.model.train()
            for module in self.frozen:
                module.training = False
            while self.step < self.total_steps:
                started = time.perf_counter()
                self._train_step(batches)
                self.ledger.seconds += time.perf_counter() - started
                bar.update()
                self._after_step(bar)
            self._finish()
        return self.history

    def _train_step(self, batches: Iterator[Any]) -> None:
        self.task.before_step(unwrap(self.model), self.optimizer, self.step, self.total_steps)
        size, world = len(self.plan.batch(self.step)), self.share.world
        expected = size * self.task.per_sample
        slices = self.share.slices(size)
        loss_sum = torch.zeros((), device=self.device)
        counted = torch.zeros((), dtype=widest_float(self.device), device=self.device)
        for part in slices:
            batch = self.task.prepare(next(batches), self._place(part, size))
            seed_all(seed_of(self.config.seed, self.step, part.start))  # of dropout and stochastic depth
            last = part is slices[-1]
            with contextlib.nullcontext() if last else self.processes.no_sync(self.replica):
                with autocast(self.device, self.precision):
                    loss, count = self.task.contribution(self.net, batch, expected)
                self._check_loss(loss, count, part.stop - part.start)
                # Means of the parts, weighted by their counts, are the mean of the whole; DDP divides by `world`.
                self.scaler.scale(loss * world).backward()
            loss_sum += loss.detach()
            if not self.task.counts_samples:
                counted += torch.as_tensor(count).detach().to(counted)
        # Until all parts were seen, nobody knew the count that the sum is to be divided by.
        if self.task.counts_samples:
            self._update(loss_sum)
        else:
            self._update(loss_sum, _ratio(expected, self.processes.sum(counted).clamp(min=self.task.least_count)))

    def _place(self, part: slice, size: int) -> Part:
        return Part(self.plan.epoch_of(self.step), self.step, part.start, size, self.plan.batch(self.step)[part])

    def _check_loss(self, loss: Tensor, count: Count, samples: int) -> None:
        if self.task.counts_samples and count != samples:
            raise ValueError(
                f"task {self.task.name!r} counts {count} of {samples} samples, and says that it counts samples; leave "
                "counts_samples False"
            )
        if loss.ndim or not loss.requires_grad:
            what = f"has shape {tuple(loss.shape)}" if loss.ndim else "does not depend on a trained parameter"
            raise ValueError(
                f"the loss of task {self.task.name!r} {what}; return one number that the model's output enters, also "
                "where nothing is counted"
            )

    def _update(self, loss: Tensor, correction: Tensor | None = None) -> None:
        config = self.config
        set_learning_rate(self.optimizer, learning_rate(self.step, self.total_steps, config))
        self.scaler.unscale_(self.optimizer)
        if correction is not None:
            loss = loss * correction
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(correction.to(parameter.grad.dtype))
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip_grad or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)  # also of what is in none of the caller's groups
        with torch.no_grad():
            self.task.after_step(unwrap(self.model), self.step, self.total_steps)
        if self.ema:  # last, for the buffers that the task has changed
            self.ema.update(self.model, self.step)
        self.ledger.add(loss, norm, len(self.plan.batch(self.step)))
        self.step += 1

    # ------------------------------------------------------------------------------ between the steps: keep records

    def _after_step(self, bar: tqdm) -> None:
        config, finished = self.config, self.step == self.total_steps
        epoch_ends = self.step % self.plan.steps_per_epoch == 0 or finished
        due = self.step % config.checkpoint_every == 0 if config.checkpoint_every else epoch_ends
        if epoch_ends or due or self.device.type == "cpu" or len(self.ledger.pending) >= 50:
            self._check_losses()
        if epoch_ends:
            self._end_epoch(finished)
            bar.set_postfix({k: round(v, 4) for k, v in self.history[-1].items() if k in self.shown and v is not None})
        if due or finished:
            self._save()

    def _check_losses(self) -> None:
        """Fetch the losses of the last steps from the device, all at once, and stop if one is not finite."""
        if found := self.ledger.settle():
            ago, what = found
            self._stop_not_finite(self.step - ago, what)
        check_scale(self.scaler, self.step)

    def _stop_not_finite(self, step: int, what: str) -> None:
        lr = learning_rate(step, self.total_steps, self.config)
        cause = (
            "that batch has images with NaN or infinite pixels: repair the data"
            if any(has_bad_numbers(self.train_set[int(i)]) for i in self.plan.batch(step))
            else f"lower --lr ({self.config.lr:g}), raise --warmup ({self.config.warmup:g}) or use --precision fp32"
        )
        has_checkpoint = self.folder is not None and self.folder.checkpoint.exists()
        kept = f"; the last good checkpoint is {self.folder.checkpoint}" if has_checkpoint else ""
        raise TrainingError(f"the {what} is not finite at step {step} (lr {lr:.3g}): {cause}{kept}")

    @property
    def shown(self) -> tuple[str, ...]:
        return ("epoch", "train_loss", *self.task.metrics)

    def _end_epoch(self, finished: bool) -> None:
        epoch = self.plan.epoch_of(self.step - 1) + 1
        means, speed = self.ledger.close(self.step - (epoch - 1) * self.plan.steps_per_epoch)
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "lr": learning_rate(self.step - 1, self.total_steps, self.config),
            **means,
            **dict.fromkeys(self.task.metrics),
            **speed,
        }
        row.update(self.task.after_epoch(unwrap(self.model)))
        if self.val_set is not None and (finished or epoch % self.config.eval_every == 0):
            model = self.ema.model if self.ema else self.model
            row.update(
                self.task.evaluate(model, self.val_set, self.config, share=self.share, reduce=self.processes.sum)
            )
        self.history.append(row)
        if self.processes.is_main:
            self._record(row)

    def _record(self, row: dict[str, Any]) -> None:
        metric, direction = self.task.best or (None, "max")
        value = row.get(metric)
        if value is not None and is_better(value, self.best, direction):
            self.best = value
            if self.folder:
                self._save_weights("best.safetensors", row)
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
                "model": unwrap(self.model).state_dict(),
                "ema": unwrap(self.ema).state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "history": list(self.history),
                "best": self.best,
                "epoch": self.ledger.state(),
                "task": self.task.state_dict(),
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
        self.ledger.load(state["epoch"])
        self.task.load_state_dict(state.get("task", {}))

    def _save_weights(self, name: str, row: dict[str, Any]) -> None:
        model = self.ema.model if self.ema else self.model
        measured = {k: row[k] for k in ("epoch", "step", *self.task.metrics) if row.get(k) is not None}
        facts = {
            "classes": self.task.class_names(self.train_set),
            "seed": self.config.seed,
            "command": self.command,
            **{k: v for k, v in self.about.items() if k not in HEADER_KEYS},  # save_weights knows these better
            **measured,
        }
        save_weights(self.task.product(model), self.folder.path / name, half=self.config.save_dtype == "fp16", **facts)


def _ratio(expected: float, counted: Tensor) -> Tensor:
    """What brings a sum divided by ``expected`` to a mean over what was counted; 1 where that is nothing."""
    return torch.where(counted > 0, expected / counted.clamp(min=torch.finfo(counted.dtype).tiny), 1.0)
