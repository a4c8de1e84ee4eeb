"""TimeSformer and ViViT against transformers, PyTorch's layers, their definitions and the papers' tables."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitcourse import create_model, list_models, load_weights, save_weights
from vitcourse.layers import ATTENTION_BACKENDS
from vitcourse.video import FactorisedEncoder, TimeSformer, attention_maps, inflate_weight
from vitcourse.video.positions import linear_matrix, resize_time_embed
from vitcourse.vit import VisionTransformer, record_attention

SIZES = {"embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
SMALL = {"img_size": 24, "patch_size": 8, "num_frames": 4, **SIZES}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter as no default has it: zeros hide mistakes, above all temporal_fc's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def clips(batch: int = 2, frames: int = 4, height: int = 24, width: int = 24, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames + height)
    return torch.randn(batch, 3, frames, height, width, generator=generator, dtype=dtype)


def still(images: torch.Tensor, frames: int) -> torch.Tensor:
    return repeat(images, "b c h w -> b c t h w", t=frames)


def assert_varies(logits: torch.Tensor) -> None:
    """Over the clips of a batch, and over the classes."""
    assert (logits[0] - logits[1]).abs().max() > 0.05 * logits.abs().max()
    assert logits.std() > 0.1


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


# ------------------------------------------------------------------------------------------------------ transformers


def peer(attention_type: str, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.TimesformerConfig(
        **{"image_size": 24, "patch_size": 8, "num_frames": 4, "hidden_size": 32, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "intermediate_size": 128, "num_labels": 7, "layer_norm_eps": 1e-3}
        | {"attention_type": attention_type, **options}
    )
    return randomise(transformers.TimesformerForVideoClassification(config))


@pytest.mark.parametrize("kind", ["divided", "joint"])
@pytest.mark.parametrize("source", ["model", "folder", "state"])
@torch.no_grad()
def test_divided_and_joint_attention_are_transformers(kind, source, tmp_path):
    theirs = peer(f"{kind}_space_time")
    assert all(p.abs().max() > 0 for p in theirs.parameters())
    theirs.save_pretrained(tmp_path)
    ours = TimeSformer(attention_type=kind, norm_eps=1e-3 if source == "state" else 1e-6, **SMALL)
    load_weights(ours, {"model": theirs, "folder": f"hf:{tmp_path}", "state": theirs.state_dict()}[source]).eval()
    x = clips()
    expected = theirs(x.transpose(1, 2)).logits
    assert_varies(expected)
    close(ours(x), expected)
    tokens = theirs.timesformer(x.transpose(1, 2)).last_hidden_state  # theirs run by place, ours by time
    close(ours.forward_features(x)[:, 1:], rearrange(tokens[:, 1:], "b (n t) d -> b (t n) d", t=4))


def test_a_folder_tells_how_frames_are_prepared_and_what_does_not_fit(tmp_path):
    """As facebook/timesformer-base-finetuned-k400 has it."""
    theirs = peer("divided_space_time")
    theirs.save_pretrained(tmp_path)
    told = {"image_mean": [0.45] * 3, "image_std": [0.225] * 3, "resample": 2, "do_center_crop": True}
    told |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told), encoding="utf-8")
    model = create_model("timesformer_tiny", **SMALL, weights=f"hf:{tmp_path}")
    found = model.preprocess
    assert (found.img_size, found.mean, found.std) == (24, (0.45,) * 3, (0.225,) * 3)
    assert (found.interpolation, found.crop_pct) == ("bilinear", 0.75) and model.norm_eps == 1e-3
    for changes, message in (
        ({"patch_size": 4}, r"which are for TimeSformer, do not fit(.|\n)*patch_embed\.proj\.weight"),
        ({"embed_dim": 64}, r"attn\.proj\.bias is \(32,\), the model's \(64,\)"),
        ({"num_heads": 2}, r"num_heads: 4 there, 2 in the model"),
        ({"attention_type": "joint"}, "attention_type of the weights"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights(TimeSformer(**{**SMALL, **changes}), f"hf:{tmp_path}")


@pytest.mark.parametrize("kind", ["divided", "joint"])
def test_gradients_are_transformers(kind):
    theirs = peer(f"{kind}_space_time")
    ours = load_weights(TimeSformer(attention_type=kind, **SMALL), theirs)
    x, target = clips(), torch.randn(2, 7)
    (ours(x) * target).sum().backward()
    (theirs(x.transpose(1, 2)).logits * target).sum().backward()
    of_theirs = load_weights(TimeSformer(attention_type=kind, **SMALL), gradients(theirs))
    expected = dict(of_theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if not name.endswith("qkv.bias"):  # a bias of the keys changes nothing: its gradient is rounding alone
            assert parameter.grad.abs().max() > 0, name
            close(parameter.grad, expected[name].data, 1e-4)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@torch.no_grad()
def test_space_only_averages_cls_over_the_frames_before_the_norm():
    """The authors' code: ``x = rearrange(x, '(b t) n m -> b t n m'); x = torch.mean(x, 1); x = norm(x); x[:, 0]``.

    transformers 5 leaves the mean out and answers with a row for each frame, so its rows are no peer; what its blocks
    leave of each frame is.
    """
    theirs = peer("space_only")
    ours = load_weights(TimeSformer(attention_type="space_only", **SMALL), theirs).eval()
    x = clips()
    body = theirs.timesformer
    tokens = body.encoder(body.embeddings(x.transpose(1, 2))).last_hidden_state  # (B · T, 1 + N, D)
    mean = rearrange(tokens, "(b t) n d -> b t n d", t=4).mean(1)
    expected = theirs.classifier(body.layernorm(mean)[:, 0])
    assert_varies(expected)
    close(ours(x), expected)
    close(ours(x[:, :, [2, 0, 3, 1]]), expected)  # nothing tells the order of the frames


@torch.no_grad()
def test_a_grid_that_is_not_square_is_the_definition_of_the_paper():
    """Sec. 3, eq. 5 to 11, token by token; transformers takes square frames alone."""
    model = randomise(TimeSformer(**{**SMALL, "img_size": (16, 32), "depth": 1, "num_frames": 3})).double()
    x = clips(2, 3, 16, 32, torch.double)
    block, (cls, patches, (t, h, w, _)) = model.blocks[0], model.embed(x)
    patches = patches + model.time_embed[:, :, None]
    assert (t, h, w) == (3, 2, 4)

    def attend(mixer: nn.Module, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        heads = [mixer.qkv(z).unflatten(-1, (3, 4, 8)) for z in (query, keys)]
        q, k, v = heads[0][:, :, 0], heads[1][:, :, 1], heads[1][:, :, 2]
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5).softmax(-1)
        return mixer.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))

    in_time = torch.empty_like(patches)
    for place in range(h * w):
        column = block.temporal_norm1(patches[:, :, place])
        in_time[:, :, place] = patches[:, :, place] + block.temporal_fc(attend(block.temporal_attn, column, column))
    found, in_space = [], torch.empty_like(patches)
    for frame in range(t):
        tokens = torch.cat([cls, in_time[:, frame]], dim=1)
        mixed = attend(block.attn, block.norm1(tokens), block.norm1(tokens))
        found.append(mixed[:, :1])
        in_space[:, frame] = in_time[:, frame] + mixed[:, 1:]
    out = torch.cat([cls + torch.stack(found).mean(0), in_space.flatten(1, 2)], dim=1)
    out = out + block.mlp(block.norm2(out))
    close(model.forward_features(x), model.norm(out), 1e-12)


# -------------------------------------------------------------------------------------------------- from images


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("frames", [1, 3, 4])
@torch.no_grad()
def test_divided_attention_starts_exactly_as_the_image_model(pool, frames, capsys):
    image = randomise(VisionTransformer(24, 8, global_pool=pool, **SIZES)).double()
    model = TimeSformer(global_pool=pool, **SMALL).double()
    load_weights(model, image).eval()
    assert "the weights are an image model's: attention along time starts at zero" in capsys.readouterr().err
    images = torch.randn(2, 3, 24, 24, dtype=torch.double)
    assert_varies(image(images))
    close(model(still(images, frames)), image(images), 1e-12)
    for block in model.blocks:  # as the authors start them
        assert torch.equal(block.temporal_attn.qkv.weight, block.attn.qkv.weight)
        assert torch.equal(block.temporal_norm1.bias, block.norm1.bias)
        assert not block.temporal_fc.weight.any() and not block.temporal_fc.bias.any()
    randomise(model)
    assert (model(still(images, 4)) - image(images)).abs().max() > 1e-2


@torch.no_grad()
def test_a_new_model_ignores_the_order_of_frames_and_a_trained_one_does_not():
    x, order = clips(2, 4), [3, 1, 0, 2]
    for kind in ("divided", "joint"):
        model = TimeSformer(attention_type=kind, **SMALL).eval()
        close(model(x[:, :, order]), model(x))
        model = randomise(model)
        assert (model(x[:, :, order]) - model(x)).abs().max() > 1e-2


@pytest.mark.parametrize("how", ["centre", "mean"])
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_inflated_filters_say_of_a_still_clip_what_the_images_say(how, frames):
    weight, images = torch.randn(5, 3, 4, 6, dtype=torch.double), torch.randn(2, 3, 8, 12, dtype=torch.double)
    inflated = inflate_weight(weight, frames, how)
    assert inflated.shape == (5, 3, frames, 4, 6)
    of_clip = F.conv3d(still(images, 2 * frames), inflated, stride=(frames, 4, 6))
    close(of_clip, still(F.conv2d(images, weight, stride=(4, 6)), 2), 1e-13)
    used = inflated.abs().amax((0, 1, 3, 4)) > 0
    assert used.tolist() == ([True] * frames if how == "mean" else [i == frames // 2 for i in range(frames)])


@torch.no_grad()
def test_every_model_takes_the_weights_of_images(capsys):
    """timm's and torchvision's names, other sizes, tubelets; on a still clip what is first computed is the image's."""
    image = randomise(timm.create_model("vit_tiny_patch16_224", img_size=24, patch_size=8, **SIZES)).double()
    images = torch.randn(2, 3, 24, 24, dtype=torch.double)
    for kind in ("divided", "space_only"):
        model = TimeSformer(attention_type=kind, tubelet_size=2, **SMALL).double()
        for how in ("centre", "mean"):
            model.inflation = how
            close(load_weights(model, image).eval()(still(images, 4)), image(images), 1e-12)
            assert (model.patch_embed.proj.weight[:, :, 0] != 0).any() == (how == "mean")
    model = FactorisedEncoder(tubelet_size=2, **SMALL).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("time_")}
    load_weights(model, image, new_head=True).eval()
    close(
        model.forward_moments(still(images, 6)), repeat(image.forward_features(images), "b n d -> b t n d", t=3), 1e-12
    )
    assert before and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert "encoder along time starts untrained" in capsys.readouterr().err
    larger = load_weights(TimeSformer(**{**SMALL, "img_size": 40}), image.float())
    assert larger.pos_embed.shape == (1, 26, 32)


def test_the_authors_files_load(tmp_path, capsys):
    """Filters of images, names that begin with ``model.``, beside what their training keeps."""
    state = randomise(TimeSformer(**SMALL)).state_dict()
    theirs = {f"model.{name}": tensor for name, tensor in state.items()}
    theirs["model.patch_embed.proj.weight"] = theirs["model.patch_embed.proj.weight"][:, :, 0]
    torch.save({"epoch": 3, "model_state": theirs, "cfg": "TIMESFORMER"}, tmp_path / "TimeSformer_divST.pyth")
    model = load_weights(TimeSformer(**SMALL), tmp_path / "TimeSformer_divST.pyth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert "image model" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(("old", "new"), [(8, 8), (8, 3), (3, 8), (1, 4), (4, 1), (5, 7)])
def test_positions_in_time_are_interpolated_linearly(old, new):
    pos = torch.randn(1, 2 + old, 6)
    resized = resize_time_embed(pos, new, num_prefix_tokens=2)
    torch.testing.assert_close(resized[:, 2:].mT, F.interpolate(pos[:, 2:].mT, new, mode="linear"))
    assert torch.equal(resized[:, :2], pos[:, :2])
    torch.testing.assert_close(linear_matrix(old, new).sum(1), torch.ones(new))


@pytest.mark.parametrize("kind", ["divided", "joint"])
@torch.no_grad()
def test_more_and_fewer_frames_are_transformers_with_interpolated_positions(kind):
    """Its own way would mix frames and patches: it is built for each number, and gets PyTorch's interpolation."""
    base = peer(f"{kind}_space_time")
    ours = load_weights(TimeSformer(attention_type=kind, **SMALL), base).eval()
    for frames in (3, 6):
        theirs, state = peer(f"{kind}_space_time", num_frames=frames), base.state_dict()
        name = "timesformer.embeddings.time_embeddings"
        state[name] = F.interpolate(state[name].mT, frames, mode="linear").mT
        theirs.load_state_dict(state)
        x = clips(2, frames)
        expected = theirs(x.transpose(1, 2)).logits
        assert_varies(expected)
        close(ours(x), expected)


@pytest.mark.parametrize("build", [TimeSformer, FactorisedEncoder])
@torch.no_grad()
def test_another_number_of_frames_is_a_model_built_for_it(build):
    """Loaded into a model for these frames and this size, the positions are the same as those found on the way."""
    model = randomise(build(tubelet_size=2, **SMALL))
    for frames, size in ((4, (24, 24)), (8, (24, 24)), (2, (16, 32)), (6, (40, 24))):
        fitting = build(tubelet_size=2, **{**SMALL, "num_frames": frames, "img_size": size})
        load_weights(fitting, model).eval()
        x = clips(2, frames, *size)
        assert_varies(model(x))
        close(model(x), fitting(x))


@torch.no_grad()
def test_twice_the_frames_of_a_slow_clip_say_about_the_same():
    """Frames and patches that are mixed up, as transformers does for other numbers of frames, would not."""
    model = randomise(TimeSformer(**SMALL))
    slow = clips(2, 4)
    doubled = slow.repeat_interleave(2, dim=2)
    near = (model(doubled) - model(slow)).abs().max()
    far = (
        (model(doubled[:, :, torch.randperm(8, generator=torch.Generator().manual_seed(1))]) - model(slow)).abs().max()
    )
    assert near < far


# ----------------------------------------------------------------------------------------------------------- ViViT


@torch.no_grad()
def test_the_factorised_encoder_is_a_vit_and_then_pytorchs_encoder():
    model = randomise(FactorisedEncoder(tubelet_size=2, time_depth=2, **SMALL)).double()
    x = clips(2, 4, dtype=torch.double)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=24, patch_size=8, **{**SIZES, "num_classes": 0}).double()
    shared = {k: v for k, v in model.state_dict().items() if k in vit.state_dict() and "patch_embed" not in k}
    vit.load_state_dict(shared, strict=False)
    pictures = rearrange(x, "b c (t s) h w -> (b t) (s c) h w", s=2)  # two frames as six channels
    vit.patch_embed.proj = nn.Conv2d(6, 32, 8, 8).double()
    kernel = rearrange(model.patch_embed.proj.weight, "d c s p q -> d (s c) p q")
    vit.patch_embed.proj.load_state_dict({"weight": kernel, "bias": model.patch_embed.proj.bias})
    moments = vit.eval()(pictures).unflatten(0, (2, 2))
    time = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(
            32, 4, 128, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True, dtype=torch.double
        ),
        num_layers=2,
        enable_nested_tensor=False,
    ).eval()
    for block, layer in zip(model.time_blocks, time.layers, strict=True):
        layer.self_attn.out_proj.load_state_dict(block.attn.proj.state_dict())
        parts = (block.norm1, block.norm2, block.mlp.fc1, block.mlp.fc2)
        for ours, theirs in zip(parts, (layer.norm1, layer.norm2, layer.linear1, layer.linear2), strict=True):
            theirs.load_state_dict(ours.state_dict())
        layer.self_attn.in_proj_weight.copy_(block.attn.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(block.attn.qkv.bias)
    tokens = torch.cat([model.time_cls_token.expand(2, -1, -1), moments], dim=1) + model.time_embed
    expected = model.head(model.time_norm(time(tokens))[:, 0])
    assert_varies(expected)
    close(model(x), expected, 1e-12)
    pooled = FactorisedEncoder(tubelet_size=2, time_depth=2, global_pool="avg", **SMALL).double()
    pooled.load_state_dict(model.state_dict())
    means = model.forward_moments(x)[:, :, 1:].mean(2)
    tokens = torch.cat([model.time_cls_token.expand(2, -1, -1), means], dim=1) + model.time_embed
    close(pooled.eval()(x), model.head(model.time_norm(time(tokens))[:, 1:].mean(1)), 1e-12)


# ----------------------------------------------------------------------------------------------- sizes and the house


@pytest.mark.parametrize(
    ("name", "options", "parameters", "macs"),
    [
        ("timesformer_base_patch16_224", {}, 121.6, 196),  # Bertasius et al. 2021, tables 1 and 2: 121.4 M, 590 / 3
        ("timesformer_base_patch16_224", {"attention_type": "joint"}, 86.1, 180),
        ("vivit_base_patch16x2_224", {}, 115.1, 284.4),  # Arnab et al. 2021, table 2
    ],
)
def test_parameters_and_macs_are_the_papers(name, options, parameters, macs):
    with torch.device("meta"):
        model = create_model(name, num_classes=400, **options).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, 3, model.num_frames, 224, 224))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == parameters
    assert abs(counter.get_total_flops() / 2e9 - macs) < 0.005 * macs


@pytest.mark.parametrize("name", ["timesformer_tiny", "vivit_tiny"])
def test_what_the_house_asks_of_a_model(name, tmp_path):
    options = {"img_size": 24, "patch_size": 8, "num_frames": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = randomise(create_model(name, num_classes=5, in_chans=1, **options))
    model.classes = list("abcde")
    x = torch.randn(2, 1, 4, 24, 24)
    save_weights(model, tmp_path / "model.safetensors")
    again = create_model(tmp_path / "model.safetensors").eval()
    assert torch.equal(again(x), model(x)) and again.classes == model.classes
    assert (again.num_prefix_tokens, again.num_frames, again.preprocess.img_size) == (1, 4, 24)
    assert again.preprocess.mean == (0.5,)
    assert model.no_weight_decay() >= {"pos_embed", "cls_token", "time_embed"}
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x))) and model(x).shape == (2, 32)
    maps = model.feature_maps(x, indices=(0, -1))
    assert [m.shape[:2] for m in maps] == [(2, 32)] * 2 and model.feature_info == [{"num_chs": 32, "reduction": 8}]
    assert maps[1].shape[2:] == (4 // model.tubelet_size, 3, 3)
    with pytest.raises(ValueError, match=r"indices \(2,\) name blocks that do not exist; the model has 2"):
        model.feature_maps(x, indices=(2,))
    assert {f"{kind}_{size}" for kind in ("timesformer", "vivit") for size in ("tiny", "base")} <= set(list_models())


@pytest.mark.parametrize("name", ["timesformer_tiny", "vivit_tiny", "video_swin_tiny"])
def test_a_file_for_other_classes_begins_with_a_new_head(name, tmp_path, capsys):
    sizes = {"img_size": 32, "num_frames": 4, "embed_dim": 24}
    swin = {"depths": (1, 1), "num_heads": (2, 2), "window_size": (2, 2, 2)}
    plain = {"patch_size": 16, "depth": 1, "num_heads": 2}
    model = create_model(name, num_classes=4, **sizes, **(swin if "swin" in name else plain))
    save_weights(model, tmp_path / "model.safetensors")
    capsys.readouterr()
    other = create_model(tmp_path / "model.safetensors", num_classes=3)
    assert "weights are for 4 classes, not 3: the head starts untrained" in capsys.readouterr().err
    body = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("head.")}
    assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in body.items())
    assert other(torch.randn(1, 3, 4, 32, 32)).shape == (1, 3)


@torch.no_grad()
def test_feature_maps_are_the_tokens_where_they_lie():
    x = clips(2, 4, 16, 32)
    for kind in ("divided", "joint", "space_only"):
        model = randomise(TimeSformer(attention_type=kind, **SMALL))
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 1 + 4 * 2 * 4, 32)
        close(model.feature_maps(x)[0], rearrange(tokens[:, 1:], "b (t h w) d -> b d t h w", t=4, h=2))
    model = randomise(FactorisedEncoder(tubelet_size=2, **SMALL))
    moments = model.forward_moments(x)
    close(model.feature_maps(x)[0], rearrange(moments[:, :, 1:], "b t (h w) d -> b d t h w", h=2))


@torch.no_grad()
def test_attention_is_recorded_and_goes_through_the_one_door(monkeypatch):
    x = clips(2, 4)
    shapes = {
        "divided": [(2 * 9, 4, 4, 4), (2 * 4, 4, 10, 10)] * 3,  # each place over time, then each frame
        "joint": [(2, 4, 37, 37)] * 3,
        "space_only": [(2 * 4, 4, 10, 10)] * 3,
    }
    for kind, expected in shapes.items():
        model = randomise(TimeSformer(attention_type=kind, **SMALL))
        with record_attention(model) as weights:
            recorded = model(x)
        assert [tuple(w.shape) for w in weights] == expected
        assert all(torch.allclose(w.sum(-1), torch.ones(())) for w in weights)
        assert weights[0].std() > 1e-3
        close(model(x), recorded)
    model = randomise(FactorisedEncoder(tubelet_size=2, time_depth=1, **SMALL))
    with record_attention(model) as weights:
        model(x)
    assert [tuple(w.shape) for w in weights] == [(4, 4, 10, 10)] * 3 + [(2, 4, 3, 3)]
    calls = []
    monkeypatch.setitem(
        ATTENTION_BACKENDS, "own", lambda q, k, v, **options: calls.append(q.shape) or torch.zeros_like(v)
    )
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "own"
    model(x)
    assert len(calls) == 4


@torch.no_grad()
def test_attention_maps_lie_where_the_patches_do():
    x = clips(2, 4, 16, 32)
    for kind in ("divided", "joint", "space_only"):
        model = randomise(TimeSformer(attention_type=kind, **SMALL)).train()
        maps = attention_maps(model, x)
        assert len(maps) == 3 and model.training
        assert all(m.cls.shape == (2, 4, 4, 2, 4) and (m.time is None) == (kind != "divided") for m in maps)
        with record_attention(model.eval()) as weights:
            model(x)
        space = weights[3] if kind == "divided" else weights[1]
        row = space[1, 0, 0, 1:] if kind == "joint" else space[7, 0, 0, 1:]  # clip 1, at moment 3
        assert torch.equal(maps[1].cls[1, 0, 3], row.unflatten(0, (-1, 2, 4))[-1])
        if kind == "divided":
            assert maps[1].time.shape == (2, 4, 2, 4, 4, 4)
            assert torch.equal(maps[1].time[1, 2, 1, 3], weights[2][15, 2])  # of clip 1 the last place
    with pytest.raises(ValueError, match="model is a FactorisedEncoder"):
        attention_maps(FactorisedEncoder(**SMALL), x)


@torch.no_grad()
def test_another_token_mixer_gets_the_grid_of_a_frame():
    grids = []

    class Mean(nn.Module):
        def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor, grid: tuple[int, ...] | None) -> torch.Tensor:
            grids.append(grid)
            return x.mean(1, keepdim=True).expand_as(x)

    for kind, grid in (("divided", (2, 4, 1)), ("space_only", (2, 4, 1)), ("joint", None)):
        TimeSformer(attention_type=kind, attn_layer=Mean, **SMALL)(clips(1, 4, 16, 32))
        assert grids == [grid] * 3
        grids.clear()


@torch.no_grad()
def test_half_precision_and_autocast():
    for build in (TimeSformer, FactorisedEncoder):
        model = randomise(build(tubelet_size=2, **SMALL))
        x = clips(2, 6, 16, 24)  # positions are interpolated
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close(model(x).float(), expected, 0.05)
        half = model.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        close(half.float(), expected, 0.1)


@pytest.mark.parametrize("kind", ["divided", "joint", "space_only", "vivit"])
def test_checkpointing_changes_no_gradient(kind):
    model = FactorisedEncoder(**SMALL) if kind == "vivit" else TimeSformer(attention_type=kind, **SMALL)
    randomise(model).train()
    x, found = clips(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_skipped_branch_is_skipped_for_a_whole_clip():
    model = randomise(TimeSformer(drop_path_rate=0.5, **{**SMALL, "depth": 2})).train()
    block, grid = model.blocks[1], (4, 3, 3, 1)
    x = torch.randn(64, 37, 32)
    found = block(x, grid)
    kept = (found - x).abs().amax(2) > 1e-6
    assert 0 < (~kept.any(1)).sum() < 40  # about an eighth skip all three
    assert torch.equal(kept.any(1), kept[:, 1:].all(1))


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 3, 24, 24), ValueError, r"must be \(B, 3, T, H, W\), got .*\(2, 3, 24, 24\).*x\[:, :, None\]"),
        (torch.zeros(2, 4, 3, 24, 24), ValueError, r"frames come after the channels: x\.transpose\(1, 2\)"),
        (torch.zeros(2, 1, 4, 24, 24), ValueError, r"clips must be \(B, 3, T, H, W\), got shape \(2, 1, 4, 24, 24\)$"),
        (torch.zeros(2, 3, 4, 24, 24, dtype=torch.uint8), TypeError, r"clips must be floating point, got torch\.uint8"),
        (torch.zeros(2, 3, 5, 24, 24), ValueError, r"num_frames 5 is not divisible by tubelet_size 2; use 4 or 6"),
        (torch.zeros(2, 3, 1, 24, 24), ValueError, r"num_frames 1 is not divisible by tubelet_size 2; use 2"),
        (torch.zeros(2, 3, 4, 24, 25), ValueError, r"img_size 25 is not divisible by patch_size 8; use 24 or 32"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("build", [TimeSformer, FactorisedEncoder])
def test_clips_that_do_not_fit_are_refused(build, x, error, message):
    with pytest.raises(error, match=message):
        build(tubelet_size=2, **SMALL)(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 5, "tubelet_size": 2}, "num_frames 5 is not divisible by tubelet_size 2; use 4 or 6"),
        ({"num_frames": 0}, "num_frames 0 and tubelet_size 1 must be at least 1"),
        ({"img_size": 25}, "img_size 25 is not divisible by patch_size 8; use 24 or 32"),
        (
            {"attention_type": "divided_space_time"},
            "'divided_space_time' is unknown; use one of divided, joint",
        ),
        ({"global_pool": "max"}, "global_pool 'max' is unknown; use 'token' or 'avg'"),
    ],
)
def test_models_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TimeSformer(**{**SMALL, **options})


def test_weights_of_another_attention_are_refused():
    divided, joint = (TimeSformer(attention_type=kind, **SMALL) for kind in ("divided", "joint"))
    with pytest.raises(ValueError, match=r"not in the model: blocks(.|\n)*attention_type of the weights"):
        load_weights(joint, divided)
    with pytest.raises(ValueError, match=r"missing: blocks(.|\n)*attention_type of the weights"):
        load_weights(divided, joint)
    with pytest.raises(ValueError, match=r"num_heads: 4 there, 2 in the model"):
        load_weights(TimeSformer(**{**SMALL, "num_heads": 2}), peer("divided_space_time"))
    with pytest.raises(ValueError, match="attention_type 'divided' needs to know where the tokens lie"):
        divided.forward_tokens(torch.zeros(1, 5, 32), None)
    assert joint.forward_tokens(torch.zeros(1, 5, 32), None).shape == (1, 5, 32)
