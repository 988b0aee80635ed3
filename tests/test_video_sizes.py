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
from kvlock_jax.media.fit import Fit, Resize, resize_mask
from kvlock_jax.settings.schema import FITS

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
    np.testing.assert_array_equal(padded[:frames, :height, :width], mask)
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
    found = np.stack([Resize((32, 48), size, "stretch").frame(frame) for frame in frames])
    expected = [
        np.asarray(PIL.Image.fromarray(f).resize(size[::-1], PIL.Image.Resampling.BILINEAR))
        for f in frames
    ]
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.stack(expected)).max() <= 1


def test_resizing_to_the_same_size_changes_nothing():
    for fit in FITS:
        same = Resize((32, 48), (32, 48), fit)
        np.testing.assert_array_equal(same.frame(noise()[0]), noise()[0])
        np.testing.assert_array_equal(same.mask(blob()), blob())
        assert same.warning() is None


@quick
@given(hnp.arrays(bool, st.tuples(st.just(2), st.integers(1, 9), st.integers(1, 9))), sizes)
def test_a_resized_mask_loses_no_edited_pixel(mask, size):
    _, height, width = size
    found = resize_mask(mask, height, width)

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


# --- sizes of another shape -------------------------------------------------------------------


def disc(height: int, width: int) -> np.ndarray:
    """A picture with a white disc in its middle, on grey."""
    y, x = np.mgrid[:height, :width]
    radius = min(height, width) / 3
    inside = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) <= radius
    return np.where(inside[..., None], 255, 90).astype(np.uint8).repeat(3, -1)


def extent(mask: np.ndarray) -> tuple[int, int]:
    """Rows and columns of the smallest box around a mask."""
    rows, columns = (int(np.ptp(where)) + 1 for where in np.nonzero(mask))
    return rows, columns


@pytest.mark.parametrize("source", [(40, 60), (60, 40), (48, 50), (54, 96)])
@pytest.mark.parametrize("target", [(64, 64), (60, 104)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_what_is_round_stays_round(source, target, fit):
    resize = Resize(source, target, fit)
    image = disc(*source)
    shown = resize.frame(image)
    assert shown.shape == (*target, 3)
    mask = resize.mask(image[None, ..., 0] > 172)[0]
    assert mask.shape == target
    assert (mask | ~(shown[..., 0] > 172)).all()  # the mask lies over what it marked
    whole = fit == "pad" or resize.window[0].stop - resize.window[0].start == source[0]
    for height, width in (extent(shown[..., 0] > 172), extent(mask)) if whole else ():
        assert abs(height - width) <= 3 and height > 5


def test_a_crop_is_the_middle_that_has_the_shape():
    image = noise(1, 40, 80)[0]
    crop = Resize((40, 80), (40, 40))
    np.testing.assert_array_equal(crop.frame(image), image[:, 20:60])
    assert "cropped to the middle 40x40; --fit pad keeps" in crop.warning()
    image = noise(1, 80, 41)[0]
    np.testing.assert_array_equal(Resize((80, 41), (20, 41)).frame(image), image[30:50])


def test_bars_are_black_and_background():
    image = np.full((40, 80, 3), 200, np.uint8)
    pad = Resize((40, 80), (80, 80), "pad")
    shown, mask = pad.frame(image), pad.mask(np.ones((2, 40, 80), bool))
    np.testing.assert_array_equal(shown[20:60], image)
    assert not shown[:20].any() and not shown[60:].any()
    assert mask[:, 20:60].all() and not mask[:, :20].any() and not mask[:, 60:].any()
    assert "scaled to 80x40 between black bars" in pad.warning()


def test_stretching_is_asked_for():
    stretch = Resize((40, 80), (80, 80), "stretch")
    height, width = extent(stretch.frame(disc(40, 80))[..., 0] > 172)
    assert height == pytest.approx(2 * width, abs=2)
    assert stretch.warning() is None


@pytest.mark.parametrize(("source", "target"), [((1080, 1920), (90, 160)), ((31, 48), (62, 96))])
def test_one_shape_is_neither_cropped_nor_padded(source, target):
    for fit in FITS:
        assert Resize(source, target, fit).warning() is None


sides = st.tuples(st.integers(1, 60), st.integers(1, 60))


@quick
@given(sides, sides, st.sampled_from(FITS))
def test_any_size_comes_to_any_other(source, target, fit):
    resize = Resize(source, target, fit)
    (rows, columns), (down, across) = resize.window, resize.place
    for part, whole in zip((rows, columns, down, across), (*source, *target), strict=True):
        assert 0 <= part.start < part.stop <= whole
        assert abs(part.start - (whole - part.stop)) <= 1  # centred
    expected = (down.stop - down.start) * (across.stop - across.start)
    assert resize.mask(np.ones((1, *source), bool)).sum() == expected


def test_a_frame_of_another_size_is_named():
    with pytest.raises(InputError, match="one size, found 48x31 and 48x32"):
        Resize((32, 48), (16, 24)).frame(noise()[0, 1:])
