"""Video classification as a task of the engine."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from vitcourse import create_model
from vitcourse.data import hold_out, moving
from vitcourse.train import TrainConfig, fit
from vitcourse.video import VideoClassification

CONFIG = TrainConfig(epochs=2, batch_size=4, lr=1e-2, ema=0.9, device="cpu", threads=1)


def model(**changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "num_frames": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return create_model("timesformer_tiny", **{**sizes, "num_classes": 8, **changes})


def clips(split: str = "train", n: int = 16, **options):
    return moving(split, num_frames=2, img_size=16, length=n, **options)


def run(net: nn.Module, config: TrainConfig = CONFIG, **options):
    return fit(net, clips(), clips("val", 8), config, task=VideoClassification(), progress=False, **options)


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_clips_are_normalised_by_channel_and_learned_in_parts():
    one, two, config = model(), model(), replace(CONFIG, optimizer="sgd", lr=0.1)  # AdamW would enlarge the rounding
    history = run(one, config)
    run(two, replace(config, accum=2))
    assert (weights(one) - weights(model())).abs().max() > 1e-3
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-4, atol=1e-6)
    task = VideoClassification()
    task.setup(one, clips(), CONFIG, torch.device("cpu"))
    clip, label = clips()[0]
    prepared, _ = task.prepare((clip[None], torch.tensor([label])), None)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (one.preprocess.mean, one.preprocess.std))
    torch.testing.assert_close(prepared[0], (clip / 255 - mean) / std)
    with torch.no_grad():  # the accuracy, redone one clip at a time
        said = [one(task.prepare((c[None], None), None)[0]).argmax().item() for c, _ in clips("val", 8)]
    right = sum(a == b for a, b in zip(said, clips("val", 8).targets, strict=True)) / 8
    assert history[-1]["val_accuracy"] == right


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path):
    class Interrupt(Exception):
        pass

    class Interrupted(VideoClassification):
        def after_step(self, net, step, total):
            if step == 4:
                raise Interrupt

    config, whole, again = replace(CONFIG, checkpoint_every=1), model(), model()
    run(whole, config)
    with pytest.raises(Interrupt):
        fit(model(), clips(), clips("val", 8), config, task=Interrupted(), progress=False, out_dir=tmp_path)
    run(again, config, out_dir=tmp_path, resume=True)
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize(
    ("net", "config", "message"),
    [
        (lambda: model(num_frames=4), CONFIG, "clips of 2 frames, the model's num_frames is 4; build .*num_frames=2"),
        (lambda: model(img_size=32), CONFIG, r"clips of \(16, 16\) rows and columns, the model's img_size is \(32, 32"),
        (lambda: model(in_chans=1), CONFIG, "clips of 3 channels, the model's in_chans is 1"),
        (lambda: model(num_classes=3), CONFIG, "num_classes is 3 but train_set has 8 classes"),
        (model, replace(CONFIG, channels_last=True), "channels_last is a memory format of images"),
        (model, replace(CONFIG, hflip=True), "task 'video' does not heed hflip"),
    ],
)
def test_what_does_not_fit_is_said(net, config, message):
    with pytest.raises(ValueError, match=message):
        run(net(), config)


def test_images_are_no_clips():
    images = [(torch.zeros(3, 16, 16), 0)] * 4
    with pytest.raises(ValueError, match=r"clips of train_set must be tensors \(C, T, H, W\), got a tensor of shape"):
        fit(model(), images, None, CONFIG, task=VideoClassification(), progress=False)


def test_a_film_and_its_reverse_are_held_out_together():
    data = clips(n=64)
    train, held = hold_out(data, 0.2)
    films = [{number // 2 for number in part.indices} for part in (train, held)]
    assert not films[0] & films[1] and len(train) + len(held) == 64 and len(held) == 2 * len(films[1]) > 0
    assert {held.targets.count(k) for k in range(8)} == {2}
