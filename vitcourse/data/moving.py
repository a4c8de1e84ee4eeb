"""Clips of a Fashion-MNIST item in motion, rendered on demand: the label is the motion, which no single frame shows."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitcourse.data.items import SIDE, check_names, draw_background, draw_tint, items, random_state, shades
from vitcourse.data.scenes import check_split
from vitcourse.layers import to_pair

MOTIONS = ("left", "right", "up", "down", "counterclockwise", "clockwise", "shrink", "grow")
DIRECTIONS = ("backward", "forward")
LENGTHS = {"train": 8_000, "val": 800, "test": 800}
# Of the pixels of 2 000 training clips, scaled to 0..1.
MEAN, STD = (0.384, 0.376, 0.376), (0.107, 0.088, 0.099)
_STEPS = ((0.03, 0.08), (0.03, 0.08), (1 / 36, 1 / 12), (0.05, 0.12))  # per frame, as a share of the circle
_SIZES = (0.28, 0.60)  # an item's side, as a share of the shorter side of the frame
_GREY = 128


def moving(split: str = "train", **options: Any) -> "Moving":
    """Open a split of the moving clips; for the options see :class:`Moving`.

    >>> clip, label = moving("test", num_frames=4, img_size=32)[5]
    >>> tuple(clip.shape), clip.dtype, MOTIONS[label]
    ((3, 4, 32, 32), torch.uint8, 'clockwise')
    """
    return Moving(split, **options)


class Moving(Dataset):
    """One item moves, on a surface that does not; clip i is always the same.

    A sample is (clip, label): uint8 (3, T, H, W), and which of eight motions it is. **No frame tells the motion, by
    construction.** The item's state has four coordinates, x, y, angle and size, each on a circle: what leaves the frame
    at the left comes in at the right, and what has grown to the largest size starts anew at the smallest. Every
    coordinate starts anywhere on its circle, all places alike, and one of them, which the label names, moves on at
    constant speed. A uniform place on a circle stays uniform when it is turned: so at every time t the four
    coordinates of a frame are distributed alike, and independently, for all eight labels. (That is why nothing
    appears or vanishes here, and why an item may jump from large to small.)

    Moreover clips 2k and 2k + 1 are one film, played forward and backward: the same frames in the opposite order, with
    the two labels of a pair. Whatever looks at frames without their order is right in at most half of the clips, on
    any split, and exactly half under ``label="direction"``.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``; no item of one is in another. Test items are test images.
        num_frames: T, at least 2.
        img_size: the side, or (height, width), in pixels.
        length: how many clips, an even number; by default 8 000 to train on, 800 in the others.
        seed: other clips of the same kind.
        label: ``"motion"``: one of ``MOTIONS``; ``"direction"``: of time: whether the film of a motion right, down,
            clockwise or growing runs forward (1) or backward (0).
        speed: a factor on the speed, 1 is 3 to 8 % of a frame's side, 10 to 30 degrees, or a quarter of the sizes'
            range in two to five frames.
        distractors: other items, which stand still; half of them, at random, in front of the one that moves.
        textures: names of the surfaces, as ``texture_names`` has them; None: all; ``()``: a plain grey.
        transform: called with each clip.

    Raises ValueError for options out of range, naming them.

    >>> films = Moving("test", num_frames=3, img_size=32)
    >>> (forward, a), (backward, b) = films[0], films[1]
    >>> torch.equal(forward.flip(1), backward), MOTIONS[a], MOTIONS[b]
    (True, 'left', 'right')
    """

    in_chans, mean, std = 3, MEAN, STD

    def __init__(
        self,
        split: str = "train",
        *,
        num_frames: int = 8,
        img_size: int | tuple[int, int] = 48,
        length: int | None = None,
        seed: int = 0,
        label: str = "motion",
        speed: float = 1.0,
        distractors: int = 0,
        textures: Sequence[str] | None = None,
        transform: Callable | None = None,
    ) -> None:
        check_split(split, length)
        self.split, self.seed, self.transform = split, seed, transform
        self.size = to_pair(img_size, "img_size")
        self.img_size = self.size[0] if self.size[0] == self.size[1] else self.size
        if min(self.size) < 16:
            raise ValueError(f"img_size {img_size} is too small to show an item; use 16 or more")
        if num_frames < 2:
            raise ValueError(f"num_frames {num_frames} shows no motion; use 2 or more")
        if length is not None and length % 2:
            raise ValueError(f"length {length} is odd; clips come in pairs, forward and backward: use {length + 1}")
        if label not in ("motion", "direction"):
            raise ValueError(f"label {label!r} is unknown; use 'motion' or 'direction'")
        if not 0 < speed <= 4:
            raise ValueError(
                f"speed {speed} is out of range; use 0 < speed <= 4: beyond, motions can no longer be told"
            )
        if not 0 <= distractors <= 20:
            raise ValueError(f"distractors {distractors} are out of range; use 0 to 20")
        self.num_frames, self.label, self.speed, self.distractors = num_frames, label, speed, distractors
        self.textures = () if textures is not None and not len(textures) else check_names(textures)
        self.classes = list(MOTIONS if label == "motion" else DIRECTIONS)
        self.indices = range(LENGTHS[split] if length is None else length)

    @property
    def groups(self) -> list[int]:
        """The film of each clip, of which there are two clips: one forward, one backward."""
        return [number // 2 for number in self.indices]

    @property
    def targets(self) -> list[int]:
        """The labels of all clips."""
        return [number % len(self.classes) for number in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        number = self.indices[index]
        clip = self._render(number)
        return (clip if self.transform is None else self.transform(clip)), number % len(self.classes)

    def take(self, indices: Sequence[int]) -> "Moving":
        """Some of the clips, in the given order."""
        part = copy.copy(self)
        part.indices = [self.indices[i] for i in indices]
        return part

    def _render(self, number: int) -> Tensor:
        film = number // 2
        random = random_state(f"moving {self.split}", self.seed, film)
        background = self._background(random)
        still = [self._still(random) for _ in range(self.distractors)]
        state, axis = random.uniform(size=4), film % 4
        step = np.zeros(4)
        step[axis] = self.speed * random.uniform(*_STEPS[axis])
        item = _draw_item(random, self.split)
        for in_front, where, colours in still:
            if not in_front:
                background[where] = colours
        frames = np.repeat(background[None], self.num_frames, axis=0)  # (T, H·W, 3)
        for t, frame in enumerate(frames):
            where, colours = self._sprite(*item, (state + t * step) % 1)
            frame[where] = colours
            for in_front, where, colours in still:
                if in_front:
                    frame[where] = colours
        if number % 2 == 0:
            frames = frames[::-1]
        clip = frames.reshape(self.num_frames, *self.size, 3).transpose(3, 0, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(clip))

    def _background(self, random: np.random.RandomState) -> np.ndarray:
        """(H·W, 3), uint8."""
        if not self.textures:
            return np.full((self.size[0] * self.size[1], 3), _GREY, dtype=np.uint8)
        return draw_background(random, self.size, self.textures)[1].reshape(-1, 3)

    def _still(self, random: np.random.RandomState) -> tuple[int, np.ndarray, np.ndarray]:
        """An item that stands still: whether in front, the pixels that it covers, and their colours."""
        return random.randint(2), *self._sprite(*_draw_item(random, self.split), random.uniform(size=4))

    def _sprite(self, planes: np.ndarray, colours: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pixels, as places in (H·W), that an item in a state covers, and their colours (n, 3)."""
        height, width = self.size
        x, y, angle = state[0] * width, state[1] * height, 2 * math.pi * state[2]
        side = min(self.size) * _SIZES[0] * (_SIZES[1] / _SIZES[0]) ** state[3]
        picture = Image.fromarray(planes)
        if side < SIDE:
            picture = picture.resize((round(side), round(side)), Image.Resampling.BILINEAR)  # antialiased
        half = math.ceil(side * math.sqrt(0.5)) + 1
        zoom, middle = picture.width / side, picture.width / 2
        a, b = zoom * math.cos(angle), zoom * math.sin(angle)
        u, v = x - math.floor(x) + half, y - math.floor(y) + half  # the item's centre in a square of its own
        turned = (a, b, middle - a * u - b * v, -b, a, middle + b * u - a * v)
        square = np.asarray(
            picture.transform((2 * half,) * 2, Image.Transform.AFFINE, turned, Image.Resampling.BILINEAR)
        )
        cover = square[..., 1] >= 128
        rows, columns = (np.arange(-half, half) + math.floor(place) for place in (y, x))
        where = (rows % height)[:, None] * width + columns % width
        return where[cover], colours[square[..., 0][cover]]


def _draw_item(random: np.random.RandomState, split: str) -> tuple[np.ndarray, np.ndarray]:
    """An item's planes (28, 28, 3) and the colours of its grey levels (256, 3)."""
    pool = items(split)
    planes = pool.planes[random.randint(len(pool.labels))]
    return planes, shades(draw_tint(random)[1])
