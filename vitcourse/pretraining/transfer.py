"""What has an encoder learnt? Frozen: nearest neighbours, ridge regression, a linear probe; and fine-tuned."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from vitcourse.data import ImageDataset
from vitcourse.devices import device_of, resolve_device
from vitcourse.inference import evaluating, find_mean_std, normalise
from vitcourse.train.batches import Pairs, Share, eval_batches
from vitcourse.train.config import TrainConfig, check_choice
from vitcourse.train.engine import fit
from vitcourse.train.evaluation import evaluate
from vitcourse.train.runtime import autocast
from vitcourse.train.task import check_not_empty
from vitcourse.weights import unwrap

from .objective import Pretrainer


class Features(NamedTuple):
    """Features x (N, D) in float32 and labels y (N,), on the CPU."""

    x: Tensor
    y: Tensor

    def take(self, index: Tensor) -> "Features":
        return Features(self.x[index], self.y[index])


def encoder_of(model: nn.Module) -> nn.Module:
    """The model, images to features (B, D): the encoder of what pre-training trains, a copy without head of others."""
    model = unwrap(model)
    if isinstance(model, Pretrainer):  # an `encoder` of other models need not take images
        model = model.encoder
    if not getattr(model, "num_classes", 0):
        return model
    model = copy.deepcopy(model)
    model.reset_classifier(0)
    return model


def extract_features(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig | None = None,
    *,
    function: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> Features:
    """The features of all images of a data set, in evaluation mode and without augmentation.

    Args:
        model: images to features or logits, whose head is then left out; it computes where it lies.
        dataset: pairs (image, label).
        config: gives precision, ``eval_batch_size``, ``loader`` and ``num_workers``.
        function: ``function(encoder, images)`` in place of ``encoder(images)``, (B, D) or (B, K, D).

    Raises:
        ValueError: an empty data set; no mean and std for uint8 images.

    >>> from vitcourse import create_model
    >>> from vitcourse.data import open_dataset, subset
    >>> few = subset(open_dataset("fashion_mnist_subset", "test"), 50)
    >>> x, y = extract_features(create_model("vit_tiny", img_size=28, patch_size=7, in_chans=1, depth=1), few)
    >>> x.shape, y.shape
    (torch.Size([50, 192]), torch.Size([50]))
    """
    check_not_empty(dataset, "dataset")
    config, encoder = config or TrainConfig(), encoder_of(model)
    device = device_of(encoder) or resolve_device(config.device)
    mean_std, found = find_mean_std(encoder, dataset, device), []
    with evaluating(encoder), torch.inference_mode(), autocast(device, config.precision):
        for images, labels in eval_batches(dataset, Share(), config, device, Pairs()):
            images = normalise(images, mean_std)
            x = encoder(images) if function is None else function(encoder, images)
            found.append((x.float().cpu(), labels.cpu()))
    x, y = (torch.cat(parts).clone() for parts in zip(*found, strict=True))
    return Features(x, y)


def features_by_depth(model: nn.Module, dataset: Dataset, config: TrainConfig | None = None) -> list[Features]:
    """The mean patch token after each block of a ViT: which layer transfers?

    Raises:
        ValueError: a model without blocks at one stride.
    """
    depth = len(getattr(encoder_of(model), "blocks", ()))
    if not depth:
        raise ValueError(f"{type(unwrap(model)).__name__} has no blocks; give a VisionTransformer")

    def tokens(encoder: nn.Module, images: Tensor) -> Tensor:
        return torch.stack([m.mean(dim=(2, 3)) for m in encoder.feature_maps(images, range(depth))], dim=1)

    x, y = extract_features(model, dataset, config, function=tokens)
    return [Features(x[:, block], y) for block in range(depth)]


# ------------------------------------------------------------------------------------------------------- few images


def few_shot_split(targets: Sequence[int], k: int, seed: int = 0) -> Tensor:
    """The places of ``k`` random images of each class, (k · classes,); same seed, same images.

    Of one seed those of a smaller k are among those of a larger one.

    Raises:
        ValueError: k below 1, or above what a class has.

    >>> few_shot_split([0, 1, 0, 1, 1], 2).shape
    torch.Size([4])
    """
    labels = np.asarray(targets)
    random = np.random.RandomState(seed)  # whose stream NumPy promises never to change
    chosen = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        if not 1 <= k <= len(members):
            raise ValueError(f"k {k} images of class {label} are asked for, which has {len(members)}; use 1 to that")
        chosen.append(members[:k])
    return torch.from_numpy(np.concatenate(chosen))


def split_classes(dataset: ImageDataset, unseen: Sequence[int]) -> tuple[ImageDataset, ImageDataset]:
    """The images of all other classes, and those of the ``unseen`` ones, with labels counted from 0 in each.

    Pre-train on the first, transfer to the second: classes that pre-training has never seen.

    Raises:
        ValueError: a class that does not exist, or all of them.
    """
    count, unseen = len(dataset.classes), sorted(set(unseen))
    if not unseen or not 0 <= unseen[0] <= unseen[-1] < count or len(unseen) == count:
        raise ValueError(f"unseen {unseen} must name some of the classes 0 to {count - 1}, and not all")
    seen = [label for label in range(count) if label not in unseen]
    return _of_classes(dataset, seen), _of_classes(dataset, unseen)


def _of_classes(dataset: ImageDataset, labels: list[int]) -> ImageDataset:
    part = dataset.take([i for i, label in enumerate(dataset.targets) if label in labels])
    targets = [labels.index(label) for label in part.targets]
    facts = {"mean": part.mean, "std": part.std, "transform": part.transform, "in_chans": part.in_chans}
    return ImageDataset(part.images, targets, [part.classes[label] for label in labels], **facts)


# -------------------------------------------------------------------------------------------------- frozen features


def knn_predict(train: Features, x: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Labels (M,) of features x (M, D) by their ``k`` most similar neighbours, which vote with exp(cosine / τ).

    Wu et al. 2018, section 3.4, as DINO and many others measure.

    Raises:
        ValueError: k above the number of neighbours there are, or below 1.
    """
    if not 1 <= k <= len(train.x):
        raise ValueError(f"k {k} neighbours are asked for among {len(train.x)}; use 1 to that")
    bank, found = F.normalize(train.x, dim=1).t(), []
    classes = int(train.y.max()) + 1
    for part in F.normalize(x, dim=1).split(512):
        similar, nearest = (part @ bank).topk(k)
        votes = torch.zeros(len(part), classes).scatter_add_(1, train.y[nearest], (similar / temperature).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def knn_accuracy(train: Features, test: Features, k: int = 20, temperature: float = 0.07) -> float:
    """Accuracy of :func:`knn_predict`.

    >>> x = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0]])
    >>> knn_accuracy(Features(x, torch.tensor([0, 0, 1])), Features(x * 3, torch.tensor([0, 0, 1])), k=1)
    1.0
    """
    return _accuracy(knn_predict(train, test.x, k, temperature), test.y)


class Linear(NamedTuple):
    """Scores x W + b of classes, and the strength of the regularisation that was chosen."""

    weight: Tensor
    bias: Tensor
    strength: float

    def predict(self, x: Tensor) -> Tensor:
        return (x @ self.weight + self.bias).argmax(1)


STRENGTHS = tuple(10.0**power for power in range(-6, 3))


def ridge_probe(train: Features, strengths: Sequence[float] = STRENGTHS) -> Linear:
    """Ridge regression on one-hot labels, in closed form: W = (X'X + λI)⁻¹ X'Y of centred X and Y.

    λ is the one of ``strengths``, times the mean squared singular value of X, with the least squared error when each
    image is predicted from all others; the hat matrix gives that without a second fit (Golub et al. 1979, eq. 2.4).

    >>> x, y = torch.randn(40, 6), torch.arange(40) % 2
    >>> probe = ridge_probe(Features(x + 3 * y[:, None], y))
    >>> (probe.predict(x + 3 * y[:, None]) == y).float().mean().item()
    1.0
    """
    x, onehot = train.x.double(), F.one_hot(train.y).double()
    mean, middle = x.mean(0), onehot.mean(0)
    u, s, vt = torch.linalg.svd(x - mean, full_matrices=False)
    scale = s.square().mean()
    projected = u.t() @ (onehot - middle)
    best: tuple[float, float, Tensor] | None = None
    for strength in strengths:
        shrink = s.square() / (s.square() + strength * scale)
        leverage = (u.square() @ shrink + 1 / len(x)).clamp(max=1 - 1e-9)
        residual = (onehot - middle - u @ (shrink[:, None] * projected)) / (1 - leverage)[:, None]
        error = residual.square().mean().item()
        if best is None or error < best[0]:
            best = (error, strength, vt.t() @ ((s / (s.square() + strength * scale))[:, None] * projected))
    _, strength, weight = best
    return Linear(weight.float(), (middle - mean @ weight).float(), strength)


def linear_probe(train: Features, strength: float | None = None, seed: int = 0) -> Linear:
    """Logistic regression on standardised features, to its optimum by L-BFGS.

    Args:
        strength: of the squared weights in the mean loss; None: the one of :data:`STRENGTHS` that does best on a fifth
            of the images, held out of each class, and then all are fitted; 1e-3 where a class has fewer than five.
        seed: of the images that are held out.
    """
    x, y = train.x.double(), train.y
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x = ((x - mean) / std).float()
    if strength is None:
        strength = _chosen(x, y, seed)
    weight, bias = _logistic(x, y, strength)
    weight = weight.double() / std[:, None]
    return Linear(weight.float(), (bias.double() - mean @ weight).float(), strength)


def _chosen(x: Tensor, y: Tensor, seed: int) -> float:
    fewest = int(torch.bincount(y)[y.unique()].min())
    if fewest < 5:
        return 1e-3
    held = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        members = (y == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
        held[members[order[: len(members) // 5]]] = True
    results = {}
    for strength in STRENGTHS[1:-2]:
        weight, bias = _logistic(x[~held], y[~held], strength, classes=int(y.max()) + 1)
        results[strength] = _accuracy((x[held] @ weight + bias).argmax(1), y[held])
    return max(results, key=lambda strength: (results[strength], strength))  # of equals the stronger


def _logistic(x: Tensor, y: Tensor, strength: float, classes: int | None = None) -> tuple[Tensor, Tensor]:
    classes = classes or int(y.max()) + 1
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + strength * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def probe_accuracy(probe: Linear, test: Features) -> float:
    return _accuracy(probe.predict(test.x), test.y)


def _accuracy(predicted: Tensor, y: Tensor) -> float:
    return (predicted == y).float().mean().item()


# ------------------------------------------------------------------------------------------------------- fine-tuning


def fine_tune(
    model: nn.Module, train_set: Dataset, config: TrainConfig, *, val_set: Dataset | None = None, **options: Any
) -> nn.Module:
    """A copy of the encoder with a new head for the classes of ``train_set``, all of it trained on them.

    Parameters that pre-training froze (MoCo's patch projection) are trained; positions that are fixed stay so.
    ``options`` are those of :func:`vitcourse.train.fit`.
    """
    tuned = copy.deepcopy(encoder_of(model))
    tuned.reset_classifier(len(train_set.classes))
    for name, parameter in tuned.named_parameters():
        if name.rpartition(".")[2] != "pos_embed":
            parameter.requires_grad_(True)
    fit(tuned, train_set, val_set, config, progress=False, **options)
    return tuned


METHODS = ("linear", "knn", "ridge", "fine-tune")


def few_shot(
    model: nn.Module,
    train_set: Dataset,
    test_set: Dataset,
    shots: Sequence[int] = (1, 5, 10, 50),
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = METHODS,
    config: TrainConfig | None = None,
) -> list[dict[str, Any]]:
    """Accuracy on ``test_set`` from ``k`` images of each class of ``train_set``, by each method.

    Args:
        model: pre-trained, best on other classes: see :func:`split_classes`.
        config: of the fine-tuning; a batch is at most as large as there are images.

    Returns:
        rows ``{"k", "seed", "method", "accuracy"}``.

    Raises:
        ValueError: an unknown method; fewer than k images of a class.
    """
    for method in methods:
        check_choice("method", method, METHODS)
    config = config or TrainConfig(epochs=50, lr=5e-4, hflip=True)
    train, test, rows = extract_features(model, train_set), extract_features(model, test_set), []
    for seed in seeds:
        for k in shots:
            chosen = few_shot_split(train.y.tolist(), k, seed)
            few, images = train.take(chosen), Subset(train_set, chosen.tolist())
            images.classes, images.targets = train_set.classes, few.y.tolist()
            for method in methods:
                accuracy = _few_shot_accuracy(method, model, few, test, images, test_set, replace(config, seed=seed))
                rows.append({"k": k, "seed": seed, "method": method, "accuracy": accuracy})
    return rows


def _few_shot_accuracy(
    method: str,
    model: nn.Module,
    few: Features,
    test: Features,
    images: Dataset,
    test_set: Dataset,
    config: TrainConfig,
) -> float:
    if method == "knn":
        return knn_accuracy(few, test, k=min(20, max(1, int(torch.bincount(few.y).min()))))
    if method == "fine-tune":
        tuned = fine_tune(model, images, replace(config, batch_size=min(config.batch_size, len(images))))
        return evaluate(tuned, test_set, config)["val_accuracy"]
    return probe_accuracy(linear_probe(few) if method == "linear" else ridge_probe(few), test)
