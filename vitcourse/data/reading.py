"""Pictures in files and of Pillow, of every kind, to 8-bit grey or RGB: the only place where they are decoded."""

import io
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.transforms import v2

Picture = str | Path | bytes | BinaryIO | Image.Image
BACKGROUND = (255, 255, 255)  # white, as a page or a browser shows transparent pictures
_GREY = ("1", "L", "LA", "La", "F")  # and those that begin with I
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
# What Pillow's readers let through when a file is damaged, or the library for it (LittleCMS for LAB) was not built in.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    ImportError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF 6.0


def is_picture(source: Any) -> bool:
    """Whether ``read_image`` is in charge: a path, bytes, a file object or a PIL image.

    >>> is_picture("cat.jpg"), is_picture(np.zeros((2, 2)))
    (True, False)
    """
    return isinstance(source, (str, os.PathLike, bytes, bytearray, Image.Image)) or hasattr(source, "read")


def read_image(source: Picture, in_chans: int | None = None) -> tv_tensors.Image:
    """Decode a picture to uint8 (C, H, W): the same pixels from a path, from bytes, a file object and a PIL image.

    * It is turned upright as its EXIF orientation says.
    * Palettes, CMYK, YCbCr, HSV and LAB become RGB, as Pillow converts them; colour profiles are not applied.
    * Transparency is laid over white.
    * 16-bit grey (12-bit in TIFF) is scaled to 8 bits, rounded. Of 16-bit colour Pillow gives the high byte.
      Integers of mode ``I`` count as 16-bit, floats as 0..1; what lies outside is refused.
    * Of several frames it is the first, or the one that a PIL image stands at.

    Args:
        source: what to read; a file object is read from its start and stays open, a PIL image stays as it is.
        in_chans: 1 converts to grey (ITU-R 601, as Pillow does), 3 to RGB; None leaves grey as 1 channel, and makes
            3 of everything else.

    Raises FileNotFoundError for a missing file, and ValueError, which names the file, for one that cannot be
    decoded: truncated, of another format, too large to be harmless, or with pixels whose range nobody knows.

    >>> tuple(read_image(Image.new("CMYK", (4, 3))).shape), read_image(Image.new("P", (4, 3)), in_chans=1).shape[0]
    ((3, 3, 4), 1)
    """
    if in_chans not in (None, 1, 3):
        raise ValueError(f"in_chans {in_chans!r} cannot be made; use 1 (grey), 3 (RGB) or None (as they are)")
    try:
        if isinstance(source, Image.Image):
            picture = _decode(source)
        else:
            with Image.open(_opened(source)) as file:
                picture = _decode(file)
    except FileNotFoundError as error:
        remedy = "restore it, name another, or open the data set anew"
        raise FileNotFoundError(f"{_name(source)} is missing; {remedy}") from error
    except _DAMAGED as error:
        raise ValueError(f"{_name(source)} is not a usable image: {error}; replace it, or delete it") from error
    return v2.functional.to_image(picture.convert({1: "L", 3: "RGB", None: picture.mode}[in_chans]))


def read_mask(source: Picture) -> np.ndarray:
    """Decode a mask, whose values are classes and no colours: (H, W), uint8.

    Of a palette it is the places in it, of a picture with one bit 0 and 255; of equal channels one. What ``read_image``
    does to colours, transparency and orientation is not done: a mask has none of them.

    Raises as ``read_image`` does, and ValueError for colours, for which nobody knows the classes.

    >>> read_mask(Image.new("P", (4, 3), 7)).tolist()[0]
    [7, 7, 7, 7]
    """
    try:
        with Image.open(_opened(source)) if not isinstance(source, Image.Image) else nullcontext(source) as picture:
            values = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
            mode = picture.mode
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{_name(source)} is missing; restore it, or open the data set anew") from error
    except _DAMAGED as error:
        raise ValueError(f"{_name(source)} is not a usable image: {error}; replace it, or delete it") from error
    if values.ndim == 3 and (values[..., : {"LA": 1, "PA": 1}.get(mode, 3)] == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{_name(source)} is a mask in colours (mode {mode}); save it in grey or with a palette")
    if not (values.min() >= 0 and values.max() <= 255):
        raise ValueError(f"{_name(source)} has values from {values.min()} to {values.max()}; a mask has 0 to 255")
    return values.astype(np.uint8)


def _opened(source: Any) -> Any:
    return io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source


def _name(source: Any) -> str:
    if isinstance(source, (bytes, bytearray)):
        return f"an image of {len(source)} bytes"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    kind = f"a PIL image of mode {source.mode}" if isinstance(source, Image.Image) else f"a {type(source).__name__}"
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or kind)


def _decode(picture: Image.Image) -> Image.Image:
    """An upright image of mode L or RGB, without transparency."""
    picture.load()
    if not picture.width or not picture.height:
        raise ValueError(f"it has {picture.width} × {picture.height} pixels")
    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})  # of a TIFF; a transposed copy no longer has them
    picture = _upright(picture)
    grey = picture.mode in _GREY or picture.mode.startswith("I")
    if picture.mode.startswith(("I", "F")):
        picture = _to_8_bits(picture, tags)
    if picture.mode in _ALPHA or "transparency" in picture.info or picture.palette and picture.palette.mode == "RGBA":
        if picture.mode == "La":  # Pillow undoes the premultiplication only on the way to LA
            picture = picture.convert("LA")
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, BACKGROUND), picture)
    return picture.convert("L" if grey else "RGB")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a block of EXIF that cannot be parsed, in many ways, says nothing; the pixels are whole
        return picture.copy()


def _to_8_bits(picture: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Grey of 12 or 16 bits, or floats in 0..1, as mode L, or as LA where a value of 16 bits means transparent."""
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    if picture.mode == "F":
        if not (low >= 0 and high <= 1):  # put so that NaN fails too
            raise ValueError(f"its floats reach from {low} to {high}; scale them to 0..1")
        levels = np.rint(values * np.float64(255))
    else:
        bits, kind = tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_SAMPLE_FORMAT, (1,))[0]
        if bits > 16 or kind != 1 or low < 0 or high > 65535:
            raise ValueError(f"its integers reach from {low} to {high}, of unknown range; save 8 or 16 bits, unsigned")
        levels = np.rint(values * (255 / (2**bits - 1)))
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds with 1 and 8 bits only
        levels = 255 - levels
    grey = Image.fromarray(levels.astype(np.uint8))
    transparent = picture.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
