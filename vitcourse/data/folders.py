"""How the folders of a user are laid out: splits, classes, images; and that no file may lead out of them."""

import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".ts",
    ".wmv",
    ".flv",
    ".3gp",
    ".ogv",
)
SPLITS = ("train", "val", "test")
VAL_FOLDERS = ("val", "valid", "validation")
CLASSES_FILE = "classes.txt"
_ON_ERROR = ("raise", "skip")


def is_picture(name: str) -> bool:
    """Whether a file of this name is taken for a picture when a folder is read."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def is_video(name: str) -> bool:
    """Whether a file of this name is taken for a video when a folder is read."""
    return name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith(".")


def split_folder(top: Path, split: str) -> Path:
    """Where a split's files lie, or should lie.

    Raises ValueError for two folders that could both be ``"val"``.
    """
    if split != "val":
        return top / split
    there = [top / name for name in VAL_FOLDERS if (top / name).is_dir()]
    if len(there) > 1:
        raise ValueError(f"{top} has {' and '.join(path.name for path in there)}; keep one of them to validate on")
    return there[0] if there else top / "val"


def splits_of(top: Path) -> list[str]:
    """The splits that have a folder of their own."""
    return [split for split in SPLITS if split_folder(top, split).is_dir()]


def class_folders(folder: Path, layout: str) -> list[str]:
    """The classes' names, sorted; hidden folders, such as Jupyter's .ipynb_checkpoints, are none."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{folder} has no class folders; {layout}{found(folder)}")
    return names


def files_below(folder: Path, wanted: Any = is_picture) -> list[str]:
    """All files at any depth whose name is ``wanted``, sorted; without hidden ones, such as macOS's ._1.jpg."""
    files = []
    for base, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(base, name) for name in names if wanted(name)]
    return sorted(files)


def files_by_class(
    top: Path, split: str, wanted: Any, layout: str, kinds: str, suffixes: Sequence[str]
) -> dict[str, list[str]]:
    """The files of a split, a folder for each class; its classes are those of the training split.

    That a class has none in another split is said on stderr.

    Raises FileNotFoundError where a folder or its files are missing, ValueError for classes that train does not have.
    """
    folder, train = split_folder(top, split), top / "train"
    if not folder.is_dir():
        raise FileNotFoundError(f"{top} has no {split} split; {layout}{found(top)}")
    files = {name: files_below(folder / name, wanted) for name in class_folders(folder, layout)}
    if split != "train" and train.is_dir():
        return _as_in_training(files, class_folders(train, layout), folder, kinds, suffixes)
    if empty := [name for name, inside in files.items() if not inside]:
        raise FileNotFoundError(
            f"{folder / empty[0]} holds no {kinds} ({' '.join(suffixes)}); add some, or delete the folder"
        )
    return files


def _as_in_training(
    files: dict[str, list[str]], classes: list[str], folder: Path, kinds: str, suffixes: Sequence[str]
) -> dict[str, list[str]]:
    unknown = sorted(name for name, inside in files.items() if inside and name not in classes)
    if unknown:
        raise ValueError(
            f"{folder} has {kinds} of {', '.join(unknown)}, which {folder.parent / 'train'} does not have; "
            f"give the same classes {kinds} to train on, or delete these"
        )
    missing = [name for name in classes if not files.get(name)]
    if missing == classes:
        raise FileNotFoundError(f"{folder} holds no {kinds} ({' '.join(suffixes)}); add some, or delete it")
    if missing:
        few = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        print(f"vitcourse: {folder} has no {kinds} of {few}, which the model learns all the same", file=sys.stderr)
    return {name: files.get(name, []) for name in classes}


def found(folder: Path) -> str:
    """What a folder holds instead, for an error."""
    if not folder.is_dir():
        return f"but there is no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    return f"but {folder} holds {', '.join(names[:6]) or 'nothing'}{', ...' if len(names) > 6 else ''}"


def first_folder(top: Path, names: Sequence[str]) -> Path | None:
    """The first of several folders that is there."""
    return next((top / name for name in names if (top / name).is_dir()), None)


def inside(folder: Path, name: str, where: str) -> str:
    """The path of ``name`` in ``folder``, which it may not leave: not by .., as an absolute path, or by a link.

    Raises ValueError, naming ``where`` it stands, for a name that leads out, and FileNotFoundError for no file.
    """
    plain = str(name).replace("\\", "/")  # as Windows writes it
    path = os.path.join(folder, plain)
    home = os.path.realpath(folder)
    led = os.path.realpath(path)
    if not plain or os.path.isabs(plain) or plain[1:2] == ":" or os.path.commonpath([home, led]) != home:
        raise ValueError(f"{where} names {name!r}, which leads out of {folder}; only files inside are read")
    if not os.path.isfile(led):
        raise FileNotFoundError(f"{where} names {name!r}, which is not in {folder}; add the file, or delete the entry")
    return path


def read_classes(top: Path) -> list[str] | None:
    """The names in classes.txt, one a line; None where there is no such file.

    Raises ValueError for an empty file and a name that stands there twice.
    """
    file = top / CLASSES_FILE
    if not file.is_file():
        return None
    names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        raise ValueError(f"{file} {f'has {twice[0]!r} twice' if twice else 'is empty'}; write one class on each line")
    return names


def read_json(file: Path) -> Any:
    """What a JSON file holds; raises ValueError, which names it, for one that cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no usable JSON: {error}; export it anew") from error


def check_on_error(on_error: str) -> None:
    """Raise ValueError unless ``on_error`` is one that folders know."""
    if on_error not in _ON_ERROR:
        raise ValueError(f"on_error {on_error!r} is unknown; use 'raise', or 'skip' to leave out what is broken")


class Faults:
    """What is wrong in a folder: raised at once, or counted, and told in one line at the end.

    >>> faults = Faults("skip")
    >>> faults.add(ValueError("a.xml is empty"))
    >>> faults.count
    1
    """

    def __init__(self, on_error: str) -> None:
        check_on_error(on_error)
        self.on_error, self.count, self.first = on_error, 0, ""

    def add(self, error: Exception) -> None:
        """Raise ``error``, or remember it."""
        if self.on_error == "raise":
            raise error
        self.count, self.first = self.count + 1, self.first or str(error)

    def tell(self, what: str, of: Collection | int, source: Any) -> None:
        """Say on stderr how many were left out, and name the first."""
        if self.count:
            total = of if isinstance(of, int) else len(of)
            print(
                f"vitcourse: left out {self.count} of {total} {what} of {source}; the first: {self.first}",
                file=sys.stderr,
            )
