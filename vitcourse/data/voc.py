"""A folder with annotations in the format of PASCAL VOC (Everingham et al., 2010): an XML file for each image."""

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from xml.parsers import expat

import numpy as np

from vitcourse.data.annotated import AnnotatedImages, Annotation, check_boxes
from vitcourse.data.folders import SPLITS, Faults, first_folder, found, inside, read_classes, split_folder, splits_of

_IMAGES, _XML = ("JPEGImages", "images", "image", "imgs"), ("Annotations", "annotations", "annotation", "xml")
_LARGEST = 4 * 2**20  # bytes; VOC's own files have less than 10 000
_LAYOUT = """expected one of
    PATH/Annotations/1.xml        PATH/JPEGImages/1.jpg   (or annotations, images)
    PATH/train/annotations/1.xml  PATH/train/images/1.jpg, or both in PATH/train; so for val and test
with PATH/ImageSets/Main/train.txt, val.txt, test.txt, where the first is split
"""


def voc_splits(top: Path) -> list[str]:
    """Which splits a folder has; without any, all is to train on."""
    if split_folder(top, "train").is_dir():
        return splits_of(top)
    sets = top / "ImageSets" / "Main"
    if listed := [split for split in SPLITS if (sets / f"{split}.txt").is_file()]:
        return listed
    return ["train"] if _folders(top) else []


def open_voc(top: Path, split: str, *, transform: Callable | None = None, on_error: str = "raise") -> AnnotatedImages:
    """Open a split of a folder with VOC's annotations.

    Args:
        top: the folder.
        split: one of ``voc_splits``.
        transform: called with (image, target).
        on_error: ``"raise"``, or ``"skip"`` to leave out boxes and files that cannot be used, for which each picture
            is read once, and which is said on stderr.

    Coordinates are VOC's: pixels counted from 1, the last one inclusive; ``boxes`` count from 0 to the far edge.
    Classes are the names in classes.txt, or else those of the training split, sorted. Objects marked ``difficult`` are
    objects.

    Document types and entities are refused: they can name other files, and grow without end.
    """
    if split not in voc_splits(top):
        raise FileNotFoundError(f"voc:{top} has no {split} split; {_LAYOUT}{found(top)}")
    faults = Faults(on_error)
    parsed = _parse_split(top, split, faults)
    classes = read_classes(top) or sorted(
        {name for _, tree in (parsed if split == "train" else _train(top)) for name in _names(tree)}
    )
    if not classes:
        raise ValueError(f"voc:{top} has no objects to train on; label some")
    label_of, annotations, cut = {name: k for k, name in enumerate(classes)}, [], 0
    images = _folders(split_folder(top, split)) or _folders(top)
    for number, (file, tree) in enumerate(parsed):
        try:
            annotation, clipped = _annotation(file, tree, number, images[0], label_of, faults)
        except (ValueError, FileNotFoundError) as error:
            faults.add(error)
            continue
        annotations.append(annotation)
        cut += clipped
    if cut:
        print(
            f"vitcourse: {cut} boxes of voc:{top} reach out of their images by more than a pixel; they are clipped",
            file=sys.stderr,
        )
    told = ("boxes and files", sum(len(tree.findall("object")) for _, tree in parsed) + len(parsed), f"voc:{top}")
    if not annotations:
        faults.tell(*told)
        raise ValueError(f"voc:{top} has no image in {split} that can be used; add some")
    dataset = AnnotatedImages(annotations, classes, transform=transform).usable(faults)
    faults.tell(*told)
    return dataset


def _train(top: Path) -> list[tuple[Path, ElementTree.Element]]:
    """What names the classes: the training split, or nothing where there is none, and this is not asked for."""
    return _parse_split(top, "train", Faults("skip")) if "train" in voc_splits(top) else []


def _folders(top: Path) -> tuple[Path, Path] | None:
    """Where images and annotations lie: in two folders, or all in one."""
    annotations = first_folder(top, _XML)
    if annotations is None:
        return (top, top) if top.is_dir() and any(top.glob("*.xml")) else None
    return first_folder(top, _IMAGES) or top, annotations


def _parse_split(top: Path, split: str, faults: Faults) -> list[tuple[Path, ElementTree.Element]]:
    parsed = []
    for file in _files(top, split):
        try:
            parsed.append((file, parse_xml(file)))
        except (ValueError, FileNotFoundError) as error:
            faults.add(error)
    return parsed


def _files(top: Path, split: str) -> list[Path]:
    own = split_folder(top, split)
    places = _folders(own) if own.is_dir() else _folders(top)
    if places is None:
        raise FileNotFoundError(
            f"voc:{top} has no annotations of {split}; {_LAYOUT}{found(own if own.is_dir() else top)}"
        )
    listed = top / "ImageSets" / "Main" / f"{split}.txt"
    if own.is_dir() or not listed.is_file():
        return sorted(file for file in places[1].glob("*.xml") if not file.name.startswith("."))
    stems = [line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Path(inside(places[1], f"{stem}.xml", str(listed))) for stem in stems]


def parse_xml(file: Path) -> ElementTree.Element:
    """Parse an annotation.

    Raises ValueError, which names the file, for one that is broken, larger than 4 MB, or declares a document type or
    entities, whatever its encoding.
    """
    content = file.read_bytes()
    if len(content) > _LARGEST:
        raise ValueError(f"{file} has {len(content)} bytes, too many for the boxes of an image; replace it")
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = parser.ExternalEntityRefHandler = _refuse
    try:
        parser.Parse(content, True)
        return builder.close()
    except _Refused as error:
        raise ValueError(
            f"{file} declares a document type or entities, which are refused; delete the declaration"
        ) from error
    except (expat.ExpatError, AssertionError, ValueError, LookupError) as error:
        raise ValueError(f"{file} is no usable XML: {error}; replace it, or delete it") from error


class _Refused(Exception):
    pass


def _refuse(*_: object) -> None:
    raise _Refused


def _names(tree: ElementTree.Element) -> list[str]:
    return [name.strip() for entry in tree.findall("object") if (name := entry.findtext("name", "")).strip()]


def _annotation(
    file: Path, tree: ElementTree.Element, number: int, images: Path, label_of: dict[str, int], faults: Faults
) -> tuple[Annotation, int]:
    """One image's, and how many of its boxes were clipped."""
    path = inside(images, (tree.findtext("filename") or "").strip(), str(file))
    size = tuple(int(_number(tree, f"size/{side}", file)) for side in ("height", "width"))
    if min(size) < 1:
        raise ValueError(f"{file} says that the image has {size[1]} × {size[0]} pixels; correct <size>")
    entries, names = tree.findall("object"), []
    for entry in entries:
        names.append((entry.findtext("name") or "").strip())
        if names[-1] not in label_of:
            known = ", ".join(list(label_of)[:12])
            raise ValueError(
                f"{file} has an object {names[-1]!r}, which is not among the classes ({known}); see classes.txt"
            )
    corners = [[_number(entry, f"bndbox/{key}", file) for key in ("xmin", "ymin", "xmax", "ymax")] for entry in entries]
    boxes = np.array(corners, dtype=np.float64).reshape(-1, 4) - [1, 1, 0, 0]
    boxes, usable, cut = check_boxes(boxes, names, size, str(file), faults)
    labels = np.array([label_of[name] for name in names], dtype=np.int64)[usable]
    return Annotation(
        file=path,
        image_id=number,
        where=str(file),
        size=size,
        boxes=boxes[usable],
        labels=labels,
        iscrowd=np.zeros(len(labels), dtype=np.int64),
    ), cut


def _number(entry: ElementTree.Element, path: str, file: Path) -> float:
    text = entry.findtext(path)
    try:
        return float(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} has {text!r} where <{path}> should be a number; correct it") from error
