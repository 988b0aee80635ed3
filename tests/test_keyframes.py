"""Boxes and shapes of keyframes, and what lies between them."""

import numpy as np
import pytest

from kvlock_jax import masks
from kvlock_jax.errors import InputError
from kvlock_jax.masks.keyframes import parse_boxes, parse_files


def edges(mask: np.ndarray) -> list[tuple[int, ...]]:
    """The box of each frame, which is filled."""
    found = []
    for frame in mask:
        y, x = np.nonzero(frame)
        box = x.min(), y.min(), x.max() + 1, y.max() + 1
        assert frame.sum() == (box[2] - box[0]) * (box[3] - box[1])
        found.append(tuple(map(int, box)))
    return found


def test_boxes_move_in_a_line_and_are_held_outside():
    mask = masks.boxes({5: (10, 4, 14, 8), 1: (2, 0, 4, 8)}, 8, 16, 32)
    assert edges(mask) == [
        (2, 0, 4, 8),
        (2, 0, 4, 8),
        (4, 1, 7, 8),  # 6.5 goes up
        (6, 2, 9, 8),
        (8, 3, 12, 8),  # 11.5 too
        *[(10, 4, 14, 8)] * 3,
    ]


def test_a_box_of_one_pixel_stays_one():
    mask = masks.boxes({0: (0, 0, 1, 1), 4: (10, 10, 11, 11)}, 5, 16, 16)
    assert mask.sum((1, 2)).tolist() == [1] * 5


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("1,2,3,4", (1, 2, 3, 4)),
        (["1,2,3,4"], (1, 2, 3, 4)),
        ([1, 2, 3, 4], (1, 2, 3, 4)),
        ("40:5,6,7,8 0:1, 2, 3, 4", {0: (1, 2, 3, 4), 40: (5, 6, 7, 8)}),
        (["0:1,2,3,4", "40:5,6,7,8"], {0: (1, 2, 3, 4), 40: (5, 6, 7, 8)}),
        ({"40": [5, 6, 7, 8], "0": "1,2,3,4"}, {0: (1, 2, 3, 4), 40: (5, 6, 7, 8)}),
        ("3:1,2,3,4", {3: (1, 2, 3, 4)}),
    ],
)
def test_boxes_as_written(given, found):
    read = parse_boxes(given)
    assert read == found
    assert list(read) == list(found)  # by frame


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("", "bbox must be four whole numbers"),
        ("0:1,2,3", "bbox must be four whole numbers x0,y0,x1,y1, found '1,2,3'"),
        ("0:1,2,3,4 5,6,7,8", "bbox must be four whole numbers"),
        (["1,2,3,4", "5:5,6,7,8"], "must be FRAME:x0,y0,x1,y1, found '1,2,3,4'"),
        ("x:1,2,3,4", "must be FRAME:x0,y0,x1,y1, found 'x:1,2,3,4'"),
        ("-1:1,2,3,4", "must be FRAME:x0,y0,x1,y1, found '-1:1,2,3,4'"),
        ("0:1,2,3,4 0:5,6,7,8", "frame 0 is given twice"),
        ({"a": [1, 2, 3, 4]}, "number of a frame must be 0 or more, found 'a'"),
        ({}, "no box is given"),
        (7, "bbox must be four whole numbers"),
    ],
)
def test_boxes_of_wrong_syntax(given, problem):
    with pytest.raises(InputError, match=problem):
        parse_boxes(given)


def test_files_as_written():
    assert parse_files(["a.png"]) == {0: "a.png"}
    assert parse_files(["40:b.png"]) == {40: "b.png"}
    assert parse_files(["gs://b/a.png"]) == {0: "gs://b/a.png"}
    assert parse_files(["40:b.png", "0:gs://b/a.png"]) == {0: "gs://b/a.png", 40: "b.png"}
    with pytest.raises(InputError, match="each of several must be FRAME:FILE"):
        parse_files(["0:a.png", "b.png"])


@pytest.mark.parametrize(
    ("keyframes", "problem"),
    [
        ({}, "no box is given"),
        ({8: (0, 0, 4, 4)}, "there is no frame 8, the last frame of the video is 7"),
        ({0: (0, 0, 4, 4), 5: (0, 0, 40, 4)}, "0,0,40,4 is not a box inside 32x16"),
    ],
)
def test_bad_boxes(keyframes, problem):
    with pytest.raises(InputError, match=problem):
        masks.boxes(keyframes, 8, 16, 32)


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:64, :96]
    return np.hypot(columns - x, rows - y) <= radius


def test_a_shape_moves_and_grows_into_the_next():
    mask = masks.shapes({2: disc(20, 30, 8), 6: disc(60, 30, 16)}, 9)
    for number in (0, 1, 2):
        np.testing.assert_array_equal(mask[number], disc(20, 30, 8))
    for number in (6, 7, 8):
        np.testing.assert_array_equal(mask[number], disc(60, 30, 16))
    for number, radius in ((3, 10), (4, 12), (5, 14)):
        wanted = disc(20 + 10 * (number - 2), 30, radius)
        assert (mask[number] & wanted).sum() > 0.95 * (mask[number] | wanted).sum()


def test_a_shape_at_the_border_stays_in_the_frame():
    mask = masks.shapes({0: disc(0, 30, 12), 4: disc(95, 63, 12)}, 5)
    assert mask.any(axis=(1, 2)).all()


def test_shapes_without_a_pixel_in_common_leave_no_frame_empty():
    ring = disc(48, 32, 20) & ~disc(48, 32, 12)
    mask = masks.shapes({0: ring, 4: disc(48, 32, 3)}, 5)
    assert mask.any(axis=(1, 2)).all() and mask[3, 32, 48] and not mask[1, 32, 48]


def test_spans():
    assert masks.spans(np.array([1, 1, 0, 0, 1, 0, 1, 1], bool)) == [(0, 1), (4, 4), (6, 7)]
    assert masks.spans(np.zeros(3, bool)) == []
