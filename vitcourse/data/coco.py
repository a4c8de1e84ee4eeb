"""A folder with annotations in COCO's format (Lin et al., 2014): boxes, polygons, run lengths, crowds."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vitcourse.data.annotated import AnnotatedImages, Annotation, check_boxes
from vitcourse.data.folders import SPLITS, VAL_FOLDERS, Faults, found, inside, read_json, split_folder

_LAYOUT = """expected one of
    PATH/annotations/instances_train2017.json  PATH/train2017/1.jpg     as COCO has it, or PATH/images/1.jpg
    PATH/train/_annotations.coco.json          PATH/train/1.jpg         as exported by labelling tools
    PATH/annotations.json                      PATH/images/1.jpg        without splits
"""


def coco_splits(top: Path) -> list[str]:
    """Which splits a folder has; one file that names none is all to train on."""
    return [split for split in SPLITS if _find(top, split) is not None]


def open_coco(
    top: Path, split: str, *, transform: Callable | None = None, on_error: str = "raise", crowd: bool = True
) -> AnnotatedImages:
    """Open a split of a folder with COCO's annotations.

    Args:
        top: the folder.
        split: one of ``coco_splits``.
        transform: called with (image, target).
        on_error: ``"raise"``, or ``"skip"`` to leave out boxes and images that cannot be used, for which each
            picture is read once, and which is said on stderr.
        crowd: keep regions that cover many objects (``iscrowd`` 1); to train without, and to evaluate with them.

    Boxes that reach out of the image are clipped to it; where that is by more than a pixel, it is said on stderr.
    Classes are the categories of the training split in the order of their ids; in the others, names, not ids, say which
    is which. Raises as ``open_dataset`` does.
    """
    place = _find(top, split)
    if place is None:
        raise FileNotFoundError(f"coco:{top} has no {split} split; {_LAYOUT}{found(top)}")
    file, folders = place
    content, faults = _checked(read_json(file), file), Faults(on_error)
    names = _names(content, file)
    classes = list(names.values()) if split == "train" else _train_classes(top) or list(names.values())
    of_image = _by_image(content, names, classes, file, faults)
    if not crowd:
        of_image = {key: [e for e in entries if not e.get("iscrowd")] for key, entries in of_image.items()}
    masks = any(entry.get("segmentation") for entries in of_image.values() for entry in entries)
    annotations, cut = [], 0
    for image in content["images"]:
        try:
            path = _locate(folders, image["file_name"], f"{file}, image {image['id']}")
        except (ValueError, FileNotFoundError) as error:
            faults.add(error)
            continue
        annotation, clipped = _annotation(image, path, of_image[image["id"]], file, names, classes, masks, faults)
        annotations.append(annotation)
        cut += clipped
    if cut:
        print(
            f"vitcourse: {cut} boxes of {file} reach out of their images by more than a pixel; they are clipped",
            file=sys.stderr,
        )
    told = ("annotations and images", len(content["annotations"]) + len(content["images"]), file)
    if not annotations:
        faults.tell(*told)
        raise ValueError(f"{file} lists no image that can be used; add some")
    dataset = AnnotatedImages(annotations, classes, transform=transform).usable(faults)
    faults.tell(*told)
    return dataset


def _names(content: dict[str, Any], file: Path) -> dict[int, str]:
    """The categories' names by their ids, in the order of these."""
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    if len(set(names.values())) != len(content["categories"]):
        raise ValueError(f"{file} has two categories of one name; give each its own")
    return {key: names[key] for key in sorted(names)}


def _train_classes(top: Path) -> list[str] | None:
    place = _find(top, "train")
    return list(_names(_checked(read_json(place[0]), place[0]), place[0]).values()) if place else None


def _by_image(
    content: dict[str, Any], names: dict[int, str], classes: list[str], file: Path, faults: Faults
) -> dict[Any, list[dict[str, Any]]]:
    """The annotations that can be used, by image."""
    of_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        called = f"{file}: annotation {entry.get('id')}"
        image, category = entry.get("image_id"), entry.get("category_id")
        if not isinstance(image, int) or image not in of_image:
            faults.add(ValueError(f"{called} is of image {image!r}, which is not listed; add it there"))
        elif not isinstance(category, int) or category not in names:
            few = f"which is not among the {len(names)} categories"
            faults.add(ValueError(f"{called} has category_id {category!r}, {few}; add it there"))
        elif names[category] not in classes:
            faults.add(ValueError(f"{called} is of {names[category]!r}, which the training split does not have"))
        else:
            of_image[image].append(entry)
    return of_image


def _annotation(
    image: dict[str, Any],
    path: str,
    entries: list[dict[str, Any]],
    file: Path,
    names: dict[int, str],
    classes: list[str],
    masks: bool,
    faults: Faults,
) -> tuple[Annotation, int]:
    """One image's, and how many of its boxes were clipped."""
    size, where = (image["height"], image["width"]), f"{file}, image {image['file_name']}"
    called = [f"annotation {entry.get('id')} ({names[entry['category_id']]})" for entry in entries]
    boxes, usable, cut = check_boxes(_xyxy(entries, where), called, size, where, faults)
    kept = [entry for entry, good in zip(entries, usable, strict=True) if good]
    without = [entry.get("id") for entry in kept if not entry.get("segmentation")]
    if masks and without:
        raise ValueError(
            f"{where}: annotation {without[0]} has no segmentation, but others have; give it one, or delete it"
        )
    return Annotation(
        file=path,
        image_id=image["id"],
        where=str(file),
        size=size,
        boxes=boxes[usable],
        labels=np.array([classes.index(names[entry["category_id"]]) for entry in kept], dtype=np.int64),
        iscrowd=np.array([int(bool(entry.get("iscrowd"))) for entry in kept], dtype=np.int64),
        segmentations=tuple(entry["segmentation"] for entry in kept) if masks else None,
    ), cut


def _xyxy(entries: list[dict[str, Any]], where: str) -> np.ndarray:
    """COCO's boxes are (x, y, width, height), from 0."""
    boxes = np.full((len(entries), 4), np.nan)
    for box, entry in zip(boxes, entries, strict=True):
        try:
            x, y, width, height = (float(value) for value in entry["bbox"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: annotation {entry.get('id')} has no bbox [x, y, width, height]; add it"
            ) from error
        box[:] = x, y, x + width, y + height
    return boxes


def _checked(content: Any, file: Path) -> dict[str, list[dict[str, Any]]]:
    """The three lists of COCO's format, whose entries have what is needed."""
    needed = {"images": ("id", "file_name", "height", "width"), "annotations": (), "categories": ("id", "name")}
    for key, fields in needed.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{file} has no list {key!r}; it is not in COCO's format for detection")
        for k, entry in enumerate(entries):
            if lacking := [field for field in fields if field not in entry]:
                raise ValueError(f"{file}: entry {k} of {key!r} has no {lacking[0]!r}; add it")
    for key in ("images", "categories"):
        ids = [entry["id"] for entry in content[key]]
        if not all(isinstance(number, int) for number in ids) or len(set(ids)) != len(ids):
            raise ValueError(f"{file}: the ids of {key!r} must be integers, each another; correct them")
    for image in content["images"]:
        if not all(isinstance(image[side], int) and image[side] > 0 for side in ("height", "width")):
            raise ValueError(f"{file}: image {image['file_name']!r} has no height and width in pixels; correct them")
    return content


def _find(top: Path, split: str) -> tuple[Path, list[Path]] | None:
    """The file of a split's annotations, and the folders in which its images may lie."""
    own = split_folder(top, split)
    if files := _json_files(own):
        return _only(files, split), [own, own / "images"]
    years = sorted(path for path in top.glob(f"{split}[0-9]*") if path.is_dir()) if top.is_dir() else []
    homes = [own, *years, top / "images" / split, top / "images", top]
    everything = _json_files(top / "annotations") or _json_files(top)
    words = VAL_FOLDERS if split == "val" else (split,)
    if files := [file for file in everything if any(word in file.stem.lower() for word in words)]:
        return _only([file for file in files if file.stem.startswith("instances")] or files, split), homes
    named = any(word in file.stem.lower() for file in everything for word in (*VAL_FOLDERS, "train", "test"))
    return (_only(everything, split), homes) if everything and split == "train" and not named else None


def _json_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.json") if not file.name.startswith(".")) if folder.is_dir() else []


def _only(files: list[Path], split: str) -> Path:
    if len(files) > 1:
        raise ValueError(
            f"{files[0].parent} has {' and '.join(file.name for file in files[:3])} for {split}; keep one of them"
        )
    return files[0]


def _locate(folders: list[Path], name: Any, where: str) -> str:
    there = [folder for folder in folders if folder.is_dir()]
    missing = None
    for folder in there:
        try:
            return inside(folder, name, where)
        except FileNotFoundError as error:
            missing = missing or error
    raise missing or FileNotFoundError(f"{where} names {name!r}, but there is no folder of images; {_LAYOUT}")
