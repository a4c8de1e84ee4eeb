"""Checkpoints of Hugging Face's transformers: ViT, MAE's encoder, BEiT, TimeSformer, DETR and EoMT.

A repository of the hub, or a folder on the disk, has ``config.json`` beside the weights; it says what the tensors do
not: heads, activation, the eps of the norms. How parts are called, :mod:`.huggingface_names` and
:mod:`.huggingface_dense` say.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcourse.registry import Preprocess

from .facts import Facts
from .huggingface_dense import DETR, EOMT
from .huggingface_names import PLAIN, Family

Fetch = Callable[[str], Path | None]  # a file of a repository by its name; None if it has no such file

_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
# In the order in which their marks are looked for: EoMT has the patches of a ViT, too.
_FAMILIES = (DETR, EOMT, *PLAIN)


def family_of(state: Mapping[str, Any]) -> Family | None:
    """Which models of transformers a state dict with these names is of; None if they are not transformers'."""
    return next((family for family in _FAMILIES if any(re.search(family.mark, name) for name in state)), None)


def translate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict of transformers in our names, queries, keys and values as ours are; and what was left out of it."""
    return (family_of(state) or PLAIN[-1]).translate(state)


def facts_of_config(config: Mapping[str, Any], classifies: bool) -> Facts:
    """What ``config.json`` says of the model that its tensors do not.

    Raises:
        ValueError: a model of another kind, or one that computes as no model of ours can.
    """
    kind = config.get("model_type")
    family = next((family for family in _FAMILIES if kind in family.kinds), None)
    if family is None:
        takers = "; ".join(f"{family.ours} takes those of {', '.join(family.kinds)}" for family in _FAMILIES[::-1])
        raise ValueError(f"the weights are of transformers' {kind!r}; vitcourse's {takers}")
    return family.facts(config, classifies)


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
