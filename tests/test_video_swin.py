"""Video Swin against torchvision, its plain definition and the paper's table."""

import pytest
import torch
import torchvision
from einops import repeat
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video.swin_transformer import (
    ShiftedWindowAttention3d,
    SwinTransformer3d,
    _compute_attention_mask_3d,
)

from vitcourse import create_model, list_models, load_weights, save_weights
from vitcourse.hierarchical import SwinTransformer
from vitcourse.video import (
    VideoSwin,
    WindowAttention3d,
    relative_position_index_3d,
    resize_bias_table_3d,
    shift_mask_3d,
    window_partition_3d,
    window_reverse_3d,
)
from vitcourse.video.windows import cached_shift_bias_3d
from vitcourse.vit import record_attention

WINDOW = (2, 3, 4)
STAGES = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": WINDOW, "num_classes": 5}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, at a scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            p.data = (1 + 0.3 * noise).to(p)
        elif p.ndim > 1 and not name.endswith("table"):
            p.data = (noise / p[0].numel() ** 0.5).to(p)
        else:
            p.data = (0.5 * noise).to(p)
    return model.eval()


def theirs(**options) -> SwinTransformer3d:
    sizes = {"patch_size": [2, 4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 5}
    return randomise(SwinTransformer3d(**{**sizes, "window_size": list(WINDOW), **options}))


def clips(batch: int, *size: int, dtype=torch.float32) -> torch.Tensor:
    """Noise on a tint of its own for each clip: of plain noise a mean over the map sees little."""
    return torch.randn(batch, 3, *size, dtype=dtype) + 3 * torch.randn(batch, 3, 1, 1, 1, dtype=dtype)


def close(ours: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == other.shape
    error = (ours - other).abs().max() / other.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_varies(logits: torch.Tensor) -> None:
    assert (logits[0] - logits[1]).abs().max() > 1e-2 * logits.abs().max()


# --------------------------------------------------------------------------------------------------------- windows


def test_windows_are_the_slices_of_the_map():
    p, q, r = WINDOW
    x = torch.randn(2, 2 * p, 3 * q, 2 * r, 4)
    windows = window_partition_3d(x, WINDOW)
    cut = [
        x[b, i : i + p, j : j + q, k : k + r]
        for b in range(2) for i in (0, p) for j in (0, q, 2 * q) for k in (0, r)
    ]  # fmt: skip
    assert torch.equal(windows, torch.stack(cut).flatten(1, 3))
    assert torch.equal(window_reverse_3d(windows, WINDOW, tuple(x.shape[1:4])), x)


def test_relative_position_index_is_torchvisions_and_numbers_the_distances():
    mixer = ShiftedWindowAttention3d(16, list(WINDOW), [0, 0, 0], 2)
    assert torch.equal(relative_position_index_3d(WINDOW), mixer.relative_position_index)
    small, table = (2, 2, 3), torch.arange(3 * 5 * 7).view(3, 5, 7)
    index = relative_position_index_3d(small, WINDOW)
    places = [(t, y, x) for t in range(2) for y in range(2) for x in range(3)]
    for n, (t, y, x) in enumerate(places):
        for m, (s, v, u) in enumerate(places):
            assert index[n, m] == table[t - s + 1, y - v + 2, x - u + 3]
    assert torch.equal(
        relative_position_index_3d(small, WINDOW, by_place=False), mixer.relative_position_index[:12, :12]
    )


@pytest.mark.parametrize("shift", [(1, 1, 2), (0, 1, 2), (1, 0, 0)])
def test_shift_mask_is_torchvisions(shift):
    mask = _compute_attention_mask_3d(torch.zeros(1), (4, 6, 8), WINDOW, shift)
    assert torch.equal(shift_mask_3d((4, 6, 8), WINDOW, shift), mask != 0) and mask.any()
    like = torch.zeros(1)
    arguments = ((4, 6, 8), WINDOW, shift, False)
    bias = cached_shift_bias_3d(*arguments, like=like)
    assert torch.equal(bias, torch.where(mask != 0, -torch.inf, 0.0))
    assert cached_shift_bias_3d(*arguments, like=like) is bias and not bias.is_inference()


def plain_window_attention(mixer: WindowAttention3d, x: torch.Tensor) -> torch.Tensor:
    """Token by token: cut the clip at shift + k · window, and attend to whoever lies in the same piece."""
    *size, dim = x.shape
    heads, count = mixer.num_heads, x[..., 0].numel()
    q, k, v = (z.view(count, heads, dim // heads) for z in mixer.qkv(x.reshape(count, dim)).chunk(3, dim=-1))
    table = mixer.relative_position_bias_table.view(*(2 * n - 1 for n in mixer.window_size), heads)
    places = torch.cartesian_prod(*(torch.arange(n) for n in size))
    shift = torch.tensor([s if n > w else 0 for n, w, s in zip(size, mixer.window_size, mixer.shift_size, strict=True)])
    piece = (places - shift).div(torch.tensor(mixer.window_size), rounding_mode="floor")
    out = torch.empty(count, heads, dim // heads, dtype=x.dtype)
    for n in range(count):
        mates = (piece == piece[n]).all(1).nonzero().flatten()
        scores = (q[n] * k[mates]).sum(-1) / (dim // heads) ** 0.5
        offset = places[n] - places[mates] + torch.tensor(mixer.window_size) - 1
        out[n] = ((scores + table[tuple(offset.T)]).softmax(0)[:, :, None] * v[mates]).sum(0)
    return mixer.proj(out.flatten(1)).view(*size, dim)


@pytest.mark.parametrize(
    ("size", "shift"),
    [
        ((4, 6, 8), (0, 0, 0)),  # nothing to pad
        ((4, 6, 8), (1, 1, 2)),
        ((5, 4, 7), (1, 1, 2)),
        ((3, 7, 5), (0, 0, 0)),
        ((1, 5, 9), (1, 1, 2)),  # fits into one window along one axis
        ((5, 2, 3), (1, 1, 2)),
        ((2, 3, 4), (1, 1, 2)),
        ((1, 2, 2), (1, 1, 2)),
    ],
)
def test_masked_windows_are_the_plain_definition(size, shift):
    mixer = WindowAttention3d(12, 3, window_size=WINDOW, shift_size=shift, mask_padding=True).double()
    randomise(mixer)
    x = torch.randn(2, *size, 12, dtype=torch.double, requires_grad=True)
    ours = mixer(x.flatten(1, 3), (*size, 0)).unflatten(1, size)
    plain = torch.stack([plain_window_attention(mixer, clip) for clip in x])
    close(ours, plain, 1e-12)
    target = torch.randn_like(plain)
    ours_grad, plain_grad = (torch.autograd.grad((y * target).sum(), x)[0] for y in (ours, plain))
    close(ours_grad, plain_grad, 1e-12)


# ----------------------------------------------------------------------------------------------------- torchvision


@torch.no_grad()
def test_logits_are_torchvisions_at_any_size():
    peer = theirs()
    ours = load_weights(VideoSwin(**STAGES), peer).eval()
    for size in [
        (8, 24, 32),  # nothing to pad, neither frames nor patches nor windows
        (7, 21, 30),  # frames and patches to pad
        (9, 50, 39),  # windows to pad, an odd map to merge
        (2, 24, 32),  # one moment: windows shrink in time, where both count distances alike
        (8, 8, 32),  # they shrink in space, where torchvision counts them as the first of a whole window
        (1, 4, 4),
    ]:
        x = clips(2, *size)
        expected = peer(x)
        assert_varies(expected)
        close(ours(x), expected)
        assert ours.feature_maps(x)[-1].shape[2] == (size[0] + 1) // 2


def test_gradients_are_torchvisions():
    peer = theirs(stochastic_depth_prob=0.0).train()
    ours = load_weights(VideoSwin(**STAGES), peer)
    x, target = clips(2, 7, 26, 30), torch.randn(2, 5)
    for model in (ours, peer):
        (model(x) * target).sum().backward()
    found = {name: parameter.grad for name, parameter in peer.named_parameters()}
    expected = load_weights(VideoSwin(**STAGES), found)
    for (name, parameter), other in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert other.abs().max() > 0, name
        close(parameter.grad, other.data, 1e-4)


@torch.no_grad()
def test_torchvisions_swin3d_t_loads_strictly_and_says_the_same(monkeypatch):
    """By its name, as a download would come; every parameter and every table used, at a size that a test can bear."""
    peer = randomise(torchvision.models.video.swin3d_t())
    weights = torchvision.models.get_model_weights("swin3d_t")
    monkeypatch.setattr(weights, "get_state_dict", lambda self, *args, **options: peer.state_dict())
    ours = create_model("video_swin_tiny", weights="torchvision:swin3d_t").eval()
    assert sum(p.numel() for p in ours.parameters()) == 28_158_070
    x = clips(2, 5, 64, 60)
    expected = peer(x)
    assert_varies(expected)
    close(ours(x), expected)
    preprocess = ours.preprocess
    assert (preprocess.mean, preprocess.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (preprocess.img_size, preprocess.crop_pct, preprocess.interpolation) == (224, 0.875, "bilinear")


def test_macs_are_torchvisions():
    with torch.device("meta"):
        model, peer = create_model("video_swin_tiny").eval(), torchvision.models.video.swin3d_t().eval()
        counts = []
        for each in (model, peer):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                each(torch.empty(1, 3, 16, 224, 224))
            counts.append(counter.get_total_flops() / 2e9)
    assert abs(counts[0] - 43.88) < 0.05 and abs(counts[0] - counts[1]) < 0.005 * counts[1]


def test_the_authors_checkpoints_load():
    model = VideoSwin(**STAGES)
    renamed = {"head.fc.": "cls_head.fc_cls.", "layers.1.downsample": "layers.0.downsample"}
    state = {}
    for name, tensor in randomise(VideoSwin(**STAGES), seed=1).state_dict().items():
        for ours, authors in renamed.items():
            name = name.replace(ours, authors)
        state[name if name.startswith("cls_head") else f"backbone.{name}"] = tensor
    state["backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(24, 24, dtype=torch.long)
    load_weights(model, state)
    again = randomise(VideoSwin(**STAGES), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------ from images


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("how", ["mean", "centre"])
@torch.no_grad()
def test_a_still_clip_is_the_image_of_the_inflated_model(mask_padding, how, capsys):
    """Exactly, also where windows are displaced in time."""
    sizes = {**STAGES, "mask_padding": mask_padding}
    image = randomise(SwinTransformer(img_size=(48, 64), **{**sizes, "window_size": (3, 4)})).double()
    model = VideoSwin(**sizes).double()
    assert model.inflation == "mean"
    model.inflation = how
    load_weights(model, image).eval()
    assert f"the weights are an image model's: filters are inflated ({how})" in capsys.readouterr().err
    images = clips(2, 1, 48, 64, dtype=torch.double)[:, :, 0]
    expected = image(images)
    assert_varies(expected)
    for frames in (8, 2, 12, *([6] if mask_padding else [])):  # padding in time is seen by default, and no still clip
        close(model(repeat(images, "b c h w -> b c t h w", t=frames)), expected, 1e-12)
    moving = torch.stack([images, images.flip(0)], dim=2)
    assert (model(moving) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_torchvisions_image_model_becomes_one_of_clips():
    peer = randomise(
        torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [3, 3], num_classes=5)
    ).double()  # fmt: skip
    model = load_weights(VideoSwin(**{**STAGES, "window_size": (2, 3, 3)}).double(), peer).eval()
    images = clips(2, 1, 24, 24, dtype=torch.double)[:, :, 0]
    close(model(repeat(images, "b c h w -> b c t h w", t=4)), peer(images), 1e-12)


def test_bias_tables_for_other_windows():
    window = (2, 3, 3)
    table = torch.randn(3 * 5 * 5, 2)
    assert resize_bias_table_3d(table, window, window) is table
    smaller = resize_bias_table_3d(table, (1, 2, 2), window)
    assert torch.equal(smaller, table.view(3, 5, 5, 2)[1:2, 1:4, 1:4].reshape(-1, 2))
    longer = resize_bias_table_3d(table, (3, 3, 3)).view(5, 5, 5, 2)
    assert torch.equal(longer[[0, 2, 4]], table.view(3, 5, 5, 2)[[0, 1, 2]])
    model = VideoSwin(**{**STAGES, "window_size": (4, 5, 5)})
    load_weights(model, VideoSwin(**STAGES))  # another model says what its windows were
    assert model.layers[0].blocks[0].attn.relative_position_bias_table.shape == (7 * 9 * 9, 2)
    with pytest.raises(ValueError, match="relative_position_bias_table is"):
        load_weights(model, VideoSwin(**STAGES).state_dict())  # a state dict does not


# --------------------------------------------------------------------------------------------------- the house


def test_what_the_house_asks_of_a_model(tmp_path):
    options = {name: STAGES[name] for name in ("embed_dim", "depths", "num_heads", "window_size")}
    model = randomise(create_model("video_swin_tiny", num_classes=5, in_chans=1, num_frames=8, img_size=24, **options))
    model.classes = list("abcde")
    x = torch.randn(2, 1, 8, 24, 24)
    save_weights(model, tmp_path / "model.safetensors")
    again = create_model(tmp_path / "model.safetensors").eval()
    assert torch.equal(again(x), model(x)) and again.classes == model.classes
    assert (again.num_frames, again.preprocess.img_size, again.preprocess.mean) == (8, 24, (0.5,))
    maps = model.feature_maps(x)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 6, 6), (2, 32, 4, 3, 3)]
    assert model.feature_info == [{"num_chs": 16, "reduction": 4}, {"num_chs": 32, "reduction": 8}]
    torch.testing.assert_close(maps[1].movedim(1, -1), model.forward_features(x))
    assert torch.equal(model.feature_maps(x, indices=(0,))[0], maps[0])
    assert all(name.endswith("relative_position_bias_table") for name in model.no_weight_decay())
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert {"video_swin_tiny", "video_swin_small", "video_swin_base"} == set(list_models("video_swin*"))
    other = create_model("video_swin_tiny", num_classes=5, **options)
    load_weights(other, again)  # grey filters become three
    assert other.patch_embed.proj.weight.shape[1] == 3


@torch.no_grad()
def test_attention_is_recorded_and_every_backend_says_the_same():
    model = randomise(VideoSwin(**STAGES))
    x = clips(2, 8, 24, 36)
    with record_attention(model) as weights:
        recorded = model(x)
    # 4 × 6 × 9 patches in windows of 2 × 3 × 4: 2 · 2 · 3 of them; then 4 × 3 × 5 in 2 · 1 · 2.
    assert [tuple(w.shape) for w in weights] == [(2 * 12, 2, 24, 24)] * 2 + [(2 * 4, 4, 24, 24)] * 2
    assert all(torch.allclose(w.sum(-1), torch.ones(())) for w in weights) and (weights[1] == 0).any()
    for backend in ("auto", "math", "sdpa"):
        for stage in model.layers:
            for block in stage.blocks:
                block.attn.backend = backend
        close(model(x), recorded)


def test_checkpointing_changes_no_gradient():
    model, x, found = randomise(VideoSwin(**STAGES)).train(), clips(2, 4, 24, 32), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VideoSwin(**STAGES)(torch.zeros(2, 3, 24, 24)), ValueError, r"clips must be \(B, 3, T, H, W\)"),
        (
            lambda: VideoSwin(**STAGES)(torch.zeros(2, 3, 4, 8, 8, dtype=torch.long)),
            TypeError,
            "must be floating point",
        ),
        (lambda: VideoSwin(**{**STAGES, "num_heads": (3, 4)}), ValueError, "stage 0 is 16 wide"),
        (lambda: VideoSwin(**{**STAGES, "window_size": (7, 7)}), ValueError, "three of them"),
        (lambda: WindowAttention3d(16, 2, window_size=2, shift_size=2), ValueError, "less than window_size 2"),
        (lambda: WindowAttention3d(16, 3), ValueError, "dim 16 is not divisible by num_heads 3"),
        (lambda: WindowAttention3d(16, 2)(torch.zeros(1, 9, 16), (2, 2, 2, 1)), ValueError, "1 prefix tokens"),
        (lambda: WindowAttention3d(16, 2)(torch.zeros(1, 8, 16), None), ValueError, "grid is None"),
        (lambda: window_partition_3d(torch.zeros(1, 3, 4, 4, 2), 2), ValueError, "3×4×4 does not divide into windows"),
        (lambda: window_reverse_3d(torch.zeros(3, 8, 2), 2, (4, 4, 4)), ValueError, r"are not \(B · 8, 8, C\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
