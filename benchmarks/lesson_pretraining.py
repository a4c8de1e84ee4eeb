"""The comparisons of lesson 03 that it has no time to train: six starts of one small ViT, and what each is worth.

    python -m benchmarks.lesson_pretraining            what runs/lesson_pretraining.jsonl lacks, then the results
    python -m benchmarks.lesson_pretraining --runs 20  twenty of them, to share a machine

The shipped weights that some parts read come first. They are what the recipes leave, trained on 54 000 images of
Fashion-MNIST, one seed, nine to sixteen minutes on one core each:

    for name in supervised mae moco beit lejepa; do
        python -m vitcourse train --recipe fashion_mnist_$name --data-root DIR --out-dir runs/$name
    done

    data/weights/fashion_mnist_supervised.safetensors  the encoder with its head of ten classes  (final)
    data/weights/fashion_mnist_moco.safetensors        the encoder                               (final)
    data/weights/fashion_mnist_beit.safetensors        the encoder                               (final)
    data/weights/fashion_mnist_lejepa.safetensors      the encoder                               (final)
    data/weights/fashion_mnist_mae.safetensors         encoder and decoder, which paints         (pretrainer)

Rows of ``results/lesson_pretraining.json``: what a run is called by, and what it measured. All accuracies are shares of
the embedded 2 000 test images, or of those of the classes that are named.

    {"part": "rate", "start": "mae", "k": 10, "lr": 1e-3, "seed": -1} accuracy on 1 000 held-out training images
    {"part": "transfer", "start": "mae", "method": "linear", "k": 10, "seed": 0}
                                                                      accuracy; with "lr" where it is fine-tuned
    {"part": "depth", "start": "mae", "block": 3, "seed": 0}          accuracy of a ridge probe behind that block
    {"part": "amount", "images": 700, "seed": 0}                      accuracy_linear, accuracy_fine_tune; new classes
    {"part": "unseen", "start": "mae", "method": "linear", "k": 10, "seed": 0}
                                                                      accuracy on three classes that it has never seen
    {"part": "moco", "variant": "no momentum", "seed": 0}            accuracy_knn, effective_rank, alignment, uniformity
    {"part": "lejepa", "variant": "no SIGReg", "seed": 0}             train_loss, chance, spectrum: a list of singular
    {"part": "mae", "variant": "ratio 0.5", "seed": 0}                values over the norm of the features

``start`` is one of random, supervised, moco, beit, mae, lejepa; or pixels: no encoder, only frozen. Every row has
``cpu_seconds``. The rate of each fine-tuning is the best of its start on held-out images, with 10 labels a class for
few, with 200 for 200, so that none is handicapped by another's; the range grows while the best is at its end. All are
fine-tuned for 120 steps of at most 32 images, on 200 of each class for 240. (The few images of "amount" all take 1e-3.)
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lesson_tuning import RATES as ALL_RATES
from benchmarks.lesson_tuning import widened
from benchmarks.sweeps import SEEDS, Row, sweep
from vitcourse import create_model, paths
from vitcourse.data import ImageDataset, hold_out, open_dataset, subset
from vitcourse.pretraining import (
    extract_features,
    features_by_depth,
    few_shot,
    few_shot_split,
    fine_tune,
    knn_accuracy,
    linear_probe,
    make_objective,
    provide_tokenizer,
    ridge_probe,
    split_classes,
)
from vitcourse.pretraining.transfer import Features, probe_accuracy
from vitcourse.train import TrainConfig, fit
from vitcourse.train.evaluation import evaluate
from vitcourse.vit import VisionTransformer

STARTS = ("random", "supervised", "moco", "beit", "mae", "lejepa")
PIXELS = "pixels"  # what every encoder must beat
ENCODER = {
    **{"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 96, "depth": 4, "num_heads": 4},
    **{"pos_embed": "sincos", "class_token": False, "global_pool": "avg"},
}
SHOTS = (1, 5, 10, 50, 200)
FROZEN = ("knn", "ridge", "linear")
RATES, TUNED = (3e-4, 1e-3, 3e-3), (10, 200)  # numbers of labels that rates are chosen at
UNSEEN = (1, 5, 8)  # trouser, sandal, bag: none of them has a twin among the other seven
AMOUNTS = (70, 700, 7000)  # images of the seven other classes
SEEN = 1400  # images of these that a start is trained on for new classes
ABLATED, DEPTH = 2000, 2  # images that each variant is trained on, and its blocks

# The recipes' options and passes, over few images.
VIEWS = {"min_crop": 0.3, "blur": 0.0, "solarize": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "moco": {**VIEWS, "hidden_dim": 256, "out_dim": 64},
    "lejepa": {**VIEWS, "hidden_dim": 256, "out_dim": 32, "directions": 128},
    "mae": {
        **{"mask_ratio": 0.75, "norm_pix": False, "min_crop": 1.0},
        **{"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4},
    },
    "beit": {
        **{"mask_ratio": 0.4, "min_block": 4, "min_crop": 1.0, "vocab_size": 256, "code_dim": 16},
        **{"tokenizer_dim": 64, "tokenizer_depth": 1, "tokenizer_epochs": 4},
    },
}
TRAINING = {
    "supervised": TrainConfig(epochs=10, batch_size=64, lr=2e-3, warmup=0.1, hflip=True),
    "moco": TrainConfig(epochs=5, batch_size=128, lr=1e-3, warmup=0.1, hflip=True),
    "lejepa": TrainConfig(epochs=6, batch_size=128, lr=1e-3, warmup=0.1, hflip=True),
    "mae": TrainConfig(epochs=12, batch_size=64, lr=2e-3, warmup=0.1, beta2=0.95, hflip=True),
    "beit": TrainConfig(epochs=10, batch_size=64, lr=1e-3, warmup=0.1, hflip=True),
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "random": {"not trained": {}},
    "moco": {
        "as published": {},
        "no momentum": {"key_momentum": 0.0},
        "no predictor": {"predictor": False},
        "patches trained": {"freeze_patches": False},
        "neither momentum nor predictor": {"key_momentum": 0.0, "predictor": False},
    },
    "lejepa": {"λ 0.05": {}, "λ 0.2": {"sigreg": 0.2}, "no SIGReg": {"sigreg": 0.0}},
    "mae": {
        **{f"ratio {ratio:g}": {"mask_ratio": ratio} for ratio in (0.5, 0.75, 0.9)},
        "ratio 0.75, norm_pix": {"norm_pix": True},
    },
}


def wanted(rows: list[Row]) -> Iterator[Row]:
    """Every run; a fine-tuning comes after the rates of its start are known."""
    for start in STARTS:
        for k in TUNED:
            named, rates, before = {"part": "rate", "start": start, "k": k}, RATES, None
            while rates != before:
                yield from ({**named, "lr": lr, "seed": -1} for lr in rates)
                before, rates = rates, widened(rates, ALL_RATES, best_rate(rows, **named))
    for seed in SEEDS:
        for start in (*STARTS, PIXELS):
            for k in SHOTS:
                yield from measured(rows, part="transfer", start=start, k=k, seed=seed)
        for start in STARTS:
            yield from ({"part": "depth", "start": start, "block": b, "seed": seed} for b in range(ENCODER["depth"]))
        for start in (*STARTS, PIXELS):
            for k in SHOTS[:-1]:
                yield from measured(rows, part="unseen", start=start, k=k, seed=seed)
        yield from ({"part": "amount", "images": n, "seed": seed} for n in AMOUNTS)
        for part, variants in VARIANTS.items():
            yield from ({"part": part, "variant": name, "seed": seed} for name in variants)


def measured(rows: list[Row], **named: Any) -> Iterator[Row]:
    """A start by each method."""
    yield from ({**named, "method": method} for method in FROZEN)
    if named["start"] == PIXELS:
        return
    tuned = max(k for k in TUNED if k <= max(named["k"], TUNED[0]))
    yield {**named, "method": "fine-tune", "lr": best_rate(rows, part="rate", start=named["start"], k=tuned)}


def best_rate(rows: list[Row], **where: Any) -> float:
    """The rate that did best on held-out images; the smaller of equals."""
    found = [row for row in rows if where.items() <= row.items()]
    return max(found, key=lambda row: (row["accuracy"], -row["lr"]))["lr"]


# ------------------------------------------------------------------------------------------------------ starts and data


def images_of(split: str = "train") -> ImageDataset:
    return open_dataset("fashion_mnist_subset", split)


def fresh_encoder(seed: int, **changes: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    encoder = create_model("vit_tiny", **{**ENCODER, **changes}, num_classes=0)
    encoder.preprocess = replace(encoder.preprocess, mean=images_of().mean, std=images_of().std)
    return encoder


def shipped(start: str) -> nn.Module:
    """One of the starts that come with the course; the random one has seed 0, as theirs."""
    if start == "random":
        return fresh_encoder(0)
    return create_model(paths.data_dir() / "weights" / f"fashion_mnist_{start}.safetensors")


@cache
def features(start: str, split: str) -> Features:
    if start == PIXELS:
        return pixels_of(images_of(split))
    return extract_features(shipped(start), images_of(split))


def pixels_of(data: ImageDataset) -> Features:
    return Features(data.images.flatten(1).float() / 255, torch.tensor(data.targets))


def pretrain(start: str, train_set: Any, seed: int, depth: int = 4, **options: Any) -> tuple[nn.Module, list[Row]]:
    """An encoder trained on ``train_set`` by one of the objectives, and its history."""
    encoder = fresh_encoder(seed, depth=depth)
    if start == "random":
        return encoder, []
    config = replace(TRAINING[start], seed=seed, eval_every=TRAINING[start].epochs)
    if start == "supervised":
        encoder.reset_classifier(len(train_set.classes))
        return encoder, fit(encoder, train_set, None, config, progress=False)
    model, task = make_objective(start, encoder, **{**OPTIONS[start], **options})
    if start == "beit":
        provide_tokenizer(model, task.options, train_set, config)
    return model, fit(model, train_set, None, config, progress=False, task=task)


def few_images(train_set: ImageDataset, k: int, seed: int) -> ImageDataset:
    return train_set.take(few_shot_split(train_set.targets, k, seed).tolist())


def tuning(images: int, lr: float, seed: int) -> TrainConfig:
    """120 steps of at most 32 images; twice as many where there are 2 000."""
    batch, steps = min(32, images), 120 if images < 2000 else 240
    return TrainConfig(
        epochs=-(-steps // (images // batch)),
        max_steps=steps,
        lr=lr,
        batch_size=batch,
        warmup=0.1,
        hflip=True,
        seed=seed,
    )


# ---------------------------------------------------------------------------------------------------------- the parts


def rate(run: Row) -> Row:
    rest, held = hold_out(images_of(), 0.1, seed=0)
    few = few_images(rest, run["k"], 0)
    config = tuning(len(few), run["lr"], 0)
    return {"accuracy": evaluate(fine_tune(shipped(run["start"]), few, config), held, config)["val_accuracy"]}


def transfer(run: Row) -> Row:
    frozen = tuple(features(run["start"], split) for split in ("train", "test"))
    model = nn.Identity() if run["start"] == PIXELS else shipped(run["start"])
    return {"accuracy": few_shots(run, model, frozen, (images_of(), images_of("test")))}


def few_shots(run: Row, model: nn.Module, frozen: Any, images: Any) -> float:
    """Accuracy on the second of ``frozen`` or ``images``, of k of each class of the first, by one method."""
    k, seed, (train, test) = run["k"], run["seed"], frozen
    few = train.take(few_shot_split(train.y.tolist(), k, seed))
    if run["method"] == "knn":
        return knn_accuracy(few, test, k=min(20, k))
    if run["method"] != "fine-tune":
        return probe_accuracy(ridge_probe(few) if run["method"] == "ridge" else linear_probe(few, seed=seed), test)
    config = tuning(len(few.y), run["lr"], seed)
    return evaluate(fine_tune(model, few_images(images[0], k, seed), config), images[1], config)["val_accuracy"]


def depth(run: Row) -> Row:
    """A ridge probe on 2 000 images behind one block."""
    train, test = (behind_blocks(run["start"], split, run["seed"])[run["block"]] for split in ("train", "test"))
    return {"accuracy": probe_accuracy(ridge_probe(train), test)}


@cache
def behind_blocks(start: str, split: str, seed: int) -> list[Features]:
    images = subset(images_of(), 2000, seed=seed) if split == "train" else images_of("test")
    return features_by_depth(shipped(start), images)


def classes_apart() -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """Images of the seven classes to pre-train on; images and test images of the three others."""
    (seen, unseen), (_, test) = split_classes(images_of(), UNSEEN), split_classes(images_of("test"), UNSEEN)
    return seen, unseen, test


def amount(run: Row) -> Row:
    """Supervised pre-training on so many images of seven classes; ten images of each of the three others."""
    seen, unseen, test = classes_apart()
    if run["images"] < len(seen):
        seen = few_images(seen, run["images"] // 7, run["seed"])
    encoder = fresh_encoder(run["seed"])
    encoder.reset_classifier(len(seen.classes))
    steps = 400
    config = replace(TRAINING["supervised"], batch_size=35, epochs=-(-steps // (len(seen) // 35)), max_steps=steps)
    fit(encoder, seen, None, replace(config, seed=run["seed"]), progress=False)
    found = few_shot(
        encoder, unseen, test, (10,), (run["seed"],), ("linear", "fine-tune"), tuning(30, 1e-3, run["seed"])
    )
    return {f"accuracy_{row['method'].replace('-', '_')}": row["accuracy"] for row in found} | {"steps": steps}


@cache
def taught_seven(start: str, seed: int) -> tuple[nn.Module, Features, Features]:
    """The encoder, and its features of the other classes; a sweep that goes on trains it once more."""
    seen, train, test = classes_apart()
    if start == PIXELS:
        return nn.Identity(), pixels_of(train), pixels_of(test)
    model = pretrain(start, subset(seen, SEEN), seed)[0]
    return model, extract_features(model, train), extract_features(model, test)


def unseen(run: Row) -> Row:
    model, train, test = taught_seven(run["start"], run["seed"])
    _, images, test_images = classes_apart()
    return {"accuracy": few_shots(run, model, (train, test), (images, test_images))}


def ablation(run: Row) -> Row:
    """One objective with one of its options changed: its features, and what 20 neighbours find in them."""
    options = VARIANTS[run["part"]][run["variant"]]
    model, history = pretrain(run["part"], subset(images_of(), ABLATED), run["seed"], DEPTH, **options)
    train, test = (extract_features(model, subset(images_of(split), 2000)) for split in ("train", "test"))
    kept, last = ("train_loss", "chance", "effective_rank", "alignment", "uniformity"), (history or [{}])[-1]
    return {
        "accuracy_knn": knn_accuracy(train, test),
        "spectrum": spectrum(test.x),
        **{name: last[name] for name in kept if name in last},
    }


def spectrum(x: Tensor) -> list[float]:
    """Singular values of centred features (N, D), over the norm of the features before: a collapse shows in all."""
    values = torch.linalg.svdvals(x - x.mean(0)) / torch.linalg.matrix_norm(x)
    return [round(value, 6) for value in values.tolist()]


PARTS = {
    **{
        "rate": rate,
        "transfer": transfer,
        "depth": depth,
        "amount": amount,
        "unseen": unseen,
    },
    **dict.fromkeys(VARIANTS, ablation),
}


def train(run: Row) -> Row:
    start = time.process_time()
    return {**PARTS[run["part"]](run), "cpu_seconds": round(time.process_time() - start, 1)}


if __name__ == "__main__":
    sweep("lesson_pretraining", __doc__, wanted, train)
