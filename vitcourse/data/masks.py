"""A folder of images and a folder of masks: a class for every pixel."""

from collections.abc import Callable
from pathlib import Path

from vitcourse.data.annotated import IGNORE, AnnotatedImages, Annotation, images_by_stem
from vitcourse.data.folders import (
    CLASSES_FILE,
    Faults,
    files_below,
    first_folder,
    found,
    inside,
    read_classes,
    split_folder,
    splits_of,
)

_IMAGES = ("images", "image", "imgs", "JPEGImages")
_MASKS = ("masks", "mask", "labels", "label", "annotations", "SegmentationClass")
_LAYOUT = f"""expected an image and a mask of equal names, but for the ending:
    PATH/images/1.jpg        PATH/masks/1.png        (or image; mask, labels, label)
    PATH/train/images/2.jpg  PATH/train/masks/2.png  where it is split; so for val and test
with PATH/{CLASSES_FILE} where masks hold more than 0 and 255: the names of the values 0, 1, 2, …, one a line
"""
_BINARY = ("background", "foreground")


def masks_splits(top: Path) -> list[str]:
    """Which splits a folder has; without any, all is to train on."""
    return splits_of(top) or (["train"] if first_folder(top, _MASKS) else [])


def open_masks(top: Path, split: str, *, transform: Callable | None = None, on_error: str = "raise") -> AnnotatedImages:
    """Open a split of a folder of images and masks.

    Args:
        top: the folder.
        split: one of ``masks_splits``.
        transform: called with (image, target).
        on_error: ``"raise"``, or ``"skip"`` to leave out images without a mask, and what cannot be read, for which all
            is read once; that is said on stderr.

    Without classes.txt masks are binary: 0 is background, 255 (or 1) foreground. With it, the value of a pixel, or its
    place in the palette, is its class, and 255 counts for nothing. ``classes`` are ``semantic_classes`` here.
    """
    if split not in masks_splits(top):
        raise FileNotFoundError(f"masks:{top} has no {split} split; {_LAYOUT}{found(top)}")
    own = split_folder(top, split)
    folder = own if own.is_dir() else top
    images, masks = first_folder(folder, _IMAGES), first_folder(folder, _MASKS)
    if images is None or masks is None:
        raise FileNotFoundError(
            f"{folder} has no folder of {'images' if images is None else 'masks'}; {_LAYOUT}{found(folder)}"
        )
    faults, annotations = Faults(on_error), []
    by_stem = images_by_stem(files_below(images), images)
    mask_of = images_by_stem(files_below(masks), masks)
    for number, (stem, file) in enumerate(by_stem.items()):
        try:
            if stem not in mask_of:
                raise FileNotFoundError(f"{file} has no mask {masks / stem}.png; add it, or delete the image")
            mask = inside(masks, Path(mask_of[stem]).relative_to(masks).as_posix(), str(masks))
        except (ValueError, FileNotFoundError) as error:
            faults.add(error)
            continue
        annotations.append(Annotation(file=file, image_id=number, where=mask, semantic=mask))
    told = ("images", by_stem, f"masks:{folder}")
    if not annotations:
        faults.tell(*told)
        raise FileNotFoundError(f"{images} holds no images with masks; {_LAYOUT}")
    named = read_classes(top)
    classes = named or list(_BINARY)
    if len(classes) > IGNORE:
        raise ValueError(f"{top / CLASSES_FILE} names {len(classes)} classes; masks of 8 bits tell {IGNORE} apart")
    options = {"semantic_classes": classes, "binary": named is None, "transform": transform}
    dataset = AnnotatedImages(annotations, classes, **options).usable(faults)
    faults.tell(*told)
    return dataset
