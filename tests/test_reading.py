"""Pictures of every kind come to the same pixels from a path, a file object, bytes and a PIL image."""

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from torchvision import tv_tensors

from vitcourse.data import ImageDataset, as_image, eval_transform, photo, read_image, train_transform

COLOUR = Image.fromarray(photo("coffee")[:, 40:64, 30:61].permute(1, 2, 0).numpy())  # 31 wide, 24 high
RAMP = np.linspace(0, 65535, 24 * 31).round().astype(np.uint16).reshape(24, 31)


@pytest.fixture(autouse=True)
def _built_in(request):
    """Pillow's wheels have all of these; a build of one's own may not."""
    asked = getattr(request.node, "callspec", None)
    for value, feature in (("WEBP", "webp"), ("LAB", "littlecms2"), ("TIFF", "libtiff"), ("JPEG", "jpg")):
        if asked and value in asked.params.values() and not features.check(feature):
            pytest.skip(f"Pillow was built without {feature}")


def _alpha() -> Image.Image:
    return Image.fromarray((RAMP // 257).astype(np.uint8).T.copy()).resize(COLOUR.size)


def _picture(mode: str) -> Image.Image:
    """The photograph in another mode; where there is an alpha channel, it runs from 0 to 255."""
    deep = {"I;16": RAMP, "I;16B": RAMP.astype(">u2"), "I": RAMP.astype(np.int32), "F": np.float32(RAMP / 65535)}
    if mode in deep:
        return Image.frombytes(mode, COLOUR.size, deep[mode].tobytes())
    if mode in ("LA", "RGBA", "RGBa", "La"):
        picture = COLOUR.convert("LA" if mode in ("LA", "La") else "RGBA")
        picture.putalpha(_alpha())
        return picture.convert(mode)
    if mode == "P, one transparent":
        picture = COLOUR.quantize(16)
        picture.info["transparency"] = 3
        return picture
    if mode == "P, alpha per colour":
        picture = COLOUR.quantize(16)
        picture.info["transparency"] = bytes(range(0, 256, 16))
        return picture
    if mode == "P":
        return COLOUR.quantize(16)
    if mode == "PA":
        picture = COLOUR.quantize(16).convert("PA")
        picture.putalpha(_alpha())
        return picture
    return COLOUR.convert(mode)


def _over_white(picture: Image.Image) -> np.ndarray:
    colour, alpha = np.split(np.asarray(picture.convert("RGBA")).astype(np.float64), [3], axis=2)
    return (colour * alpha + 255 * (255 - alpha)) / 255


def _lab_to_srgb(picture: Image.Image) -> np.ndarray:
    """CIE L*a*b* of 1976 at white D50, then sRGB (IEC 61966-2-1) with its white adapted by Bradford's matrix."""
    lightness, (a, b) = np.asarray(picture)[..., 0] / 2.55, np.moveaxis(np.asarray(picture).view(np.int8), 2, 0)[1:]
    f = (lightness + 16) / 116
    f = np.stack([f + a / 500, f, f - b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1, 0.8249)
    to_linear = [[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]
    linear = np.clip(xyz @ np.array(to_linear).T, 0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


# What each mode must come to, (H, W) or (H, W, 3), by arithmetic of another kind than the reader's.
EXPECTED = {
    "1": lambda p: np.where(np.asarray(p), 255, 0),
    "L": np.asarray,
    "P": lambda p: np.asarray(p.getpalette()).reshape(-1, 3)[np.asarray(p)],
    "P, one transparent": lambda p: np.where(
        np.asarray(p)[..., None] == 3, 255, np.asarray(p.getpalette()).reshape(-1, 3)[np.asarray(p)]
    ),
    "P, alpha per colour": _over_white,
    "PA": _over_white,
    "RGB": np.asarray,
    "RGBX": lambda p: np.asarray(p)[..., :3],
    "RGBA": _over_white,
    "RGBa": _over_white,
    "LA": lambda p: _over_white(p)[..., 0],
    "La": lambda p: _over_white(p.convert("LA"))[..., 0],
    "CMYK": lambda p: 255 * (1 - np.asarray(p)[..., :3] / 255) * (1 - np.asarray(p)[..., 3:] / 255),
    "YCbCr": lambda p: np.clip(
        (np.asarray(p) - np.array([0.0, 128, 128]))
        @ np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]]).T,
        0,
        255,
    ),
    "HSV": lambda p: np.asarray(COLOUR),
    "LAB": _lab_to_srgb,
    "I;16": lambda p: RAMP / 257,
    "I;16B": lambda p: RAMP / 257,
    "I": lambda p: RAMP / 257,
    "F": lambda p: RAMP / 257,
}
# The rounding of Pillow's conversions; HSV has 8 bits on the way there and back, LAB tables in the dark.
TOLERANCE = {"YCbCr": 1.1, "RGBa": 1.1, "La": 1.1, "HSV": 8, "LAB": 5}


@pytest.mark.parametrize("mode", EXPECTED)
def test_every_mode_becomes_grey_or_colour(mode):
    picture = _picture(mode)
    before = picture.mode, picture.tobytes(), dict(picture.info)
    image = read_image(picture)
    assert (picture.mode, picture.tobytes(), dict(picture.info)) == before
    assert type(image) is tv_tensors.Image and image.dtype == torch.uint8
    expected = EXPECTED[mode](picture)
    assert image.shape == ((1, 24, 31) if expected.ndim == 2 else (3, 24, 31))
    difference = np.abs(image.permute(1, 2, 0).numpy().reshape(expected.shape) - expected.astype(np.float64))
    assert difference.max() <= TOLERANCE.get(mode, 0.51)
    assert difference.mean() < 1.5
    assert torch.equal(as_image(picture), image)
    grey, colour = read_image(picture, in_chans=1), read_image(picture, in_chans=3)
    assert torch.equal(colour, image.expand(3, -1, -1))
    assert torch.equal(
        grey, image if len(image) == 1 else read_image(Image.fromarray(colour.permute(1, 2, 0).numpy()), 1)
    )


FORMATS = {
    "PNG": ["1", "L", "LA", "P", "P, one transparent", "P, alpha per colour", "RGB", "RGBA", "I;16"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "F"],
    "JPEG": ["L", "RGB", "CMYK", "YCbCr"],
    "BMP": ["1", "L", "P", "RGB"],  # without alpha
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["1", "L", "P", "P, one transparent"],
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in FORMATS.items() for mode in modes])
def test_the_same_pixels_from_everywhere(kind, mode, tmp_path):
    path = tmp_path / f"picture.{kind.lower()}"
    picture = _picture(mode)
    options = {"WEBP": {"lossless": True, "exact": True}}.get(kind, {})
    picture.save(path, kind, **options)
    image = read_image(path)
    content = path.read_bytes()
    assert torch.equal(read_image(str(path)), image) and torch.equal(read_image(content), image)
    with open(path, "rb") as file:
        file.read(7)  # wherever it stands
        assert torch.equal(read_image(file), image) and not file.closed
    with Image.open(path) as opened:
        assert torch.equal(read_image(opened), image) and torch.equal(read_image(opened.copy()), image)
        assert torch.equal(read_image(opened), image)  # it was not closed, nor changed
    if kind != "JPEG":
        difference = (read_image(picture).expand_as(image).int() - image.int()).abs()
        assert difference.max() <= (1 if mode == "YCbCr" else 0)

    three = ((0.5,) * 3, (0.25,) * 3)
    from_files = ImageDataset([path], [0], ["a"], mean=three[0], std=three[1])
    assert torch.equal(from_files[0][0], read_image(path, in_chans=3))
    ready = eval_transform(16, *three)
    with Image.open(path) as opened:
        for source in (path, str(path), content, io.BytesIO(content), opened, from_files[0][0]):
            assert torch.equal(ready(source), ready(path))
            assert train_transform(16, *three)(source).shape == (3, 16, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(kind, orientation):
    """The camera stores them turned; the tag says how to turn them back (EXIF 2.32, table 6)."""
    turned_back = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    COLOUR.save(file, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    plain = io.BytesIO()
    COLOUR.save(plain, kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = turned_back(read_image(plain).permute(1, 2, 0).numpy())
    with Image.open(file) as opened:
        for source in (file, opened, ImageOps.exif_transpose(opened)):
            assert np.array_equal(read_image(source).permute(1, 2, 0).numpy(), expected)


def test_a_broken_block_of_exif_does_not_cost_the_picture():
    file = io.BytesIO()
    COLOUR.save(file, "PNG", exif=b"Exif\0\0this is no TIFF header")
    assert torch.equal(read_image(file), read_image(COLOUR))


def _tiff(values: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1, pixels: bytes = b"") -> bytes:
    """A grey TIFF of one row, of kinds that Pillow reads but does not write (TIFF 6.0, section 2)."""
    pixels = pixels or values.tobytes()
    order = ">" if values.dtype.byteorder == ">" else "<"
    tags = {256: values.size, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    tags[339] = sample_format
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(pixels) + len(pixels) % 2)
    table = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    return head + pixels + b"\0" * (len(pixels) % 2) + struct.pack(order + "H", len(tags)) + table + b"\0" * 4


def test_grey_of_other_depths_is_scaled():
    sixteen, floats = np.array([0, 771, 65535, 1000], "<u2"), np.array([0, 0.25, 1, 0.1], "<f4")
    for file, expected in (
        (_tiff(sixteen, 16), [0, 3, 255, 4]),
        (_tiff(sixteen.astype(">u2"), 16), [0, 3, 255, 4]),
        (_tiff(sixteen, 16, photometric=0), [255, 252, 0, 251]),  # white is zero
        (_tiff(floats, 32, sample_format=3), [0, 64, 255, 26]),
        (_tiff(sixteen, 12, pixels=bytes.fromhex("000fff123456")), [0, 255, 18, 69]),  # 0, 4095, 291, 1110
    ):
        assert read_image(file).flatten().tolist() == expected
    picture = Image.fromarray(np.array([[0, 300, 65535]], np.uint16))
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=300)
    assert read_image(file).flatten().tolist() == [0, 255, 255]


def test_pixels_of_unknown_range_are_refused():
    for file, message in (
        (_tiff(np.array([0, 100, 32767], "<i2"), 16, sample_format=2), "integers reach from 0 to 32767, of unknown"),
        (_tiff(np.array([0, 255], "<i4"), 32, sample_format=2), "integers reach from 0 to 255"),
        (Image.fromarray(np.array([[0, 65536]], np.int32)), "PIL image of mode I.* reach from 0 to 65536"),
        (Image.fromarray(np.array([[-1, 9]], np.int32)), "reach from -1 to 9"),
        (Image.fromarray(np.array([[0, 255]], np.float32)), r"floats reach from 0.0 to 255.0; scale them to 0..1"),
        (Image.fromarray(np.array([[0, np.nan]], np.float32)), "floats reach from nan"),
        (Image.new("RGB", (0, 5)), "it has 0 × 5 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            read_image(file)
    with pytest.raises(ValueError, match="in_chans 4 cannot be made"):
        read_image(COLOUR, in_chans=4)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_it_is_the_first(kind):
    file, frames = io.BytesIO(), [COLOUR, ImageOps.invert(COLOUR)]
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    tolerance = 40 if kind == "GIF" else 0  # 256 colours
    assert (read_image(file).int() - read_image(COLOUR).int()).abs().max() <= tolerance
    with Image.open(file) as opened:
        opened.seek(1)
        assert (read_image(opened).int() - read_image(frames[1]).int()).abs().max() <= tolerance


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    whole = io.BytesIO()
    COLOUR.save(whole, "PNG")
    path = tmp_path / "cat.png"
    for content in (b"", b"<html>404</html>", whole.getvalue()[:60], whole.getvalue()[:-300]):
        path.write_bytes(content)
        with open(path, "rb") as file:
            for source in (path, str(path), file):
                with pytest.raises(ValueError, match=rf"{path} is not a usable image: .*; replace it, or delete it"):
                    read_image(source)
        for source, name in ((content, f"an image of {len(content)} bytes"), (io.BytesIO(content), "a BytesIO")):
            with pytest.raises(ValueError, match=f"{name} is not a usable image"):
                read_image(source)
    with pytest.raises(FileNotFoundError, match=r"dog.png is missing; restore it"):
        read_image(tmp_path / "dog.png")
    path.write_bytes(whole.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=rf"{path} is not a usable image: .*decompression bomb"):
        read_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF"])
def test_damage_is_an_error_of_one_kind_or_does_no_harm(kind):
    """Changed bytes give ValueError or a picture, whatever they do to Pillow's readers."""
    whole, random = io.BytesIO(), np.random.RandomState(0)
    COLOUR.resize((9, 7)).save(whole, kind)
    refused = 0
    for _ in range(150):
        content = bytearray(whole.getvalue())
        for place in random.randint(0, min(len(content), 200), 3):
            content[place] = random.randint(256)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert read_image(bytes(content)).shape[0] in (1, 3)
        except ValueError as error:
            refused += "is not a usable image" in str(error)
    assert refused > 10


def test_grey_pictures_fit_a_model_of_three_channels_and_tensors_do_not():
    """A picture is converted, as a data set of files converts it; a tensor is taken at its word."""
    three = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    grey = COLOUR.convert("L")
    assert torch.equal(eval_transform(16, *three)(grey), eval_transform(16, *three)(grey.convert("RGB")))
    with pytest.raises(ValueError, match="1 channels where 3 are due"):
        eval_transform(16, *three)(read_image(grey))
    with pytest.raises(ValueError, match="1 channels where 3 are due"):
        eval_transform(16, *three)(np.array(grey))


@pytest.mark.parametrize("transform", [eval_transform, train_transform])
def test_grey_is_the_grey_of_pillow(transform):
    one = ((0.0,), (1.0,))
    white = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    assert (transform(8, *one, in_chans=1)(white) == 1).all()
    to_grey = eval_transform(24, *one, in_chans=1)
    for image in (COLOUR, read_image(COLOUR)):
        assert torch.equal(to_grey(image), eval_transform(24, *one)(COLOUR.convert("L")))
    floats = to_grey(read_image(COLOUR) / 255)
    torch.testing.assert_close(floats, to_grey(COLOUR), atol=1 / 255, rtol=0)
