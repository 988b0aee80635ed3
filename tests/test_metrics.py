"""The metrics against scikit-image, plain loops over pixels, and cases worked by hand."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kvlock_jax.errors import InputError
from kvlock_jax.evaluate import metrics


def clip(seed: int, frames: int = 3, height: int = 40, width: int = 56):
    """A source, a noisy edit of it, and a mask that moves and touches the frame's edge."""
    rng = np.random.default_rng(seed)
    source = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    edited = np.clip(source + rng.normal(0, 20, source.shape), 0, 255).astype(np.uint8)
    mask = np.zeros((frames, height, width), bool)
    for t in range(frames):
        mask[t, 0:12, 20 + 3 * t : 30 + 3 * t] = True
    return source, edited, mask


def distance(mask: np.ndarray) -> np.ndarray:
    """Chebyshev distance to the frame's mask, by looking at every pair of pixels."""
    result = np.full(mask.shape, 10**6)
    for t in range(len(mask)):
        on = np.argwhere(mask[t])
        for y in range(mask.shape[1]):
            for x in range(mask.shape[2]):
                if len(on):
                    result[t, y, x] = np.abs(on - (y, x)).max(axis=1).min()
    return result


@pytest.mark.parametrize("border", [0, 1, 8])
def test_background_psnr_is_scikit_image_on_the_background_alone(border):
    source, edited, mask = clip(0)
    far = distance(mask) > border
    expected = peak_signal_noise_ratio(source[far], edited[far], data_range=255)
    assert metrics.background_psnr(source, edited, mask, border) == pytest.approx(expected)


def test_the_ceiling_is_the_background_of_the_round_trip():
    source, edited, mask = clip(1)
    trip = clip(2)[0]
    measured = metrics.measure(source, edited, mask, trip)
    assert measured.background_ceiling == metrics.background_psnr(source, trip, mask)
    without = metrics.measure(source, edited, mask)
    assert dataclasses.replace(measured, background_ceiling=None) == without
    assert without.as_dict()["background_ceiling"] is None


def test_background_psnr_divides_by_the_backgrounds_own_count():
    source = np.full((1, 20, 20, 3), 100, np.uint8)
    edited = source.copy()
    mask = np.zeros((1, 20, 20), bool)
    mask[:, :, :10] = True
    edited[0, 5, 19] = 104  # d = 10: counts
    edited[0, 5, 17] = 0  # d = 8: in the ring
    edited[0, 5, 3] = 0  # on the mask
    # Two columns of 20 pixels are further than 8: 16 / 40.
    expected = 10 * math.log10(255**2 / (16 / 40))
    assert metrics.background_psnr(source, edited, mask) == pytest.approx(expected)


@pytest.mark.parametrize("border", [0, 8])
def test_background_ssim_is_the_mean_of_scikit_images_map(border):
    source, edited, mask = clip(1)
    maps = [
        structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True,
            channel_axis=2, data_range=255,
        )[1]
        for a, b in zip(source, edited, strict=True)
    ]  # fmt: skip
    expected = np.stack(maps)[distance(mask) > border].mean()
    found = metrics.background_ssim(source, edited, mask, border)
    assert 0.5 < expected < 0.99
    assert found == pytest.approx(expected, abs=1e-5)


def test_ssim_on_smooth_frames_where_variances_nearly_cancel():
    y, x = np.mgrid[:32, :48]
    source = np.stack([200 + y // 8, 220 - x // 8, 230 + 0 * x], -1).astype(np.uint8)[None]
    edited = source + np.uint8(2)
    _, expected = structural_similarity(
        source[0], edited[0], gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        full=True, channel_axis=2, data_range=255,
    )  # fmt: skip
    found = metrics.background_ssim(source, edited, np.zeros((1, 32, 48), bool))
    assert found == pytest.approx(expected.mean(), abs=2e-4)


def test_ring_error_and_flicker_are_the_loops_means():
    source, edited, mask = clip(2)
    d = distance(mask)
    errors, changes = [], []
    for t in range(len(mask)):
        for y, x in np.ndindex(mask.shape[1:]):
            for c in range(3):
                e = int(edited[t, y, x, c]) - int(source[t, y, x, c])
                if 0 < d[t, y, x] <= 8:
                    errors.append(abs(e))
                    if t > 0 and 0 < d[t - 1, y, x] <= 8:
                        before = int(edited[t - 1, y, x, c]) - int(source[t - 1, y, x, c])
                        changes.append(abs(e - before))
    assert metrics.ring_error(source, edited, mask) == pytest.approx(np.mean(errors))
    assert metrics.ring_flicker(source, edited, mask) == pytest.approx(np.mean(changes))


def test_a_constant_error_does_not_flicker_and_an_alternating_one_does():
    mask = np.zeros((4, 30, 30), bool)
    mask[:, 12:18, 12:18] = True
    source = np.full((4, 30, 30, 3), 100, np.uint8)
    assert metrics.ring_error(source, source + np.uint8(7), mask) == 7
    assert metrics.ring_flicker(source, source + np.uint8(7), mask) == 0
    flickering = source.copy()
    flickering[::2] += 3
    flickering[1::2] -= 3
    assert metrics.ring_error(source, flickering, mask) == 3
    assert metrics.ring_flicker(source, flickering, mask) == 6


@settings(max_examples=20, deadline=None, database=None)
@given(st.integers(0, 2**16), st.integers(0, 2), st.integers(0, 15), st.integers(0, 15))
def test_ring_and_background_share_out_the_pixels_off_the_mask(seed, t, y, x):
    mask = np.zeros((3, 16, 16), bool)
    mask[:, 4:7, 5:9] = True
    source = np.random.default_rng(seed).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    edited = source.copy()
    edited[t, y, x] ^= 255
    in_ring = metrics.ring_error(source, edited, mask, 3) > 0
    in_background = metrics.background_psnr(source, edited, mask, 3) < math.inf
    assert in_ring + in_background + bool(mask[t, y, x]) == 1


def test_a_video_against_itself():
    source, _, mask = clip(3)
    found = metrics.measure(source, source.copy(), mask)
    assert found.psnr == found.background_psnr == math.inf
    assert found.background_ssim == pytest.approx(1, abs=1e-6)
    assert found.ring_error == found.ring_flicker == 0


def test_differences_do_not_wrap_around():
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert metrics.psnr(black, white) == metrics.psnr(white, black) == 0


def test_psnr_is_scikit_images():
    source, edited, _ = clip(4)
    expected = peak_signal_noise_ratio(source, edited, data_range=255)
    assert metrics.psnr(source, edited) == pytest.approx(expected)


def test_no_pixels_no_value():
    source, edited, mask = clip(5)
    everything, nothing = np.ones_like(mask), np.zeros_like(mask)
    assert math.isnan(metrics.background_psnr(source, edited, everything))
    assert math.isnan(metrics.background_ssim(source, edited, everything))
    assert math.isnan(metrics.ring_error(source, edited, everything))
    assert math.isnan(metrics.ring_error(source, edited, nothing))
    assert math.isnan(metrics.ring_flicker(source[:1], edited[:1], mask[:1]))


def test_measure_gathers_every_function_and_takes_jax_arrays():
    source, edited, mask = clip(6)
    found = metrics.measure(jnp.asarray(source), jnp.asarray(edited), jnp.asarray(mask))
    expected = {
        "psnr": metrics.psnr(source, edited),
        "background_psnr": metrics.background_psnr(source, edited, mask),
        "background_ssim": metrics.background_ssim(source, edited, mask),
        "ring_error": metrics.ring_error(source, edited, mask),
        "ring_flicker": metrics.ring_flicker(source, edited, mask),
        "background_ceiling": None,
    }
    assert found.as_dict() == expected
    assert {type(value) for value in expected.values()} == {float, type(None)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.psnr = 0.0


@pytest.mark.parametrize("change", ["frames", "width", "mask", "float"])
def test_what_does_not_match_is_named(change, unchecked):
    source, edited, mask = clip(7)
    bad = {
        "frames": (source, edited[1:], mask),
        "width": (source, edited[:, :, 1:], mask),
        "mask": (source, edited, mask[:, 1:]),
        "float": (source, edited.astype(np.float32) / 255, mask),
    }[change]
    for metric in (metrics.background_psnr, metrics.background_ssim, metrics.ring_flicker):
        with pytest.raises(InputError, match=r"one size|must be uint8, found float32"):
            metric(*bad)
