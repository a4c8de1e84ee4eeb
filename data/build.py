"""Rebuild the embedded images from their complete sources, and take over the weights of a finished run.

    python data/build.py fashion_mnist --source DIR   # DIR/FashionMNIST/raw, as torchvision downloads it
    python data/build.py photos                       # needs scikit-image
    python data/build.py textures                     # needs scikit-image
    python data/build.py weights --source DIR --runs RUNS  # RUNS/vit/final.safetensors and others, as WEIGHTS has them

Each command rewrites one folder beside this file, its SHA256SUMS included; `weights` keeps those of which RUNS has no
folder. Only the data's makers need this: the library reads the folders and never scikit-image.
"""

import argparse
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
SEED = 0
SUBSET_SIZES = {"train": 10_000, "test": 2_000}
SIDE = 256
RENDERED = ("scenes", "moving")
# Our name -> scikit-image's. All are public domain or CC0 (README.md), and all lie in its wheel.
PHOTOS = {
    "astronaut": "astronaut",
    "cat": "chelsea",
    "coffee": "coffee",
    "galaxies": "hubble_deep_field",
    "photographer": "camera",
    "retina": "retina",
    "rocket": "rocket",
}
TEXTURES = {"brick": "brick", "grass": "grass", "gravel": "gravel"}
# What a run of ``vitcourse train`` leaves, by the name that we keep it under: classifiers, encoders, what paints, and
# what was trained on what is rendered.
WEIGHTS = {
    "fashion_mnist_vit": "vit/final",
    "fashion_mnist_supervised": "supervised/final",
    "fashion_mnist_moco": "moco/final",
    "fashion_mnist_lejepa": "lejepa/final",
    "fashion_mnist_beit": "beit/final",
    "fashion_mnist_mae": "mae/pretrainer",
    "scenes_segmenter": "scenes_segmenter/final",
}


def balanced_indices(targets: np.ndarray, per_class: int) -> np.ndarray:
    """Draw ``per_class`` positions of every class; in the source's order, so that the classes stay mixed."""
    random = np.random.RandomState(SEED)  # the legacy generator, because NumPy promises never to change its stream
    chosen = [random.permutation(np.flatnonzero(targets == label))[:per_class] for label in np.unique(targets)]
    return np.sort(np.concatenate(chosen))


def npz_bytes(**arrays: np.ndarray) -> bytes:
    """Pack arrays as ``np.savez`` does, but with LZMA, 14 % smaller, and a fixed date: same in, same out."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # else the archive would tell on which system it was made
            archive.writestr(info, member.getvalue(), compress_type=zipfile.ZIP_LZMA)
    return packed.getvalue()


def fashion_mnist(source: Path) -> dict[str, bytes]:
    """The class-balanced subset: {"train.npz": ..., "test.npz": ...}, each with images (N, 28, 28) and labels (N,)."""
    from torchvision.datasets import FashionMNIST

    files = {}
    for split, size in SUBSET_SIZES.items():
        complete = FashionMNIST(str(source), train=split == "train", download=False)
        labels = complete.targets.numpy().astype(np.uint8)
        indices = balanced_indices(labels, size // len(complete.classes))
        files[f"{split}.npz"] = npz_bytes(images=complete.data.numpy()[indices], labels=labels[indices])
    return files


def crops(names: dict[str, str]) -> dict[str, bytes]:
    """Centre squares at 256 px, as PNG: lossless, so that every machine decodes the same pixels."""
    import skimage.data

    files = {}
    for name, original in names.items():
        picture = Image.fromarray(getattr(skimage.data, original)())
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        packed = io.BytesIO()
        square.save(packed, "PNG", optimize=True)
        files[f"{name}.png"] = packed.getvalue()
    return files


def weights(runs: Path, source: Path) -> dict[str, bytes]:
    """The trained models as stored, in float16, and a record of where each comes from and how well it does."""
    files = {file.name: file.read_bytes() for file in (HERE / "weights").glob("*_*")}
    for name, place in WEIGHTS.items():
        file = runs / f"{place}.safetensors"
        if file.exists():
            files[f"{name}.safetensors"] = file.read_bytes()
            record = record_of(file, runs / Path(place).parts[0] / "final.safetensors", source)
            files[f"{name}.json"] = (json.dumps(record, indent=1) + "\n").encode()
    return files


def record_of(file: Path, run: Path, source: Path) -> dict[str, object]:
    """Command and seed, and what the images say that nobody has trained on: of a classifier, the accuracy; of an
    encoder, what 20 nearest neighbours among the embedded training images find in its features; of what was trained on
    rendered images or clips, what the run itself has found in the test split at its end."""
    import torch
    import torchvision

    from vitcourse import create_model
    from vitcourse.weights import read_metadata

    model, trained = create_model(file).eval(), read_metadata(run)
    if trained["data"] in RENDERED:
        tests = {name: value for name, value in trained.items() if name.startswith("test_") and value is not None}
    else:
        tests = asked(model, source)
    return {
        "command": trained["command"],
        "seed": trained["seed"],
        "parameters": sum(p.numel() for p in model.parameters()),
        **{name: round(value, 4) for name, value in tests.items()},
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }


def asked(model: Any, source: Path) -> dict[str, float]:
    """What a model of Fashion-MNIST knows about its test images."""
    from vitcourse.data import open_dataset
    from vitcourse.pretraining import extract_features, knn_accuracy
    from vitcourse.train import evaluate

    whole, embedded = open_dataset("fashion_mnist", "test", root=source), open_dataset("fashion_mnist_subset", "test")
    if getattr(model, "num_classes", 0):
        return {
            "accuracy": evaluate(model, whole)["val_accuracy"],
            "accuracy_embedded": evaluate(model, embedded)["val_accuracy"],
        }
    train = extract_features(model, open_dataset("fashion_mnist_subset"))
    return {"accuracy_knn_embedded": knn_accuracy(train, extract_features(model, embedded))}


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files and their SHA256SUMS (the format of ``sha256sum --check``)."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = []
    for name, content in sorted(files.items()):
        (folder / name).write_bytes(content)
        sums.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").write_text("".join(sums), newline="\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", choices=("fashion_mnist", "photos", "textures", "weights"))
    parser.add_argument("--source", type=Path, help="folder that holds FashionMNIST/raw")
    parser.add_argument("--runs", type=Path, help="folder of the finished training runs")
    arguments = parser.parse_args()
    if arguments.folder in ("photos", "textures"):
        files = crops(PHOTOS if arguments.folder == "photos" else TEXTURES)
    elif arguments.source is None:
        parser.error(f"{arguments.folder} needs --source DIR, the folder that holds FashionMNIST/raw")
    elif arguments.folder == "fashion_mnist":
        files = fashion_mnist(arguments.source)
    elif arguments.runs is None:
        parser.error("weights needs --runs DIR, the folder of the folders that the training commands wrote")
    else:
        files = weights(arguments.runs, arguments.source)
    write(HERE / arguments.folder, files)


if __name__ == "__main__":
    main()
