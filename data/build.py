"""Rebuild the embedded images from their complete sources, and take over the weights of a finished run.

    python data/build.py fashion_mnist --source DIR   # DIR/FashionMNIST/raw, as torchvision downloads it
    python data/build.py photos                       # needs scikit-image
    python data/build.py textures                     # needs scikit-image
    python data/build.py weights --source DIR --run RUN  # RUN/final.safetensors, from python -m vitcourse.train

Each command rewrites one folder beside this file, its SHA256SUMS included. Only the data's makers need this: the
library reads the folders and never scikit-image.
"""

import argparse
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
SEED = 0
SUBSET_SIZES = {"train": 10_000, "test": 2_000}
SIDE = 256
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


def weights(run: Path, source: Path) -> dict[str, bytes]:
    """The trained ViT as stored, in float16, and a record of where it comes from and how well it does."""
    import torch
    import torchvision

    from vitcourse import create_model
    from vitcourse.data import open_dataset
    from vitcourse.train import evaluate
    from vitcourse.weights import read_metadata

    file = run / "final.safetensors"
    model, metadata = create_model(file).eval(), read_metadata(file)
    tests = {
        "accuracy": open_dataset("fashion_mnist", "test", root=source),
        "accuracy_embedded": open_dataset("fashion_mnist_subset", "test"),
    }
    record = {
        "command": metadata["command"],
        "seed": metadata["seed"],
        "parameters": sum(p.numel() for p in model.parameters()),
        **{name: round(evaluate(model, dataset)["val_accuracy"], 4) for name, dataset in tests.items()},
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    return {
        "fashion_mnist_vit.safetensors": file.read_bytes(),
        "fashion_mnist_vit.json": (json.dumps(record, indent=1) + "\n").encode(),
    }


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
    parser.add_argument("--run", type=Path, help="folder of the finished training run")
    arguments = parser.parse_args()
    if arguments.folder in ("photos", "textures"):
        files = crops(PHOTOS if arguments.folder == "photos" else TEXTURES)
    elif arguments.source is None:
        parser.error(f"{arguments.folder} needs --source DIR, the folder that holds FashionMNIST/raw")
    elif arguments.folder == "fashion_mnist":
        files = fashion_mnist(arguments.source)
    elif arguments.run is None:
        parser.error("weights needs --run DIR, the folder that the training command wrote")
    else:
        files = weights(arguments.run, arguments.source)
    write(HERE / arguments.folder, files)


if __name__ == "__main__":
    main()
