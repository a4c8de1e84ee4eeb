"""Detectors and segmenters of transformers, DETR and EoMT, in the names of ours; see :mod:`.huggingface_names`."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .facts import Facts
from .huggingface_names import Family, activation_of, fuse, pair

_RESNET = r"^backbone\.encoder\.stages\.(\d+)\.layers\.(\d+)\."
_DETR_NAMES = (  # applied one after the other
    (r"^(?:detr\.)?(?:model\.)?", ""),  # the former with a head for masks beside
    (r"^query_position_embeddings\.weight$", "query_embed"),
    (r"^input_projection\.", "input_proj."),
    (r"^decoder\.layernorm\.", "norm."),
    (r"^(encoder|decoder)\.layers\.", r"\1."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"^(encoder\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"_attn\.([qkv])_proj\.", r"_attn.\1."),
    (r"_attn\.(?:o|out)_proj\.", "_attn.proj."),
    (r"^((?:en|de)coder\.\d+)\.(?:mlp\.)?fc1\.", r"\1.mlp.0."),
    (r"^((?:en|de)coder\.\d+)\.(?:mlp\.)?fc2\.", r"\1.mlp.3."),
    (r"^class_labels_classifier\.", "class_head."),
    (r"^bbox_predictor\.layers\.(\d+)\.", lambda found: f"box_head.{2 * int(found[1])}."),
    # The backbone: timm's ResNet has torchvision's names, that of transformers has its own.
    (r"^backbone\.(?:conv_encoder\.)?model\.", "backbone."),
    (r"^backbone\.embedder\.embedder\.convolution\.", "backbone.conv1."),
    (r"^backbone\.embedder\.embedder\.normalization\.", "backbone.bn1."),
    (_RESNET + r"shortcut\.convolution\.", lambda found: f"{_block(found)}.downsample.0."),
    (_RESNET + r"shortcut\.normalization\.", lambda found: f"{_block(found)}.downsample.1."),
    (_RESNET + r"layer\.(\d+)\.convolution\.", lambda found: f"{_block(found)}.conv{int(found[3]) + 1}."),
    (_RESNET + r"layer\.(\d+)\.normalization\.", lambda found: f"{_block(found)}.bn{int(found[3]) + 1}."),
)
_EOMT_NAMES = (
    (r"^embeddings\.cls_token$", "backbone.cls_token"),
    (r"^embeddings\.register_tokens$", "backbone.reg_token"),
    (r"^embeddings\.position_embeddings\.weight$", "backbone.pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "backbone.patch_embed.proj."),
    (r"^layers\.(\d+)\.attention\.([qkv])_proj\.", r"backbone.blocks.\1.attn.\2."),
    (r"^layers\.(\d+)\.attention\.out_proj\.", r"backbone.blocks.\1.attn.proj."),
    (r"^layers\.(\d+)\.layer_scale([12])\.lambda1$", r"backbone.blocks.\1.ls\2.gamma"),
    (r"^layers\.", "backbone.blocks."),
    (r"^layernorm\.", "backbone.norm."),
    (r"^query\.weight$", "queries"),
    (r"^class_predictor\.", "class_head."),
    (r"^mask_head\.fc(\d)\.", lambda found: f"mask_head.{2 * int(found[1]) - 2}."),
    (r"^upscale_block\.block\.(\d+)\.conv1\.", r"upscale.\1.0."),
    (r"^upscale_block\.block\.(\d+)\.conv2\.", r"upscale.\1.2."),
    (r"^upscale_block\.block\.(\d+)\.layernorm2d\.", r"upscale.\1.3."),
    (r"^attn_mask_probs$", "mask_probs"),
)


def _block(found: re.Match) -> str:
    """Of a ResNet, whose stages torchvision counts from 1."""
    return f"backbone.layer{int(found[1]) + 1}.{found[2]}"


def _detr_facts(config: Mapping[str, Any], classifies: bool) -> Facts:
    """What ``config.json`` says of a DETR.

    Raises:
        ValueError: positions or a backbone that ours has not.
    """
    if (kind := config.get("position_embedding_type", "sine")) != "sine":
        raise ValueError(f"position_embedding_type {kind!r} of the weights: vitcourse's Detr has sine positions alone")
    facts = {"norm.eps": 1e-5, **_resnet_facts(config)}
    activation = activation_of(config, "activation_function", "relu")
    for side, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "cross_attn"))):
        for i in range(config.get(f"{side}_layers", 6)):
            facts[f"{side}.{i}.mlp.1.activation"] = activation
            for name in attentions:
                facts[f"{side}.{i}.{name}.num_heads"] = config.get(f"{side}_attention_heads", 8)
            for norm in range(1, len(attentions) + 2):
                facts[f"{side}.{i}.norm{norm}.eps"] = 1e-5
    return facts


def _resnet_facts(config: Mapping[str, Any]) -> Facts:
    inner = config.get("backbone_config") or {}
    name = inner.get("backbone") or config.get("backbone") or "resnet50"
    kind = inner.get("model_type", "timm_backbone")
    if kind not in ("timm_backbone", "resnet") or (kind != "resnet" and not re.match(r"resnet\d+(\.|$)", name)):
        raise ValueError(
            f"the backbone of the weights is {name if kind == 'timm_backbone' else kind!r}, and vitcourse's Detr takes "
            "over ResNets alone; for the rest give the bare state dict without the backbone, and strict=False"
        )
    if inner.get("downsample_in_bottleneck"):
        raise ValueError("downsample_in_bottleneck of the weights: vitcourse's ResNet has its strides at 3 × 3")
    dilated = config.get("dilation") or inner.get("output_stride") == 16
    stride = (1, 1) if dilated else (2, 2)
    activation = activation_of(inner, "hidden_act", "relu")
    return {"backbone.layer4.0.downsample.0.stride": stride, "backbone.relu.activation": activation}


def _eomt_facts(config: Mapping[str, Any], classifies: bool) -> Facts:
    """What ``config.json`` says of an EoMT.

    Raises:
        ValueError: an MLP that our ViT has not.
    """
    if config.get("use_swiglu_ffn"):
        raise ValueError("use_swiglu_ffn of the weights: vitcourse's ViT has no SwiGLU")
    activation = activation_of(config, "hidden_act", "gelu")
    facts: Facts = {
        "img_size": pair(config.get("image_size", 640)),
        "backbone.patch_embed.proj.stride": pair(config.get("patch_size", 16)),
        "backbone.norm_eps": config.get("layer_norm_eps", 1e-6),
        **{f"{name}.activation": activation for name in ("mask_head.1", "mask_head.3")},
        **{f"upscale.{i}.1.activation": activation for i in range(config.get("num_upscale_blocks", 2))},
    }
    for i in range(config.get("num_hidden_layers", 24)):
        facts[f"backbone.blocks.{i}.attn.num_heads"] = config.get("num_attention_heads", 16)
        facts[f"backbone.blocks.{i}.mlp.act.activation"] = activation
    return facts


def _finish_eomt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v as one, positions as ours have them, and no empty tensor where there are no registers."""
    state = fuse(state)
    if "backbone.pos_embed" in state:
        state["backbone.pos_embed"] = state["backbone.pos_embed"][None]
    return {name: tensor for name, tensor in state.items() if tensor.numel()}


DETR = Family(
    kinds=("detr",),
    ours="Detr",
    mark=r"(?:^|\.)query_position_embeddings\.weight$",
    names=_DETR_NAMES,
    derived=r"\.num_batches_tracked$",
    of_other_tasks=r"^(mask_head|bbox_attention)\b",
    facts=_detr_facts,
)
EOMT = Family(
    kinds=("eomt",),
    ours="Eomt",
    mark=r"^upscale_block\.",
    names=_EOMT_NAMES,
    derived=r"^criterion\.empty_weight$",
    facts=_eomt_facts,
    finish=_finish_eomt,
)
