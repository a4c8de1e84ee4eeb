"""MAE and BEiT against transformers, LeJEPA against lightly, masks against the authors' code."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from vitcourse import create_model, load_weights
from vitcourse.pretraining import BeitAttention, MaskedAutoencoder, MaskedImageModel, block_mask, patch_targets
from vitcourse.pretraining.lejepa import disagreement, random_directions, sigreg
from vitcourse.pretraining.mae import masked_error, random_masking
from vitcourse.vit import record_attention


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter at random: many are zero at first, and hide mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def block_names(theirs: dict[str, torch.Tensor], ours: str, layer: str) -> dict[str, torch.Tensor]:
    """A block of transformers' ViTs in timm's names; BEiT has no bias of the keys, which no softmax would see."""

    def joined(kind: str) -> torch.Tensor:
        parts = [theirs.get(f"{layer}.attention.{x}_proj.{kind}") for x in "qkv"]
        return torch.cat([torch.zeros_like(parts[0]) if part is None else part for part in parts])

    found = {f"{ours}.attn.qkv.{kind}": joined(kind) for kind in ("weight", "bias")}
    for a, b in (("attn.proj", "attention.o_proj"), ("norm1", "layernorm_before"), ("norm2", "layernorm_after")):
        found |= {f"{ours}.{a}.{kind}": theirs[f"{layer}.{b}.{kind}"] for kind in ("weight", "bias")}
    return found | {
        f"{ours}.mlp.{n}.{k}": theirs[f"{layer}.mlp.{n}.{k}"] for n in ("fc1", "fc2") for k in ("weight", "bias")
    }


def with_eps(model: nn.Module, eps: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return model


# -------------------------------------------------------------------------------------------------------------- MAE


def mae_config(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    more = {"decoder_intermediate_size": 64, "image_size": 12, "patch_size": 3, "mask_ratio": 0.7}
    return transformers.ViTMAEConfig(**{**sizes, **decoder, **more, **changes})


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_is_transformers(norm_pix):
    transformers = pytest.importorskip("transformers")
    config = mae_config(norm_pix_loss=norm_pix)
    theirs = randomised(transformers.ViTMAEForPreTraining(config))
    state = theirs.state_dict()
    encoder = create_model("vit_tiny", img_size=12, patch_size=3, num_classes=0, embed_dim=24, depth=3, num_heads=3)
    ours = MaskedAutoencoder(encoder, 0.7, norm_pix, decoder_dim=16, decoder_depth=2, decoder_heads=2)
    mapped = {
        "encoder.cls_token": state["vit.embeddings.cls_token"],
        "encoder.pos_embed": state["vit.embeddings.position_embeddings"],
        "decoder.mask_token": state["decoder.mask_token"],
        "decoder.pos_embed": state["decoder.decoder_pos_embed"],
    }
    for a, b in (
        ("encoder.patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
        ("encoder.norm", "vit.layernorm"),
        ("decoder.embed", "decoder.decoder_embed"),
        ("decoder.norm", "decoder.decoder_norm"),
        ("decoder.head", "decoder.decoder_pred"),
    ):
        mapped |= {f"{a}.{kind}": state[f"{b}.{kind}"] for kind in ("weight", "bias")}
    for i in range(3):
        mapped |= block_names(state, f"encoder.blocks.{i}", f"vit.layers.{i}")
    for i in range(2):
        mapped |= block_names(state, f"decoder.blocks.{i}", f"decoder.decoder_layers.{i}")
    ours.load_state_dict(mapped, strict=True)
    with_eps(ours, config.layer_norm_eps).eval()
    images, noise = torch.rand(5, 3, 12, 12), torch.rand(5, 16)
    expected = theirs(images, noise=noise)
    pred, mask = ours(images, noise)
    assert mask.sum(1).tolist() == [12] * 5 and torch.equal(mask, expected.mask.bool())
    assert expected.logits.std() > 0.1
    torch.testing.assert_close(pred, expected.logits, rtol=1e-4, atol=1e-5)
    loss = masked_error(pred, ours.targets(images), mask).mean()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.loss.backward()
    theirs_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for a, b in (
        ("encoder.patch_embed.proj.weight", "vit.embeddings.patch_embeddings.projection.weight"),
        ("encoder.blocks.1.mlp.fc1.weight", "vit.layers.1.mlp.fc1.weight"),
        ("decoder.mask_token", "decoder.mask_token"),
        ("decoder.head.bias", "decoder.decoder_pred.bias"),
    ):
        torch.testing.assert_close(dict(ours.named_parameters())[a].grad, theirs_grads[b], rtol=1e-3, atol=1e-6)


def test_mae_base_has_the_papers_size():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        ours = MaskedAutoencoder(create_model("vit_base_patch16_224", num_classes=0, pos_embed="sincos"))
        theirs = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig())
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e6, 1) == 111.9


def test_the_encoder_really_sees_fewer_tokens():
    from torch.utils.flop_counter import FlopCounterMode

    encoder = create_model("vit_tiny", img_size=32, patch_size=4, num_classes=0, depth=2)
    model = MaskedAutoencoder(encoder, 0.75, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    images, noise = torch.rand(1, 3, 32, 32), torch.rand(1, 64)
    lengths = []
    handle = encoder.blocks[1].register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape))
    with FlopCounterMode(display=False) as part:
        model.encode(images, random_masking(noise, model.visible).keep)
    with FlopCounterMode(display=False) as whole:
        encoder(images)
    handle.remove()
    assert lengths == [(1, 17, 192), (1, 65, 192)]
    assert part.get_total_flops() < 0.3 * whole.get_total_flops()


def test_what_is_hidden_does_not_show():
    encoder = create_model("vit_tiny", img_size=12, patch_size=3, num_classes=0, embed_dim=24, depth=2, num_heads=3)
    model = MaskedAutoencoder(randomised(encoder), 0.5, decoder_dim=16, decoder_depth=1, decoder_heads=2).eval()
    images, noise = torch.rand(2, 3, 12, 12), torch.rand(2, 16)
    pred, mask = model(images, noise)
    _, shown = model.reconstruct(images, noise)
    other = torch.where(shown, torch.rand_like(images), images)
    assert torch.equal(model(other, noise)[0], pred)
    painted, _ = model.reconstruct(images, noise)
    assert torch.equal(painted.masked_fill(shown, 0), images.masked_fill(shown, 0))
    assert shown.float().mean().item() == mask.float().mean().item() == 0.5


def test_targets_are_normalised_within_the_patch():
    images = torch.rand(2, 3, 8, 8)
    target = patch_targets(images, 4)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(-1, correction=1), torch.ones(2, 4), rtol=1e-3, atol=1e-3)
    assert patch_targets(torch.ones(1, 3, 8, 8), 4).abs().max() == 0


# ------------------------------------------------------------------------------------------------------------- BEiT


@pytest.mark.parametrize("positions", ["relative", "absolute"])
@pytest.mark.parametrize("pool", ["mean", "token"])
def test_beit_is_transformers(positions, pool):
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        vocab_size=13,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=12,
        patch_size=3,
        use_mask_token=True,
        use_relative_position_bias=positions == "relative",
        use_absolute_position_embeddings=positions == "absolute",
        use_mean_pooling=pool == "mean",
        drop_path_rate=0.0,
    )
    theirs = transformers.BeitForMaskedImageModeling(config)
    theirs = randomised(theirs)
    if pool == "token":  # theirs normalises twice then, as no pre-trained model does
        theirs.beit.layernorm = nn.Identity()
    state = theirs.state_dict()
    relative = positions == "relative"
    encoder = create_model(
        "beit_tiny" if relative else "vit_tiny",
        img_size=12,
        patch_size=3,
        num_classes=0,
        embed_dim=24,
        depth=3,
        num_heads=3,
        global_pool="avg" if pool == "mean" else "token",
        init_values=0.1,
    )
    ours = MaskedImageModel(encoder, vocab_size=13)
    norm = "encoder.fc_norm" if pool == "mean" else "encoder.norm"
    mapped = {
        "mask_token": state["beit.embeddings.mask_token"],
        "encoder.cls_token": state["beit.embeddings.cls_token"],
    }
    if not relative:
        mapped["encoder.pos_embed"] = state["beit.embeddings.position_embeddings"]
    for a, b in (
        ("encoder.patch_embed.proj", "beit.embeddings.patch_embeddings.projection"),
        (norm, "layernorm"),
        ("head", "lm_head"),
    ):
        mapped |= {f"{a}.{kind}": state[f"{b}.{kind}"] for kind in ("weight", "bias")}
    for i in range(3):
        layer, mine = f"beit.layers.{i}", f"encoder.blocks.{i}"
        mapped |= block_names(state, mine, layer)
        mapped |= {f"{mine}.ls{n}.gamma": state[f"{layer}.lambda_{n}"] for n in (1, 2)}
        if relative:
            table = state[next(k for k in state if k.startswith(layer) and k.endswith("bias_table"))]
            mapped[f"{mine}.attn.relative_position_bias_table"] = table[:-3]
            mapped[f"{mine}.attn.prefix_bias_table"] = table[-3:]
    ours.load_state_dict(mapped, strict=True)
    with_eps(ours, config.layer_norm_eps).eval()
    images = torch.rand(4, 3, 12, 12)
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    words = torch.randint(0, 13, (int(mask.sum()),))
    expected = theirs(images, bool_masked_pos=mask, labels=words)
    logits = ours(images, mask)
    assert expected.logits.std() > 0.1
    torch.testing.assert_close(logits, expected.logits[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nn.functional.cross_entropy(logits, words), expected.loss, rtol=1e-5, atol=1e-5)


def test_relative_positions_with_prefix_tokens():
    mixer = randomised(BeitAttention(16, 2, grid_size=(2, 3)))
    x = torch.randn(2, 8, 16)
    out = mixer(x, (2, 3, 2))
    mixer.recorder = weights = []
    torch.testing.assert_close(mixer(x, (2, 3, 2)), out)
    assert weights[0].shape == (2, 2, 8, 8)
    mixer.recorder = None
    assert mixer(torch.randn(1, 12, 16), (3, 4, 0)).shape == (1, 12, 16)  # no prefix, a larger map: interpolated
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[:, 3] = False
    changed = x.clone()
    changed[:, 3] = 7.0
    torch.testing.assert_close(mixer(x, (2, 3, 2), mask)[:, 4:], mixer(changed, (2, 3, 2), mask)[:, 4:])
    with pytest.raises(ValueError, match="grid is None"):
        mixer(x, None)


@pytest.mark.parametrize("size", [(12, 12), (9, 15)])
def test_beit_is_timms(size):
    beit = pytest.importorskip("timm.models.beit")
    sizes = {"img_size": size, "patch_size": 3, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
    theirs = randomised(beit.Beit(**sizes, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1))
    ours = load_weights(create_model("beit_tiny", **sizes), theirs).eval()
    images = torch.rand(4, 3, *size)
    expected = theirs(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-5)
    larger = {**sizes, "img_size": (size[0] + 6, size[1] + 3)}
    resized = load_weights(create_model("beit_tiny", **larger), ours).eval()
    table = ours.blocks[1].attn.relative_position_bias_table
    assert resized.blocks[1].attn.relative_position_bias_table.shape[0] > len(table)
    whole = torch.rand(2, 3, *larger["img_size"], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resized(whole), ours(whole), rtol=1e-4, atol=1e-5)  # ours interpolates as it goes


def test_beit_records_its_attention_and_survives_a_file(tmp_path):
    from vitcourse import save_weights

    model = randomised(create_model("beit_tiny", img_size=12, patch_size=3, num_classes=5, depth=2))
    with record_attention(model) as weights:
        out = model(torch.zeros(1, 3, 12, 12))
    assert [tuple(w.shape) for w in weights] == [(1, 3, 17, 17)] * 2
    save_weights(model, tmp_path / "beit.safetensors")
    torch.testing.assert_close(create_model(tmp_path / "beit.safetensors").eval()(torch.zeros(1, 3, 12, 12)), out)


def authors_mask(height, width, count, min_block, draw):
    """The paper's algorithm 1, in the loops and the order of draws of the code that its authors published."""
    mask, masked = np.zeros((height, width), dtype=int), 0
    while masked < count:
        largest, delta = count - masked, 0
        for _ in range(10):
            target_area = draw.uniform(min_block, largest)
            aspect_ratio = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = int(round(math.sqrt(target_area * aspect_ratio))), int(round(math.sqrt(target_area / aspect_ratio)))
            if w < width and h < height:
                top, left = draw.randint(0, height - h), draw.randint(0, width - w)
                if 0 < h * w - mask[top : top + h, left : left + w].sum() <= largest:
                    for i in range(top, top + h):
                        for j in range(left, left + w):
                            if mask[i, j] == 0:
                                mask[i, j] = 1
                                delta += 1
                if delta > 0:
                    break
        if delta == 0:
            break
        masked += delta
    return mask


@pytest.mark.parametrize(("size", "count", "min_block"), [((14, 14), 75, 16), ((7, 7), 19, 4), ((5, 9), 30, 3)])
def test_masks_are_those_of_the_authors_code(size, count, min_block):
    for seed in range(40):
        expected = authors_mask(*size, count, min_block, random.Random(seed))
        assert np.array_equal(block_mask(*size, count, min_block, random.Random(seed)), expected.astype(bool))


# ----------------------------------------------------------------------------------------------------------- LeJEPA


def test_lejepa_is_lightlys():
    lightly = pytest.importorskip("lightly.loss", reason="pip install --no-deps lightly")
    if not hasattr(lightly, "LeJEPALoss"):
        pytest.skip("this lightly has no LeJEPA")
    torch.manual_seed(0)
    large, small = (torch.randn(n, 9, 5, requires_grad=True) for n in (2, 3))
    criterion = lightly.LeJEPALoss(lambda_param=0.1, sigreg_num_vectors=32)
    torch.manual_seed(3)
    expected = criterion(local_proj=small, global_proj=large)
    theirs = torch.autograd.grad(expected, (large, small))
    torch.manual_seed(3)
    directions = random_directions(5, 32)
    x = torch.cat([large, small])
    loss = 0.1 * sigreg(x, directions) + 0.9 * disagreement(x, 2)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, (large, small)), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_sigreg_is_its_definition():
    """The integral of equation and window, done finely, in complex numbers."""
    torch.manual_seed(0)
    x, directions = torch.randn(40, 6, dtype=torch.float64), random_directions(6, 5).double()
    t = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    empirical = torch.exp(1j * (x @ directions)[..., None] * t).mean(0)
    gap = (empirical - torch.exp(-t.square() / 2)).abs().square() * torch.exp(-t.square() / 2)
    expected = 40 * torch.trapezoid(gap, t, dim=-1).mean()
    assert sigreg(x, directions).item() == pytest.approx(expected.item(), rel=0.01)
    collapsed = [sigreg(torch.zeros(n, 6), directions.float()).item() for n in (10, 20)]
    assert collapsed[1] == pytest.approx(2 * collapsed[0]) and collapsed[0] > 3


# ---------------------------------------------------------------------------------------------------------- MoCo v3


def test_moco_is_its_pseudocode():
    """Algorithm 1 of the paper, line by line."""
    from vitcourse.pretraining import info_nce

    torch.manual_seed(0)
    q1, q2, k1, k2 = (torch.randn(8, 5) for _ in range(4))

    def ctr(q, k, tau):
        q, k = nn.functional.normalize(q, dim=1), nn.functional.normalize(k, dim=1)
        labels = torch.arange(len(q))
        return 2 * tau * nn.CrossEntropyLoss()(torch.einsum("nc,mc->nm", q, k) / tau, labels)

    ours = info_nce(q1, k2, 0.2).mean() + info_nce(q2, k1, 0.2).mean()
    torch.testing.assert_close(ours, ctr(q1, k2, 0.2) + ctr(q2, k1, 0.2))
    parts = torch.cat([info_nce(q1[:3], k2, 0.2), info_nce(q1[3:], k2, 0.2, first=3)])
    torch.testing.assert_close(parts, info_nce(q1, k2, 0.2))


def test_moco_projector_and_predictor_are_the_authors():
    from vitcourse.pretraining import MoCo

    model = MoCo(create_model("vit_base_patch16_224", num_classes=0, depth=1))
    shapes = [tuple(p.shape) for p in model.projector.parameters()]
    assert shapes == [(4096, 768), (4096,), (4096,), (4096, 4096), (4096,), (4096,), (256, 4096)]
    assert [tuple(p.shape) for p in model.predictor.parameters()] == [(4096, 256), (4096,), (4096,), (256, 4096)]
    assert not any(p.requires_grad for p in model.encoder.patch_embed.parameters())
    assert model.encoder.blocks[0].attn.qkv.weight.requires_grad


# ------------------------------------------------------------------------------------------------------- benchmarks


@pytest.mark.parametrize("name", ["mae", "beit", "moco", "lejepa"])
def test_benchmarked_steps_do_the_same_work(name):
    """In place of times, which depend on the machine: the operations of a step, counted."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import pretraining

    pytest.importorskip("transformers" if name in ("mae", "beit") else "lightly.loss")
    counts = {}
    for kind, step in pretraining.PAIRS[name](2, 1, "cpu").items():
        with FlopCounterMode(display=False) as counter:
            step()
        counts[kind] = counter.get_total_flops()
    ours, (theirs,) = counts.pop("ours"), counts.values()
    assert 0.8 < ours / theirs <= 1.02
