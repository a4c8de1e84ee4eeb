"""What pruning costs in accuracy and brings in time, on the ViT whose weights come with the course.

    python -m benchmarks.pruning    what runs/pruning.jsonl lacks for these weights (16 minutes for all), the results

* ``alone``: one head removed, or all heads of a layer but one.
* ``ranking``: units ranked in four ways and removed, no training afterwards.
* ``zeros``: the smallest weights set to zero, unstructured and 2:4.
* ``finetuned``: pruned in two rounds, each followed by an epoch on the 10 000 embedded images, in which the whole
  model is the teacher (Hinton et al. 2015), for its logits say more than 10 000 labels; three seeds. All these images
  rank the units: with a thousand, one choice of them in three ended a point lower.
* ``control``: the whole model after the same two epochs, for what the training alone does. As it starts as its own
  teacher, that can only do harm.
* ``speed``: whole against pruned model, in turns, by batch size; one thread. At the target it is the fine-tuned model
  of the first seed, at the other ratios what the Taylor score leaves at once.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import in_turns, ratio, write_results
from vitcourse import create_model
from vitcourse.data import open_dataset, subset
from vitcourse.hardware.prune import count_macs, keep_units, magnitude_prune, prune_like, prune_model, structure
from vitcourse.paths import data_dir
from vitcourse.train import TrainConfig, evaluate, fit

LOG = Path("runs/pruning.jsonl")
WEIGHTS = data_dir() / "weights" / "fashion_mnist_vit.safetensors"
TARGET = 0.6  # 40 % fewer multiply–adds
ROUNDS = 2  # of pruning and fine-tuning
RATIOS = (0.85, 0.7, 0.6, 0.5, 0.4)
SEEDS = (0, 1, 2)
Row = dict[str, Any]


def original() -> nn.Module:
    return create_model(WEIGHTS).eval()


def accuracy(model: nn.Module) -> float:
    return evaluate(model, open_dataset("fashion_mnist_subset", "test"))["val_accuracy"]


def calibration(seed: int = 0) -> Any:
    return subset(open_dataset("fashion_mnist_subset"), 1000, seed=seed)


def share(model: nn.Module) -> float:
    image = torch.zeros(1, 1, 28, 28)
    return count_macs(model, image) / count_macs(original(), image)


# Scores are divided by what a unit costs, and a head costs as much as 60 channels. So the rivals below grow with the
# number of a unit's weights, or all heads would be the first to go.


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """A unit's worth as the squared size of all weights that lead into it and out of it."""
    scores = {}
    for name, units in structure(model).items():
        layer = model.get_submodule(name)
        inlet, outlet = (layer.qkv, layer.proj) if hasattr(layer, "qkv") else (layer.fc1, layer.fc2)
        parts = 3 if hasattr(layer, "qkv") else 1
        into = inlet.weight.detach().unflatten(0, (parts, units, -1)).square().sum((0, 2, 3))
        scores[name] = into + outlet.weight.detach().unflatten(1, (units, -1)).square().sum((0, 2))
    return scores


def products(model: nn.Module) -> dict[str, Tensor]:
    """The size of the weights that lead into a unit, times that of those that lead out, over its layer's mean.

    A sum calls a unit large that has large weights on one side and none on the other, and compares layers whose weights
    differ in size. Of a head these are the values and the projection. On training images, untrained, this was the best
    of five such scores.
    """
    scores = {}
    for name, units in structure(model).items():
        layer = model.get_submodule(name)
        inlet, outlet = (layer.qkv, layer.proj) if hasattr(layer, "qkv") else (layer.fc1, layer.fc2)
        parts = 3 if hasattr(layer, "qkv") else 1
        into = inlet.weight.detach().unflatten(0, (parts, units, -1))[-1].square().sum((1, 2)).sqrt()
        out_of = outlet.weight.detach().unflatten(1, (units, -1)).square().sum((0, 2)).sqrt()
        weights = sum(p.numel() for p in layer.parameters()) / units
        scores[name] = weights * into * out_of / (into * out_of).mean()
    return scores


def at_random(seed: int) -> Callable[[nn.Module], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def importance(model: nn.Module) -> dict[str, Tensor]:
        weights = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in structure(model)}
        return {name: torch.rand(n, generator=generator) * weights[name] / n for name, n in structure(model).items()}

    return importance


def ranking(how: str, macs: float, seed: int) -> Row:
    """``taylor`` draws its calibration images by the seed, ``random`` its ranks; in the others is no chance."""
    importance = {"taylor": None, "magnitude": magnitudes, "product": products, "random": at_random(seed)}[how]
    pruned = prune_model(original(), calibration(seed), macs=macs, rounds=1, importance=importance)
    return {"macs": share(pruned), "accuracy": accuracy(pruned), "structure": structure(pruned)}


def alone(layer: str, head: int, left: bool) -> Row:
    """Without this head; or, if ``left``, with no other head in the layer."""
    heads = structure(original())[layer]
    keep = [head] if left else [h for h in range(heads) if h != head]
    return {"accuracy": accuracy(keep_units(original(), {layer: keep}))}


def zeros(pattern: str, sparsity: float) -> Row:
    return {"accuracy": accuracy(magnitude_prune(original(), sparsity, pattern=pattern))}


def epoch(seed: int) -> Callable[[nn.Module], None]:
    """Trains a model for one epoch, the whole one being its teacher."""
    train_set, teacher = open_dataset("fashion_mnist_subset"), original()
    config = TrainConfig(epochs=1, batch_size=64, lr=5e-4, warmup=0.1, hflip=True, seed=seed)

    def distil(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(images).log_softmax(-1)
        return F.kl_div(model(images).log_softmax(-1), wanted, log_target=True, reduction="batchmean")

    return lambda model: fit(model, train_set, config=config, loss_fn=distil, progress=False)


def finetuned(macs: float, seed: int) -> Row:
    train_set, start = open_dataset("fashion_mnist_subset"), time.process_time()
    pruned = prune_model(original(), train_set, macs=macs, rounds=ROUNDS, finetune=epoch(seed))
    return {
        "macs": share(pruned),
        "accuracy": accuracy(pruned),
        "parameters": sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in original().parameters()),
        "cpu_seconds": time.process_time() - start,
        "structure": structure(pruned),
    }


def control(seed: int) -> Row:
    model, train, start = original(), epoch(seed), time.process_time()
    for _ in range(ROUNDS):
        train(model)
    return {"accuracy": accuracy(model), "cpu_seconds": time.process_time() - start}


def speed(macs: float, batch: int, seed: int | None = None) -> Row:
    """How many times as fast the pruned model is; above 1 is faster. With a seed, the one fine-tuned with it."""
    if seed is None:
        pruned = prune_model(original(), calibration(), macs=macs, rounds=1)
    else:  # untrained weights take as much time
        pruned = prune_like(original(), structure_of({"question": "finetuned", "macs": macs, "seed": seed}))
    model, x = original(), torch.randn(batch, 1, 28, 28)
    with torch.inference_mode():
        taken = in_turns({"whole": lambda: model(x), "pruned": lambda: pruned(x)}, "cpu", rounds=max(20, 500 // batch))
    return {
        "macs": share(pruned),
        **ratio(taken["whole"], taken["pruned"]),
        "milliseconds": 1e3 * min(taken["pruned"]),
        "structure": structure(pruned),
    }


def whole() -> Row:
    return {"accuracy": accuracy(original()), "parameters": sum(p.numel() for p in original().parameters())}


QUESTIONS: dict[str, Callable[..., Row]] = {
    "whole": whole,
    "alone": alone,
    "ranking": ranking,
    "zeros": zeros,
    "finetuned": finetuned,
    "control": control,
    "speed": speed,
}


def plan() -> Iterator[Row]:
    """Every measurement: its question, and the arguments of the function that answers it."""
    yield {"question": "whole"}
    for layer, heads in structure(original()).items():
        if layer.endswith("attn"):
            for head in range(heads):
                for left in (False, True):
                    yield {"question": "alone", "layer": layer, "head": head, "left": left}
    for how, seeds in (("taylor", SEEDS), ("magnitude", (0,)), ("product", (0,)), ("random", SEEDS)):
        for macs in RATIOS:
            for seed in seeds:
                yield {"question": "ranking", "how": how, "macs": macs, "seed": seed}
    for sparsity in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
        yield {"question": "zeros", "pattern": "unstructured", "sparsity": sparsity}
    yield {"question": "zeros", "pattern": "2:4", "sparsity": 0.5}
    for seed in SEEDS:
        yield {"question": "finetuned", "macs": TARGET, "seed": seed}
        yield {"question": "control", "seed": seed}
    for batch in (1, 16, 128):
        yield {"question": "speed", "macs": TARGET, "batch": batch, "seed": SEEDS[0]}
        for macs in (0.8, 0.4):
            yield {"question": "speed", "macs": macs, "batch": batch}


def measured() -> dict[str, Row]:
    """Rows of the log that were measured with these weights, by what was asked."""
    rows = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()] if LOG.exists() else []
    weights = digest()
    return {row["key"]: row["row"] for row in rows if row["weights"] == weights}


def digest() -> str:
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def structure_of(task: Row) -> dict[str, int]:
    """What an earlier measurement left of the model."""
    rows, key = measured(), json.dumps(task)
    if key not in rows:
        raise SystemExit(f"{key} is not in {LOG} yet; measure it first")
    return rows[key]["structure"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    LOG.parent.mkdir(exist_ok=True)
    done, everything = measured(), [(json.dumps(task), task) for task in plan()]
    for key, task in everything:
        if key in done or task["question"] not in options.questions:
            continue
        arguments = {name: value for name, value in task.items() if name != "question"}
        result = QUESTIONS[task["question"]](**arguments)
        asked = {"target" if name == "macs" else name: value for name, value in task.items()}
        done[key] = {**asked, **result}
        with LOG.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"weights": digest(), "key": key, "row": done[key]}) + "\n")
        print(done[key], flush=True)
    if all(key in done for key, _ in everything):
        write_results("pruning", [done[key] for key, _ in everything])


if __name__ == "__main__":
    main()
