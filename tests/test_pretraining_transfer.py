"""Frozen features and what is read out of them; few images of classes never seen."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitcourse import create_model
from vitcourse.data import open_dataset, subset
from vitcourse.pretraining import (
    Features,
    extract_features,
    features_by_depth,
    few_shot,
    few_shot_split,
    fine_tune,
    knn_accuracy,
    linear_probe,
    make_objective,
    ridge_probe,
    split_classes,
)
from vitcourse.pretraining.transfer import knn_predict, probe_accuracy
from vitcourse.train import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
from _pretraining import encoder, images, small


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clusters(n: int = 60, classes: int = 3, apart: float = 3.0, seed: int = 0) -> Features:
    random = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(9)) * apart
    return Features(centres[y] + torch.randn(n, 8, generator=random), y)


def test_features_are_what_stands_before_the_head():
    model = create_model("vit_tiny", img_size=(8, 12), patch_size=2, num_classes=5, depth=2)
    data = images(20)
    x, y = extract_features(model, data, TrainConfig(eval_batch_size=7, device="cpu"))
    model.eval()
    pixels = (data.images.float() / 255 - 0.5) / 0.5  # by model.preprocess
    expected = model.forward_features(pixels)[:, 0]
    torch.testing.assert_close(x, expected.detach(), rtol=1e-4, atol=1e-5)
    assert y.tolist() == data.targets and model.num_classes == 5 and not x.requires_grad
    pretrainer, _ = small("moco")
    of_it, of_its_encoder = (extract_features(m, data).x for m in (pretrainer, pretrainer.encoder))
    assert torch.equal(of_it, of_its_encoder)


def test_parts_that_others_call_an_encoder_are_no_models():
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(3, 3)  # of tokens, as torchvision's ViT has one

        def forward(self, images):
            return images.mean((2, 3))

    assert extract_features(Theirs(), images(4), TrainConfig(device="cpu")).x.shape == (4, 3)


def test_each_depth_has_its_features():
    model = encoder(depth=3)
    found = features_by_depth(model, images(10))
    assert [f.x.shape for f in found] == [(10, 16)] * 3
    pixels = (images(10).images.float() / 255 - 0.5) / 0.5
    maps = model.eval().feature_maps(pixels, (0, 1, 2))
    torch.testing.assert_close(found[1].x, maps[1].mean((2, 3)).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Conv2d has no blocks"):
        features_by_depth(torch.nn.Conv2d(3, 4, 2), images(4))


def test_few_shot_splits_are_balanced_nested_and_repeatable():
    targets = (np.arange(60) % 3).tolist()
    chosen = {k: few_shot_split(targets, k, seed=1) for k in (1, 5, 20)}
    for k, index in chosen.items():
        assert len(set(index.tolist())) == 3 * k
        assert torch.bincount(torch.tensor(targets)[index]).tolist() == [k] * 3
    assert set(chosen[1].tolist()) < set(chosen[5].tolist()) < set(chosen[20].tolist())
    assert torch.equal(few_shot_split(targets, 5, 1), chosen[5])
    assert not torch.equal(few_shot_split(targets, 5, 2), chosen[5])
    for k in (0, 21):
        with pytest.raises(ValueError, match=f"k {k} images of class 0 are asked for, which has 20"):
            few_shot_split(targets, k)


def test_unseen_classes_are_not_seen():
    data = images(40)
    seen, unseen = split_classes(data, [1, 3])
    assert (seen.classes, unseen.classes) == (list("ace"), list("bd"))
    assert (len(seen), len(unseen)) == (24, 16)
    for part in (seen, unseen):
        for (image, label), name in zip(part, (part.classes[t] for t in part.targets), strict=True):
            assert part.classes[label] == name
            assert any(
                torch.equal(image, data.images[i]) for i, t in enumerate(data.targets) if data.classes[t] == name
            )
    for wrong in ([], [5], [0, 1, 2, 3, 4]):
        with pytest.raises(ValueError, match="must name some of the classes 0 to 4, and not all"):
            split_classes(data, wrong)


def test_nearest_neighbours_vote():
    train, test = clusters(), clusters(seed=1)
    expected = []
    for x in F.normalize(test.x, dim=1):
        similar = F.normalize(train.x, dim=1) @ x
        nearest = similar.argsort(descending=True)[:5]
        expected.append(max(range(3), key=lambda c: sum((similar[i] / 0.07).exp() for i in nearest if train.y[i] == c)))
    assert knn_predict(train, test.x, k=5).tolist() == expected
    assert knn_accuracy(train, train, k=1) == 1
    with pytest.raises(ValueError, match="k 61 neighbours are asked for among 60"):
        knn_predict(train, test.x, k=61)


def test_ridge_is_its_normal_equations_and_leaves_one_out():
    train = clusters(apart=0.7)
    probe = ridge_probe(train)
    x, onehot = train.x.double(), F.one_hot(train.y).double()
    scale = torch.linalg.svdvals(x - x.mean(0)).square().mean()

    def fit(x, onehot, strength):
        mean, middle = x.mean(0), onehot.mean(0)
        a = (x - mean).t() @ (x - mean) + strength * scale * torch.eye(8)
        weight = torch.linalg.solve(a.double(), (x - mean).t() @ (onehot - middle))
        return weight, middle - mean @ weight

    weight, bias = fit(x, onehot, probe.strength)
    torch.testing.assert_close(probe.weight.double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probe.bias.double(), bias, rtol=1e-4, atol=1e-6)

    def left_out(strength):
        keep = ~torch.eye(len(x), dtype=torch.bool)
        fits = [fit(x[k], onehot[k], strength) for k in keep]
        return torch.stack([onehot[i] - x[i] @ w - b for i, (w, b) in enumerate(fits)]).square().mean().item()

    from vitcourse.pretraining.transfer import STRENGTHS

    assert min(STRENGTHS, key=left_out) == probe.strength


def test_the_linear_probe_is_at_its_optimum():
    train = clusters(apart=0.7)
    probe = linear_probe(train, strength=1e-2)
    std = train.x.std(0, correction=0)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    loss = F.cross_entropy(train.x @ weight + bias, train.y) + 1e-2 * (weight * std[:, None]).square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3
    assert probe_accuracy(linear_probe(clusters()), clusters(seed=2)) > 0.9
    assert linear_probe(clusters(9)).strength == 1e-3


def test_fine_tuning_trains_a_copy_and_all_of_it():
    model, _ = small("moco")
    before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    tuned = fine_tune(model, images(), TrainConfig(max_steps=2, batch_size=16, lr=1e-2, device="cpu"))
    assert tuned(torch.rand(2, 3, 8, 12)).shape == (2, 5)
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())
    changed = {k for k, v in tuned.state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert "patch_embed.proj.weight" in changed and "blocks.1.attn.qkv.weight" in changed
    fixed = fine_tune(encoder(pos_embed="sincos"), images(), TrainConfig(max_steps=2, batch_size=16, device="cpu"))
    assert torch.equal(fixed.pos_embed, encoder(pos_embed="sincos").pos_embed)


def test_few_shots_by_every_method():
    _, unseen = split_classes(open_dataset("fashion_mnist_subset"), [1, 8])
    train, test = subset(unseen, 60), subset(unseen, 60, seed=1)
    model, _ = make_objective(
        "mae", create_model("vit_tiny", img_size=28, patch_size=7, in_chans=1, num_classes=0, depth=1)
    )
    config = TrainConfig(epochs=3, lr=1e-3, batch_size=16, device="cpu")
    rows = few_shot(model, train, test, shots=(1, 5), seeds=(0, 1), config=config)
    assert len(rows) == 2 * 2 * 4 and {row["method"] for row in rows} == {"linear", "knn", "ridge", "fine-tune"}
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    five = [row["accuracy"] for row in rows if row["k"] == 5 and row["method"] != "fine-tune"]
    assert min(five) > 0.55, "trousers and bags differ in the untrained features, too"
    assert few_shot(model, train, test, shots=(1,), seeds=(0,), methods=("knn",)) == [
        row for row in rows if (row["k"], row["seed"], row["method"]) == (1, 0, "knn")
    ]
    with pytest.raises(ValueError, match="method 'svm' is unknown"):
        few_shot(model, train, test, methods=("svm",))
