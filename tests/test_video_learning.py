"""Tube masking and the masked autoencoder of clips, the meter of single-frame bias, and compiled models."""

import pytest
import torch
from torch import nn

from vitcourse.pretraining.mae import masked_error, random_masking, take
from vitcourse.video import (
    FactorisedEncoder,
    TimeSformer,
    VideoMaskedAutoencoder,
    VideoSwin,
    clip_to_tubelets,
    freeze_frames,
    reverse_frames,
    shuffle_frames,
    single_frame_bias,
    tube_masking,
    tubelet_targets,
)
from vitcourse.video.positions import sincos_3d

ENCODER = {
    "img_size": (16, 24), "patch_size": 4, "num_frames": 6, "tubelet_size": 2, "embed_dim": 32, "depth": 2,
    "num_heads": 4, "num_classes": 0, "attention_type": "joint",
}  # fmt: skip
PLACES = 4 * 6


def autoencoder(**options) -> VideoMaskedAutoencoder:
    model = VideoMaskedAutoencoder(TimeSformer(**ENCODER), decoder_dim=32, decoder_depth=1, decoder_heads=4, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------- masking


def test_tubes_hide_the_same_places_in_all_frames():
    noise = torch.rand(5, PLACES)
    shuffle = tube_masking(noise, visible=3, moments=4)
    mask = shuffle.mask.unflatten(1, (4, PLACES))
    assert torch.equal(mask, mask[:, :1].expand_as(mask)) and (mask.sum(2) == PLACES - 3).all()
    assert torch.equal(mask[:, 0], random_masking(noise, 3).mask)
    assert not shuffle.mask.gather(1, shuffle.keep).any() and shuffle.keep.shape == (5, 12)
    # What is seen, then what is hidden, put in their places again: the way of the decoder of images.
    tokens = torch.randn(5, 4 * PLACES, 8)
    order = shuffle.restore.argsort(1)
    assert torch.equal(take(tokens, shuffle.keep), take(tokens, order)[:, :12])
    assert torch.equal(take(take(tokens, order), shuffle.restore), tokens)


def test_targets_are_normalised_by_channel_in_each_tubelet():
    clips = torch.rand(2, 3, 4, 8, 12)
    target = tubelet_targets(clips, 2, 4).unflatten(2, (2, 4, 4, 3))
    pixels = clips[:, :, 2:4, 4:8, 8:12].permute(0, 2, 3, 4, 1)  # of the last of twelve
    expected = (pixels - pixels.mean((1, 2, 3), keepdim=True)) / (pixels.flatten(1, 3).std(1) + 1e-6)[
        :, None, None, None
    ]
    torch.testing.assert_close(target[:, -1], expected)
    assert torch.equal(tubelet_targets(clips, 2, 4, norm_pix=False), clip_to_tubelets(clips, 2, 4))
    assert not tubelet_targets(torch.ones(1, 3, 4, 8, 8), 2, 4).any()


@torch.no_grad()
def test_what_is_hidden_is_not_seen_and_what_is_seen_is():
    model, clips, noise = autoencoder(), torch.randn(2, 3, 6, 16, 24), torch.rand(2, PLACES)
    pred, mask = model(clips, noise)
    assert model.visible == PLACES - int(0.9 * PLACES) == 3 and pred.shape == (2, 3 * PLACES, 2 * 16 * 3)
    assert pred.std() > 0.1
    hidden = model.reconstruct(clips, noise)[1].expand_as(clips)
    other = torch.where(hidden, torch.randn_like(clips), clips)
    assert torch.equal(model(other, noise)[0], pred)
    other = torch.where(hidden, clips, torch.randn_like(clips))
    assert (model(other, noise)[0] - pred).abs().max() > 1e-2
    loss = masked_error(pred, model.targets(clips), mask)
    plain = (pred - model.targets(clips)).square()
    torch.testing.assert_close(loss[0], plain[0][mask[0]].mean())


@torch.no_grad()
def test_reconstruction_paints_what_was_hidden_alone():
    clips, noise = torch.rand(2, 3, 6, 16, 24), torch.rand(2, PLACES)
    for norm_pix in (True, False):
        model = autoencoder(norm_pix=norm_pix)
        painted, mask = model.reconstruct(clips, noise)
        assert painted.shape == clips.shape and mask.shape == (2, 1, 6, 16, 24)
        assert torch.equal(painted.where(~mask, clips), clips) and (painted != clips).any()
        targets = model.targets(clips)
        model.forward = lambda clips, noise, targets=targets, mask=mask: (targets, tube_masking(noise, 3, 3).mask)
        torch.testing.assert_close(model.reconstruct(clips, noise)[0], clips)  # whoever predicts the target paints it


def test_the_autoencoder_learns_and_gives_its_encoder_gradients():
    model, clips = autoencoder().train(), torch.randn(4, 3, 6, 16, 24)
    for _ in range(2):
        pred, mask = model(clips, torch.rand(4, PLACES))
        masked_error(pred, model.targets(clips), mask).mean().backward()
    still = {
        name for name, p in model.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())
    }
    assert still == set()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    noise = torch.rand(4, PLACES)
    for _ in range(12):
        optimizer.zero_grad()
        pred, mask = model(clips, noise)
        loss = masked_error(pred, model.targets(clips), mask).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_positions_in_three_dimensions_differ_along_each():
    table = sincos_3d(3, 4, 5, 32)
    assert table.shape == (60, 32) and len(table.unique(dim=0)) == 60
    grid = table.view(3, 4, 5, 32)
    assert torch.equal(grid[:, :1, :1, :16].expand(3, 4, 5, 16), grid[..., :16])  # time
    assert torch.equal(grid[:1, :, :, 16:].expand(3, 4, 5, 16), grid[..., 16:])  # space


# ------------------------------------------------------------------------------------------------------------ the meter


def numbered(batch: int, frames: int) -> torch.Tensor:
    return torch.arange(float(batch * frames)).view(batch, 1, frames, 1, 1).expand(-1, 2, -1, 3, 2).contiguous()


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_shuffled_frames_are_the_same_frames_in_another_order(frames):
    clips = numbered(40, frames)
    found = shuffle_frames(clips, seed=3)
    assert found.shape == clips.shape and torch.equal(found.sort(2).values, clips)
    if frames > 1:
        assert (found != clips).flatten(1).any(1).all()
    if frames > 2:
        orders = (found - found.amin(2, keepdim=True))[:, 0, :, 0, 0]
        assert len(orders.unique(dim=0)) > 2 and not torch.equal(found, shuffle_frames(clips, seed=4))
    parts = [
        shuffle_frames(part, 3, torch.arange(40)[i : i + 7]) for i in range(0, 40, 7) for part in [clips[i : i + 7]]
    ]
    assert torch.equal(torch.cat(parts), found)


def test_reversed_and_frozen_frames():
    clips = torch.randn(2, 3, 5, 4, 6)
    assert torch.equal(reverse_frames(clips), torch.stack([clips[:, :, i] for i in (4, 3, 2, 1, 0)], dim=2))
    assert torch.equal(freeze_frames(clips), torch.stack([clips[:, :, 2]] * 5, dim=2))
    assert torch.equal(freeze_frames(clips, -1)[:, :, 0], clips[:, :, 4])
    frozen = freeze_frames(clips)
    frozen[:, :, 0] = 0  # a clip of its own
    assert clips[:, :, 2].any()


class Last(nn.Module):
    """Calls a clip by the brightness of its last frame, or of its middle one: a bias to a single frame."""

    def __init__(self, frame: int) -> None:
        super().__init__()
        self.frame = frame

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -(x[:, 0, self.frame, 0, 0, None] - torch.arange(4.0)).abs()


def test_the_meter_tells_what_a_model_looks_at():
    labels = torch.arange(4).repeat(25)
    clips = torch.full((100, 1, 5, 2, 2), -9.0)
    clips[:, :, 2] = labels[:, None, None, None]
    batches = list(zip(clips.split(33), labels.split(33), strict=True))
    middle = single_frame_bias(Last(2), batches)
    assert (middle["as_they_are"], middle["frozen"], middle["reversed"]) == (1, 1, 1) and middle["shuffled"] < 0.7
    clips[:, :, 4] = labels[:, None, None, None]
    clips[:, :, 0] = 3 - labels[:, None, None, None]
    clips[:, :, 2] = 9
    model = Last(4).train()
    ends = single_frame_bias(model, batches, after_reversal=lambda y: 3 - y)
    assert (ends["as_they_are"], ends["reversed"], ends["follows_reversal"]) == (1, 0, 1) and model.training
    assert ends["frozen"] == 0.25
    assert single_frame_bias(model, [(clips, labels)])["shuffled"] == ends["shuffled"]
    assert (
        single_frame_bias(model, batches)["follows_reversal"] != single_frame_bias(model, batches)["follows_reversal"]
    )


@torch.no_grad()
def test_each_model_is_one_graph():
    sizes = {"img_size": 24, "patch_size": 8, "num_frames": 4, "embed_dim": 32, "depth": 1, "num_heads": 4}
    swin = {"embed_dim": 16, "depths": (2,), "num_heads": (2,), "window_size": (2, 3, 3)}
    for model in (TimeSformer(**sizes), FactorisedEncoder(**sizes, time_depth=1), VideoSwin(24, **swin)):
        x = torch.randn(2, 3, 6, 16, 24)  # other positions, and windows to pad
        compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_bad_input():
    clip = torch.zeros(2, 3, 4, 8)
    for call in (shuffle_frames, reverse_frames, freeze_frames):
        with pytest.raises(ValueError, match=r"clips must be \(B, C, T, H, W\), got shape \(2, 3, 4, 8\)"):
            call(clip)
    with pytest.raises(ValueError, match="frame 4 does not exist; the clips have 4"):
        freeze_frames(torch.zeros(1, 3, 4, 2, 2), 4)
    with pytest.raises(ValueError, match="batches is empty"):
        single_frame_bias(Last(0), [])
    with pytest.raises(ValueError, match="a batch has 2 clips and 3 classes"):
        single_frame_bias(Last(0), [(torch.zeros(2, 1, 4, 2, 2), torch.zeros(3))])
    for encoder in (
        TimeSformer(**{**ENCODER, "attention_type": "divided"}),
        VideoSwin(num_classes=0, depths=(1,), num_heads=(3,)),
    ):
        with pytest.raises(ValueError, match="use a TimeSformer with attention_type='joint'"):
            VideoMaskedAutoencoder(encoder)
    for ratio, what in ((0.0, "predict"), (1.0, "see")):
        with pytest.raises(ValueError, match=f"mask_ratio {ratio} leaves none of 24 places to {what}"):
            VideoMaskedAutoencoder(TimeSformer(**ENCODER), ratio)
    with pytest.raises(ValueError, match=r"clips are \(4, 16, 24\), and the encoder is for .* \(6, 16, 24\)"):
        autoencoder()(torch.zeros(1, 3, 4, 16, 24), torch.rand(1, PLACES))
    with pytest.raises(ValueError, match="clips must be"):
        clip_to_tubelets(clip, 2, 4)
    with pytest.raises(ValueError, match="dim 12 is not a multiple of 8"):
        sincos_3d(2, 2, 2, 12)
