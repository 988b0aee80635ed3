"""The judge against the scenes that were rendered, whole and degraded as a VAE would."""

import dataclasses

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from kvlock_jax.demo import world
from kvlock_jax.demo.judge import THRESHOLD, judge
from kvlock_jax.errors import InputError

SCENES = [
    world.random_scene(10_000 + seed, held_out=held_out)
    for held_out in (False, True)
    for seed in range(120)
]


def _degraded(video, seed):
    """Blurred and noisy, as a small VAE's round trip leaves a clip."""
    noise = np.random.default_rng(seed).normal(0, 8, video.shape)
    soft = gaussian_filter(video.astype(np.float32), (0, 1.5, 1.5, 0)) + noise
    return np.clip(np.rint(soft), 0, 255).astype(np.uint8)


def _right(scene, verdict):
    return (verdict.colour, verdict.shape) == (scene.colour, scene.shape)


def test_renders_are_judged_right_and_located():
    verdicts = [judge(world.render(scene).video) for scene in SCENES]
    right = [_right(s, v) for s, v in zip(SCENES, verdicts, strict=True)]
    assert np.mean(right) >= 0.99
    for scene, verdict, is_right in zip(SCENES, verdicts, right, strict=True):
        if is_right:
            assert np.abs(verdict.centres - scene.centres).max() < 1.5


def test_degraded_renders_are_judged_right():
    videos = [_degraded(world.render(s).video, i) for i, s in enumerate(SCENES)]
    right = [_right(s, judge(v)) for s, v in zip(SCENES, videos, strict=True)]
    assert np.mean(right) >= 0.97


@pytest.mark.parametrize("degrade", [False, True])
def test_empty_backgrounds_show_no_object(degrade):
    for i, scene in enumerate(SCENES[::2]):
        video = world.render_background(scene)
        verdict = judge(_degraded(video, i) if degrade else video)
        assert (verdict.colour, verdict.shape) == (None, None)
        assert verdict.overlap < 0.5 < THRESHOLD
        assert verdict.centres.shape == (world.FRAMES, 2) and np.isnan(verdict.centres).all()


def test_overlap_of_a_perfect_template_is_one():
    video = np.full((1, 96, 96, 3), 110, np.uint8)
    cover = world.shape_cover("triangle", 20.0, (40.0, 52.0)) > 0.5
    video[0, cover] = world.COLOURS["green"]
    verdict = judge(video)
    assert (verdict.colour, verdict.shape, verdict.overlap) == ("green", "triangle", 1.0)
    np.testing.assert_array_equal(verdict.centres, [[40, 52]])


def test_overlap_counts_stray_pixels_and_missing_frames():
    video = np.full((2, 96, 96, 3), 110, np.uint8)
    cover = world.shape_cover("square", 20.0, (30.0, 30.0)) > 0.5
    video[0, cover] = world.COLOURS["blue"]
    stray = int(cover.sum()) // 10
    video[0].reshape(-1, 3)[-stray:] = world.COLOURS["blue"]
    # 1 / 1.1 in the first frame, nothing in the second, which is too little for an object.
    verdict = judge(video)
    assert verdict.overlap == pytest.approx(0.5 * cover.sum() / (cover.sum() + stray))
    assert verdict.colour is None
    verdict = judge(video[:1])
    assert verdict.overlap == pytest.approx(cover.sum() / (cover.sum() + stray))
    assert (verdict.colour, verdict.shape) == ("blue", "square")


@pytest.mark.parametrize("lightness", [48, 182])
def test_grey_shapes_are_background(lightness):
    video = np.full((1, 96, 96, 3), 110, np.uint8)
    video[0, world.shape_cover("circle", 20.0, (48.0, 48.0)) > 0.5] = lightness
    assert judge(video).overlap == 0


def test_region_hides_what_lies_outside():
    scene = dataclasses.replace(SCENES[0], start=(30.0, 30.0), velocity=(0.0, 0.0), radius=18.0)
    small = dataclasses.replace(scene, shape="circle", colour="red")
    large = dataclasses.replace(
        scene, shape="square", colour="blue", radius=24.0, start=(70.0, 70.0)
    )
    clip, other = world.render(small), world.render(large)
    video = np.where(other.mask[..., None], other.video, clip.video)
    assert judge(video).colour == "blue"
    verdict = judge(video, clip.mask)
    assert (verdict.colour, verdict.shape) == ("red", "circle")
    assert judge(video, ~(clip.mask | other.mask)).colour is None


def test_bad_input_is_refused(unchecked):
    video = np.zeros((2, 96, 96, 3), np.uint8)
    with pytest.raises(InputError, match="uint8"):
        judge(video.astype(np.float32))
    with pytest.raises(InputError, match="frames height width 3"):
        judge(video[0])
    with pytest.raises(InputError, match="region"):
        judge(video, np.ones((2, 96, 95), bool))
