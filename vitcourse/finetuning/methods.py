"""Eight ways to fine-tune a model, each as data, and one door to them: :func:`finetune`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import nn

from vitcourse.inference import frozen_modules
from vitcourse.registry import in_head, nearest
from vitcourse.train.classification import Classification
from vitcourse.train.config import TrainConfig
from vitcourse.train.task import AroundTask, Task
from vitcourse.weights import unwrap

from .layer_decay import layer_decay_groups
from .lora import add_lora, check_targets
from .parts import free_names, hold, release, select
from .prompts import add_prompts
from .staged import SCHEDULES, Stage, StagedTask, as_stages, trained_by_stage


@dataclass(frozen=True)
class Method:
    """How a model is fine-tuned. Its attributes are its options; :data:`METHODS` has one under each name."""

    freezes_body: ClassVar[bool] = False  # and thus runs it in evaluation mode, as features that stay what they are

    def change(self, model: nn.Module) -> None:
        """Add to the model, in place, what the method needs."""

    def trained(self, model: nn.Module) -> Collection[str] | None:
        """Names of the parameters that move, the head left out, which always does; None for all that are free."""
        return None

    def around(self, task: Task, model: nn.Module) -> Task:
        """The task that trains by this method."""
        return task


@dataclass(frozen=True)
class Full(Method):
    """All parameters move: dearest, and best where there are many images."""


@dataclass(frozen=True)
class LinearProbe(Method):
    """Only the head moves: the features are judged as they are."""

    freezes_body: ClassVar[bool] = True

    def trained(self, model: nn.Module) -> Collection[str]:
        return ()


@dataclass(frozen=True)
class BitFit(Method):
    """Only biases move, those of norms included (Ben Zaken et al. 2022)."""

    def trained(self, model: nn.Module) -> Collection[str]:
        biases = [name for name, _ in model.named_parameters() if name.endswith(("bias", "_bias"))]
        if not biases:
            raise ValueError(f"{type(model).__name__} has no biases, which bitfit trains; take 'lora' or 'full'")
        return biases


@dataclass(frozen=True)
class VPT(Method):
    """Visual prompt tuning (Jia et al. 2022): see :func:`vitcourse.finetuning.add_prompts`."""

    tokens: int = 10
    deep: bool = False
    dropout: float = 0.0

    freezes_body: ClassVar[bool] = True

    def change(self, model: nn.Module) -> None:
        add_prompts(model, self.tokens, self.deep, self.dropout)

    def trained(self, model: nn.Module) -> Collection[str]:
        return select(model, ["prompts"])


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation (Hu et al. 2021): see :func:`vitcourse.finetuning.add_lora`."""

    rank: int = 8
    alpha: float | None = None
    targets: Sequence[str] = ("q", "v")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_targets(self.targets)
        object.__setattr__(self, "targets", tuple(self.targets))

    def change(self, model: nn.Module) -> None:
        add_lora(model, self.rank, self.alpha, self.targets, self.dropout)

    def trained(self, model: nn.Module) -> Collection[str]:
        return select(model, ["*.lora_A.*", "*.lora_B.*"])


@dataclass(frozen=True)
class Staged(Method):
    """Parts are thawed one after the other: see :class:`vitcourse.finetuning.StagedTask`.

    Attributes:
        schedule: ``"deep_first"`` or ``"shallow_first"``, or stages as data.
        stages: how many, for a schedule by name.
        rewarm: see :class:`vitcourse.finetuning.StagedTask`.
    """

    schedule: str | Sequence[Stage | Mapping[str, Any]] = "deep_first"
    stages: int = 3
    rewarm: float = 0.1

    def stages_of(self, model: nn.Module) -> list[Stage]:
        if not isinstance(self.schedule, str):
            return as_stages(self.schedule)
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule {self.schedule!r} is unknown{nearest(self.schedule, SCHEDULES)}; use "
                f"{' or '.join(map(repr, SCHEDULES))}, or a list of stages {{'train': [...], 'share': ...}}"
            )
        return SCHEDULES[self.schedule](model, self.stages)

    def around(self, task: Task, model: nn.Module) -> Task:
        stages = self.stages_of(model)
        trained_by_stage(model, stages)  # a wrong one is better found now
        return StagedTask(task, stages, self.rewarm)


@dataclass(frozen=True)
class LayerDecay(Method):
    """All parameters move, the shallow ones slower: see :func:`vitcourse.finetuning.layer_decay_groups`."""

    decay: float = 0.75

    def around(self, task: Task, model: nn.Module) -> Task:
        layer_decay_groups(model, decay=self.decay)  # a wrong one is better found now
        return _LayerDecayTask(task, self.decay)


class _LayerDecayTask(AroundTask):
    def __init__(self, task: Task, decay: float) -> None:
        super().__init__(task)
        self.decay = decay

    def groups(self, model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
        return layer_decay_groups(model, config.weight_decay, self.decay)


METHODS: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "full": (Full, {}),
    "linear": (LinearProbe, {}),
    "bitfit": (BitFit, {}),
    "vpt_shallow": (VPT, {"deep": False}),
    "vpt_deep": (VPT, {"deep": True}),
    "lora": (LoRA, {}),
    "staged": (Staged, {}),
    "layer_decay": (LayerDecay, {}),
}


def make_method(name: str | Method, **options: Any) -> Method:
    """A method by name, with its options.

    Raises:
        ValueError: an unknown name, or an option that it does not have, with the nearest ones.

    >>> make_method("lora", rank=4)
    LoRA(rank=4, alpha=None, targets=('q', 'v'), dropout=0.0)
    >>> make_method("lorra")
    Traceback (most recent call last):
    ...
    ValueError: method 'lorra' is unknown; did you mean 'lora'? Known: full, linear, bitfit, vpt_shallow, vpt_deep, \
lora, staged, layer_decay
    """
    if isinstance(name, Method):
        if options:
            raise ValueError(f"{', '.join(options)}: options go into the method itself, {type(name).__name__}(…)")
        return name
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown{nearest(str(name), METHODS) or '.'} Known: {', '.join(METHODS)}")
    kind, fixed = METHODS[name]
    known = [field.name for field in fields(kind) if field.name not in fixed]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"method {name!r} has no option {option!r}{nearest(option, known)}; {takes}")
    return kind(**fixed, **options)


class FineTuning(AroundTask):
    """A task that trains by a method; made by :func:`finetune`, which see.

    Attributes:
        method: how.
        total: number of the model's parameters, adapters included.
        trainable: how many of them are trained at some time, the head's among them.
        head: how many of these are the head's.
    """

    def __init__(self, task: Task, method: Method, model: nn.Module) -> None:
        super().__init__(method.around(task, model))
        self.method, self.name_of_method = method, name_of(method)
        moved = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        if isinstance(self.task, StagedTask):
            ever = set().union(*trained_by_stage(model, self.task.stages))
            moved = {name: count for name, count in moved.items() if name in ever}
        self.total = sum(p.numel() for p in model.parameters())
        self.trainable = sum(moved.values())
        self.head = sum(n for name, n in moved.items() if in_head(model, name))

    def settings(self) -> Mapping[str, Any]:
        return {
            **super().settings(),
            "method": {"name": self.name_of_method, **asdict(self.method)},
            "trainable": self.trainable,
        }

    def report(self) -> str:
        """One line: what is trained, and how much that is."""
        share = 100 * self.trainable / self.total
        return (
            f"{self.name_of_method}: {self.trainable:,} of {self.total:,} parameters are trained ({share:.2f} %), "
            f"{self.head:,} of them in the head"
        )


def name_of(method: Method) -> str:
    """The name under which :data:`METHODS` has it."""
    for name, (kind, fixed) in METHODS.items():
        if type(method) is kind and all(getattr(method, key) == value for key, value in fixed.items()):
            return name
    return type(method).__name__


def finetune(
    model: nn.Module, method: str | Method = "full", *, task: Task | None = None, **options: Any
) -> FineTuning:
    """Make a trained model ready to be fine-tuned, in place, and return the task that does it.

    ``fit(model, train_set, val_set, config, task=finetune(model, "lora", rank=4))``. The head is trained by every
    method; ``model.reset_classifier(num_classes)`` before makes a new one. What the caller has frozen before stays so;
    what an earlier call has frozen is free again, as when a linear probe comes before full fine-tuning (Kumar et al.
    2022, "LP-FT").

    ========================= ==================================================== ============================
    method                    what is trained beside the head                      options
    ========================= ==================================================== ============================
    full                      everything
    linear                    nothing
    bitfit                    biases
    vpt_shallow, vpt_deep     prompts                                              tokens, dropout
    lora                      low-rank updates of slices of qkv, or of more        rank, alpha, targets, dropout
    staged                    parts, one after the other                           schedule, stages, rewarm
    layer_decay               everything, shallow layers slower                    decay
    ========================= ==================================================== ============================

    By linear and vpt the body is frozen and in evaluation mode, as their authors have it: no dropout there, and no
    statistics that move.

    Args:
        model: a ViT, Swin or CoAtNet of this library, or a model of timm's; prompts need a ViT.
        method: by name, or a method such as ``LoRA(rank=4)``.
        task: what is learned; classification, unless told otherwise.
        options: of the method.

    Raises:
        ValueError: an unknown method or option; layers that the model does not have; a model without a head, or one
            that has been adapted already.

    >>> from vitcourse import create_model
    >>> model = create_model("vit_tiny", img_size=32, patch_size=16, depth=2, num_classes=5)
    >>> print(finetune(model, "lora", rank=4).report())
    lora: 7,109 of 1,046,021 parameters are trained (0.68 %), 965 of them in the head
    """
    method, model = make_method(method, **options), unwrap(model)
    if hasattr(model, "adapters"):
        kinds = " and ".join(entry["kind"] for entry in model.adapters)
        raise ValueError(
            f"{type(model).__name__} has adapters already ({kinds}); fine-tune the model that they were added to, or "
            "merge_lora(model) first"
        )
    release(model, "stage")
    release(model, "method")
    head = _head_parameters(model)
    if not head:
        raise ValueError(
            f"{type(model).__name__} has no head to train; make one: model.reset_classifier(num_classes=…)"
        )
    frozen = frozen_modules(model)
    method.change(model)
    if isinstance(method, LoRA | VPT):
        model.adapters = [{"kind": "lora" if isinstance(method, LoRA) else "vpt", **asdict(method)}]
    model.train()
    for module in frozen:
        module.training = False
    trained = method.trained(model)
    if trained is not None:
        hold(model, {*trained, *head}, "method", method.freezes_body)
    return FineTuning(task or Classification(), method, model)


def restore_adapters(model: nn.Module, adapters: list[dict[str, Any]]) -> nn.Module:
    """Give a newly built model the adapters that a file tells of, untrained; returns ``model``.

    All but these and the head is frozen, as when they were trained: a model that moved on would not fit them.
    """
    kinds: dict[str, Callable[..., Method]] = {"lora": LoRA, "vpt": VPT}
    moved = _head_parameters(model)
    for entry in adapters:
        method = kinds[entry["kind"]](**{key: value for key, value in entry.items() if key != "kind"})
        method.change(model)
        moved += method.trained(model)
        hold(model, moved, "method", method.freezes_body)
    model.adapters = adapters
    return model


def _head_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of the head that are trained."""
    return [name for name in free_names(model) if in_head(model, name)]
