"""What is written appears whole or not at all."""

import signal
import subprocess
import sys

import pytest
from clips import noise, only

from kvlock_jax.errors import InputError
from kvlock_jax.media import encode


def test_output_is_checked_before_the_work(tmp_path):
    assert encode.check_output(str(tmp_path / "a.MP4")).name == "a.MP4"
    assert encode.check_output(tmp_path / "trace.json", (".json",)).name == "trace.json"
    (tmp_path / "folder.mp4").mkdir()
    for name, message in (
        ("missing/a.mp4", "output folder .*missing does not exist"),
        ("a.txt", r"must end in \.mp4, \.m4v, \.mov, \.mkv"),
        ("a", "must end in"),
        ("folder.mp4", "is a folder"),
    ):
        with pytest.raises(InputError, match=message):
            encode.check_output(tmp_path / name)
        with pytest.raises(InputError, match=message):
            encode.write_video(tmp_path / name, noise(), 24)
    with pytest.raises(InputError, match="must end in"):
        encode.write_png(tmp_path / "a.jpg", noise()[0])
    assert only(tmp_path) == ["folder.mp4"]


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_named(tmp_path, fps):
    with pytest.raises(InputError, match="frame rate must be over 0"):
        encode.write_video(tmp_path / "a.mp4", noise(), fps)


@pytest.mark.parametrize(
    "frames", [noise() / 255, noise()[0], noise()[..., :2], noise()[:0], noise()[:, :0]]
)
def test_frames_that_are_none_are_named(tmp_path, frames, unchecked):
    with pytest.raises(InputError, match="must be uint8 of shape frames height width 3, found"):
        encode.write_video(tmp_path / "a.mp4", frames, 24)
    assert only(tmp_path) == []


@pytest.mark.parametrize(
    ("raised", "caught"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("a bug"), RuntimeError),
        (OSError(28, "No space left on device"), InputError),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_write_leaves_nothing_behind(
    tmp_path, monkeypatch, raised, caught, existing
):
    if existing:
        (tmp_path / "a.mkv").write_bytes(b"the last run")
    to_frame, seen = encode._frame, []

    def interrupted(image):
        seen.append(only(tmp_path))
        if len(seen) == 8:
            raise raised
        return to_frame(image)

    monkeypatch.setattr(encode, "_frame", interrupted)
    with pytest.raises(caught, match=str(raised.args[1]) if caught is InputError else None):
        encode.write_video(tmp_path / "a.mkv", noise(9, 96, 96), 24, lossless=True)
    assert any(name.endswith(".part") for name in seen[-1])  # it was half-way, beside the target
    assert only(tmp_path) == (["a.mkv"] if existing else [])
    if existing:
        assert (tmp_path / "a.mkv").read_bytes() == b"the last run"


def test_a_killed_write_leaves_the_target_alone(tmp_path):
    (tmp_path / "a.mkv").write_bytes(b"the last run")
    script = """
import os, signal, sys
import numpy as np
from kvlock_jax.media import encode
to_frame, count = encode._frame, iter(range(99))
def killed(image):
    if next(count) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return to_frame(image)
encode._frame = killed
frames = np.random.default_rng(0).integers(0, 256, (40, 96, 96, 3), np.uint8)
encode.write_video(sys.argv[1], frames, 24, lossless=True)
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.mkv")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "a.mkv").read_bytes() == b"the last run"
    assert len(only(tmp_path)) == 2  # and the temporary file, which nobody could remove
