"""Videos that PyAV writes here, of several codecs and rates, whole and damaged; every frame says which it is."""

import fractions
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from vitcourse.data import Augmented, Sampling, VideoFolder, moving, open_dataset, photo, split_names
from vitcourse.data.decoding import BrokenVideo, Limits, VideoFacts, probe, read_frames, resolve_backend

av = pytest.importorskip("av")
SIZE = (48, 32)  # width, height


def write(path, frames=30, fps=10, codec="libx264", times=None, gop=8, pictures=None):
    """Frame k is of grey 8·k: told apart however lossy the codec; ``times`` in milliseconds make the rate vary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.gop_size = gop
        if times is not None:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for k in range(frames):
            picture = np.full((SIZE[1], SIZE[0], 3), 8 * k, dtype=np.uint8) if pictures is None else pictures[k]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[k], fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def which(clip) -> list[int]:
    return (clip.float().mean((0, 2, 3)) / 8).round().int().tolist()


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write(tmp_path_factory.mktemp("film") / "film.mp4")


@pytest.fixture
def folder(tmp_path, film):
    for split, name, count in (("train", "dance", 3), ("train", "jump", 2), ("test", "dance", 1), ("test", "jump", 1)):
        for k in range(count):
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(film, tmp_path / split / name / f"{k}.mp4")
    return tmp_path


def read(file, sampling, clip=0):
    facts = probe(str(file), Limits(), "pyav")
    return read_frames(str(file), sampling.times(facts, clip), facts, Limits(), "pyav")


# --- Frames by time ---

FILES = {
    "h264.mp4": {},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "h264.mkv": {"gop": 30},
    "h264.ts": {},  # whose key frames have no index
    "mpeg4.avi": {"codec": "mpeg4"},
    "ntsc.mov": {"fps": fractions.Fraction(30000, 1001)},
    "slow.mp4": {"fps": 2},
}


@pytest.mark.parametrize("name", FILES)
def test_the_frame_is_the_one_shown_at_the_time(name, tmp_path):
    file = write(tmp_path / name, **FILES[name])
    facts, rate = probe(str(file), Limits(), "pyav"), float(FILES[name].get("fps", 10))
    assert (facts.height, facts.width) == SIZE[::-1] and facts.fps == pytest.approx(rate, rel=1e-3)
    assert facts.duration == pytest.approx(30 / rate, abs=0.1 / rate)
    for numbers in ([0, 1, 2], [11, 12, 13, 14], [5, 5, 20, 28], [29], [25, 3, 17]):
        times = (np.array(numbers) + 0.5) / rate
        clip = read_frames(str(file), times, facts, Limits(), "pyav")
        assert clip.shape == (3, len(numbers), *SIZE[::-1]) and clip.dtype == torch.uint8 and clip.is_contiguous()
        assert which(clip) == numbers
    assert which(read(file, Sampling(4))) == [13, 14, 15, 16]
    assert which(read(file, Sampling(3, fps=rate / 5))) == [7, 12, 17]  # every fifth, from the middle
    assert which(read(file, Sampling(6, fps=rate * 2))) == [13, 14, 14, 15, 15, 16]  # faster than the file: twice


def test_varying_rates_are_read_by_time(tmp_path):
    """Ten frames at 20 a second, then ten at 2 a second."""
    times = [50 * k for k in range(10)] + [500 + 500 * k for k in range(10)]
    file = write(tmp_path / "varying.mkv", frames=20, times=times)
    facts = probe(str(file), Limits(), "pyav")
    seconds = np.array([0.12, 0.49, 0.5, 0.99, 1.1, 3.3])
    assert which(read_frames(str(file), seconds, facts, Limits(), "pyav")) == [2, 9, 10, 10, 11, 15]


def test_a_film_that_does_not_begin_at_zero(tmp_path):
    file = write(tmp_path / "late.mkv", frames=20, times=[7000 + 100 * k for k in range(20)])
    facts = VideoFacts(2.0, 10.0, *SIZE[::-1])
    assert which(read_frames(str(file), np.array([0.05, 0.51, 1.55]), facts, Limits(), "pyav")) == [0, 5, 15]


def test_a_film_turned_by_its_file_comes_upright(film, tmp_path, monkeypatch):
    """Phones note a quarter turn; PyAV cannot write one, so its reader is told that there is one."""
    from vitcourse.data import decoding

    upper = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    upper[: SIZE[1] // 2] = 255
    file = write(tmp_path / "upper.mp4", frames=4, pictures=[upper] * 4)
    monkeypatch.setattr(decoding, "_rotation", lambda frame: 1)  # 90 degrees anticlockwise: up becomes left
    facts = probe(str(file), Limits(), "pyav")
    assert (facts.height, facts.width) == SIZE
    clip = read_frames(str(file), np.array([0.0]), facts, Limits(), "pyav")[0, 0].float()
    assert clip.shape == (48, 32) and clip[:, :14].mean() > 240 and clip[:, 18:].mean() < 15


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, 1), (-90, 3), (180, 2), (-180, 2)])
def test_rotations_are_quarter_turns(degrees, turns):
    from vitcourse.data.decoding import _rotation

    assert _rotation(types.SimpleNamespace(rotation=degrees)) == turns and _rotation(types.SimpleNamespace()) == 0


def test_clips_of_moving_survive_a_codec(tmp_path):
    clip, _ = moving("test", img_size=SIZE[::-1], num_frames=6)[0]
    file = write(tmp_path / "moving.mp4", frames=6, pictures=list(clip.permute(1, 2, 3, 0).contiguous().numpy()))
    assert (read(file, Sampling(6)).float() - clip.float()).abs().mean() < 12


# --- Which times ---

TEN = VideoFacts(duration=10.0, fps=25.0, height=8, width=8)


def test_uniform_offsets():
    assert Sampling(5).times(TEN, 0) == pytest.approx(4.9 + np.arange(5) / 25)
    three = [Sampling(2, fps=1.0, clips=3).times(TEN, k).tolist() for k in range(3)]
    assert three == [[0, 1], [4, 5], [8, 9]]


def test_random_offsets_are_seeded_and_reach_everywhere():
    sampling = Sampling(2, fps=1.0, offset="random")
    torch.manual_seed(0)
    starts = np.array([sampling.times(TEN, 0)[0] for _ in range(200)])
    torch.manual_seed(0)
    assert sampling.times(TEN, 0)[0] == starts[0]
    assert 0 <= starts.min() < 0.5 and 7.5 < starts.max() <= 8


def test_a_clip_longer_than_the_video(film):
    assert which(read(film, Sampling(5, fps=1.0))) == [0, 10, 20, 29, 29]  # padded with the last frame
    assert which(read(film, Sampling(5, fps=1.0, short="loop"))) == [0, 10, 20, 0, 10]
    with pytest.raises(
        ValueError, match=r"lasts 3.00 s, but 5 frames at 1 a second take 5.00 s.*short='pad' or 'loop'"
    ):
        read(film, Sampling(5, fps=1.0, short="raise"))
    assert len(which(read(film, Sampling(30, short="raise")))) == 30


# --- Folders ---


def test_a_folder_of_videos(folder):
    spec = f"video:{folder}"
    assert split_names(spec) == ["train", "test"]
    train, test = (open_dataset(spec, split, num_frames=4, fps=5.0) for split in ("train", "test"))
    assert train.classes == test.classes == ["dance", "jump"] and train.targets == [0, 0, 0, 1, 1]
    assert (train.sampling.offset, test.sampling.offset) == ("random", "uniform")
    clip, label = test[1]
    assert clip.shape == (3, 4, 32, 48) and label == 1 and which(clip) == [11, 13, 15, 17]
    many = open_dataset(spec, "test", num_frames=2, clips=3)
    assert many.targets == [0, 0, 0, 1, 1, 1] and [which(many[k][0]) for k in range(3)] == [[0, 1], [14, 15], [28, 29]]
    part = many.take([5, 1])
    assert part.targets == [1, 0] and which(part[0][0]) == [28, 29]


def test_random_clips_depend_on_seed_epoch_and_index_alone(folder):
    train = Augmented(open_dataset(f"video:{folder}", "train", num_frames=2), seed=3)
    found = {(epoch, k): which(train[epoch, k][0]) for epoch in range(3) for k in range(5)}
    torch.manual_seed(99)
    assert all(which(train[key][0]) == value for key, value in reversed(found.items()))
    assert len({tuple(value) for value in found.values()}) > 5


def test_a_transform_takes_the_clip(folder):
    dataset = open_dataset(f"video:{folder}", "test", transform=lambda clip: clip.shape)
    assert dataset[0] == ((3, 8, 32, 48), 0)


def test_missing_splits_and_classes(folder, capsys):
    with pytest.raises(
        FileNotFoundError, match=r"(?s)has no val split; expected a folder per class.*holds test, train"
    ):
        open_dataset(f"video:{folder}", "val")
    shutil.rmtree(folder / "test" / "jump")
    assert open_dataset(f"video:{folder}", "test").classes == ["dance", "jump"]
    assert "has no videos of jump, which the model learns all the same" in capsys.readouterr().err
    shutil.copytree(folder / "test" / "dance", folder / "test" / "swim")
    with pytest.raises(ValueError, match="has videos of swim, which .*train does not have"):
        open_dataset(f"video:{folder}", "test")


# --- What is no video, or a damaged one ---


def broken(path, film):
    content = film.read_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {
        "empty": b"",
        "text": b"this is no film\n" * 20,
        "picture": (film.parent / "cat.png").read_bytes() if (film.parent / "cat.png").exists() else b"",
        "cut": content[: len(content) // 2],
        "playlist": f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{film}\n#EXT-X-ENDLIST\n".encode(),
    }
    path.write_bytes(kinds[path.stem])
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "picture", "cut", "playlist"])
def test_a_file_that_is_no_video_is_named(kind, film, tmp_path):
    Image.fromarray(photo("cat")[0].numpy()).save(film.parent / "cat.png")
    file = broken(tmp_path / f"{kind}.mp4", film)
    with pytest.raises(BrokenVideo, match=rf"{kind}\.mp4 is no usable video: .*replace it, or delete it"):
        probe(str(file), Limits(), "pyav")


def test_sound_alone_is_no_video(tmp_path):
    file = tmp_path / "sound.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(BrokenVideo, match="sound.mp4 is no usable video: it has no pictures"):
        probe(str(file), Limits(), "pyav")


def test_a_file_cut_off_is_found_when_its_end_is_wanted(tmp_path):
    whole = write(tmp_path / "whole.webm", codec="libvpx-vp9").read_bytes()
    (cut := tmp_path / "cut.webm").write_bytes(whole[: len(whole) * 6 // 10])
    facts = probe(str(cut), Limits(), "pyav")  # its head says that it is whole
    assert facts.duration == pytest.approx(3.0, abs=0.1)
    with pytest.raises(BrokenVideo, match=r"cut.webm is damaged: .*it says that it lasts 3.00 s"):
        read_frames(str(cut), np.array([0.0, 2.9]), facts, Limits(), "pyav")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.mp4 is missing"):
        probe(str(tmp_path / "gone.mp4"), Limits(), "pyav")


def test_broken_files_are_raised_or_skipped(folder, film, capsys):
    broken(folder / "train" / "dance" / "cut.mp4", film)
    with pytest.raises(ValueError, match=r"cut.mp4 is no usable video"):
        open_dataset(f"video:{folder}", "train")
    dataset = open_dataset(f"video:{folder}", "train", on_error="skip")
    assert dataset.targets == [0, 0, 0, 1, 1]
    err = capsys.readouterr().err
    assert err.count("vitcourse:") == 1 and "left out 1 of 6 videos" in err and "cut.mp4" in err
    broken(folder / "train" / "jump" / "empty.mp4", film).replace(dataset.files[3])  # broken since
    clip, label = dataset[3]
    assert label == 1 and clip.shape[1] == 8
    assert f"{dataset.files[3]} is no usable video" in capsys.readouterr().err
    broken(folder / "train" / "jump" / "empty.mp4", film).replace(dataset.files[4])
    with pytest.raises(ValueError, match="no video of class 'jump' can be read"):
        dataset[3]


def test_a_short_video_is_named_when_it_is_asked_for(folder):
    with pytest.raises(ValueError, match=r"0.mp4: it lasts 3.00 s, but 8 frames at 2 a second take 4.00 s"):
        open_dataset(f"video:{folder}", "test", fps=2.0, short="raise")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"seconds": 2.0}, r"film.mp4 lasts 3.0 s, more than the limit of 2 s"),
        ({"pixels": 1000}, r"film.mp4 has frames of 48 × 32 pixels, more than the limit of 1000"),
    ],
)
def test_limits(film, limits, message):
    with pytest.raises(ValueError, match=message):
        probe(str(film), Limits(**limits), "pyav")


def test_limit_of_decoded_frames(tmp_path):
    file = write(tmp_path / "far.mp4", gop=100)  # one key frame: the last frame takes all of them
    facts = probe(str(file), Limits(), "pyav")
    with pytest.raises(ValueError, match="far.mp4: a clip took more than the limit of 10 frames"):
        read_frames(str(file), np.array([2.0]), facts, Limits(frames=10), "pyav")
    assert which(read_frames(str(file), np.array([0.55]), facts, Limits(frames=10), "pyav")) == [5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames 0"),
        ({"fps": 0.0}, "fps 0.0 is no rate"),
        ({"fps": float("inf")}, "fps inf is no rate"),
        ({"offset": "middle"}, "offset 'middle' is unknown"),
        ({"clips": 0}, "clips 0"),
        ({"clips": 2, "offset": "random"}, "clips 2 with offset 'random'"),
        ({"short": "stretch"}, "short 'stretch' is unknown; use one of pad, loop, raise"),
        ({"on_error": "ignore"}, "on_error 'ignore' is unknown"),
        ({"backend": "opencv"}, "backend 'opencv' is unknown"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(f"video:{folder}", "test", **options)


def test_bad_arguments(film):
    with pytest.raises(ValueError, match="targets reach from 0 to 2, but there are 2 classes"):
        VideoFolder([film, film], [0, 2], ["a", "b"])
    with pytest.raises(ValueError, match="1 files and 0 targets"):
        VideoFolder([film], [], ["a"])
    with pytest.raises(ValueError, match="limit of pixels 0 must be positive"):
        Limits(pixels=0)


def test_without_a_decoder_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs PyAV: pip install 'vitcourse\[video\]'"):
        resolve_backend("auto")
    with pytest.raises(ImportError, match="pip install torchcodec"):
        resolve_backend("torchcodec")


@pytest.mark.parametrize("backend", ["auto", "torchcodec"])
def test_torchcodec_without_ffmpeg_says_so(backend, monkeypatch):
    """What its version 0.17 is like where there is no FFmpeg: it can be imported."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "torchcodec" or None)
    fake = types.ModuleType("torchcodec")
    fake.ffmpeg_major_version, fake.decoders = None, types.ModuleType("torchcodec.decoders")
    monkeypatch.setitem(sys.modules, "torchcodec", fake)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", fake.decoders)
    with pytest.raises(ImportError, match="torchcodec finds no FFmpeg .* or take PyAV: pip install"):
        resolve_backend(backend)
    fake.ffmpeg_major_version = 8
    assert resolve_backend(backend) == "torchcodec"


def test_torchcodec_reads_the_same_frames(film, tmp_path):
    try:
        resolve_backend("torchcodec")
    except ImportError as error:
        pytest.skip(str(error))
    facts = probe(str(film), Limits(), "torchcodec")
    for numbers in ([0, 1, 2], [25, 3, 17], [29]):
        times = (np.array(numbers) + 0.5) / 10
        assert which(read_frames(str(film), times, facts, Limits(), "torchcodec")) == numbers
    for kind in ("empty", "text", "picture", "cut", "playlist"):
        Image.fromarray(photo("cat")[0].numpy()).save(film.parent / "cat.png")
        with pytest.raises(BrokenVideo, match=rf"{kind}\.mp4 is no usable video: (?!.*cpp).*replace it"):
            probe(str(broken(tmp_path / f"{kind}.mp4", film)), Limits(), "torchcodec")
