"""Views, what the effective rank and its like are, collapses that are named, and chance levels."""

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitcourse.pretraining import View, effective_rank, info_nce
from vitcourse.pretraining.diagnostics import Probe, alignment, code_use, collapse_of, probe_of, uniformity
from vitcourse.pretraining.lejepa import disagreement, gaussian_level, random_directions, sigreg
from vitcourse.train import Part, TrainConfig, fit

sys.path.insert(0, str(Path(__file__).parent))
from _pretraining import images, small

CONFIG = TrainConfig(epochs=3, batch_size=16, lr=1e-2, checkpoint_every=2, ema=0.9, device="cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- views


def test_a_view_depends_on_seed_epoch_index_and_its_number_alone():
    view = View(0.3, 1.0, True, 0.4, 0.2, 0.5, 0.5, (6, 8))
    pixels, index = images(12).images, torch.arange(12)
    key = {"seed": 1, "epoch": 2, "view": 0}
    mean_std = (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    whole = view(pixels, mean_std, index=index, **key)
    assert whole.shape == (12, 3, 6, 8)
    for rows in ([5], [7, 2, 9]):
        torch.testing.assert_close(view(pixels[rows], mean_std, index=index[rows], **key), whole[rows])
    for changed in ({"seed": 2}, {"epoch": 3}, {"view": 1}):
        other = view(pixels, mean_std, index=index, **{**key, **changed})
        assert ((other - whole).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_crops_are_torchvisions():
    from torchvision.transforms.v2 import functional as tv

    from vitcourse.pretraining.views import resized_crop

    x = torch.rand(2, 3, 16, 24)
    boxes = torch.tensor([[4 / 16, 6 / 24, 8 / 16, 12 / 24]] * 2)
    found = resized_crop(x, boxes, torch.tensor([False, True]), (16, 24))
    expected = tv.resized_crop(x, 4, 6, 8, 12, [16, 24], antialias=False)
    inside = (..., slice(2, -2), slice(2, -2))  # at the border torchvision repeats a pixel where ours sees the next one
    torch.testing.assert_close(found[0][inside], expected[0][inside], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][inside], expected[1].flip(-1)[inside], rtol=1e-4, atol=1e-5)


def test_colours_are_torchvisions():
    from torchvision.transforms.v2 import functional as tv

    from vitcourse.pretraining.views import colour_jitter, gaussian_blur, shift_hue

    x = torch.rand(3, 3, 20, 20)
    torch.testing.assert_close(shift_hue(x, torch.full((3, 1, 1), 0.1)), tv.adjust_hue(x, 0.1), rtol=1e-4, atol=1e-4)
    found = colour_jitter(x, torch.tensor([[0.75, 0.25, 1.0, 0.0]] * 3), 0.4)
    expected = tv.adjust_contrast(tv.adjust_brightness(x, 1.2), 0.8)
    expected = tv.adjust_hue(tv.adjust_saturation(expected, 1.2), -0.1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    grey = x[:, :1]
    torch.testing.assert_close(
        colour_jitter(grey, torch.tensor([[0.75, 0.25, 1.0, 0.0]] * 3), 0.4),
        tv.adjust_contrast(tv.adjust_brightness(grey, 1.2), 0.8),
        rtol=1e-4,
        atol=1e-4,
    )
    large = torch.rand(2, 3, 224, 224)
    expected = tv.gaussian_blur(large[1:], [13, 13], [1.5, 1.5])
    torch.testing.assert_close(gaussian_blur(large, torch.tensor([0.3, 1.5]))[1:], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- numbers that are told


def test_the_effective_rank_counts_directions():
    torch.manual_seed(0)
    flat = torch.randn(200, 3) @ torch.linalg.qr(torch.randn(16, 3))[0].t()
    assert effective_rank(flat + 100) == pytest.approx(3, abs=0.05)
    assert effective_rank(torch.randn(2000, 8)) == pytest.approx(8, abs=0.05)
    assert effective_rank(torch.ones(9, 4) * 3.3) == 0


def test_alignment_and_uniformity_are_the_papers():
    torch.manual_seed(0)
    x, y = torch.randn(50, 6), torch.randn(50, 6)
    a, b = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
    assert alignment(x, x * 3) == pytest.approx(0, abs=1e-6)
    assert alignment(x, y) == pytest.approx((a - b).norm(dim=1).pow(2).mean().item(), rel=1e-5)
    pairs = torch.tensor([((a[i] - a[j]) ** 2).sum() for i in range(50) for j in range(i)])
    assert uniformity(x) == pytest.approx(pairs.mul(-2).exp().mean().log().item(), rel=1e-4)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-5)
    assert code_use(torch.tensor([4, 0, 0, 0])) == {"code_use": 0.25, "code_perplexity": 1.0}


def test_a_collapse_is_named_while_it_happens(capsys):
    """Agreement of the views alone, without SIGReg: the constant solves it."""
    lines = {}
    for sigreg_weight in (0.0, 0.05):
        model, task = small("lejepa", sigreg=sigreg_weight, local_views=0)
        config = replace(CONFIG, epochs=30, lr=1e-2, ema=0.0, checkpoint_every=0)
        history = fit(model, images(), None, config, task=task, progress=False)
        lines[sigreg_weight] = [line for line in capsys.readouterr().err.splitlines() if "collapse" in line]
        assert math.isfinite(history[-1]["train_loss"])
    told = lines[0.0]
    assert told and told[0].startswith("vitcourse: step ") and "the embeddings collapse" in told[0]
    assert int(told[0].split()[2].rstrip(":")) < 60
    assert not [line for line in lines[0.05] if "embeddings" in line]


def test_kinds_of_collapse():
    torch.manual_seed(0)
    healthy = torch.randn(64, 8)
    assert collapse_of(healthy, 2.8) is None
    assert collapse_of(healthy * 1e-2 + 1, 2.8) == "complete"
    assert collapse_of(torch.randn(64, 1) * torch.randn(1, 8) + 1e-4 * healthy, 1.0) == "dimensional"
    assert collapse_of(healthy * 1e-2 + 1, 0.1) is None  # so close were they before the training
    assert collapse_of(healthy * 1e-2 + 1, 2.8, falling=False) is None  # they move apart


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("moco", lambda model, task: 4 * 0.2 * math.log(16)),
        ("beit", lambda model, task: math.log(9)),
        ("lejepa", lambda model, task: 0.95 * (2 * 0.5 + 1 * 1.5) / 3 + 0.05 * gaussian_level()),
    ],
)
def test_the_chance_level_is_in_every_row(name, expected, tmp_path):
    model, task = small(name)
    fit(model, images(), None, replace(CONFIG, epochs=1), task=task, progress=False, out_dir=tmp_path)
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert float(row["chance"]) == pytest.approx(expected(model, task), rel=1e-6)
    assert {"effective_rank", "alignment", "uniformity", "val_loss"} <= row.keys()
    assert ("code_use" in row) == (name == "beit")


def test_who_knows_nothing_has_the_chance_level():
    """The loss functions themselves, on outputs that tell nothing of the input."""
    same = torch.ones(16, 6)
    assert (2 * info_nce(same, same, 0.2)).mean().item() == pytest.approx(4 * 0.2 * math.log(16), rel=1e-5)
    random = torch.Generator().manual_seed(0)
    draws = [
        sigreg(torch.randn(2, 50, 6, generator=random), random_directions(6, 8, random)).item() for _ in range(400)
    ]
    assert sum(draws) / len(draws) == pytest.approx(gaussian_level(), rel=0.1)
    x = torch.randn(3, 20000, 4, generator=random)
    assert disagreement(x, 2).item() == pytest.approx((2 * 0.5 + 1.5) / 3, rel=0.03)
    model, task = small("mae")
    fit(model, images(), None, replace(CONFIG, max_steps=1), task=task, progress=False)
    assert task.chance() == pytest.approx(model.targets(task.probe.views[0]).square().mean().item())


def test_the_probe_is_always_the_same():
    data = images()
    first, again = (probe_of(data, None, 3, torch.device("cpu")) for _ in range(2))
    assert isinstance(first, Probe)
    assert all(torch.equal(a, b) for a, b in zip(first.views, again.views, strict=True))


def test_masks_and_views_of_a_step_do_not_depend_on_its_batch():
    for name in ("mae", "beit"):
        model, task = small(name)
        data = images()
        fit(model, data, None, replace(CONFIG, max_steps=1), task=task, progress=False)
        index = torch.tensor([3, 9, 4])
        pixels = data.images[index]
        _, masks = task.inputs(pixels, Part(1, 5, 0, 16, index))
        _, alone = task.inputs(pixels[2:], Part(1, 7, 8, 16, index[2:]))
        assert torch.equal(masks[2:], alone)
        _, later = task.inputs(pixels, Part(2, 9, 0, 16, index))
        assert not torch.equal(masks, later)
