"""One shape becomes another: masks of the frames between two keyframes."""

import itertools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from kvlock_jax.errors import InputError
from kvlock_jax.masks.keyframes import check_numbers
from kvlock_jax.shapes import Mask

Shape = Bool[np.ndarray, "height width"]


def shapes(keyframes: Mapping[int, Shape], frames: int) -> Mask:
    """The masks of shapes that change evenly from each keyframe to the next.

    Before the first keyframe and after the last one the shape stays as it is there.

    Args:
      keyframes: masks by the number of their frame.
      frames: number of the clip's frames.

    Raises:
      InputError: as in `checked`.
    """
    keyframes = checked(keyframes, frames)
    numbers = list(keyframes)
    mask = np.empty((frames, *keyframes[numbers[0]].shape), bool)
    mask[: numbers[0]] = keyframes[numbers[0]]
    mask[numbers[-1] :] = keyframes[numbers[-1]]
    for first, last in itertools.pairwise(numbers):
        for number in range(first, last):
            share = (number - first) / (last - first)
            mask[number] = between(keyframes[first], keyframes[last], share)
    return mask


def checked(keyframes: Mapping[int, Shape], frames: int) -> Mapping[int, Shape]:
    """The keyframes in the order of their frames.

    Raises:
      InputError: there is none, one is past the end, is empty, or they differ in size.
    """
    if not keyframes:
        raise InputError("no mask is given")
    check_numbers("mask", keyframes, frames)
    ordered = {number: np.asarray(keyframes[number]) for number in sorted(keyframes)}
    sizes = {mask.shape for mask in ordered.values()}
    if len(sizes) > 1:
        raise InputError(f"masks must be of one size, found {sorted(sizes)}")
    for number, mask in ordered.items():
        if mask.dtype != bool or mask.ndim != 2:
            found = f"{mask.dtype} of shape {mask.shape}"
            raise InputError(f"the mask of frame {number} must be bool height width, found {found}")
        if not mask.any():
            raise InputError(f"the mask of frame {number} is empty: no pixel is over half of white")
    return ordered


def between(first: Shape, last: Shape, share: float) -> Shape:
    """The shape at a share of the way, 0 to 1, from one to another.

    The centre moves in a line. Round it, a pixel belongs to the shape where the mean of its signed
    distances to both outlines, weighted by the share, lies inside.
    """
    if not share:
        return first
    centres = np.array([_centre(first), _centre(last)])
    boxes = [ndimage.find_objects(mask.astype(np.uint8))[0] for mask in (first, last)]
    # Both on a canvas that holds either, each with its centre in the middle.
    reach = 2 + max(
        max(centre - edge.start, edge.stop - centre)
        for pair, box in zip(centres, boxes, strict=True)
        for centre, edge in zip(pair, box, strict=True)
    )
    size = (2 * reach + 1, 2 * reach + 1)
    placed = []
    for mask, centre in zip((first, last), centres, strict=True):
        canvas = np.zeros(size, bool)
        _paste(canvas, mask, reach - centre)
        placed.append(canvas)
    distance = (1 - share) * _signed_distance(placed[0]) + share * _signed_distance(placed[1])
    inside = distance < 0
    if not inside.any():  # two shapes without a pixel in common
        inside = placed[round(share)]
    middle = np.rint((1 - share) * centres[0] + share * centres[1]).astype(int)
    mask = np.zeros_like(first)
    _paste(mask, inside, middle - reach)
    return mask


def _centre(mask: Shape) -> np.ndarray:
    return np.rint(ndimage.center_of_mass(mask)).astype(int)


def _signed_distance(mask: Shape) -> Float[np.ndarray, "height width"]:
    """Pixels to the outline, negative inside."""
    outside, inside = (ndimage.distance_transform_edt(part) for part in (~mask, mask))
    return np.where(mask, 0.5 - inside, outside - 0.5)


def _paste(canvas: np.ndarray, image: np.ndarray, place: np.ndarray) -> None:
    """Puts an image on a canvas, with its top left pixel at a place; what lies beyond is cut."""
    begin = np.maximum(place, 0)
    end = np.minimum(place + image.shape, canvas.shape)
    if (begin < end).all():
        target = tuple(map(slice, begin, end))
        canvas[target] = image[tuple(map(slice, begin - place, end - place))]
