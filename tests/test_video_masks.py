"""Masks from every kind of source, and refusals."""

import numpy as np
import pytest
from clips import SHAPE, blob, noise, quick
from hypothesis import given
from hypothesis import strategies as st

from kvlock_jax.errors import InputError
from kvlock_jax.media import encode, masks
from kvlock_jax.pipeline.inputs import read_inputs
from kvlock_jax.settings.schema import EditConfig


def white(mask: np.ndarray) -> np.ndarray:
    return np.repeat(mask[..., None] * np.uint8(255), 3, -1)


def test_masks_from_every_kind_of_source(tmp_path):
    encode.write_video(tmp_path / "m.mkv", white(blob()), 24, lossless=True)
    encode.write_video(tmp_path / "m.mp4", white(blob()), 24)
    np.save(tmp_path / "m.npy", blob())
    (tmp_path / "m").mkdir()
    for t, image in enumerate(white(blob())):
        encode.write_png(tmp_path / "m" / f"{t}.png", image)
    for name in ("m.mkv", "m.mp4", "m.npy", "m"):
        np.testing.assert_array_equal(masks.read_mask(tmp_path / name, *SHAPE), blob(), name)
    np.testing.assert_array_equal(masks.read_mask(str(tmp_path / "m.mkv"), *SHAPE), blob())


def test_a_one_frame_mask_stands_for_all(tmp_path):
    encode.write_png(tmp_path / "m.png", white(blob())[2])
    np.save(tmp_path / "m.npy", blob()[2])
    for mask in (tmp_path / "m.png", tmp_path / "m.npy", blob()[2], blob()[2:3]):
        found = masks.read_mask(mask, *SHAPE)
        np.testing.assert_array_equal(found, blob()[2:3])
        inputs = read_inputs(noise(), mask, "a star", EditConfig())
        np.testing.assert_array_equal(inputs.mask, np.stack([blob()[2]] * 5))
        assert inputs.mask.dtype == bool and inputs.mask.flags.writeable


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 127, 128, 255]], np.uint8), [0, 0, 1, 1]),
        (np.array([[0, 1, 1, 0]], np.uint8), [0, 1, 1, 0]),
        (np.array([[0, 1, 1, 0]], np.int64), [0, 1, 1, 0]),
        (np.array([[0.0, 0.5, 0.51, 1.0]]), [0, 0, 1, 1]),
        (np.array([[0.0, 127.5, 127.6, 255.0]], np.float32), [0, 0, 1, 1]),
        (np.array([[False, True, True, False]]), [0, 1, 1, 0]),
        (np.array([[[[0, 0, 255], [128, 0, 0], [127, 127, 127], [0, 0, 0]]]]), [1, 1, 0, 0]),
    ],
)
def test_over_half_of_the_brightest_channel_is_one(values, expected):
    found = masks.read_mask(values, 1, 1, 4)
    np.testing.assert_array_equal(found, np.array(expected, bool)[None, None])


def test_files_count_by_the_brightest_channel_and_over_half_too(tmp_path):
    image = np.array([[[0, 0, 255], [128, 0, 0], [127, 127, 127], [1, 1, 1]]], np.uint8)
    encode.write_png(tmp_path / "m.png", image)
    found = masks.read_mask(tmp_path / "m.png", 1, 1, 4)
    np.testing.assert_array_equal(found, [[[True, True, False, False]]])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (blob(4), "mask: 4 frames, but the video has 5"),
        (blob()[:, :30], "mask: 48x30 pixels, but the video has 48x32"),
        (blob()[:1, :, :47], "mask: 47x32 pixels, but the video has 48x32"),
        (np.zeros((0, 32, 48), bool), r"found bool of shape \(0, 32, 48\)"),
        (np.zeros(5), r"frames height width, found float64 of shape \(5,\)"),
        (np.full((32, 48), "x"), "must be numbers"),
        (np.full((32, 48), np.nan), r"in 0\.\.1 or in 0\.\.255, found nan to nan"),
        (np.full((32, 48), -1.0), "found -1.0 to -1.0"),
        (np.full((32, 48), 256), "found 256 to 256"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(mask, message):
    with pytest.raises(InputError, match=message):
        masks.read_mask(mask, *SHAPE)


def test_mask_files_that_do_not_fit_are_named(tmp_path):
    encode.write_video(tmp_path / "short.mkv", white(blob(3)), 24, lossless=True)
    with pytest.raises(InputError, match=r"short\.mkv: 3 frames, but the video has 5"):
        masks.read_mask(tmp_path / "short.mkv", *SHAPE)
    with pytest.raises(InputError, match=r"short\.mkv: 48x32 pixels, but the video has 50x32"):
        masks.read_mask(tmp_path / "short.mkv", 3, 32, 50)
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npy").write_text("hello")
    for name in ("object.npy", "empty.npy", "text.npy", "missing.npy", "missing.mp4"):
        with pytest.raises(InputError, match=name):
            masks.read_mask(tmp_path / name, *SHAPE)


@quick
@given(st.data())
def test_a_box_is_its_pixels(data):
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    expected = [[x0 <= x < x1 and y0 <= y < y1 for x in range(width)] for y in range(height)]
    for box in (f"{x0}, {y0},{x1},{y1}", (x0, y0, x1, y1), np.array([x0, y0, x1, y1])):
        np.testing.assert_array_equal(masks.bbox_mask(box, 2, height, width), [expected] * 2)


@pytest.mark.parametrize(
    "box",
    [
        *("1,2,3", "1,2,3,4,5", "a,b,c,d", "", "1.5,2,3,4", (1.5, 2, 3, 4), 7, None),
        *("3,0,3,9", "4,0,3,9", "0,5,3,5", "-1,0,3,3", "0,0,49,3", "0,0,3,33"),
    ],
)
def test_what_is_no_box_is_named(box):
    with pytest.raises(InputError, match="bbox"):
        masks.bbox_mask(box, *SHAPE)


def test_coverage_and_the_empty_mask():
    assert masks.check_mask(np.ones(SHAPE, bool)) == 1.0
    mask = np.zeros(SHAPE, bool)
    mask[0, 0, :24] = True
    assert masks.check_mask(mask) == pytest.approx(24 / (5 * 32 * 48))
    with pytest.raises(InputError, match="nothing to edit"):
        masks.check_mask(np.zeros(SHAPE, bool))
