"""Moving clips: the label is the motion, and no frame, nor all frames without their order, tells it."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vitcourse.data import moving
from vitcourse.data.moving import DIRECTIONS, MEAN, MOTIONS, STD, Moving

SMALL = {"img_size": 24, "num_frames": 5}


def states(dataset: Moving, number: int) -> np.ndarray:
    """The states (T, 4) that the frames of a clip are drawn from."""
    seen = []

    class Watched(Moving):
        def _sprite(self, planes, colours, state):
            seen.append(state.copy())
            return super()._sprite(planes, colours, state)

    watched = object.__new__(Watched)
    watched.__dict__.update(dataset.__dict__)
    watched[number]
    return np.array(seen[:: -1 if number % 2 == 0 else 1])


def test_a_clip_and_its_twin_are_one_film_in_both_directions():
    dataset = moving("train", **SMALL, distractors=1)
    for film in range(12):
        (backward, low), (forward, high) = dataset[2 * film], dataset[2 * film + 1]
        assert torch.equal(backward.flip(1), forward) and high == low + 1
        frames = [sorted(clip[:, t].numpy().tobytes() for t in range(5)) for clip in (backward, forward)]
        assert frames[0] == frames[1]  # the same frames as often: nothing but their order tells the label
        assert not torch.equal(backward, forward)


def test_at_every_time_a_frame_is_distributed_alike_for_all_labels():
    """Places on the four circles, at the first, the middle and the last frame: uniform for each of the motions."""
    dataset = moving("train", img_size=16, num_frames=5, length=1600, textures=())
    found = np.stack([states(dataset, number) for number in range(1600)])  # (N, T, 4)
    labels = np.array(dataset.targets)
    for label in range(8):
        for t in (0, 2, 4):
            places = found[labels == label, t]  # (200, 4)
            counts = np.stack([np.histogram(places[:, c], 4, (0, 1))[0] for c in range(4)])
            chi_squared = ((counts - 50) ** 2 / 50).sum(1)
            assert (chi_squared < 21).all()  # of three degrees of freedom: exceeded once in 8 000
    assert (found >= 0).all() and (found < 1).all()


@pytest.mark.parametrize("label", range(8))
def test_the_label_is_the_motion(label):
    found = states(moving("test", **SMALL), 8 + label)
    step = (np.diff(found, axis=0) + 0.5) % 1 - 0.5
    axis, sign = label // 2, (-1, 1)[label % 2]
    assert (
        MOTIONS[label]
        == [("left", "right"), ("up", "down"), ("counterclockwise", "clockwise"), ("shrink", "grow")][axis][label % 2]
    )
    assert (sign * step[:, axis] > 0.02).all() and np.allclose(step[:, axis], step[0, axis])
    assert np.allclose(np.delete(step, axis, axis=1), 0)


def mask_of(dataset: Moving, state: list[float], planes: np.ndarray) -> np.ndarray:
    where, _ = dataset._sprite(planes, np.zeros((256, 3), np.uint8), np.array(state))
    mask = np.zeros(dataset.size, dtype=bool)
    mask.ravel()[where] = True
    assert mask.sum() == len(where)  # no pixel twice
    return mask


def test_coordinates_are_what_they_are_called():
    """An L of known shape: where it lies, how it turns on the screen, how large it is."""
    dataset = moving("test", img_size=(64, 80))
    square = np.full((28, 28, 3), 255, dtype=np.uint8)
    for x, y in ((0.5, 0.5), (0.25, 0.75)):
        rows, columns = np.nonzero(mask_of(dataset, [x, y, 0, 0.3], square))
        assert abs(columns.mean() + 0.5 - 80 * x) < 0.6 and abs(rows.mean() + 0.5 - 64 * y) < 0.6
    areas = [mask_of(dataset, [0.5, 0.5, 0, size], square).sum() for size in (0, 0.5, 0.999)]
    sides = 64 * np.array([0.28, (0.28 * 0.6) ** 0.5, 0.6])
    assert np.allclose(np.sqrt(areas), sides, atol=1.1)
    top = square.copy()
    top[14:] = 0  # the upper half
    quarter = mask_of(dataset, [0.5, 0.5, 0.25, 0.5], top)
    rows, columns = np.nonzero(quarter)
    assert columns.min() >= 39 and rows.min() < 24 < 40 < rows.max()  # a quarter clockwise: up has become right


def test_what_leaves_at_one_side_comes_in_at_the_other():
    dataset = moving("test", img_size=32)
    square = np.full((28, 28, 3), 255, dtype=np.uint8)
    middle = mask_of(dataset, [0.5, 0.5, 0.1, 0.5], square)
    corner = mask_of(dataset, [0, 0, 0.1, 0.5], square)
    assert (np.roll(middle, (16, 16), (0, 1)) == corner).all() and corner[0, 0] and corner[-1, -1]


@pytest.mark.parametrize("options", [{}, {"distractors": 3}, {"textures": ()}, {"img_size": (20, 44), "speed": 2.0}])
def test_clips_are_functions_of_seed_split_and_index(options):
    dataset = moving("train", **{**SMALL, **options})
    clip, label = dataset[13]
    assert clip.shape == (3, 5, *dataset.size) and clip.dtype == torch.uint8 and clip.is_contiguous()
    assert label == dataset.targets[13] == 13 % 8
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[13][0], clip)
    others = (moving("train", **{**SMALL, **options}, seed=1), moving("test", **{**SMALL, **options}))
    assert not any(torch.equal(other[13][0], clip) for other in others)


def test_only_the_item_moves():
    dataset = moving("train", **SMALL, distractors=2)
    for number in range(8):
        clip, _ = dataset[number]
        changed = (clip != clip[:, :1]).any(0).any(0)
        assert 0 < changed.float().mean() < 0.9
    plain = moving("train", **SMALL, textures=())[0][0]
    assert (plain == 128).float().mean() > 0.5


def test_direction_of_time():
    motion, direction = moving("val", **SMALL), moving("val", **SMALL, label="direction")
    assert direction.classes == list(DIRECTIONS) and direction.targets[:4] == [0, 1, 0, 1]
    for number in (4, 5):
        assert torch.equal(motion[number][0], direction[number][0])
        assert direction[number][1] == motion[number][1] % 2
    assert np.bincount(motion.targets).tolist() == [100] * 8


def test_workers_parts_and_transform():
    dataset = moving("test", **SMALL, length=6, transform=lambda clip: clip.float() / 255)
    loader = DataLoader(dataset, batch_size=3, num_workers=2)
    clips, labels = zip(*loader, strict=True)
    assert torch.cat(labels).tolist() == dataset.targets
    assert torch.equal(torch.cat(clips), torch.stack([dataset[i][0] for i in range(6)]))
    part = dataset.take([5, 0])
    assert torch.equal(part[0][0], dataset[5][0]) and part.targets == [5, 0]


def test_mean_and_std_are_measured():
    dataset = moving("train", img_size=32, num_frames=2)
    pixels = torch.stack([dataset[i][0] for i in range(0, 400)]) / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3, 4)), torch.tensor(MEAN), atol=0.02, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3, 4)), torch.tensor(STD), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split 'dev' does not exist"),
        ({"num_frames": 1}, "num_frames 1 shows no motion"),
        ({"img_size": (15, 60)}, "is too small"),
        ({"length": 7}, "length 7 is odd; .* use 8"),
        ({"label": "time"}, "label 'time' is unknown"),
        ({"speed": 0}, "speed 0 is out of range"),
        ({"speed": 5}, "speed 5 is out of range"),
        ({"distractors": -1}, "distractors -1 are out of range"),
        ({"textures": ["sea"]}, "textures"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        moving(**options)
