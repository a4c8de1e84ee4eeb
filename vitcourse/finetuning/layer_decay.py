"""Layer-wise learning-rate decay: the deeper a layer, the faster it moves (Clark et al. 2020; Bao et al. 2021)."""

from typing import Any

from torch import nn

from vitcourse.train.optim import param_groups

from .parts import layers_of


def layer_scales(layers: int, decay: float) -> list[float]:
    """What each layer's rate is multiplied with, from the stem to the head, which has 1.

    >>> layer_scales(3, 0.5)
    [0.25, 0.5, 1.0]
    """
    return [decay ** (layers - 1 - i) for i in range(layers)]


def layer_decay_groups(model: nn.Module, weight_decay: float = 0.05, decay: float = 0.75) -> list[dict[str, Any]]:
    """Parameter groups for ``fit(groups=…)``: one for each layer and kind of decay, with its ``lr_scale``.

    The layers are those of :func:`layers_of`, as timm's ``param_groups_layer_decay`` has them, and what weight decay
    leaves alone is what :func:`vitcourse.train.param_groups` leaves alone. Frozen parameters are left out.

    Args:
        model: the model.
        weight_decay: of the matrices.
        decay: factor from one layer to the one below it. BEiT and MAE take 0.65 to 0.75 for a ViT-B, 1 is no decay.

    Raises:
        ValueError: decay is not above 0 and at most 1.

    >>> from vitcourse import create_model
    >>> model = create_model("vit_tiny", img_size=32, patch_size=16, depth=2, num_classes=5)
    >>> sorted({group["lr_scale"] for group in layer_decay_groups(model, decay=0.5)})
    [0.125, 0.25, 0.5, 1.0]
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be above 0 and at most 1, got {decay}; 1 is the same rate for all layers")
    layers = layers_of(model)
    scales = layer_scales(max(layers.values()) + 1, decay)
    layer_of = {id(parameter): layers[name] for name, parameter in model.named_parameters()}
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for kind in param_groups(model, weight_decay):
        for parameter in kind["params"]:
            layer = layer_of[id(parameter)]
            start = {"params": [], "weight_decay": kind["weight_decay"], "lr_scale": scales[layer]}
            groups.setdefault((layer, kind["weight_decay"]), start)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
