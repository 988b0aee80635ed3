"""The demo world: coloured shapes moving in lines over a softened, panning photograph.

A clip is a function of its `Scene`, and a `Scene` of its seed. So a data set is a range of
integers, and the ground truth of an edit is
`render(dataclasses.replace(scene, colour=..., shape=...))`. Most scenes have one object
(`random_scene`); in `random_pair` a second one comes near it, and in both a post may stand in
front.
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
_PAIR_RADII = (14.0, 19.0)  # of two objects, which have to share the frame
_PAIR_MIDDLES = ((18.0, 34.0), (61.0, 77.0))  # x of their centres half-way through the clip, px
_POST_WIDTHS = (6.0, 10.0)  # px
_POST = 62.0  # grey
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
class Thing:
    """A further object of a scene; fields as in `Scene`."""

    shape: str
    colour: str
    radius: float
    start: tuple[float, float]
    velocity: tuple[float, float]


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
    other: Thing | None = None
    """A second object, which passes in front of the first where they meet."""
    post: tuple[float, float] | None = None
    """Left and right edge of an upright post in front of everything, which does not move; px."""

    @property
    def centres(self) -> Float[np.ndarray, "frames 2"]:
        """The object's centre (x, y) in every frame; it bounces off the frame's border."""
        return centres_of(self, self.frames)

    @property
    def caption(self) -> str:
        """The sentence that describes the scene; of two objects, the left one comes first."""
        if self.other is None:
            return caption(self.shape, self.colour)
        both = sorted((self, self.other), key=lambda thing: centres_of(thing, FRAMES)[:, 0].mean())
        return " and ".join(caption(thing.shape, thing.colour) for thing in both)


def centres_of(thing: Thing | Scene, frames: int) -> Float[np.ndarray, "frames 2"]:
    """An object's centre (x, y) in every frame; it bounces off the frame's border."""
    line = np.asarray(thing.start) + np.arange(frames)[:, None] * np.asarray(thing.velocity)
    low = thing.radius + _EDGE
    room = SIZE - 1 - 2 * low
    folded = low + room - np.abs((line - low) % (2 * room) - room)
    # Lines that do not bounce keep all their bits.
    return np.where(np.abs(folded - line) < 1e-9, line, folded)


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A rendered scene."""

    video: UInt8[np.ndarray, "frames height width 3"]
    mask: Bool[np.ndarray, "frames height width"]
    """The pixels that the (first) object covers, even in part."""
    caption: str


def caption(shape: str, colour: str = "") -> str:
    """What the demo's language calls an object: "a red circle", or "a circle" of any colour.

    A sentence is one of them, or two, joined by "and": what is on the left comes first.
    """
    return " ".join(filter(None, ("a", colour, shape)))


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


def random_pair(seed: int, *, held_out: bool = False) -> Scene:
    """The scene of a seed with a second object beside the first, either of them on the left.

    Both are smaller than that of `random_scene`, have colours of their own, and may meet.
    """
    scene = random_scene(seed, held_out=held_out)
    rng = np.random.default_rng([seed, 7])
    colours = [str(name) for name in rng.choice(list(COLOURS), 2, replace=False)]
    things = []
    for colour, (low, high) in zip(colours, _PAIR_MIDDLES, strict=True):
        radius = rng.uniform(*_PAIR_RADII)
        speed, angle = rng.uniform(0, _SPEED), rng.uniform(0, 2 * np.pi)
        velocity = speed * np.array([np.cos(angle), np.sin(angle)])
        half_way = (FRAMES - 1) / 2 * velocity
        margin = radius + _EDGE + np.abs(half_way)
        least = np.maximum(margin, (low, _PAIR_MIDDLES[0][0]))
        most = np.minimum(SIZE - 1 - margin, (high, _PAIR_MIDDLES[1][1]))
        middle = rng.uniform(np.minimum(least, most), most)
        start = _pair(middle - half_way)
        things.append(Thing(str(rng.choice(SHAPES)), colour, float(radius), start, _pair(velocity)))
    first, other = things if rng.integers(2) else things[::-1]
    return dataclasses.replace(scene, **dataclasses.asdict(first), other=other)


def with_post(scene: Scene, seed: int) -> Scene:
    """The scene with a post in front of the object's way."""
    rng = np.random.default_rng([seed, 8])
    width = rng.uniform(*_POST_WIDTHS)
    middle = rng.uniform(scene.centres[:, 0].min(), scene.centres[:, 0].max())
    return dataclasses.replace(scene, post=_pair(middle + np.array([-0.5, 0.5]) * width))


def render(scene: Scene) -> Clip:
    """The clip of a scene: `(1 - c) background + c colour`, with `c` an object's cover."""
    video, covers = _background(scene), []
    for thing in filter(None, (scene, scene.other)):
        centres = centres_of(thing, scene.frames)
        cover = np.stack([shape_cover(thing.shape, thing.radius, centre) for centre in centres])
        video = _drawn(video, cover, np.asarray(COLOURS[thing.colour], np.float32))
        covers.append(cover)
    video = _with_post(video, scene)
    return Clip(video=_to_uint8(video), mask=covers[0] > 0, caption=scene.caption)


def render_background(scene: Scene) -> UInt8[np.ndarray, "frames height width 3"]:
    """The same clip without objects."""
    return _to_uint8(_with_post(_background(scene), scene))


def post_cover(scene: Scene) -> Float[np.ndarray, "width"]:
    """The share of each column of pixels that the post covers, 0-1."""
    if scene.post is None:
        return np.zeros(SIZE, np.float32)
    left, right = scene.post
    x = np.arange(SIZE, dtype=np.float32)
    return np.clip(np.minimum(x + 0.5 - left, right - (x - 0.5)), 0, 1)


def _drawn(video: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> np.ndarray:
    alpha = cover[..., None]
    return (1 - alpha) * video + alpha * colour


def _with_post(video: np.ndarray, scene: Scene) -> np.ndarray:
    cover = np.broadcast_to(post_cover(scene), video.shape[:-1])
    return _drawn(video, cover, np.float32(_POST)) if scene.post else video


def shape_cover(
    shape: str,
    radius: float | np.ndarray,
    centre: tuple[float | np.ndarray, float | np.ndarray],
    size: int = SIZE,
) -> Float[np.ndarray, "*batch height width"]:
    """The share of each pixel that the shape covers, 0-1, as `clip(1/2 - d, 0, 1)`.

    `d` is the signed distance in pixels from the pixel's centre to the shape's edge, negative
    inside. `radius` is half the extent, `centre` the (x, y) of the middle of the bounding box;
    where they are arrays of `*batch 1 1`, there are as many shapes.
    """
    radius = np.float32(radius)
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
