"""`kvlock mask`, and boxes of several frames in `kvlock edit`."""

import json
import sys

import numpy as np
import pytest
import tiny
from commands import edited

from kvlock_jax.cli import main
from kvlock_jax.demo import world
from kvlock_jax.media import decode
from kvlock_jax.media.encode import write_png, write_video


@pytest.fixture
def kvmask(tmp_path, monkeypatch, capsys):
    """Runs `kvlock mask` on a clip of the demo's world."""
    monkeypatch.chdir(tmp_path)
    clip = world.render(world.random_scene(4))
    write_video("in.mkv", clip.video, 12, lossless=True)
    for number in (0, 8):
        write_png(f"{number}.png", clip.mask[number, ..., None].repeat(3, -1) * np.uint8(255))

    def run(*flags: str) -> tuple[int, str, str]:
        status = main.main(["mask", "--src_video=in.mkv", "--save_file=m.mkv", *flags])
        return status, *capsys.readouterr()

    run.clip = clip
    return run


def written() -> np.ndarray:
    frames = decode.read_video("m.mkv").frames
    assert set(np.unique(frames)) <= {0, 255}
    return frames[..., 0] > 0


def test_boxes_of_some_frames(kvmask):
    status, output, errors = kvmask("--bbox", "0:8,8,24,24", "8:24,8,40,24", "--compare=c.mp4")
    assert (status, errors) == (0, "")
    assert "9 frames of 96x96 at 12 per second" in output
    assert "2.8 % of the pixels, in frames 0 to 8" in output and "lost" not in output
    wanted = np.zeros((9, 96, 96), bool)
    for number, frame in enumerate(wanted):
        frame[8:24, 8 + 2 * number : 24 + 2 * number] = True
    np.testing.assert_array_equal(written(), wanted)
    assert decode.read_video("c.mp4").frames.shape == (9, 96, 96, 3)


def test_one_box_is_every_frame(kvmask):
    assert kvmask("--bbox=8,8,24,24", "--frame_num=5")[0] == 0
    assert written().shape == (5, 96, 96) and (written() == written()[0]).all()


def test_masks_of_some_frames(kvmask):
    assert kvmask("--src_mask", "0:0.png", "8:8.png")[0] == 0
    np.testing.assert_array_equal(written()[[0, 8]], kvmask.clip.mask[[0, 8]])
    both = (written() & kvmask.clip.mask).sum() / (written() | kvmask.clip.mask).sum()
    assert both > 0.9


def test_an_object_is_followed_and_its_loss_is_told(kvmask):
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    assert kvmask("--src_mask=0.png", "--track")[0] == 0
    truth = kvmask.clip.mask
    assert (written() & truth).sum() > 0.85 * (written() | truth).sum()
    video = kvmask.clip.video.copy()
    video[5:] = 100
    write_video("in.mkv", video, 12, lossless=True)
    status, output, _ = kvmask("--src_mask=0.png", "--track")
    assert status == 0
    assert "in frames 0 to 4" in output
    assert "lost     frames 5 to 8: the mask is empty" in output


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "give either --bbox"),
        (["--bbox=0:0,0,8,8", "--src_mask=0.png"], "give either --bbox"),
        (["--bbox=9:0,0,8,8"], "there is no frame 9, the last frame of the video is 8"),
        (["--bbox=0:0,0,8"], "bbox must be four whole numbers"),
        (["--bbox", "0,0,8,8", "4:0,0,9,9"], "must be FRAME:x0,y0,x1,y1, found '0,0,8,8'"),
        (["--bbox=0,0,97,8"], "0,0,97,8 is not a box inside 96x96"),
        (["--src_mask=0:black.png"], "black.png: is empty"),
        (["--src_mask=0:absent.png"], "absent.png: no such file"),
        (["--src_mask=in.mkv"], "in.mkv: 9 frames, but the video has 1"),
        (["--src_mask=m.mkv"], "are the same file"),
        (["--bbox=0,0,8,8", "--frame_num=0"], "--frame_num must be 1 or more"),
        (["--bbox=0,0,8,8", "--dilate=2"], "unknown argument --dilate=2"),
    ],
)
def test_bad_input(kvmask, flags, problem):
    write_png("black.png", np.zeros((96, 96, 3), np.uint8))
    status, _, errors = kvmask(*flags)
    assert status == 2 and problem in errors and errors.count("\n") == 1


def test_without_opencv(kvmask, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    status, _, errors = kvmask("--bbox=0,0,8,8", "--track")
    wanted = "error: following an object needs OpenCV: pip install '.[masks]'\n"
    assert (status, errors) == (2, wanted)
    assert kvmask("--bbox=0,0,8,8")[0] == 0  # nothing else needs it


def test_an_edit_takes_boxes_of_some_frames(kvlock):
    boxes = ["--bbox", "0:8,8,16,16", "4:24,8,32,16"]
    status, output, _ = kvlock("--lossless", "--trace=t.json", *boxes, src_mask=None)
    assert status == 0 and "4.2 %" in output
    with open("t.json") as file:
        assert json.load(file)["bbox"] == "0:8,8,16,16 4:24,8,32,16"
    mask = np.zeros((5, 32, 48, 3), np.uint8)
    for number, frame in enumerate(mask):
        frame[8:16, 8 + 4 * number : 16 + 4 * number] = 255
    write_video("mask.mkv", mask, 12, lossless=True)
    assert kvlock("--lossless", save_file="by_mask.mkv")[0] == 0
    np.testing.assert_array_equal(edited(), edited("by_mask.mkv"))


def test_an_edit_refuses_a_box_past_the_end(fails):
    errors = fails("--bbox", "0:8,8,16,16", "5:8,8,16,16", src_mask=None)
    assert "there is no frame 5, the last frame of the video is 4" in errors
    assert len(tiny.clip()) == 5
