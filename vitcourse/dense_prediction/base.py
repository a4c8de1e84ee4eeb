"""What all models of this direction share: a backbone, and what follows from it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from vitcourse.registry import Preprocess


class DenseModel(nn.Module):
    """A model around a backbone, whose maps it reads by ``feature_maps``.

    Args:
        backbone: any model of :func:`vitcourse.list_models` that has ``feature_maps``, built with ``num_classes=0``.
        num_classes: classes of objects, or of pixels.

    Attributes:
        wants: what targets must have: ``"boxes"``, ``"masks"``, or to be a ``"map"`` of classes.
        head_names: modules and parameters that depend on the classes: what ``reset_classifier`` makes anew.

    Raises:
        ValueError: a backbone without maps, or with a head; less than one class.
    """

    wants: ClassVar[str] = "boxes"
    head_names: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        if not hasattr(backbone, "feature_maps"):
            raise ValueError(
                f"backbone is a {type(backbone).__name__}, which has no feature_maps; use a model of "
                "vitcourse.list_models(), such as vit_tiny, swin_tiny or coatnet_0"
            )
        if getattr(backbone, "num_classes", 0):
            raise ValueError(
                f"backbone has a head of {backbone.num_classes} classes, which nothing here trains; build it with "
                "num_classes=0, or call backbone.reset_classifier(0)"
            )
        if num_classes < 1:
            raise ValueError(f"num_classes {num_classes} must be at least 1")
        self.backbone, self.num_classes = backbone, num_classes
        self.img_size, self.in_chans = backbone.img_size, backbone.in_chans
        for name in ("pre_logits",):  # a part of a backbone's head that stays without classes: nothing trains it here
            getattr(backbone, name, nn.Identity()).requires_grad_(False)

    @property
    def preprocess(self) -> Preprocess | None:
        """How images are prepared: as for the backbone, but whole; what is cropped off would be missed."""
        preprocess = getattr(self.backbone, "preprocess", None)
        return None if preprocess is None else replace(preprocess, crop_pct=1.0)

    @preprocess.setter
    def preprocess(self, value: Preprocess) -> None:
        self.backbone.preprocess = value

    def check_targets(self, targets: Any, num_images: int, size: tuple[int, int] | None = None) -> None:
        """What the loss asks of its targets; see :func:`.boxes.check_targets` and :func:`.segmentation.check_map`.

        It looks at values, so it belongs before the batch goes to a device.
        """
        from .boxes import check_targets

        check_targets(targets, num_images, self.num_classes, size, masks=self.wants == "masks")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass: less memory, more time."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside norms and biases."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Take over what the parameters of a checkpoint depend on and do not tell; see the backbone's own."""
        if not hasattr(self.backbone, "adopt"):
            return
        before = dict(getattr(self.backbone, "model_args", {}))
        self.backbone.adopt(_of_backbone(facts))
        after = getattr(self.backbone, "model_args", {})
        changed = {name: value for name, value in after.items() if name not in before or value != before[name]}
        if changed and hasattr(self, "model_args"):  # as a file tells of it
            self.model_args["backbone_args"] = {**(self.model_args.get("backbone_args") or {}), **changed}

    def adapt_state_dict(
        self, state: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Another checkpoint of such a model, its backbone's positions at this model's size."""
        adapt = getattr(self.backbone, "adapt_state_dict", None)
        if adapt is None:
            return dict(state)
        inner = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        known = _of_backbone(facts or {})
        adapted = {f"backbone.{k}": v for k, v in adapt(inner, known).items()}
        return {k: v for k, v in state.items() if not k.startswith("backbone.")} | adapted


def _of_backbone(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of the whole model, those of the backbone by its own names."""
    return {name.removeprefix("backbone."): value for name, value in facts.items()}


def strides_of(backbone: nn.Module) -> list[int]:
    """Strides of a backbone's maps in pixels, finest first."""
    return [info["reduction"] for info in backbone.feature_info]


def channels_of(backbone: nn.Module) -> list[int]:
    """Channels of a backbone's maps, finest first."""
    return [info["num_chs"] for info in backbone.feature_info]
