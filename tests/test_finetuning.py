"""Fine-tuning: what moves and what does not, what it costs, what is saved; against timm and peft."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from vitcourse import create_model, save_weights
from vitcourse.data import ImageDataset
from vitcourse.finetuning import (
    METHODS,
    VPT,
    LoRA,
    LoRALinear,
    Stage,
    StagedTask,
    add_lora,
    add_prompts,
    agreement,
    backward_flops,
    deep_first,
    ensemble,
    finetune,
    interpolate,
    interpolation_path,
    layer_decay_groups,
    load_adapter,
    lora_layers,
    lora_sites,
    make_method,
    measure_backward,
    merge_lora,
    parts_of,
    prompt_bound,
    save_adapter,
    saved_bytes,
    select,
    shallow_first,
    shared_mistakes,
    stage_starts,
)
from vitcourse.train import Classification, TrainConfig, fit, main
from vitcourse.train.optim import param_groups
from vitcourse.train.task import AroundTask, Task
from vitcourse.vit import record_attention
from vitcourse.weights import read_metadata

FAST = TrainConfig(epochs=3, batch_size=8, lr=1e-2, device="cpu", label_smoothing=0.0)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
    return randomise(create_model("vit_tiny", **{**sizes, **options}))


def swin(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    return randomise(create_model("swin_tiny", **{**sizes, "num_classes": 5, **options}))


def coatnet() -> nn.Module:
    """Has batch norms."""
    torch.manual_seed(0)
    return create_model(
        "coatnet_0", img_size=32, depths=(1, 1, 1, 1), embed_dim=(8, 8, 16, 32), head_dim=8, num_classes=5
    )


def timm_vit(**options) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
    return randomise(timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}))


def timm_swin() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    sizes["drop_path_rate"] = 0.0
    return randomise(timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=5))


MODELS = {"vit": vit, "swin": swin, "timm_vit": timm_vit, "timm_swin": timm_swin}


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter, since many begin at 0 or 1 and would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(n: int = 3, side: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def pictures(n: int = 24, side: int = 16) -> ImageDataset:
    random = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 5, (n,), generator=random)
    x = torch.rand(n, 3, side, side, generator=random) / 2 + labels.view(-1, 1, 1, 1) / 8
    return ImageDataset(x, labels.tolist(), list("abcde"), mean=(0.0,) * 3, std=(1.0,) * 3)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


# --------------------------------------------------------------------------------------------------------- the parts


def test_parts_go_from_shallow_to_deep_and_hold_every_parameter_once():
    assert list(parts_of(vit())) == ["patch_embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    assert list(parts_of(swin())) == [
        "patch_embed", "layers.0.blocks.0", "layers.0.blocks.1",
        "layers.1.downsample", "layers.1.blocks.0", "layers.1.blocks.1", "norm", "head",
    ]  # fmt: skip
    assert list(parts_of(coatnet()))[:4] == ["stem", "stages.0.0", "stages.1.0", "stages.2.0"]
    for model in (vit(), vit(global_pool="avg"), swin(), coatnet(), timm_vit(), timm_swin()):
        names = [name for part in parts_of(model).values() for name in part]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["head"], {"head.weight", "head.bias"}),
        (["blocks.1-2.norm1"], {f"blocks.{i}.norm1.{n}" for i in (1, 2) for n in ("weight", "bias")}),
        (["pos_embed", "*.ls?.*", "cls_token"], None),
        (["blocks.0.attn.qkv.bias"], {"blocks.0.attn.qkv.bias"}),
        (["*qkv.bias"], {f"blocks.{i}.attn.qkv.bias" for i in range(3)}),
    ],
)
def test_patterns_select_parameters(patterns, expected):
    if expected is None:
        with pytest.raises(ValueError, match=r"'\*\.ls\?\.\*' names nothing"):
            select(vit(), patterns)
    else:
        assert select(vit(), patterns) == expected


def test_a_pattern_does_not_take_a_longer_number_for_a_shorter_one():
    model = vit(depth=12)
    assert all(name.startswith("blocks.1.") for name in select(model, ["blocks.1"]))
    assert {name.split(".")[1] for name in select(model, ["blocks.9-11"])} == {"9", "10", "11"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["block.1"], r"train: 'block\.1' names nothing in VisionTransformer; did you mean 'blocks\.1'"),
        (["blocks.1-3"], r"'blocks\.1-3' \('blocks\.3'\) names nothing"),
        (["blocks.2-1"], r"counts down; write blocks\.1-2"),
        ("head", r"must be a list of patterns; write \['head'\]"),
    ],
)
def test_patterns_that_name_nothing_are_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        select(vit(), patterns)


# ------------------------------------------------------------------------------------------ layer-wise learning rates


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin"])
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}])
def test_layer_decay_is_that_of_timm(name, options):
    """Every parameter has the rate and the decay that timm's function gives it, and ours has the same as timm's."""
    optim = pytest.importorskip("timm.optim")
    if name == "timm_swin" and options:
        pytest.skip("one kind of pooling")
    theirs = timm_vit(**options) if name == "timm_vit" else timm_swin()
    ours = vit(**options) if name == "timm_vit" else swin()
    no_decay = theirs.no_weight_decay()
    expected = _rates(theirs, optim.param_groups_layer_decay(theirs, 0.05, no_decay, layer_decay=0.7))
    found = _rates(theirs, layer_decay_groups(theirs, 0.05, 0.7))
    assert {n: scale for n, (scale, _) in found.items()} == {n: scale for n, (scale, _) in expected.items()}
    assert {n: scale for n, (scale, _) in _rates(ours, layer_decay_groups(ours, 0.05, 0.7)).items()} == {
        n: scale for n, (scale, _) in expected.items()
    }
    same_decay = {n for n in found if found[n][1] == expected[n][1]}
    assert {n for n in found if n not in same_decay} <= {n for n in found if n.endswith("relative_position_bias_table")}


def _rates(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    of = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters()}


def test_layer_decay_has_the_same_weight_decay_as_plain_groups():
    model = swin()
    plain = {id(p): g["weight_decay"] for g in param_groups(model, 0.05) for p in g["params"]}
    layered = {id(p): g["weight_decay"] for g in layer_decay_groups(model, 0.05) for p in g["params"]}
    assert plain == layered


def test_layer_decay_moves_shallow_layers_less():
    model = vit()
    before = state(model)
    task = finetune(model, "layer_decay", decay=0.1)
    config = replace(FAST, max_steps=1, optimizer="adamw", weight_decay=0.0, warmup=0.0)
    fit(model, pictures(), None, config, task=task, progress=False)
    steps = {n: (state(model)[n] - before[n]).abs().max().item() for n in before if n.endswith("attn.qkv.weight")}
    sizes = [steps[f"blocks.{i}.attn.qkv.weight"] for i in range(3)]
    assert sizes == pytest.approx([1e-2 * 0.1 ** (3 - i) for i in range(3)], rel=1e-2)  # Adam's first step is the rate


@pytest.mark.parametrize("decay", [0, -0.5, 1.5])
def test_layer_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be above 0 and at most 1"):
        finetune(vit(), "layer_decay", decay=decay)


# -------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("q", "k", "v", "proj", "fc1", "fc2")])
def test_lora_adds_its_product_to_the_named_slices(name, targets):
    """The adapted model is one whose matrices have B A added to the rows of q, k or v, and to no other."""
    model, by_hand = MODELS[name](), MODELS[name]()
    add_lora(model, rank=3, alpha=6, targets=targets)
    for where, layer in lora_layers(model):
        plain = by_hand.get_submodule(where)
        width = plain.out_features // (3 if where.endswith("qkv") else 1)
        assert set(layer.slices) == {t for t in targets if (t in "qkv") == where.endswith("qkv")} & set(layer.slices)
        for target in layer.slices:
            nn.init.normal_(layer.lora_B[target], std=0.3)
            start = {"q": 0, "k": width, "v": 2 * width}.get(target, 0)
            with torch.no_grad():
                plain.weight[start : start + width] += 2 * layer.lora_B[target] @ layer.lora_A[target]
    outputs, expected = model(images()), by_hand(images())
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert (expected - MODELS[name]()(images())).abs().max() > 1e-2 and expected.std() > 1e-2


def test_lora_leaves_out_patch_embeddings_that_are_linear():
    from vitcourse.vit import LinearPatchEmbed, VisionTransformer

    model = VisionTransformer(16, 4, num_classes=5, embed_dim=32, depth=1, num_heads=4, embed_layer=LinearPatchEmbed)
    add_lora(model, rank=2, targets=("proj",))
    assert [name for name, _ in lora_layers(model)] == ["blocks.0.attn.proj"]


def test_lora_starts_as_no_change_and_is_not_dead():
    model = vit()
    expected = model(images())
    add_lora(model, rank=2)
    assert torch.equal(model(images()), expected)
    model(images()).square().sum().backward()
    layer = model.blocks[0].attn.qkv
    assert all(b.grad.abs().max() > 0 for b in layer.lora_B.values())
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("name", MODELS)
def test_merging_is_exact_and_can_be_taken_back(name):
    model = add_lora(MODELS[name](), rank=2)
    _stir(model)
    before, expected = state(model), model.eval()(images())
    for _, layer in lora_layers(model):
        layer.merge()
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    assert changed(before, state(model)) == set()  # what is saved has the products beside the weights, and not in them
    assert all(layer.merged for _, layer in lora_layers(model))
    for _, layer in lora_layers(model):
        layer.unmerge()
    assert torch.equal(model(images()), expected)
    for _, layer in lora_layers(model):
        layer.merge()
    model.train()  # training takes it back
    assert not any(layer.merged for _, layer in lora_layers(model)) and changed(before, state(model)) == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_in_half_precision_rounds_once(dtype):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 48), {"q": (0, 16), "v": (32, 48)}, rank=8, alpha=16)
    with torch.no_grad():
        for matrix in layer.lora_B.values():
            matrix.normal_(std=0.02)
    layer = layer.to(dtype).eval()
    wide = layer.weight.float()
    for name, (start, stop) in layer.slices.items():
        wide[start:stop] += layer.lora_B[name].float() @ layer.lora_A[name].float() * 2
    layer.merge()
    assert torch.equal(layer.weight, wide.to(dtype))


def test_weights_loaded_into_a_merged_model_are_those_of_an_unmerged_one():
    model, other = add_lora(vit(), rank=2), add_lora(vit(), rank=2)
    _stir(other)
    for _, layer in lora_layers(model):
        layer.merge()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(images()), other(images()))


def test_merged_for_good_is_an_ordinary_model(tmp_path):
    model = vit()
    finetune(model, "lora", rank=2)
    _stir(model)
    expected = model.eval()(images())
    merge_lora(model)
    assert not any(isinstance(m, LoRALinear) for m in model.modules()) and state(model).keys() == state(vit()).keys()
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    save_weights(model, tmp_path / "merged.safetensors")
    assert torch.equal(create_model(tmp_path / "merged.safetensors").eval()(images()), model(images()))
    with pytest.raises(ValueError, match=r"has no LoRA layers; add_lora"):
        merge_lora(model)


def _stir(model: nn.Module) -> None:
    for _, layer in lora_layers(model):
        for b in layer.lora_B.values():
            nn.init.normal_(b, std=0.3)


def test_lora_is_that_of_peft():
    """On separate layers for q and v, which peft can adapt: the same logits and gradients as by slices of one layer."""
    peft = pytest.importorskip("peft")

    class Separate(nn.Module):
        def __init__(self, attn: nn.Module) -> None:
            super().__init__()
            self.num_heads, self.proj = attn.num_heads, attn.proj
            for part, weight, bias in zip("qkv", attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), strict=True):
                layer = nn.Linear(weight.shape[1], weight.shape[0])
                layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
                setattr(self, f"{part}_proj", layer)

        def forward(self, x, grid=None):
            q, k, v = (
                getattr(self, f"{part}_proj")(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in "qkv"
            )
            x = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(x.transpose(1, 2).flatten(2))

    ours, theirs = vit(), vit()
    for block in theirs.blocks:
        block.attn = Separate(block.attn)
    torch.testing.assert_close(theirs(images()), ours(images()), rtol=1e-4, atol=1e-5)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]))
    add_lora(ours, rank=4, alpha=12)
    _stir(ours)
    pairs = []
    for i, (_, layer) in enumerate(lora_layers(ours)):
        for part in layer.slices:
            peer = getattr(theirs.blocks[i].attn, f"{part}_proj")
            for matrix, other in ((layer.lora_A[part], peer.lora_A), (layer.lora_B[part], peer.lora_B)):
                assert other["default"].weight.shape == matrix.shape
                other["default"].weight.data.copy_(matrix)
                pairs.append((matrix, other["default"].weight))
    outputs, expected = ours(images()), wrapped(images())
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for matrix, other in pairs:
        torch.testing.assert_close(matrix.grad, other.grad, rtol=1e-3, atol=1e-4)
    assert sum(a.numel() for a, _ in pairs) == wrapped.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"rank": 33}, r"rank 33 is larger than blocks\.0\.attn\.qkv is wide, which is 32"),
        ({"targets": ("query",)}, "targets: 'query' is unknown"),
        ({"targets": "qv"}, r"targets='qv' must be a list such as \('q', 'v'\)"),
        ({"targets": ()}, "must be a list"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"rnk": 4}, "method 'lora' has no option 'rnk'; did you mean 'rank'"),
    ],
)
def test_wrong_options_of_lora_are_refused_and_change_nothing(options, message):
    model = vit()
    with pytest.raises(ValueError, match=message):
        finetune(model, "lora", **options)
    assert state(model).keys() == state(vit()).keys() and all(p.requires_grad for p in model.parameters())


def test_a_body_without_the_layers_that_are_asked_for_is_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    with pytest.raises(ValueError, match=r"targets: Plain has no linear layer 'qkv' for q, v; LoRA adapts"):
        finetune(Plain(), "lora")
    with pytest.raises(ValueError, match=r"Plain has no blocks, norm, patch_embed.*another method: lora"):
        finetune(Plain(), "vpt_deep")


def test_timm_models_that_never_call_their_qkv_are_refused():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)}
    model = timm.create_model("swinv2_tiny_window8_256", **sizes)
    with pytest.raises(ValueError, match=r"uses the weight of its qkv and never calls the layer.*'bitfit'"):
        finetune(model, "lora")
    ours = randomise(create_model("swinv2_tiny_window8_256", **sizes, num_classes=5))  # its norms start at 0
    finetune(ours, "lora", rank=2)
    expected = ours.eval()(images())
    _stir(ours)
    assert (ours(images()) - expected).abs().max() > 1e-3  # ours does call it


def test_timm_models_with_q_k_and_v_head_by_head_are_refused():
    """Their first third of rows is not q; whole layers can be adapted."""
    pytest.importorskip("timm")
    from timm.models.efficientformer import Attention as OfEfficientFormer
    from timm.models.maxxvit import AttentionCl
    from timm.models.tiny_vit import Attention as OfTinyVit

    sizes = {"key_dim": 4, "num_heads": 2}
    for mixer in (AttentionCl(8, 8, dim_head=4), OfTinyVit(8, **sizes), OfEfficientFormer(8, **sizes, resolution=2)):
        with pytest.raises(ValueError, match=r"attn\.qkv: Attention\w* has the rows of q, k and v head by head"):
            add_lora(nn.ModuleDict({"attn": mixer}))
        assert [name for name, _ in lora_layers(add_lora(nn.ModuleDict({"attn": mixer}), 2, targets=["proj"]))]
    assert lora_sites(nn.ModuleDict({"attn": AttentionCl(8, 8, dim_head=4, head_first=False)}))


# ----------------------------------------------------------------------------------------------------------- prompts


def _tokens_by_hand(model: nn.Module, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Equations of the paper, token by token: [CLS], prompts, patches."""
    if hasattr(model, "embed"):
        x, (h, w, prefix) = model.embed(x)
        extra = ((h, w, prefix + tokens.shape[1]),)
    else:
        x, extra = model.norm_pre(model._pos_embed(model.patch_embed(x))), ()
    cls, patches = x[:, :1], x[:, 1:]
    for i, block in enumerate(model.blocks):
        if i < len(tokens):
            prompts = tokens[i].expand(len(x), -1, -1)
        out = block(torch.cat([cls, prompts, patches], 1), *extra)
        cls, prompts, patches = out[:, :1], out[:, 1 : 1 + tokens.shape[1]], out[:, 1 + tokens.shape[1] :]
    return model.forward_head(model.norm(torch.cat([cls, patches], 1)))


@pytest.mark.parametrize("make", [vit, timm_vit])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}])
def test_prompts_are_those_of_the_paper(make, deep, options):
    model, plain = make(**options).eval(), make(**options).eval()
    add_prompts(model, 4, deep=deep)
    nn.init.normal_(model.prompts.tokens)
    assert model.prompts.tokens.shape == (3 if deep else 1, 4, 32)
    expected = _tokens_by_hand(plain, images(), model.prompts.tokens)
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain(images())).abs().max() > 1e-2


def test_prompts_start_within_the_authors_bound():
    model = add_prompts(vit(img_size=64, patch_size=16), 50, deep=True)
    bound = (6 / (3 * 16 * 16 + 32)) ** 0.5  # val = sqrt(6 / (3 * patch ** 2 + dim)), uniform in ± val
    assert prompt_bound(16, 32) == pytest.approx(bound)
    tokens = model.prompts.tokens.detach()
    assert tokens.abs().max() <= bound and tokens.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_prompts_have_dropout_in_training_alone():
    model = add_prompts(vit(), 4, dropout=0.5)
    model.train()
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), model(images()))


def test_a_copy_has_prompts_of_its_own():
    model = add_prompts(vit(), 4, deep=True).eval()
    other = copy.deepcopy(model)
    nn.init.normal_(other.prompts.tokens)
    assert not torch.equal(other(images()), model(images()))
    before = model(images())
    nn.init.normal_(model.prompts.tokens)
    assert not torch.equal(model(images()), before)


@pytest.mark.parametrize("deep", [False, True])
def test_prompted_models_do_all_else_that_models_do(deep):
    """Maps, recorded attention, masks, recomputation, other sizes of images."""
    model = add_prompts(vit(), 4, deep=deep).eval()
    assert [tuple(m.shape) for m in model.feature_maps(images(), indices=(0, 2))] == [(3, 32, 4, 4)] * 2
    assert model(images(side=24)).shape == (3, 5)
    with record_attention(model) as weights:
        expected = model(images())
    assert [w.shape[-2:] for w in weights] == [(21, 21)] * 3
    x, grid = model.embed(images())
    mask = torch.ones(3, 17, dtype=torch.bool)
    torch.testing.assert_close(model.forward_head(model.forward_tokens(x, grid, mask)), expected, rtol=1e-4, atol=1e-5)
    mask[:, 5:] = False
    hidden = model.forward_head(model.forward_tokens(x, grid, mask))
    x[:, 5:] = 7.0  # nobody sees these
    torch.testing.assert_close(model.forward_head(model.forward_tokens(x, grid, mask)), hidden, rtol=1e-4, atol=1e-5)
    model.set_grad_checkpointing(True)
    model.train()
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    model(images()).sum().backward()
    assert model.prompts.tokens.grad.abs().amax(dim=(1, 2)).min() > 0


def test_prompts_and_merging_do_not_mix():
    from vitcourse.efficient_attention import merge_tokens

    model = merge_tokens(add_prompts(vit(), 4), 2)
    with pytest.raises(ValueError, match="take prompts or merging"):
        model(images())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("vpt_deep", {"tokens": 0}, "tokens must be a whole number of at least 1, got 0"),
        ("vpt_shallow", {"dropout": 1.0}, "dropout must be"),
        ("vpt_shallow", {"deep": True}, r"method 'vpt_shallow' has no option 'deep'; it takes tokens, dropout"),
        ("vpt", {}, "method 'vpt' is unknown"),
        ("linnear", {}, "did you mean 'linear'"),
        ("linear", {"rank": 2}, "method 'linear' has no option 'rank'; it takes none"),
        ("staged", {"schedule": "deep_frist"}, "did you mean 'deep_first'"),
        ("staged", {"stages": 9}, "stages must be between 1 and 6"),
    ],
)
def test_wrong_methods_and_options_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        finetune(vit(), method, **options)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224"])
def test_timm_models_that_count_their_patches_are_refused_prompts(name):
    """They have blocks, and would fail in the first step, or have the prompts taken for patches."""
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"prompts have no place among the patches of timm's .* another method"):
        finetune(timm.create_model(name, depth=1, num_classes=5), "vpt_shallow")


def test_prompts_need_a_vit():
    with pytest.raises(ValueError, match=r"SwinTransformer has no blocks.*lora, bitfit, linear"):
        finetune(swin(), "vpt_deep")
    with pytest.raises(ValueError, match="has prompts already"):
        add_prompts(add_prompts(vit()))


# ---------------------------------------------------------------------------------------------- what moves, and not

MOVES = {  # beside the head
    "full": lambda name: True,
    "linear": lambda name: False,
    "bitfit": lambda name: name.endswith(".bias"),
    "vpt_shallow": lambda name: name.startswith("prompts."),
    "vpt_deep": lambda name: name.startswith("prompts."),
    "lora": lambda name: ".lora_" in name,
    "staged": lambda name: True,
    "layer_decay": lambda name: True,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_only_what_a_method_names_moves(method, name):
    model = MODELS[name]()
    if "swin" in name and method.startswith("vpt"):
        with pytest.raises(ValueError, match="prompts need tokens"):
            finetune(model, method)
        return
    task = finetune(model, method)
    before = state(model)
    expected = {n for n, _ in model.named_parameters() if n.startswith("head.") or MOVES[method](n)}
    assert task.trainable == sum(p.numel() for n, p in model.named_parameters() if n in expected)
    assert task.total == sum(p.numel() for p in model.parameters())
    fit(model, pictures(), None, replace(FAST, weight_decay=0.1, ema=0.5), task=task, progress=False)
    moved = changed(before, state(model))
    assert moved <= expected
    assert expected - moved <= {n for n in expected if n.endswith("relative_position_bias_table")}
    assert f"{task.trainable:,} of {task.total:,}" in task.report() and task.report().startswith(f"{method}: ")


@pytest.mark.parametrize("method", ["linear", "lora", "bitfit"])
def test_frozen_batch_norms_keep_their_statistics(method):
    """By bitfit the biases of batch norms move, so their statistics do; else these stay."""
    model = coatnet()
    before = state(model)
    task = finetune(model, method)
    fit(model, pictures(side=32), None, FAST, task=task, progress=False)
    moved = {n for n in changed(before, state(model)) if "running_" in n}
    statistics = {n for n in before if "running_" in n}
    assert statistics and moved == (statistics if method == "bitfit" else set())


def test_a_frozen_body_has_no_dropout_and_an_adapted_one_has():
    for method, silent in (("linear", True), ("vpt_deep", True), ("lora", False), ("full", False)):
        model = vit(drop_rate=0.5, drop_path_rate=0.5)
        finetune(model, method)
        assert model.training and model.head.training and model.blocks[0].training == (not silent)


def test_what_the_caller_has_frozen_stays_frozen():
    model = vit(pos_embed="sincos")
    model.blocks[0].requires_grad_(False)
    model.blocks[1].eval()
    before = state(model)
    task = finetune(model, "full")
    assert not model.blocks[1].training and model.blocks[2].training
    fit(model, pictures(), None, FAST, task=task, progress=False)
    moved = changed(before, state(model))
    assert not any(n.startswith(("blocks.0.", "pos_embed")) for n in moved) and "blocks.1.norm1.bias" in moved
    with pytest.raises(ValueError, match="has no head to train"):
        model.head.requires_grad_(False)
        finetune(model, "linear")


@pytest.mark.parametrize("first", ["linear", "bitfit", "lora", "staged"])
@pytest.mark.parametrize("trains_between", [True, False])
def test_full_fine_tuning_may_follow_another_method(first, trains_between, tmp_path):
    """As in LP-FT; also where the model comes from a file, merged."""
    model = vit(drop_rate=0.1, pos_embed="sincos")
    model.blocks[0].mlp.requires_grad_(False)
    task = finetune(model, first)
    if trains_between:
        fit(model, pictures(), None, FAST, task=task, out_dir=tmp_path, progress=False)
    models = [model, create_model(tmp_path / "final.safetensors")] if trains_between else [model]
    for model in models:
        if first == "lora":
            merge_lora(model)
        task, before = finetune(model, "full"), state(model)
        assert all(module.training for module in model.modules())
        fit(model, pictures(), None, FAST, task=task, progress=False)
        frozen = {"pos_embed"} | {n for n in before if n.startswith("blocks.0.mlp") and model is models[0]}
        assert changed(before, state(model)) == before.keys() - frozen


def test_models_are_adapted_once():
    model = vit()
    finetune(model, "lora")
    with pytest.raises(ValueError, match=r"has adapters already \(lora\).*merge_lora"):
        finetune(model, "vpt_deep")


def test_a_method_object_is_as_good_as_its_name():
    assert make_method("vpt_deep", tokens=3) == VPT(tokens=3, deep=True)
    assert finetune(vit(), LoRA(rank=2)).settings() == finetune(vit(), "lora", rank=2).settings()
    with pytest.raises(ValueError, match=r"options go into the method itself"):
        finetune(vit(), LoRA(), rank=2)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"no head to train; make one: model\.reset_classifier"):
        finetune(vit(num_classes=0), "linear")


# ------------------------------------------------------------------------------------------------------------- stages


class Watched(AroundTask):
    """Notes what each step has moved, what the optimizer remembers, and its rates."""

    def __init__(self, task: Task, stop_after: int | None = None) -> None:
        super().__init__(task)
        self.stop_after, self.moved, self.remembered, self.scales, self.counts = stop_after, [], [], [], []

    def before_step(self, model, optimizer, step, total):
        super().before_step(model, optimizer, step, total)
        self.before, self.optimizer = state(model), optimizer

    def after_step(self, model, step, total):
        super().after_step(model, step, total)
        names = {id(p): n for n, p in model.named_parameters()}
        self.moved.append(changed(self.before, state(model)))
        self.remembered.append({names[id(p)] for p in self.optimizer.state})
        self.counts.append({names[id(p)]: int(s["step"]) for p, s in self.optimizer.state.items() if "step" in s})
        self.scales.append(
            {names[id(p)]: g.get("lr_scale", 1.0) for g in self.optimizer.param_groups for p in g["params"]}
        )
        if step == self.stop_after:
            raise KeyboardInterrupt


STAGES = [
    Stage(("head",), epochs=1),
    Stage(("head", "blocks.1-2"), share=0.5),
    Stage(("patch_embed", "head")),
]


def _staged(model, task, config=FAST, **options):
    watched = Watched(task, options.pop("stop_after", None))
    fit(model, pictures(), None, config, task=watched, progress=False, **options)
    return watched


def test_each_stage_moves_and_remembers_what_it_names():
    """24 pictures in batches of 8: three steps an epoch. The stages begin at steps 0, 3 and 8 of 10."""
    model = vit()
    names = [
        {n for n in state(model) if n.startswith(prefixes)}
        for prefixes in (("head.",), ("head.", "blocks.1.", "blocks.2."), ("head.", "cls", "pos", "patch_embed."))
    ]
    config = replace(FAST, max_steps=10, weight_decay=0.1)
    watched = _staged(model, StagedTask(Classification(), STAGES), config)
    for step, moved in enumerate(watched.moved):
        expected = names[0 if step < 3 else 1 if step < 8 else 2]
        assert moved == watched.remembered[step] == expected, step
    assert watched.counts[9]["head.bias"] == 10 and watched.counts[9]["pos_embed"] == 2
    assert watched.counts[7]["blocks.1.norm1.bias"] == 5
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_thawed_again_starts_afresh():
    stages = [Stage(("head", "blocks.0")), Stage(("head",)), Stage(("head", "blocks.0"))]
    watched = _staged(vit(), StagedTask(Classification(), stages), replace(FAST, max_steps=9))
    counts = [count.get("blocks.0.norm1.bias") for count in watched.counts]
    assert counts == [1, 2, 3, None, None, None, 1, 2, 3]


def test_the_rate_of_what_is_thawed_rises_anew():
    stages = [Stage(("head",), share=0.2), Stage(("*",))]
    watched = _staged(vit(), StagedTask(Classification(), stages, rewarm=0.5), replace(FAST, max_steps=10))
    assert [scales["head.bias"] for scales in watched.scales] == [1.0] * 10
    body = [scales["blocks.0.norm1.bias"] for scales in watched.scales[2:]]
    assert body == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0])


def test_stages_keep_the_layers_own_rates():
    model = vit()
    groups = layer_decay_groups(model, decay=0.5)
    task = StagedTask(finetune(model, "layer_decay", decay=0.5), [Stage(("*",))])
    scales = _staged(model, task, replace(FAST, max_steps=1)).scales[0]
    of = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert scales == {n: of[id(p)] for n, p in model.named_parameters()}


@pytest.mark.parametrize("stop_after", range(9))
def test_a_staged_run_that_is_continued_has_the_weights_of_a_whole_one(stop_after, tmp_path):
    config = replace(FAST, checkpoint_every=1, ema=0.9)
    stages = [Stage(("head",)), Stage(("head", "blocks.0")), Stage(("head", "blocks.1"))]
    whole, parted = vit(), vit()
    _staged(whole, StagedTask(Classification(), stages, rewarm=0.5), config)
    with pytest.raises(KeyboardInterrupt):
        task = StagedTask(Classification(), stages, rewarm=0.5)
        _staged(parted, task, config, stop_after=stop_after, out_dir=tmp_path)
    parted = vit()
    if stop_after == 0:  # before its first checkpoint: begun anew
        assert not (tmp_path / "last.pt").exists()
    _staged(parted, StagedTask(Classification(), stages, rewarm=0.5), config, out_dir=tmp_path, resume=True)
    assert changed(state(whole), state(parted)) == set()


@pytest.mark.parametrize("make", [vit, coatnet])
def test_an_interrupted_model_may_be_trained_again(make, tmp_path):
    """In a notebook the model lives on: what its last stage had frozen is not taken for the caller's wish."""
    side, stages = 32 if make is coatnet else 16, [Stage(("head",)), Stage(("head", "norm")), Stage(("*",))]
    whole, model, config = make(), make(), replace(FAST, checkpoint_every=1)
    task = StagedTask(Classification(), stages)
    fit(whole, pictures(side=side), None, config, task=task, progress=False)
    with pytest.raises(KeyboardInterrupt):
        task = Watched(StagedTask(Classification(), stages), stop_after=4)
        fit(model, pictures(side=side), None, config, task=task, out_dir=tmp_path, progress=False)
    assert not next(model.parameters()).requires_grad
    task = StagedTask(Classification(), stages)
    fit(model, pictures(side=side), None, config, task=task, out_dir=tmp_path, resume=True, progress=False)
    assert changed(state(whole), state(model)) == set()
    finetune(model, "full")
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


def test_a_run_interrupted_in_a_stage_without_the_head_may_be_followed_by_any_method():
    class Stop(RuntimeError):
        pass

    class Interrupted(Task):
        name, takes_pairs = "interrupted", True

        def loss(self, model, batch):
            raise Stop

    model = vit()
    task = finetune(model, "staged", task=Interrupted(), schedule=[{"train": ["blocks.1"]}])
    with pytest.raises(Stop):
        fit(model, pictures(), None, FAST, task=task, progress=False)
    assert not model.head.weight.requires_grad
    finetune(model, "linear")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_what_no_stage_names_costs_nothing():
    class Looks(Watched):
        def after_step(self, model, step, total):
            assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
            super().after_step(model, step, total)

    model = vit()
    fit(model, pictures(), None, FAST, task=Looks(StagedTask(Classification(), [Stage(("head",))])), progress=False)
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_may_be_thawed_in_stages():
    model = vit()
    stages = [Stage(("head",)), Stage(("head", "*.lora_?.*"))]
    watched = _staged(model, StagedTask(finetune(model, "lora"), stages), replace(FAST, max_steps=4))
    assert [{n.partition(".")[0] for n in moved} for moved in watched.moved] == [{"head"}] * 2 + [
        {"head", "blocks"}
    ] * 2
    assert not any("weight" in n for moved in watched.moved for n in moved if n.startswith("blocks"))


def test_a_run_is_continued_with_its_own_stages_and_method_alone(tmp_path):
    config = replace(FAST, max_steps=3)
    fit(vit(), pictures(), None, config, task=finetune(vit(), "full"), out_dir=tmp_path, progress=False)
    for method in ("linear", "staged"):
        model = vit()
        task = finetune(model, method)
        with pytest.raises(ValueError, match=r"cannot be continued with other settings"):
            fit(model, pictures(), None, config, task=task, out_dir=tmp_path, resume=True, progress=False)


def test_accumulation_changes_no_stage():
    models = [vit(), vit()]
    for model, accum in zip(models, (1, 2), strict=True):
        task = StagedTask(Classification(), deep_first(model, 3))
        fit(model.double(), _double(), None, replace(FAST, accum=accum), task=task, progress=False)
    for name, tensor in state(models[0]).items():
        torch.testing.assert_close(state(models[1])[name], tensor, rtol=1e-9, atol=1e-10)


def _double() -> ImageDataset:
    data = pictures()
    return ImageDataset(data.images.double(), data.targets, data.classes, mean=data.mean, std=data.std)


def test_frozen_batch_norms_thaw_with_their_stage():
    model = coatnet()
    stages = [Stage(("head",)), Stage(("head", "stages.1.*", "stages.1.0")), Stage(("*",))]
    statistics = {n for n in state(model) if "running_" in n}
    watched = Watched(StagedTask(Classification(), stages))
    fit(model, pictures(side=32), None, FAST, task=watched, progress=False)
    for step, moved in enumerate(watched.moved):
        expected = (
            set() if step < 3 else {n for n in statistics if n.startswith("stages.1.")} if step < 6 else statistics
        )
        assert moved & statistics == expected, step


def test_several_processes_go_through_the_stages_as_one_does(tmp_path):
    out = tmp_path / "out.pt"
    folder = Path(__file__).parent
    search = os.pathsep.join([str(folder.parent), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [*launch, str(folder / "_finetuning_worker.py"), str(out)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(out, weights_only=True)
    for method in ("staged", "lora"):
        model = vit().double()
        task = finetune(model, method)
        fit(model, _double(), None, FAST, task=task, progress=False)
        for name, tensor in state(model).items():
            torch.testing.assert_close(theirs[method][name], tensor, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages is empty"),
        ([Stage(("head",), epochs=4)], r"they take 12 steps, and the run has 9 steps \(3 epochs\); shorten"),
        ([Stage(("head",), share=0.7), Stage(("*",), share=0.7)], "they take 12.6 steps"),
        ([Stage(("head",), share=1.0), Stage(("*",))], "and 1 more without a length"),
        ([Stage(("head",), epochs=1)], r"they end after 3 steps, and the run has 9 steps.*without a length"),
        ([Stage(("head",), share=0.01), Stage(("*",))], "number 1 of 2 has no step of its own"),
        ([Stage(("head",)), Stage(("blcks.1",))], r"stages: number 2: 'blcks\.1' names nothing.*'blocks\.1'"),
        ([Stage(("head",)), Stage(("blocks.2",))], r"number 2 names blocks\.2, which is all frozen"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages, message):
    model = vit()
    model.blocks[2].requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        fit(model, pictures(), None, FAST, task=StagedTask(Classification(), stages), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "head"}, "must be a list of patterns"),
        ({"train": ()}, "must be a list of patterns"),
        ({"train": ("head",), "share": 0.5, "epochs": 1}, "give one of them"),
        ({"train": ("head",), "share": 0}, "share=0 of a stage must be above 0"),
    ],
)
def test_wrong_stages_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Stage(**options)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"trian": ["head"]}, "a stage has no 'trian'; did you mean 'train'"),
        ({"share": 0.5}, "does not say what it trains"),
        ("head", "'head' is no stage; write"),
        ({"train": ["hed"]}, r"stages: number 1: 'hed' names nothing.*'head'"),
    ],
)
def test_stages_that_are_none_are_refused(stage, message):
    with pytest.raises(ValueError, match=message):
        finetune(vit(), "staged", schedule=[stage])


def test_schedules_thaw_from_either_end():
    deep, shallow = deep_first(vit(), 5), shallow_first(vit(), 5)
    assert [set(stage.train) - {"head"} for stage in deep] == [
        set(), {"norm"}, {"norm", "blocks.2"}, {"norm", "blocks.2", "blocks.1", "blocks.0"},
        {"norm", "blocks.2", "blocks.1", "blocks.0", "patch_embed"},
    ]  # fmt: skip
    assert [len(stage.train) for stage in shallow] == [2, 3, 4, 5, 6]
    assert set(shallow[0].train) == {"head", "patch_embed"} and set(shallow[-1].train) == set(parts_of(vit()))
    assert [len(schedule(vit(), 1)[0].train) for schedule in (deep_first, shallow_first)] == [6, 6]
    for schedule, most in ((deep_first, 6), (shallow_first, 5)):
        assert len(schedule(vit(), most)) == most
        for wrong in (0, most + 1, 2.5):
            with pytest.raises(ValueError, match=f"stages must be between 1 and {most}"):
                schedule(vit(), wrong)
    assert stage_starts(deep, 100, 10) == [0, 20, 40, 60, 80]


def test_a_task_around_another_passes_everything_on():
    inner = Classification()
    inner.name, inner.per_sample = "mine", 3.0
    outer = AroundTask(inner)
    for name in ("name", "metrics", "best", "counts_samples", "takes_pairs", "augments", "per_sample"):
        assert getattr(outer, name) == getattr(inner, name)
    public = [name for name in vars(Task) if not name.startswith("_")]
    assert all(name in vars(AroundTask) for name in public)


# --------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("make", [vit, timm_vit])
@pytest.mark.parametrize(
    "patterns",
    [["*"], ["head"], ["norm"], ["blocks.1", "head"], ["patch_embed"], ["pos_embed"], ["*.bias"], ["blocks.0.norm2"]]
    + [[f"blocks.1.{name}"] for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "attn.qkv.bias")],
)
def test_costs_are_predicted_to_the_byte(make, patterns):
    model = make()
    chosen = select(model, patterns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    measured = measure_backward(model, images())
    assert sum(backward_flops(model, images()).values()) == measured["backward_flops"]
    assert sum(saved_bytes(model, images()).values()) == measured["saved_bytes"]
    assert measured["backward_flops"] > 0 or patterns == ["norm"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [vit, timm_vit])
def test_costs_of_each_method_are_predicted(make, method):
    model = make()
    finetune(model, method)
    measured = measure_backward(model, images())
    assert sum(backward_flops(model, images()).values()) == measured["backward_flops"]
    assert sum(saved_bytes(model, images()).values()) == measured["saved_bytes"]


def test_what_lies_below_the_trained_parts_costs_nothing():
    model = vit().requires_grad_(False)
    model.blocks[2].requires_grad_(True)
    for costs in (backward_flops(model, images()), saved_bytes(model, images())):
        assert all(costs[part] == 0 for part in ("patch_embed", "blocks.0", "blocks.1")) and costs["blocks.2"] > 0
    whole = vit()
    assert backward_flops(whole, images())["blocks.2"] == backward_flops(model, images())["blocks.2"]
    # above what is trained, a block keeps 10 of 16 numbers a token and channel
    model = vit().requires_grad_(False)
    model.patch_embed.requires_grad_(True)
    numbers, statistics = 3 * 17 * 32 * 4, 3 * 17 * (4 + 4) * 4
    assert saved_bytes(model, images())["blocks.1"] == 10 * numbers + statistics
    assert saved_bytes(whole, images())["blocks.1"] == 16 * numbers + statistics


def test_swin_is_measured_and_its_backward_pass_predicted():
    model = swin()
    finetune(model, "linear")
    measured = measure_backward(model, images())
    assert sum(backward_flops(model, images()).values()) == measured["backward_flops"]
    finetune(other := swin(), "full")
    assert measure_backward(other, images())["saved_bytes"] > 20 * measured["saved_bytes"]
    with pytest.raises(ValueError, match="no rule; use measure_backward"):
        saved_bytes(coatnet(), images(side=32))
    with pytest.raises(ValueError, match="nothing of the model is trained"):
        measure_backward(model.requires_grad_(False), images())


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("method", METHODS)
def test_whole_files_are_rebuilt(method, tmp_path):
    model = vit()
    task = finetune(model, method)
    fit(model, pictures(), pictures(), FAST, task=task, out_dir=tmp_path, progress=False)
    rebuilt = create_model(tmp_path / "final.safetensors").eval()
    assert torch.equal(rebuilt(images()), model(images())) and rebuilt.classes == list("abcde")
    facts = read_metadata(tmp_path / "final.safetensors")
    assert facts["method"]["name"] == method and facts["trainable"] == task.trainable
    save_weights(rebuilt, tmp_path / "again.safetensors")
    assert torch.equal(create_model(tmp_path / "again.safetensors").eval()(images()), model(images()))


@pytest.mark.parametrize("method", ["linear", "bitfit", "vpt_shallow", "vpt_deep", "lora"])
@pytest.mark.parametrize("make", [vit, timm_vit, swin])
def test_adapters_are_small_and_load_back(make, method, tmp_path):
    if make is swin and method.startswith("vpt"):
        pytest.skip("prompts need a ViT")
    base, model, path = make(), make(), tmp_path / "adapter.safetensors"
    model.reset_classifier(5)
    task = finetune(model, method)
    fit(model, pictures(), None, FAST, task=task, progress=False)
    save_adapter(model, path, accuracy=0.5)
    assert path.stat().st_size < 4 * task.trainable + 6000 < sum(4 * p.numel() for p in base.parameters())
    assert read_metadata(path)["accuracy"] == 0.5
    torch.testing.assert_close(load_adapter(base, path).eval()(images()), model(images()), rtol=0, atol=0)
    other = make()
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if n.endswith("qkv.weight"))[0, 0] += 1e-3
    before = state(other)
    with pytest.raises(ValueError, match="with other weights than this one has"):
        load_adapter(other, path)
    assert changed(before, state(other)) == set() and state(other).keys() == before.keys()
    load_adapter(other, path, check_base=False)


@pytest.mark.parametrize("method", ["lora", "vpt_deep"])
def test_what_adapters_were_trained_beside_is_frozen_when_they_load_back(method, tmp_path):
    """Otherwise a second run would train the body too, and the adapters would fit no other model."""
    model = vit()
    finetune(model, method)
    save_adapter(model, tmp_path / "adapter.safetensors")
    save_weights(model, tmp_path / "whole.safetensors")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for again in (load_adapter(vit(), tmp_path / "adapter.safetensors"), create_model(tmp_path / "whole.safetensors")):
        assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
        if method == "lora":
            assert all(p.requires_grad for p in merge_lora(again).parameters())


def test_adapters_with_statistics_load_back(tmp_path):
    base, model = coatnet(), coatnet()
    task = finetune(model, "bitfit")
    fit(model, pictures(side=32), None, FAST, task=task, progress=False)
    save_adapter(model, tmp_path / "adapter.safetensors")
    load_adapter(base, tmp_path / "adapter.safetensors").eval()
    assert torch.equal(base(images(side=32)), model(images(side=32)))


def test_adapters_bring_a_head_for_their_own_classes(tmp_path):
    model, path = vit(), tmp_path / "adapter.safetensors"
    finetune(model, "vpt_deep", tokens=2)
    model.classes = list("abcde")
    save_adapter(model, path)
    base = vit()
    base.reset_classifier(9)
    load_adapter(base, path)
    assert base.num_classes == 5 and base.classes == list("abcde")
    assert torch.equal(base.eval()(images()), model.eval()(images()))


def test_adapters_for_another_model_are_refused(tmp_path):
    model, path = vit(), tmp_path / "adapter.safetensors"
    finetune(model, "vpt_deep")
    save_adapter(model, path)
    for other, message in (
        (vit(embed_dim=64), "is for a vit_tiny, 32 wide, and the model is 64 wide"),
        (vit(depth=2), "other weights"),
        (swin(), "is for a vit_tiny, and the model is a swin_tiny"),
        (model, "has adapters already"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter(other, path)
    with pytest.raises(ValueError, match=r"what fine-tuning has changed.*load_adapter"):
        create_model(path)
    save_weights(vit(), tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="holds no adapter"):
        load_adapter(vit(), tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="nothing of the model is frozen"):
        save_adapter(vit(), path)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_adapter(model, tmp_path / "adapter.pt")


def test_weights_with_adapters_do_not_fit_a_plain_model(tmp_path):
    model = vit()
    finetune(model, "lora")
    save_weights(model, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"an adapted model, which create_model\(path\) builds"):
        create_model("vit_tiny", **vit().model_args, weights=tmp_path / "lora.safetensors")


def test_adapted_models_are_quantized_and_pruned_as_far_as_that_makes_sense(tmp_path):
    from vitcourse.hardware.prune import structure
    from vitcourse.hardware.quantize import quantize_model

    model = vit()
    finetune(model, "vpt_deep", tokens=2)
    small = quantize_model(model.eval())
    save_weights(small, tmp_path / "small.safetensors")
    assert torch.equal(create_model(tmp_path / "small.safetensors").eval()(images()), small(images()))
    model = vit()
    finetune(model, "lora")
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn\.qkv' is adapted by LoRA.*merge_lora\(model\) first"):
        quantize_model(model.eval())
    with pytest.raises(ValueError, match="prune first, then quantize or adapt"):
        structure(model)
    quantize_model(merge_lora(model))


def test_half_precision_goes_through_adapters():
    for method in ("lora", "vpt_deep"):
        model = vit()
        finetune(model, method)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images())
        torch.testing.assert_close(logits.float(), model(images()), rtol=0.05, atol=0.1)
        logits.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_higher_resolution_starts_from_interpolated_positions(tmp_path):
    save_weights(vit(), tmp_path / "low.safetensors")
    model = create_model("vit_tiny", **{**vit().model_args, "img_size": 24}, weights=tmp_path / "low.safetensors")
    torch.testing.assert_close(model.eval()(images(side=24)), vit().eval()(images(side=24)), rtol=1e-4, atol=1e-5)
    task = finetune(model, "full")
    before = model.pos_embed.detach().clone()
    fit(model, pictures(side=24), None, FAST, task=task, progress=False)
    assert before.shape == (1, 37, 32) and (model.pos_embed - before).abs().amax(2).min() > 0


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def trained(tmp_path):
    """A small file to start from, made without training: what is tested is what becomes of it."""
    path = tmp_path / "base.safetensors"
    model = create_model("vit_tiny", img_size=28, patch_size=7, in_chans=1, embed_dim=16, depth=2, num_heads=2)
    model.reset_classifier(3)
    save_weights(randomise(model), path)
    return path


ARGUMENTS = ["--model", "vit_tiny", "--model-args", "img_size=28,patch_size=7,embed_dim=16,depth=2,num_heads=2"]
RUN = [*ARGUMENTS, "--data", "fashion_mnist_subset", "--max-steps", "3", "--batch-size", "16", "--device", "cpu"]


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("lora", "rank=2,targets=(q,k)"), ("vpt_deep", "tokens=3"), ("linear", ""), ("staged", "stages=3"), ("full", "")],
)
def test_the_command_line_fine_tunes_and_what_it_saves_is_of_use(method, arguments, trained, tmp_path, capsys):
    from vitcourse.commands import main as vitcourse

    run = tmp_path / "run"
    options = ["--weights", str(trained), "--method", method, "--out-dir", str(run)]
    assert main([*RUN, *options, *(["--method-args", arguments] if arguments else [])]) == 0
    told = capsys.readouterr()
    assert f"{method}: " in told.out and "weights are for 3 classes, not 10" in told.err
    assert vitcourse(["evaluate", str(run / "best.safetensors"), "--data", "fashion_mnist_subset", "--json", "-"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert accuracy == pytest.approx(json.loads((run / "test.json").read_text())["best"]["test_accuracy"])
    assert (run / "adapter.safetensors").exists() == (method not in ("staged", "full"))
    assert main([*RUN, *options, *(["--method-args", arguments] if arguments else []), "--resume"]) == 0
    if method in ("lora", "vpt_deep"):
        model = load_adapter(create_model(trained), run / "adapter.safetensors").eval()
        x = torch.randn(2, 1, 28, 28)
        assert torch.equal(model(x), create_model(run / "best.safetensors").eval()(x))


def test_stages_can_be_written_on_the_command_line(trained, tmp_path, capsys):
    stages = "schedule=[{'train':['head'],'share':0.4},{'train':['head','blocks.1']}],rewarm=0"
    options = [
        "--weights",
        str(trained),
        "--method",
        "staged",
        "--method-args",
        stages,
        "--out-dir",
        str(tmp_path / "r"),
    ]
    assert main([*RUN, *options, "--quiet"]) == 0
    before, after = create_model(trained).state_dict(), create_model(tmp_path / "r" / "final.safetensors").state_dict()
    moved = {n for n in changed(before, after) if not n.startswith("head.")}
    assert moved and all(n.startswith("blocks.1.") for n in moved)


def test_a_recipe_may_have_a_method(trained, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "vit_tiny"\nmethod = "lora"\nmethod_args = {rank = 3}\n', encoding="utf-8")
    options = ["--recipe", str(recipe), *RUN[2:], "--weights", str(trained), "--out-dir", str(tmp_path / "r")]
    assert main([*options, "--method-args", "targets=(v)"]) == 1  # a name, and no list
    assert "must be a list such as ('q', 'v')" in capsys.readouterr().err
    assert main([*options, "--method-args", "targets=(v,)"]) == 0
    adapters = create_model(tmp_path / "r" / "final.safetensors").adapters
    assert adapters == [{"kind": "lora", "rank": 3, "alpha": None, "targets": ["v"], "dropout": 0.0}]
    assert (
        main([*options[:-1], str(tmp_path / "s"), "--method", "linear", "--quiet"]) == 0
    )  # whose arguments it has not


def test_the_file_says_which_model_is_tuned(trained, tmp_path, capsys):
    out = tmp_path / "r"
    options = [*RUN[4:], "--method", "lora", "--quiet"]
    assert main([*options, "--weights", str(trained), "--out-dir", str(out)]) == 0
    assert "random weights" not in capsys.readouterr().err
    tuned, before = create_model(out / "final.safetensors"), create_model(trained)
    assert {n for n in changed(before.state_dict(), state(tuned)) if n in before.state_dict()} <= {
        "head.weight",
        "head.bias",
    }
    assert main([*options, "--weights", str(out / "adapter.safetensors"), "--out-dir", str(tmp_path / "s")]) == 1
    assert "what fine-tuning has changed, and not the model" in capsys.readouterr().err


def test_a_method_without_weights_is_told(tmp_path, capsys):
    assert main([*RUN, "--method", "linear", "--out-dir", str(tmp_path / "r"), "--quiet"]) == 0
    assert "starts from random weights; --weights names trained ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lorra"], "method 'lorra' is unknown; did you mean 'lora'"),
        (["--method", "lora", "--method-args", "rank=0"], "rank must be a whole number of at least 1, got 0"),
        (["--method-args", "rank=2"], "--method-args rank are for a --method"),
        (["--method", "staged", "--method-args", "schedule=[{'train':['hed']}]"], "'hed' names nothing"),
    ],
)
def test_the_command_line_refuses_what_makes_no_sense(options, message, trained, tmp_path, capsys):
    assert main([*RUN, "--weights", str(trained), "--out-dir", str(tmp_path / "r"), *options]) == 1
    told = capsys.readouterr().err
    assert message in told and not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------- between models, and among them


def test_the_line_between_two_models_has_them_at_its_ends():
    start, end, model = state(vit()), state(randomise(vit())), vit()
    for alpha, expected in ((0, start), (1, end)):
        assert changed(expected, interpolate(start, end, alpha)) == set()
    middle = interpolate(start, end, 0.3)
    torch.testing.assert_close(middle["head.bias"], 0.7 * start["head.bias"] + 0.3 * end["head.bias"])
    rows = interpolation_path(model, start, end, lambda m: {"logit": m(images())[0, 0].item()}, alphas=(0, 0.3, 1))
    model.load_state_dict(middle)
    assert rows[1] == {"alpha": 0.3, "logit": pytest.approx(model(images())[0, 0].item())}
    assert len({row["logit"] for row in rows}) == 3


def test_the_line_leaves_out_heads_and_leaves_the_model_as_it_was():
    model = vit()
    before = state(model)
    body = {n: t for n, t in before.items() if not n.startswith("head.")}
    end = {n: t + 1 for n, t in body.items()}

    def fails(m):
        assert torch.equal(m.head.weight, before["head.weight"]) and not torch.equal(m.pos_embed, before["pos_embed"])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interpolation_path(model, body, end, fails, alphas=(0.5,))
    assert changed(before, state(model)) == set()
    with pytest.raises(ValueError, match=r"differ in head\.bias.*give both the same head"):
        interpolate(before, body, 0.5)
    with pytest.raises(ValueError, match="start has no, which VisionTransformer has not"):
        interpolation_path(model, {"no": torch.ones(1)}, {"no": torch.ones(1)}, lambda m: {})


def test_integers_are_those_of_the_nearer_end():
    start, end = ({"n": torch.tensor(n), "w": torch.tensor(float(n))} for n in (2, 6))
    assert [interpolate(start, end, a)["n"].item() for a in (0, 0.4, 0.6, 1)] == [2, 2, 6, 6]


def test_agreement_and_ensembles():
    labels = torch.tensor([0, 1, 2, 0])
    says = [torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 2, 1]), torch.eye(3)[[0, 1, 2, 0]]]
    expected = torch.tensor([[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 1]])
    assert torch.equal(agreement(says), expected)
    mistakes = shared_mistakes(says, labels)
    assert torch.equal(mistakes[:2, :2], torch.tensor([[1, 0.5], [0.5, 1]])) and mistakes[2].isnan().all()
    sure, unsure = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.4, 0.6]])
    assert ensemble([sure, unsure, unsure]).argmax().item() == 0  # means of probabilities, and not votes
    for wrong in ([], [sure, torch.ones(2, 2)]):
        with pytest.raises(ValueError, match="alike"):
            ensemble(wrong)
    with pytest.raises(ValueError, match="of the same images"):
        agreement([labels, labels[:2]])
