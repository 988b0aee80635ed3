"""Memory: frames are resized as they are decoded, and what does not fit is named."""

import tracemalloc

import av
import numpy as np
import pytest
from clips import encode as encode_by
from clips import noise, write_stamps

from kvlock_jax.errors import InputError
from kvlock_jax.media import decode, encode, room


def small(image):
    return image[::16, ::16]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_frames_are_resized_as_they_are_decoded(tmp_path, name):
    frames = np.repeat(noise(1, 256, 256), 64, axis=0)
    encode.write_video(tmp_path / name, frames, 24)
    tracemalloc.start()
    found = decode.read_video(tmp_path / name, resize=small)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.frames.shape == (64, 16, 16, 3)
    assert peak < frames.nbytes / 4


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_what_the_memory_does_not_hold_is_refused_at_the_first_frame(tmp_path, monkeypatch, name):
    encode.write_video(tmp_path / name, noise(30), 24)
    monkeypatch.setattr(room, "available", lambda: 20 * 32 * 48 * 3)
    message = rf"{name}: 30 frames take .* of memory, .* free: .*--frame_num"
    with pytest.raises(InputError, match=message):
        decode.read_video(tmp_path / name)
    assert len(decode.read_video(tmp_path / name, 20).frames) == 20
    assert len(decode.read_video(tmp_path / name, resize=small).frames) == 30


@pytest.mark.parametrize(
    "error", [MemoryError(), av.error.MemoryError(12, "Cannot allocate memory")]
)
def test_memory_that_runs_out_is_named(tmp_path, error):
    encode.write_video(tmp_path / "a.mp4", noise(), 24)
    left = iter(range(3))

    def failing(image):
        if next(left, None) is None:
            raise error
        return image

    with pytest.raises(InputError, match=r"out of memory after 3 frames: .*--frame_num"):
        decode.read_video(tmp_path / "a.mp4", resize=failing)


def test_a_rate_that_is_a_clocks_refuses_nothing(tmp_path, monkeypatch):
    path = write_stamps(tmp_path / "a.mkv", 400 * np.arange(6), 1000)
    monkeypatch.setattr(room, "available", lambda: 20 * 32 * 48 * 3)
    assert len(decode.read_video(path).frames) == 6


def test_more_frames_than_the_container_says_are_read(tmp_path):
    """A raw stream has no count."""
    found = decode.read_video(encode_by(tmp_path / "a.h264", noise(40), "libx264", "yuv420p"))
    assert len(found.frames) == 40


def test_the_free_memory_is_a_number_or_unknown():
    free = room.available()
    assert free is None or free > 0
