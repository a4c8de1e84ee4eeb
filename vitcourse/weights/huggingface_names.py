"""What transformers calls the parts of ViT, MAE's encoder, BEiT and TimeSformer, and what its configs tell of them.

Our names are timm's, and TimeSformer's its authors'. transformers' are those of files on the hub, or of a model in
memory, which transformers 5 calls otherwise.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .facts import Facts

State = dict[str, Tensor]


class Family(NamedTuple):
    """Models of transformers whose tensors one table of names translates.

    Attributes:
        kinds: their ``model_type``.
        ours: which of our models takes them.
        mark: matches a name that only their checkpoints have.
        names: patterns and what they become, applied one after the other.
        derived: matches names of what follows from the rest.
        of_other_tasks: matches what ours has no use for, by our names; its first group is told.
        facts: of a config, and whether there is a head.
        finish: the last step, on tensors by our names.
    """

    kinds: tuple[str, ...]
    ours: str
    mark: str
    names: tuple[tuple[str, str | Callable[[re.Match], str]], ...]
    facts: Callable[[Mapping[str, Any], bool], Facts]
    derived: str = r"(?!)"
    of_other_tasks: str = r"(?!)"
    finish: Callable[[State], State] = lambda state: state

    def translate(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """Tensors by our names, and what was left out as parts of other tasks."""
        renamed = {self._rename(name): tensor for name, tensor in state.items() if not re.search(self.derived, name)}
        others = {name: found[1] for name in renamed if (found := re.match(self.of_other_tasks, name))}
        kept = {name: tensor for name, tensor in renamed.items() if name not in others}
        return self.finish(kept), sorted(set(others.values()))

    def _rename(self, name: str) -> str:
        for pattern, ours in self.names:
            name = re.sub(pattern, ours, name)
        return name


_BLOCK = r"^(?:encoder\.)?layers?\.(\d+)\."
_SHARED = "shared_position_bias_table"
_NAMES = (
    (r"^(?:vit|beit|timesformer)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.time_embeddings$", "time_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (_BLOCK + r"attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r"blocks.\1.attn.\2."),
    (_BLOCK + r"attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (_BLOCK + r"attention\.attention\.qkv\.", r"blocks.\1.attn.qkv."),
    (_BLOCK + r"temporal_attention\.attention\.qkv\.", r"blocks.\1.temporal_attn.qkv."),
    (_BLOCK + r"temporal_attention\.output\.dense\.", r"blocks.\1.temporal_attn.proj."),
    (_BLOCK + r"temporal_layernorm\.", r"blocks.\1.temporal_norm1."),
    (_BLOCK + r"temporal_dense\.", r"blocks.\1.temporal_fc."),
    (_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (_BLOCK + r"(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
    (_BLOCK + r"layernorm_before\.", r"blocks.\1.norm1."),
    (_BLOCK + r"layernorm_after\.", r"blocks.\1.norm2."),
    (
        _BLOCK + r"(?:attention\.attention\.)?relative_position_bias\.relative_position_bias_table$",
        r"blocks.\1.attn.relative_position_bias_table",
    ),
    (r"^(?:encoder\.relative_position_bias|shared_position_bias)\.relative_position_bias_table$", _SHARED),
    (_BLOCK + r"lambda_([12])$", r"blocks.\1.ls\2.gamma"),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu_new": nn.GELU("tanh"),
    "gelu_pytorch_tanh": nn.GELU("tanh"),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "swish": nn.SiLU(),
}


def fuse(state: State) -> State:
    """q, k and v of each block, one after the other; BEiT's keys have no bias, which is a bias of 0."""
    fused = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name, query in state.items():
        if ".attn.q." in name:
            parts = [state.get(name.replace(".q.", f".{part}.")) for part in "qkv"]
            parts = [torch.zeros_like(query) if part is None else part for part in parts]
            fused[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return fused


def _split_tables(state: State) -> State:
    """BEiT's biases for offsets, and apart the last three: from [CLS] to a patch, back, and to itself."""
    shared = state.pop(_SHARED, None)
    if shared is not None:
        blocks = {name.split(".attn.")[0] for name in state if ".attn." in name}
        state |= {f"{block}.attn.relative_position_bias_table": shared for block in blocks}
    tables = {name: table for name, table in state.items() if name.endswith("relative_position_bias_table")}
    for name, table in tables.items():
        state[name] = table[:-3]
        state[name.replace("relative_position", "prefix")] = table[-3:]
    return state


def activation_of(config: Mapping[str, Any], key: str, default: str) -> nn.Module:
    """The activation that a config names.

    Raises:
        ValueError: one that is unknown here.
    """
    name = config.get(key, default)
    if name not in _ACTIVATIONS:
        raise ValueError(f"{key} {name!r} of the weights is unknown; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _facts(config: Mapping[str, Any], classifies: bool) -> Facts:
    kind = config.get("model_type")
    facts: Facts = {
        "img_size": pair(config.get("image_size", 224)),
        "patch_embed.proj.stride": pair(config.get("patch_size", 16)),
        "norm_eps": config.get("layer_norm_eps", 1e-6 if kind == "timesformer" else 1e-12),
    }
    if classifies:
        mean = kind == "beit" and config.get("use_mean_pooling", True)
        facts["global_pool"] = "avg" if mean else "token"
    activation = activation_of(config, "hidden_act", "gelu")
    for i in range(config.get("num_hidden_layers", 12)):
        for mixer in ("attn", "temporal_attn") if kind == "timesformer" else ("attn",):
            facts[f"blocks.{i}.{mixer}.num_heads"] = config.get("num_attention_heads", 12)
        facts[f"blocks.{i}.mlp.act.activation"] = activation
    return facts


_IMAGES = Family(
    kinds=("vit", "vit_mae", "beit"),
    ours="ViT",
    mark=r"embeddings\.patch_embeddings\.projection\.weight$",
    names=_NAMES,
    derived=r"relative_position_index$",
    of_other_tasks=r"^(pooler\.dense|decoder|lm_head|embeddings\.mask_token)\b",
    facts=_facts,
    finish=lambda state: _split_tables(fuse(state)),
)
PLAIN = (_IMAGES._replace(kinds=("timesformer",), ours="TimeSformer", mark=r"embeddings\.time_embeddings$"), _IMAGES)
