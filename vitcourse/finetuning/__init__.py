"""Fine-tuning: a trained model for another task, in eight ways, each with its price.

Read in this order: ``parts`` (what parts of a model are called), ``layer_decay``, ``lora``, ``prompts``, ``staged``,
``methods`` (one door to them all, :func:`finetune`), ``files`` (adapters in kilobytes), ``cost`` (what frozen parts
save), ``interpolation`` (between two models, and among several).
"""

from vitcourse.registry import register_form

from .cost import backward_flops, measure_backward, saved_bytes
from .files import load_adapter, save_adapter
from .interpolation import agreement, ensemble, interpolate, interpolation_path, shared_mistakes
from .layer_decay import layer_decay_groups, layer_scales
from .lora import LoRALinear, add_lora, lora_layers, lora_sites, merge_lora
from .methods import (
    METHODS,
    VPT,
    BitFit,
    FineTuning,
    Full,
    LayerDecay,
    LinearProbe,
    LoRA,
    Method,
    Staged,
    finetune,
    make_method,
    restore_adapters,
)
from .parts import layers_of, parts_of, select
from .prompts import Prompts, add_prompts, prompt_bound
from .staged import Stage, StagedTask, deep_first, shallow_first, stage_starts, trained_by_stage

register_form("adapters", lambda model: model.adapters, restore_adapters)

__all__ = [
    "METHODS",
    "VPT",
    "BitFit",
    "FineTuning",
    "Full",
    "LayerDecay",
    "LinearProbe",
    "LoRA",
    "LoRALinear",
    "Method",
    "Prompts",
    "Stage",
    "Staged",
    "StagedTask",
    "add_lora",
    "add_prompts",
    "agreement",
    "backward_flops",
    "deep_first",
    "ensemble",
    "finetune",
    "interpolate",
    "interpolation_path",
    "layer_decay_groups",
    "layer_scales",
    "layers_of",
    "load_adapter",
    "lora_layers",
    "lora_sites",
    "make_method",
    "measure_backward",
    "merge_lora",
    "parts_of",
    "prompt_bound",
    "restore_adapters",
    "save_adapter",
    "saved_bytes",
    "select",
    "shallow_first",
    "shared_mistakes",
    "stage_starts",
    "trained_by_stage",
]
