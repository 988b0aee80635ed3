"""Sizes that the model takes: padding, resizing, and back."""

from fractions import Fraction

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from clips import blob, noise, quick
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvlock_jax.errors import InputError
from kvlock_jax.media import masks
from kvlock_jax.media.fit import Fit, resize

sizes = st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(1, 40))


@quick
@given(sizes, st.integers(0, 99))
def test_fit_pads_to_the_models_sizes_by_the_nearest_pixel_and_back(size, seed):
    frames = noise(*size, seed=seed)
    fit = Fit(*frames.shape[:3])
    padded = fit.apply(frames)
    assert padded.shape[:3] == fit.model_shape
    assert padded.shape[0] % 4 == 1 and padded.shape[1] % 16 == padded.shape[2] % 16 == 0
    for grown, was, step in zip(padded.shape, size, (4, 16, 16), strict=False):
        assert was <= grown < was + step
    t, y, x = (np.minimum(np.arange(n), m - 1) for n, m in zip(padded.shape, size, strict=False))
    np.testing.assert_array_equal(padded, frames[t][:, y][:, :, x])
    np.testing.assert_array_equal(fit.undo(padded), frames)


@quick
@given(hnp.arrays(bool, sizes))
def test_a_padded_mask_edits_no_added_pixel_and_no_added_latent_frame(mask):
    fit = Fit(*mask.shape)
    padded = fit.apply_mask(mask)
    assert padded.shape == fit.model_shape and padded.dtype == bool
    frames, height, width = mask.shape
    np.testing.assert_array_equal(fit.undo(padded), mask)
    assert not padded[:, height:].any() and not padded[:, :, width:].any()
    # A latent frame holds pixel frame 0, or four more: no frame after the first is alone in one.
    latent_frame = -(-np.arange(len(padded)) // 4)
    for t in range(frames, len(padded)):
        assert latent_frame[t] == latent_frame[frames - 1]
        np.testing.assert_array_equal(padded[t, :height, :width], mask[-1])


def test_fit_names_what_does_not_fit():
    fit = Fit(6, 30, 40)
    assert fit.model_shape == (9, 32, 48)
    for apply in (fit.apply, fit.undo):
        with pytest.raises(InputError, match="must be"):
            apply(noise(5))
    with pytest.raises(InputError, match=r"must be \(6, 30, 40\), found \(5, 32, 48\)"):
        fit.apply_mask(blob())


@pytest.mark.parametrize("size", [(16, 24), (20, 33), (7, 5), (64, 96), (40, 20)])
def test_resize_is_pillows_antialiased_triangle(size):
    frames = noise(2)
    found = resize(frames, *size)
    expected = [
        np.asarray(PIL.Image.fromarray(f).resize(size[::-1], PIL.Image.Resampling.BILINEAR))
        for f in frames
    ]
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.stack(expected)).max() <= 1


def test_resizing_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(resize(noise(), 32, 48), noise())


@quick
@given(hnp.arrays(bool, st.tuples(st.just(2), st.integers(1, 9), st.integers(1, 9))), sizes)
def test_a_resized_mask_loses_no_edited_pixel(mask, size):
    _, height, width = size
    found = masks.resize_mask(mask, height, width)

    def overlapping(old, new):  # pairs of old and new pixels that share some of [0, 1]
        return [
            (i, j)
            for i in range(old)
            for j in range(new)
            if Fraction(i, old) < Fraction(j + 1, new) and Fraction(j, new) < Fraction(i + 1, old)
        ]

    expected = np.zeros((2, height, width), bool)
    columns = overlapping(mask.shape[2], width)
    for y, row in overlapping(mask.shape[1], height):
        for x, column in columns:
            expected[:, row, column] |= mask[:, y, x]
    np.testing.assert_array_equal(found, expected)
