"""Pruning: what is removed was really there, what is left computes the same as with zeros, and zeros stay zeros."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitcourse import create_model, hardware
from vitcourse.efficient_attention import (
    BigBirdAttention,
    LinearAttention,
    LocalAttention,
    RandomBlockAttention,
    RandomFeatureAttention,
    TwoSoftmaxAttention,
    merge_tokens,
)
from vitcourse.hardware.prune import (
    accelerate_2_4,
    count_macs,
    keep_units,
    magnitude_prune,
    make_permanent,
    prune_like,
    prune_model,
    structure,
    taylor_importance,
    taylor_score,
)
from vitcourse.hierarchical import SwinTransformer
from vitcourse.vit import VisionTransformer, record_attention
from vitcourse.weights import read_metadata, save_weights

SIZES = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}
KEEP = {"blocks.0.attn": [0, 2], "blocks.0.mlp": [*range(5), 17, 40], "blocks.1.attn": [1], "blocks.1.mlp": [95, 3]}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, in float64: biases and tokens that start at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.double().eval()


@pytest.fixture
def vit() -> VisionTransformer:
    return randomised(VisionTransformer(**SIZES))


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 1, 16, 16, generator=generator).double(), torch.randint(5, (n,), generator=generator))
        for n in (6, 3)
    ]


def with_zeros(model: nn.Module, keep: dict[str, list[int]], images: torch.Tensor) -> torch.Tensor:
    """The whole model's logits with the outputs of all other heads and channels set to zero."""
    hooks = []
    for name, units in keep.items():
        layer = model.get_submodule(name)
        outlet = layer.proj if hasattr(layer, "proj") else layer.fc2
        mask = torch.zeros(structure(model)[name], dtype=images.dtype)
        mask[units] = 1
        mask = mask.repeat_interleave(outlet.in_features // len(mask))
        hooks.append(outlet.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,)))
    try:
        return model(images)
    finally:
        for hook in hooks:
            hook.remove()


# -------------------------------------------------------------------------------------------------------------- surgery


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "init_values": 0.5}, {"global_pool": "avg"}])
def test_removed_is_the_same_as_zero(options, batches):
    model, images = randomised(VisionTransformer(**SIZES, **options)), batches[0][0]
    expected, whole = with_zeros(model, KEEP, images), model(images)
    small = keep_units(copy.deepcopy(model), KEEP)
    assert structure(small) == {name: len(units) for name, units in KEEP.items()}
    torch.testing.assert_close(small(images), expected, rtol=1e-12, atol=1e-12)
    assert (whole - expected).abs().max() > 0.1 and expected.std(0).min() > 1e-3  # it matters, and the images do


def test_order_of_the_units_left_does_not_matter(vit, batches):
    shuffled = {name: units[::-1] for name, units in KEEP.items()}
    one, other = (keep_units(copy.deepcopy(vit), keep) for keep in (KEEP, shuffled))
    torch.testing.assert_close(one(batches[0][0]), other(batches[0][0]), rtol=1e-12, atol=1e-12)


def test_parameters_are_really_gone(vit):
    small = keep_units(copy.deepcopy(vit), KEEP)
    attn, mlp = small.blocks[1].attn, small.blocks[1].mlp
    assert attn.qkv.weight.shape == (3 * 8, 24) and attn.proj.weight.shape == (24, 8) and attn.head_dim == 8
    assert mlp.fc1.weight.shape == (2, 24) and mlp.fc2.weight.shape == (24, 2)
    assert small.state_dict()["blocks.1.attn.qkv.weight"].untyped_storage().nbytes() == 3 * 8 * 24 * 8


def test_surgery_keeps_dtype_mode_and_what_is_frozen(vit):
    vit.half().train()
    vit.blocks[0].requires_grad_(False)
    keep_units(vit, KEEP)
    assert {p.dtype for p in vit.parameters()} == {torch.float16}
    assert all(m.training for m in vit.modules())
    frozen = {name.split(".")[1] for name, p in vit.named_parameters() if "blocks" in name and not p.requires_grad}
    assert frozen == {"0"}


def test_the_small_model_trains_and_shows_its_attention(vit, batches):
    small = keep_units(vit, KEEP).train()
    images, labels = batches[0]
    F.cross_entropy(small(images), labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.blocks.parameters())
    with record_attention(small) as weights:
        small(images)
    assert [w.shape[1] for w in weights] == [2, 1]


def test_the_small_model_compiles_and_exports(vit, batches):
    small, images = keep_units(vit, KEEP), batches[0][0]
    expected = small(images)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-10, atol=1e-10)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(small, (images,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(images[:3]), expected[:3], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"blocks.2.attn": [0]}, r"no prunable layer 'blocks.2.attn'; it has blocks.0.attn, "),
        ({"blocks.0.attn": []}, r"some of 0 … 2, each once; got \[\]"),
        ({"blocks.0.attn": [0, 3]}, r"some of 0 … 2, each once; got \[0, 3\]"),
        ({"blocks.0.attn": [-1]}, r"got \[-1\]"),
        ({"blocks.0.mlp": [5, 5]}, r"some of 0 … 95, each once; got \[5, 5\]"),
        ({"blocks.0.mlp": range(97)}, r"got 97 units from 0 to 96"),
    ],
)
def test_units_that_do_not_exist(vit, keep, message):
    before = structure(vit)
    with pytest.raises(ValueError, match=message):
        keep_units(vit, {"blocks.1.mlp": [0], **keep})
    assert structure(vit) == before  # nothing is half done


def test_models_that_cannot_be_pruned(vit):
    with pytest.raises(ValueError, match="Linear has nothing to prune: no attention with head_axes"):
        structure(nn.Linear(3, 3))
    vit.blocks[0].mlp.fc1 = nn.Sequential(vit.blocks[0].mlp.fc1)
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1 is a Sequential, not nn.Linear"):
        structure(vit)


SWIN = {"img_size": 24, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 2, "num_classes": 5}
COATNET = {
    "img_size": 16,
    "stem_dim": 8,
    "embed_dim": (8, 32, 32),
    "depths": (1, 1, 1),
    "layout": "CTT",
    "strides": (1, 2, 1),
    "head_dim": 8,
    "num_classes": 5,
}
MODELS = {
    "swin": (lambda: create_model("swin_tiny_patch4_window7_224", **SWIN, in_chans=1), 24),
    "swin, padded": (lambda: SwinTransformer(**{**SWIN, "window_size": 4}, in_chans=1, mask_padding=True), 24),
    "swinv2": (lambda: create_model("swinv2_tiny_window8_256", **SWIN, in_chans=1), 24),
    "swinv2, no biases": (lambda: create_model("swinv2_tiny_window8_256", **SWIN, in_chans=1, qkv_bias=False), 24),
    "coatnet": (lambda: create_model("coatnet_0", **COATNET, in_chans=1), 16),
    **{
        mixer.__name__: (lambda mixer=mixer: VisionTransformer(**SIZES, attn_layer=mixer), 16)
        for mixer in (
            LinearAttention,
            TwoSoftmaxAttention,
            RandomFeatureAttention,
            LocalAttention,
            RandomBlockAttention,
            BigBirdAttention,
        )
    },
}


def some_units(model: nn.Module) -> dict[str, list[int]]:
    """The odd ones of every second layer's units, and of the others all but the first."""
    return {
        name: list(range(1, units, 2)) if i % 2 else list(range(min(1, units - 1), units))
        for i, (name, units) in enumerate(structure(model).items())
    }


@pytest.mark.parametrize("name", MODELS)
def test_heads_of_all_kinds_can_be_removed(name):
    """What the model computes with these heads' outputs, and these channels, set to zero."""
    build, size = MODELS[name]
    model = randomised(build())
    images = torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(2)).double()
    keep, heads = some_units(model), [m for m in model.modules() if hasattr(m, "num_heads")]
    expected, whole = with_zeros(model, keep, images), model(images)
    small = keep_units(copy.deepcopy(model), keep)
    assert sum(".attn" in layer for layer in keep) == len(heads)
    torch.testing.assert_close(small(images), expected, rtol=1e-10, atol=1e-10)
    assert (whole - expected).abs().max() > 1e-3 and expected.std(0).min() > 1e-6
    if name in ("swin", "LinearAttention"):
        compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected, rtol=1e-9, atol=1e-9)
    with record_attention(small) as weights:
        small(images)
    assert [w.shape[1] for w in weights] == [len(units) for layer, units in keep.items() if ".attn" in layer]


@pytest.mark.parametrize("name", ["swin", "swinv2", "coatnet"])
def test_other_models_are_saved_and_opened(name, tmp_path):
    build, size = MODELS[name]
    model, images = randomised(build()).float(), torch.randn(4, 1, size, size)
    small = prune_model(model, [(images, torch.arange(4))], macs=0.7, rounds=2)
    assert count_macs(small, images) <= 0.7 * count_macs(model, images)
    assert sum(units for layer, units in structure(small).items() if ".attn" in layer) < 12
    save_weights(small, tmp_path / "small.safetensors")
    again = create_model(tmp_path / "small.safetensors").eval()
    assert structure(again) == structure(small) and torch.equal(again(images), small(images))


def test_what_heads_share_is_not_saved():
    """Swin V2's heads share the first layer of the bias network, which stays when some of them go."""
    model, images = randomised(MODELS["swinv2"][0]()).float(), torch.randn(4, 1, 24, 24)
    for macs in (0.85, 0.8, 0.75, 0.7, 0.65):
        small = prune_model(model, [(images, torch.arange(4))], macs=macs, rounds=1, channel_multiple=1)
        assert count_macs(small, images) <= macs * count_macs(model, images)


def test_a_mixer_with_other_parameters_keeps_its_heads(vit):
    vit.blocks[0].attn.temperature = nn.Parameter(torch.ones(3))
    assert set(structure(vit)) == {"blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"}


def test_what_cannot_be_pruned_is_named(vit, batches):
    vit.blocks[0].attn.temperature = nn.Parameter(torch.ones(3))
    attn = count_macs(vit.blocks[0].attn, torch.zeros(1, 17, 24).double()) / count_macs(vit, batches[0][0][:1])
    message = (
        rf"macs 0.1 cannot be reached: .* most of it in blocks.0.attn \({attn:.3f}\), patch_embed \(0.0\d+\), head"
    )
    with pytest.raises(ValueError, match=message):
        prune_model(vit, batches, macs=0.1, rounds=1)


def test_what_the_floors_keep_is_told_apart_from_what_cannot_be_pruned(vit, batches):
    """By the smallest model there is: its MACs in the layers that can be pruned, and in the others."""
    with pytest.raises(ValueError, match="macs 0.05 cannot be reached") as caught:
        prune_model(vit, batches, macs=0.05, rounds=1, min_heads=2)
    image, full = batches[0][0][:1], count_macs(vit, batches[0][0][:1])
    whole = count_macs(keep_units(vit, {name: range(2 if "attn" in name else 8) for name in structure(vit)}), image)
    fixed = 16 * (16 * 24) + 24 * 5  # the patch embedding, and the head
    assert (
        f"round 1 ends at {whole / full:.3f}. {(whole - fixed) / full:.3f} is what min_heads 2 and channel_multiple 8 "
        f"keep, and {fixed / full:.3f} cannot be pruned, most of it in patch_embed ("
    ) in str(caught.value)


def test_a_model_that_merges_tokens_is_pruned_as_it_is(batches):
    model = create_model("vit_tiny", **SIZES)
    small = prune_model(merge_tokens(randomised(model), 2), batches, macs=0.6, rounds=1)
    assert count_macs(small, batches[0][0]) <= 0.6 * count_macs(merge_tokens(model, 2), batches[0][0])
    widths = structure(small.model)
    assert widths != structure(model) and small.model.structure == widths
    assert small.structure == {f"model.{name}": units for name, units in widths.items()}


# ----------------------------------------------------------------------------------------------------------- importance


def test_importance_is_the_gradient_of_a_gate(vit, batches):
    """Against central differences: a gate on one unit, for one image at a time."""
    scores = taylor_importance(vit, batches)
    step = 1e-5
    for name, unit in [("blocks.0.attn", 1), ("blocks.1.attn", 0), ("blocks.0.mlp", 40), ("blocks.1.mlp", 7)]:
        layer = vit.get_submodule(name)
        outlet, units = (layer.proj, 3) if "attn" in name else (layer.fc2, 96)
        gate = torch.ones(units, outlet.in_features // units).double()
        hook = outlet.register_forward_pre_hook(lambda module, args, gate=gate: (args[0] * gate.flatten(),))
        effects = []
        for images, labels in batches:
            for image, label in zip(images, labels, strict=True):
                losses = []
                for value in (1 + step, 1 - step):
                    gate[unit] = value
                    losses.append(F.cross_entropy(vit(image[None]), label[None]))
                effects.append(((losses[0] - losses[1]) / (2 * step)).abs())
        hook.remove()
        torch.testing.assert_close(scores[name][unit], torch.stack(effects).mean(), rtol=1e-6, atol=1e-10)


def test_a_layer_that_runs_twice_has_one_gate(vit, batches):
    """Against central differences of a gate that closes both runs."""
    vit.blocks[1].mlp = vit.blocks[0].mlp
    vit.blocks.append(vit.blocks[1])  # its attention runs twice, too
    assert set(structure(vit)) == {"blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"}
    scores, (images, labels), step = taylor_importance(vit, batches[:1]), batches[0], 1e-5
    for name, outlet, unit in (("blocks.1.attn", "blocks.1.attn.proj", 2), ("blocks.0.mlp", "blocks.0.mlp.fc2", 7)):
        layer = vit.get_submodule(outlet)
        gate = torch.ones(structure(vit)[name], layer.in_features // structure(vit)[name]).double()
        hook = layer.register_forward_pre_hook(lambda module, args, gate=gate: (args[0] * gate.flatten(),))
        losses = []
        for value in (1 + step, 1 - step):
            gate[unit] = value
            losses.append(F.cross_entropy(vit(images), labels, reduction="none"))
        hook.remove()
        expected = ((losses[0] - losses[1]) / (2 * step)).abs().mean()
        torch.testing.assert_close(scores[name][unit], expected, rtol=1e-6, atol=1e-10)


def test_a_layer_with_two_names_is_pruned_and_its_runs_all_count(vit, batches):
    vit.blocks[1].mlp = vit.blocks[0].mlp
    small = prune_model(vit, batches, macs=0.6, rounds=2)
    image = batches[0][0][:1]
    assert small.blocks[0].mlp is small.blocks[1].mlp and small.blocks[0].mlp.fc1.out_features < 96
    assert 0.5 < count_macs(small, image) / count_macs(vit, image) <= 0.6


def test_importance_of_checkpointed_blocks(vit, batches):
    expected = taylor_importance(vit, batches)
    vit.set_grad_checkpointing()
    for name, score in taylor_importance(vit, batches).items():
        torch.testing.assert_close(score, expected[name], rtol=1e-12, atol=1e-14)


def test_importance_leaves_the_model_as_it_was(vit, batches):
    vit.train()
    vit.norm.eval()
    vit.requires_grad_(False)
    before = copy.deepcopy(vit.state_dict())
    scores = taylor_importance(vit, batches)
    assert all(p.grad is None and not p.requires_grad for p in vit.parameters())
    assert vit.training and vit.blocks.training and not vit.norm.training
    assert not any(m._forward_pre_hooks for m in vit.modules())
    assert all(torch.equal(before[key], value) for key, value in vit.state_dict().items())
    trainable = taylor_importance(copy.deepcopy(vit).requires_grad_(True), batches)
    assert all(torch.equal(scores[name], trainable[name]) for name in scores)


def test_how_images_are_batched_does_not_matter(vit, batches):
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    split = list(zip(images.split(4), labels.split(4), strict=True))
    whole, parts = taylor_importance(vit, [(images, labels)]), taylor_importance(vit, split)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-10, atol=1e-14)


def test_images_that_disagree_do_not_cancel():
    x = torch.tensor([[[1.0]], [[1.0]]])
    assert taylor_score(x, torch.tensor([[[2.0]], [[-2.0]]]), 1).item() == 2
    within = torch.tensor([[[1.0], [1.0]]])  # tokens of one image do: the gate is one for all of them
    assert taylor_score(within, torch.tensor([[[2.0], [-2.0]]]), 1).item() == 0


def test_half_precision_is_summed_in_float32():
    x = torch.full((1, 4096, 2), 0.25, dtype=torch.float16)
    score = taylor_score(x, torch.full_like(x, 100.0), 1)
    assert score.dtype == torch.float32 and score.item() == 4096 * 2 * 25


def test_a_data_set_is_normalised_like_the_model_wants():
    from vitcourse.data import open_dataset, subset
    from vitcourse.paths import data_dir

    model = create_model(data_dir() / "weights" / "fashion_mnist_vit.safetensors")
    few = subset(open_dataset("fashion_mnist_subset"), 20)
    mean, std = model.preprocess.mean[0], model.preprocess.std[0]
    images = torch.stack([(image.float() / 255 - mean) / std for image, _ in few])
    ready = taylor_importance(model, [(images, torch.tensor([label for _, label in few]))])
    scores = taylor_importance(model, few)
    for name in scores:
        torch.testing.assert_close(scores[name], ready[name], rtol=1e-4, atol=1e-7)


def test_another_loss(vit, batches):
    doubled = taylor_importance(vit, batches, loss_fn=lambda logits, labels: 2 * F.cross_entropy(logits, labels))
    for name, score in taylor_importance(vit, batches).items():
        torch.testing.assert_close(doubled[name], 2 * score)


# ------------------------------------------------------------------------------------------------------- prune_model


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("macs", [0.8, 0.45])
def test_prune_model_reaches_its_target(vit, batches, macs, rounds):
    before = copy.deepcopy(vit.state_dict())
    small = hardware.prune_model(vit, batches, macs=macs, rounds=rounds)
    image = batches[0][0][:1]
    ratio = count_macs(small, image) / count_macs(vit, image)
    one_head = count_macs(vit.blocks[0].attn, torch.zeros(1, 17, 24).double()) / 3 / count_macs(vit, image)
    assert macs - one_head < ratio <= macs
    assert all(torch.equal(before[key], value) for key, value in vit.state_dict().items())
    assert all(n % 8 == 0 for name, n in structure(small).items() if name.endswith("mlp"))


def test_macs_are_those_of_the_formula(vit):
    n, d, h, hidden = 17, 8, (3, 2), (96, 40)
    small = prune_like(vit, {"blocks.1.attn": h[1], "blocks.1.mlp": hidden[1]})
    blocks = sum(n * 24 * 4 * d * k + 2 * n * n * d * k + 2 * n * 24 * w for k, w in zip(h, hidden, strict=True))
    assert count_macs(small, torch.zeros(1, 1, 16, 16).double()) == 16 * 16 * 24 + blocks + 24 * 5


def test_the_counter_sees_attention_of_every_backend(vit):
    images, seen = torch.zeros(1, 1, 16, 16).double(), []
    for backend in ("math", "sdpa", "auto"):
        for block in vit.blocks:
            block.attn.backend = backend
        seen.append(count_macs(vit, images))
        assert all(block.attn.backend == backend for block in vit.blocks)
    assert len(set(seen)) == 1


def test_a_layer_that_never_runs(vit, batches):
    vit.spare = copy.deepcopy(vit.blocks[0].mlp)
    with pytest.raises(ValueError, match="spare did not run on the calibration images"):
        prune_model(vit, batches)


def test_what_matters_stays(vit, batches):
    """Units whose outlet is zero do nothing, so they go first, and nothing changes."""
    with torch.no_grad():
        vit.blocks[0].attn.proj.weight[:, 8:16] = 0
        vit.blocks[1].attn.proj.weight[:, :16] = 0
        vit.blocks[1].mlp.fc2.weight[:, 1::2] = 0
    expected = vit(batches[0][0])
    small = prune_model(vit, batches, macs=0.7, rounds=2)
    assert structure(small) == {"blocks.0.attn": 2, "blocks.0.mlp": 96, "blocks.1.attn": 1, "blocks.1.mlp": 48}
    torch.testing.assert_close(small(batches[0][0]), expected, rtol=1e-12, atol=1e-12)


def test_fine_tuning_is_called_after_each_round(vit, batches):
    seen, image = [], batches[0][0][:1]
    small = prune_model(vit, batches, macs=0.6, rounds=3, finetune=lambda m: seen.append((m, count_macs(m, image))))
    assert len(seen) == 3 and all(m is small for m, _ in seen)
    full = count_macs(vit, image)
    for (_, macs), target in zip(seen, (1 - 0.4 / 3, 1 - 0.8 / 3, 0.6), strict=True):
        assert target - 0.1 < macs / full <= target


def test_scores_of_ones_own(vit, batches):
    first = {name: torch.arange(units, 0, -1).double() for name, units in structure(vit).items()}

    def importance(model):
        return {name: first[name][:units] for name, units in structure(model).items()}

    small = prune_model(vit, batches, macs=0.6, rounds=2, importance=importance)
    kept = structure(small)
    assert kept != structure(vit)
    expected = keep_units(vit, {name: range(units) for name, units in kept.items()})
    torch.testing.assert_close(small(batches[0][0]), expected(batches[0][0]), rtol=0, atol=0)


def test_scores_may_be_lists(vit, batches):
    scores = {name: torch.rand(units) for name, units in structure(vit).items()}
    lists = {name: score.tolist() for name, score in scores.items()}
    one, other = (
        prune_model(vit, batches, rounds=1, importance=lambda model, given=given: given) for given in (scores, lists)
    )
    assert structure(one) == structure(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: {}, r"missing or unknown: \['blocks.0.attn', 'blocks.0.mlp', "),
        (lambda scores: {**scores, "head": torch.rand(5)}, r"missing or unknown: \['head'\]"),
        (lambda scores: list(scores.values()), "importance must return a mapping of layers to scores, got list"),
        (lambda scores: {**scores, "blocks.1.mlp": torch.rand(95)}, r"must give 96 scores of blocks.1.mlp.* \(95,\)"),
        (lambda scores: {**scores, "blocks.1.attn": [1.0, torch.nan, 2.0]}, "scores of blocks.1.attn that are NaN"),
    ],
)
def test_scores_that_do_not_fit(vit, batches, change, message):
    scores = {name: torch.rand(units) for name, units in structure(vit).items()}
    with pytest.raises(ValueError, match=message):
        prune_model(vit, batches, importance=lambda model: change(scores))


def test_images_that_are_not_finite(vit, batches):
    batches[1][0][0, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="importance of blocks.0.attn is not finite; look for NaN and infinity in"):
        prune_model(vit, batches)


def test_batches_may_come_from_a_generator(vit, batches):
    small = prune_model(vit, (batch for batch in batches), macs=0.6, rounds=2)
    assert structure(small) == structure(prune_model(vit, batches, macs=0.6, rounds=2))


def test_channels_that_do_not_come_in_multiples(batches):
    model = randomised(VisionTransformer(**SIZES, mlp_ratio=1.5))  # 36 hidden channels
    kept = structure(prune_model(model, batches, macs=0.4, rounds=1, channel_multiple=8))
    widths = {kept["blocks.0.mlp"], kept["blocks.1.mlp"]}
    assert widths <= {8, 16, 24, 32, 36} and widths != {36}


def test_floors_hold(vit, batches):
    small = structure(prune_model(vit, batches, macs=0.5, rounds=1, min_heads=2))
    assert small["blocks.0.attn"] >= 2 and small["blocks.1.attn"] >= 2
    with pytest.raises(ValueError, match=r"macs 0.1 cannot be reached: round 1 ends at 0\.\d+\."):
        prune_model(vit, batches, macs=0.1, rounds=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": 0.0}, "macs 0.0 must be between 0 and 1"),
        ({"macs": 1.2}, "macs 1.2 must be between 0 and 1"),
        ({"macs": "0.5"}, "macs '0.5' must be between 0 and 1"),
        ({"macs": None}, "macs None must be between 0 and 1"),
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"rounds": 1.5}, "rounds must be an integer of at least 1, got 1.5"),
        ({"channel_multiple": 0}, "channel_multiple must be an integer of at least 1, got 0"),
        ({"min_heads": 0}, "min_heads must be an integer of at least 1, got 0"),
        ({"min_heads": 4}, "min_heads 4 is more than the 3 heads that blocks.0.attn has"),
        ({"calibration": []}, "calibration holds no images"),
    ],
)
def test_bad_arguments(vit, batches, options, message):
    with pytest.raises(ValueError, match=message):
        prune_model(vit, **{"calibration": batches, **options})


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "calibration is a NoneType; give batches"),
        (torch.zeros(2, 1, 16, 16), "calibration is a Tensor; give batches"),
        ([torch.zeros(2, 1, 16, 16)], "a batch of type Tensor; it must be"),
        ([(torch.zeros(2, 1, 16, 16),)], "a batch of type tuple; it must be"),
    ],
)
def test_calibration_without_labels(vit, calibration, message):
    with pytest.raises(TypeError, match=message):
        prune_model(vit, calibration)


def test_in_inference_mode(vit, batches):
    expected, scores = structure(prune_model(vit, batches, rounds=2)), taylor_importance(vit, batches)
    with torch.inference_mode():
        made_here = [(images.clone(), labels.clone()) for images, labels in batches]
        small, here = prune_model(vit, made_here, rounds=2), taylor_importance(vit, made_here)
    assert structure(small) == expected and all(torch.equal(here[name], scores[name]) for name in scores)
    F.cross_entropy(small(batches[0][0]), batches[0][1]).backward()  # an ordinary model, which can be trained


# -------------------------------------------------------------------------------------------------------- saved, loaded


def test_structure_and_state_dict_are_enough(vit, batches):
    small = prune_model(vit, batches, macs=0.5, rounds=2)
    again = prune_like(VisionTransformer(**SIZES).double().eval(), structure(small))
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again(batches[0][0]), small(batches[0][0]), rtol=0, atol=0)
    with pytest.raises(ValueError, match="each once; got 97 units"):
        prune_like(VisionTransformer(**SIZES), {"blocks.0.mlp": 97})


def test_saved_and_loaded(tmp_path, batches):
    sizes = {key: value for key, value in SIZES.items() if key != "img_size"}
    model = create_model("vit_tiny", img_size=16, **sizes).eval()
    small = prune_model(model, [(x.float(), y) for x, y in batches], macs=0.5, rounds=1)
    path = tmp_path / "small.safetensors"
    save_weights(small, path, accuracy=0.5)
    again = create_model(path).eval()
    assert structure(again) == structure(small) == again.structure and again.preprocess == model.preprocess
    images = batches[0][0].float()
    assert torch.equal(again(images), small(images))
    save_weights(model, tmp_path / "whole.safetensors")
    assert path.stat().st_size < 0.75 * (tmp_path / "whole.safetensors").stat().st_size
    save_weights(again, tmp_path / "again.safetensors", accuracy=0.5)
    assert read_metadata(tmp_path / "again.safetensors") == read_metadata(path)


def test_a_pruned_file_says_what_opens_it_and_takes_a_new_head(tmp_path, capsys):
    model, path = create_model("vit_tiny", **SIZES), tmp_path / "small.safetensors"
    save_weights(keep_units(model, KEEP), path)
    with pytest.raises(ValueError, match=r"pruned or quantized model, which create_model\(path\) builds"):
        create_model("vit_tiny", **SIZES, weights=path)
    assert create_model(path, num_classes=2).head.out_features == 2
    assert "the head starts untrained" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"small.safetensors cannot be rebuilt: .* no prunable layer 'blocks.1.attn'"):
        create_model(path, depth=1)


# ---------------------------------------------------------------------------------------------------------------- zeros


def test_the_smallest_weights_become_zero(vit):
    layers = {n: m for n, m in vit.named_modules() if isinstance(m, nn.Linear) and n != "head"}
    old = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    magnitude_prune(vit, 0.7)
    kept = torch.cat([old[name][layer.weight != 0].abs() for name, layer in layers.items()])
    gone = torch.cat([old[name][layer.weight == 0].abs() for name, layer in layers.items()])
    assert gone.max() < kept.min()
    assert len(gone) / (len(gone) + len(kept)) == pytest.approx(0.7, abs=1e-4)
    assert all(
        torch.equal(layer.weight[layer.weight != 0], old[name][layer.weight != 0]) for name, layer in layers.items()
    )
    assert (vit.head.weight != 0).all()


def test_equal_weights_do_not_all_become_zero():
    layer = nn.Linear(8, 8)
    nn.init.constant_(layer.weight, -0.5)
    weight = magnitude_prune(layer, 0.25).weight
    assert weight.flatten().tolist() == [0.0] * 16 + [-0.5] * 48
    two = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        two[0].weight.fill_(0.5)
        two[1].weight.fill_(0.5)[0] = 0.1
    magnitude_prune(two, 0.3)  # 10 of 32: four are smaller than the rest, and six of the rest go
    assert (two[0].weight == 0).sum() == 6 and (two[1].weight == 0).nonzero()[:, 0].tolist() == [0, 0, 0, 0]


def test_the_number_of_zeros_is_exact_in_half_precision(vit):
    """In bfloat16 many weights are equal."""
    magnitude_prune(vit.bfloat16(), 0.3)
    weights = [m.weight for name, m in vit.named_modules() if isinstance(m, nn.Linear) and name != "head"]
    assert sum((w == 0).sum().item() for w in weights) == round(0.3 * sum(w.numel() for w in weights))


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        (None, {"head"}),
        ("head", {"head"}),
        ((), set()),
        (
            ["head", "blocks.0"],
            {"head", *(f"blocks.0.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))},
        ),
        ("*.fc?", {f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)}),
    ],
)
def test_what_is_skipped_stays_dense(vit, skip, dense):
    magnitude_prune(vit, 0.3, skip=skip)
    layers = {name: m for name, m in vit.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, layer in layers.items() if (layer.weight != 0).all()} == dense


def test_a_head_with_parts_is_skipped_whole():
    swin = SwinTransformer(img_size=16, patch_size=2, embed_dim=8, depths=(1,), num_heads=(1,), window_size=4)
    assert (magnitude_prune(swin, 0.3).head.fc.weight != 0).all()


def test_a_pattern_that_matches_nothing(vit):
    with pytest.raises(ValueError, match="skip pattern 'haed' matches no module; did you mean 'head'"):
        magnitude_prune(vit, skip=["head", "haed"])


def test_a_file_holds_the_zeros_in_plain_weights(tmp_path):
    model = create_model("vit_tiny", **SIZES).eval()
    magnitude_prune(model, 0.4)
    save_weights(model, tmp_path / "zeros.safetensors")
    again, images = create_model(tmp_path / "zeros.safetensors").eval(), torch.randn(2, 1, 16, 16)
    assert torch.equal(again(images), model(images))
    assert again.state_dict().keys() == make_permanent(copy.deepcopy(model)).state_dict().keys()
    assert (again.blocks[0].mlp.fc1.weight == 0).any()
    model.blocks[0].mlp.fc1.parametrizations.weight.original.data.fill_(1.0)
    assert torch.equal(model.blocks[0].mlp.fc1.weight == 0, again.blocks[0].mlp.fc1.weight == 0)  # held as before


def test_two_of_every_four(vit):
    old = vit.blocks[0].mlp.fc1.weight.detach().clone()
    magnitude_prune(vit, pattern="2:4")
    new = vit.blocks[0].mlp.fc1.weight
    for before, after in zip(old.flatten().split(4), new.flatten().split(4), strict=True):
        smaller = before.abs().argsort()[:2]
        assert after[smaller].tolist() == [0, 0] and (after != 0).sum() == 2
    equal = nn.Linear(8, 1)
    nn.init.ones_(equal.weight)
    assert magnitude_prune(equal, pattern="2:4").weight.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_survive_training_and_become_permanent(vit, batches, pattern):
    magnitude_prune(vit, pattern=pattern)
    zero = vit.blocks[1].mlp.fc2.weight == 0
    optimizer = torch.optim.AdamW(vit.parameters(), lr=0.1)
    images, labels = batches[0]
    before = vit.blocks[1].mlp.fc2.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(vit(images), labels).backward()
        optimizer.step()
    assert torch.equal(vit.blocks[1].mlp.fc2.weight == 0, zero)
    assert (vit.blocks[1].mlp.fc2.weight - before)[~zero].abs().min() > 0
    expected = vit(images)
    make_permanent(vit)
    assert vit.state_dict().keys() == VisionTransformer(**SIZES).state_dict().keys()
    assert type(vit.blocks[1].mlp.fc2) is nn.Linear and vit.blocks[1].mlp.fc2.weight.requires_grad
    torch.testing.assert_close(vit(images), expected, rtol=0, atol=0)


def test_making_a_copy_permanent_leaves_the_model_masked(vit, batches):
    magnitude_prune(vit, 0.4)
    expected = vit(batches[0][0])
    permanent = make_permanent(copy.deepcopy(vit))
    assert torch.equal(vit(batches[0][0]), expected) and torch.equal(permanent(batches[0][0]), expected)
    vit.blocks[0].mlp.fc1.parametrizations.weight.original.data.fill_(1.0)
    assert torch.equal(vit.blocks[0].mlp.fc1.weight == 0, permanent.blocks[0].mlp.fc1.weight == 0)


def test_without_sparse_cores_it_says_so(vit, batches, capsys):
    magnitude_prune(vit, pattern="2:4")
    expected = vit(batches[0][0])
    accelerate_2_4(vit)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "blocks.0.attn.qkv and 7 more are not skipped" in error and "the weights are on cpu" in error
    assert torch.equal(vit(batches[0][0]), expected)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs sparse tensor cores"
)
def test_sparse_cores_compute_the_same():
    torch.manual_seed(0)
    layer = magnitude_prune(nn.Linear(128, 256), pattern="2:4").cuda().half()
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    expected = layer(x)
    assert accelerate_2_4(layer).weight.layout != torch.strided or "Sparse" in type(layer.weight).__name__
    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "4:8"}, "pattern '4:8' is unknown"),
        ({"sparsity": 1.0}, "sparsity 1.0 must be between 0 and 1"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "for pattern '2:4' it is 0.5"),
    ],
)
def test_bad_patterns(vit, options, message):
    with pytest.raises(ValueError, match=message):
        magnitude_prune(vit, **options)


def test_layers_that_cannot_have_zeros():
    with pytest.raises(ValueError, match="Conv2d has no linear layer outside skip"):
        magnitude_prune(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="1 has 6 inputs, which four does not divide; name it in skip"):
        magnitude_prune(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)), pattern="2:4")
    with pytest.raises(ValueError, match="no linear layer has the 2:4 pattern"):
        accelerate_2_4(nn.Linear(8, 8))
