"""Pictures of phones and the web: HEIC tiles, animated WebP, AVIF and PNG; cut files."""

import heics
import numpy as np
import PIL.Image
import pytest
from clips import encode as encode_by
from clips import noise, psnr, smooth

from kvlock_jax.errors import InputError
from kvlock_jax.media import decode

Y, X = np.mgrid[:128, :192]
PHOTO = np.stack([2 * Y, X, (X + Y) // 2], -1).astype(np.uint8)
TILES = [PHOTO[y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64, 128)]


@pytest.mark.parametrize("size", [(192, 128), (180, 101)])
@pytest.mark.parametrize(
    ("turns", "turned"),
    [
        ((), lambda image: image),
        ((("irot", 1),), np.rot90),
        ((("irot", 2),), lambda image: np.rot90(image, 2)),
        ((("irot", 3),), lambda image: np.rot90(image, 3)),
        ((("imir", 0),), np.flipud),
        ((("imir", 1),), np.fliplr),
        ((("irot", 1), ("imir", 1)), lambda image: np.fliplr(np.rot90(image))),
    ],
)
def test_a_picture_of_tiles_is_put_together_and_turned(tmp_path, size, turns, turned):
    (tmp_path / "a.heic").write_bytes(heics.heic(TILES, 3, size, turns))
    expected = turned(PHOTO[: size[1], : size[0]])
    found = decode.read_image(tmp_path / "a.heic")
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 3


def test_a_picture_of_one_tile_is_turned(tmp_path):
    (tmp_path / "a.heic").write_bytes(heics.heic(TILES[:1], 0, (64, 64), (("irot", 1),)))
    found = decode.read_video(tmp_path / "a.heic")
    assert found.fps == 16
    assert np.abs(found.frames[0].astype(int) - np.rot90(TILES[0])).max() <= 3


@pytest.mark.parametrize("missing", [b"dimg", b"pitm", b"iprp"])
def test_tiles_that_cannot_be_put_together_are_named(tmp_path, missing):
    data = heics.heic(TILES, 3, (192, 128))
    (tmp_path / "a.heic").write_bytes(data.replace(missing, b"free"))
    with pytest.raises(InputError, match=r"a\.heic: .*(HEIC|readable)") as caught:
        decode.read_image(tmp_path / "a.heic")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".webp", ".avif", ".png"])
@pytest.mark.parametrize(
    ("durations", "fps"), [([40] * 5, 25), ([100] * 5, 10), ([40, 40, 200, 40, 40], None)]
)
def test_an_animated_picture_is_read_whole(tmp_path, suffix, durations, fps):
    frames = np.stack([np.roll(smooth()[0], 5 * n, axis=1) for n in range(5)])
    images = [PIL.Image.fromarray(image) for image in frames]
    images[0].save(
        tmp_path / f"a{suffix}",
        save_all=True,
        append_images=images[1:],
        duration=durations,
        quality=95,
    )
    found = decode.read_video(tmp_path / f"a{suffix}")
    assert found.frames.shape == frames.shape
    assert psnr(found.frames, frames) > 25
    if fps:
        assert found.fps == fps and found.times is None
    else:
        np.testing.assert_allclose(found.times, [0, 0.04, 0.08, 0.28, 0.32], atol=1e-3)
    assert len(decode.read_video(tmp_path / f"a{suffix}", 2).frames) == 2


@pytest.mark.parametrize("name", ["a.webp", "a.tiff", "a.bmp", "a.avif"])
def test_a_picture_is_one_frame(tmp_path, name):
    PIL.Image.fromarray(smooth()[0]).save(tmp_path / name, quality=95)
    found = decode.read_video(tmp_path / name)
    assert found.frames.shape == (1, 32, 48, 3) and found.fps == 16
    assert psnr(found.frames[0], smooth()[0]) > 28


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.gif", "gif", "rgb8"),
        ("a.flv", "flv", "yuv420p"),
        ("a.flv", "libx264", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.ogv", "libvpx", "yuv420p"),
    ],
)
def test_a_cut_file_is_refused(tmp_path, name, codec, pixels, share):
    path = encode_by(tmp_path / name, noise(12), codec, pixels)
    whole = path.read_bytes()
    assert len(decode.read_video(path).frames) == 12
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=rf"{name}: the video is truncated"):
        decode.read_video(path)


@pytest.mark.parametrize("suffix", [".webp", ".png", ".avif", ".gif"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_cut_animation_is_refused(tmp_path, suffix, share):
    images = [PIL.Image.fromarray(image) for image in noise()]
    path = tmp_path / f"a{suffix}"
    images[0].save(path, save_all=True, append_images=images[1:], duration=40)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"truncated|readable|damaged"):
        decode.read_video(path)


@pytest.mark.parametrize("share", [0.4, 0.7])
@pytest.mark.parametrize(
    ("name", "codec"), [("a.ts", "libx264"), ("a.ts", "mpeg2video"), ("a.mpg", "mpeg2video")]
)
def test_a_cut_recording_is_read_with_a_warning(tmp_path, name, codec, share):
    path = encode_by(tmp_path / name, noise(24), codec, "yuv420p", options={"g": "4"})
    whole = path.read_bytes()
    assert len(decode.read_video(path).frames) == 24
    path.write_bytes(whole[: int(len(whole) * share) // 188 * 188 + 100])
    with pytest.warns(UserWarning, match=rf"{name}: the recording was cut"):
        found = decode.read_video(path)
    assert 0 < len(found.frames) < 24
