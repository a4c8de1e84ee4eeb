"""LoRA (Hu et al. 2021): what fine-tuning adds to a matrix has low rank, and is kept apart from it."""

import math
from collections.abc import Collection, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcourse.registry import nearest

from .parts import release

QKV = ("q", "k", "v")
OTHERS = ("proj", "fc1", "fc2")  # linear layers of a block that may be adapted whole
Slices = Mapping[str, tuple[int, int]]


class LoRALinear(nn.Linear):
    """y = W x + b, and onto slices of y each its own (α / r) B A x (Hu et al. 2021, sec. 4.1).

    A fused projection to queries, keys and values is one matrix, of which the paper adapts the rows of q and of v.
    W and b keep their names and are frozen; A (r, in) starts as ``nn.Linear`` does and B (rows, r) at zero, so that
    at first nothing changes.

    Args:
        base: the layer; its W and b are shared, not copied.
        slices: rows (start, stop) of W that are adapted, by name.
        rank: r.
        alpha: α; r where None, so that the factor is 1.
        dropout: probability of leaving out an entry of x on its way to A.

    >>> layer = LoRALinear(nn.Linear(8, 12), {"q": (0, 4), "v": (8, 12)}, rank=2)
    >>> sorted(name for name, p in layer.named_parameters() if p.requires_grad)
    ['lora_A.q', 'lora_A.v', 'lora_B.q', 'lora_B.v']
    >>> layer(torch.zeros(3, 8)).shape
    torch.Size([3, 12])
    """

    def __init__(
        self, base: nn.Linear, slices: Slices, rank: int, alpha: float | None = None, dropout: float = 0.0
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.was_trained = base.weight.requires_grad
        self.requires_grad_(False)
        self.slices, self.rank = dict(slices), rank
        self.alpha = float(rank if alpha is None else alpha)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.ParameterDict({n: torch.empty(rank, base.in_features) for n in slices})
        self.lora_B = nn.ParameterDict({n: torch.zeros(b - a, rank) for n, (a, b) in slices.items()})
        for matrix in self.lora_A.values():
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))  # as the authors' code has it; the paper says Gaussian
        for matrices in (self.lora_A, self.lora_B):  # drawn before they move: alike on every device
            matrices.to(device=base.weight.device, dtype=base.weight.dtype)
        self.before: dict[str, Tensor] | None = None  # the rows of W as they were, while merged
        self.train(base.training)

    @property
    def merged(self) -> bool:
        return self.before is not None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.merged:
            return y
        x = self.dropout(x)
        for name, (start, stop) in self.slices.items():
            update = F.linear(F.linear(x, self.lora_A[name]), self.lora_B[name])
            y[..., start:stop] += update * (self.alpha / self.rank)  # y is nobody else's: no other graph has kept it
        return y

    def delta(self, name: str) -> Tensor:
        """(α / r) B A, what is added to the rows ``slices[name]`` of W."""
        return self.lora_B[name] @ self.lora_A[name] * (self.alpha / self.rank)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the products to W: no layer then costs more than before."""
        if not self.merged:
            self.before = {name: self.weight[a:b].clone() for name, (a, b) in self.slices.items()}
            for name, (start, stop) in self.slices.items():  # in half precision rounded once, not in every step
                wide = torch.promote_types(self.weight.dtype, torch.float32)
                update = self.lora_B[name].to(wide) @ self.lora_A[name].to(wide) * (self.alpha / self.rank)
                self.weight[start:stop] = self.before[name].to(wide) + update

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the rows back as they were, to the last bit."""
        if self.merged:
            for name, (start, stop) in self.slices.items():
                self.weight[start:stop] = self.before[name]
            self.before = None

    def train(self, mode: bool = True) -> "LoRALinear":
        """What is trained is not merged."""
        if mode and getattr(self, "before", None) is not None:
            self.unmerge()
        return super().train(mode)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # the products are saved beside W, and must not be in it as well
            weight = self.weight.detach().clone()
            for name, (start, stop) in self.slices.items():
                weight[start:stop] = self.before[name]
            destination[f"{prefix}weight"] = weight

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def plain(self) -> nn.Linear:
        """The merged layer, as an ordinary one."""
        self.merge()
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias
        linear.requires_grad_(self.was_trained)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {', '.join(self.slices)} by rank {self.rank}"


def lora_sites(model: nn.Module, targets: Collection[str] = ("q", "v")) -> dict[str, Slices]:
    """Which rows of which linear layers the targets mean, by the layer's name.

    Args:
        model: with attention whose ``qkv`` gives queries, keys and values one after the other, as ours and timm's.
        targets: any of ``"q"``, ``"k"``, ``"v"``, and of ``"proj"``, ``"fc1"``, ``"fc2"`` for whole layers of blocks.

    Raises:
        ValueError: unknown targets; a model without such layers, or whose layers do not go through their ``forward``.

    >>> from vitcourse import create_model
    >>> lora_sites(create_model("vit_tiny", img_size=32, patch_size=16, depth=1))
    {'blocks.0.attn.qkv': {'q': (0, 192), 'v': (384, 576)}}
    """
    check_targets(targets)
    sites: dict[str, Slices] = {}
    for path, module in model.named_modules():
        for name, child in module.named_children():
            where, place = f"{path}.{name}".removeprefix("."), QKV if name == "qkv" else (name,)
            wanted = [target for target in targets if target in place]
            if not wanted or name not in ("qkv", *OTHERS):
                continue
            if name == "proj" and not hasattr(module, "qkv"):  # that of a patch embedding
                continue
            if type(child) is not nn.Linear:
                raise ValueError(f"{where} is a {type(child).__name__}, not nn.Linear, which LoRA adapts; adapt first")
            _check_used_as_layer(module, name, where)
            _check_rows(module, child, name, where)
            width = child.out_features // len(place)
            rows = {target: (place.index(target) * width, (place.index(target) + 1) * width) for target in wanted}
            sites[where] = rows
    if missing := [t for t in targets if not any(t in rows for rows in sites.values())]:
        fused = [t for t in missing if t in QKV]
        layer = "qkv" if fused else missing[0]
        raise ValueError(
            f"targets: {type(model).__name__} has no linear layer {layer!r} for {', '.join(missing)}; LoRA adapts "
            f"attention with a fused qkv, as ours and timm's ViT and Swin have it, and the layers {', '.join(OTHERS)}"
        )
    return sites


def check_targets(targets: Collection[str]) -> None:
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets={targets!r} must be a list such as ('q', 'v'), of {', '.join((*QKV, *OTHERS))}")
    for target in targets:
        if target not in (*QKV, *OTHERS):
            close = nearest(str(target), (*QKV, *OTHERS))
            raise ValueError(f"targets: {target!r} is unknown{close}; use any of {', '.join((*QKV, *OTHERS))}")


def _check_used_as_layer(mixer: nn.Module, name: str, where: str) -> None:
    """timm's Swin V2, BEiT and EVA take the weight out of the layer and never call it: an adapter would do nothing."""
    theirs = type(mixer).__module__.startswith("timm.")
    if theirs and name == "qkv" and (getattr(mixer, "q_bias", None) is not None):
        raise ValueError(
            f"{where}: timm's {type(mixer).__name__} uses the weight of its qkv and never calls the layer, so that "
            "LoRA would change nothing; use method 'bitfit' or 'full', or this library's model of the same name"
        )


def _check_rows(mixer: nn.Module, layer: nn.Linear, name: str, where: str) -> None:
    """Rows of q, k and v must be three blocks. timm's MaxViT, TinyViT and EfficientFormer have them head by head."""
    by_head = getattr(mixer, "head_first", False) or hasattr(mixer, "key_dim")
    if name == "qkv" and (by_head or layer.out_features % 3):
        raise ValueError(
            f"{where}: {type(mixer).__name__} has the rows of q, k and v head by head, so that LoRA would adapt other "
            "rows than it says; use targets of proj, fc1, fc2, or method 'bitfit'"
        )


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Collection[str] = ("q", "v"),
    dropout: float = 0.0,
) -> nn.Module:
    """Put :class:`LoRALinear` in the place of what ``targets`` mean (:func:`lora_sites`), in place; returns ``model``.

    Nothing else is frozen; :func:`vitcourse.finetuning.finetune` does that.

    Raises:
        ValueError: a rank below 1 or above the layer's width, a dropout beyond 0 to 1; see :func:`lora_sites`.
    """
    if not (isinstance(rank, int) and rank >= 1):
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}; 4 or 8 is usual")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    sites = lora_sites(model, targets)
    for where, slices in sites.items():
        base = model.get_submodule(where)
        most = min(base.in_features, *(stop - start for start, stop in slices.values()))
        if rank > most:
            raise ValueError(f"rank {rank} is larger than {where} is wide, which is {most}; give a rank far below it")
    for where, slices in sites.items():
        _replace(model, where, LoRALinear(model.get_submodule(where), slices, rank, alpha, dropout))
    return model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers, by name.

    Raises:
        ValueError: there are none.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoRA layers; add_lora, or finetune(model, 'lora'), adds some")
    yield from found


def merge_lora(model: nn.Module) -> nn.Module:
    """Add every adapter to its matrix for good: ordinary layers are left, as fast as before; returns ``model``.

    What :func:`vitcourse.finetuning.finetune` has frozen is free again.

    To look at a merged model and go back, call ``merge`` and ``unmerge`` of the :func:`lora_layers`.

    Raises:
        ValueError: no layer is adapted.
    """
    for where, layer in list(lora_layers(model)):
        _replace(model, where, layer.plain())
    if hasattr(model, "adapters"):
        kept = [entry for entry in model.adapters if entry["kind"] != "lora"]
        if kept:
            model.adapters = kept
        else:
            del model.adapters
    release(model, "method")
    return model


def _replace(model: nn.Module, where: str, layer: nn.Module) -> None:
    parent, _, name = where.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
