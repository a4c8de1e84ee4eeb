"""A folder with annotations in COCO's format (Lin et al., 2014): boxes, polygons, run lengths, crowds."""

import sys
from collections import defaultdict
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
        on_error: ``"raise"``, or ``"skip"`` to leave out boxes and images that cannot be used, which is said on stderr.
        crowd: keep regions that cover many objects (``iscrowd`` 1); to train without, and to evaluate with them.

    Boxes that reach out of the image are clipped to it; where that is by more than a pixel, it is said on stderr.
    Classes are the file's categories in the order of their ids. Raises as ``open_dataset`` does.
    """
    place = _find(top, split)
    if place is None:
        raise FileNotFoundError(f"coco:{top} has no {split} split; {_LAYOUT}{found(top)}")
    file, folders = place
    content, faults = _checked(read_json(file), file), Faults(on_error)
    ids = sorted(category["id"] for category in content["categories"])
    if len(set(ids)) != len(ids):
        raise ValueError(f"{file} has two categories with one id; give each an id of its own")
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    label_of, of_image = {number: k for k, number in enumerate(ids)}, defaultdict(list)
    known = {image["id"] for image in content["images"]}
    for entry in content["annotations"]:
        if entry.get("image_id") not in known:
            faults.add(
                ValueError(
                    f"{file}: annotation {entry.get('id')} is of image {entry.get('image_id')!r}, which is not listed"
                )
            )
        elif entry.get("category_id") not in label_of:
            faults.add(
                ValueError(
                    f"{file}: annotation {entry.get('id')} has category_id {entry.get('category_id')!r}, which is not "
                    f"among the {len(ids)} categories; add it there"
                )
            )
        elif crowd or not entry.get("iscrowd"):
            of_image[entry["image_id"]].append(entry)
    masks = any(entry.get("segmentation") for entries in of_image.values() for entry in entries)
    annotations, cut = [], 0
    for number, image in enumerate(content["images"]):
        try:
            path = _locate(folders, image["file_name"], f"{file}, image {image['id']}")
        except (ValueError, FileNotFoundError) as error:
            faults.add(error)
            continue
        image_id = image["id"] if isinstance(image["id"], int) else number
        annotation, clipped = _annotation(
            image, image_id, path, of_image[image["id"]], file, label_of, names, masks, faults
        )
        annotations.append(annotation)
        cut += clipped
    faults.tell("annotations and images", len(content["annotations"]) + len(content["images"]), file)
    if cut:
        print(
            f"vitcourse: {cut} boxes of {file} reach out of their images by more than a pixel; they are clipped",
            file=sys.stderr,
        )
    if not annotations:
        raise ValueError(f"{file} lists no image that can be used; add some")
    return AnnotatedImages(annotations, [names[number] for number in ids], transform=transform)


def _annotation(
    image: dict[str, Any],
    image_id: int,
    path: str,
    entries: list[dict[str, Any]],
    file: Path,
    label_of: dict[int, int],
    names: dict[int, str],
    masks: bool,
    faults: Faults,
) -> tuple[Annotation, int]:
    """One image's, and how many of its boxes were clipped."""
    size, where = (image["height"], image["width"]), f"{file}, image {image['file_name']}"
    called = [f"annotation {entry.get('id')} ({names[entry['category_id']]})" for entry in entries]
    boxes, usable, cut = check_boxes(_xyxy(entries, where, faults), called, size, where, faults)
    kept = [entry for entry, good in zip(entries, usable, strict=True) if good]
    without = [entry.get("id") for entry in kept if not entry.get("segmentation")]
    if masks and without:
        raise ValueError(
            f"{where}: annotation {without[0]} has no segmentation, but others have; give it one, or delete it"
        )
    return Annotation(
        file=path,
        image_id=image_id,
        where=str(file),
        size=size,
        boxes=boxes[usable],
        labels=np.array([label_of[entry["category_id"]] for entry in kept], dtype=np.int64),
        iscrowd=np.array([int(bool(entry.get("iscrowd"))) for entry in kept], dtype=np.int64),
        segmentations=tuple(entry["segmentation"] for entry in kept) if masks else None,
    ), cut


def _xyxy(entries: list[dict[str, Any]], where: str, faults: Faults) -> np.ndarray:
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
