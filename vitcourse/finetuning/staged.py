"""Staged fine-tuning: what is trained when, as data; parts are thawed, or frozen, while a run goes on.

The textbook starts with the shallow parts and thaws deeper ones step by step; gradual unfreezing (Howard and Ruder
2018, sec. 3.3) starts with the head and goes down; surgical fine-tuning (Lee et al. 2023) trains one part alone, chosen
by what differs between the old data and the new.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from vitcourse.registry import nearest
from vitcourse.train.batches import Plan
from vitcourse.train.config import TrainConfig
from vitcourse.train.task import AroundTask, Task

from .parts import free_names, hold, parts_of, release, select


@dataclass(frozen=True)
class Stage:
    """A stretch of a run, and what is trained in it; all else is frozen.

    Attributes:
        train: patterns, see :func:`vitcourse.finetuning.select`.
        share: its share of the run's steps; stages that say neither share evenly what the others leave.
        epochs: its length in epochs, in place of a share.
    """

    train: tuple[str, ...]
    share: float | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.train, str) or not self.train:
            raise ValueError(f"train={self.train!r} of a stage must be a list of patterns such as ('head', 'blocks.3')")
        object.__setattr__(self, "train", tuple(self.train))
        if self.share is not None and self.epochs is not None:
            raise ValueError(f"a stage has share={self.share} and epochs={self.epochs}; give one of them")
        for name in ("share", "epochs"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} of a stage must be above 0")


def as_stages(stages: Sequence[Stage | Mapping[str, Any]]) -> list[Stage]:
    """Stages that may be written as dicts, as on the command line and in a recipe.

    Raises:
        ValueError: what is neither, or has another key than a stage's attributes.

    >>> as_stages([{"train": ["head"], "share": 0.5}])
    [Stage(train=('head',), share=0.5, epochs=None)]
    """
    known = [field.name for field in fields(Stage)]
    for stage in stages:
        if not isinstance(stage, Stage | Mapping):
            raise ValueError(f"stages: {stage!r} is no stage; write {{'train': ['head', 'blocks.3'], 'share': 0.5}}")
        for key in () if isinstance(stage, Stage) else stage:
            if key not in known:
                raise ValueError(f"stages: a stage has no {key!r}{nearest(str(key), known)}; it has {', '.join(known)}")
        if not isinstance(stage, Stage) and "train" not in stage:
            raise ValueError(f"stages: {dict(stage)} does not say what it trains; give it 'train', a list of patterns")
    return [stage if isinstance(stage, Stage) else Stage(**stage) for stage in stages]


def deep_first(model: nn.Module, stages: int = 3) -> list[Stage]:
    """The head first, then with each stage more of the body, from deep to shallow (gradual unfreezing).

    >>> from vitcourse import create_model
    >>> for stage in deep_first(create_model("vit_tiny", img_size=32, patch_size=16, depth=2), 3):
    ...     print(*stage.train)
    head
    head blocks.1 norm
    head patch_embed blocks.0 blocks.1 norm
    """
    body, head = _body_and_head(model)
    _check_count(stages, len(body) + 1)
    counts = [len(body)] if stages == 1 else [round(i * len(body) / (stages - 1)) for i in range(stages)]
    return [Stage((*head, *body[len(body) - n :])) for n in counts]


def shallow_first(model: nn.Module, stages: int = 3) -> list[Stage]:
    """The head and the shallowest parts first, then with each stage deeper ones too, as the textbook has it.

    The head is always trained, since a new one would tell the others nothing. The gradient passes through all that lies
    between, so that no stage is cheaper by more than the weights' own gradients.

    >>> from vitcourse import create_model
    >>> for stage in shallow_first(create_model("vit_tiny", img_size=32, patch_size=16, depth=2), 3):
    ...     print(*stage.train)
    head patch_embed
    head patch_embed blocks.0 blocks.1
    head patch_embed blocks.0 blocks.1 norm
    """
    body, head = _body_and_head(model)
    _check_count(stages, len(body))
    return [Stage((*head, *body[: round((i + 1) * len(body) / stages)])) for i in range(stages)]


SCHEDULES = {"deep_first": deep_first, "shallow_first": shallow_first}


def _body_and_head(model: nn.Module) -> tuple[list[str], list[str]]:
    parts = list(parts_of(model))
    return [part for part in parts if part != "head"], [part for part in parts if part == "head"]


def _check_count(stages: int, most: int) -> None:
    if not (isinstance(stages, int) and 1 <= stages <= most):
        raise ValueError(f"stages must be between 1 and {most}, as many as there are parts to thaw; got {stages!r}")


def stage_starts(stages: Sequence[Stage], total_steps: int, steps_per_epoch: int) -> list[int]:
    """The first step of each stage, from 0.

    Raises:
        ValueError: the stages are longer than the run, or shorter, or one of them has no step.

    >>> stages = [Stage(("head",), epochs=1), Stage(("head", "blocks.1")), Stage(("*",), share=0.5)]
    >>> stage_starts(stages, total_steps=100, steps_per_epoch=10)
    [0, 10, 50]
    """
    lengths = [
        stage.share * total_steps if stage.share is not None else stage.epochs and stage.epochs * steps_per_epoch
        for stage in stages
    ]
    told, open_ended = sum(filter(None, lengths)), lengths.count(None)
    left = total_steps - told
    run = f"the run has {total_steps} steps ({total_steps / steps_per_epoch:g} epochs)"
    if left < -1e-6 * total_steps or (open_ended and left < open_ended):
        more = f", and {open_ended} more without a length" if open_ended else ""
        raise ValueError(
            f"stages: they take {told:g} steps{more}, and {run}; shorten their share or epochs, or raise epochs"
        )
    if not open_ended and left > 0.5:
        raise ValueError(f"stages: they end after {told:g} steps, and {run}; leave the last one without a length")
    starts, at = [], 0.0
    for length in lengths:
        starts.append(round(at))
        at += left / open_ended if length is None else length
    for i, (start, stop) in enumerate(zip(starts, [*starts[1:], total_steps], strict=True)):
        if stop <= start:
            raise ValueError(f"stages: number {i + 1} of {len(stages)} has no step of its own, and {run}; lengthen it")
    return starts


def trained_by_stage(model: nn.Module, stages: Sequence[Stage]) -> list[set[str]]:
    """Names of the parameters that each stage trains; those that are frozen now stay so.

    Raises:
        ValueError: a pattern that names nothing, or a stage that names frozen parameters alone.
    """
    free = free_names(model)
    trained = [select(model, stage.train, f"stages: number {i + 1}") & free for i, stage in enumerate(stages)]
    for i, (names, stage) in enumerate(zip(trained, stages, strict=True)):
        if not names:
            raise ValueError(
                f"stages: number {i + 1} names {', '.join(stage.train)}, which is all frozen (requires_grad=False); "
                "thaw it before, or name another part"
            )
    return trained


class StagedTask(AroundTask):
    """A task whose model is trained part by part; a run's stage is a function of its step, so it resumes anywhere.

    The optimizer keeps no memory of what is frozen: it costs nothing, and what is thawed starts with a fresh one. Batch
    norms whose parameters are frozen keep their statistics. After the last step all is as free as it was before.

    Args:
        task: what is learned.
        stages: what is trained when, as :class:`Stage` or as dicts of its attributes.
        rewarm: share of a stage, not of the first, in which the rate of what it has thawed rises anew from near 0: its
            optimizer has seen no gradient yet.

    Raises:
        ValueError: no stage, or a rewarm beyond 0 to 1; in ``fit``, stages that do not fit the model or the run.
    """

    partly_trained = True

    def __init__(self, task: Task, stages: Sequence[Stage | Mapping[str, Any]], rewarm: float = 0.0) -> None:
        super().__init__(task)
        if not stages:
            raise ValueError("stages is empty; give at least one")
        if not 0 <= rewarm <= 1:
            raise ValueError(f"rewarm must be between 0 and 1, got {rewarm}")
        self.stages = as_stages(stages)
        self.rewarm = rewarm

    def settings(self) -> Mapping[str, Any]:
        return {**super().settings(), "stages": [asdict(stage) for stage in self.stages], "rewarm": self.rewarm}

    def setup(self, model: nn.Module, train_set: Dataset, config: TrainConfig, device: torch.device) -> None:
        super().setup(model, train_set, config, device)
        release(model, "stage")  # of a run that was interrupted
        per_epoch = Plan(len(train_set), config.batch_size, config.drop_last, config.seed).steps_per_epoch
        total = config.max_steps or config.epochs * per_epoch
        self.starts = [*stage_starts(self.stages, total, per_epoch), total]
        self.trained = trained_by_stage(model, self.stages)
        self.current: int | None = None

    def groups(self, model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
        """Those of the task, cut by the stages in which a parameter is trained; without those that never are."""
        when = {id(p): self._stages_of(name) for name, p in model.named_parameters()}
        groups = []
        for group in super().groups(model, config):
            scale = group.get("lr_scale", 1.0)
            for stages in sorted({when[id(p)] for p in group["params"]} - {()}):
                params = [p for p in group["params"] if when[id(p)] == stages]
                groups.append({**group, "params": params, "trained_in": stages, "base_scale": scale})
        return groups

    def _stages_of(self, name: str) -> tuple[int, ...]:
        return tuple(i for i, names in enumerate(self.trained) if name in names)

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        super().before_step(model, optimizer, step, total)
        stage = max(i for i, start in enumerate(self.starts[:-1]) if start <= step)
        if stage != self.current:
            self._enter(stage, model, optimizer)
        length = round(self.rewarm * (self.starts[stage + 1] - self.starts[stage]))
        rise = min(1.0, (step - self.starts[stage] + 1) / (length + 1))
        for group in optimizer.param_groups:
            if "trained_in" in group:
                thawed = stage in group["trained_in"] and stage > 0 and stage - 1 not in group["trained_in"]
                group["lr_scale"] = group["base_scale"] * (rise if thawed else 1.0)

    def _enter(self, stage: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        release(model, "stage")
        hold(model, self.trained[stage], "stage")
        for parameter in model.parameters():
            if not parameter.requires_grad:
                optimizer.state.pop(parameter, None)
        self.current = stage

    def after_step(self, model: nn.Module, step: int, total: int) -> None:
        super().after_step(model, step, total)
        if step + 1 == total:
            release(model, "stage")
