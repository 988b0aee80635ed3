"""Masks in the alpha channel, and transparency of pictures and references."""

import av
import numpy as np
import PIL.Image
import pytest
from clips import noise, smooth

from kvlock_jax.media import encode, masks
from kvlock_jax.pipeline.inputs import read_inputs
from kvlock_jax.settings.schema import EditConfig

HEIGHT, WIDTH = 32, 48
HOLE = np.zeros((HEIGHT, WIDTH), bool)
HOLE[8:20, 10:30] = True
SHARE = f"{100 * HOLE.mean():.1f} % of the pixels"


def rgba(colours: np.ndarray, opaque: np.ndarray) -> np.ndarray:
    return np.concatenate([colours, np.uint8(255) * opaque[..., None]], axis=-1).astype(np.uint8)


PHOTO = rgba(smooth(1)[0], ~HOLE)
PAINT = rgba(np.where(HOLE[..., None], np.uint8([255, 255, 255]), np.uint8([0, 0, 0])), HOLE)


def read(mask, frames=1) -> np.ndarray:
    return masks.read_mask(mask, frames, HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ["m.png", "m.webp", "m.tiff", "grey.png", "palette.png"])
def test_transparent_is_edited_as_in_comfyui(tmp_path, name):
    picture = PIL.Image.fromarray(PHOTO)
    if name == "grey.png":
        picture = picture.convert("LA")
    if name == "palette.png":
        picture = picture.quantize(64)
    picture.save(tmp_path / name, **({"lossless": True} if name == "m.webp" else {}))
    with pytest.warns(UserWarning, match=f"alpha channel, what is transparent .*{SHARE}"):
        np.testing.assert_array_equal(read(tmp_path / name), HOLE[None])


@pytest.mark.parametrize("colour", [(255, 255, 255), (255, 0, 0)])
def test_bright_paint_on_a_transparent_layer_is_edited(tmp_path, colour):
    painted = PAINT.copy()
    painted[HOLE, :3] = colour
    PIL.Image.fromarray(painted).save(tmp_path / "m.png")
    with pytest.warns(UserWarning, match=f"paint of one colour .*{SHARE}.*--invert_mask"):
        np.testing.assert_array_equal(read(tmp_path / "m.png"), HOLE[None])


def test_a_hole_in_black_is_edited(tmp_path):
    PIL.Image.fromarray(rgba(np.zeros((HEIGHT, WIDTH, 3)), ~HOLE)).save(tmp_path / "m.png")
    with pytest.warns(UserWarning, match="what is transparent is edited"):
        np.testing.assert_array_equal(read(tmp_path / "m.png"), HOLE[None])


def test_constant_alpha_is_no_mask(tmp_path):
    white = np.where(HOLE[..., None], np.uint8([255, 255, 255]), np.uint8([0, 0, 0]))
    for alpha in (255, 200):
        image = np.dstack([white, np.full((HEIGHT, WIDTH), alpha, np.uint8)])
        PIL.Image.fromarray(image).save(tmp_path / "m.png")
        np.testing.assert_array_equal(read(tmp_path / "m.png"), HOLE[None])


def test_frames_with_and_without_a_hole(tmp_path):
    """A folder of frames; where nothing is edited, the alpha of that frame is constant."""
    whole = rgba(smooth(1)[0], np.ones_like(HOLE))
    for n, image in enumerate((whole, PHOTO, whole[..., :3])):
        PIL.Image.fromarray(image).save(tmp_path / f"{n}.png")
    with pytest.warns(UserWarning, match="what is transparent is edited"):
        found = read(tmp_path, frames=3)
    np.testing.assert_array_equal(found, [~HOLE & HOLE, HOLE, ~HOLE & HOLE])


def test_alpha_of_a_video(tmp_path):
    with av.open(str(tmp_path / "m.mov"), "w") as output:
        stream = output.add_stream("png", rate=24)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "rgba"
        for n in range(3):
            frame = av.VideoFrame.from_ndarray(np.roll(PHOTO, n, axis=1), format="rgba")
            frame.pts = n
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.warns(UserWarning, match="what is transparent is edited"):
        found = read(tmp_path / "m.mov", frames=3)
    np.testing.assert_array_equal(found, [np.roll(HOLE, n, axis=1) for n in range(3)])


@pytest.mark.parametrize("white", [255, 1.0])
def test_alpha_of_arrays(tmp_path, white):
    image = PHOTO / 255 * white
    np.save(tmp_path / "m.npy", image)
    for mask in (image, image[None], tmp_path / "m.npy"):
        with pytest.warns(UserWarning, match="what is transparent is edited"):
            np.testing.assert_array_equal(read(mask), HOLE[None])
    np.testing.assert_array_equal(read(PAINT[..., :3]), HOLE[None])  # a picture without alpha
    with pytest.warns(UserWarning, match="what is transparent is edited"):
        grey_alpha = np.dstack([PHOTO[..., 0], PHOTO[..., 3]])
        np.testing.assert_array_equal(read(grey_alpha), HOLE[None])


def test_invert_mask_turns_alpha_round(tmp_path):
    PIL.Image.fromarray(PHOTO).save(tmp_path / "m.png")
    with pytest.warns(UserWarning, match="what is transparent is edited"):
        inputs = read_inputs(noise(2), tmp_path / "m.png", "a star", EditConfig(invert_mask=True))
    np.testing.assert_array_equal(inputs.mask, np.stack([~HOLE] * 2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_references_lie_on_white(tmp_path, mode):
    picture = PIL.Image.fromarray(PHOTO)
    picture = picture.quantize(128) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "r.png")
    expected = np.asarray(picture.convert("RGBA"))[..., :3].copy()
    expected[HOLE] = 255
    array = np.asarray(picture.convert("RGBA"))
    inputs = read_inputs(
        noise(1), HOLE, "a star", EditConfig(), references=[tmp_path / "r.png", array]
    )
    for reference in inputs.references:
        np.testing.assert_array_equal(reference, expected)


def test_half_transparent_references_are_mixed_with_white():
    image = np.full((4, 4, 4), 100, np.uint8)
    image[..., 3] = 51
    inputs = read_inputs(noise(1), HOLE, "a star", EditConfig(), references=image)
    np.testing.assert_array_equal(inputs.references[0], np.full((4, 4, 3), 224))


def test_a_transparent_clip_lies_on_white(tmp_path):
    PIL.Image.fromarray(PHOTO).save(tmp_path / "in.png")
    encode.write_png(tmp_path / "m.png", np.full((HEIGHT, WIDTH, 3), 255, np.uint8))
    inputs = read_inputs(tmp_path / "in.png", tmp_path / "m.png", "a star", EditConfig())
    assert (inputs.source[0][HOLE] == 255).all()
    np.testing.assert_array_equal(inputs.source[0][~HOLE], smooth(1)[0][~HOLE])
