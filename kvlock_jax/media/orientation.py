"""Turns and mirrors frames as their display matrix says, in all eight orientations."""

import struct

import av
import numpy as np
from av.sidedata.sidedata import Type


def display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """The entries `a, b, c, d` of a frame's display matrix, each -1, 0 or 1.

    A pixel `(x, y)` is shown at `(a x + c y, b x + d y)`. Angles between are taken to the nearest
    quarter turn; the matrix of a frame that has none is the identity.
    """
    try:
        matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # PyAV knows no name for some other side data of this frame
        turns = round(frame.rotation / 90) % 4
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[turns]
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _sign(a), 0, 0, _sign(d)
    return 0, _sign(b), _sign(c), 0


def swaps_sides(matrix: tuple[int, int, int, int]) -> bool:
    """Whether the matrix turns rows into columns, and the shape of a pixel with them."""
    return not matrix[0]


def upright(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Turns an image (`height width ...`) as the matrix of `display_matrix` shows it."""
    a, b, c, d = matrix
    if swaps_sides(matrix):
        image = image.swapaxes(0, 1)
    return image[:: b + d, :: a + c]


def _sign(value: int) -> int:
    return -1 if value < 0 else 1
