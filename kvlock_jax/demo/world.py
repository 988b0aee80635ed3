"""The demo world: a coloured shape moving in a line over a softened, panning photograph.

A clip is a function of its `Scene`, and a `Scene` of its seed. So a data set is a range of
integers, and the ground truth of an edit is
`render(dataclasses.replace(scene, colour=..., shape=...))`.
"""

import dataclasses
import functools
import pathlib

import numpy as np
from jaxtyping import Bool, Float, UInt8

FRAMES = 9
SIZE = 96
SHAPES = ("circle", "square", "triangle", "plus")
COLOURS = {
    "red": (225, 25, 25),
    "green": (20, 190, 40),
    "blue": (25, 60, 235),
    "yellow": (245, 225, 20),
    "purple": (175, 30, 205),
    "white": (250, 250, 250),
}
TRAIN_PHOTOS = ("astronaut", "brick", "clock", "coffee", "grass", "gravel", "rocket")
HELD_OUT_PHOTOS = ("camera", "chelsea")

_PHOTO_FILE = pathlib.Path(__file__).parent / "photos" / "photos.npz"
_RADII = (18.0, 24.0)  # half the object's extent, px: smaller ones do not survive a small VAE
_SPEED = 2.0  # px per frame at most
_MIDDLE = (32.0, 64.0)  # where the object's centre may be half-way through the clip, px
_PAN = 8.0  # px at most over the whole clip, along each axis
_EDGE = 1.0  # px beyond the object's extent, for the antialiased edge
_BLUR = 3.0  # sigma, px
_GREY = 112.0
# With these two every softened photo lies within 45 and 185 of 255, its channels within 55 of each
# other; the colours' differ by 155 or more, and white is at 250.
_CONTRAST = 0.6
_SATURATION = 0.5


@dataclasses.dataclass(frozen=True)
class Scene:
    """The input of `render`; points and vectors are (x, y) in pixels, x to the right, y down."""

    shape: str
    colour: str
    radius: float
    """Half the extent of the object."""
    start: tuple[float, float]
    """Centre of the object in frame 0; the centre of the top left pixel is (0, 0)."""
    velocity: tuple[float, float]
    """Pixels per frame."""
    photo: str
    origin: tuple[float, float]
    """Position of frame 0's top left pixel in the photo."""
    pan: tuple[float, float]
    """Movement of the crop over the whole clip."""
    mirrored: bool
    """Whether the photo is flipped left to right before it is cropped."""
    frames: int = FRAMES
    """Length of the clip."""

    @property
    def centres(self) -> Float[np.ndarray, "frames 2"]:
        """The object's centre (x, y) in every frame; it bounces off the frame's border."""
        line = np.asarray(self.start) + np.arange(self.frames)[:, None] * np.asarray(self.velocity)
        low = self.radius + _EDGE
        room = SIZE - 1 - 2 * low
        folded = low + room - np.abs((line - low) % (2 * room) - room)
        # Lines that do not bounce keep all their bits.
        return np.where(np.abs(folded - line) < 1e-9, line, folded)

    @property
    def caption(self) -> str:
        """The sentence that describes the scene."""
        return caption(self.shape, self.colour)


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A rendered scene."""

    video: UInt8[np.ndarray, "frames height width 3"]
    mask: Bool[np.ndarray, "frames height width"]
    """The pixels that the object covers, even in part."""
    caption: str


def caption(shape: str, colour: str) -> str:
    """The only kind of sentence in the demo's language, such as "a red circle"."""
    return f"a {colour} {shape}"


def random_scene(seed: int, *, held_out: bool = False, frames: int = FRAMES) -> Scene:
    """The scene of a seed; `held_out` takes its photo from `HELD_OUT_PHOTOS`.

    The caller keeps seeds for training and for evaluation apart. The object lies wholly inside
    every frame. A longer scene begins as the shorter one of its seed does, except that it pans
    more slowly.
    """
    rng = np.random.default_rng(seed)
    radius = rng.uniform(*_RADII)
    speed, angle = rng.uniform(0, _SPEED), rng.uniform(0, 2 * np.pi)
    velocity = speed * np.array([np.cos(angle), np.sin(angle)])
    half_way = (FRAMES - 1) / 2 * velocity
    margin = radius + _EDGE + np.abs(half_way)
    middle = rng.uniform(np.maximum(margin, _MIDDLE[0]), np.minimum(SIZE - 1 - margin, _MIDDLE[1]))
    photo = str(rng.choice(HELD_OUT_PHOTOS if held_out else TRAIN_PHOTOS))
    height, width = _soft_photo(photo).shape[:2]
    pan = rng.uniform(-_PAN, _PAN, 2)
    room = np.array([width, height]) - SIZE
    origin = rng.uniform(np.maximum(0, -pan), room - np.maximum(0, pan))
    return Scene(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        radius=float(radius),
        start=_pair(middle - half_way),
        velocity=_pair(velocity),
        photo=photo,
        origin=_pair(origin),
        pan=_pair(pan),
        mirrored=bool(rng.integers(2)),
        frames=frames,
    )


def render(scene: Scene) -> Clip:
    """The clip of a scene: `(1 - c) background + c colour`, with `c` the object's cover."""
    cover = np.stack([shape_cover(scene.shape, scene.radius, centre) for centre in scene.centres])
    alpha = cover[..., None]
    colour = np.asarray(COLOURS[scene.colour], np.float32)
    video = (1 - alpha) * _background(scene) + alpha * colour
    return Clip(video=_to_uint8(video), mask=cover > 0, caption=scene.caption)


def render_background(scene: Scene) -> UInt8[np.ndarray, "frames height width 3"]:
    """The same clip without the object."""
    return _to_uint8(_background(scene))


def shape_cover(
    shape: str, radius: float, centre: tuple[float, float], size: int = SIZE
) -> Float[np.ndarray, "height width"]:
    """The share of each pixel that the shape covers, 0-1, as `clip(1/2 - d, 0, 1)`.

    `d` is the signed distance in pixels from the pixel's centre to the shape's edge, negative
    inside. `radius` is half the extent, `centre` the (x, y) of the middle of the bounding box.
    """
    x = np.abs(np.arange(size, dtype=np.float32)[None, :] - np.float32(centre[0]))
    y = np.arange(size, dtype=np.float32)[:, None] - np.float32(centre[1])
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - radius
    elif shape == "square":
        # A square of the full extent would look far larger than the circle.
        distance = np.maximum(x, np.abs(y)) - 0.9 * radius
    elif shape == "triangle":
        # Base at the bottom, 2r wide and 2r high: the sides' unit normals are (2, -1) / sqrt(5).
        distance = np.maximum((2 * x - y - radius) / np.sqrt(np.float32(5)), y - radius)
    elif shape == "plus":
        arm, y = 0.3 * radius, np.abs(y)
        upright = np.maximum(x - arm, y - radius)
        crossbar = np.maximum(x - radius, y - arm)
        distance = np.minimum(upright, crossbar)
    else:
        raise ValueError(f"shape must be one of {SHAPES}, found {shape!r}")
    return np.clip(0.5 - distance, 0, 1)


def _pair(vector: np.ndarray) -> tuple[float, float]:
    return float(vector[0]), float(vector[1])


def _to_uint8(video: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)


def _background(scene: Scene) -> Float[np.ndarray, "frames height width 3"]:
    photo = _soft_photo(scene.photo)
    if scene.mirrored:
        photo = photo[:, ::-1]
    origin, pan = np.asarray(scene.origin), np.asarray(scene.pan)
    times = [t / max(scene.frames - 1, 1) for t in range(scene.frames)]
    return np.stack([_crop(photo, *(origin + pan * time)) for time in times])


def _crop(photo: np.ndarray, x: float, y: float) -> np.ndarray:
    """The square of `SIZE` whose top left pixel is at (x, y), interpolated bilinearly."""
    # The last crop may end on the photo's last pixel, which has no neighbour to mix with.
    left = min(int(x), photo.shape[1] - SIZE - 1)
    top = min(int(y), photo.shape[0] - SIZE - 1)
    right_part, lower_part = np.float32(x - left), np.float32(y - top)
    patch = photo[top : top + SIZE + 1, left : left + SIZE + 1]
    rows = (1 - lower_part) * patch[:-1] + lower_part * patch[1:]
    return (1 - right_part) * rows[:, :-1] + right_part * rows[:, 1:]


@functools.cache
def _soft_photo(name: str) -> Float[np.ndarray, "height width 3"]:
    """A photo, blurred, half desaturated and drawn towards mid-grey; cached, since it is slow."""
    with np.load(_PHOTO_FILE) as photos:
        photo = photos[name].astype(np.float32)
    if photo.ndim == 2:
        photo = np.repeat(photo[..., None], 3, axis=-1)
    photo = _blur(_blur(photo, axis=0), axis=1)
    luminance = photo @ np.array([0.299, 0.587, 0.114], np.float32)
    photo = _SATURATION * photo + (1 - _SATURATION) * luminance[..., None]
    photo = _GREY + _CONTRAST * (photo - _GREY)
    photo.flags.writeable = False
    return photo


def _blur(photo: np.ndarray, axis: int) -> np.ndarray:
    reach = int(3 * _BLUR)
    steps = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (steps / _BLUR) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    edges = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(photo, edges, mode="reflect"), 2 * reach + 1, axis=axis
    )
    return windows @ kernel
