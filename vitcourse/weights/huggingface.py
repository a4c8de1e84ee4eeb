"""Checkpoints of Hugging Face's transformers: ViT, MAE's encoder, BEiT and TimeSformer, in the names of our models.

Ours share them with timm, and TimeSformer's with its authors.

A repository of the hub, or a folder on the disk, has ``config.json`` beside the weights; it says what the tensors do
not: heads, activation, the eps of the norms. Names are those of the files on the hub, or of a model in memory, which
transformers 5 calls otherwise.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitcourse.registry import Preprocess

from .facts import Facts

Fetch = Callable[[str], Path | None]  # a file of a repository by its name; None if it has no such file

_MARK = "embeddings.patch_embeddings.projection.weight"
_BLOCK = r"^(?:encoder\.)?layers?\.(\d+)\."
_SHARED = "shared_position_bias_table"
_NAMES = (  # applied one after the other
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
_NOT_OURS = re.compile(r"^(pooler\.dense|decoder|lm_head|embeddings\.mask_token)\b")  # of other tasks than a ViT's
_ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu_new": nn.GELU("tanh"),
    "gelu_pytorch_tanh": nn.GELU("tanh"),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "swish": nn.SiLU(),
}
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


def is_transformers(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has transformers' names."""
    return any(name.endswith(_MARK) for name in state)


def translate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict of transformers in timm's names, queries, keys and values as one; and what was left out of it."""
    renamed = {_rename(name): tensor for name, tensor in state.items() if not name.endswith("relative_position_index")}
    left_out = sorted({_NOT_OURS.match(name)[1] for name in renamed if _NOT_OURS.match(name)})
    kept = {name: tensor for name, tensor in renamed.items() if not _NOT_OURS.match(name)}
    return _split_tables(_fuse(kept)), left_out


def _rename(name: str) -> str:
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name


def _fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v of each block, one after the other; BEiT's keys have no bias, which is a bias of 0."""
    fused = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name, query in state.items():
        if ".attn.q." in name:
            parts = [state.get(name.replace(".q.", f".{part}.")) for part in "qkv"]
            parts = [torch.zeros_like(query) if part is None else part for part in parts]
            fused[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return fused


def _split_tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
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


def facts_of_config(config: Mapping[str, Any], classifies: bool) -> Facts:
    """What ``config.json`` says of the model that its tensors do not.

    Raises:
        ValueError: a model of another kind, or one that computes as no ViT of ours can.
    """
    kind = config.get("model_type")
    if kind not in ("vit", "vit_mae", "beit", "timesformer"):
        raise ValueError(
            f"the weights are of transformers' {kind!r}; vitcourse's ViT takes those of vit, vit_mae, beit, its "
            "TimeSformer those of timesformer"
        )
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r} of the weights is unknown; known: {', '.join(_ACTIVATIONS)}")
    facts: Facts = {
        "img_size": _pair(config.get("image_size", 224)),
        "patch_embed.proj.stride": _pair(config.get("patch_size", 16)),
        "norm_eps": config.get("layer_norm_eps", 1e-6 if kind == "timesformer" else 1e-12),
    }
    if classifies:
        mean = kind == "beit" and config.get("use_mean_pooling", True)
        facts["global_pool"] = "avg" if mean else "token"
    for i in range(config.get("num_hidden_layers", 12)):
        for mixer in ("attn", "temporal_attn") if kind == "timesformer" else ("attn",):
            facts[f"blocks.{i}.{mixer}.num_heads"] = config.get("num_attention_heads", 12)
        facts[f"blocks.{i}.mlp.act.activation"] = _ACTIVATIONS[activation]
    return facts


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def preprocess_of(saved: Mapping[str, Any]) -> Preprocess | None:
    """What ``preprocessor_config.json`` says of the images."""
    if not {"image_mean", "image_std"} <= saved.keys():
        return None
    size, crop = (_side(saved.get(name)) for name in ("size", "crop_size"))
    crops = bool(saved.get("do_center_crop")) and size and crop
    return Preprocess(
        img_size=(crop if crops else size) or 224,
        mean=tuple(saved["image_mean"]),
        std=tuple(saved["image_std"]),
        interpolation=_RESAMPLING.get(saved.get("resample", 2), "bilinear"),
        crop_pct=round(crop / size, 4) if crops else 1.0,
    )


def _side(size: Any) -> int | None:
    if isinstance(size, Mapping):
        size = size.get("height", size.get("shortest_edge"))
    return size if isinstance(size, int) else None


# ------------------------------------------------------------------------------------------------- where files are


def fetcher(name: str) -> Fetch:
    """How to get at the files of a folder, or of a repository of the hub, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return lambda file: folder / file if (folder / file).is_file() else None
    repository, _, revision = name.partition("@")

    def fetch(file: str) -> Path | None:
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
        except ImportError as error:
            raise ImportError(
                "weights of the hub need the package: pip install huggingface_hub; or give a folder that has "
                "config.json and model.safetensors: hf:FOLDER"
            ) from error
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(_unreachable(name, file, error)) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError) as error:
            raise FileNotFoundError(_unreachable(name, file, error)) from error

    return fetch


def _unreachable(name: str, file: str, error: Exception) -> str:
    return (
        f"{file} of hf:{name} is neither a folder's nor in the cache, and cannot be downloaded "
        f"({type(error).__name__}); check the name, or where there is a network: hf download {name}, and copy the "
        "folder: hf:FOLDER"
    )


def read_files(name: str, fetch: Fetch) -> tuple[dict[str, Tensor], dict[str, Any], Preprocess | None]:
    """The tensors by transformers' names, the config, and how images are prepared, if that is told.

    Raises:
        FileNotFoundError: no config, or no weights.
        ValueError: a file that cannot be read.
    """
    config = _json(fetch("config.json"))
    if config is None:
        raise FileNotFoundError(f"hf:{name} has no config.json, which says what its weights are of")
    state = _tensors(fetch)
    if state is None:
        raise FileNotFoundError(f"hf:{name} has no model.safetensors and no pytorch_model.bin")
    return state, config, preprocess_of(_json(fetch("preprocessor_config.json")) or {})


def _json(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is corrupt ({error}); download it again") from error


def _tensors(fetch: Fetch) -> dict[str, Tensor] | None:
    """Of one file or of several, which an index tells."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    def read(path: Path) -> dict[str, Tensor]:
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path} is corrupt ({type(error).__name__}); download it again") from error

    for file in ("model.safetensors", "pytorch_model.bin"):
        if path := fetch(file):
            return read(path)
        if index := _json(fetch(f"{file}.index.json")):
            shards = sorted(set(index["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in read(fetch(shard)).items()}
    return None
