"""What ``vitcourse evaluate`` and ``vitcourse predict`` do alike for detectors and segmenters."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn

from vitcourse.data import IGNORE, Letterbox, dense_eval_transform, read_image
from vitcourse.data.folders import is_picture
from vitcourse.dense_prediction.tasks import DenseTask
from vitcourse.devices import device_of
from vitcourse.inference import evaluating
from vitcourse.train import TrainConfig

from .classification import SHOWN_PICTURES, match_classes, shortened
from .opening import choose_split, open_split

BATCH_SIZE = 16
WANTED = ("pictures", is_picture)
LARGEST = 2048  # pixels of the longer side of what is drawn
_THUMBNAIL = 400
_COLOURS = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#FFFFFF",
    "#882255",
    "#117733",
)


def colour_of(index: int) -> str:
    """A colour for each class; after ten they begin anew."""
    return _COLOURS[index % len(_COLOURS)]


# --------------------------------------------------------------------------------------------------------- evaluate


def measure(task: DenseTask, model: nn.Module, options: argparse.Namespace, prefix: str, key: str) -> dict[str, Any]:
    """The task's metrics, and for each class ``prefix``, on ``options.data``, whose classes stand in ``key``."""
    split = choose_split(options)
    dataset = open_split(options, split)
    if not hasattr(dataset, "semantic_classes"):
        raise ValueError(
            f"{options.data} has no boxes and no masks, and the weights are of a model for these; give scenes, "
            "coco:PATH, voc:PATH or masks:PATH"
        )
    classes, place = match_classes(model, task.class_names(dataset))
    preprocess = model.preprocess
    prepare = dense_eval_transform(model.img_size, preprocess.mean, preprocess.std)
    dataset.transform = Renumbered(prepare, place, key)
    dataset.classes = dataset.semantic_classes = classes
    config = TrainConfig(
        device=options.device,
        batch_size=options.batch_size,
        eval_batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    task.check_data(model, dataset, None, config)
    found = task.evaluate(model, dataset, config)
    rows = [{"name": name, prefix: found.pop(f"{prefix}_{name}", None)} for name in classes]
    loss = found.pop("val_loss")
    size = list(model.img_size)
    facts = {"task": task.name, "data": options.data, "split": split, "images": len(dataset), "size": size}
    return {**facts, "loss": loss, **found, "classes": rows}


class Renumbered:
    """A transform of (image, target), after which classes have the model's numbers in place of the data's.

    Args:
        transform: comes first.
        place: (K,), the model's number of each of the data's classes.
        key: ``"labels"`` of objects, or ``"semantic"``, of pixels, in which 255 stays.
    """

    def __init__(self, transform: Callable[..., Any], place: Tensor, key: str) -> None:
        self.transform, self.place, self.key = transform, place, key

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        image, target = self.transform(image, target)
        if self.key not in target:  # the task says so
            return image, target
        old = target[self.key]
        new = self.place[old.clamp(max=len(self.place) - 1)]
        return image, {**target, self.key: torch.where(old == IGNORE, IGNORE, new) if self.key == "semantic" else new}


def report(result: dict[str, Any], names: Sequence[str], prefix: str) -> str:
    """The metrics, a line for each class that occurs."""
    shown = [f"{name} {result[name]:.4f}" for name in names if result.get(name) is not None]
    rows = [row for row in result["classes"] if row[prefix] is not None]
    width = max((len(row["name"]) for row in rows), default=0)
    return "\n".join(
        [
            f"{result['weights']} on {result['data']}, {result['split']}: {result['images']} images, at "
            f"{result['size'][0]} × {result['size'][1]} pixels",
            "   ".join(shown),
            "",
            *(f"{row['name']:<{width}}  {row[prefix]:.4f}" for row in rows),
        ]
    )


def draw(result: dict[str, Any], names: Sequence[str], prefix: str) -> Figure:
    """Bars of the metrics, beside bars of each class."""
    from vitcourse import plot

    rows = [row for row in result["classes"] if row[prefix] is not None]
    shown = [name for name in names if result.get(name) is not None]
    with plot.styled():
        figure = Figure(figsize=(8.0, min(max(3.0, 0.3 * len(rows) + 1.2), 14.0)))
        whole, each = figure.subplots(1, 2)
        whole.barh(shown, [result[name] for name in shown], color=plot.BLUE)
        each.barh([shortened(row["name"]) for row in rows], [row[prefix] for row in rows], color=plot.SKY)
        for ax, title in ((whole, f"{result['data']}, {result['split']}"), (each, f"{prefix} of each class")):
            ax.set(xlim=(0, 1), title=shortened(title, 32))
            ax.invert_yaxis()
            ax.tick_params(labelsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------- predict


class Seen(NamedTuple):
    """A picture, and what is needed to bring what was found in it back to its pixels.

    Attributes:
        file: of the picture; it may be huge, and is read again to be drawn on.
        size: (height, width) of the picture, upright.
        inside: (height, width) that it has in the letterboxed image.
    """

    file: Path
    size: tuple[int, int]
    inside: tuple[int, int]


def look(
    model: nn.Module, files: Sequence[Path], batch_size: int, read: Callable[[Any], Sequence[Any]]
) -> Iterator[tuple[dict[str, Any], Seen | None, Any]]:
    """For each file its record, the picture, and what ``read`` makes of the model's output for it.

    A file that cannot be read has ``"error"`` in its record, and neither of the others.
    """
    prepare = dense_eval_transform(model.img_size, model.preprocess.mean, model.preprocess.std)
    letterbox, device = Letterbox(tuple(model.img_size)), device_of(model)
    for start in range(0, len(files), batch_size):
        part: list[tuple[dict[str, Any], Seen | None]] = []
        inputs = []
        for file in files[start : start + batch_size]:
            record: dict[str, Any] = {"file": str(file)}
            try:
                image = read_image(file, 3)
            except (ValueError, OSError) as error:
                part.append(({**record, "error": str(error)}, None))
                continue
            height, width = image.shape[-2:]
            seen = Seen(file, (height, width), tuple(letterbox.make_params([image])["size"]))
            part.append(({**record, "width": width, "height": height}, seen))
            inputs.append(prepare(image, {})[0])
        found: Iterator[Any] = iter(())
        if inputs:
            with evaluating(model), torch.inference_mode():
                found = iter(read(model(torch.stack(inputs).to(device))))
        for record, seen in part:
            yield record, seen, None if seen is None else next(found)


def canvas(file: Path) -> Image.Image:
    """A picture to draw on, upright, of at most :data:`LARGEST` pixels a side."""
    picture = Image.fromarray(read_image(file, 3).permute(1, 2, 0).numpy())
    picture.thumbnail((LARGEST, LARGEST))
    return picture


def draw_boxes(picture: Image.Image, objects: Sequence[dict[str, Any]], scale: float) -> Image.Image:
    """Boxes with names and scores; ``scale`` is pixels of the picture over pixels of the boxes."""
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(10, min(28, max(picture.size) // 40)))
    thick = max(1, round(max(picture.size) / 400))
    for found in reversed(objects):  # the surest on top
        x0, y0, x1, y1 = (value * scale for value in found["box"])
        colour = colour_of(found["index"])
        pen.rectangle((x0, y0, max(x1, x0), max(y1, y0)), outline=colour, width=thick)
        text = f"{found['class']} {found['score']:.2f}"
        left, top, right, bottom = pen.textbbox((x0, y0), text, font=font)
        up = min(bottom - top + 4, y0)  # above the box where there is room
        pen.rectangle((left, top - up - 2, right + 2, bottom - up + 2), fill=colour)
        pen.text((x0, y0 - up), text, fill="black", font=font)
    return picture


def overlay(picture: Image.Image, masks: Sequence[tuple[Tensor, int]]) -> Image.Image:
    """Masks (H, W), each in the colour of its class, half transparent."""
    pixels = np.asarray(picture, dtype=np.float32).copy()
    for mask, index in masks:
        small = Image.fromarray(mask.to(torch.uint8).numpy() * 255).resize(picture.size, Image.Resampling.NEAREST)
        inside = np.asarray(small) > 127
        pixels[inside] = 0.5 * pixels[inside] + 0.5 * np.array(ImageColor.getrgb(colour_of(index)), dtype=np.float32)
    return Image.fromarray(pixels.round().astype(np.uint8))


class Drawings:
    """Where pictures with what was found in them go: files in a folder, small ones for the sheet, or nowhere.

    Args:
        options: ``out_dir`` and ``sheet``.

    Raises:
        ValueError: ``out_dir`` is a file.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder = Path(options.out_dir) if options.out_dir else None
        self.wanted = bool(options.out_dir or options.sheet)
        self.small = SHOWN_PICTURES if options.sheet else 0
        self.taken: set[str] = set()
        if self.folder:
            if self.folder.exists() and not self.folder.is_dir():
                raise ValueError(f"--out-dir {self.folder} is a file; name a folder")
            self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, file: str, ending: str) -> Path:
        """A file for what is drawn of ``file``: its own for each, also of two pictures of one name."""
        stem, number = Path(file).stem, 1
        while (name := f"{stem}{f'_{number}' if number > 1 else ''}{ending}").lower() in self.taken:
            number += 1
        self.taken.add(name.lower())
        return self.folder / name

    def keep(self, record: dict[str, Any], picture: Image.Image) -> None:
        """Write a picture, and note in the record where; keep a small one under ``"_small"``."""
        if self.folder:
            path = self.path(record["file"], "_found.png")
            picture.save(path)
            record["drawn"] = str(path)
        if self.small > 0:
            self.small -= 1
            small = picture.copy()
            small.thumbnail((_THUMBNAIL, _THUMBNAIL))
            record["_small"] = small


def sheet(records: list[dict[str, Any]]) -> Figure:
    """The pictures with what was found in them."""
    from vitcourse import plot

    shown = [record for record in records if "_small" in record]
    if len(records) > len(shown):
        print(f"vitcourse: the sheet shows the first {len(shown)} of {len(records)} pictures", file=sys.stderr)
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    with plot.styled():
        figure = Figure(figsize=(3.2 * columns, 3.3 * lines))
        axes = figure.subplots(lines, columns, squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, record in zip(axes.flat, shown, strict=False):
            ax.imshow(np.asarray(record["_small"]))
            ax.set_title(shortened(Path(record["file"]).name, 28), fontsize=8)
    return figure
