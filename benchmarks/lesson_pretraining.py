"""The comparisons of lesson 03 that it has no time to train: six starts of one small ViT, and what each is worth.

    python -m benchmarks.lesson_pretraining            what runs/lesson_pretraining.jsonl lacks, then the results
    python -m benchmarks.lesson_pretraining --runs 20  twenty of them, to share a machine

The shipped weights that some parts read come first. They are what the recipes leave, trained on all 60 000 images of
Fashion-MNIST, one seed, about half an hour on one core each:

    for name in supervised mae moco beit lejepa; do
        python -m vitcourse train --recipe fashion_mnist_$name --data-root DIR --out runs/$name
    done

    data/weights/fashion_mnist_supervised.safetensors  the encoder with its head of ten classes  (final)
    data/weights/fashion_mnist_moco.safetensors        the encoder                               (final)
    data/weights/fashion_mnist_beit.safetensors        the encoder                               (final)
    data/weights/fashion_mnist_lejepa.safetensors      the encoder                               (final)
    data/weights/fashion_mnist_mae.safetensors         encoder and decoder, which paints         (pretrainer)
    data/weights/fashion_mnist_tokenizer.safetensors   BEiT's visual tokenizer                   (tokenizer/final)

Rows of ``results/lesson_pretraining.json``: what a run is called by, and what it measured. All accuracies are shares of
the embedded 2 000 test images, or of those of the classes that are named.

    {"part": "labels rate", "images": 1000, "lr": 1e-3, "seed": -1}   accuracy on 1 000 held-out training images
    {"part": "labels", "images": 1000, "lr": 1e-3, "seed": 0}         accuracy; from scratch, with so many labels
    {"part": "rate", "start": "mae", "k": 10, "lr": 1e-3, "seed": -1} accuracy on 1 000 held-out training images
    {"part": "transfer", "start": "mae", "method": "linear", "k": 10, "seed": 0}
                                                                      accuracy; k 0: all images; "lr" where fine-tuned
    {"part": "depth", "start": "mae", "block": 3, "seed": 0}          accuracy of a ridge probe behind that block
    {"part": "amount", "images": 700, "seed": 0}                      accuracy_linear, accuracy_fine_tune; new classes
    {"part": "unseen", "start": "mae", "method": "linear", "k": 10, "seed": 0}
                                                                      accuracy on three classes that it has never seen
    {"part": "moco", "variant": "no momentum", "seed": 0}            accuracy_knn, effective_rank, alignment, uniformity
    {"part": "lejepa", "variant": "no SIGReg", "seed": 0}             train_loss, chance, spectrum: a list of singular
    {"part": "mae", "variant": "ratio 0.5", "seed": 0}                values over the norm of the features

``start`` is one of random, supervised, moco, beit, mae, lejepa. Every row has ``cpu_seconds``. The rate of each
fine-tuning is the best of its start and number of labels on held-out images, so that none is handicapped by another's.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

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
from vitcourse.pretraining.transfer import probe_accuracy
from vitcourse.train import TrainConfig, fit
from vitcourse.train.evaluation import evaluate
from vitcourse.vit import VisionTransformer

STARTS = ("random", "supervised", "moco", "beit", "mae", "lejepa")
ENCODER = {
    **{"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 96, "depth": 4, "num_heads": 4},
    **{"pos_embed": "sincos", "class_token": False, "global_pool": "avg"},
}
LABELS = (100, 300, 1000, 3000, 10000)
SHOTS, ALL = (1, 5, 10, 50), 0
FROZEN = ("knn", "ridge", "linear")
RATES = (3e-4, 1e-3, 3e-3)
UNSEEN = (1, 5, 8)  # trouser, sandal, bag: none of them has a twin among the other seven
AMOUNTS = (70, 700, 7000)  # images of the seven other classes

# The recipes' options, and passes over 10 000 images: about five minutes on one core each, by the recipes' times.
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
    "supervised": TrainConfig(epochs=20, batch_size=128, lr=2e-3, warmup=0.1, hflip=True),
    "moco": TrainConfig(epochs=4, batch_size=128, lr=1e-3, warmup=0.1, hflip=True),
    "lejepa": TrainConfig(epochs=5, batch_size=128, lr=1e-3, warmup=0.1, hflip=True),
    "mae": TrainConfig(epochs=14, batch_size=64, lr=2e-3, warmup=0.1, beta2=0.95, hflip=True),
    "beit": TrainConfig(epochs=7, batch_size=64, lr=1e-3, warmup=0.1, hflip=True),
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "moco": {
        "as published": {},
        "no momentum": {"key_momentum": 0.0},
        "no predictor": {"predictor": False},
        "patches trained": {"freeze_patches": False},
        "neither momentum nor predictor": {"key_momentum": 0.0, "predictor": False},
    },
    "lejepa": {"λ 0.05": {}, "λ 0.2": {"sigreg": 0.2}, "no SIGReg": {"sigreg": 0.0}},
    "mae": {
        **{f"ratio {ratio:g}": {"mask_ratio": ratio} for ratio in (0.25, 0.5, 0.75, 0.9)},
        "ratio 0.75, norm_pix": {"norm_pix": True},
    },
}


def wanted(rows: list[Row]) -> Iterator[Row]:
    """Every run, those whose weights are shipped first; a fine-tuning comes after the rates of its start are known."""
    yield from ({"part": "labels rate", "images": n, "lr": lr, "seed": -1} for n in LABELS for lr in RATES)
    for start in STARTS:
        for k in (*SHOTS, ALL):
            for lr in RATES:
                yield {"part": "rate", "start": start, "k": k, "lr": lr, "seed": -1}
    for seed in SEEDS:
        for n in LABELS:
            yield {"part": "labels", "images": n, "lr": best_rate(rows, part="labels rate", images=n), "seed": seed}
        for start in STARTS:
            for k in (*SHOTS, ALL):
                named = {"part": "transfer", "start": start, "k": k, "seed": seed}
                yield from ({**named, "method": method} for method in FROZEN)
                yield {**named, "method": "fine-tune", "lr": best_rate(rows, part="rate", start=start, k=k)}
            yield from ({"part": "depth", "start": start, "block": b, "seed": seed} for b in range(ENCODER["depth"]))
        yield from ({"part": "amount", "images": n, "seed": seed} for n in AMOUNTS)
        for start in STARTS:
            for k in SHOTS:
                named = {"part": "unseen", "start": start, "k": k, "seed": seed}
                yield from ({**named, "method": method} for method in FROZEN)
                yield {**named, "method": "fine-tune", "lr": best_rate(rows, part="rate", start=start, k=k)}
        for part, variants in VARIANTS.items():
            yield from ({"part": part, "variant": name, "seed": seed} for name in variants)


def best_rate(rows: list[Row], **where: Any) -> float:
    """The rate that did best on held-out images; the smaller of equals."""
    found = [row for row in rows if where.items() <= row.items()]
    return max(found, key=lambda row: (row["accuracy"], -row["lr"]))["lr"]


# ------------------------------------------------------------------------------------------------------ starts and data


def images_of(split: str = "train") -> ImageDataset:
    return open_dataset("fashion_mnist_subset", split)


def fresh_encoder(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return create_model("vit_tiny", **ENCODER, num_classes=0)


def shipped(start: str) -> nn.Module:
    """One of the starts that come with the course; the random one has seed 0, as theirs."""
    if start == "random":
        return fresh_encoder(0)
    return create_model(paths.data_dir() / "weights" / f"fashion_mnist_{start}.safetensors")


@cache
def features(start: str, split: str) -> Any:
    return extract_features(shipped(start), images_of(split))


def pretrain(start: str, train_set: ImageDataset, seed: int, **options: Any) -> tuple[nn.Module, list[Row]]:
    """An encoder trained on ``train_set`` by one of the objectives, and its history."""
    encoder = fresh_encoder(seed)
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
    return train_set if k == ALL else train_set.take(few_shot_split(train_set.targets, k, seed).tolist())


def tuning(k: int, lr: float, seed: int, images: int) -> TrainConfig:
    """50 passes over few images, 10 over all."""
    epochs = 10 if k == ALL else 50
    return TrainConfig(epochs=epochs, lr=lr, batch_size=min(64, images), warmup=0.1, hflip=True, seed=seed)


# ---------------------------------------------------------------------------------------------------------- the parts


def from_scratch(images: int, lr: float, seed: int, train_set: ImageDataset, test_set: ImageDataset) -> float:
    """As many steps as 10 000 images get in 10 passes, but at most 300 passes."""
    if images < len(train_set):
        train_set = few_images(train_set, images // 10, seed)
    model = fresh_encoder(seed)
    model.reset_classifier(10)
    steps = min(10 * 10000, 300 * len(train_set)) // 50
    epochs = -(-steps // (len(train_set) // 50))
    config = TrainConfig(epochs=epochs, max_steps=steps, batch_size=50, lr=lr, warmup=0.1, hflip=True, seed=seed)
    fit(model, train_set, None, config, progress=False)
    return evaluate(model, test_set, config)["val_accuracy"]


def labels(run: Row) -> Row:
    return {"accuracy": from_scratch(run["images"], run["lr"], run["seed"], images_of(), images_of("test"))}


def labels_rate(run: Row) -> Row:
    return {"accuracy": from_scratch(run["images"], run["lr"], 0, *hold_out(images_of(), 0.1, seed=0))}


def rate(run: Row) -> Row:
    rest, held = hold_out(images_of(), 0.1, seed=0)
    few = few_images(rest, run["k"], 0)
    config = tuning(run["k"], run["lr"], 0, len(few))
    return {"accuracy": evaluate(fine_tune(shipped(run["start"]), few, config), held, config)["val_accuracy"]}


def transfer(run: Row) -> Row:
    start, k, seed = run["start"], run["k"], run["seed"]
    if run["method"] == "fine-tune":
        few = few_images(images_of(), k, seed)
        config = tuning(k, run["lr"], seed, len(few))
        tuned = fine_tune(shipped(start), few, config)
        return {"accuracy": evaluate(tuned, images_of("test"), config)["val_accuracy"]}
    train, test = features(start, "train"), features(start, "test")
    if k != ALL:
        train = train.take(few_shot_split(train.y.tolist(), k, seed))
    if run["method"] == "knn":
        return {"accuracy": knn_accuracy(train, test, k=20 if k == ALL else min(20, k))}
    probe = ridge_probe(train) if run["method"] == "ridge" else linear_probe(train, seed=seed)
    return {"accuracy": probe_accuracy(probe, test)}


def depth(run: Row) -> Row:
    """A ridge probe on 2 000 images behind one block."""
    few = subset(images_of(), 2000, seed=run["seed"])
    train, test = (features_by_depth(shipped(run["start"]), data)[run["block"]] for data in (few, images_of("test")))
    return {"accuracy": probe_accuracy(ridge_probe(train), test)}


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
    steps = min(20 * 7000, 300 * len(seen)) // 35
    config = replace(TRAINING["supervised"], batch_size=35, epochs=-(-steps // (len(seen) // 35)), max_steps=steps)
    fit(encoder, seen, None, replace(config, seed=run["seed"]), progress=False)
    found = few_shot(encoder, unseen, test, (10,), (run["seed"],), ("linear", "fine-tune"))
    return {f"accuracy_{row['method'].replace('-', '_')}": row["accuracy"] for row in found} | {"steps": steps}


@cache
def pretrained_on_seven(start: str, seed: int) -> nn.Module:
    """Kept for the sixteen transfers that need it; a sweep that goes on trains it once more."""
    return pretrain(start, classes_apart()[0], seed)[0]


def unseen(run: Row) -> Row:
    _, train, test = classes_apart()
    model = pretrained_on_seven(run["start"], run["seed"])
    config = tuning(run["k"], run.get("lr", 1e-3), run["seed"], 3 * run["k"])
    (row,) = few_shot(model, train, test, (run["k"],), (run["seed"],), (run["method"],), config)
    return {"accuracy": row["accuracy"]}


def ablation(run: Row) -> Row:
    """One objective with one of its options changed: its features, and what 20 neighbours find in them."""
    options = VARIANTS[run["part"]][run["variant"]]
    model, history = pretrain(run["part"], images_of(), run["seed"], **options)
    train, test = (extract_features(model, images_of(split)) for split in ("train", "test"))
    kept = ("train_loss", "chance", "effective_rank", "alignment", "uniformity")
    return {
        "accuracy_knn": knn_accuracy(train, test),
        "spectrum": spectrum(test.x),
        **{name: history[-1].get(name) for name in kept},
    }


def spectrum(x: Tensor) -> list[float]:
    """Singular values of centred features (N, D), over the norm of the features before: a collapse shows in all."""
    values = torch.linalg.svdvals(x - x.mean(0)) / torch.linalg.matrix_norm(x)
    return [round(value, 6) for value in values.tolist()]


PARTS = {
    **{
        "labels": labels,
        "labels rate": labels_rate,
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
