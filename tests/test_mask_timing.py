"""Masks at another rate than the clip: by time, frame by frame, or refused."""

from fractions import Fraction

import av
import numpy as np
import pytest
from clips import noise

from kvlock_jax.errors import InputError
from kvlock_jax.media import decode, encode, masks
from kvlock_jax.media.timeline import Timeline, declared_frames, shown_at
from kvlock_jax.pipeline.inputs import read_inputs
from kvlock_jax.settings.schema import EditConfig

SIZE = (16, 24)


def bars(frames: int, rate: float) -> np.ndarray:
    """A mask whose frame says at which 16th of a second it is shown, by the column of its bar."""
    mask = np.zeros((frames, *SIZE, 3), np.uint8)
    for n in range(frames):
        mask[n, :, int(16 * n / rate + 1e-6) % SIZE[1]] = 255
    return mask


def columns(mask: np.ndarray) -> list[int]:
    """The column of the bar in each frame."""
    return mask[:, 0].argmax(axis=1).tolist()


@pytest.fixture
def clip(tmp_path):
    """A clip of 9 frames at 8 per second: its frames are shown at even 16ths."""
    encode.write_video(tmp_path / "clip.mkv", noise(9, *SIZE), 8, lossless=True)
    return tmp_path / "clip.mkv"


def write(path, mask: np.ndarray, rate: float):
    encode.write_video(path, mask, rate, lossless=True)
    return path


def read(clip, mask, **settings) -> np.ndarray:
    return read_inputs(clip, mask, "a star", EditConfig(**settings)).mask


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize(("frames", "rate"), [(18, 16), (36, 32), (27, 24), (45, 40)])
def test_each_frame_takes_the_mask_shown_at_its_time(clip, tmp_path, suffix, frames, rate):
    mask = write(tmp_path / f"mask{suffix}", bars(frames, rate), rate)
    with pytest.warns(UserWarning) as caught:
        found = read(clip, mask)
    assert columns(found) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    (text,) = {str(warning.message) for warning in caught}
    assert f"mask{suffix}: at {rate} frames per second, the video at 8: matched by time" in text


def test_a_slower_mask_is_held(clip, tmp_path):
    mask = write(tmp_path / "mask.mkv", bars(5, 4), 4)
    with pytest.warns(UserWarning, match="at 4 frames per second, .* matched by time"):
        assert columns(read(clip, mask)) == [0, 0, 4, 4, 8, 8, 12, 12, 16]


@pytest.mark.parametrize(("frames", "rate"), [(18, 16), (40, 32), (5, 4)])
def test_a_part_of_both_is_matched_by_time(clip, tmp_path, frames, rate):
    mask = write(tmp_path / "mask.mkv", bars(frames, rate), rate)
    with pytest.warns(UserWarning, match="matched by time"):
        found = columns(read(clip, mask, frame_num=5))
    assert found == ([0, 2, 4, 6, 8] if rate > 8 else [0, 0, 4, 4, 8])


def test_as_many_frames_are_taken_one_by_one(clip, tmp_path):
    mask = write(tmp_path / "mask.mp4", bars(9, 16), 16)
    with pytest.warns(UserWarning, match="but as many: matched frame by frame"):
        assert columns(read(clip, mask)) == list(range(9))
    # a part of both files, whose containers count nine frames each
    encode.write_video(tmp_path / "clip.mp4", noise(9, *SIZE), 8, lossless=True)
    with pytest.warns(UserWarning, match="but as many: matched frame by frame"):
        assert columns(read(tmp_path / "clip.mp4", mask, frame_num=5)) == list(range(5))


@pytest.mark.parametrize("rate", [8, Fraction(8000, 1001), 8.02])
def test_one_rate_is_silent(clip, tmp_path, rate):
    mask = write(tmp_path / "mask.mkv", bars(9, 8), rate)
    np.testing.assert_array_equal(columns(read(clip, mask)), range(0, 18, 2))
    np.testing.assert_array_equal(columns(read(clip, mask, frame_num=4)), range(0, 8, 2))


@pytest.mark.parametrize(
    ("frames", "rate", "message"),
    [
        (10, 16, r"its 10 frames last 0\.62 s, the video 1\.12 s: the mask must last as long"),
        (30, 16, r"its 30 frames last 1\.88 s, the video 1\.12 s: cut the mask"),
        (7, 8, "7 frames, but the video has 9"),
        (11, 8, "11 frames, but the video has 9"),
    ],
)
def test_masks_that_do_not_last_as_long_are_refused(clip, tmp_path, frames, rate, message):
    mask = write(tmp_path / "mask.mkv", bars(frames, rate), rate)
    with pytest.raises(InputError, match=rf"mask\.mkv: {message}"):
        read(clip, mask)


def test_a_part_needs_a_mask_that_lasts(clip, tmp_path):
    mask = write(tmp_path / "mask.mkv", bars(4, 16), 16)
    with pytest.raises(InputError, match=r"its 4 frames last 0\.25 s, the video 0\.62 s"):
        read(clip, mask, frame_num=5)
    assert columns(read(clip, write(tmp_path / "m.mkv", bars(6, 8), 8), frame_num=5))[-1] == 8


def test_images_have_no_time(clip, tmp_path):
    """A folder has no rate of its own: its images are the frames, one by one."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for n, image in enumerate(bars(9, 8)):
        encode.write_png(folder / f"{n}.png", image)
    assert columns(read(clip, folder)) == list(range(0, 18, 2))
    mask = write(tmp_path / "mask.mkv", bars(18, 16), 16)
    with pytest.raises(InputError, match="18 frames, but the video has 9"):
        read(folder, mask)  # as a clip
    with pytest.warns(UserWarning, match="matched by time"):
        assert columns(read(folder, mask, fps=8.0)) == list(range(0, 18, 2))
    with pytest.raises(InputError, match="18 frames, but the video has 9"):
        read(noise(9, *SIZE), mask)


def test_a_clip_of_varying_rate_goes_by_its_timestamps(tmp_path):
    ticks = [0, 1, 2, 3, 4, 8, 12, 16]  # 16ths of a second
    with av.open(str(tmp_path / "clip.mkv"), "w") as output:
        stream = output.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "bgr0"
        stream.codec_context.time_base = Fraction(1, 16)
        for tick, image in zip(ticks, noise(8, *SIZE), strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 16)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert decode.read_video(tmp_path / "clip.mkv").times is not None
    mask = write(tmp_path / "mask.mkv", bars(18, 16), 16)
    with pytest.warns(UserWarning, match="matched by time"):
        assert columns(read(tmp_path / "clip.mkv", mask)) == ticks


def test_rounded_timestamps_do_not_delay_a_frame():
    """Matroska counts milliseconds: a mask's frame may seem to begin after the clip's."""
    clip = Timeline(np.array([0.0, 0.0417, 0.0833]), 1 / 24)
    mask = Timeline(np.round(np.arange(6) / 48, 3), 1 / 48)
    assert shown_at(clip, mask, cut=False).tolist() == [0, 2, 4]


def test_a_container_counts_its_frames(tmp_path, clip):
    assert declared_frames(write(tmp_path / "m.mp4", bars(9, 8), 8)) == 9
    assert declared_frames(clip) == declared_frames(tmp_path / "missing.mp4") == 0
    assert masks.read_mask(tmp_path / "m.mp4", 9, *SIZE).shape == (9, *SIZE)
